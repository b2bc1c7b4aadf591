"""The state of a host: everything that a translation could leave behind there, as text.

Rule: what is compared is what a person would look at: nft's ruleset, addresses, routes, policy
rules, and every readable sysctl of the network namespace. Only what changes by itself is left
out: `-s` leaves out what counters count.

Two looks: `read_surfaces` at a host of a lab, where a server and its peers live on; and
`read_all_surfaces` at a namespace without traffic, with what traffic would change by itself:
the connection table, processes, and who holds the namespace.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from natkeep.lab.host import NAMES, Host, LabError

# Counts what passes, so it differs between any two looks.
_ALIVE = ("/proc/sys/net/netfilter/nf_conntrack_count:",)

_LOOKS = {
    "ruleset": "nft -s -j list ruleset",
    "addresses": "ip -j address",
    "routes": "ip -j route show table all",
    "routes, IPv6": "ip -j -6 route show table all",
    "policy rules": "ip -j rule; ip -j -6 rule",
    "sysctls": "grep -rs '' /proc/sys/net",
}
_SAVE = "%s-save | sed -e '/^#/d' -e 's/\\[[0-9]*:[0-9]*\\]//'"
_QUIET_LOOKS = {
    **_LOOKS,
    "iptables": "; ".join(
        _SAVE % f"{tool}-{kind}" for kind in ("nft", "legacy") for tool in ("iptables", "ip6tables")
    ),
    "links": "ip -j -d link",
    "neighbours": "ip -j neigh show nud permanent; ip -j neigh show proxy",
    # conntrack(8) walks the table's buckets twice, for 30 ms each; this is one look at all.
    "conntrack": "cat /proc/net/nf_conntrack",
}
_MARK = "=== "

# Time-outs that run down, and reference counts.
_PASSING = re.compile(r"(?<=\d) +\d+(?= [A-Z]| src=)| use=\d+")


def read_surfaces(host: Host) -> dict[str, str]:
    """Each surface of *host* by its name."""
    return _take_apart(host.run("sh", "-c", _script(_LOOKS)).stdout)


def read_all_surfaces(name: str) -> dict[str, str]:
    """Each surface of the quiet namespace *name* below /run/netns, with who is in it."""
    shown = subprocess.run(
        ["nsenter", f"--net={NAMES / name}", "sh", "-c", _script(_QUIET_LOOKS)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    if shown.returncode:
        raise LabError(f"{name}: {shown.stderr.strip()}")
    surfaces = _take_apart(shown.stdout)
    rows = (_PASSING.sub("", row) for row in surfaces["conntrack"].splitlines())
    surfaces["conntrack"] = "\n".join(sorted(rows))
    inode = (NAMES / name).stat().st_ino
    surfaces["processes"] = "\n".join(sorted(_find_inside(inode)))
    surfaces["namespace references"] = "\n".join(sorted(_find_references(inode)))
    return surfaces


def read_directory(path: Path) -> str:
    """Each file of a directory: its name, mode, size and content; the last surface."""
    found = []
    for file in sorted(path.iterdir()):
        status = file.lstat()
        content = file.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found.append(f"{file.name} {status.st_mode:o} {content!r}")
    return "\n".join(found)


def _find_inside(inode: int) -> Iterator[str]:
    """The command lines of all processes in a network namespace."""
    for process in _processes():
        try:
            if (process / "ns/net").stat().st_ino == inode:
                yield (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue  # it has ended


def _find_references(inode: int) -> Iterator[str]:
    """Who has a descriptor of the namespace, and where it is mounted."""
    target = f"net:[{inode}]"
    for process in _processes():
        try:
            for descriptor in (process / "fd").iterdir():
                if os.readlink(descriptor) == target:
                    yield f"{(process / 'comm').read_text().strip()} holds it"
        except OSError:
            continue
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        if f" {target} " in line:
            yield line.split(" ")[4]


def _processes() -> list[Path]:
    return [path for path in Path("/proc").iterdir() if path.name.isdigit()]


def _script(looks: dict[str, str]) -> str:
    return "\n".join(f"echo '{_MARK}{name}'; {look}" for name, look in looks.items()) + "\ntrue"


def _take_apart(shown: str) -> dict[str, str]:
    surfaces: dict[str, str] = {}
    for part in shown.split(f"\n{_MARK}"):
        name, _, text = part.removeprefix(_MARK).partition("\n")
        surfaces[name] = text
    lines = surfaces["sysctls"].splitlines()
    surfaces["sysctls"] = "\n".join(line for line in lines if not line.startswith(_ALIVE))
    return surfaces


def difference(before: dict[str, str], after: dict[str, str]) -> str:
    """What differs, in one line; empty when nothing does."""
    found = []
    for name, text in before.items():
        if text != after[name]:
            old, new = set(_words(text)), set(_words(after[name]))
            found.append(f"{name}: gone {sorted(old - new)[:3]}, new {sorted(new - old)[:3]}")
    return "; ".join(found)


def _words(text: str) -> list[str]:
    return text.replace("}, {", "},\n{").replace("},{", "},\n{").splitlines()
