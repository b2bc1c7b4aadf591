"""which connections of a move are kept, and the translations that every site needs for them.

Rule: what cannot be translated is refused here, or named with its reason; a translation needs no
further check. What one is, and why, is in translation.py.
This file must never look at a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.errors import RefusedError
from natkeep.plan.entry_attributes import Noted
from natkeep.plan.maps import Map
from natkeep.plan.move import Fate, Mode, Move, Site
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.refusals import (
    refuse_idle_sites,
    refuse_none_or_too_many,
    refuse_one_tuple_for_two,
    refuse_peer_maps,
)
from natkeep.plan.translation import (
    NOTHING_SPECIAL,
    Change,
    Surroundings,
    Translation,
    Unkept,
    UnkeptServer,
)
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple
from natkeep.plan.via import count_ports, rename
from natkeep.values import replace


def find_unkept_servers(move: Move) -> tuple[UnkeptServer, ...]:
    """Those of its UDP sockets without a peer that the move cannot keep."""
    reason = move.why_no_udp(server=True)
    return tuple(UnkeptServer(end, reason) for end in move.udp_servers if reason)


def make_translations(
    move: Move,
    connections: Connections,
    surroundings: Surroundings = NOTHING_SPECIAL,
    change: Change | None = None,
) -> tuple[tuple[Translation, ...], tuple[Unkept, ...]]:
    """Every translation that *move* needs for *connections*, gateways first; and what is lost.

    With a *change*, the destination, which stands prepared, has translations of what came besides
    the others; sites that waited translate just what the image has.

    RefusedError when no connection has one of the move's OLD addresses (the usual cause is a
    typing error, and an empty translation would look like success), when none of them can be
    kept, or when there are too many.
    """
    since = NO_CONNECTIONS if change is None else change.came
    found, late = move.share(connections), move.share(since)
    ends = _count_ends(move, found)
    inner = find_inner(move, Connections.joined((connections, since)))
    refuse_none_or_too_many(move, len(connections) - len(inner), found, late, inner)
    found, late = ([some.minus(inner) for some in each] for each in (found, late))
    unkept = tuple(_find_unkept(move, found, surroundings))
    unkept_late = () if change is None else tuple(_find_unkept(move, late, change.surroundings))
    kept = [_without(some, unkept) for some in found]
    came = [_without(some, unkept_late) for some in late]
    datagrams, unkept_datagrams = _keep_datagrams(move, surroundings)
    _refuse_all_unkept(move, (*unkept, *unkept_datagrams), (*kept, inner, *datagrams), found)
    both = [Connections.joined(pair) for pair in zip(kept, came, strict=True)]
    refuse_peer_maps(move, connections, surroundings)
    refuse_one_tuple_for_two(move, both)
    refuse_one_tuple_for_two(move, datagrams)
    sent = _count_ends(move, move.share(move.udp))
    translations: list[Translation] = []
    for site in move.ordered_sites():
        around, there = surroundings, kept
        if change is not None and move.waits(site):
            around, there = change.surroundings, [some.minus(change.went) for some in both]
        prepared = _translate_at(move, site, there, around, ends)
        prepared += _translate_at(move, site, datagrams, around, sent, len(prepared), UDP)
        translations += prepared
        if change is not None and not move.waits(site):
            translations += _translate_at(move, site, came, change.surroundings, {}, len(prepared))
    _refuse_what_the_mode_cannot(move, translations)
    refuse_idle_sites(move, {t.site for t in translations} if change is None else move.sites)
    return tuple(translations), (*unkept, *unkept_late, *unkept_datagrams)


def _keep_datagrams(
    move: Move, surroundings: Surroundings
) -> tuple[list[Connections], tuple[Unkept, ...]]:
    """What is kept of UDP of each map, of what is connected; and what is not."""
    if not len(move.udp):
        return [NO_CONNECTIONS for _ in move.maps], ()
    inner = find_inner_datagrams(move)
    found = [some.minus(inner) for some in move.share(move.udp)]
    if reason := move.why_no_udp():
        unkept = tuple(Unkept(one, reason, UDP) for some in found for one in some)
        return [NO_CONNECTIONS for _ in move.maps], unkept
    unkept = tuple(_find_unkept(move, found, surroundings, UDP))
    return [_without(some, unkept) for some in found], unkept


def find_inner_datagrams(move: Move) -> Connections:
    """As find_inner, of UDP: their peers may be the process' servers, too."""
    both = find_inner(move, move.udp)
    olds, ends = {map_.old for map_ in move.maps}, {*move.udp_servers}
    if not ends or not move.udp.may_have_peer({old.packed for old in olds}):
        return both
    with_servers = Connections.of(one for one in move.udp if one.source in ends)
    return Connections.joined((both, with_servers.minus(both)))


