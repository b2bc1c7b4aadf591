"""The comparison of a move that was prepared from a live process with the image of its dump.

Connections come and go until the freeze. What came is added, at the destination beside what stands
there; what went has no socket: sites that waited never hear of it, and what the destination has of
it is taken away by teardown, since a deletion would hold up the restore. A gateway's rules, which
redirect nothing so far, are made anew where either happened.

Rule: the journal has the new plan, in one line, before the kernel is asked for any of it. Killed
from there on, the next open goes on, and a teardown undoes both plans as one.
"""

from __future__ import annotations

from collections.abc import Iterator

from natkeep import faultpoints, policy
from natkeep.checkpoint import Checkpoint
from natkeep.errors import RefusedError
from natkeep.lifecycle.conflicts import refuse_overlaps
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.owners import find_surroundings
from natkeep.lifecycle.progress import is_prepared, is_waiting, kinds_of, plan_of, unprepared
from natkeep.plan.move import Move
from natkeep.plan.repair import LoadObjects, Patch
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import (
    AddAddress,
    AddRules,
    FillSet,
    InsertEntries,
    InstallGate,
    InstallTranslation,
    Plan,
    Prior,
    PurgeEntries,
    Step,
    TranslateErrors,
    Unknown,
)
from natkeep.plan.translation import Change, Compared
from natkeep.plan.tuples import Connections
from natkeep.plan.wanted import objects_of
from natkeep.state.journal import Journal
from natkeep.values import replace


def bring_up_to_date(
    executor: Executor, journal: Journal, plan: Plan, image: Checkpoint | None
) -> tuple[Compared | None, Plan]:
    """Compare with *image*, if there is one, and do what a comparison has found to be done.

    JournalError when the move was not prepared to the end. How the image differs is returned, and
    the plan by now.
    """
    if not is_prepared(journal, plan, _late_numbers(journal, plan)):
        raise unprepared(journal)
    compared = None
    if image is not None:
        compared = compare(executor, journal, plan, image)
        more = _find_new_datagrams(journal.move, image)
        compared = replace(compared, unkept=(*compared.unkept, *more))
        plan = plan_of(journal)
    widen(executor, journal, plan)
    return compared, plan


def compare(executor: Executor, journal: Journal, plan: Plan, image: Checkpoint) -> Compared:
    """Have the journal say what the image says; RefusedError where that is not allowed.

    The sites are open. An image that has been compared before changes nothing.
    """
    move = journal.move
    if journal.image is not None and journal.image != image.run_id:
        raise RefusedError(
            f"move {move.id} was prepared from the image of another dump",
            hint=f"natkeep teardown {move.id}, and prepare it from this one",
        )
    if not move.live or journal.change is not None:
        return _count(journal, plan)
    prepared, found = (_at_olds(journal, some) for some in (journal.connections, image.connections))
    came, went = found.minus(prepared), prepared.minus(found)
    if len(came):
        policy.authorise(move, len(prepared) + len(came) + len(move.lost))
    begun = (site for site in move.sites if not is_waiting(journal, plan, site))
    if any(move.waits(site) for site in begun) or journal.is_opened():
        if len(came):
            raise RefusedError(
                f"move {move.id} was opened before its image was known: {len(came)} "
                "connections of it were not prepared",
                hint=f"natkeep teardown {move.id}, and prepare it from the image",
            )
        return Compared(0, len(went))
    around = journal.surroundings
    if len(came) or len(went):  # else it is just what prepare has looked at
        around = find_surroundings(executor.kernel, executor.state, move, found)
    change = Change(came, went, around)
    new = make_plan(move, journal.connections, journal.surroundings, change)
    _refuse_to_widen(plan, change)
    refuse_overlaps(executor, new, frozenset({move.id}))
    again = () if plan.written or plan.unnoted else _find_again(journal, plan, new)
    faultpoints.reach("change")
    journal.note_change(change, kinds_of(new), _origins(plan, new), again, image.run_id)
    faultpoints.reach("changed")
    return _count(journal, new)


def _refuse_to_widen(plan: Plan, change: Change) -> None:
    """What another natkeep did is not mixed with what this one would do."""
    unknown = any(isinstance(step, Unknown) for step in plan.steps)
    if (plan.written or plan.unnoted) and (len(change.came) or unknown):
        raise RefusedError(
            f"move {plan.move.id} was prepared by another version of natkeep, and connections came "
            "since",
            hint=f"natkeep teardown {plan.move.id}, and prepare it from the image",
        )


