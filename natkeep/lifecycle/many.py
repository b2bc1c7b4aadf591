"""many: prepare, open and teardown of a list of moves at once, for a gateway that has thousands.

What prepare.py and teardown.py do, step by step: the same step of all of them is one transaction,
and what is noted of it is on disk in one go. Each move has its journal as ever, so one that was
begun when natkeep was killed is undone by itself.

Rule: what is refused of one move, or fails because of it, is refused of that one alone: a list that
fails is undone, and its halves are tried. Moves that have to do with each other (both ends of a
connection), or with a process that still runs, go one by one.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import NamedTuple

from natkeep import faultpoints
from natkeep.errors import LeftoverError, NatkeepError
from natkeep.kernel.conntrack_own import note_absent
from natkeep.kernel.once import reading_once
from natkeep.lifecycle.check import check
from natkeep.lifecycle.conflicts import refuse_beside
from natkeep.lifecycle.executor import Executor, finish
from natkeep.lifecycle.many_undo import MOST, Failed, attempt, chunks, take_columns, undo_all
from natkeep.lifecycle.open import open_move, write_ready
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.progress import is_prepared, kinds_of, numbers_before
from natkeep.plan.move import Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.steps import OpenGate, Plan, Prior
from natkeep.plan.tuples import Connections
from natkeep.state.directory import read_boot_id
from natkeep.state.journal import Journal


class Wanted(NamedTuple):
    """A move to be prepared, as `prepare` takes it; again: it was there before the last boot."""

    move: Move
    connections: Connections
    gate: Gate = Gate.CLOSED
    image: str | None = None
    again: bool = False


class _Begun(NamedTuple):
    """A move at work: its journal, its plan and the steps that are to be done."""

    journal: Journal
    plan: Plan
    numbers: Sequence[int]


# ---- prepare -------------------------------------------------------------------------------------


def prepare_many(executor: Executor, wanted: Iterable[Wanted]) -> Failed:
    """Prepare these moves; of those that failed nothing is left, or LeftoverError says what."""
    failed: Failed = {}
    for some in _split(wanted):
        try:
            failed |= _prepare_some(executor, some)
        except Exception as error:  # the lock of the directory, say
            failed |= {one.move.id: error for one in some}
    return failed


def _split(wanted: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """Lists of moves that know nothing of each other; one alone where it is of another kind."""
    some: list[Wanted] = []
    ids, olds, peers = set[str](), set[bytes](), set[bytes]()
    for one in wanted:
        move = one.move
        own = {map_.old.packed for map_ in move.maps}
        views = (*move.share(one.connections), *move.share(move.udp))
        theirs = {peer for view in views for peer in view.peers()}
        # What guards is a process, which may not be in a site's namespace when it is started.
        alone = move.live or move.held or move.quiesces or move.guard or len(move.sites) > 1
        apart = move.id in ids or own & peers or theirs & olds
        if some and (alone or apart or len(some) == MOST):
            yield some
            some, ids, olds, peers = [], set(), set(), set()
        if alone:
            yield [one]
            continue
        some.append(one)
        ids.add(move.id)
        olds |= own
        peers |= theirs
    if some:
        yield some


def _prepare_some(executor: Executor, some: list[Wanted]) -> Failed:
    if len(some) == 1:
        [one] = some
        return attempt(one.move.id, lambda: prepare(executor, *one[:4], again=one.again))
    failed: Failed = {}
    left = some
    try:
        executor.kernel.open_sites(_sites_of(some))
    except NatkeepError:
        return _prepare_halves(executor, some)
    ids = (one.move.id for one in some)
    with executor.state.changing(*ids), executor.kernel.staying(_sites_of(some)):
        plans = _check(executor, some, failed)
        left = [one for one in some if one.move.id not in failed]
        try:
            _carry_out(executor, left, plans)
            return failed
        except LeftoverError as error:
            return failed | {one.move.id: error for one in left}
        except Exception:
            if not left:
                raise
    return failed | _prepare_halves(executor, left)


def _prepare_halves(executor: Executor, some: list[Wanted]) -> Failed:
    halves = (some[: len(some) // 2], some[len(some) // 2 :])
    failed = [_prepare_some(executor, half) for half in halves if half]
    return {move_id: error for one in failed for move_id, error in one.items()}


def _sites_of(some: list[Wanted]) -> list[Site]:
    return [*dict.fromkeys(site for one in some for site in one.move.sites)]


def _check(executor: Executor, some: list[Wanted], failed: Failed) -> dict[str, Plan]:
    """The plans of those that could be carried out; why the others could not is in *failed*."""
    plans: dict[str, Plan] = {}
    beside: dict[object, list[Plan]] = {}  # by OLD and NEW

    def check_one(one: Wanted) -> None:
        ends = {end for map_ in one.move.maps for end in (map_.old, map_.new)}
        plan = check(executor, one.move, one.connections, run_id=one.image, again=one.again)
        for end in ends:
            for other in beside.get(end, ()):
                refuse_beside(plan, other)
        plans[one.move.id] = plan
        for end in ends:
            beside.setdefault(end, []).append(plan)

    with reading_once():
        for site in _sites_of(some):
            shares = (one.move.share(one.connections) for one in some if site in one.move.sites)
            executor.kernel.ask(site, note_absent, [view for views in shares for view in views])
        for one in some:
            failed |= attempt(one.move.id, partial(check_one, one))
    return plans


def _carry_out(executor: Executor, some: list[Wanted], plans: Mapping[str, Plan]) -> None:
    """Begin the journals of these, do all steps, or undo all of them."""
    begun: list[_Begun] = []
    try:
        with executor.state.at_once():
            for one in some:
                plan = plans[one.move.id]
                before = numbers_before(plan)
                identities = tuple(executor.kernel.identity(site) for site in one.move.sites)
                journal = executor.state.begin(
                    one.move, one.connections, plan.surroundings, identities, kinds_of(plan),
                    one.image, before=tuple(before), opening=plan.open,
                )  # fmt: skip
                numbers = range(len(plan.steps)) if one.gate == Gate.OPEN else before
                begun.append(_Begun(journal, plan, numbers))
        _apply(executor, begun)
        with executor.state.at_once():
            for one, each in zip(some, begun, strict=True):
                if one.gate == Gate.CLOSED:
                    write_ready(executor.kernel, each.journal, each.plan)
    except BaseException as error:
        executor.talk(f"natkeep: {error or type(error).__name__}: undoing")
        finish(partial(undo_all, executor, [one.journal for one in begun], error))
        raise


def _apply(executor: Executor, begun: Sequence[_Begun]) -> None:
    """Do the steps of all, in the order of each, the same of many at once."""
    queues = [deque(one.numbers) for one in begun]

    def head(at: int) -> tuple[object, ...]:
        step = begun[at].plan.steps[queues[at][0]]
        return type(step), step.site

    for column in take_columns(queues, head):
        _apply_column(executor, [(*begun[at][:2], number) for at, number in column])


def _apply_column(executor: Executor, some: list[tuple[Journal, Plan, int]]) -> None:
    steps = [plan.steps[number] for _, plan, number in some]
    kind = type(steps[0]).__name__
    executor.talk(f"[+] {kind} at {steps[0].site}, of {len(steps)} moves")
    faultpoints.reach("apply", kind)

    def note(state: str, priors: Mapping[int, Prior]) -> None:
        at = time.monotonic_ns() if kind == OpenGate.__name__ and state == "done" else 0
        with executor.state.at_once() if len(priors) > 1 else nullcontext():
            for place, prior in priors.items():
                journal, _, number = some[place]
                journal.note(number, state, prior, steps[place] if state == "doing" else None, at)

    def remember(priors: Mapping[int, Prior]) -> None:
        note("doing", priors)
        faultpoints.reach("begun", kind)

    with reading_once():
        done = executor.kernel.apply_many(steps, remember)
    faultpoints.reach("applied", kind)
    note("done", dict(enumerate(done)))
    faultpoints.reach("done", kind)


# ---- open ----------------------------------------------------------------------------------------


def open_many(executor: Executor, ids: Sequence[str]) -> Failed:
    """Open these moves, which have been prepared; why others were not opened."""
    failed: Failed = {}
    for some in chunks(ids):
        alone = [*some]
        with suppress(Exception), ExitStack() as stack:
            begun = _find_closed(executor, stack, some)
            try:
                _apply(executor, begun)
            except BaseException:
                for one in begun:
                    executor.undo_for_now(one.journal, one.numbers)
                raise
            alone = [each for each in some if each not in {one.journal.move.id for one in begun}]
        for move_id in alone:
            failed |= attempt(move_id, partial(open_move, executor, move_id))
    return failed


def _find_closed(executor: Executor, stack: ExitStack, ids: Sequence[str]) -> list[_Begun]:
    """Those that are opened by one step at their site; their locks are held."""
    begun = []
    for move_id in ids if len(ids) > 1 else ():
        stack.enter_context(executor.state.holding(move_id))
        journal, plan = executor.load(move_id)
        move = journal.move
        plain = not (move.live or move.quiesces or journal.change) and len(move.sites) == 1
        numbers = [n for n, _ in enumerate(plan.steps) if not journal.is_done(n)]
        if plain and journal.boot == read_boot_id() and is_prepared(journal, plan):
            executor.open_known(journal, move.sites)
            begun.append(_Begun(journal, plan, numbers))
    return begun
