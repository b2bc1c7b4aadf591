"""kernel/ctform.py and ctnetlink's keys: what many entries say, read by columns as one by one."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from natkeep.kernel.ctform import Columns, Forms
from natkeep.kernel.ctnetlink import (
    COUNTERS_ORIG,
    COUNTERS_REPLY,
    KEY_SIZE,
    PROTOINFO,
    STATUS_BITS,
    STATUS_HEAD,
    TUPLE_ORIG,
    TUPLE_REPLY,
    Ends,
    make_keys,
    make_turned_keys,
    pack_inbound,
    pack_outbound,
    read_end,
    read_reply,
    read_said,
)
from natkeep.kernel.netlink import attribute, attributes, nested
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

TIMEOUT, MARK, ID = 7, 8, 12
COUNTED = (COUNTERS_ORIG, COUNTERS_REPLY)


def pack(
    number: int, *, counted: tuple[int, ...] = COUNTED, state: int = 3, front: bytes = b""
) -> bytes:
    """What the kernel writes behind the tuples of an entry; front: what stands before its state."""
    tcp = nested(1, attribute(1, bytes((state,))), attribute(4, bytes((8, number))))
    return (
        attribute(STATUS_BITS, (0x20 | number << 8).to_bytes(4, "big"))
        + front
        + b"".join(
            nested(type_, attribute(1, (number * type_).to_bytes(8, "big"))) for type_ in counted
        )
        + nested(PROTOINFO, tcp)
        + attribute(ID, struct.pack("!I", number))
    )


def one_by_one(rests: list[bytes]) -> Columns:
    return Columns(*zip(*(read_said(attributes(rest)) for rest in rests), strict=True))


def mixed(number: int) -> bytes:
    """Some have a mark, which are longer; some of these no counters."""
    mark = attribute(MARK, bytes(4)) if number % 3 else b""
    return pack(number, front=mark, counted=COUNTED if number % 2 else ())


def alike_in_length_alone(number: int) -> bytes:
    """The mark stands in another place."""
    mark = attribute(MARK, bytes(4))
    return pack(number, front=mark) if number % 2 else pack(number) + mark


def with_one_counter(number: int) -> bytes:
    return pack(number, counted=(COUNTERS_ORIG,))


def in_two_states(number: int) -> bytes:
    return pack(number, state=7 if number % 2 else 3)


def without_state(number: int) -> bytes:
    return attribute(STATUS_BITS, bytes(4)) + attribute(TIMEOUT, bytes((0, 0, 0, number)))


def with_a_short_counter(number: int) -> bytes:
    return without_state(number) + nested(COUNTERS_ORIG, attribute(1, bytes((0, 0, 0, number))))


def with_something_cut_off(number: int) -> bytes:
    return pack(number) + struct.pack("=HH", 99, MARK)


@pytest.mark.parametrize(
    "make",
    [
        pack, mixed, alike_in_length_alone, with_one_counter, in_two_states, without_state,
        with_a_short_counter, with_something_cut_off,
    ],
)  # fmt: skip
def test_columns_say_what_each_entry_says(make: Callable[[int], bytes]) -> None:
    forms, rests = Forms(), [make(number) for number in range(1, 20)]

    for some in (rests, rests[::-1], rests[:1]):  # a form that is known is used again
        found = Columns(*map(tuple, forms.read(some)))
        assert found == one_by_one(some)


def test_an_attribute_elsewhere_is_no_value() -> None:
    """Each header is compared: where one differs, the entry is taken apart itself."""
    forms, plain = Forms(), [pack(number) for number in range(4)]
    forms.read(plain)
    for at in range(8, len(plain[0]), 4):
        other = bytearray(plain[0])
        other[at + 2] ^= 0x7  # where a header stands, its type
        some = [*plain, bytes(other)]
        assert Columns(*map(tuple, forms.read(some))) == one_by_one(some)


@pytest.mark.parametrize(
    ("peer", "outer", "inner"),
    [("10.1.0.2", "10.2.0.10", "10.3.0.20"), ("fd00:1::2", "fd00:2::10", "fd00:3::20")],
)
def test_keys_are_both_tuples_as_the_kernel_writes_them(peer: str, outer: str, inner: str) -> None:
    version = ip_address(peer).version
    some = [
        Connections.of(
            FourTuple(Endpoint(ip_address(peer), 5000 + i), Endpoint(ip_address(local), 80 + i))
            for i in range(3)
        )
        for local in (outer, inner)
    ]
    ends = [
        [
            Ends(ip_address(peer).packed, (5000 + i).to_bytes(2, "big"), ip_address(local).packed,
                 (80 + i).to_bytes(2, "big"))
            for i in range(3)
        ]
        for local in (outer, inner)
    ]  # fmt: skip

    keys, turned = make_keys(*some, version), make_turned_keys(*some, version)

    assert keys == [
        pack_inbound(o, TUPLE_ORIG) + pack_outbound(i, TUPLE_REPLY)
        for o, i in zip(*ends, strict=True)
    ]
    assert turned == [
        pack_outbound(i, TUPLE_ORIG) + pack_inbound(o, TUPLE_REPLY)
        for o, i in zip(*ends, strict=True)
    ]
    assert {*map(len, keys)} == {KEY_SIZE[version]}
    assert [*map(read_reply, keys)] == [*some[1].each()]
    assert [*map(read_end, turned)] == [end.peer + end.peer_port for end in ends[1]]
    assert pack(1).startswith(STATUS_HEAD)
