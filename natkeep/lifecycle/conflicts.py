"""What two moves may not share: an id, an OLD that goes to two NEWs, a tuple at one address.

Rule: a refusal names the move that was there first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from natkeep.errors import RefusedError
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.progress import plan_today
from natkeep.plan.listeners import refuse_one_end_for_two
from natkeep.plan.maps import Map
from natkeep.plan.move import Move
from natkeep.plan.steps import Plan
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, FourTuple


def refuse_conflicts(executor: Executor, plan: Plan, replaces: str | None) -> None:
    """Two moves may share an address, but no tuple on either side of a site."""
    if executor.state.knows(plan.move.id) and not takes_over(plan.move):
        raise RefusedError(
            f"the id {plan.move.id} is in use",
            hint=f"natkeep teardown {plan.move.id}, or another id",
        )
    refuse_overlaps(executor, plan, frozenset({replaces or "", plan.move.id}))


def refuse_overlaps(executor: Executor, plan: Plan, besides: frozenset[str]) -> None:
    """The same, whatever the id: what *plan* shares with other moves than *besides*."""
    ours = [executor.kernel.identity(site) for site in plan.move.sites]
    ends = {end for map_ in plan.move.maps for end in (map_.old, map_.new)}
    for move_id in executor.state.ids_naming(ends):
        other = executor.state.read_header(move_id)
        if other is None or move_id in besides or not any(map(other.is_at, ours)):
            continue
        _refuse_beside(plan, other.move, partial(_plan_of, executor, move_id))


def _plan_of(executor: Executor, move_id: str) -> Plan:
    return plan_today(executor.state.load(move_id))


def refuse_beside(plan: Plan, other: Plan) -> None:
    """The same of two moves that are to be prepared at the same sites."""
    _refuse_beside(plan, other.move, lambda: other)


def _refuse_beside(plan: Plan, other: Move, plan_of_other: Callable[[], Plan]) -> None:
    _refuse_remapped(plan.move, other)
    refuse_one_end_for_two(plan.move, other)
    if _shares_address(plan.move, other):
        _refuse_overlap(plan, plan_of_other())


def takes_over(move: Move) -> bool:
    """Whether *move* goes on from a quiesce of the same id."""
    return bool(move.held) and not move.quiesces


def _refuse_remapped(move: Move, other: Move) -> None:
    new_of = {map_.old_end: map_.new_end for map_ in other.maps}
    for map_ in move.maps:
        if new_of.get(map_.old_end, map_.new_end) != map_.new_end:
            hint = f"natkeep teardown {other.id} first"
            if move.vias:
                hint = f"at the relay of {other.id}: prepare --replace {other.id}; elsewhere {hint}"
            raise RefusedError(
                f"{map_.old_end} is moved to {new_of[map_.old_end]} by {other.id} already",
                hint=hint,
            )


def _shares_address(move: Move, other: Move) -> bool:
    def addresses(of: Move) -> set[object]:
        return {end for map_ in of.maps for end in (map_.old, map_.new)}

    return bool(addresses(move) & addresses(other))


def _refuse_overlap(plan: Plan, other: Plan) -> None:
    """No two moves may have one tuple at one address, be it OLD or NEW; nor reset the other's."""
    streams = (one for one in other.translations if one.protocol.has_states)
    theirs_kept = {record for theirs in streams for record in theirs.kept.each()}
    for reset in plan.resets:
        for inbound in reset.connections:
            if theirs_kept.intersection(Connections.of([inbound]).each()):
                raise RefusedError(
                    f"{inbound} cannot be kept by this move, but is by {other.move.id}",
                    hint="--unkept report resets nothing",
                )
    for ours in plan.translations:
        for theirs in other.translations:
            if ours.protocol != theirs.protocol:
                continue
            for where, views in _shared_views(ours.map, theirs.map):
                mine, others = views(ours), views(theirs)
                if common := _keys(mine) & _keys(others):
                    one, two = (
                        _find(translation.kept, view, min(common))
                        for translation, view in ((ours, mine), (theirs, others))
                    )
                    raise RefusedError(
                        f"{one} and {two} (of move {other.move.id}) would be one tuple at "
                        f"{where}; {len(common)} in all"
                    )


_View = Callable[[Translation], Connections]


def _shared_views(ours: Map, theirs: Map) -> Iterator[tuple[str, _View]]:
    """At OLD as the process sees them, at NEW as they are on the wire."""
    if ours.old == theirs.old:
        yield "OLD", lambda translation: translation.kept
        if ours.new != theirs.new or not (ours.turns_ports or theirs.turns_ports):
            return
    if {ours.old, ours.new} & {theirs.old, theirs.new}:
        yield "NEW", lambda translation: translation.wire


def _keys(some: Connections) -> set[bytes]:
    """Local port, peer and peer port of each connection, packed."""
    return {_key(one) for one in some.each()}


def _key(record: bytes) -> bytes:
    return record[len(record) // 2 - 2 :]


def _find(kept: Connections, view: Connections, key: bytes) -> FourTuple:
    """Of the *kept* connections the one that the *view* of them has with that key."""
    pairs = zip(kept, view.each(), strict=True)
    return next(tuple_ for tuple_, record in pairs if _key(record) == key)
