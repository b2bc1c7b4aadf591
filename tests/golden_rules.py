"""the moves that tests/plan/golden has the rules of, by the names of its files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from ipaddress import ip_address

from natkeep.plan.move import Fate, Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan
from natkeep.plan.translation import NOTHING_SPECIAL, Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple
from natkeep.plan.via import Via, parse_via

MAP4 = Map(ip_address("10.2.0.10"), ip_address("10.3.0.20"))
MAP6 = Map(ip_address("fd00:2::10"), ip_address("fd00:3::20"))
KEPT = Connections.of(
    FourTuple(Endpoint.parse(peer), Endpoint.parse(local))
    for peer, local in (
        ("10.1.0.2:50594", "10.2.0.10:80"),
        ("10.1.0.3:50595", "10.2.0.10:443"),
        ("[fd00:1::2]:50594", "[fd00:2::10]:80"),
    )
)
FIRST = Connections.of([*KEPT][:1])
BOTH = (MAP4, MAP6)
MOVED = (
    Map(ip_address("10.1.0.2"), ip_address("10.4.0.30")),
    Map(ip_address("fd00:1::2"), ip_address("fd00:4::30")),
)
VIAS = (parse_via("10.2.0.11"), parse_via("[fd00:2::11]:20000-20999"))
FORWARDING = ("ipv4/conf/eth0/forwarding", "ipv6/conf/eth0/force_forwarding")
LISTENERS = tuple(
    Endpoint.parse(text) for text in ("10.2.0.10:80", "10.2.0.10:443", "[fd00:2::10]:80")
)
LOST = Connections.of(
    FourTuple(Endpoint.parse(peer), Endpoint.parse(local))
    for peer, local in (
        ("10.1.0.2:50596", "10.2.0.10:80"),
        ("10.2.0.10:50597", "10.2.0.10:80"),
        ("[fd00:1::2]:50598", "[fd00:2::10]:80"),
    )
)
# What a gateway found that published 8080 for the process' port 80.
PUBLISHED = Surroundings(
    carried=Connections.of([*KEPT][:1]),
    carriers=Connections.of(
        [FourTuple(Endpoint.parse("10.1.0.2:50594"), Endpoint.parse("10.9.0.1:8080"))]
    ),
)
# What a peers' own host has of their addresses.
AT_PEER = Surroundings(
    at_peers=((Site(Role.PEER), frozenset(map(ip_address, ("10.1.0.2", "fd00:1::2")))),)
)
# What one found that masquerades the peer; and one that does both.
MASQUERADED = Connections.of(
    [FourTuple(Endpoint.parse("10.2.0.1:20001"), Endpoint.parse("10.2.0.10:80"))]
)
MASKED, MASKED_PUBLISHED = (
    Surroundings(
        carried=MASQUERADED,
        carriers=Connections.of(
            [FourTuple(Endpoint.parse("10.1.0.2:50594"), Endpoint.parse(published))]
        ),
    )
    for published in ("10.2.0.10:80", "10.9.0.1:8080")
)


@dataclass(frozen=True)
class Case:
    """What a golden file is rendered from."""

    role: Role
    maps: tuple[Map, ...] = (MAP4,)
    opened: bool = False
    mode: Mode = Mode.STATEFUL
    surroundings: Surroundings = NOTHING_SPECIAL
    listeners: tuple[Endpoint, ...] = ()
    lost: Connections | None = None
    kept: Connections = KEPT
    peer_maps: tuple[Map, ...] = ()
    vias: tuple[Via, ...] = ()
    udp: Connections = NO_CONNECTIONS
    servers: tuple[Endpoint, ...] = ()

    def plan(self) -> Plan:
        """What such a move does."""
        site = (Site(self.role),)
        move = Move("web", self.maps, site, self.mode, self.listeners, vias=self.vias)
        move = replace(move, peer_maps=self.peer_maps, udp=self.udp, udp_servers=self.servers)
        if self.lost is not None:
            move = replace(move, unkept=Fate.RESET, lost=self.lost)
        return make_plan(move, self.kept, self.surroundings)


CASES = {
    "destination-v4": Case(Role.DESTINATION),
    "destination-v4-open": Case(Role.DESTINATION, opened=True),
    "destination-two-maps": Case(Role.DESTINATION, BOTH),
    "destination-stateless-two-maps": Case(Role.DESTINATION, BOTH, mode=Mode.STATELESS),
    "destination-peers-moved": Case(Role.DESTINATION, BOTH, peer_maps=MOVED),
    "gateway-peers-moved": Case(Role.GATEWAY, BOTH, peer_maps=MOVED),
    "peer-two-maps": Case(Role.PEER, BOTH, surroundings=AT_PEER),
    "peer-knows-a-service-address": Case(
        Role.PEER, surroundings=replace(PUBLISHED, at_peers=AT_PEER.at_peers)
    ),
    "gateway-v4": Case(Role.GATEWAY),
    "gateway-v4-open": Case(Role.GATEWAY, opened=True),
    "gateway-two-maps": Case(Role.GATEWAY, BOTH),
    "gateway-stateless-two-maps": Case(Role.GATEWAY, BOTH, mode=Mode.STATELESS),
    "gateway-publishes-a-port": Case(Role.GATEWAY, surroundings=PUBLISHED),
    "gateway-masquerades": Case(Role.GATEWAY, surroundings=MASKED, kept=MASQUERADED),
    "gateway-masquerades-and-publishes": Case(
        Role.GATEWAY, surroundings=MASKED_PUBLISHED, kept=MASQUERADED
    ),
    "destination-listeners-open": Case(Role.DESTINATION, opened=True, listeners=LISTENERS),
    "destination-stateless-listeners": Case(
        Role.DESTINATION, BOTH, mode=Mode.STATELESS, listeners=LISTENERS
    ),
    "gateway-listeners-two-maps": Case(Role.GATEWAY, BOTH, listeners=LISTENERS),
    "destination-unkept-open": Case(Role.DESTINATION, BOTH, opened=True, lost=LOST),
    "gateway-unkept-open": Case(Role.GATEWAY, BOTH, opened=True, lost=LOST),
    "relay-two-maps-open": Case(
        Role.RELAY, BOTH, opened=True, vias=VIAS, surroundings=Surroundings(forwarding=FORWARDING)
    ),
    "destination-behind-a-relay": Case(Role.DESTINATION, BOTH, vias=VIAS),
    "gateway-udp": Case(Role.GATEWAY, BOTH, kept=NO_CONNECTIONS, udp=KEPT),
    "gateway-tcp-and-udp": Case(Role.GATEWAY, kept=FIRST, udp=FIRST, opened=True),
    "gateway-masquerades-udp": Case(
        Role.GATEWAY,
        surroundings=Surroundings(
            udp_carried=MASKED_PUBLISHED.carried, udp_carriers=MASKED_PUBLISHED.carriers
        ),
        kept=NO_CONNECTIONS,
        udp=MASQUERADED,
    ),
    "destination-udp": Case(Role.DESTINATION, BOTH, kept=NO_CONNECTIONS, udp=KEPT),
    "destination-udp-peers-moved": Case(
        Role.DESTINATION, kept=NO_CONNECTIONS, udp=FIRST, peer_maps=MOVED[:1]
    ),
    "peer-udp": Case(Role.PEER, surroundings=AT_PEER, kept=NO_CONNECTIONS, udp=FIRST, opened=True),
    "relay-tcp-and-udp": Case(
        Role.RELAY,
        vias=VIAS,
        kept=FIRST,
        udp=KEPT,
        surroundings=Surroundings(forwarding=FORWARDING[:1]),
    ),
    "destination-behind-a-relay-udp": Case(
        Role.DESTINATION, vias=VIAS, kept=NO_CONNECTIONS, udp=KEPT
    ),
    "gateway-udp-servers": Case(
        Role.GATEWAY, BOTH, kept=NO_CONNECTIONS, udp=FIRST, servers=LISTENERS, opened=True
    ),
    "destination-udp-servers": Case(
        Role.DESTINATION, BOTH, kept=NO_CONNECTIONS, listeners=LISTENERS[:1], servers=LISTENERS
    ),
    "peer-udp-servers": Case(
        Role.PEER, surroundings=AT_PEER, kept=FIRST, servers=LISTENERS, opened=True
    ),
    "source-udp-servers": Case(Role.SOURCE, kept=NO_CONNECTIONS, servers=LISTENERS, opened=True),
    "source-udp": Case(Role.SOURCE, kept=NO_CONNECTIONS, udp=FIRST),
    "source-unkept": Case(Role.SOURCE, BOTH, lost=LOST),
    "gateway-stateless-listeners": Case(Role.GATEWAY, mode=Mode.STATELESS, listeners=LISTENERS),
}
