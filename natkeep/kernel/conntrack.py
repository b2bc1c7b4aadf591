"""the connection table by raw ctnetlink: purge, insert, and look at exactly the kept tuples.

Rule: nothing here ever flushes, and no entry is touched but by its full tuple. What an entry
must say is in plan/entries.py; this file packs it (linux/netfilter/nfnetlink_conntrack.h).

ctnetlink is not atomic: of a batch some may be refused, so every refusal is looked at. It
cannot change an entry's NAT (EOPNOTSUPP): an entry is deleted and made anew, behind the gate.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from natkeep.errors import RefusedError
from natkeep.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Netlink,
    Refusal,
    attribute,
    attributes,
    column,
    message,
    nested,
    replicate,
    sequences,
)
from natkeep.plan.drift import SeenEntry
from natkeep.plan.entries import (
    ESTABLISHED_TIMEOUT,
    IPS_DST_NAT,
    STATUS,
    TCP_ESTABLISHED,
    TCP_FLAGS,
    stale_views,
)
from natkeep.plan.move import Mode, Translation
from natkeep.plan.tuples import RECORD_SIZE, Connections, FourTuple

_NEW, _GET, _DELETE = (1 << 8) | 0, (1 << 8) | 1, (1 << 8) | 2
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT = 1, 2, 3, 4, 7
_NAT_SRC, _COUNTERS_ORIG, _COUNTERS_REPLY, _NAT_DST = 6, 9, 10, 13
_ZONE = 18
_AF = {4: 2, 6: 10}
_WIDTH = {4: 4, 6: 16}

_ALIVE = range(TCP_ESTABLISHED, 7)
"""ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK; TIME_WAIT and CLOSE have ended."""

_IPS_OFFLOAD = 0xC000
"""IPS_OFFLOAD and IPS_HW_OFFLOAD."""

_GIVEN_BACK_S = 300
"""Seconds until the first packet, as for a connection that the kernel picks up by itself."""

_SETTINGS = "/proc/sys/net/netfilter"


@dataclass(frozen=True, slots=True)
class _Tuple:
    """One direction of a connection, as octets of a packet: from a peer to a local end."""

    peer: bytes
    peer_port: bytes
    local: bytes
    local_port: bytes


_Pack = Callable[[_Tuple, _Tuple], bytes]
"""From a connection's outer and inner tuple to the attributes of a message."""


def purge(translation: Translation) -> int:
    """Delete every entry that has one of the stale tuples; the number that there were."""
    deleted = 0
    with Netlink(NETLINK_NETFILTER) as netlink:
        for zone in (0, *_find_zones(netlink)):
            for view in stale_views(translation):
                for pack in (_pack_inbound, _pack_outbound):
                    packed = partial(_pack_in_zone, pack, zone)
                    batch, size = _for_each(view, view, _DELETE, 0, packed)
                    refusals = netlink.send_batch(batch, size)
                    _raise_unless(refusals, errno.ENOENT)
                    deleted += len(view) - len(refusals)
    return deleted


def _find_zones(netlink: Netlink) -> list[int]:
    """The zones other than 0 that have entries; the kernel finds a tuple only in the zone named.

    Where nothing is tracked there are none; otherwise the table is walked (11 ms and more), and
    each entry searched for the attribute's four octets instead of being taken apart.
    """
    if read_setting("nf_conntrack_count") in ("0", None):
        return []
    mark = struct.pack("=HH", 6, _ZONE)
    zones = set()
    for entry in netlink.request(_GET, NLM_F_DUMP, struct.pack("!BBH", 0, 0, 0)):
        if mark in entry:
            at = entry.index(mark) + len(mark)
            zones.add(int.from_bytes(entry[at : at + 2], "big"))
    return sorted(zones - {0})


def insert(translation: Translation) -> None:
    """Create the entry of each kept connection; FileExistsError when one is in the way."""
    outer, inner = _sides(translation)
    _raise_unless(_insert(outer, inner, established_timeout(), ports=translation.renames))


def give_back(translation: Translation) -> None:
    """Create the entries that a gateway had of its own, where there are none now.

    They must not wait for a packet: if the process's is the first, it would leave untranslated,
    or not at all. They last as long as the connection, or only briefly when it has ended.
    """
    ports = translation.renames
    refusals = _insert(translation.outer, translation.kept, _GIVEN_BACK_S, ports=ports)
    _raise_unless(refusals, errno.EEXIST)


