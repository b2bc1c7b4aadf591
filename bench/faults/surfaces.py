"""The whole state of a namespace without traffic, as text, with what traffic would change.

Beside what natkeep.lab.host_state reads: iptables, links, neighbours, the connection table,
processes, and what holds the namespace.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from natkeep.lab.host import NAMES, LabError
from natkeep.lab.host_state import COMMANDS, make_script, split_output

_SAVE = "%s-save | sed -e '/^#/d' -e 's/\\[[0-9]*:[0-9]*\\]//'"
_ALL_COMMANDS = {
    **COMMANDS,
    "iptables": "; ".join(
        _SAVE % f"{tool}-{kind}" for kind in ("nft", "legacy") for tool in ("iptables", "ip6tables")
    ),
    "links": "ip -j -d link",
    "neighbours": "ip -j neigh show nud permanent; ip -j neigh show proxy",
    # conntrack(8) walks the table's buckets twice, for 30 ms each; this is one look at all.
    "conntrack": "cat /proc/net/nf_conntrack",
}

# Time-outs that run down, and reference counts.
_PASSING = re.compile(r"(?<=\d) +\d+(?= [A-Z]| src=)| use=\d+")


def read_all_surfaces(name: str) -> dict[str, str]:
    """Each surface of the quiet namespace *name* below /run/netns, with who is in it."""
    shown = subprocess.run(
        ["nsenter", f"--net={NAMES / name}", "sh", "-c", make_script(_ALL_COMMANDS)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
    )  # fmt: skip
    if shown.returncode:
        raise LabError(f"{name}: {shown.stderr.strip()}")
    surfaces = split_output(shown.stdout)
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
