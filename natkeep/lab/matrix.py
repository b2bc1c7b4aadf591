"""the matrix: every situation in every cell, each in a fresh lab and a process of its own.

    situations x {IPv4, IPv6} x {window probe sent, lost} x {natkeep stateful, natkeep stateless,
    naive, naive+purge}

Several labs run at once, one a processor, since a lab takes one for itself. A cell has a
deadline, and one that hangs or crashes has failed. Rule: what a cell came to is decided in its
own process (`play`) and told as an `Outcome`; tally.py counts and prints them.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context
from pathlib import Path

from natkeep.errors import UsageError
from natkeep.lab import situations
from natkeep.lab.capture import COMPLETE
from natkeep.lab.lab import Lab
from natkeep.lab.report import Report, render_report
from natkeep.lab.scenario import keep_captures, perform
from natkeep.lab.situations import SITUATIONS, Situation
from natkeep.lab.topology import sweep

TRANSLATORS = ("natkeep", "naive", "naive+purge")
MODES = ("stateful", "stateless")
CELL_S = 90.0
"""A cell's deadline; the slowest take 15 s on a busy machine."""

_RETAKES = 2
_FAREWELL_S = 10.0  # for a cell that was told to end, to take its lab down


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

    def cells(self) -> list[Cell]:
        """The cells, in the order of the table; UsageError when `only` names nothing."""
        chosen = [each for each in find_situations() if self._wants(each)]
        for word in self.only:
            if not any(_is_called(each, word) for each in chosen):
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
            for probe in (True, False)
        ]

    def _wants(self, situation: Situation) -> bool:
        return not self.only or any(_is_called(situation, word) for word in self.only)


def find_situations() -> list[Situation]:
    """All situations, by number; the modules of the package register theirs when imported."""
    for module in pkgutil.iter_modules(situations.__path__):
        importlib.import_module(f"{situations.__name__}.{module.name}")
    return sorted(SITUATIONS, key=lambda each: each.number)


def _is_called(situation: Situation, word: str) -> bool:
    if word.isdigit():
        return situation.number == int(word)
    return word.lower() in situation.name.lower()


def play(cell: Cell, report: Path | None = None) -> Outcome:
    """Run *cell* here and now; what failed is kept in the directory *report*."""
    began = time.monotonic()
    situation, column = cell.situation, cell.column
    with Lab(
        situation.name, engine=situation.engine, family=cell.family, mode=column.mode,
        probe=column.probe, translator=column.translator, **situation.setup,
    ) as lab:  # fmt: skip
        lab.report.title = str(cell)
        perform(lab, situation.tell)
        verdict, reason = judge(lab.report, lab.refused, may_refuse=situation.may_refuse)
        if report is not None and verdict == "fail":
            _keep(lab, report / _file_name(cell))
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


def _keep(lab: Lab, directory: Path) -> None:
    keep_captures(lab, directory)
    (directory / "report.txt").write_text(render_report(lab.report) + "\n", encoding="utf-8")


def _file_name(cell: Cell) -> str:
    return re.sub(r"[^a-z0-9+]+", "-", str(cell).lower())


def run(
    cells: Iterable[Cell], *, jobs: int, report: Path | None = None,
    deadline: float = CELL_S, tell: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:  # fmt: skip
    """Run all *cells*, *jobs* at once; *tell* hears of each as it ends."""
    # Once here, or each cell's process spends half a second on it.
    import scapy.layers.inet6
    import scapy.utils  # noqa: F401

    outcomes: list[Outcome] = []
    waiting = iter(list(cells))
    running: dict[int, _Run] = {}
    try:
        while True:
            for slot in set(range(jobs)) - running.keys():
                cell = next(waiting, None)
                if cell is not None:
                    running[slot] = _Run(cell, slot, report, deadline)
            if not running:
                return outcomes
            for slot in _ended(running):
                outcomes.append(running.pop(slot).outcome())
                tell(outcomes[-1])
    finally:
        for each in running.values():
            each.end()
        sweep()


def _ended(running: dict[int, _Run]) -> Iterator[int]:
    """The slots whose cell has ended, or is to end now; waits for the first."""
    soonest = min(each.deadline for each in running.values()) - time.monotonic()
    ends = {each.process.sentinel: slot for slot, each in running.items()}
    told = {each.pipe: slot for slot, each in running.items()}
    ready: Sequence[object] = connection.wait([*ends, *told], timeout=max(soonest, 0))
    found = {slot for end, slot in [*ends.items(), *told.items()] if end in ready}
    now = time.monotonic()
    yield from found | {slot for slot, each in running.items() if each.deadline <= now}


class _Run:
    """One cell in a process of its own, forked: what is imported here needs no second import."""

    def __init__(self, cell: Cell, slot: int, report: Path | None, seconds: float) -> None:
        self.cell, self.began = cell, time.monotonic()
        self.deadline = self.began + seconds
        self.pipe, theirs = multiprocessing.Pipe(duplex=False)
        context = get_context("fork")
        self.process = context.Process(target=_live, args=(theirs, cell, slot, report))
        self.process.start()
        theirs.close()

    def outcome(self) -> Outcome:
        """What the process told; a fail with its reason when it told nothing."""
        seconds = time.monotonic() - self.began
        told: Outcome | None = None
        if self.pipe.poll():
            try:
                verdict, reason, seconds, retaken = self.pipe.recv()
                told = Outcome(self.cell, verdict, reason, seconds, retaken)
            except EOFError:
                pass
        if told is not None:
            self.process.join(_FAREWELL_S)
        late = told is None and time.monotonic() >= self.deadline
        self.end()
        if told is not None:
            return told
        why = "not over at its deadline" if late else f"it ended with {self.process.exitcode}"
        return Outcome(self.cell, "fail", f"the cell's process: {why}", seconds)

    def end(self) -> None:
        """End the process, gently first: a lab that is taken down leaves nothing to sweep."""
        for stop in (self.process.terminate, self.process.kill):
            if self.process.is_alive():
                stop()
                self.process.join(_FAREWELL_S)
        self.pipe.close()


def _live(pipe: connection.Connection, cell: Cell, slot: int, report: Path | None) -> None:
    """The life of a cell's process, on a processor of its slot's."""
    usual = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {usual[slot % len(usual)]})
    try:
        outcome = play_until_proved(cell, report)
        told = (outcome.verdict, outcome.reason, outcome.seconds, outcome.retaken)
    except KeyboardInterrupt:
        return  # nobody is left to be told
    except Exception as error:
        told = ("fail", f"the lab: {type(error).__name__}: {error}"[:600], 0.0, 0)
    pipe.send(told)
    pipe.close()
