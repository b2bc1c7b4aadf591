"""Probes silent ends of connections: a bare acknowledgement that fits no window.

The end of a connection answers it by what it expects (RFC 9293, 3.10.7.4), and that answer is what
natkeep's rules turn into a reset. So no sequence number has to be known: an image has them for some
connections only, and never those of a peer.

Rule: nothing is sent but such acknowledgements, for exactly the tuples that are given, with CRIU's
mark, so that neither conntrack nor a gate has anything to do with them. No answer is awaited; a
probe that cannot be sent is no failure, since an end that sends something is reset anyway. A full
send buffer is waited for, but for PATIENCE in all: packets for a next hop that does not answer fill
it, and the kernel keeps each of them until it has given that hop up (up to 3 s, by default).
All functions act in the namespace that the calling thread is in.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Iterable
from itertools import groupby

from natkeep.plan.criu_lock import CRIU_MARK
from natkeep.plan.tuples import FourTuple

SEQUENCES = (0, 1 << 31)
"""One of two numbers that are so far apart is outside of any window."""

PATIENCE = 0.5
"""Seconds to wait for send buffers, all probes of one call together: `open` waits for them."""

_SO_MARK = 36
_IPV6_HDRINCL = 36
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
_TCP, _ACK, _HEADER_WORDS, _HOPS = 6, 0x10, 5, 64


def probe(tuples: Iterable[FourTuple]) -> int:
    """Send a probe along each of *tuples*, source to destination; how many could be sent."""
    sent, patience = 0, _Patience(PATIENCE)
    try:
        # A socket each, or what waits for one peer's next hop would be in the way of others.
        for address, some in groupby(tuples, key=lambda each: each.destination.address):
            with _open(address.version) as raw:
                sent += sum(_send(raw, tuple_, patience) for tuple_ in some)
    except OSError:  # raw sockets are not permitted: only ends that send something are reset
        return sent
    return sent


def _open(version: int) -> socket.socket:
    raw = socket.socket(_FAMILY[version], socket.SOCK_RAW, socket.IPPROTO_RAW)
    raw.setblocking(False)
    raw.setsockopt(socket.SOL_SOCKET, _SO_MARK, CRIU_MARK)
    if version == 6:
        raw.setsockopt(socket.IPPROTO_IPV6, _IPV6_HDRINCL, 1)
    return raw


class _Patience:
    """Waits for send buffers, until *seconds* have been waited in all."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def wait(self, raw: socket.socket) -> bool:
        """Whether there is room again."""
        began = time.monotonic()
        _, room, _ = select.select([], [raw], [], self._left)
        self._left = max(0.0, self._left - (time.monotonic() - began))
        return bool(room)


def _send(raw: socket.socket, tuple_: FourTuple, patience: _Patience) -> bool:
    to = (str(tuple_.destination.address), 0)
    try:
        for sequence in SEQUENCES:
            packet = pack_probe(tuple_, sequence)
            try:
                raw.sendto(packet, to)
            except BlockingIOError:
                if not patience.wait(raw):
                    return False
                raw.sendto(packet, to)
    except OSError:  # no route; a queue that is full
        return False
    return True


def pack_probe(tuple_: FourTuple, sequence: int) -> bytes:
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