def _refuse_all_unkept(
    move: Move,
    unkept: tuple[Unkept, ...],
    kept: Iterable[Connections],
    found: Iterable[Connections],
) -> None:
    """RefusedError where nothing of what was *found* is kept, and the user wants nothing else."""
    servers = find_unkept_servers(move)
    lost = (*unkept, *servers)
    if any(len(some) for some in kept) or move.kept_servers or not lost:
        return
    if move.unkept == Fate.REPORT and not move.listeners:
        count = sum(map(len, (*found, move.lost, move.udp))) + len(servers)
        raise RefusedError(str(lost[0]), hint=f"{count} in all")


def _count_ends(move: Move, found: list[Connections]) -> dict[bytes, bytes]:
    """What a relay has in the place of each peer; of all: what one machine cannot keep counts."""
    news = [map_.new_end for map_ in move.maps]
    return count_ports(move.vias, zip(news, found, strict=True)) if move.vias else {}


def find_inner(move: Move, connections: Connections) -> Connections:
    """Those of the process with itself: both ends are among *connections*, each at an OLD or lo's.

    Both ends move, so nothing has to be translated: no packet of theirs leaves the host.
    """
    olds = {map_.old for map_ in move.maps}
    # As a rule no peer has such an address, which is found out without a look at each.
    if not (
        connections.may_have_peer({old.packed for old in olds}) or connections.has_special_peer()
    ):
        return NO_CONNECTIONS
    both = connections.only(frozenset(connections.turned().each()))
    return Connections.of(
        inbound
        for inbound in both
        if all(
            end.address in olds or end.address.is_loopback
            for end in (inbound.source, inbound.destination)
        )
    )


def _refuse_what_the_mode_cannot(move: Move, translations: list[Translation]) -> None:
    for translation in translations:
        if move.mode == Mode.STATELESS and translation.renames:
            outer, inner = next(translation.tuples())
            raise RefusedError(
                f"{translation.site} translates already: {outer} is {inner} inside; that is "
                "conntrack's work, which mode stateless does without",
                hint="--mode stateful takes such connections over",
            )


def _find_unkept(
    move: Move, found: list[Connections], around: Surroundings, protocol: Protocol = TCP
) -> Iterator[Unkept]:
    for inbound, reason in _find_reasons(move, found, around.of(protocol)):
        yield Unkept(inbound, reason, protocol)


def _find_reasons(
    move: Move, found: list[Connections], surroundings: Surroundings
) -> Iterator[tuple[FourTuple, str]]:
    olds, beside = {map_.old for map_ in move.maps}, surroundings.beside
    suspects = {address.packed for address in olds | beside}
    refused = _find_refused(surroundings.noted)
    carried = frozenset(surroundings.carried) if beside else frozenset()  # a masqueraded peer's
    for some in found:
        # Only a peer at such an address, or at none that a wire carries, is looked at closer.
        if not (refused or some.may_have_peer(suspects) or some.has_special_peer()):
            continue
        for inbound in some:
            peer = inbound.source.address
            if inbound in refused:
                yield inbound, refused[inbound]
            elif peer in olds:
                yield inbound, f"its peer {peer} is on the source host too"
            elif peer.is_loopback or peer.is_unspecified or peer.is_multicast:
                yield inbound, f"its peer {peer} is not on any wire"
            elif peer.is_link_local:
                yield inbound, f"its peer {peer} is link-local: no gateway passes it on"
            elif peer in beside and move.vias:
                yield inbound, f"its peer {peer} is on the relay itself"
            elif peer in beside and inbound not in carried:
                why = "on the gateway itself, which mode stateless does not translate for"
                yield inbound, f"its peer {peer} is {why}; mode stateful keeps it"


