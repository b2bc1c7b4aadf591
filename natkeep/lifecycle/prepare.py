"""prepare: everything is checked before anything is changed, and undone if it fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from natkeep import faultpoints
from natkeep.errors import LeftoverError
from natkeep.lifecycle.check import check
from natkeep.lifecycle.conflicts import takes_over
from natkeep.lifecycle.executor import Executor, finish
from natkeep.lifecycle.open import write_ready
from natkeep.lifecycle.progress import kinds_of, numbers_before, plan_of
from natkeep.plan.move import Move
from natkeep.plan.observation import Gate
from natkeep.plan.steps import HoldListeners, HoldSegments, Plan, Step
from natkeep.plan.tuples import NO_CONNECTIONS, Connections
from natkeep.state.journal import Journal


def prepare(
    executor: Executor,
    move: Move,
    connections: Connections,
    gate: Gate = Gate.CLOSED,
    image: str | None = None,
    *,
    frozen: bool = False,
    again: bool = False,
) -> Plan:
    """Make every site ready; with Gate.OPEN let the connections through as well.

    image: the run id of the dump that the connections were read from, for `open_move`'s confirm.
    frozen: CRIU holds the process at the source just now, so its sockets are to be there.
    again: as `check` has it.

    Raises what was refused or failed; then everything has been undone, and if it could not
    be, LeftoverError says what is there.
    """
    with executor.state.changing(move.id):
        plan = check(executor, move, connections, frozen=frozen, run_id=image, again=again)
        carry_out(executor, plan, connections, gate, image)
    return plan


def carry_out(
    executor: Executor,
    plan: Plan,
    connections: Connections,
    gate: Gate,
    image: str | None,
    first: Callable[[Journal], None] = lambda journal: None,
) -> None:
    """Begin the journal of a plan that has been checked, do its steps, or undo all of it.

    first: what is noted in the new journal before the first step.
    """
    move = plan.move
    numbers = [*range(len(plan.steps))] if gate == Gate.OPEN else numbers_before(plan)
    identities = tuple(executor.kernel.identity(site) for site in move.sites)
    quiesce = executor.state.load(move.id) if takes_over(move) else None
    journal = executor.state.begin(
        move, connections, plan.surroundings, identities, kinds_of(plan), image,
        before=tuple(numbers_before(plan)), blocks=_blocking(plan) if takes_over(move) else None,
        opening=plan.open,
    )  # fmt: skip
    ready = partial(write_ready, executor.kernel, journal, plan)
    quick = gate == Gate.CLOSED and not move.live  # else the image is to be compared
    try:
        first(journal)
    except BaseException as error:
        finish(partial(executor.undo_all, journal, numbers, error))
        raise
    try:
        executor.apply_or_undo(journal, plan, numbers, ready if quick else lambda: None)
    except BaseException:
        if quiesce is not None and not executor.state.knows(move.id):
            finish(partial(_quiesce_again, executor, quiesce))
        raise


def _blocking(plan: Plan) -> tuple[int, Step]:
    """The step that blocks listeners, which a quiesce has done before."""
    return next((n, step) for n, step in enumerate(plan.steps) if isinstance(step, HoldListeners))


def _quiesce_again(executor: Executor, quiesce: Journal) -> None:
    """The move that took a quiesce over has failed and was undone: all is as before it."""
    if executor.state.knows(quiesce.move.id):
        return
    plan = plan_of(quiesce)
    try:
        faultpoints.reach("hold-again")
        journal = executor.state.begin(
            quiesce.move, NO_CONNECTIONS, plan.surroundings, quiesce.namespaces, quiesce.kinds,
            before=quiesce.before,
        )  # fmt: skip
        executor.apply_or_undo(journal, plan, list(range(len(plan.steps))))
    except Exception as error:
        raise LeftoverError(
            f"move {quiesce.move.id}: its listeners are left open to callers: {error}",
            hint=f"natkeep quiesce {quiesce.move.id} holds them again",
        ) from error


def find_unheld(executor: Executor, move_id: str) -> tuple[str, ...]:
    """Why what peers say meanwhile is not held, where it should be; else nothing."""
    journal, plan = executor.load(move_id)
    records = {n: record.prior.facts for n, record in journal.records.items()}
    return tuple(
        f"{step.site}: what peers say meanwhile is not held: {records[number]['refused']}"
        for number, step in enumerate(plan.prepare)
        if isinstance(step, HoldSegments) and "refused" in records.get(number, {})
    )
