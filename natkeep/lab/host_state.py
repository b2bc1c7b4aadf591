"""The state of a host: everything that a translation could leave behind there, as text.

Rule: what is compared is what a person would look at: nft's ruleset, addresses, routes, policy
rules, and every readable sysctl of the network namespace. Only what changes by itself is left
out: `-s` leaves out what counters count. A sysctl that was not there is a kernel module's, which
was loaded meanwhile and stays: it is left out where it says what it says in a new namespace.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable

from natkeep.lab.host import Host
from natkeep.lab.time_scale import scaled

# Counts what passes, so it differs between any two looks.
_ALIVE = ("/proc/sys/net/netfilter/nf_conntrack_count:",)

COMMANDS = {
    "ruleset": "nft -s -j list ruleset",
    "addresses": "ip -j address",
    "routes": "ip -j route show table all",
    "routes, IPv6": "ip -j -6 route show table all",
    "policy rules": "ip -j rule; ip -j -6 rule",
    "sysctls": "grep -rs '' /proc/sys/net",
}
_MARK = "=== "


def read_surfaces(host: Host) -> dict[str, str]:
    """Each surface of *host* by its name."""
    return split_output(host.run("sh", "-c", make_script(COMMANDS)).stdout)


def make_script(commands: dict[str, str]) -> str:
    """A shell script that runs all *commands*, whose output `split_output` takes apart."""
    lines = [f"echo '{_MARK}{name}'; {command}" for name, command in commands.items()]
    return "\n".join([*lines, "true"])


def split_output(shown: str) -> dict[str, str]:
    """The output of each command, by its name."""
    surfaces: dict[str, str] = {}
    for part in shown.split(f"\n{_MARK}"):
        name, _, text = part.removeprefix(_MARK).partition("\n")
        surfaces[name] = text
    lines = surfaces["sysctls"].splitlines()
    surfaces["sysctls"] = "\n".join(line for line in lines if not line.startswith(_ALIVE))
    return surfaces


def read_untouched() -> str:
    """The sysctls of a new network namespace, as the surface shows them."""
    shown = subprocess.run(
        ["unshare", "--net", "sh", "-c", COMMANDS["sysctls"]],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=scaled(20),
    )  # fmt: skip
    return shown.stdout


def difference(
    before: dict[str, str], after: dict[str, str], *, untouched: Callable[[], str] = read_untouched
) -> str:
    """What differs, in one line; empty when nothing does."""
    found = []
    for name, text in before.items():
        there = after[name]
        if name == "sysctls":
            there = _without_loaded(text, there, untouched)
        if text != there:
            old, new = set(_words(text)), set(_words(there))
            found.append(f"{name}: gone {sorted(old - new)[:3]}, new {sorted(new - old)[:3]}")
    return "; ".join(found)


def _without_loaded(before: str, after: str, untouched: Callable[[], str]) -> str:
    """*after* without the files that a module brought and nothing has changed."""
    files, lines = {_file(line) for line in before.splitlines()}, after.splitlines()
    if not any(_file(line) not in files for line in lines):
        return after
    usual = set(untouched().splitlines())
    return "\n".join(line for line in lines if _file(line) in files or line not in usual)


def _file(line: str) -> str:
    return line.partition(":")[0]


def _words(text: str) -> list[str]:
    return text.replace("}, {", "},\n{").replace("},{", "},\n{").splitlines()
