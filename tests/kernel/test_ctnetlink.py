"""kernel/ctnetlink.py: entries are read as they are packed, and taken apart where they differ."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from natkeep.kernel.ctnetlink import (
    STATUS_BITS,
    TUPLE_ORIG,
    TUPLE_REPLY,
    Ends,
    family,
    pack_inbound,
    pack_itself,
    pack_outbound,
    pack_zone,
    read_flags,
    read_status,
    read_tuples,
    turn,
)
from natkeep.kernel.ctnetlink_answers import Said, read_attributes, read_said
from natkeep.kernel.netlink import attribute, nested
from natkeep.plan.entry_attributes import PLAIN, Attributes
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

PROTOINFO, TIMEOUT, ORIGINAL, REPLY, ID = 4, 7, 9, 10, 12
EACH_FAMILY = pytest.mark.parametrize(
    ("peer", "local"), [("10.1.0.2", "10.2.0.10"), ("fd00:1::2", "fd00:2::10")]
)


def ends_of(peer: str, local: str) -> Ends:
    """Of ports 5000 and 80."""
    return Ends(ip_address(peer).packed, b"\x13\x88", ip_address(local).packed, b"\0\x50")


def tuples_of(ends: Ends) -> bytes:
    """Both tuples of an entry that a peer has begun."""
    return family(4 if len(ends.peer) == 4 else 6) + (
        pack_inbound(ends, TUPLE_ORIG) + pack_outbound(ends, TUPLE_REPLY)
    )


def record_of(peer: str, local: str) -> bytes:
    tuple_ = FourTuple(Endpoint(ip_address(peer), 5000), Endpoint(ip_address(local), 80))
    [record] = Connections.of([tuple_]).each()
    return record


@EACH_FAMILY
@pytest.mark.parametrize("zone", [0, 7, 0x0102])
def test_tuples_are_read_where_they_stand(peer: str, local: str, zone: int) -> None:
    answer = tuples_of(ends_of(peer, local)) + pack_zone(zone) + attribute(STATUS_BITS, bytes(4))
    record = record_of(peer, local)

    assert read_tuples(answer) == (turn(record), record, zone)


@EACH_FAMILY
def test_tuples_in_another_form_are_taken_apart(peer: str, local: str) -> None:
    """As with a zone of the original direction alone, which is a part of its tuple."""
    ends, record = ends_of(peer, local), record_of(peer, local)
    source, destination = (1, 2) if len(ends.peer) == 4 else (3, 4)
    original = nested(
        TUPLE_ORIG,
        nested(1, attribute(source, ends.peer), attribute(destination, ends.local)),
        nested(2, attribute(1, b"\6"), attribute(2, ends.peer_port), attribute(3, ends.local_port)),
        attribute(3, b"\0\7"),
    )
    head = family(4 if len(ends.peer) == 4 else 6)
    other_order = head + pack_outbound(ends, TUPLE_REPLY) + pack_inbound(ends, TUPLE_ORIG)

    assert read_tuples(head + original + pack_outbound(ends, TUPLE_REPLY)) == (
        turn(record), record, 7,
    )  # fmt: skip
    assert read_tuples(other_order) == (turn(record), record, 0)


@EACH_FAMILY
def test_each_header_of_a_tuple_counts(peer: str, local: str) -> None:
    """A value is read from where it stands only if all that is around it is as usual."""
    ends, record = ends_of(peer, local), record_of(peer, local)
    answer = tuples_of(ends)
    number = answer.index(b"\6\0\0\0")

    udp = answer[:number] + b"\x11" + answer[number + 1 :]
    sport = struct.pack("=HH", 6, 2)  # its attribute, twice there is none
    twice = answer.replace(sport, struct.pack("=HH", 6, 3), 1)

    assert read_tuples(udp) == (b"", b"", 0)
    with pytest.raises(KeyError):
        read_tuples(twice)
    assert read_tuples(answer)[1] == record


def pack_said(counted: bool) -> bytes:
    tcp = nested(1, attribute(1, b"\3"), attribute(4, b"\x08\xff"))
    counters = [nested(type_, attribute(1, bytes((0,) * 7 + (type_,)))) for type_ in (9, 10)]
    return (
        tuples_of(ends_of("10.1.0.2", "10.2.0.10"))
        + attribute(STATUS_BITS, (0x20).to_bytes(4, "big"))
        + attribute(TIMEOUT, bytes(4))
        + (b"".join(counters) if counted else b"")
        + nested(PROTOINFO, tcp)
        + attribute(ID, b"\1\2\3\4")
    )


def test_what_an_entry_says_is_read() -> None:
    assert read_said(pack_said(counted=True)) == Said(0x20, 3, ORIGINAL, REPLY)
    assert read_said(pack_said(counted=False)) == Said(0x20, 3, None, None)
    assert read_status(pack_said(counted=True)) == 0x20
    assert read_flags(pack_said(counted=True)) == 8
    plain = tuples_of(ends_of("10.1.0.2", "10.2.0.10")) + attribute(STATUS_BITS, bytes(4))
    assert read_said(plain) == Said(0, 0, None, None)
    assert read_flags(plain) == 0


def test_entries_of_one_length_may_have_their_values_in_other_places() -> None:
    mark, entry = attribute(8, bytes(4)), pack_said(counted=True)
    at = entry.index(attribute(TIMEOUT, bytes(4)))

    for moved in (entry[:at] + mark + entry[at:], entry + mark, entry[:at] + mark + entry[at:]):
        assert read_said(moved) == read_said(entry) == Said(0x20, 3, ORIGINAL, REPLY)


def test_an_entry_is_named_by_its_tuple_its_zone_and_its_number() -> None:
    ends = ends_of("10.1.0.2", "10.2.0.10")
    entry = pack_said(counted=True)

    named = family(4) + pack_inbound(ends) + attribute(ID, b"\1\2\3\4")
    assert pack_itself(entry) == named
    assert pack_itself(entry + pack_zone(7)) == named + pack_zone(7)


def test_the_attributes_of_an_entry_are_read_and_a_usual_one_has_none() -> None:
    entry, ends = pack_said(counted=True), ends_of("10.1.0.2", "10.2.0.10")
    secmark = nested(19, attribute(1, b"system_u:object_r:http_t\0"))
    special = entry + attribute(8, b"\0\0\0\2") + nested(5, attribute(1, b"ftp\0")) + secmark
    shifted = family(4) + pack_inbound(ends) + pack_outbound(ends, TUPLE_REPLY, pack_zone(7, 3))

    assert read_attributes(entry) == read_attributes(entry, 0) == PLAIN
    assert read_attributes(special, process_dialled=True) == Attributes(
        mark=2, helper="ftp", secmark="system_u:object_r:http_t", process_dialled=True
    )
    assert read_attributes(shifted) == Attributes(zone=7, zone_of="reply")


def test_a_time_out_counts_that_is_longer_than_an_entry_gets_anew() -> None:
    entry = tuples_of(ends_of("10.1.0.2", "10.2.0.10")) + attribute(TIMEOUT, b"\0\0\0\x64")

    assert read_attributes(entry, 100) == PLAIN
    assert read_attributes(entry, 99) == Attributes(timeout=100)