def _insert(outer: Connections, inner: Connections, timeout: int, *, ports: bool) -> list[Refusal]:
    pack: _Pack = partial(_pack_entry, timeout=timeout, ports=ports)
    batch, size = _for_each(outer, inner, _NEW, NLM_F_CREATE | NLM_F_EXCL, pack)
    with Netlink(NETLINK_NETFILTER) as netlink:
        return list(netlink.send_batch(batch, size))


def _sides(translation: Translation) -> tuple[Connections, Connections]:
    """What conntrack sees on the peer's and on the process' side (see plan.entries)."""
    if translation.mode == Mode.STATELESS:
        return translation.inner, translation.inner
    return translation.outer, translation.inner


def delete(translation: Translation) -> None:
    """Delete the entries of the kept connections as they arrive at the site; none is fine."""
    outer, _ = _sides(translation)
    batch, size = _for_each(outer, outer, _DELETE, 0, lambda o, _: _pack_inbound(o))
    with Netlink(NETLINK_NETFILTER) as netlink:
        _raise_unless(netlink.send_batch(batch, size), errno.ENOENT)


def look_up(translation: Translation) -> Iterator[SeenEntry | None]:
    """For each kept connection what the table shows, or None when it has no such entry."""
    outer, inner = _sides(translation)
    batch, size = _for_each(outer, outer, _GET, 0, lambda o, _: _pack_inbound(o))
    version = translation.map.old.version
    records, width = inner.records(version), RECORD_SIZE[version]
    translated = IPS_DST_NAT if translation.mode == Mode.STATEFUL else 0
    with Netlink(NETLINK_NETFILTER) as netlink:
        for index, answer in enumerate(netlink.send_queries(batch, size)):
            wanted = records[index * width : (index + 1) * width]
            if answer is None:
                yield None
            else:
                yield _see(attributes(answer[4:]), wanted, translated)


def find_carried(connections: Connections) -> Iterator[FourTuple | None]:
    """For each connection, as its process sees it, how its peer sees it; None when just so.

    They differ where this namespace translates already: then the entry that the process' own
    packets belong to has another tuple on its other side.
    """
    batch, size = _for_each(connections, connections, _GET, 0, lambda o, _: _pack_outbound(o))
    version = 4 if connections.v4 else 6
    records, width = connections.records(version), RECORD_SIZE[version]
    with Netlink(NETLINK_NETFILTER) as netlink:
        for index, answer in enumerate(netlink.send_queries(batch, size)):
            record = records[index * width : (index + 1) * width]
            yield None if answer is None else _find_carrier(attributes(answer[4:]), record)


