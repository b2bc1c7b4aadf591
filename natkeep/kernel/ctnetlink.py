"""Packs and reads ctnetlink messages: connection-tracking entries, by the hundred thousand.

Rule: this file knows what stands where in a message (linux/netfilter/nfnetlink_conntrack.h) and
sends nothing; which entries there shall be is decided in conntrack.py and conntrack_purge.py. What
an entry must say is in plan/conntrack.py.

Theory of operation. A message is packed twice: once for a template, and once more for each field,
to learn where in it the field stands. What the connections have in common is in the template, what
differs is written over it in columns.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import partial

from natkeep.kernel.netlink import (
    Batch,
    attribute,
    attributes,
    column,
    find_attribute,
    message,
    nested,
)
from natkeep.kernel.netlink import sequences as sequences_of
from natkeep.plan.conntrack import STATUS
from natkeep.plan.entry_attributes import BOTH, ORIGINAL, PLAIN, REPLY, Attributes
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.tuples import RECORD_SIZE, Connections
from natkeep.values import dataclass, replace

NEW, GET, DELETE = (1 << 8) | 0, (1 << 8) | 1, (1 << 8) | 2
TUPLE_ORIG, TUPLE_REPLY, STATUS_BITS, ZONE = 1, 2, 3, 18
PROTOINFO, COUNTERS_ORIG, COUNTERS_REPLY, _ID = 4, 9, 10, 12
_NAT_SRC, TIMEOUT, _NAT_DST, _FILTER, _STATUS_MASK = 6, 7, 13, 25, 26
HELP, MARK, SEQ_ORIG, SEQ_REPLY, SECCTX, LABELS, SYNPROXY = 5, 8, 15, 16, 19, 22, 24
TUPLE_ZONE, _FILTER_ORIG_FLAGS, _FILTER_REPLY_FLAGS = 3, 1, 2
_BY_SOURCE, _BY_DESTINATION, _BY_PROTOCOL, _BY_PORT = 1 << 0, 1 << 1, 1 << 3, 1 << 5
"""CTA_FILTER_FLAG of CTA_IP_SRC, of CTA_IP_DST, of CTA_PROTO_NUM and of CTA_PROTO_DST_PORT."""

_NESTED = 1 << 15

_AF = {4: 2, 6: 10}
_WIDTH = {4: 4, 6: 16}
_TCP = bytes((TCP.number,))


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


def pack_entry(
    outer: Ends, inner: Ends, *, timeout: int, ports: bool, attributes: Attributes = PLAIN
) -> bytes:
    """A whole entry; ports: peers or ports are translated too, not the local address alone."""
    flags = bytes((TCP.flags, TCP.flags))
    state = attribute(1, bytes((TCP.established,)))
    zones = {attributes.zone_of: pack_zone(attributes.zone, TUPLE_ZONE)}
    entry = (
        pack_inbound(outer, zone=zones.get(ORIGINAL, b""))
        + pack_outbound(outer, TUPLE_REPLY, zone=zones.get(REPLY, b""))
        + attribute(STATUS_BITS, STATUS.to_bytes(4, "big"))
        + nested(PROTOINFO, nested(1, state, attribute(4, flags), attribute(5, flags)))
        + attribute(TIMEOUT, max(timeout, attributes.timeout).to_bytes(4, "big"))
        + (b"" if attributes == PLAIN else _pack_attributes(attributes))
    )
    if outer.local != inner.local or ports:
        entry += _pack_nat(_NAT_DST, inner.local, inner.local_port if ports else None)
        # Also where the peer stays what it is: a source that is named is not chosen anew. Where
        # something has our reply tuple the kernel then refuses the entry (EEXIST), instead of
        # giving it another port and saying nothing.
        entry += _pack_nat(_NAT_SRC, inner.peer, inner.peer_port)
    return entry


def _pack_attributes(what: Attributes) -> bytes:
    """What an entry says beside its tuples, but for a zone of one direction, and its time-out."""
    entry = pack_zone(what.zone) if what.zone_of == BOTH else b""
    if what.mark:
        entry += attribute(MARK, what.mark.to_bytes(4, "big"))
    if what.labels:
        entry += attribute(LABELS, bytes.fromhex(what.labels))
    if what.helper:
        entry += nested(HELP, attribute(1, what.helper.encode("ascii") + b"\0"))
    for type_, octets in (
        (SEQ_ORIG, what.seq_original),
        (SEQ_REPLY, what.seq_reply),
        (SYNPROXY, what.synproxy),
    ):
        entry += nested(type_, bytes.fromhex(octets)) if octets else b""
    return entry


def _pack_nat(type_: int, address: bytes, port: bytes | None) -> bytes:
    minimum, maximum = (1, 2) if len(address) == 4 else (4, 5)
    parts = [attribute(minimum, address), attribute(maximum, address)]
    if port is not None:
        parts.append(nested(3, attribute(1, port), attribute(2, port)))
    return nested(type_, *parts)


def pack_inbound(
    end: Ends, type_: int = TUPLE_ORIG, zone: bytes = b"", protocol: Protocol = TCP
) -> bytes:
    """The tuple peer to local end; zone: of this direction alone, packed."""
    ports = end.peer_port, end.local_port
    return _pack_tuple(type_, end.peer, end.local, ports, zone, protocol)


def pack_outbound(
    end: Ends, type_: int = TUPLE_ORIG, zone: bytes = b"", protocol: Protocol = TCP
) -> bytes:
    """The tuple local end to peer."""
    ports = end.local_port, end.peer_port
    return _pack_tuple(type_, end.local, end.peer, ports, zone, protocol)


def pack_zone(zone: int, type_: int = ZONE) -> bytes:
    """The attribute that names a zone; nothing for zone 0, which is the default."""
    return attribute(type_, zone.to_bytes(2, "big")) if zone else b""


def _pack_tuple(
    type_: int,
    saddr: bytes,
    daddr: bytes,
    ports: tuple[bytes, bytes],
    zone: bytes,
    protocol: Protocol,
) -> bytes:
    source, destination = (1, 2) if len(saddr) == 4 else (3, 4)
    (sport, dport), number = ports, bytes((protocol.number,))
    return nested(
        type_,
        nested(1, attribute(source, saddr), attribute(destination, daddr)),
        nested(2, attribute(1, number), attribute(2, sport), attribute(3, dport)),
        zone,
    )


def ask_for(
    protocol: Protocol,
    version: int,
    *,
    destination: bytes = b"",
    port: bytes = b"",
    status: int = 0,
    mask: int = 0,
) -> bytes:
    """The body of a dump request: entries of *protocol*, of what is named those alone.

    destination, port: where the original tuple leads to; status: of the status bits *mask*. What is
    answered may be more, so each is looked at once more: there are kernels that do not know these
    attributes, and one that gives just the others when asked for an IPv6 address (Linux 6.18:
    ctnetlink_filter_match_tuple), so that is not asked for.
    """
    by, address, ports = _BY_PROTOCOL, b"", b""
    if destination and version == 4:
        by, address = by | _BY_DESTINATION, nested(1, attribute(2, destination))
    if port:
        by, ports = by | _BY_PORT, attribute(3, port)
    body = (
        family(version)
        + nested(TUPLE_ORIG, address, nested(2, attribute(1, bytes((protocol.number,))), ports))
        + nested(_FILTER, attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", by)))
    )
    if mask:
        body += attribute(STATUS_BITS, status.to_bytes(4, "big"))
        body += attribute(_STATUS_MASK, mask.to_bytes(4, "big"))
    return body


ask_for_tcp = partial(ask_for, TCP)
"""The same of TCP."""


def ask_for_tcp_from(source: bytes, type_: int) -> bytes:
    """The body of a dump request: IPv4 TCP entries whose tuple *type_* has this source, or more."""
    flags = _FILTER_ORIG_FLAGS if type_ == TUPLE_ORIG else _FILTER_REPLY_FLAGS
    return (
        family(4)
        + nested(type_, nested(1, attribute(1, source)), nested(2, attribute(1, _TCP)))
        + nested(_FILTER, attribute(flags, struct.pack("=I", _BY_SOURCE | _BY_PROTOCOL)))
    )


def for_each(outer: Connections, inner: Connections, type_: int, flags: int, pack: Pack) -> Batch:
    """One message for each connection, its sequence number its index.

    Without columns 100,000 connections take 0.16 s in a loop over a template, and 1 s by a call
    each; with them 5 ms (`make bench`: 100,000 connections at a quarter of rules by hand).
    """
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


def read_flags(answer: bytes) -> int:
    """The flags of the original direction; 0 where TCP has none."""
    tcp = find_attribute(find_attribute(answer[NFGENMSG:], PROTOINFO), 1)
    return int.from_bytes(find_attribute(tcp, 4)[:1], "big")


def read_status(answer: bytes) -> int:
    """The status bits alone."""
    return int.from_bytes(find_attribute(answer[NFGENMSG:], STATUS_BITS), "big")


def pack_itself(answer: bytes) -> bytes:
    """The body of a message about this very entry: its tuple, its zone, the kernel's number."""
    entry = attributes(answer[NFGENMSG:])
    named = struct.pack("!BBH", answer[0], 0, 0)
    named += attribute(TUPLE_ORIG | _NESTED, entry[TUPLE_ORIG]) + attribute(_ID, entry[_ID])
    return named + (attribute(ZONE, entry[ZONE]) if ZONE in entry else b"")


