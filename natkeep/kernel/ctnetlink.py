"""the ctnetlink wire: connection-tracking entries packed by the thousand and taken apart again.

Rule: this file knows what stands where in a message (linux/netfilter/nfnetlink_conntrack.h) and
sends nothing; which entries there shall be is conntrack.py's and purge.py's. What an entry must
say is in plan/conntrack.py.

Theory of operation. A message is packed twice: once for a template, and once more for each field,
to learn where in it the field stands. What the connections have in common is in the template, what
differs is written over it in columns.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator

from natkeep.kernel.netlink import (
    Batch,
    attribute,
    attributes,
    column,
    message,
    nested,
)
from natkeep.kernel.netlink import sequences as sequences_of
from natkeep.plan.conntrack import STATUS, TCP_ESTABLISHED, TCP_FLAGS
from natkeep.plan.tuples import RECORD_SIZE, Connections
from natkeep.values import dataclass, replace

NEW, GET, DELETE = (1 << 8) | 0, (1 << 8) | 1, (1 << 8) | 2
TUPLE_ORIG, TUPLE_REPLY, STATUS_BITS, PROTOINFO = 1, 2, 3, 4
COUNTERS_ORIG, COUNTERS_REPLY, ZONE = 9, 10, 18
_NAT_SRC, _TIMEOUT, _NAT_DST, _FILTER, _STATUS_MASK = 6, 7, 13, 25, 26
_FILTER_ORIG_FLAGS = 1
_BY_DESTINATION, _BY_PROTOCOL = 1 << 1, 1 << 3
"""CTA_FILTER_FLAG of CTA_IP_DST and of CTA_PROTO_NUM."""

_AF = {4: 2, 6: 10}
_WIDTH = {4: 4, 6: 16}
_TCP = b"\x06"


@dataclass(frozen=True, slots=True)
class Ends:
    """One direction of a connection, as octets of a packet: from a peer to a local end."""

    peer: bytes
    peer_port: bytes
    local: bytes
    local_port: bytes


Pack = Callable[[Ends, Ends], bytes]
"""From a connection's outer and inner ends to the attributes of a message."""


def family(version: int) -> bytes:
    """The nfgenmsg of messages about IP *version*."""
    return struct.pack("!BBH", _AF[version], 0, 0)


def pack_entry(outer: Ends, inner: Ends, *, timeout: int, ports: bool) -> bytes:
    """A whole entry; ports: peers or ports are translated too, not the local address alone."""
    flags = bytes((TCP_FLAGS, TCP_FLAGS))
    state = attribute(1, bytes((TCP_ESTABLISHED,)))
    entry = (
        pack_inbound(outer)
        + pack_outbound(outer, TUPLE_REPLY)
        + attribute(STATUS_BITS, STATUS.to_bytes(4, "big"))
        + nested(PROTOINFO, nested(1, state, attribute(4, flags), attribute(5, flags)))
        + attribute(_TIMEOUT, timeout.to_bytes(4, "big"))
    )
    if outer.local != inner.local or ports:
        entry += _pack_nat(_NAT_DST, inner.local, inner.local_port if ports else None)
        # Also where the peer stays what it is: a source that is named is not chosen anew. Where
        # something has our reply tuple the kernel then refuses the entry (EEXIST), instead of
        # giving it another port and saying nothing.
        entry += _pack_nat(_NAT_SRC, inner.peer, inner.peer_port)
    return entry


def _pack_nat(type_: int, address: bytes, port: bytes | None) -> bytes:
    minimum, maximum = (1, 2) if len(address) == 4 else (4, 5)
    parts = [attribute(minimum, address), attribute(maximum, address)]
    if port is not None:
        parts.append(nested(3, attribute(1, port), attribute(2, port)))
    return nested(type_, *parts)


def pack_inbound(end: Ends, type_: int = TUPLE_ORIG) -> bytes:
    """The tuple peer to local end."""
    return _pack_tuple(type_, end.peer, end.local, end.peer_port, end.local_port)


def pack_outbound(end: Ends, type_: int = TUPLE_ORIG) -> bytes:
    """The tuple local end to peer."""
    return _pack_tuple(type_, end.local, end.peer, end.local_port, end.peer_port)


def pack_zone(zone: int) -> bytes:
    """The attribute that names a zone; nothing for zone 0, which is the default."""
    return attribute(ZONE, zone.to_bytes(2, "big")) if zone else b""


def _pack_tuple(type_: int, saddr: bytes, daddr: bytes, sport: bytes, dport: bytes) -> bytes:
    source, destination = (1, 2) if len(saddr) == 4 else (3, 4)
    return nested(
        type_,
        nested(1, attribute(source, saddr), attribute(destination, daddr)),
        nested(2, attribute(1, _TCP), attribute(2, sport), attribute(3, dport)),
    )


