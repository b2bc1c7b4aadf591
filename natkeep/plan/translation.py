"""the consequence: which address is which on either side of each site, for which connections.

Rule: these are values, which kept_connections.py makes of a move and what surrounds it. Nothing
here knows how a translation is carried out (that is ruleset.py and conntrack.py).

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
from collections.abc import Iterator, Sequence
from functools import lru_cache

from natkeep.plan.entry_attributes import Noted
from natkeep.plan.maps import Map
from natkeep.plan.move import Mode, Site
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, Endpoint, FourTuple
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

    def carry_on(
        self, earlier: Surroundings, connections: Connections, udp: Connections = NO_CONNECTIONS
    ) -> Surroundings:
        """With those of *connections* that an *earlier* move, now replaced, took over itself.

        Its own translation hides from a look at the gateway what the gateway did before. udp: what
        is kept of UDP.
        """
        return replace(
            self._take(earlier, connections),
            noted=(*self.noted, *self._find_gone(earlier.noted, connections)),
            masqueraded=self.masqueraded | earlier.masqueraded,
        ).with_udp(self.of(UDP)._take(earlier.of(UDP), udp))

    def _take(self, earlier: Surroundings, connections: Connections) -> Surroundings:
        wanted = set(connections) if len(earlier.carried) else set()
        pairs = zip(earlier.carried, earlier.carriers, strict=True)
        taken = {inner: outer for inner, outer in pairs if inner in wanted}
        taken |= dict(zip(self.carried, self.carriers, strict=True))
        carried, carriers = Connections.of(taken), Connections.of(taken.values())
        return replace(self, carried=carried, carriers=carriers)

    def of(self, protocol: Protocol) -> Surroundings:
        """The same with what is so of *protocol*; of UDP nothing is noted."""
        if protocol == TCP:
            return self
        carried, carriers, joined = self.udp_carried, self.udp_carriers, self.udp_joined
        return replace(self, carried=carried, carriers=carriers, joined=joined, noted=())

    def with_udp(self, seen: Surroundings) -> Surroundings:
        """With what *seen*, made of what `of` gave of UDP, says of it."""
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

    def pick(self, indices: Sequence[int]) -> Translation:
        """The translation of these of its connections only."""
        version = self.map.old.version
        return replace(
            self,
            kept=self.kept.pick(indices, version),
            outer=self.outer.pick(indices, version),
            inner=self.inner.pick(indices, version),
        )

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
