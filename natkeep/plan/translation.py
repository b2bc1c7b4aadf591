"""the consequence: which address is which on either side of each site, for which connections.

Rule: what cannot be translated is refused here, or named with its reason; a translation needs no
further check. Nothing here knows how one is carried out (that is ruleset.py and entries.py).

Size: over 400 lines, because what a translation is made of stands beside it.

Theory of operation. The process and its peers keep their four-tuples for ever. Between the
gateway and the destination the wire shows NEW instead of OLD:

    peer ── OLD ── gateway ── NEW ── destination ── OLD ── process

So the gateway turns OLD into NEW and the destination NEW into OLD, each for packets that come
from a peer, and each the reverse for packets that go to one. The direction *peer to process*
is always the original one, whichever end dialled: so it is always DNAT at prerouting.

A peer that has moved from P to Q (`--peer-map P=Q`) is at Q on every wire of the move, and only
the destination turns Q into P. So both ends of a connection move at once, without a gateway:

    process ── OLD, P ── destination ── NEW, Q ── destination of the peer ── OLD, P ── peer

A relay receives what peers send to OLD, and passes it on as from an address and a port of its own
for each connection (via.py), which the destination turns into the peer again:

    peer ── OLD ── relay ── NEW, FROM:q ── destination ── OLD, peer ── process
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from functools import lru_cache

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
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, Endpoint, FourTuple
from natkeep.plan.via import count_ports, rename
from natkeep.values import dataclass, replace


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What make_plan has to know of the sites; observed by kernel/, kept in the journal.

    local: peers' addresses that are local to the destination: they reach OLD through its lo.
    carried: connections that a gateway translates already, as the process sees them, and
    carriers: the same ones, in the same order, as their peers see them (a published port: the
    local address is the one that was published; a masqueraded client: its own address).
    joined: connections whose peers were moved to the destination before, by moves of their own.
    beside: in mode stateless, peers' addresses that are local to a gateway.
    noted: what the entries say that the sites have of the connections, where it is not the usual.
    home: OLD addresses that the destination has had before any move. forwards: it is a router.
    udp_carried, udp_carriers, udp_joined: as carried, carriers and joined, of UDP.
    masqueraded: of the UDP sockets without a peer those whose first datagrams a gateway sends from
    another address, or port.
    at_peers: of each site of role peer the peers' addresses that it has.
    forwarding: settings that a relay switches on to pass on what is kept, below /proc/sys/net/.
    """

    local: frozenset[Address] = frozenset()
    carried: Connections = NO_CONNECTIONS
    carriers: Connections = NO_CONNECTIONS
    joined: Connections = NO_CONNECTIONS
    noted: tuple[Noted, ...] = ()
    beside: frozenset[Address] = frozenset()
    home: frozenset[Address] = frozenset()
    forwards: bool = False
    at_peers: tuple[tuple[Site, frozenset[Address]], ...] = ()
    forwarding: tuple[str, ...] = ()
    udp_carried: Connections = NO_CONNECTIONS
    udp_carriers: Connections = NO_CONNECTIONS
    udp_joined: Connections = NO_CONNECTIONS
    masqueraded: frozenset[Endpoint] = frozenset()

    def carry_on(self, earlier: Surroundings, connections: Connections) -> Surroundings:
        """With those of *connections* that an *earlier* move, now replaced, took over itself.

        Its own translation hides from a look at the gateway what the gateway did before.
        """
        wanted = set(connections) if len(earlier.carried) else set()
        pairs = zip(earlier.carried, earlier.carriers, strict=True)
        taken = {inner: outer for inner, outer in pairs if inner in wanted}
        taken |= dict(zip(self.carried, self.carriers, strict=True))
        return replace(
            self,
            carried=Connections.of(taken),
            carriers=Connections.of(taken.values()),
            noted=(*self.noted, *self._find_gone(earlier.noted, connections)),
        )

    def of_udp(self) -> Surroundings:
        """The same with what is so of UDP, and nothing noted."""
        carried, carriers, joined = self.udp_carried, self.udp_carriers, self.udp_joined
        return replace(self, carried=carried, carriers=carriers, joined=joined, noted=())

    def with_udp(self, seen: Surroundings) -> Surroundings:
        """With what *seen*, made of what `of_udp` gave, says of UDP."""
        return replace(
            self,
            udp_carried=seen.carried,
            udp_carriers=seen.carriers,
            udp_joined=seen.joined,
        )

    def _find_gone(self, earlier: tuple[Noted, ...], connections: Connections) -> Iterator[Noted]:
        """What an *earlier* move noted of entries that are not there any more."""
        known = {one.site: set[bytes]() for one in earlier}
        for one in self.noted:
            known.get(one.site, set()).update(one.connections.each())
        wanted = set(connections.each()) if earlier else set()
        for one in earlier:
            left = one.connections.only(wanted - known[one.site])
            if len(left):
                yield replace(one, connections=left)


NOTHING_SPECIAL = Surroundings()
"""No peer is at the destination, and no gateway translates yet."""


@dataclass(frozen=True, slots=True)
class Change:
    """How the connections of an image differ from those that a live process had at prepare.

    came: connections that the move was not prepared for; went: those that it was, and that the
    image does not have. surroundings: as seen when they were compared.
    """

    came: Connections = NO_CONNECTIONS
    went: Connections = NO_CONNECTIONS
    surroundings: Surroundings = NOTHING_SPECIAL


