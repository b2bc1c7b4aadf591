"""plan/translation.py and kept_connections.py: which address is which, and what is lost."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natkeep.errors import RefusedError
from natkeep.plan import refusals
from natkeep.plan.entry_attributes import Attributes, Noted
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import InsertEntries
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
MAP4 = Map(ip_address("10.2.0.10"), ip_address("10.3.0.20"))
MAP6 = Map(ip_address("fd00:2::10"), ip_address("fd00:3::20"))
SAME_NEW = Map(ip_address("10.2.0.11"), MAP4.new)


def inbound(peer: str, local: str) -> FourTuple:
    return FourTuple(Endpoint.parse(peer), Endpoint.parse(local))


KEPT4 = inbound("10.1.0.2:5000", "10.2.0.10:80")
KEPT6 = inbound("[fd00:1::2]:5000", "[fd00:2::10]:80")
PEER_GONE = Endpoint.parse("10.1.0.2:5001")


@pytest.mark.parametrize(("map_", "kept"), [(MAP4, KEPT4), (MAP6, KEPT6)], ids=["v4", "v6"])
def test_the_chain_of_translations_ends_at_the_checkpoint(map_: Map, kept: FourTuple) -> None:
    move = Move("web", (map_,), (DESTINATION, GATEWAY))

    gateway, destination = make_plan(move, Connections.of([kept])).translations

    assert (gateway.site, destination.site) == (GATEWAY, DESTINATION)
    assert (map_.old, map_.new) == (gateway.before, gateway.after)
    assert (map_.new, map_.old) == (destination.before, destination.after)
    [(sent, on_the_wire)], [(received, seen)] = list(gateway.tuples()), list(destination.tuples())
    assert kept == sent
    assert on_the_wire == received
    assert kept == seen


ADDRESSES4 = st.integers(0x01000000, 0x7EFFFFFF).map(IPv4Address)
ADDRESSES6 = st.integers(0x2000 << 112, (0x4000 << 112) - 1).map(IPv6Address)
PORTS = st.integers(1, 65535)


@st.composite
def moves(draw: st.DrawFn) -> tuple[Map, list[FourTuple]]:
    addresses = draw(st.sampled_from([ADDRESSES4, ADDRESSES6]))
    old, new = draw(st.lists(addresses, min_size=2, max_size=2, unique=True))
    peers = addresses.filter(lambda address: address != old)  # that one is not on any wire
    local, peer = st.builds(Endpoint, st.just(old), PORTS), st.builds(Endpoint, peers, PORTS)
    kept = draw(st.lists(st.builds(FourTuple, peer, local), min_size=1, max_size=4, unique=True))
    return Map(old, new), kept


@settings(max_examples=60)
@given(moves())
def test_whatever_is_moved_the_process_sees_what_it_saw(wish: tuple[Map, list[FourTuple]]) -> None:
    map_, kept = wish

    plan = make_plan(Move("web", (map_,), (GATEWAY, DESTINATION)), Connections.of(kept))
    gateway, destination = plan.translations

    assert map_.old == gateway.before == destination.after
    assert gateway.after == destination.before
    assert kept == [before for before, _ in gateway.tuples()]
    assert kept == [after for _, after in destination.tuples()]
    for before, after in (*gateway.tuples(), *destination.tuples()):
        assert before.source == after.source
        assert before.destination.port == after.destination.port


def test_each_map_translates_the_connections_of_its_own_old() -> None:
    connections = Connections.of([KEPT6, KEPT4, inbound("10.1.0.2:5000", "10.9.9.9:80")])

    found = make_plan(Move("web", (MAP4, MAP6), (DESTINATION,)), connections).translations

    assert [(t.number, t.map, [*t.kept]) for t in found] == [(0, MAP4, [KEPT4]), (1, MAP6, [KEPT6])]


def test_a_map_without_connections_needs_no_translation() -> None:
    found = make_plan(
        Move("web", (MAP4, MAP6), (DESTINATION,)), Connections.of([KEPT6])
    ).translations

    assert [t.map for t in found] == [MAP6]


def test_an_old_that_no_connection_has_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"none of the 1 connections .* 10\.2\.0\.10"):
        make_plan(Move("web", (MAP4,), (DESTINATION,)), Connections.of([KEPT6]))


def test_more_connections_than_the_limit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "MAX_CONNECTIONS", 1)
    two = Connections.of([KEPT4, inbound("10.1.0.2:5001", "10.2.0.10:80")])

    with pytest.raises(RefusedError, match="2 connections are more than 1"):
        make_plan(Move("web", (MAP4,), (DESTINATION,)), two)


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        ("10.2.0.10", "on the source host too"),
        ("127.0.0.1", "not on any wire"),
        ("0.0.0.0", "not on any wire"),
        ("239.1.2.3", "not on any wire"),
        ("169.254.7.7", "link-local"),
        ("fd00:2::10", "on the source host too"),
        ("::1", "not on any wire"),
        ("fe80::7", "link-local"),
        ("ff02::7", "not on any wire"),
    ],
)
def test_a_peer_that_no_wire_leads_to_is_not_kept_and_named(peer: str, why: str) -> None:
    address = ip_address(peer)
    local = (MAP4 if address.version == 4 else MAP6).old
    lost = FourTuple(Endpoint(address, 5000), Endpoint(local, 80))
    move = Move("web", (MAP4, MAP6), (GATEWAY, DESTINATION))

    plan = make_plan(move, Connections.of([lost, KEPT4, KEPT6]))

    assert [lost] == [unkept.inbound for unkept in plan.unkept]
    assert why in plan.unkept[0].reason
    assert [inbound for t in plan.translations for inbound in t.kept] == [KEPT4, KEPT6] * 2
    with pytest.raises(RefusedError, match=why):
        make_plan(move, Connections.of([lost]))


def test_in_mode_stateless_a_peer_on_the_gateway_is_not_kept_and_named() -> None:
    move = Move("web", (MAP4, MAP6), (GATEWAY, DESTINATION), Mode.STATELESS)
    around = Surroundings(beside=frozenset((KEPT6.source.address,)))

    plan = make_plan(move, Connections.of([KEPT4, KEPT6]), around)

    assert [unkept.inbound for unkept in plan.unkept] == [KEPT6]
    assert [inbound for t in plan.translations for inbound in t.kept] == [KEPT4] * 2
    with pytest.raises(RefusedError, match=r"on the gateway itself.*mode stateful keeps it"):
        make_plan(move, Connections.of([KEPT6]), around)


@pytest.mark.parametrize("peer", ["169.253.0.1", "0.0.0.1", "fec0::1"])
def test_a_peer_that_only_looks_special_is_kept(peer: str) -> None:
    address = ip_address(peer)
    local = (MAP4 if address.version == 4 else MAP6).old
    kept = FourTuple(Endpoint(address, 5000), Endpoint(local, 80))

    plan = make_plan(Move("web", (MAP4, MAP6), (DESTINATION,)), Connections.of([kept]))

    assert ([kept], ()) == ([*plan.translations[0].kept], plan.unkept)


def test_a_port_that_the_gateway_published_is_translated_from_there() -> None:
    """The peer dialled 10.9.0.1:8080, and the gateway has led it to OLD:80 all the time."""
    outside = inbound("10.1.0.2:5000", "10.9.0.1:8080")
    plain = inbound("10.1.0.2:5001", "10.2.0.10:80")
    found = Surroundings(carried=Connections.of([KEPT4]), carriers=Connections.of([outside]))
    move = Move("web", (MAP4,), (GATEWAY, DESTINATION))

    plan = make_plan(move, Connections.of([KEPT4, plain]), found)

    at_new = [inbound("10.1.0.2:5000", "10.3.0.20:80"), inbound("10.1.0.2:5001", "10.3.0.20:80")]
    assert [
        (0, False, [(plain, at_new[1])]),
        (1, True, [(outside, at_new[0])]),
        (0, False, [(at_new[0], KEPT4), (at_new[1], plain)]),
    ] == [(t.number, t.renames, [*t.tuples()]) for t in plan.translations]
    with pytest.raises(RefusedError, match="conntrack's work"):
        make_plan(replace(move, mode=Mode.STATELESS), Connections.of([KEPT4]), found)


def test_a_peer_on_the_destination_gets_no_entries() -> None:
    """Its packets go through lo and are not translated."""
    near = Surroundings(local=frozenset([KEPT4.source.address]))
    far = inbound("10.1.0.3:5000", "10.2.0.10:80")

    plan = make_plan(Move("web", (MAP4,), (DESTINATION,)), Connections.of([KEPT4, far]), near)

    [translation] = plan.translations
    assert [KEPT4, far] == [*translation.kept]
    assert [[far]] == [[*s.translation.kept] for s in plan.steps if isinstance(s, InsertEntries)]


def test_two_olds_may_become_one_new() -> None:
    maps = (MAP4, SAME_NEW)
    connections = Connections.of([KEPT4, inbound("10.1.0.2:5001", "10.2.0.11:80")])

    found = make_plan(Move("web", maps, (DESTINATION,)), connections).translations

    assert [MAP4.new, MAP4.new] == [t.before for t in found]


def test_two_connections_that_would_be_one_tuple_at_new_are_refused() -> None:
    """A peer may use one port to two servers; behind one NEW nobody could tell them apart."""
    maps = (MAP4, SAME_NEW)
    connections = Connections.of([KEPT4, inbound("10.1.0.2:5000", "10.2.0.11:80")])

    with pytest.raises(RefusedError, match=r"10\.1\.0\.2:5000 > 10\.3\.0\.20:80"):
        make_plan(Move("web", maps, (GATEWAY, DESTINATION)), connections)


def test_a_move_carries_on_what_the_one_before_it_took_over():
    """Its own translation hides the gateway's from a look; what has ended is left out."""
    outside, ended = inbound("10.1.0.2:5000", "10.1.0.100:8080"), replace(KEPT4, source=PEER_GONE)
    earlier = Surroundings(
        carried=Connections.of([ended, KEPT4, KEPT6]),
        carriers=Connections.of([ended, outside, KEPT6]),
    )
    found = Surroundings(local=frozenset((KEPT4.source.address,)))

    both = found.carry_on(earlier, Connections.of([KEPT4]))

    assert (tuple(both.carried), tuple(both.carriers)) == ((KEPT4,), (outside,))
    assert both.local == found.local
    assert found == found.carry_on(Surroundings(), Connections.of([KEPT4]))


