"""the tally: what the cells of the matrix came to, as a table, as a document, and as an exit code.

    situation                                   natkeep stateful …
                                                sent  lost
     1 client speaks first              IPv4     1/1   1/1
                                        IPv6     1/1   1/1

A cell is passed/tried, `refused`, or `-` where the situation says nothing. Rule: values and text
only; the exit is 0 when every cell of natkeep's passed or was refused as it may be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from natkeep.lab.matrix import Cell, Column, Outcome

SCHEMA = 1
_REASON = 160
_GAP, _GAP_BETWEEN = "  ", "   "


@dataclass(slots=True)
class Square:
    """One place of the table, over all repetitions."""

    cell: Cell
    outcomes: list[Outcome] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        """How many runs came to *verdict*."""
        return sum(1 for each in self.outcomes if each.verdict == verdict)

    @property
    def good(self) -> bool:
        """Nothing failed."""
        return not self.count("fail")

    @property
    def reasons(self) -> list[str]:
        """Why runs failed, the most frequent first."""
        found = Counter(each.reason for each in self.outcomes if each.verdict == "fail")
        return [reason for reason, _ in found.most_common()]

    def __str__(self) -> str:
        if not self.outcomes:
            return "-"
        if self.count("refused") == len(self.outcomes):
            return "refused"
        return f"{self.count('pass')}/{len(self.outcomes)}"

    def as_json(self) -> dict[str, Any]:
        """As `lab matrix --json` shows it."""
        cell = self.cell
        return {
            "number": cell.situation.number,
            "situation": cell.situation.name,
            "engine": cell.situation.engine,
            "family": cell.family,
            "translator": cell.column.translator,
            "mode": cell.column.mode if cell.column.translator == "natkeep" else None,
            "probe": "sent" if cell.column.probe else "lost",
            "shown": str(self),
            "tried": len(self.outcomes),
            "passed": self.count("pass"),
            "refused": self.count("refused"),
            "reasons": self.reasons,
            "retaken": sum(each.retaken for each in self.outcomes),
            "seconds": round(sum(each.seconds for each in self.outcomes), 1),
        }


@dataclass(slots=True)
class Tally:
    """All squares in the order of the table."""

    squares: list[Square]
    reps: int
    jobs: int
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether natkeep kept, or rightly refused, all that was tried."""
        ours = [each for each in self.squares if each.cell.column.translator == "natkeep"]
        return all(each.good for each in ours)

    def groups(self) -> dict[str, list[Square]]:
        """The squares of each group of columns."""
        found: dict[str, list[Square]] = {}
        for square in self.squares:
            found.setdefault(square.cell.column.group, []).append(square)
        return found

    def as_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "schema": SCHEMA,
            "verdict": "pass" if self.passed else "fail",
            "reps": self.reps,
            "jobs": self.jobs,
            "seconds": round(self.seconds, 1),
            "totals": {group: _total(squares) for group, squares in self.groups().items()},
            "cells": [each.as_json() for each in self.squares],
        }

    def as_text(self) -> str:
        """The table, and what is to be said below it."""
        runs = sum(len(each.outcomes) for each in self.squares)
        played = sum(1 for each in self.squares if each.outcomes)
        lines = [*_table(self.squares), "", *_totals(self.groups())]
        failed = [each for each in self.squares if not each.good]
        ours = [each for each in failed if each.cell.column.translator == "natkeep"]
        if ours:
            lines += ["", "natkeep failed:"]
            lines += [f"  {each.cell}: {_short(each.reasons[0])}" for each in ours]
        retaken = sum(each.retaken for square in self.squares for each in square.outcomes)
        if retaken:
            lines += ["", f"{retaken} more were no evidence (a capture missed frames): run again"]
        lines += [
            "",
            f"{played} cells, {runs} runs, {self.jobs} at once, in {self.seconds / 60:.1f} min; "
            f"verdict: {'pass' if self.passed else 'fail'}",
        ]
        return "\n".join(lines)