def _find_carrier(entry: dict[int, bytes], record: bytes) -> FourTuple | None:
    if int.from_bytes(entry[_STATUS], "big") & _IPS_OFFLOAD:
        raise RefusedError(
            "a kept connection is offloaded to a flowtable, where no rule sees its packets",
            hint="take it out of the flowtable, and wait a second",
        )
    original, reply = (_read_tuple(entry[type_]) for type_ in (_TUPLE_ORIG, _TUPLE_REPLY))
    if reply == record:  # the peer dialled: its tuple is the original one
        carrier = original[len(original) // 2 :] + original[: len(original) // 2]
    elif original == record:  # the process dialled: the peer answers with the reply tuple
        carrier = reply[len(reply) // 2 :] + reply[: len(reply) // 2]
    else:
        return None
    if carrier == record:
        return None
    packed = Connections(v4=carrier) if len(carrier) == 12 else Connections(v6=carrier)
    return next(iter(packed))


def _read_tuple(data: bytes) -> bytes:
    """Source and destination, packed as a record: a reply's source is the local end."""
    tuple_ = attributes(data)
    ip, proto = attributes(tuple_[1]), attributes(tuple_[2])
    source, destination = (ip.get(1) or ip[3]), (ip.get(2) or ip[4])
    return source + proto.get(2, b"\0\0") + destination + proto.get(3, b"\0\0")


def _see(entry: dict[int, bytes], wanted: bytes, translated: int) -> SeenEntry:
    status = int.from_bytes(entry[_STATUS], "big")
    return SeenEntry(
        translated=status & IPS_DST_NAT == translated
        and _read_tuple(entry[_TUPLE_REPLY]) == wanted,
        packets_in=_packets(entry.get(_COUNTERS_ORIG)),
        packets_out=_packets(entry.get(_COUNTERS_REPLY)),
        alive=_tcp_state(entry) in _ALIVE,
    )


def _tcp_state(entry: dict[int, bytes]) -> int:
    tcp = attributes(attributes(entry.get(_PROTOINFO, b"")).get(1, b""))
    return tcp.get(1, b"\0")[0]


def _packets(counters: bytes | None) -> int | None:
    return None if counters is None else int.from_bytes(attributes(counters)[1], "big")


def established_timeout() -> int:
    """Seconds, as this namespace is set."""
    value = read_setting("nf_conntrack_tcp_timeout_established")
    return int(value) if value is not None else ESTABLISHED_TIMEOUT


def read_setting(name: str) -> str | None:
    """A conntrack sysctl of this thread's namespace, or None when it cannot be read."""
    try:
        with open(f"{_SETTINGS}/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def write_setting(name: str, value: str) -> bool:
    """Set a conntrack sysctl of this thread's namespace; whether that could be done."""
    try:
        with open(f"{_SETTINGS}/{name}", "w", encoding="ascii") as file:
            file.write(value)
    except OSError:
        return False
    return True


def _raise_unless(refusals: Iterable[Refusal], tolerated: int = 0) -> None:
    for refusal in refusals:
        if refusal.errno != tolerated:
            raise OSError(refusal.errno, os.strerror(refusal.errno))


def _pack_entry(outer: _Tuple, inner: _Tuple, *, timeout: int, ports: bool) -> bytes:
    flags = bytes((TCP_FLAGS, TCP_FLAGS))
    state = attribute(1, bytes((TCP_ESTABLISHED,)))
    entry = (
        _pack_inbound(outer)
        + _pack_outbound(outer, _TUPLE_REPLY)
        + attribute(_STATUS, STATUS.to_bytes(4, "big"))
        + nested(_PROTOINFO, nested(1, state, attribute(4, flags), attribute(5, flags)))
        + attribute(_TIMEOUT, timeout.to_bytes(4, "big"))
    )
    if outer.local != inner.local or ports:
        entry += _pack_nat(_NAT_DST, inner.local, inner.local_port if ports else None)
    if ports:
        # Also where the peer stays what it is: a source that is named is not chosen anew.
        entry += _pack_nat(_NAT_SRC, inner.peer, inner.peer_port)
    return entry


def _pack_nat(type_: int, address: bytes, port: bytes | None) -> bytes:
    minimum, maximum = (1, 2) if len(address) == 4 else (4, 5)
    parts = [attribute(minimum, address), attribute(maximum, address)]
    if port is not None:
        parts.append(nested(3, attribute(1, port), attribute(2, port)))
    return nested(type_, *parts)


def _pack_in_zone(pack: Callable[[_Tuple], bytes], zone: int, outer: _Tuple, _: _Tuple) -> bytes:
    return pack(outer) + (attribute(_ZONE, zone.to_bytes(2, "big")) if zone else b"")


def _pack_inbound(end: _Tuple, type_: int = _TUPLE_ORIG) -> bytes:
    """The tuple peer to local end."""
    return _pack_tuple(type_, end.peer, end.local, end.peer_port, end.local_port)


def _pack_outbound(end: _Tuple, type_: int = _TUPLE_ORIG) -> bytes:
    """The tuple local end to peer."""
    return _pack_tuple(type_, end.local, end.peer, end.local_port, end.peer_port)


def _pack_tuple(type_: int, saddr: bytes, daddr: bytes, sport: bytes, dport: bytes) -> bytes:
    source, destination = (1, 2) if len(saddr) == 4 else (3, 4)
    return nested(
        type_,
        nested(1, attribute(source, saddr), attribute(destination, daddr)),
        nested(2, attribute(1, b"\x06"), attribute(2, sport), attribute(3, dport)),
    )


def _for_each(
    outer: Connections, inner: Connections, type_: int, flags: int, pack: _Pack
) -> tuple[bytearray, int]:
    """One message for each connection, its sequence number its index; and their size.

    *pack* is called only for a template and to learn where in it each field stands: what the
    connections have in common is in the template, what differs is written over it in columns.
    """
    version = 4 if outer.v4 else 6
    size, width = RECORD_SIZE[version], _WIDTH[version]
    count = len(outer)
    first = [_first_tuple(side.records(version), width) for side in (outer, inner)]

    def make(ends: list[_Tuple]) -> bytes:
        body = struct.pack("!BBH", _AF[version], 0, 0) + pack(ends[0], ends[1])
        return message(type_, flags, body)

    template = make(first)
    columns = [(8, sequences(count))]
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
    return replicate(template, columns, count), len(template)


def _first_tuple(records: bytes, width: int) -> _Tuple:
    peer = width + 2
    return _Tuple(
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