def test_it_carries_on_udp_too() -> None:
    outside, ended = inbound("10.1.0.2:5000", "10.1.0.100:8080"), replace(KEPT4, source=PEER_GONE)
    server = Endpoint.parse("10.2.0.10:53")
    earlier = Surroundings(
        udp_carried=Connections.of([ended, KEPT4]),
        udp_carriers=Connections.of([ended, outside]),
        masqueraded=frozenset({server}),
    )
    found = Surroundings(udp_joined=Connections.of([KEPT6]))

    both = found.carry_on(earlier, NO_CONNECTIONS, Connections.of([KEPT4]))

    assert (tuple(both.udp_carried), tuple(both.udp_carriers)) == ((KEPT4,), (outside,))
    assert (both.carried, both.udp_joined) == (NO_CONNECTIONS, found.udp_joined)
    assert both.masqueraded == {server}


OTHER4 = inbound("10.1.0.2:5001", "10.2.0.10:80")


def noted(attributes: Attributes, *some: FourTuple) -> Noted:
    return Noted(GATEWAY, attributes, Connections.of(some))


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        (Attributes(secmark="system_u:object_r:http_t"), "has a secmark"),
        (Attributes(zone=7, zone_of="original", process_dialled=True), "in one direction only"),
        (Attributes(synproxy="08000300", process_dialled=True), "shifts its time stamps"),
    ],
)
def test_a_connection_whose_entry_cannot_be_made_anew_is_lost_and_no_other(
    attributes: Attributes, reason: str
) -> None:
    move, both = Move("web", (MAP4,), (GATEWAY,)), Connections.of([KEPT4, OTHER4])
    around = Surroundings(noted=(noted(attributes, KEPT4),))

    plan = make_plan(move, both, around)

    [lost] = plan.unkept
    assert lost.inbound == KEPT4
    assert reason in lost.reason
    assert str(GATEWAY) in lost.reason
    assert [*plan.translations[0].kept] == [OTHER4]
    with pytest.raises(RefusedError, match=reason):
        make_plan(move, Connections.of([KEPT4]), around)


def test_a_move_carries_on_what_entries_said_that_are_gone() -> None:
    red, blue = Attributes(mark=1), Attributes(mark=2)
    earlier = Surroundings(noted=(noted(red, KEPT4, OTHER4, KEPT6),))
    found = Surroundings(noted=(noted(blue, OTHER4),))

    both = found.carry_on(earlier, Connections.of([KEPT4, OTHER4]))

    assert both.noted == (noted(blue, OTHER4), noted(red, KEPT4))
