"""Keeps the datagrams that peers send while the gate is closed, and packs them to be replayed.

Rule: a datagram is replayed whole, once, in the order of arrival, changed in nothing but its ends
(NEW to OLD, the peer as the process knows it), its checksums, and the fragmentation or offload that
it arrived in. Two that are equal are two. Work and memory are bounded whatever a peer sends.
The holder (kernel/segment_holderd.py) loads this file into a bare interpreter, so nothing but
`struct` and replay.py is imported.
This file must never read a file, a clock, a socket or a namespace.

Where there is no room the newest is refused, as a socket does whose buffer is full: what the
process reads is what it would have read had it been stopped for as long. What is older than AGE is
dropped, at its delivery or where it takes the room of another.
"""

from __future__ import annotations

from struct import pack, unpack_from

from natkeep.plan.replay import SEGMENT_COST, checksum, make_header, pseudo_header

AGE = 5.0
"""Seconds for which a datagram is held: a resolver has asked again by then (resolv.conf, timeout),
and to a program that is in no hurry it is a datagram lost."""
TOTAL = 16 << 20
"""Octets that all datagrams of a move may cost together."""
EACH = 1 << 20
"""Octets that those of one socket may cost, five times what its buffer has room for by default."""

_INCOMPLETE = 64
"""Datagrams of which fragments are awaited, at most; then the oldest is given up."""
_FRAGMENTS = 128
"""Fragments of one datagram, at most: 64 KiB in links of 576 octets have 119."""

_UDP, _FRAGMENT_HEADER = 17, 44
_MORE, _OFFSET = 0x2000, 0x1FFF
_UDP_SIZE = 8
_MOST = 0xFFFF


class Datagram:
    """One that is held, as the packet that brings it back: to OLD, from the known peer.

    It is made as it arrives, since its delivery is inside the blackout.
    at: when it arrived, in seconds of a clock that only goes forward. end: the key in the table by
    which it was taken. known: its key as the process knows it; replay.py has the form. octets: of
    what the process reads.
    """

    __slots__ = ("at", "end", "known", "octets", "packet")

    def __init__(self, at: float, end: bytes, known: bytes, ip: bytes, data: bytes) -> None:
        self.at, self.end, self.known, self.octets = at, end, known, len(data)
        length = _UDP_SIZE + len(data)
        header = make_header(ip, known, length)
        udp = pack("!4sHH", known[-4:], length, 0) + data
        found = checksum(pseudo_header(header, length, _UDP) + udp) or _MOST  # 0: without one
        self.packet = b"".join((header, udp[:6], pack("!H", found), data))

    @property
    def cost(self) -> int:
        """Octets, in the terms of the bounds."""
        return self.octets + SEGMENT_COST


class Fragments:
    """Fragments, until their datagram is whole."""

    def __init__(self) -> None:
        self.parts: dict[bytes, dict[int, bytes]] = {}
        self.headers: dict[bytes, bytes] = {}
        self.sizes: dict[bytes, int] = {}

    def add(
        self, key: bytes, ip: bytes, offset: int, data: bytes, *, more: bool
    ) -> tuple[bytes, bytes] | None:
        """The datagram that *data* makes whole: its first IP header, and what is behind it."""
        if key not in self.parts and len(self.parts) >= _INCOMPLETE:
            self.drop(next(iter(self.parts)))
        parts = self.parts.setdefault(key, {})
        parts.setdefault(offset, data)
        if not offset:
            self.headers[key] = ip
        if not more:
            self.sizes[key] = offset + len(data)
        length, size = sum(map(len, parts.values())), self.sizes.get(key, _MOST + 1)
        if length < min(size, _MOST + 1) and len(parts) <= _FRAGMENTS:
            return None
        whole = b"".join(parts[at] for at in sorted(parts))
        # Those that overlap are of nothing that a peer would send (RFC 5722).
        ends = {at + len(part) for at, part in parts.items()} | {0}
        fits = length == size and key in self.headers and ends.issuperset(parts)
        header = self.headers.get(key, b"")
        self.drop(key)
        return (header, whole) if fits else None

    def drop(self, key: bytes) -> None:
        """Forget what there is of one datagram."""
        for some in (self.parts, self.headers, self.sizes):
            some.pop(key, None)


