"""Writes orders into the store: a move to be made, and one to be undone.

Rule: all is looked at before anything is written, and an order is written in one transaction,
which fails if anything that was looked at is another by then. So of two orders for one OLD one is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from ipaddress import ip_address

from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.listing import write_listing
from natkeep.errors import RefusedError
from natkeep.fleet import keys
from natkeep.fleet.done import parse_done
from natkeep.fleet.listing import cut, sweep
from natkeep.fleet.nodes import find_late, find_nodes, is_there
from natkeep.fleet.order import Order, parse_order
from natkeep.fleet.store import ABSENT, Item, Store, read
from natkeep.fleet.want import Phase, as_object, texts
from natkeep.plan.maps import Map
from natkeep.plan.move import Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan
from natkeep.plan.tuples import Connections
from natkeep.values import replace

_NOWHERE = {4: "198.18.0.0", 6: "2001:2::"}  # RFC 2544 and 5180: for benches alone


def apply(store: Store, order: Order, checkpoint: Checkpoint) -> tuple[Order, Plan]:
    """Order a move, or order it anew; as it is in the store, and what the destination will do.

    RefusedError where a node is not there, OLD is another's, or more than its phase has changed.
    """
    alive = _find_alive(store)
    before = read(store, keys.move(order.id))
    order = _with_members(_with_earlier(order, before), alive)
    _refuse_absent(order, alive)
    olds = [map_.old_end for map_ in order.maps]
    udp, servers = checkpoint.udp_at(olds), checkpoint.udp_servers_at(olds)
    plans = make_plans(order, checkpoint)
    ours = Connections.joined(plans[order.places[0].role].move.share(checkpoint.connections))
    generation, count = _next(store, order, before), len(ours) + len(udp) + len(servers)
    listed, pieces = cut(order.id, generation, write_listing(ours, udp, servers), count)
    order = replace(order, listed=listed, image=checkpoint.run_id, generation=generation)
    compare = {keys.move(order.id): before.revision if before else ABSENT}
    compare |= _look_at_owners(store, order)
    for key, piece in pieces.items():
        store.txn({key: piece})
    _write(store, order, before, compare)
    sweep(store, order.id, generation)
    return order, next(plan for role, plan in plans.items() if role == Role.DESTINATION)


def make_plans(order: Order, checkpoint: Checkpoint) -> dict[Role, Plan]:
    """What will be done at a site of each role, and what is not kept; RefusedError as prepare's."""
    olds = [map_.old_end for map_ in order.maps]
    udp, servers = checkpoint.udp_at(olds), checkpoint.udp_servers_at(olds)
    maps = _suppose_new(order)
    return {
        place.role: make_plan(
            Move(
                order.id, maps, (Site(place.role, place.netns),), order.mode,
                order.listeners, udp=udp, udp_servers=servers,
            ),
            checkpoint.connections,
        )
        for place in order.places
    }  # fmt: skip


def _suppose_new(order: Order) -> tuple[Map, ...]:
    """Its maps, with an address of no network where NEW is not known: what is kept is the same."""
    found = []
    for place, wish in enumerate(order.maps, 1):
        supposed = ip_address(_NOWHERE[wish.old.version]) + place
        found.append(wish.to(wish.new or supposed))
    return tuple(found)


def _write(
    store: Store, order: Order, before: Item | None, compare: Mapping[str, int]
) -> None:  # fmt: skip
    """Write an order whose list is there; RefusedError where another came, and it leaves nothing.

    It may have been written, though nothing said so: a member of the store died in between.
    """
    owners = dict.fromkeys((keys.owner(map_.old_end) for map_ in order.maps), order.id)
    earlier = parse_order(before.value).places if before else ()
    ours = {place.key(order.id) for place in order.places}
    left = dict.fromkeys({place.key(order.id) for place in earlier} - ours)  # undone: see _next
    puts, name = {**left, **_orders(order), **owners}, keys.move(order.id)
    if store.txn(puts, compare):
        return
    there = read(store, name)
    if there is not None and there.value == puts[name]:
        return
    known = parse_order(there.value) if there else None
    if known is None or (known.generation, known.listed) != (order.generation, order.listed):
        store.delete(keys.pieces(order.id, order.generation, order.listed.sha256))
    raise RefusedError(f"{order.id}: another order came at the same time; it stands")


def end(store: Store, move_id: str, *, force: bool = False) -> Order | None:
    """Order a move to be undone everywhere; None where there is no such move."""
    while True:
        before = read(store, keys.move(move_id))
        if before is None:
            return None
        order = parse_order(before.value)
        if order.phase == "settled":
            return None
        order = _with_late(store, order)
        order = replace(order, phase="gone", generation=_next(store, order, before, ends=True))
        wants = _orders(order, force=force, unopened=_is_unopened(store, order))
        if store.txn(wants, {keys.move(move_id): before.revision}):
            return order


def forget(store: Store, order: Order) -> None:
    """Of a move that is undone everywhere leave nothing in the store but its generation."""
    name = keys.move(order.id)
    item = read(store, name)
    if item is None or parse_order(item.value) != order:
        return
    puts: dict[str, str | None] = dict.fromkeys(place.key(order.id) for place in order.places)
    puts[name], compare = (
        json.dumps(replace(order, phase="settled").to_json()),
        {name: item.revision},
    )
    for key in (keys.owner(map_.old_end) for map_ in order.maps):
        owner = read(store, key)
        if owner is not None and owner.value == order.id:  # else another move has OLD by now
            puts[key], compare[key] = None, owner.revision
    if store.txn(puts, compare):
        sweep(store, order.id, order.generation + 1)