def count(
    cells: Iterable[Cell], outcomes: Iterable[Outcome], *, reps: int, jobs: int, seconds: float
) -> Tally:
    """Sort *outcomes* into their places."""
    squares = [Square(cell) for cell in cells]
    places = {_place(square.cell): square for square in squares}
    for outcome in outcomes:
        places[_place(outcome.cell)].outcomes.append(outcome)
    return Tally(squares, reps, jobs, seconds)


def _place(cell: Cell) -> tuple[int, str, int, Column]:
    return (cell.situation.number, cell.situation.name, cell.family, cell.column)


def _total(squares: Sequence[Square]) -> dict[str, int]:
    return {
        "tried": sum(len(each.outcomes) for each in squares),
        "passed": sum(each.count("pass") for each in squares),
        "refused": sum(each.count("refused") for each in squares),
    }


def _totals(groups: dict[str, list[Square]]) -> list[str]:
    lines = []
    for group, squares in groups.items():
        total = _total(squares)
        refused = f", {total['refused']} refused" if total["refused"] else ""
        full = [each for each in squares if each.outcomes and each.good]
        tried = [each for each in squares if each.outcomes]
        lines.append(
            f"{group:<18} {total['passed']} of {total['tried']} runs passed{refused}; "
            f"{len(full)} of {len(tried)} cells never failed"
        )
    return lines


def _table(squares: Sequence[Square]) -> list[str]:
    columns = list(dict.fromkeys(each.cell.column for each in squares))
    rows: dict[tuple[int, str, int], dict[Column, str]] = {}
    for square in squares:
        here = square.cell.situation
        if square.cell.family not in here.families:
            continue
        rows.setdefault((here.number, here.name, square.cell.family), {})[square.cell.column] = str(
            square
        )
    label = max(len(name) for _, name, _ in rows) + 3
    widths = _widths(columns, list(rows.values()))
    lines = _headings(columns, widths, label)
    told = None
    for (number, name, family), row in rows.items():
        title = f"{number:>2} {name}" if told != (number, name) else ""
        told = (number, name)
        cells = [f"{row[column]:>{width}}" for column, width in zip(columns, widths, strict=True)]
        lines.append(f"{title:<{label}} IPv{family}  {_join(columns, cells)}".rstrip())
    return lines


def _headings(columns: Sequence[Column], widths: Sequence[int], label: int) -> list[str]:
    """The groups, each over its columns, and below them what became of the probe."""
    probes = ["sent" if column.probe else "lost" for column in columns]
    padded = [f"{probe:>{width}}" for probe, width in zip(probes, widths, strict=True)]
    room: dict[str, int] = {}
    for column, width in zip(columns, widths, strict=True):
        room[column.group] = room.get(column.group, -len(_GAP)) + width + len(_GAP)
    over = _GAP_BETWEEN.join(f"{group:>{width}}" for group, width in room.items())
    return [
        f"{'':<{label}}       {over}".rstrip(),
        f"{'situation':<{label}} probe {_join(columns, padded)}",
    ]


def _widths(columns: Sequence[Column], rows: Iterable[Mapping[Column, str]]) -> list[int]:
    """How wide each column must be for what is in it, and with the others for the group's name."""
    groups = Counter(column.group for column in columns)
    return [
        max(
            -(
                -(len(column.group) - len(_GAP) * (groups[column.group] - 1))
                // groups[column.group]
            ),
            *(len(row[column]) for row in rows),
        )
        for column in columns
    ]


def _join(columns: Sequence[Column], cells: Sequence[str]) -> str:
    """Cells side by side, groups a little further apart."""
    parts: dict[str, list[str]] = {}
    for column, cell in zip(columns, cells, strict=True):
        parts.setdefault(column.group, []).append(cell)
    return _GAP_BETWEEN.join(_GAP.join(part) for part in parts.values())


def _short(reason: str) -> str:
    reason = " ".join(reason.split())
    return reason if len(reason) <= _REASON else reason[: _REASON - 1] + "…"
