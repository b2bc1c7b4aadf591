"""many_undo: teardown of a list of moves at once (many.py), and the undo of a prepare of many.

Rule: as Executor.undo has it: the journal in reverse, going on after a failure, and what is left is
named. A move whose step fails, or is of a kind that is not undone at once, is undone by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial

from natkeep import faultpoints
from natkeep.errors import JournalError, LeftoverError, NatkeepError
from natkeep.kernel.once import reading_once
from natkeep.lifecycle.executor import Executor, finish, leftover
from natkeep.lifecycle.owners import give_up_claims
from natkeep.lifecycle.progress import without_lock
from natkeep.lifecycle.teardown import find_remains, teardown
from natkeep.plan.identity import Identity
from natkeep.plan.move import Site
from natkeep.plan.step_undo import (
    CloseGates,
    DeleteEntries,
    Nothing,
    RemoveGate,
    RestoreEntries,
    Undo,
    Unload,
)
from natkeep.plan.steps import Prior
from natkeep.state.directory import read_boot_id
from natkeep.state.journal import Journal

MOST = 200
"""Moves in one transaction; each takes 0.2 MiB meanwhile, and a descriptor for its lock."""

_AT_ONCE = (CloseGates, DeleteEntries, Nothing, RemoveGate, RestoreEntries, Unload)
"""What is undone of many moves at once; all else by `Executor.undo`."""

Failed = dict[str, Exception]
"""By id why a move was refused, or failed; all others went through."""


def attempt(move_id: str, work: Callable[[], object]) -> Failed:
    try:
        work()
    except Exception as error:
        return {move_id: error}
    return {}


def chunks(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    return (ids[at : at + MOST] for at in range(0, len(ids), MOST))


def take_columns(
    queues: Sequence[deque[int]], head: Callable[[int], tuple[object, ...]]
) -> Iterator[list[tuple[int, int]]]:
    """From the fronts of *queues* what is alike: of which queue, and its number."""
    while left := [at for at, queue in enumerate(queues) if queue]:
        kind = head(left[0])
        yield [(at, queues[at].popleft()) for at in left if head(at) == kind]


def teardown_many(executor: Executor, ids: Sequence[str]) -> Failed:
    """Undo these moves, best effort; what is left of each that could not be. Again is fine."""
    failed: Failed = {}
    for some in chunks(ids):
        alone = [*some]
        if len(some) > 1:
            with suppress(JournalError), executor.state.changing(*some):
                begun = _find_plain(executor, some)
                failed |= finish(partial(_end, executor, begun))
                done = {one.move.id for one in begun}
                alone = [each for each in some if each not in done]
        for move_id in alone:
            executor.dropped.clear()  # of the one before
            failed |= attempt(move_id, partial(teardown, executor, move_id))
    return failed


def _find_plain(executor: Executor, ids: Iterable[str]) -> list[Journal]:
    """Those of one site, which is no destination, and the same namespace under the same name."""
    found: list[Journal] = []
    there: dict[Site, Identity] = {}
    for move_id in ids:
        with suppress(NatkeepError):  # what is wrong with it is said where it goes alone
            journal = executor.load_undo(move_id)
            [site, *more] = journal.move.sites
            known = there.setdefault(site, journal.identity(site))
            if not (more or site.row.puts_old) and known == journal.identity(site):
                found.append(journal)
    return found


def _end(executor: Executor, journals: Sequence[Journal]) -> Failed:
    """Undo these, whose locks are held."""
    boot, gone = read_boot_id(), dict[Site, bool]()
    begun = []
    for journal in journals:
        [site] = journal.move.sites
        numbers = sorted(journal.records, reverse=True)
        if journal.boot != boot or gone.setdefault(site, not executor.reach(journal, site)):
            numbers = []
        elif journal.is_whole():
            numbers = without_lock(journal, numbers)
        begun.append((journal, numbers))
    with executor.kernel.staying(site for site, is_gone in gone.items() if not is_gone):
        left = _undo(executor, begun)
    with reading_once():
        for journal, numbers in begun:
            left[journal.move.id] += find_remains(
                executor, journal, journal.move.sites if numbers else ()
            )
    return _forget(executor, [journal for journal, _ in begun], left)


def _forget(
    executor: Executor, journals: Sequence[Journal], left: Mapping[str, list[NatkeepError]]
) -> Failed:
    failed: Failed = {
        one.move.id: leftover(one, left[one.move.id]) for one in journals if left[one.move.id]
    }
    going = [one.move.id for one in journals if one.move.id not in failed]
    try:
        executor.state.remove(*going)
    except Exception as error:
        why = LeftoverError(f"all is undone, but journals are left: {error}")
        failed |= dict.fromkeys(going, why)
    return failed


def undo_all(executor: Executor, journals: Sequence[Journal], reason: BaseException) -> None:
    """Nothing is left of these, or LeftoverError."""
    left = _undo(executor, [(one, sorted(one.records, reverse=True)) for one in journals])
    for error in _forget(executor, journals, left).values():
        raise error from reason


def _undo(
    executor: Executor, some: Sequence[tuple[Journal, list[int]]]
) -> dict[str, list[NatkeepError]]:
    """Undo these steps of moves, each in its order, the same of many at once; what failed."""
    left: dict[str, list[NatkeepError]] = {journal.move.id: [] for journal, _ in some}
    plain = []
    for journal, numbers in some:
        journal.resolve()
        if any(site.row.puts_old for site in journal.move.sites):
            left[journal.move.id] = executor.undo_move(journal, numbers)
        else:
            plain.append(
                (journal, deque(n for n in numbers if journal.records[n].state != "undone"))
            )
    queues = [numbers for _, numbers in plain]

    def head(at: int) -> tuple[object, ...]:
        record = plain[at][0].records[queues[at][0]]
        return type(record.undo), record.site

    for column in take_columns(queues, head):
        undos = [(plain[at][0], number) for at, number in column]
        alone = _undo_or_halve(executor, undos)
        for at, number in column:
            journal = plain[at][0]
            if journal.move.id in alone:  # to its end
                left[journal.move.id] += executor.undo(journal, [number, *queues[at]])
                queues[at].clear()
    return left


def _undo_or_halve(executor: Executor, some: list[tuple[Journal, int]]) -> set[str]:
    """Undo the same step of many moves; the ids of those whose own is not undone so."""
    record = some[0][0].records[some[0][1]]
    if not isinstance(record.undo, _AT_ONCE):
        return {journal.move.id for journal, _ in some}
    try:
        _undo_column(executor, some)
    except Exception:
        if len(some) == 1:
            return {some[0][0].move.id}
        half = len(some) // 2
        return _undo_or_halve(executor, some[:half]) | _undo_or_halve(executor, some[half:])
    return set()


def _undo_column(executor: Executor, some: list[tuple[Journal, int]]) -> None:
    """Undo the same step of many moves; whatever it raises, it is to be tried again."""
    undos: list[tuple[Undo, Prior]] = []
    for journal, number in some:
        record, kind = journal.records[number], journal.kinds[number]
        assert record.site is not None  # once resolved
        site, undo, prior = record.site, record.undo, record.prior
        assert isinstance(undo, _AT_ONCE)
        if isinstance(undo, RestoreEntries):
            prior = give_up_claims(executor.state, journal, site, undo, prior)
        undos.append((undo, prior))
    executor.talk(f"[-] {kind} at {site}, of {len(some)} moves")
    faultpoints.reach("revert", kind)
    with reading_once():
        executor.kernel.revert_many(site, undos)
    faultpoints.reach("reverted", kind)
    # A full disk must not stop this: what the journal still has is only undone again.
    with suppress(Exception), executor.state.at_once():
        for journal, number in some:
            journal.note(number, "undone", Prior())
        faultpoints.reach("undone", kind)