@dataclass(frozen=True, slots=True)
class Compared:
    """How many connections the image has that were not prepared, and the other way round.

    unkept: in words, those that came and cannot be kept.
    """

    came: int
    went: int
    unkept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Translation:
    """At *site*, packets of *outer* leave as *inner*; replies the other way round.

    Three views of the same connections, in the same order: *kept* as the process sees them,
    *outer* as packets from the peer arrive at the site, *inner* as they leave it. All have one
    local address each; local ports differ only where a gateway published another one, or by the
    map, and then are one on each side; peers differ where a gateway masquerades them, or they have
    moved. Where nothing but the local address differs, one of *outer* and *inner* is *kept* itself.
    number: part of the names of the sets; unique at a site. noted: what entries say here.
    protocol: whose connections they are; a translation has those of one.
    """

    site: Site
    number: int
    map: Map
    mode: Mode
    kept: Connections
    outer: Connections
    inner: Connections
    noted: tuple[Noted, ...] = ()
    protocol: Protocol = TCP

    @property
    def before(self) -> Address:
        """Where a peer's packet is addressed when it reaches the site."""
        packed = self.outer.v4[:4] or self.outer.v6[:16]
        for known in (self.map.old, self.map.new):
            if known.packed == packed:
                return known
        return ipaddress.ip_address(packed)  # a port that a gateway publishes

    @property
    def after(self) -> Address:
        """Where a peer's packet is addressed when it leaves the site."""
        return self.map.new if self.site.row.leaves == "new" else self.map.old

    @property
    def renames(self) -> bool:
        """Whether peers or ports change too, not the local address alone."""
        if self.site.row.relays:
            return True
        if self.outer is self.kept:  # the usual gateway, without a look
            return self.inner is not self.kept and self.map.turns_ports
        return _differ(self.outer, self.inner, self.after)

    @property
    def routed(self) -> Connections:
        """The connections between the site's prerouting, which translated, and postrouting."""
        if not self.renames:
            return self.inner
        ports = self.ports()
        return self.outer.toward(self.after if ports is None else Endpoint(self.after, ports[1]))

    @property
    def masks(self) -> bool:
        """Whether peers change too: the process knows them by another address, or port."""
        return self.renames and self.routed != self.inner

    @property
    def carries(self) -> bool:
        """Whether the site is a gateway that translated before any move."""
        if not self.site.row.passes_on or self.site.row.relays or self.outer is self.kept:
            return False
        return self.outer != self.inner.toward(self.map.old_end)

    @property
    def wire(self) -> Connections:
        """What passes between this site and NEW's host, or arrives there."""
        return self.outer if self.site.row.puts_old else self.inner

    def ports(self) -> tuple[int, int] | None:
        """The one local port outside, and that inside, where it is another."""
        outer, inner = next(iter(self.outer)), next(iter(self.inner))
        outside, inside = outer.destination.port, inner.destination.port
        return None if outside == inside else (outside, inside)

    @property
    def turns_peers(self) -> bool:
        """Whether it does so at the destination, where the peers have moved."""
        return self.site.row.puts_old and self.masks

    def tuples(self) -> Iterator[tuple[FourTuple, FourTuple]]:
        """For each kept connection its tuple (peer to process) before and after the site."""
        return zip(self.outer, self.inner, strict=True)


@lru_cache(maxsize=4)  # asked for each line that is rendered, of one translation after the other
def _differ(outer: Connections, inner: Connections, after: Address) -> bool:
    return outer.toward(after) != inner


@dataclass(frozen=True, slots=True)
class Unkept:
    """A connection of the move that cannot be kept, and why."""

    inbound: FourTuple
    reason: str
    protocol: Protocol = TCP

    def __str__(self) -> str:
        return f"{self.inbound}: {self.reason}"


@dataclass(frozen=True, slots=True)
class UnkeptServer:
    """A UDP socket of the move that any peer may speak to, and that cannot be kept; and why."""

    local: Endpoint
    reason: str

    def __str__(self) -> str:
        return f"{self.local}: {self.reason}"


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
    found = move.share(connections)
    ends = _count_ends(move, found)
    late = move.share(change.came) if change is not None else []
    inner = find_inner(move, connections if change is None else _join(connections, change.came))
    refuse_none_or_too_many(move, len(connections) - len(inner), found, late, inner)
    found, late = ([some.minus(inner) for some in each] for each in (found, late))
    unkept = tuple(_find_unkept(move, found, surroundings))
    unkept_late = () if change is None else tuple(_find_unkept(move, late, change.surroundings))
    kept = [_without(some, unkept) for some in found]
    came = [_without(some, unkept_late) for some in late]
    datagrams, unkept_datagrams = _keep_datagrams(move, surroundings)
    _refuse_all_unkept(move, (*unkept, *unkept_datagrams), (*kept, inner, *datagrams), found)
    both = [_join(*pair) for pair in zip(kept, came, strict=True)] if came else kept
    refuse_peer_maps(move, connections, surroundings.local, surroundings.carried)
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
    return _join(both, Connections.of(one for one in move.udp if one.source in ends).minus(both))


def _refuse_all_unkept(
    move: Move,
    unkept: tuple[Unkept, ...],
    kept: Iterable[Connections],
    found: Iterable[Connections],
) -> None:
    """RefusedError where nothing of what was *found* is kept, and the user wants nothing else."""
    servers = find_unkept_servers(move)
    lost = (*unkept, *servers)
    if any(len(some) for some in kept) or len(servers) < len(move.udp_servers) or not lost:
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


def _join(one: Connections, other: Connections) -> Connections:
    return Connections(one.v4 + other.v4, one.v6 + other.v6)


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
    surroundings = around if protocol is TCP else around.of_udp()
    for inbound, reason in _find_reasons(move, found, surroundings):
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
    if protocol is not TCP:
        around = around.of_udp()
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
