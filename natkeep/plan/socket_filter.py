"""The holder's socket filters: the classic BPF programs of its packet sockets.

Rule: it may let more through than the kept connections, since the holder compares whole keys, and
never less. This file must never open a socket (kernel/segment_holder.py attaches the program).
"""

from __future__ import annotations

from struct import pack
from sys import byteorder

from natkeep.plan.tuples import RECORD_SIZE

_TCP, _UDP, _FRAGMENT_HEADER = 6, 17, 44
_SYN, _RST, _URG = 0x02, 0x04, 0x20

_INTERVALS = 64
"""Tests that the kernel makes of one field, at most; the holder looks at whole keys anyway."""
_LOAD_WORD, _LOAD_HALF, _LOAD_OCTET = 0x20, 0x28, 0x30
_LOAD_HALF_X, _LOAD_OCTET_X, _LOAD_X = 0x48, 0x50, 0xB1
_TO_X = 0x07
_JUMP, _EQUAL, _ABOVE, _AT_LEAST, _ANY_BIT, _RETURN = 0x05, 0x15, 0x25, 0x35, 0x45, 0x06
_PACKET_TYPE = 0xFFFFF000 + 4
_PAYLOAD_OFFSET = 0xFFFFF000 + 52
_IP_HEADER = 0xFFF00000
"""SKF_NET_OFF: where the IP header begins, whatever header the device has put in front of it."""
_ALL = 0xFFFFFFFF  # octets: what is shown is not cut

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false, operand: struct sock_filter."""


def make_filter(version: int, maps: list[tuple[int, bytes, bytes]]) -> tuple[Instruction, ...]:
    """The classic BPF program that shows the holder little more than the kept connections.

    maps: as for replay.pack_kept, of IP *version*. The program sees a packet from its IP header on.
    Addresses of IPv6 are compared by their last four octets; sets of more than 64 values are
    covered by as many intervals.
    """
    news, peers, ports = _columns(version, maps)
    source, destination = (12, 16) if version == 4 else (20, 36)
    program = [(_LOAD_OCTET, 0, 0, _PACKET_TYPE), *_require(_EQUAL, 0)]
    program += [(_LOAD_OCTET, 0, 0, 9 if version == 4 else 6), *_require(_EQUAL, _TCP)]
    if version == 4:
        program += [(_LOAD_HALF, 0, 0, 6), *_refuse(_ANY_BIT, 0x3FFF)]
    program += [(_LOAD_WORD, 0, 0, destination), *_require_one_of(news)]
    program += [(_LOAD_WORD, 0, 0, source), *_require_one_of(peers)]
    if version == 4:
        program += [(_LOAD_X, 0, 0, 0), (_LOAD_OCTET_X, 0, 0, 13)]
    else:
        program += [(_LOAD_OCTET, 0, 0, 53)]
    program += _refuse(_ANY_BIT, _SYN | _RST | _URG)
    program += [(_LOAD_HALF_X, 0, 0, 2) if version == 4 else (_LOAD_HALF, 0, 0, 42)]
    program += _require_one_of(ports)
    return (*program, (_RETURN, 0, 0, _ALL))


def make_datagram_filter(
    version: int, maps: list[tuple[int, bytes, bytes]]
) -> tuple[Instruction, ...]:
    """The same for datagrams, of a socket that sees a packet from the device's header on.

    A peer that is all zeros is any peer (plan/datagrams.py). Of fragments only the addresses are
    compared, since all but the first have no ports.
    """
    news, peers, ports = _columns(version, maps)
    source, destination = (12, 16) if version == 4 else (20, 36)
    ip = _IP_HEADER
    program = [(_LOAD_OCTET, 0, 0, _PACKET_TYPE), *_require(_EQUAL, 0)]
    program += [(_LOAD_WORD, 0, 0, ip + destination), *_require_one_of(news)]
    if 0 not in peers:
        program += [(_LOAD_WORD, 0, 0, ip + source), *_require_one_of(peers)]
    all_of_it = (_RETURN, 0, 0, _ALL)
    if version == 4:
        program += [(_LOAD_OCTET, 0, 0, ip + 9), *_require(_EQUAL, _UDP)]
        program += [(_LOAD_HALF, 0, 0, ip + 6), (_ANY_BIT, 0, 1, 0x3FFF), all_of_it]
    else:
        program += [(_LOAD_OCTET, 0, 0, ip + 6), (_EQUAL, 0, 1, _FRAGMENT_HEADER), all_of_it]
        program += _require(_EQUAL, _UDP)
    # By the offset of what is behind UDP's header: that is found wherever a driver has put it.
    program += [(_LOAD_WORD, 0, 0, _PAYLOAD_OFFSET), (_TO_X, 0, 0, 0)]
    program += [(_LOAD_HALF_X, 0, 0, 2**32 - 6), *_require_one_of(ports)]
    return (*program, all_of_it)


def _columns(
    version: int, maps: list[tuple[int, bytes, bytes]]
) -> tuple[set[int], set[int], set[int]]:
    """Local addresses, peers' addresses (of both the last four octets) and local ports."""
    width, size = 4 if version == 4 else 16, RECORD_SIZE[version]
    news, peers, ports = set[int](), set[int](), set[int]()
    for _, records, _ in maps:
        news |= _column(records, width - 4, 4, size)
        ports |= _column(records, width, 2, size)
        peers |= _column(records, size - 6, 4, size)
    return news, peers, ports


def _column(records: bytes, start: int, width: int, size: int) -> set[int]:
    """The numbers that stand at *start* in records of *size*: by columns, as there are many."""
    column = bytearray(len(records) // size * width)
    for i in range(width):
        place = width - 1 - i if byteorder == "little" else i
        column[place::width] = records[start + i :: size]
    return set(memoryview(column).cast("H" if width == 2 else "I").tolist())


def pack_filter(program: tuple[Instruction, ...]) -> bytes:
    """As the kernel wants it."""
    return b"".join(pack("=HBBI", *instruction) for instruction in program)


def _require(test: int, operand: int) -> list[Instruction]:
    return [(test, 1, 0, operand), (_RETURN, 0, 0, 0)]


def _refuse(test: int, operand: int) -> list[Instruction]:
    return [(test, 0, 1, operand), (_RETURN, 0, 0, 0)]


def _require_one_of(values: set[int]) -> list[Instruction]:
    intervals = cover(values, _INTERVALS)
    found: list[Instruction] = []
    for index, (first, last) in enumerate(intervals):
        behind = 4 * (len(intervals) - index - 1) + 1
        found += [*_require(_AT_LEAST, first), (_ABOVE, 1, 0, last), (_JUMP, 0, 0, behind)]
    return [*found, (_RETURN, 0, 0, 0)]  # above the last one


def cover(values: set[int], most: int) -> list[tuple[int, int]]:
    """At most *most* intervals, first and last included, that cover *values*; the gaps smallest."""
    ordered = sorted(values)
    gaps = sorted(range(1, len(ordered)), key=lambda i: ordered[i - 1] - ordered[i])[: most - 1]
    starts = [0, *sorted(i for i in gaps if ordered[i] - ordered[i - 1] > 1)]
    ends = [*(i - 1 for i in starts[1:]), len(ordered) - 1]
    return [(ordered[a], ordered[b]) for a, b in zip(starts, ends, strict=True)] if ordered else []