def widen(executor: Executor, journal: Journal, plan: Plan) -> None:
    """Have the steps that have more to do since the change do that."""
    if journal.change is None:
        return
    base = make_plan(journal.move, journal.connections, journal.surroundings)
    _take_back(executor, journal, plan)
    for number, origin in enumerate(_origins(base, plan)):
        record = journal.records.get(number)
        if origin is None or record is None or not record.again:
            continue
        patch = _more(base.steps[origin], plan.steps[number])
        if patch is None:  # a repair was at it, and was killed
            continue
        for line in patch.describe():
            executor.talk(f"[+] {line}")
        before = record.prior

        def remember(_: Prior, number: int = number, before: Prior = before) -> None:
            journal.note(number, "doing", before, plan.steps[number])

        executor.kernel.mend(patch, remember)
        faultpoints.reach("widened")
        journal.note(number, "done", before)


def _take_back(executor: Executor, journal: Journal, plan: Plan) -> None:
    """What gateways were prepared with, and would have otherwise by now: open does it anew."""
    again = {number for number, record in journal.records.items() if record.again}
    stale = [number for number in again if plan.move.waits(plan.steps[number].site)]
    executor.undo_for_now(journal, stale)


def _find_new_datagrams(move: Move, image: Checkpoint) -> Iterator[str]:
    """The sockets of UDP that a process has made since prepare; none of them is carried."""
    if not move.live:
        return
    olds = [map_.old_end for map_ in move.maps]
    for inbound in image.udp_at(olds).minus(move.udp):
        if inbound.destination not in move.udp_servers:  # whose port is carried for any peer
            yield f"udp {inbound.destination} {inbound.source}"
    yield from (f"udp {e} *" for e in image.udp_servers_at(olds) if e not in move.udp_servers)


def _late_numbers(journal: Journal, plan: Plan) -> frozenset[int]:
    """The destination's steps for what came, which prepare could not know of."""
    if journal.change is None:
        return frozenset()
    known = make_plan(journal.move, journal.connections, journal.surroundings)
    return frozenset(n for n, origin in enumerate(_origins(known, plan)) if origin is None)


def _at_olds(journal: Journal, connections: Connections) -> Connections:
    return Connections.joined(journal.move.share(connections))


def _count(journal: Journal, plan: Plan) -> Compared:
    change = journal.change
    if change is None:
        return Compared(0, 0)
    came = frozenset(change.came)
    lost = tuple(f"{u.inbound}: {u.reason}" for u in plan.unkept if u.inbound in came)
    return Compared(len(change.came) - len(lost), len(change.went), lost)


def _origins(old: Plan, new: Plan) -> tuple[int | None, ...]:
    """For each step of *new* the one of *old* that did a part of it, or the whole."""
    numbers = {_key(step): number for number, step in enumerate(old.steps)}
    return tuple(numbers.get(_key(step)) for step in new.steps)


def _key(step: Step) -> tuple[object, ...]:
    match step:
        case FillSet():
            return (step.site, FillSet, step.name)
        case AddAddress():
            return (step.site, AddAddress, step.address)
        case PurgeEntries() | InsertEntries():
            return (step.site, type(step), step.translation.number)
        case _:
            return (step.site, type(step))


def _find_again(journal: Journal, old: Plan, new: Plan) -> tuple[int, ...]:
    """The steps of *new* that were done as *old* had them, and have more to do, or others.

    All of a gateway, where one would load others by now: as the sizes of its sets are.
    """
    pairs = [
        (number, old.steps[origin], step)
        for number, (origin, step) in enumerate(zip(_origins(old, new), new.steps, strict=True))
        if origin is not None and origin in journal.records
    ]
    differ = {now.site for _, was, now in pairs if objects_of(was) != objects_of(now)}
    redone = {site for site in differ if site.row.passes_on}
    return tuple(n for n, was, now in pairs if now.site in redone or _more(was, now) is not None)


def _more(old: Step, new: Step) -> Patch | None:
    """What *new* has to do besides what *old* did, or None. Only the destination was prepared."""
    if new.site.role != Role.DESTINATION:
        return None
    if isinstance(new, AddRules):
        assert isinstance(old, AddRules)
        return new if {*new.rules()} - {*old.rules()} else None
    if not isinstance(new, InstallGate | InstallTranslation | TranslateErrors):
        return None
    done = frozenset(objects_of(old))
    objects = tuple(one for one in objects_of(new) if one not in done)
    return LoadObjects(new.site, objects) if objects else None