class Datagrams:
    """All datagrams of a move, in the order of arrival.

    kept: for each key of a socket, as what is sent to it arrives, that by which the process knows
    it (replay.unpack_kept). Where the peer in a key is all zeros, the socket has any peer.
    """

    def __init__(self, kept: dict[bytes, bytes], total: int = TOTAL, each: int = EACH) -> None:
        self.kept, self.total, self.each = kept, total, each
        self.held: list[Datagram] = []
        self.costs: dict[bytes, int] = {}
        self.fragments = Fragments()
        self.cost = self.refused = 0

    def add(self, packet: bytes, at: float, *, size: int = 0, verify: bool = False) -> None:
        """Keep what is in *packet*, if it is to a socket that is kept.

        at: now. size: of the datagrams that an offload has put together in it (UDP_SEGMENT,
        UDP_GRO), or 0. verify: its checksum has to be right.
        """
        found = self._take_apart(packet)
        if found is None:
            return
        ip, udp, whole = found
        length = unpack_from("!H", udp, 4)[0] if len(udp) >= _UDP_SIZE else 0
        if not _UDP_SIZE <= length <= len(udp):
            return
        udp = udp[:length]
        if (verify or whole) and not _is_intact(ip, udp):
            return
        end = key = _key(ip, udp)
        width = (len(key) - 4) // 2
        if key not in self.kept:
            end = key[:width] + bytes(width + 2) + key[-2:]
        if end not in self.kept:
            return
        known = self.kept[end]
        if end is not key:  # of any peer: this one
            known = known[:width] + key[width:-2] + known[-2:]
        step = size or length
        for first in range(_UDP_SIZE, max(length, _UDP_SIZE + 1), step):
            data = udp[first : first + step]
            if self._makes_room(end, len(data) + SEGMENT_COST, at):
                self.held.append(Datagram(at, end, known, ip, data))

    def _makes_room(self, end: bytes, cost: int, now: float) -> bool:
        """Whether there is room for one more to the socket of *end*, which then is taken."""
        if not self._has_room(end, cost):
            self.expire(now)
            if not self._has_room(end, cost):
                self.refused += 1
                return False
        self.costs[end] = self.costs.get(end, 0) + cost
        self.cost += cost
        return True

    def _has_room(self, end: bytes, cost: int) -> bool:
        return self.costs.get(end, 0) + cost <= self.each and self.cost + cost <= self.total

    def expire(self, now: float) -> None:
        """Drop what is older than AGE."""
        old = 0
        while old < len(self.held) and now - self.held[old].at > AGE:
            self._take_off(self.held[old])
            old += 1
        self.refused += old
        del self.held[:old]

    def _take_off(self, one: Datagram) -> None:
        self.cost -= one.cost
        self.costs[one.end] -= one.cost

    def take(self, now: float) -> list[Datagram]:
        """All that is held, oldest first, and to be delivered; it is held no more."""
        self.expire(now)
        taken, self.held = self.held, []
        self.costs.clear()
        self.cost = 0
        return taken

    def _take_apart(self, packet: bytes) -> tuple[bytes, bytes, bool] | None:
        """IP header and UDP datagram of *packet*, and whether fragments were put together."""
        if len(packet) < 28:
            return None
        if packet[0] >> 4 == 4:
            start, total = (packet[0] & 15) * 4, unpack_from("!H", packet, 2)[0]
            place = unpack_from("!H", packet, 6)[0]
            if start < 20 or packet[9] != _UDP or not start <= total <= len(packet):
                return None
            ip = packet[:start]
            if not place & (_MORE | _OFFSET):
                return ip, packet[start:total], False
            ip, data = packet[:6] + b"\0\0" + packet[8:start], packet[start:total]
            key, offset, more = packet[4:6] + packet[12:20], (place & _OFFSET) * 8, place & _MORE
        else:
            total = 40 + unpack_from("!H", packet, 4)[0]
            if packet[0] >> 4 != 6 or not 48 <= total <= len(packet):
                return None
            if packet[6] == _UDP:
                return packet[:40], packet[40:total], False
            if packet[6] != _FRAGMENT_HEADER or packet[40] != _UDP:
                return None
            place = unpack_from("!H", packet, 42)[0]
            ip, data = packet[:6] + bytes((_UDP,)) + packet[7:40], packet[48:total]
            key, offset, more = packet[44:48] + packet[8:40], place & 0xFFF8, place & 1
        found = self.fragments.add(key, ip, offset, data, more=bool(more))
        return None if found is None else (*found, True)


def _key(ip: bytes, udp: bytes) -> bytes:
    """Local address, peer address, peer port and local port, as they stand in the packet."""
    ends = ip[16:20] + ip[12:16] if ip[0] >> 4 == 4 else ip[24:40] + ip[8:24]
    return ends + udp[:4]


def _is_intact(ip: bytes, udp: bytes) -> bool:
    """Whether the checksum is right; IPv4 can do without."""
    if udp[6:8] == b"\0\0":
        return ip[0] >> 4 == 4
    return checksum(pseudo_header(ip, len(udp), _UDP) + udp) == _MOST
