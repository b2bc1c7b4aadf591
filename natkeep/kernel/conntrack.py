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

from natkeep.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
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
)
from natkeep.plan.move import Translation
from natkeep.plan.tuples import RECORD_SIZE, Address

_NEW, _GET, _DELETE = (1 << 8) | 0, (1 << 8) | 1, (1 << 8) | 2
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT = 1, 2, 3, 4, 7
_COUNTERS_ORIG, _COUNTERS_REPLY, _NAT_DST = 9, 10, 13
_AF = {4: 2, 6: 10}
_WIDTH = {4: 4, 6: 16}

_ALIVE = range(TCP_ESTABLISHED, 7)
"""ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK; TIME_WAIT and CLOSE have ended."""

_SETTINGS = "/proc/sys/net/netfilter"


@dataclass(frozen=True, slots=True)
class _Variable:
    """What differs between the connections of a translation, as octets of a packet."""

    peer: bytes
    peer_port: bytes
    local_port: bytes


def purge(translation: Translation) -> int:
    """Delete every entry that has one of the stale tuples; the number that there were."""
    deleted = 0
    with Netlink(NETLINK_NETFILTER) as netlink:
        for local in (translation.before, translation.after):
            for pack in (_pack_original, _pack_inverse):
                batch, size = _for_each(translation, _DELETE, 0, partial(pack, local))
                refusals = netlink.send_batch(batch, size)
                _raise_unless(refusals, errno.ENOENT)
                deleted += len(translation.kept) - len(refusals)
    return deleted


def insert(translation: Translation) -> None:
    """Create the entry of each kept connection; FileExistsError when one is in the way."""
    timeout = established_timeout()
    batch, size = _for_each(
        translation,
        _NEW,
        NLM_F_CREATE | NLM_F_EXCL,
        partial(_pack_entry, translation.before, translation.after, timeout),
    )
    with Netlink(NETLINK_NETFILTER) as netlink:
        _raise_unless(netlink.send_batch(batch, size))


def delete(translation: Translation) -> None:
    """Delete the entries of the kept connections as they arrive at the site; none is fine."""
    batch, size = _for_each(translation, _DELETE, 0, partial(_pack_original, translation.before))
    with Netlink(NETLINK_NETFILTER) as netlink:
        _raise_unless(netlink.send_batch(batch, size), errno.ENOENT)


def look_up(translation: Translation) -> Iterator[SeenEntry | None]:
    """For each kept connection what the table shows, or None when it has no such entry."""
    batch, size = _for_each(translation, _GET, 0, partial(_pack_original, translation.before))
    wanted = translation.after.packed
    with Netlink(NETLINK_NETFILTER) as netlink:
        for answer in netlink.send_queries(batch, size):
            yield None if answer is None else _see(attributes(answer[4:]), wanted)


def _see(entry: dict[int, bytes], wanted: bytes) -> SeenEntry:
    reply = attributes(attributes(entry[_TUPLE_REPLY])[1])
    source = reply.get(1) or reply.get(3, b"")
    status = int.from_bytes(entry[_STATUS], "big")
    return SeenEntry(
        translated=bool(status & IPS_DST_NAT) and source == wanted,
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


def _pack_entry(before: Address, after: Address, timeout: int, var: _Variable) -> bytes:
    minimum, maximum = (1, 2) if before.version == 4 else (4, 5)
    flags = bytes((TCP_FLAGS, TCP_FLAGS))
    state = attribute(1, bytes((TCP_ESTABLISHED,)))
    return (
        _pack_original(before, var)
        + _pack_inverse(before, var, _TUPLE_REPLY)
        + attribute(_STATUS, STATUS.to_bytes(4, "big"))
        + nested(_PROTOINFO, nested(1, state, attribute(4, flags), attribute(5, flags)))
        + attribute(_TIMEOUT, timeout.to_bytes(4, "big"))
        + nested(_NAT_DST, attribute(minimum, after.packed), attribute(maximum, after.packed))
    )


def _pack_original(local: Address, var: _Variable) -> bytes:
    """The tuple peer to *local*."""
    return _pack_tuple(_TUPLE_ORIG, var.peer, local.packed, var.peer_port, var.local_port)


def _pack_inverse(local: Address, var: _Variable, type_: int = _TUPLE_ORIG) -> bytes:
    """The tuple *local* to peer."""
    return _pack_tuple(type_, local.packed, var.peer, var.local_port, var.peer_port)


def _pack_tuple(type_: int, saddr: bytes, daddr: bytes, sport: bytes, dport: bytes) -> bytes:
    source, destination = (1, 2) if len(saddr) == 4 else (3, 4)
    return nested(
        type_,
        nested(1, attribute(source, saddr), attribute(destination, daddr)),
        nested(2, attribute(1, b"\x06"), attribute(2, sport), attribute(3, dport)),
    )


def _for_each(
    translation: Translation, type_: int, flags: int, pack: Callable[[_Variable], bytes]
) -> tuple[bytearray, int]:
    """One message for each kept connection, its sequence number its index; and their size.

    *pack* is called only for a template and to learn where in it each variable stands.
    """
    version = translation.map.old.version
    records, size, width = translation.kept.records(version), RECORD_SIZE[version], _WIDTH[version]
    count = len(records) // size

    def make(var: _Variable) -> bytes:
        return message(type_, flags, struct.pack("!BBH", _AF[version], 0, 0) + pack(var))

    blank = _Variable(bytes(width), b"\0\0", b"\0\0")
    template = make(blank)
    columns = [(8, sequences(count))]
    for name, start in (("peer", width + 2), ("peer_port", 2 * width + 2), ("local_port", width)):
        octets = len(getattr(blank, name))
        values = column(records, size, start, octets)
        marked = make(replace(blank, **{name: b"\xff" * octets}))
        columns += [(at, values) for at in _differences(template, marked, octets)]
    return replicate(template, columns, count), len(template)


def _differences(blank: bytes, marked: bytes, octets: int) -> Iterator[int]:
    """Where *marked* differs from *blank*, each place *octets* wide."""
    at = 0
    while at < len(blank):
        if blank[at] != marked[at]:
            yield at
            at += octets
        else:
            at += 1
