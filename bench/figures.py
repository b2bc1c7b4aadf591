"""the form of a bench's results: each figure asked for beside the one reached, as text and JSON.

Rule: a figure holds or it does not, and a bench's exit code is 0 only if all of its own hold. What
was not measured (not a number) does not hold.

The JSON that each bench writes: {"schema": 1, "bench": NAME, "machine": {…}, "figures": [{"what",
"asked", "reached", "sense", "noise", "ok"}…], and beside these the bench's own raw data}.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

SCHEMA = 1


class Sense(StrEnum):
    """Which way a figure may differ from what is asked."""

    AT_MOST = "<="
    AT_LEAST = ">="


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number that was asked for, and what was measured.

    noise: what the same measurement makes of nothing at all, from the least to the most.
    """

    what: str
    reached: float
    asked: float
    sense: Sense
    noise: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.asked):
            raise ValueError(f"{self.what}: nothing can be asked for by {self.asked}")

    @property
    def ok(self) -> bool:
        """Whether it holds; the bound itself does."""
        if self.sense is Sense.AT_MOST:
            return self.reached <= self.asked
        return self.reached >= self.asked


def at_most(what: str, reached: float, asked: float) -> Figure:
    """A figure that is the better the smaller it is."""
    return Figure(what=what, reached=reached, asked=asked, sense=Sense.AT_MOST)


def at_least(
    what: str, reached: float, asked: float, noise: tuple[float, float] | None = None
) -> Figure:
    """A figure that is the better the larger it is."""
    return Figure(what=what, reached=reached, asked=asked, sense=Sense.AT_LEAST, noise=noise)


def middle_half(some: list[float]) -> tuple[float, float]:
    """The quartiles around the median."""
    if len(some) < 2:
        return some[0], some[0]
    low, _, high = statistics.quantiles(some, n=4)
    return low, high


def print_figures(figures: Sequence[Figure]) -> None:
    """A line each; those that do not hold say so at the end of theirs."""
    if not figures:
        return
    width = max(len(figure.what) for figure in figures)
    noisy = any(figure.noise for figure in figures)
    print(f"{'':{width}}      asked   reached{'      noise' if noisy else ''}")
    for figure in figures:
        line = (
            f"{figure.what:{width}} {figure.sense} {_round(figure.asked):>7} "
            f"{_round(figure.reached):>9}"
        )
        if noisy:
            band = "-".join(map(_round, figure.noise)) if figure.noise else ""
            line += f"  {band:11}"
        print(f"{line}{'' if figure.ok else '  MISSED'}".rstrip())


def _round(number: float) -> str:
    """As many places as tell a small ratio from its bound, and none where they say nothing."""
    if float(number).is_integer():
        return f"{number:.0f}"
    return f"{number:.3f}" if abs(number) < 10 else f"{number:.1f}"


def describe_machine() -> dict[str, object]:
    """What figures depend on; nothing that names the machine."""
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1])
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": total // 1024,
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def to_json(bench: str, figures: Sequence[Figure], raw: dict[str, Any]) -> str:
    """The document, with *raw* beside what all benches have in common."""
    common = {"schema": SCHEMA, "bench": bench, "machine": describe_machine()}
    if taken := raw.keys() & (common.keys() | {"figures"}):
        raise ValueError(f"what all benches have in common cannot be raw data: {sorted(taken)}")
    document = {**common, "figures": [_to_row(figure) for figure in figures], **raw}
    return json.dumps(_without_infinities(document), indent=1, allow_nan=False) + "\n"


def _to_row(figure: Figure) -> dict[str, object]:
    return {
        "what": figure.what, "asked": figure.asked, "reached": figure.reached,
        "sense": figure.sense.value, "noise": figure.noise, "ok": figure.ok,
    }  # fmt: skip


def _without_infinities(value: Any) -> Any:
    """JSON has neither infinities nor nan: null."""
    if isinstance(value, dict):
        return {key: _without_infinities(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_figures(path: Path) -> list[Figure]:
    """The figures in a document that to_json has made."""
    return [
        Figure(
            what=row["what"],
            reached=math.nan if row["reached"] is None else row["reached"],
            asked=row["asked"],
            sense=Sense(row["sense"]),
            noise=tuple(row["noise"]) if row["noise"] else None,
        )
        for row in json.loads(path.read_text())["figures"]
    ]


def conclude(bench: str, figures: Sequence[Figure], raw: dict[str, Any], path: Path | None) -> int:
    """Print the figures, write them to *path* if there is one; the bench's exit code."""
    print()
    print_figures(figures)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(bench, figures, raw))
    return 0 if all(figure.ok for figure in figures) else 1