def is_undone(store: Store, order: Order) -> bool:
    """Whether each node has undone it, as ordered."""
    if order.is_wanted() or order.phase == "settled":
        return not order.is_wanted()
    items = (read(store, keys.done(node, order.id)) for node, _ in order.nodes())
    said = [parse_done(item and item.value) for item in items]
    return all(done.reaches(Phase.GONE, order.generation) for done in said)


def _is_unopened(store: Store, order: Order) -> bool:
    """Whether nothing lives by it yet: its destination is there, and says that it was not opened.

    A gateway cannot know: its entries are there before the process is.
    """
    [node] = [name for name, place in order.nodes() if place.role == Role.DESTINATION]
    item = read(store, keys.done(node, order.id))
    if item is None or read(store, keys.alive(node)) is None:
        return False
    return parse_done(item.value).phase in (Phase.GONE, Phase.PREPARED)


def _orders(order: Order, *, force: bool = False, unopened: bool = False) -> dict[str, str]:
    wants = order.wants(force=force, unopened=unopened)
    puts = {key: json.dumps(want.to_json()) for key, want in wants.items()}
    return {**puts, keys.move(order.id): json.dumps(order.to_json())}


def _find_alive(store: Store) -> dict[str, list[str]]:
    """The nodes whose agents run, and their groups."""
    alive = {node: read(store, keys.alive(node)) for node in find_nodes(store)}
    return {node: _groups(item) for node, item in alive.items() if item}


def _with_members(order: Order, alive: Mapping[str, list[str]]) -> Order:
    """*order*, and in its groups the members of now besides those that it has."""
    places = []
    for place in order.places:
        more = [node for node, groups in alive.items() if place.group and place.group in groups]
        nodes = tuple(sorted({*place.nodes, *more})) if place.group else place.nodes
        places.append(replace(place, nodes=nodes))
    return replace(order, places=tuple(places))


def _with_earlier(order: Order, before: Item | None) -> Order:
    """*order*, and in its groups those that had it before: they may have it still."""
    known = parse_order(before.value) if before else None
    if known is None or known.phase == "settled":
        return order
    had = {place.group: place.nodes for place in known.places if place.group}
    places = (replace(p, nodes=had.get(p.group, ())) if p.group else p for p in order.places)
    return replace(order, places=tuple(places))


def _with_late(store: Store, order: Order) -> Order:
    """*order*, and in its groups those that may have it though it did not name them.

    Of one whose agent is dead by now the groups are not known; what it has done is.
    """
    named = {node for place in order.places if not place.group for node in place.nodes}
    alive = {node: own for node, own in _find_alive(store).items() if node not in named}
    groups = [place.group for place in order.places if place.group][:1]
    known = {node for node, _ in order.nodes()} | alive.keys()
    late = (node for node in find_late(store, order.id) if groups and node not in known)
    dead = {node: groups for node in late if is_there(store, node, order.id)}
    return _with_members(order, {**alive, **dead})


def _refuse_absent(order: Order, alive: Mapping[str, list[str]]) -> None:
    """RefusedError where a node's agent does not run, or none of a group."""
    for place in order.places:
        if place.group and not alive.keys() & {*place.nodes}:
            raise RefusedError(f"no agent of the group {place.group} runs")
        if not place.group and place.nodes[0] not in alive:
            raise RefusedError(
                f"no agent runs as {place.nodes[0]}",
                hint="natkeep fleet status shows those that do",
            )


def _groups(item: Item) -> list[str]:
    return texts(as_object(item.value).get("groups", []))


def _next(store: Store, order: Order, before: Item | None, *, ends: bool = False) -> int:
    """The generation of an order that is newer than all that any of its nodes has followed."""
    known = parse_order(before.value) if before else None
    if known is not None and not ends:
        _refuse_other(store, known, order)
    items = (read(store, keys.done(node, order.id)) for node, _ in order.nodes())
    followed = [parse_done(item.value).generation for item in items if item]
    return max([known.generation if known else 0, *followed]) + 1


def _refuse_other(store: Store, known: Order, order: Order) -> None:
    """RefusedError where nodes would have to undo something for the new order."""
    same = (known.maps, known.mode, known.listeners) == (order.maps, order.mode, order.listeners)
    before, now = ({(p.key(order.id), p.role, p.netns) for p in o.places} for o in (known, order))
    same &= before <= now
    whole = (known.phase, order.phase) == ("frozen", "staged")
    if (same and not whole) or is_undone(store, known):
        return
    if same:
        raise RefusedError(
            f"{order.id} is ordered whole already", hint=f"natkeep fleet end {order.id} undoes it"
        )
    what, hint = "ordered already", f"natkeep fleet end {order.id} first, or another id"
    if not known.is_wanted():
        what, hint = "not undone yet", f"natkeep fleet wait {order.id} --for settled"
    raise RefusedError(f"{order.id} is {what}, with other maps or sites", hint=hint)


def _look_at_owners(store: Store, order: Order) -> Mapping[str, int]:
    """The revisions of what says whose each OLD is; RefusedError where it is another move's."""
    seen = {}
    for map_ in order.maps:
        key = keys.owner(map_.old_end)
        item = read(store, key)
        if item is not None and item.value != order.id:
            other = read(store, keys.move(item.value))
            known = parse_order(other.value) if other else None
            ended = known and map_.old_end not in [wish.old_end for wish in known.maps]
            if known is None or not (ended or is_undone(store, known)):
                raise RefusedError(
                    f"{map_.old_end} is moved by {item.value} already",
                    hint=f"natkeep fleet end {item.value}",
                )
        seen[key] = item.revision if item else ABSENT
    return seen
