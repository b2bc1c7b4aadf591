"""the question to an end that says nothing: a bare acknowledgement that fits no window.

Whoever owns the connection answers it by what it expects (RFC 9293, 3.10.7.4), and that answer is
what natkeep's rules turn into a reset. So no sequence number has to be known: an image has them
for some connections only, and where a peer stands it cannot say at all.

Rule: nothing is sent but such acknowledgements, for exactly the tuples that were asked for, with
CRIU's mark, so that neither conntrack nor a gate has anything to do with them. Nobody waits for an
answer; a question that cannot be sent is no failure, since whoever speaks is told anyway.
All functions act in the namespace that the calling thread is in.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from natkeep.plan.criu_lock import CRIU_MARK
from natkeep.plan.tuples import FourTuple

SEQUENCES = (0, 1 << 31)
"""One of two numbers that are so far apart is outside of any window."""

_SO_MARK = 36
_IPV6_HDRINCL = 36
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_TCP, _ACK, _HEADER_WORDS, _HOPS = 6, 0x10, 5, 64


def ask(tuples: Iterable[FourTuple]) -> int:
    """Send the question along each of *tuples*, source to destination; how many could be sent."""
    sockets: dict[int, socket.socket] = {}
    asked = 0
    try:
        for tuple_ in tuples:
            version = tuple_.source.address.version
            if version not in sockets:
                sockets[version] = _open(version)
            asked += _send(sockets[version], tuple_)
    except OSError:  # no raw sockets for us here: only who speaks is told
        return asked
    finally:
        for each in sockets.values():
            each.close()
    return asked


def _open(version: int) -> socket.socket:
    raw = socket.socket(_FAMILY[version], socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.setsockopt(socket.SOL_SOCKET, _SO_MARK, CRIU_MARK)
    if version == 6:
        raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
    return raw


def _send(raw: socket.socket, tuple_: FourTuple) -> bool:
    to = (str(tuple_.destination.address), 0)
    try:
        for sequence in SEQUENCES:
            raw.sendto(pack_question(tuple_, sequence), to)
    except OSError:  # no route; a queue that is full
        return False
    return True


def pack_question(tuple_: FourTuple, sequence: int) -> bytes:
    """The packet, from its IP header on; the kernel fills in IPv4's checksum."""
    source, destination = tuple_.source, tuple_.destination
    ends = source.address.packed + destination.address.packed
    ports = (source.port, destination.port)
    flags = _HEADER_WORDS << 12 | _ACK
    plain = struct.pack("!HHIIHHHH", *ports, sequence, sequence, flags, 0, 0, 0)
    checksum = _sum_up(ends + struct.pack("!II", len(plain), _TCP) + plain)
    segment = struct.pack("!HHIIHHHH", *ports, sequence, sequence, flags, 0, checksum, 0)
    if source.address.version == 6:
        return struct.pack("!IHBB", 6 << 28, len(segment), _TCP, _HOPS) + ends + segment
    total = 20 + len(segment)
    return struct.pack("!BBHHHBBH", 0x45, 0, total, 0, 0, _HOPS, _TCP, 0) + ends + segment


def _sum_up(octets: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(octets) // 2}H", octets))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
