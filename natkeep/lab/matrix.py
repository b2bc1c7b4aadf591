"""The matrix: every situation in every cell, each in a fresh lab and a process of its own.

    situations x {IPv4, IPv6} x {window probe sent, lost} x {natkeep stateful, natkeep stateless,
    naive, naive+purge}

Several labs run at once, one a processor, since a lab takes one for itself. A cell has a
deadline, and one that hangs or crashes has failed. Rule: a cell's outcome is decided in its own
process (`play`); matrix_table.py counts and prints the outcomes.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path

from natkeep.errors import UsageError
from natkeep.lab import situations
from natkeep.lab.capture import COMPLETE
from natkeep.lab.lab import Lab
from natkeep.lab.report import Report, render_report
from natkeep.lab.scenario import keep_captures, perform
from natkeep.lab.situations import SITUATIONS, Situation
from natkeep.lab.time_scale import scaled
from natkeep.lab.topology import sweep

TRANSLATORS = ("natkeep", "naive", "naive+purge")
MODES = ("stateful", "stateless")
CELL_S = 90.0
"""A cell's deadline; the slowest take 15 s on a busy machine."""

_RETAKES = 2
_END_S = 10.0  # for a cell that is to end, to take its lab down


@dataclass(frozen=True, slots=True)
class Column:
    """Who translates, in which mode, and whether CRIU's window probe arrives."""

    translator: str
    mode: str
    probe: bool

    @property
    def group(self) -> str:
        """`natkeep stateful`, or the name of a baseline, which knows no modes."""
        return f"{self.translator} {self.mode}" if self.translator == "natkeep" else self.translator