def turn(record: bytes) -> bytes:
    """The tuple of the other direction."""
    half = len(record) // 2
    return record[half:] + record[:half]


def read_tuples(answer: bytes, protocol: Protocol = TCP) -> tuple[bytes, bytes, int]:
    """Original and reply tuple of an entry of *protocol*, and its zone; of another two empty ones.

    A tuple is packed as a record, its source first: that of a reply is the local end. They are the
    first attributes, and those of TCP are all of one form, so each is read by where things stand;
    what looks different is taken apart.
    """
    form, headers = _FORMS[protocol.number][answer[0]]
    if len(answer) >= form.size:
        fields = form.unpack_from(answer)
        if fields[::2] == headers:
            source, to, sport, dport, reply_source, reply_to, reply_sport, reply_dport = fields[
                1::2
            ]
            zone, number = answer[form.size : form.size + 4], answer[form.size + 4 : form.size + 6]
            return (
                source + sport + to + dport,
                reply_source + reply_sport + reply_to + reply_dport,
                int.from_bytes(number, "big") if zone == _ZONE_HEADER else 0,
            )
    entry = attributes(answer[NFGENMSG:])
    tuples = [_take_apart(entry[type_], protocol) for type_ in (TUPLE_ORIG, TUPLE_REPLY)]
    if not all(tuples):
        return b"", b"", 0
    # One that is the zone of one direction only (`ct original zone set`) is a part of its tuple.
    zone_of = entry.get(ZONE) or attributes(entry[TUPLE_ORIG]).get(TUPLE_ZONE, b"")
    return tuples[0], tuples[1], int.from_bytes(zone_of, "big")


def _take_apart(value: bytes, protocol: Protocol) -> bytes:
    tuple_ = attributes(value)
    ip, proto = attributes(tuple_[1]), attributes(tuple_[2])
    if proto.get(1) != bytes((protocol.number,)):
        return b""
    return (ip.get(1) or ip[3]) + proto[2] + (ip.get(2) or ip[4]) + proto[3]


def _make_form(protocol: Protocol, version: int) -> tuple[struct.Struct, tuple[bytes, ...]]:
    """How the two tuples are written: attributes' headers and values by turns; and the headers.

    As this file packs them itself, which is as the kernel does.
    """
    width = _WIDTH[version]
    form = struct.Struct("4x" + 2 * f"12s{width}s4s{width}s16s2s6s2s2x")
    end = Ends(bytes(width), b"\0\0", bytes(width), b"\0\0")
    both = pack_inbound(end, protocol=protocol)
    both += pack_outbound(end, TUPLE_REPLY, protocol=protocol)
    return form, form.unpack(family(version) + both)[::2]


NFGENMSG = 4
_FORMS = {
    one.number: {number: _make_form(one, version) for version, number in _AF.items()}
    for one in (TCP, UDP)
}
_ZONE_HEADER = pack_zone(1)[:4]