def ask_for_tcp(version: int) -> bytes:
    """The body of a dump request for TCP entries; older kernels answer with all of the family."""
    flags = attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", _BY_PROTOCOL))
    which = nested(TUPLE_ORIG, nested(2, attribute(1, _TCP))) + nested(_FILTER, flags)
    return family(version) + which


def ask_for_status(destination: bytes, status: int, mask: int) -> bytes:
    """The body of a dump request: TCP, original *destination*, and of its status bits *mask*.

    What is answered may be more, so look at each once more: there are kernels that do not know
    these attributes, and one that gives just the others when asked for an IPv6 address (Linux 6.18:
    ctnetlink_filter_match_tuple), so that is not asked for.
    """
    version = 4 if len(destination) == 4 else 6
    by = _BY_PROTOCOL | (_BY_DESTINATION if version == 4 else 0)
    address = nested(1, attribute(2, destination)) if version == 4 else b""
    return (
        family(version)
        + nested(TUPLE_ORIG, address, nested(2, attribute(1, _TCP)))
        + nested(_FILTER, attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", by)))
        + attribute(STATUS_BITS, status.to_bytes(4, "big"))
        + attribute(_STATUS_MASK, mask.to_bytes(4, "big"))
    )


def for_each(outer: Connections, inner: Connections, type_: int, flags: int, pack: Pack) -> Batch:
    """One message for each connection, its sequence number its index."""
    version = 4 if outer.v4 else 6
    size, width = RECORD_SIZE[version], _WIDTH[version]
    count = len(outer)
    first = [_first_ends(side.records(version), width) for side in (outer, inner)]

    def make(ends: list[Ends]) -> bytes:
        return message(type_, flags, family(version) + pack(ends[0], ends[1]))

    template = make(first)
    columns = [(8, sequences_of(count))]
    sides = (outer,) if inner is outer else (outer, inner)
    for index, side in enumerate(sides):
        records = side.records(version)
        for name, start, octets in (
            ("local", 0, width),
            ("local_port", width, 2),
            ("peer", width + 2, width),
            ("peer_port", 2 * width + 2, 2),
        ):
            values = column(records, size, start, octets)
            if values == values[:octets] * count:
                continue  # the template says it
            ends = list(first)
            flipped = bytes(octet ^ 0xFF for octet in values[:octets])
            ends[index] = replace(first[index], **{name: flipped})
            if inner is outer:
                ends[1] = ends[0]
            columns += [(at, values) for at in _differences(template, make(ends), octets)]
    return Batch(template, tuple(columns), count)


def _first_ends(records: bytes, width: int) -> Ends:
    peer = width + 2
    return Ends(
        peer=records[peer : peer + width],
        peer_port=records[peer + width : peer + width + 2],
        local=records[:width],
        local_port=records[width:peer],
    )


def _differences(blank: bytes, marked: bytes, octets: int) -> Iterator[int]:
    """Where *marked* differs from *blank*, each place *octets* wide."""
    at = 0
    while at < len(blank):
        if blank[at] != marked[at]:
            yield at
            at += octets
        else:
            at += 1


def read_tuple(data: bytes) -> bytes:
    """Source and destination, packed as a record: a reply's source is the local end."""
    width = _PLAIN.get((len(data), data[:8]))
    if width is not None and data[16 + 2 * width : 20 + 2 * width] == _NUMBER_HEADER:
        # TCP's are all of one form, so of a thousand entries' each is read by where things stand.
        to, ports = 12 + width, 28 + 2 * width
        return (
            data[8 : 8 + width]
            + data[ports : ports + 2]
            + data[to : to + width]
            + data[ports + 8 : ports + 10]
        )
    tuple_ = attributes(data)
    ip, proto = attributes(tuple_[1]), attributes(tuple_[2])
    source, destination = (ip.get(1) or ip[3]), (ip.get(2) or ip[4])
    return source + proto.get(2, b"\0\0") + destination + proto.get(3, b"\0\0")


def make_keys(outer: Connections, inner: Connections, version: int) -> list[bytes]:
    """What the kernel writes as both tuples of each connection's entry.

    outer, inner: the connections as the original tuple and as the reply tuple shows them.
    """
    width = _WIDTH[version]
    local, peer = 0, width + 2
    return _write_tuples(
        ((outer.records(version), peer, local), (inner.records(version), local, peer)), version
    )


def make_turned_keys(outer: Connections, inner: Connections, version: int) -> list[bytes]:
    """The same of entries that a packet from the process has begun."""
    width = _WIDTH[version]
    local, peer = 0, width + 2
    return _write_tuples(
        ((inner.records(version), local, peer), (outer.records(version), peer, local)), version
    )


def _write_tuples(directions: Iterable[tuple[bytes, int, int]], version: int) -> list[bytes]:
    """For each direction the records, and where in one its source and destination stand."""
    width, size, key = _WIDTH[version], RECORD_SIZE[version], KEY_SIZE[version]
    written, begin = bytearray(), 0
    for records, source, destination in directions:
        written = written or bytearray(_BOTH[version] * (len(records) // size))
        for at, start, octets in (
            (12, source, width), (16 + width, destination, width),
            (32 + 2 * width, source + width, 2), (40 + 2 * width, destination + width, 2),
        ):  # fmt: skip
            for i in range(octets):
                written[begin + at + i :: key] = records[start + i :: size]
        begin += key // 2
    return [one for (one,) in struct.iter_unpack(f"{key}s", written)]


def read_end(key: bytes) -> bytes:
    """Where the original tuple of a key leads to: address and port."""
    width = _WIDTH[4] if len(key) == KEY_SIZE[4] else _WIDTH[6]
    port = 40 + 2 * width
    return key[16 + width : 16 + 2 * width] + key[port : port + 2]


def read_reply(key: bytes) -> bytes:
    """The reply tuple of a key, packed as a record."""
    return read_tuple(key[len(key) // 2 + 4 :])


def turn(record: bytes) -> bytes:
    """The tuple of the other direction."""
    half = len(record) // 2
    return record[half:] + record[:half]


Said = tuple[int, int, int, "int | None", "int | None"]
"""What an entry says: status bits; TCP state, and the first octet of the flags of the original
direction; packets in original and in reply direction, None where they are not counted."""


def read_said(entry: dict[int, bytes]) -> Said:
    """What an entry says that has been taken apart."""
    tcp = attributes(attributes(entry.get(PROTOINFO, b"")).get(1, b""))
    inward, outward = (
        attributes(entry[type_]).get(1, b"") if type_ in entry else b""
        for type_ in (COUNTERS_ORIG, COUNTERS_REPLY)
    )
    return (
        int.from_bytes(entry[STATUS_BITS], "big"),
        int.from_bytes(tcp.get(1, b""), "big"),
        int.from_bytes(tcp.get(4, b"")[:1], "big"),
        int.from_bytes(inward, "big") if inward else None,
        int.from_bytes(outward, "big") if outward else None,
    )


_NFGENMSG = 4
_ZEROS = {version: Ends(bytes(w), b"\0\0", bytes(w), b"\0\0") for version, w in _WIDTH.items()}
_USUAL = {
    version: _pack_tuple(TUPLE_ORIG, end.peer, end.local, end.peer_port, end.local_port)
    for version, end in _ZEROS.items()
}
_PLAIN = {(len(usual) - 4, usual[4:12]): _WIDTH[version] for version, usual in _USUAL.items()}
_NUMBER_HEADER = _USUAL[4][28:32]
_BOTH = {
    version: usual + struct.pack("=HH", len(usual), TUPLE_REPLY | 1 << 15) + usual[4:]
    for version, usual in _USUAL.items()
}
KEY_SIZE = {version: len(both) for version, both in _BOTH.items()}
"""Octets of both tuples of a TCP entry, in the form in which the kernel writes them."""

STATUS_HEAD = struct.pack("=HH", 8, STATUS_BITS)
"""What follows them, if the entry is of zone 0."""

_ZONE_HEADER = pack_zone(1)[:4]


def read_tcp_tuples(answers: Iterable[bytes], version: int) -> Iterator[tuple[bytes, bytes, int]]:
    """Original and reply tuple, packed as records, and zone of each TCP entry among *answers*.

    The two tuples come first, and those of TCP are all of one size, so a hundred thousand are read
    by where things stand; whatever looks different is taken apart.
    """
    usual, width = _USUAL[version], _WIDTH[version]
    head, length = usual[:12], len(usual)
    reply_head = struct.pack("=HH", length, TUPLE_REPLY | 1 << 15) + head[4:]
    source = 12
    destination = source + width + 4
    number = destination + width + 8
    sport, dport = number + 8, number + 16
    for answer in answers:
        entry = answer[_NFGENMSG:]
        reply = entry[length : 2 * length]
        if entry[:12] != head or reply[:12] != reply_head:
            found = _take_apart(entry)
            if found is not None:
                yield found
            continue
        if entry[number : number + 1] != _TCP:
            continue
        zone = 0
        if entry[2 * length : 2 * length + 4] == _ZONE_HEADER:
            zone = int.from_bytes(entry[2 * length + 4 : 2 * length + 6], "big")
        yield (
            entry[source : source + width]
            + entry[sport : sport + 2]
            + entry[destination : destination + width]
            + entry[dport : dport + 2],
            reply[source : source + width]
            + reply[sport : sport + 2]
            + reply[destination : destination + width]
            + reply[dport : dport + 2],
            zone,
        )


def _take_apart(entry: bytes) -> tuple[bytes, bytes, int] | None:
    found = attributes(entry)
    if attributes(attributes(found[TUPLE_ORIG])[2]).get(1) != _TCP:
        return None
    zone = int.from_bytes(found.get(ZONE, b""), "big")
    return read_tuple(found[TUPLE_ORIG]), read_tuple(found[TUPLE_REPLY]), zone
