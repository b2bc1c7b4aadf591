"""kernel/netlink.py: packing and unpacking, octet by octet; no socket is opened."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natkeep.kernel.netlink import (
    Batch,
    attribute,
    attributes,
    column,
    message,
    nested,
    replicate,
    sequences,
)


@pytest.mark.parametrize(
    ("value", "length", "padding"),
    [(b"", 4, 0), (b"a", 5, 3), (b"ab", 6, 2), (b"abc", 7, 1), (b"abcd", 8, 0), (b"abcde", 9, 3)],
)
def test_an_attribute_says_its_length_without_the_padding(
    value: bytes, length: int, padding: int
) -> None:
    assert struct.pack("=HH", length, 7) + value + bytes(padding) == attribute(7, value)


def test_a_nested_attribute_is_marked_and_holds_the_others() -> None:
    inner = attribute(1, b"a") + attribute(2, b"bc")

    assert struct.pack("=HH", 4 + len(inner), 0x8003) + inner == nested(
        3, attribute(1, b"a"), attribute(2, b"bc")
    )


@settings(max_examples=50)
@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=9), max_size=6))
def test_attributes_come_back_as_they_were_packed(values: dict[int, bytes]) -> None:
    packed = b"".join(attribute(type_, value) for type_, value in values.items())

    assert values == attributes(packed)
    assert {5: packed} == attributes(nested(5, packed))


@settings(max_examples=100)
@given(st.binary(max_size=64))
def test_octets_of_no_sense_are_read_to_their_end(data: bytes) -> None:
    """A length of zero in what the kernel sent must not hold us for ever."""
    found = attributes(data)

    assert sum(4 + len(value) for value in found.values()) <= len(data) + 3


def test_a_message_says_its_length_and_that_it_is_a_request() -> None:
    header = struct.pack("=IHHII", 20, 0x102, 0x600 | 1, 9, 0)

    assert header + b"body" == message(0x102, 0x600, b"body", 9)


def test_a_template_is_replicated_with_its_columns() -> None:
    filled = replicate(b"<..-.>", [(1, b"aAbBcC"), (4, b"123")], 3)

    assert filled == b"<aA-1><bB-2><cC-3>"


def test_nothing_is_replicated_into_nothing() -> None:
    assert replicate(b"<..>", [(1, b"")], 0) == b""


BATCH = Batch(b"\0.-.", ((0, b"\0\1\2\3"), (1, b"abcd"), (3, b"ABCD")), 4)


@pytest.mark.parametrize(
    ("octets", "ends"), [(1, [1, 2, 3, 4]), (8, [2, 4]), (13, [3, 4]), (99, [4])]
)
def test_a_batch_is_packed_by_the_chunk(octets: int, ends: list[int]) -> None:
    chunks = [*BATCH.chunks(octets)]

    assert ends == [end for _, end in chunks]
    whole = b"".join(BATCH.pack(first, end) for first, end in chunks)
    assert whole == replicate(BATCH.template, BATCH.columns, 4) == b"\0a-A\1b-B\2c-C\3d-D"


def test_the_head_of_a_batch_is_a_batch() -> None:
    assert BATCH.head(2).pack(0, 2) == BATCH.pack(0, 2)
    assert [*BATCH.head(2).chunks(99)] == [(0, 2)]
    assert [*BATCH.head(0).chunks(99)] == []


def test_a_column_is_one_field_of_all_records() -> None:
    records = b"aaAAxbbBBycCCCz"[:15]

    assert column(records, 5, 2, 2) == b"AABBCC"
    assert column(records, 5, 4, 1) == b"xyz"
    assert column(b"", 5, 2, 2) == b""


@settings(max_examples=30)
@given(st.lists(st.binary(min_size=6, max_size=6), max_size=5))
def test_columns_of_records_replicate_to_the_records(records: list[bytes]) -> None:
    packed = b"".join(records)
    columns = [(start, column(packed, 6, start, width)) for start, width in ((0, 4), (4, 2))]

    assert packed == replicate(bytes(6), columns, len(records))


def test_sequence_numbers_count_in_the_order_of_the_machine() -> None:
    assert struct.pack("=3I", 0, 1, 2) == sequences(3)
