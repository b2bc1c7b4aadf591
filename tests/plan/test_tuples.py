"""plan/tuples.py: endpoints and four-tuples as people write them, and connections packed."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple, parse_address

PORTS = st.integers(1, 65535)
LOCALS4 = st.sampled_from([IPv4Address("10.2.0.10"), IPv4Address("10.2.0.11")])
LOCALS6 = st.sampled_from([IPv6Address("fd00:2::10"), IPv6Address("fd00:2::1000")])


def inbound_tuples() -> st.SearchStrategy[FourTuple]:
    """From any peer to one of a few local addresses, either family."""

    def of(peers: st.SearchStrategy[Address], locals_: st.SearchStrategy[Address]):
        return st.builds(
            FourTuple, st.builds(Endpoint, peers, PORTS), st.builds(Endpoint, locals_, PORTS)
        )

    return of(st.builds(IPv4Address, st.integers(0, 2**32 - 1)), LOCALS4) | of(
        st.builds(IPv6Address, st.integers(0, 2**128 - 1)), LOCALS6
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.2.0.10", IPv4Address("10.2.0.10")),
        ("fd00:2::10", IPv6Address("fd00:2::10")),
        ("FD00:2:0::0010", IPv6Address("fd00:2::10")),
        ("::ffff:10.2.0.10", IPv4Address("10.2.0.10")),
        ("::ffff:a02:a", IPv4Address("10.2.0.10")),
    ],
)
def test_an_address_is_what_is_on_the_wire(text: str, expected: Address) -> None:
    assert expected == parse_address(text)


@pytest.mark.parametrize(
    "text",
    ["", "10.2.0", "10.2.0.010", "10.2.0.10/32", " 10.2.0.10", "fe80::1%eth0", "host", "fd00:::1"],
)
def test_what_is_no_address_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "address", "port"),
    [
        ("10.2.0.10:80", "10.2.0.10", 80),
        ("10.2.0.10:1", "10.2.0.10", 1),
        ("10.2.0.10:65535", "10.2.0.10", 65535),
        ("[fd00:2::10]:80", "fd00:2::10", 80),
        ("[::ffff:10.2.0.10]:80", "10.2.0.10", 80),
    ],
)
def test_an_endpoint_is_parsed(text: str, address: str, port: int) -> None:
    assert Endpoint(ip_address(address), port) == Endpoint.parse(text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("10.2.0.10", "no port"),
        ("fd00:2::10:80", "write IPv6 as"),
        ("[fd00:2::10]", "write IPv6 as"),
        ("10.2.0.10:", "not a port"),
        ("10.2.0.10:0", "not a port"),
        ("10.2.0.10:65536", "not a port"),
        ("10.2.0.10:-1", "not a port"),
        ("10.2.0.10:+1", "not a port"),
        ("10.2.0.10:٣", "not a port"),
        ("10.2.0.10:http", "not a port"),
        (":80", "does not appear"),
        ("[fe80::1%lo]:80", "zone"),
    ],
)
def test_a_bad_endpoint_says_why(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Endpoint.parse(text)


@settings(max_examples=50)
@given(inbound_tuples())
def test_an_endpoint_is_parsed_from_what_it_prints(tuple_: FourTuple) -> None:
    endpoint = tuple_.destination

    assert endpoint == Endpoint.parse(str(endpoint))


@settings(max_examples=50)
@given(inbound_tuples())
def test_the_reply_of_the_reply_is_the_tuple_itself(tuple_: FourTuple) -> None:
    reply = tuple_.reply()

    assert tuple_ == reply.reply()
    assert (tuple_.source, tuple_.destination) == (reply.destination, reply.source)


def test_a_tuple_prints_with_its_direction() -> None:
    tuple_ = FourTuple(Endpoint.parse("10.1.0.2:5000"), Endpoint.parse("10.2.0.10:80"))

    assert str(tuple_) == "10.1.0.2:5000 > 10.2.0.10:80"


def test_the_ends_of_a_tuple_are_of_one_family() -> None:
    with pytest.raises(ValueError, match="different families"):
        FourTuple(Endpoint.parse("10.1.0.2:5000"), Endpoint.parse("[fd00:2::10]:80"))


@settings(max_examples=50)
@given(st.lists(inbound_tuples(), max_size=8))
def test_packed_connections_give_back_what_was_packed(tuples: list[FourTuple]) -> None:
    packed = Connections.of(tuples)

    assert list(packed) == sorted(tuples, key=lambda t: t.source.address.version)
    assert len(packed) == len(tuples)


@settings(max_examples=50, deadline=None)
@given(st.lists(inbound_tuples(), max_size=8))
def test_the_other_end_sees_each_connection_the_other_way_round(tuples: list[FourTuple]) -> None:
    packed = Connections.of(tuples)

    assert [tuple_.reply() for tuple_ in packed] == list(packed.turned())


@settings(max_examples=50)
@given(st.lists(inbound_tuples(), max_size=8), LOCALS4 | LOCALS6)
def test_at_keeps_those_of_one_local_address_in_their_order(
    tuples: list[FourTuple], local: Address
) -> None:
    expected = [tuple_ for tuple_ in tuples if tuple_.destination.address == local]

    assert expected == list(Connections.of(tuples).at(local))


@settings(max_examples=50)
@given(st.lists(inbound_tuples(), max_size=8), LOCALS4 | LOCALS6)
def test_toward_changes_the_local_address_and_nothing_else(
    tuples: list[FourTuple], local: Address
) -> None:
    expected = [
        FourTuple(tuple_.source, Endpoint(local, tuple_.destination.port))
        for tuple_ in tuples
        if tuple_.source.address.version == local.version
    ]

    assert expected == list(Connections.of(tuples).toward(local))


@settings(max_examples=50)
@given(st.lists(inbound_tuples(), min_size=1, max_size=8), st.data())
def test_pick_takes_those_at_the_indexes(tuples: list[FourTuple], data: st.DataObject) -> None:
    version = tuples[0].source.address.version
    those = [tuple_ for tuple_ in tuples if tuple_.source.address.version == version]
    indexes = data.draw(st.lists(st.integers(0, len(those) - 1), max_size=4))

    picked = Connections.of(tuples).pick(indexes, version)

    assert [those[index] for index in indexes] == list(picked)


def test_at_compares_whole_addresses_and_not_their_octets() -> None:
    """Each octet of 10.2.0.10 occurs in its column, but never all of them in one record."""
    tuples = [
        FourTuple(Endpoint.parse("10.1.0.2:5000"), Endpoint.parse(f"{local}:80"))
        for local in ("10.2.0.11", "11.2.0.10", "10.3.0.10", "10.2.1.10")
    ]

    assert list(Connections.of(tuples).at(IPv4Address("10.2.0.10"))) == []


def test_a_record_is_local_then_peer_in_network_order() -> None:
    packed = Connections.of([FourTuple(Endpoint.parse("1.2.3.4:258"), Endpoint.parse("5.6.7.8:9"))])

    assert packed == Connections(v4=bytes.fromhex("05060708 0009 01020304 0102"))


@pytest.mark.parametrize(("v4", "v6"), [(11, 0), (13, 0), (0, 35), (0, 12)])
def test_a_record_cut_short_is_refused(v4: int, v6: int) -> None:
    with pytest.raises(ValueError, match="middle of a record"):
        Connections(bytes(v4), bytes(v6))


def test_no_connections_are_false_and_empty() -> None:
    assert (len(Connections()), list(Connections())) == (0, [])


@settings(max_examples=50)
@given(st.lists(inbound_tuples(), max_size=6))
def test_peers_and_local_ends_are_those_of_the_four_tuples(inbound: list[FourTuple]) -> None:
    connections = Connections.of(inbound)

    def packed(end: Endpoint) -> bytes:
        return end.address.packed + end.port.to_bytes(2, "big")

    assert {t.source.address.packed for t in inbound} == connections.peers()
    assert {packed(t.destination) for t in inbound} == connections.local_ends()
    assert all(connections.may_have_peer([peer]) for peer in connections.peers())
    assert [packed(t.destination) + packed(t.source) for t in connections] == [*connections.each()]


def test_a_local_address_is_no_peer() -> None:
    """It stands in every record, and must not make each of them be looked at."""
    connections = Connections.of(
        FourTuple(Endpoint.parse(f"10.1.0.2:{port}"), Endpoint.parse("10.2.0.10:80"))
        for port in (5000, 5001)
    )

    assert connections.may_have_peer([ip_address("10.1.0.2").packed])
    assert not connections.may_have_peer([ip_address("10.2.0.10").packed])
    assert not connections.may_have_peer([ip_address("fd00::1").packed])


def test_packed_records_are_the_connections_that_they_say() -> None:
    kept = Connections.of([FourTuple(Endpoint.parse("[::1]:9"), Endpoint.parse("[::2]:80"))])

    assert kept == Connections.packed(kept.v6, 6)
