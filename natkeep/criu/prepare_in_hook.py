"""NATKEEP_MAP: a move that the hook prepares by itself, as soon as its namespace exists.

CRIU calls no hook when a restore fails, so what was prepared for one that did is cleared by the
next (its gate was never opened: it harmed no connection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from natkeep import policy
from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.images import read_checkpoint
from natkeep.criu.environment import Call, Orders, is_abandoned
from natkeep.criu.standing_order import maps_about
from natkeep.errors import JournalError
from natkeep.lifecycle.check import find_new, require_devices
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.replace import replace_move
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.maps import parse_map, parse_peer_map
from natkeep.plan.move import Datagrams, Fate, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import NO_CONNECTIONS, Connections
from natkeep.plan.via import parse_via
from natkeep.state.directory import read_boot_id
from natkeep.state.journal import Journal
from natkeep.values import replace


def ensure_prepared(
    move_id: str,
    orders: Orders,
    call: Call,
    executor: Executor,
    site: Site,
    say: Callable[[str], None],
) -> bool:
    """Prepare the move at *site* unless it is; False where there is nothing to keep.

    Then the gateways are waited for, if so ordered, once: what is prepared has waited.
    """
    if executor.state.knows(move_id):
        journal = executor.state.load(move_id)
        if journal.is_prepared() and executor.is_home(journal, site):
            return True
        teardown(executor, move_id)  # begun and killed, or for a namespace without the tree
    checkpoint = read_checkpoint(call.demand_images())
    if orders.udp == Datagrams.LEAVE:
        checkpoint = checkpoint.without_udp()
    if orders.standing:
        resets = orders.unkept == Fate.RESET
        maps = maps_about(orders.maps, checkpoint, executor.kernel, site, resets=resets)
        if not maps:
            say("no connection of this image is to be kept here")
            return False
        orders = replace(orders, maps=maps, peer_maps=_peer_maps_about(orders, checkpoint))
    olds = [parse_map(text).old_end for text in orders.maps]
    lost = checkpoint.lost_at(olds) if orders.unkept == Fate.RESET else NO_CONNECTIONS
    move = _make_move(move_id, orders, executor, site, lost)
    count = sum(map(len, move.share(checkpoint.connections))) + len(lost)
    move = replace(move, udp=checkpoint.udp_at(olds), udp_servers=checkpoint.udp_servers_at(olds))
    count += len(move.udp) + len(move.udp_servers)
    policy.authorise(move, count)
    require_devices(executor, move, checkpoint)
    _prepare(move, checkpoint, executor, site, call.criu)
    say(f"{move_id}: {', '.join(str(map_) for map_ in move.maps)}, {count} prepared")
    if orders.readiness is not None:
        ours = Connections.joined(move.share(checkpoint.connections))
        orders.readiness.wait(move, ours)
    return True


def _peer_maps_about(orders: Orders, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Of a standing order's --peer-map those that a connection of this image has a peer at."""
    if not orders.peer_maps:  # and a restore does not wait for all connections to be turned
        return ()
    some = Connections.joined((checkpoint.connections, checkpoint.udp)).turned()
    return tuple(t for t in orders.peer_maps if len(some.at(parse_peer_map(t).old_end)))


def _make_move(
    move_id: str, orders: Orders, executor: Executor, site: Site, lost: Connections
) -> Move:
    maps = []
    for text in orders.maps:
        wish = parse_map(text)
        maps.append(wish.to(wish.new or find_new(executor, wish.old, (site,))))
    mode, unkept = Mode(orders.mode or Mode.STATEFUL), Fate(orders.unkept or Fate.REPORT)
    return Move(
        move_id, tuple(maps), (site,), mode, unkept=unkept, lost=lost,
        peer_maps=tuple(map(parse_peer_map, orders.peer_maps)),
        vias=tuple(map(parse_via, orders.vias)),
    )  # fmt: skip


def _prepare(
    move: Move, checkpoint: Checkpoint, executor: Executor, site: Site, criu: int | None
) -> None:
    """Prepare *move*, in the place of those that were prepared for a CRIU that is no more.

    One that is at the same site is replaced, so that its gate stays closed until ours is: in
    between this host would answer a peer's segment with a reset.
    """
    earlier = None
    for journal in _abandoned(executor, criu):
        whole = journal.is_prepared() and journal.boot == read_boot_id()
        if earlier is None and whole and executor.is_home(journal, site):
            earlier = journal.move.id
        else:
            teardown(executor, journal.move.id)
    connections, image = checkpoint.connections, checkpoint.run_id
    if earlier is None:
        prepare(executor, move, connections, image=image)
    else:
        replace_move(executor, earlier, move, connections, image=image)


def _abandoned(executor: Executor, criu: int | None) -> Iterator[Journal]:
    for move_id in executor.state.ids():
        if not is_abandoned(move_id, criu):
            continue
        try:
            journal = executor.state.load(move_id)
        except JournalError:
            continue  # torn down by another hook meanwhile, or `natkeep status` tells
        leaves = any(site.role == Role.SOURCE for site in journal.move.sites)
        closed = any(map(journal.is_closed_again, journal.records))  # before a dump
        if not (journal.is_opened() or closed or leaves):
            yield journal
