"""What could grow from move to move, read as numbers, and judged at the end.

    book = Book(); book.note({"gateway: nft objects": 0, …}); …; book.assertions()

Three kinds. What is counted (objects, descriptors, files) must be at every reading exactly what it
was at the first. What has a bound in BOUNDS comes and goes by itself, and must never pass it. What
is weighed (`… KiB`) swings with the allocator's mood, so medians are compared: that of the last
third of the readings may exceed that of the first third by SLACK_KIB and no more, which a leak of
one page a move does after 400 moves.

Rule: the network namespaces are those of the lab's own hosts, and files and processes are its own;
others' work on the same machine shows in no gauge.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from natkeep.lab.host import NAMES, Host
from natkeep.lab.report import Assertion

SLACK_KIB = 1024
WEIGHT = " KiB"

_LOOKS = 20
_PAUSE_S = 0.01
"""What an application has open just for a moment (its report) is gone in one of these looks."""

BOUNDS = {
    # conntrack picks kept connections up again in the moment in which their entries have been
    # deleted and the rules have not; a row for each, once, which the next move purges.
    "conntrack rows": 12,
    # init, the application, the one that reads this, and programs that are just ending
    "processes": 8,
}
"""By the last words of a gauge's name, what it may show at most."""

_COUNTS = {
    "conntrack rows": "cat /proc/sys/net/netfilter/nf_conntrack_count",
    "addresses": "ip -o address | wc -l",
    "routes": "{ ip route show table all; ip -6 route show table all; } | wc -l",
    "policy rules": "{ ip rule; ip -6 rule; } | wc -l",
    # Without others' namespaces: when such a name goes, its mount goes here as well.
    "mounts": "grep -cv /netns/ /proc/self/mountinfo",
    "processes": "ls -d /proc/[0-9]* | wc -l",
}
_RULESET = "nft -s -j list ruleset"


def read_host(host: Host) -> dict[str, int]:
    """What the kernel keeps for *host*: `ROLE: nft objects` and the like."""
    script = "\n".join([*_COUNTS.values(), _RULESET])
    *numbers, ruleset = host.run("sh", "-ec", script).stdout.splitlines()
    found = dict(zip(_COUNTS, map(int, numbers), strict=True))
    found["nft objects"] = len(json.loads(ruleset)["nftables"]) - 1  # besides the metainfo
    return {f"{host.role}: {name}": number for name, number in found.items()}


def read_process(name: str, directory: Path) -> dict[str, int]:
    """Descriptors and resident memory of the process whose /proc entry *directory* is."""
    status = (directory / "status").read_text(encoding="ascii")
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return {
        f"{name}: descriptors": len(list((directory / "fd").iterdir())),
        f"{name}: memory{WEIGHT}": int(resident.split()[1]),
    }


def read_files(name: str, directory: Path) -> dict[str, int]:
    """Files and directories below *directory*, and what they hold."""
    return {f"{name}: files": sum(1 for _ in directory.rglob("*")) if directory.exists() else 0}


def read_names(hex_: str) -> dict[str, int]:
    """Names of network namespaces of this lab, and this process's mounts that mention it."""
    mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return {
        "lab: namespace names": sum(1 for path in NAMES.iterdir() if hex_ in path.name),
        "lab: mounts outside": sum(1 for line in mounts if hex_ in line),
    }


def read_self() -> dict[str, int]:
    """The lab's own process, descriptors and memory."""
    return read_process("lab", Path("/proc", str(os.getpid())))


@dataclass(slots=True)
class Book:
    """All readings, in order; each gauge by its name."""

    readings: dict[str, list[int]] = field(default_factory=dict)

    def note(self, gauges: Mapping[str, int]) -> None:
        """One more reading of each of *gauges*."""
        for name, value in gauges.items():
            self.readings.setdefault(name, []).append(value)

    def note_settled(self, look: Callable[[], Mapping[str, int]]) -> None:
        """One more reading of an application that goes on meanwhile: of counts what stays.

        Its report is a file and a descriptor more while it is written. So what is counted is the
        least of several looks, as many as it takes to be what it was at first; what has grown is
        in each of them.
        """
        found = dict(look())
        for _ in range(_LOOKS):
            if all(self._is_as_at_first(name, value) for name, value in found.items()):
                break
            time.sleep(_PAUSE_S)
            for name, value in look().items():
                found[name] = value if name.endswith(WEIGHT) else min(value, found[name])
        self.note(found)

    def _is_as_at_first(self, name: str, value: int) -> bool:
        return name.endswith(WEIGHT) or self.readings.get(name, [])[:1] == [value]

    def assertions(self) -> list[Assertion]:
        """One for each gauge; a gauge that was read only once proves nothing."""
        return [judge(name, values) for name, values in self.readings.items()]


def judge(name: str, values: list[int]) -> Assertion:
    """Whether a gauge did not grow, and what it showed."""
    if len(values) < 2:
        return Assertion(name, False, f"read {len(values)} times, which proves nothing")
    bound = BOUNDS.get(name.rpartition(": ")[2])
    if bound is not None:
        shown = f"at most {max(values)} in {len(values)} readings, {bound} allowed"
        return Assertion(name, max(values) <= bound, shown)
    if not name.endswith(WEIGHT):
        odd = sorted({value for value in values if value != values[0]})
        shown = f"{values[0]} in each of {len(values)} readings"
        return Assertion(
            name, not odd, f"{values[0]} at first, then {_some(odd)}" if odd else shown
        )
    before, after = _thirds(values)
    shown = f"{before:,.0f} then {after:,.0f}, at most {max(values):,}, {len(values)} readings"
    return Assertion(name, after - before <= SLACK_KIB, shown)


def _thirds(values: list[int]) -> tuple[float, float]:
    """The medians of the first and of the last third."""
    third = max(1, len(values) // 3)
    return statistics.median(values[:third]), statistics.median(values[-third:])


def _some(values: Iterable[int]) -> str:
    listed = [str(value) for value in values]
    return ", ".join(listed[:6]) + (" …" if len(listed) > 6 else "")
