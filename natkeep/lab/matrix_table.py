"""The outcomes of the matrix, as a table, as a document, and as an exit code.

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
    def reasons(self) -> list[str]:
        """Why runs failed, the most frequent first."""
        found = Counter(each.reason for each in self.outcomes if each.verdict == "fail")
        return [reason for reason, _ in found.most_common()]

    @property
    def retaken(self) -> int:
        """How many runs were no evidence."""
        return sum(each.retaken for each in self.outcomes)

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
            "retaken": self.retaken,
            "seconds": round(sum(each.seconds for each in self.outcomes), 1),
        }


@dataclass(slots=True)
class Table:
    """All squares in the order of the table."""

    squares: list[Square]
    reps: int
    jobs: int
    seconds: float

    @property
    def failed(self) -> list[Square]:
        """Those of natkeep's in which a run failed."""
        ours = [each for each in self.squares if each.cell.column.translator == "natkeep"]
        return [each for each in ours if each.count("fail")]

    @property
    def verdict(self) -> str:
        """`pass` if natkeep kept, or rightly refused, all that was tried."""
        return "fail" if self.failed else "pass"

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
            "verdict": self.verdict,
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
        lines = [*_render_table(self.squares), "", *_render_totals(self.groups())]
        if self.failed:
            lines += ["", "natkeep failed:"]
            lines += [f"  {each.cell}: {_short(each.reasons[0])}" for each in self.failed]
        if retaken := sum(square.retaken for square in self.squares):
            lines += ["", f"{retaken} more were no evidence (a capture missed frames): run again"]
        lines += [
            "",
            f"{played} cells, {runs} runs, {self.jobs} at once, in {self.seconds / 60:.1f} min; "
            f"verdict: {self.verdict}",
        ]
        return "\n".join(lines)


def make_table(
    cells: Iterable[Cell], outcomes: Iterable[Outcome], *, reps: int, jobs: int, seconds: float
) -> Table:
    """Sort *outcomes* into their places."""
    squares = {str(cell): Square(cell) for cell in cells}
    for outcome in outcomes:
        squares[str(outcome.cell)].outcomes.append(outcome)
    return Table(list(squares.values()), reps, jobs, seconds)


def _total(squares: Sequence[Square]) -> dict[str, int]:
    return {
        "tried": sum(len(each.outcomes) for each in squares),
        "passed": sum(each.count("pass") for each in squares),
        "refused": sum(each.count("refused") for each in squares),
    }


def _render_totals(groups: Mapping[str, Sequence[Square]]) -> list[str]:
    lines = []
    for group, squares in groups.items():
        total = _total(squares)
        refused = f", {total['refused']} refused" if total["refused"] else ""
        tried = [each for each in squares if each.outcomes]
        full = [each for each in tried if not each.count("fail")]
        lines.append(
            f"{group:<18} {total['passed']} of {total['tried']} runs passed{refused}; "
            f"{len(full)} of {len(tried)} cells never failed"
        )
    return lines


def _render_table(squares: Sequence[Square]) -> list[str]:
    columns = list(dict.fromkeys(each.cell.column for each in squares))
    rows: dict[tuple[int, str, int], dict[Column, str]] = {}
    for square in squares:
        here, family = square.cell.situation, square.cell.family
        if family in here.families:
            row = rows.setdefault((here.number, here.name, family), {})
            row[square.cell.column] = str(square)
    label = max(len(name) for _, name, _ in rows) + 3
    widths = _widths(columns, rows.values())
    lines = _render_headings(widths, label)
    shown = None
    for (number, name, family), row in rows.items():
        title = f"{number:>2} {name}" if shown != (number, name) else ""
        shown = (number, name)
        lines.append(f"{title:<{label}} IPv{family}  {_render_row(widths, row)}".rstrip())
    return lines


def _render_headings(widths: Mapping[Column, int], label: int) -> list[str]:
    """The groups, each over its columns, and below them whether the probe is sent or lost."""
    probes = {column: "sent" if column.probe else "lost" for column in widths}
    room: dict[str, int] = {}
    for column, width in widths.items():
        room[column.group] = room.get(column.group, -len(_GAP)) + width + len(_GAP)
    over = _GAP_BETWEEN.join(f"{group:>{width}}" for group, width in room.items())
    return [
        f"{'':<{label}}       {over}".rstrip(),
        f"{'situation':<{label}} probe {_render_row(widths, probes)}",
    ]


def _widths(columns: Sequence[Column], rows: Iterable[Mapping[Column, str]]) -> dict[Column, int]:
    """How wide each column must be for what is in it, and with the others for the group's name."""
    groups, widths = Counter(column.group for column in columns), {}
    for column in columns:
        beside = groups[column.group]
        name = len(column.group) - len(_GAP) * (beside - 1)
        widths[column] = max(-(-name // beside), *(len(row[column]) for row in rows))
    return widths


def _render_row(widths: Mapping[Column, int], row: Mapping[Column, str]) -> str:
    """A row's texts side by side, groups a little further apart."""
    parts: dict[str, list[str]] = {}
    for column, width in widths.items():
        parts.setdefault(column.group, []).append(f"{row[column]:>{width}}")
    return _GAP_BETWEEN.join(_GAP.join(part) for part in parts.values())


def _short(reason: str) -> str:
    reason = " ".join(reason.split())
    return reason if len(reason) <= _REASON else reason[: _REASON - 1] + "…"
