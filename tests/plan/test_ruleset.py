"""plan/ruleset.py: goldens, compared literally, and a grammar that no input can change.

After a change that is meant: `NATKEEP_GOLDEN=write pytest tests/plan/test_ruleset.py` writes
tests/plan/golden/*.nft anew; read the difference before you commit it. The same files go through
nft's own dry run in tests/kernel/test_golden.py, because a golden text that looks right may
still be no ruleset.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natkeep.errors import UsageError
from natkeep.plan import arp, base_chains
from natkeep.plan.move import Fate, Map, Mode, Move, Site
from natkeep.plan.nft import Chain, Object, Set
from natkeep.plan.plan_text import render_nft
from natkeep.plan.roles import ROLES, Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import FillSet, InstallGate, InstallTranslation, OpenGate, Plan
from natkeep.plan.translation import NOTHING_SPECIAL, Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, Endpoint, FourTuple
from natkeep.plan.via import Via, parse_via

GOLDEN = Path(__file__).parent / "golden"
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

    def render(self) -> str:
        site = (Site(self.role),)
        move = Move("web", self.maps, site, self.mode, self.listeners, vias=self.vias)
        move = replace(move, peer_maps=self.peer_maps, udp=self.udp, udp_servers=self.servers)
        if self.lost is not None:
            move = replace(move, unkept=Fate.RESET, lost=self.lost)
        return render(make_plan(move, self.kept, self.surroundings), opened=self.opened)


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


def render(plan: Plan, *, opened: bool) -> str:
    """The script of the plan's only site."""
    [(_, lines)] = render_nft(plan)
    opening = [line for step in plan.open for line in step.lines()] if opened else []
    return "\n".join((*lines, *opening)) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_the_ruleset_is_the_golden_one(name: str) -> None:
    rendered = CASES[name].render()
    file = GOLDEN / f"{name}.nft"

    if os.environ.get("NATKEEP_GOLDEN") == "write":
        file.write_text(rendered, encoding="ascii")

    assert file.read_text(encoding="ascii") == rendered


def test_every_golden_file_belongs_to_a_case() -> None:
    assert {f"{name}.nft" for name in CASES} == {file.name for file in GOLDEN.iterdir()}


@pytest.mark.parametrize("objects", [base_chains.base_table(), arp.arp_table()])
def test_a_table_that_is_there_already_is_an_error(objects: tuple[Object, ...]) -> None:
    """`create` once, at the top: two that start at the same time must not both succeed."""
    lines = [str(one) for one in objects]

    assert lines[0].startswith("create table ")
    assert not any(line.startswith("create") for line in lines[1:])


def test_only_icmp_is_sent_to_the_rules_of_errors() -> None:
    """There is a pair of them for each move: other people's datagrams would ask them all."""
    lines = [str(one) for one in base_chains.mode_table(Mode.STATELESS)]
    (sent,) = [line for line in lines if line.endswith(f"jump {base_chains.ERRORS}")]

    assert "meta l4proto { icmp, ipv6-icmp } jump" in sent


def test_a_set_is_given_its_size() -> None:
    plan = make_plan(Move("web", (MAP4, MAP6), (Site(Role.GATEWAY),)), KEPT)

    sizes = re.findall(r"kept-web-(\d) .*; size (\d+);", render(plan, opened=False))

    assert sizes == [("0", "2"), ("1", "1")]


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
def test_the_number_of_rules_does_not_depend_on_the_number_of_connections(role: Role) -> None:
    def count(connections: int) -> int:
        kept = Connections.of(
            FourTuple(Endpoint(IPv4Address("10.1.0.2"), port), Endpoint(MAP4.old, 80))
            for port in range(1, connections + 1)
        )
        return len(render(make_plan(Move("web", (MAP4,), (Site(role),)), kept), opened=True))

    rules = [count(n) - n * len("10.1.0.2 . 1 . 80, ") for n in (1, 9)]
    assert rules[0] == rules[1]


def words_of(move_id: str, map_: Map, kept: Connections, mode: Mode) -> str:
    """All that natkeep would ever hand to nft for such a move, less what is always the same."""
    lines: list[str] = []
    for role in (Role.GATEWAY, Role.DESTINATION):
        plan = make_plan(Move(move_id, (map_,), (Site(role),), mode), kept)
        for step in plan.steps:
            if isinstance(step, InstallGate | InstallTranslation | OpenGate):
                lines += step.lines()
                lines += [undo.command(7) for one in step.objects() for undo in one.undo()]
            elif isinstance(step, FillSet):
                lines += step.lines()
    return "\n".join(lines)


_WORD = re.compile(r"[A-Za-z0-9_.:-]*[A-Za-z0-9_.-]|:")


def kept_of(peer: Address, old: Address, peer_port: int, port: int) -> Connections:
    return Connections.of([FourTuple(Endpoint(peer, peer_port), Endpoint(old, port))])


SKELETONS = {
    (map_.old.version, mode): _WORD.sub(
        "W", words_of("web", map_, kept_of(peer, map_.old, 9, 80), mode)
    )
    for map_, peer in ((MAP4, IPv4Address("10.1.0.2")), (MAP6, IPv6Address("fd00:1::2")))
    for mode in Mode
}
IDS = st.text(max_size=8) | st.text("abcz019-_AZt", min_size=1, max_size=34)
_WISH = 52  # octets


def make_wish(words: bytes) -> tuple[Map, Connections]:
    """Anything that fits the addresses and ports of a process, out of any octets."""
    six = words[0] & 1
    make = IPv6Address if six else IPv4Address
    # The first octet makes it unicast; whatever follows is free.
    old, new = (
        make(b"\xfd" + words[i : i + 15]) if six else make(b"\x0a" + words[i : i + 3])
        for i in (1, 16)
    )
    peer = make(b"\xfc" + words[33:48]) if six else make(b"\x0b" + words[33:36])
    ports = (max(1, int.from_bytes(words[i : i + 2], "big")) for i in (48, 50))
    return Map(old, new + 1 if new == old else new), kept_of(peer, old, *ports)


def test_only_characters_of_a_closed_alphabet_are_rendered() -> None:
    for skeleton in SKELETONS.values():
        assert re.fullmatch(r'[W {}@"&|()!=;,\n-]+', skeleton)


@pytest.mark.whole
@settings(max_examples=125)
@given(IDS, st.binary(min_size=16 * _WISH, max_size=16 * _WISH))
def test_whatever_is_given_only_words_change_and_never_the_grammar(
    move_id: str, words: bytes
) -> None:
    """2,000 moves have the same punctuation as a harmless one: nothing can be smuggled in."""
    try:
        Move(move_id, (MAP4,), (Site(Role.GATEWAY),))
    except UsageError:
        assert not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]{0,31}", move_id) or "_" in move_id
        move_id = "x"  # it is refused, so nothing is ever rendered with it
    for start in range(0, len(words), _WISH):
        map_, kept = make_wish(words[start : start + _WISH])
        mode = [*Mode][words[start] >> 1 & 1]

        text = words_of(move_id, map_, kept, mode)

        assert SKELETONS[map_.old.version, mode] == _WORD.sub("W", text)


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("role", Role)
def test_what_all_moves_share_is_known_by_name(mode: Mode, role: Role) -> None:
    """Or the last move would take its own away and leave the table, as another's."""
    peers = role == Role.DESTINATION
    parts = base_chains.translation_tables(ROLES[role], mode, peers=peers)
    names = {one.name for part in parts for one in part if isinstance(one, Chain | Set)}

    assert names <= base_chains.shared_names()