@dataclass(frozen=True, slots=True)
class Cell:
    """One situation at one place of the table."""

    situation: Situation
    family: int
    column: Column

    @property
    def applies(self) -> bool:
        """Whether the situation says anything there."""
        here = self.situation
        return self.family in here.families and self.column.probe in here.probes

    def __str__(self) -> str:
        probe = "probe sent" if self.column.probe else "probe lost"
        return (f"{self.situation.number} {self.situation.name}, IPv{self.family}, {probe}, "
                f"{self.column.group}")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run of a cell came to: `pass`, `fail` or `refused`, and why.

    retaken: how many runs before it were no evidence, and do not count.
    """

    cell: Cell
    verdict: str
    reason: str = ""
    seconds: float = 0.0
    retaken: int = 0


@dataclass(frozen=True, slots=True)
class Selection:
    """What of the matrix is to be run; empty means everything."""

    only: tuple[str, ...] = ()
    translators: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    families: tuple[int, ...] = ()
    probes: tuple[bool, ...] = ()

    def cells(self) -> list[Cell]:
        """The cells, in the order of the table; UsageError when `only` names nothing."""
        chosen = [each for each in find_situations() if self._wants(each)]
        for word in self.only:
            if not any(each.is_called(word) for each in chosen):
                names = ", ".join(f"{each.number} {each.name}" for each in find_situations())
                raise UsageError(f"there is no situation {word!r}", hint=f"there are: {names}")
        return [
            Cell(situation, family, column)
            for situation in chosen
            for family in self.families or (4, 6)
            for column in self.columns()
        ]

    def columns(self) -> list[Column]:
        """The columns, as they stand side by side."""
        translators = [each for each in TRANSLATORS if each in (self.translators or TRANSLATORS)]
        modes = [each for each in MODES if each in (self.modes or MODES)]
        return [
            Column(translator, mode, probe)
            for translator in translators
            for mode in (modes if translator == "natkeep" else MODES[:1])
            for probe in self.probes or (True, False)
        ]

    def _wants(self, situation: Situation) -> bool:
        return not self.only or any(situation.is_called(word) for word in self.only)


def find_situations() -> list[Situation]:
    """All situations, by number; the modules of the package register theirs when imported."""
    for module in pkgutil.iter_modules(situations.__path__):
        importlib.import_module(f"{situations.__name__}.{module.name}")
    return sorted(SITUATIONS, key=lambda each: each.number)


def play(cell: Cell, report: Path | None = None) -> Outcome:
    """Run *cell* here and now; what failed is kept in the directory *report*."""
    began = time.monotonic()
    situation, column = cell.situation, cell.column
    with Lab(
        situation.name, engine=situation.engine, family=cell.family, mode=column.mode,
        probe=column.probe, translator=column.translator, **situation.setup,
    ) as lab:  # fmt: skip
        lab.report.title = str(cell)
        perform(lab, situation.moves)
        verdict, reason = judge(lab.report, lab.refused, may_refuse=situation.may_refuse)
        if report is not None and verdict == "fail":
            directory = report / re.sub(r"[^a-z0-9+]+", "-", str(cell).lower())
            keep_captures(lab, directory)
            text = render_report(lab.report) + "\n"
            (directory / "report.txt").write_text(text, encoding="utf-8")
    return Outcome(cell, verdict, reason, time.monotonic() - began)


def play_until_proved(cell: Cell, report: Path | None = None) -> Outcome:
    """Run *cell*, again where a capture missed frames: that says nothing of the connection.

    After some times it is a failure all the same.
    """
    outcome = play(cell, report)
    for retaken in range(1, _RETAKES + 1):
        if outcome.verdict != "fail" or not outcome.reason.startswith(f"{COMPLETE}:"):
            break
        outcome = replace(play(cell, report), retaken=retaken)
    return outcome


def judge(report: Report, refused: str, *, may_refuse: tuple[str, ...]) -> tuple[str, str]:
    """Verdict and reason: a refusal counts as one only where it may be, and changed nothing."""
    failed = [each for each in report.assertions if not each.ok]
    if refused and report.mode in may_refuse:
        left = [each for each in failed if each.name.startswith("teardown")]
        return ("fail", str(left[0])) if left else ("refused", refused)
    if report.passed:
        return "pass", ""
    # An incomplete capture is the reason only where nothing else is.
    failed.sort(key=lambda each: each.name == COMPLETE)
    reason = f"{failed[0].name}: {failed[0].detail}" if failed else "nothing was asserted"
    return "fail", reason


def run(
    cells: Iterable[Cell], *, jobs: int, report: Path | None = None,
    deadline: float = CELL_S, show: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:  # fmt: skip
    """Run all *cells*, *jobs* at once; *show* is called with each outcome."""
    # Once here, or each cell's process spends half a second on it.
    import scapy.layers.inet6
    import scapy.utils  # noqa: F401

    outcomes: list[Outcome] = []
    waiting, running = list(cells)[::-1], dict[int, _Run]()
    try:
        while waiting or running:
            for slot in set(range(jobs)) - running.keys():
                if waiting:
                    running[slot] = _Run(waiting.pop(), slot, report, deadline)
            soonest = min(each.deadline for each in running.values()) - time.monotonic()
            ends = [each.process.sentinel for each in running.values()]
            connection.wait(ends, timeout=max(soonest, 0))
            for slot in [slot for slot, each in running.items() if each.is_over()]:
                outcomes.append(running.pop(slot).outcome())
                show(outcomes[-1])
        return outcomes
    finally:
        for each in running.values():
            each.end()
        sweep()


class _Run:
    """One cell in a process of its own, forked: what is imported here needs no second import."""

    def __init__(self, cell: Cell, slot: int, report: Path | None, seconds: float) -> None:
        self.cell, self.began = cell, time.monotonic()
        self.deadline = self.began + scaled(seconds)
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        self.process = multiprocessing.get_context("fork").Process(
            target=_play_apart, args=(theirs, cell, slot, report)
        )
        self.process.start()
        theirs.close()

    def is_over(self) -> bool:
        """Whether the process has ended, or should have."""
        return not self.process.is_alive() or time.monotonic() >= self.deadline

    def outcome(self) -> Outcome:
        """What the process sent; a fail with its reason when it sent nothing."""
        seconds, late = time.monotonic() - self.began, self.process.is_alive()
        try:
            sent = self.pipe.recv() if self.pipe.poll() else None
        except EOFError:
            sent = None
        self.end()
        if sent is not None:
            return Outcome(self.cell, *sent)
        why = "not over at its deadline" if late else f"it ended with {self.process.exitcode}"
        return Outcome(self.cell, "fail", f"the cell's process: {why}", seconds)

    def end(self) -> None:
        """End the process, gently first: a lab that is taken down leaves nothing to sweep."""
        for stop in (self.process.terminate, self.process.kill):
            if self.process.is_alive():
                stop()
                self.process.join(scaled(_END_S))
        self.pipe.close()


def _play_apart(pipe: connection.Connection, cell: Cell, slot: int, report: Path | None) -> None:
    """A cell's process, on a processor of its slot's."""
    usual = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {usual[slot % len(usual)]})
    try:
        outcome = play_until_proved(cell, report)
    except KeyboardInterrupt:
        return  # nothing waits for it any more
    except Exception as error:
        outcome = Outcome(cell, "fail", f"the lab: {type(error).__name__}: {error}"[:600])
    # Not the cell itself: its situation is a function, and known at the other end.
    pipe.send((outcome.verdict, outcome.reason, outcome.seconds, outcome.retaken))
    pipe.close()