def _find_refused(noted: tuple[Noted, ...]) -> dict[FourTuple, str]:
    """Those whose entry could not be made anew as it is, and why."""
    reasons = ((one, one.attributes.refusal()) for one in noted)
    return {
        inbound: f"{one.site}: {reason}"
        for one, reason in reasons
        if reason
        for inbound in one.connections
    }


def _without(some: Connections, unkept: tuple[Unkept, ...]) -> Connections:
    return some.minus(Connections.of(entry.inbound for entry in unkept)) if unkept else some


def _translate_at(
    move: Move,
    site: Site,
    kept: list[Connections],
    around: Surroundings,
    ends: dict[bytes, bytes],
    number: int = 0,
    protocol: Protocol = TCP,
) -> list[Translation]:
    """The translations of each map's connections at *site*, numbered from *number*."""
    here: list[Translation] = []
    around = around.of(protocol)
    for map_, some in zip(move.maps, kept, strict=True):
        here += _translate_map(move, site, number + len(here), map_, some, around, ends)
    return here if protocol is TCP else [replace(one, protocol=protocol) for one in here]


def _translate_map(
    move: Move,
    site: Site,
    number: int,
    map_: Map,
    kept: Connections,
    surroundings: Surroundings,
    ends: dict[bytes, bytes],
) -> Iterator[Translation]:
    """The translations of one map at one site, numbered from *number*; *kept* are at its OLD.

    ends: what a relay has on the wire in the place of each peer.
    """
    kept = _passing(site, kept, surroundings)
    if not len(kept):
        return
    mode, noted = move.mode, tuple(one for one in surroundings.noted if one.site == site)
    if not site.row.leaves:
        yield Translation(site, number, map_, mode, kept, kept, kept, noted)
        return
    outer = move.on_wire(kept)
    wire = (rename(kept, ends) if ends else outer).toward(map_.new_end)
    if site.row.arrives == "new":
        yield Translation(site, number, map_, mode, kept, wire, kept, noted)
        return
    if site.row.relays:
        yield Translation(site, number, map_, mode, kept, outer, wire, noted)
        return
    groups = _group_carried(kept, surroundings)
    carried = {inbound for pairs in groups for inbound, _ in pairs}
    plain = Connections.of(i for i in kept if i not in carried) if carried else kept
    if len(plain):
        outer = move.on_wire(plain)
        inner = outer.toward(map_.new_end)
        yield Translation(site, number, map_, mode, plain, outer, inner, noted)
        number += 1
    for pairs in groups:
        own = Connections.of(inbound for inbound, _ in pairs)
        outer = Connections.of(outer for _, outer in pairs)
        inner = own.toward(map_.new_end)
        yield Translation(site, number, map_, mode, own, outer, inner, noted)
        number += 1


def _passing(site: Site, kept: Connections, surroundings: Surroundings) -> Connections:
    """Those of *kept* that *site* translates; what a peer's host does no gateway has to."""
    own = site.row.own
    if not (site.row.passes_on and surroundings.at_peers):
        return kept
    some = (here for at, here in surroundings.at_peers if at == site or not own)
    return kept.with_peers({one.packed for here in some for one in here}, without=not own)


def _group_carried(
    kept: Connections, surroundings: Surroundings
) -> list[list[tuple[FourTuple, FourTuple]]]:
    """Carried ones of *kept*, grouped so that each group has one local end on each side."""
    groups: dict[tuple[Endpoint, Endpoint], list[tuple[FourTuple, FourTuple]]] = {}
    wanted = frozenset(kept) if len(surroundings.carried) else frozenset()
    for inner, outer in zip(surroundings.carried, surroundings.carriers, strict=True):
        if inner in wanted:
            ends = (outer.destination, inner.destination)
            groups.setdefault(ends, []).append((inner, outer))
    return [groups[ends] for ends in sorted(groups)]
