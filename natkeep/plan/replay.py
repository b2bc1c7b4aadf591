"""Keeps the segments that peers send while the gate is closed, and packs them to be replayed.

Rule: only what a peer sent is replayed, changed in nothing but its destination (NEW to OLD), its
source where the process knows the peer by another address, both checksums, and where a segment had
to be cut. Never a SYN, an RST or urgent data, never an octet twice, nothing whose length or
checksum is not that of the whole packet. Work and memory are bounded whatever a peer sends: a
packet costs a look at RUNS runs and one place in a sorted list.
The holder (kernel/segment_holderd.py) loads this file into a bare interpreter, so nothing but
`struct` and `bisect` is imported.
This file must never read a file, a clock, a socket or a namespace.

Theory of operation. For each kept connection a `Stream` keeps data by its place in the sequence:

    of a segment that overlaps what is held, only the octets that are not held are kept
    a whole retransmission of the newest segment gives it its own headers and place in the order
    of acknowledgements without data only the newest is kept, and only until data follows it
    segments are replayed in the order of arrival (`Store.replay`)

- In the order of arrival no timestamp is older than the one before, which PAWS would drop. So
  the first copy of the first segment stays where others have followed it: the newest one, behind
  them, would have each of them answered as out of order, the peer would send the first once more,
  and with that newer timestamp accepted the rest of ours would be too old.
- Where nothing has followed, the newest copy is the better one: the peer takes its round-trip
  time, and from it its next time-outs, from the timestamp that is echoed.
- A peer sends no more than the window and waits, and repeats the *first* octets. So what arrives
  when there is no room is refused at the right end: what is held stays one run without a hole,
  and what lies behind it is sent again as soon as the run is acknowledged. Once something has
  been refused, nothing to the right of it is taken (`Stream.ceiling`).
- A segment costs its payload and SEGMENT_COST more, so one bound in octets bounds the number of
  segments too. When all streams together have too much, the bound of each is halved, and those
  that are above it lose their right ends: a few that send much never starve the others.
- What is held of a stream is RUNS runs at most, with holes between them: a peer that leaves more
  holes sends what is refused again.
"""

from __future__ import annotations

from bisect import insort
from struct import pack, pack_into, unpack_from

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from collections.abc import Iterator

TOTAL = 64 << 20
"""Octets that all streams of a move may cost together."""
EACH = 4 << 20
"""Octets that one stream may cost: a window of data."""
LEAST = 4096
"""Octets to which the bound of a stream never falls: a segment of the usual size and one more."""
SEGMENT_COST = 512
"""What a segment costs beside its payload: about what Python needs for it."""
RUNS = 64
"""Runs of octets, with holes between them, that are held of one stream at most."""

PACKET_SIZE = 31 * 1024
"""Octets of an IP packet that is replayed, at most.

With what the kernel adds it fits 32 KiB of memory, so that a full window fits the receive buffer.
"""

_TCP = 6
_FIN, _SYN, _RST, _URG = 0x01, 0x02, 0x04, 0x20
_SPAN = 1 << 32
_RECORD = {4: (4, 12), 6: (16, 36)}
"""Octets of an address, and of a record of plan/tuples.py."""


class Segment:
    """A TCP segment as it arrived: its headers apart, padding and offload taken off.

    key: local address, peer address, peer port and local port, as they stand in the packet.
    length: the octets that it takes in the sequence, FIN included.
    """

    __slots__ = ("acknowledges_only", "fin", "ip", "key", "length", "payload", "seq", "tcp")

    def __init__(self, key: bytes, ip: bytes, tcp: bytes, payload: bytes) -> None:
        self.key, self.ip, self.tcp, self.payload = key, ip, tcp, payload
        self.fin = bool(tcp[13] & _FIN)
        self.seq: int = unpack_from("!I", tcp, 4)[0]
        self.length = len(payload) + self.fin
        self.acknowledges_only = not self.length

    def is_intact(self) -> bool:
        """Whether its checksum is right; one that the kernel computes later is not in it yet."""
        length = len(self.tcp) + len(self.payload)
        pseudo = pseudo_header(self.ip, length, _TCP)
        return checksum(b"".join((pseudo, self.tcp, self.payload))) == 0xFFFF


def parse(packet: bytes) -> Segment | None:
    """The segment in *packet*, which begins with its IP header; None for what is not held."""
    if len(packet) < 40:
        return None
    version = packet[0] >> 4
    if version == 4:
        start, total = (packet[0] & 15) * 4, unpack_from("!H", packet, 2)[0]
        if start < 20 or packet[9] != _TCP or unpack_from("!H", packet, 6)[0] & 0x3FFF:
            return None
        ends = packet[16:20] + packet[12:16]
    elif version == 6:
        start, total = 40, unpack_from("!H", packet, 4)[0]
        total += 40 if total else 0
        if packet[6] != _TCP:
            return None
        ends = packet[24:40] + packet[8:24]
    else:
        return None
    if not total and len(packet) > 0xFFFF:
        total = len(packet)  # BIG TCP: the length does not fit its field
    if len(packet) < total or total < start + 20:
        return None
    data = start + (packet[start + 12] >> 4) * 4
    if data < start + 20 or data > total or packet[start + 13] & (_SYN | _RST | _URG):
        return None
    key = ends + packet[start : start + 4]
    return Segment(key, packet[:start], packet[start:data], packet[data:total])


class Piece:
    """Octets *start* to *end* (FIN included) of a stream, with the headers that brought them.

    number: its place in the order of arrival at the store.
    """

    __slots__ = ("end", "fin", "ip", "number", "payload", "start", "tcp")

    def __init__(
        self, number: int, segment: Segment, start: int, payload: bytes, *, fin: bool
    ) -> None:
        # Not the segment: that has all of its payload, of which this may be an octet.
        self.number, self.ip, self.tcp = number, segment.ip, segment.tcp
        self.payload, self.fin = payload, fin
        self.start, self.end = start, start + len(payload) + fin

    @property
    def cost(self) -> int:
        """Octets, in the terms of the bounds."""
        return len(self.payload) + SEGMENT_COST


class Stream:
    """What is held of one connection.

    known: its key as the process knows it, by which it is replayed.
    Places in the sequence are counted from the first segment that arrived. pieces: in the order of
    the sequence; runs: what they cover, start and end; newest: those that arrived last.
    """

    __slots__ = (
        "acknowledgement", "base", "ceiling", "cost", "known", "newest", "pieces", "refused",
        "runs",
    )  # fmt: skip

    def __init__(self, known: bytes, base: int) -> None:
        self.known, self.base = known, base
        self.pieces: list[Piece] = []
        self.newest: list[Piece] = []
        self.runs: list[tuple[int, int]] = []
        self.acknowledgement: Piece | None = None
        self.cost = self.refused = 0
        self.ceiling: int | None = None

    def add(self, number: int, segment: Segment, limit: int) -> None:
        """Keep *segment* as far as *limit* allows."""
        start = (segment.seq - self.base + _SPAN // 2) % _SPAN - _SPAN // 2
        if segment.acknowledges_only:
            self.cost += SEGMENT_COST if self.acknowledgement is None else 0
            self.acknowledgement = Piece(number, segment, start, b"", fin=False)
            return
        end = start + segment.length
        if self.ceiling is not None and start > self.ceiling:
            self.refused += 1
            return
        gaps = self._cover(start, end)
        if gaps is None:
            self.refused += 1
            return
        if self.ceiling is not None:
            self.ceiling = max(self.ceiling, end)
        if self.acknowledgement is not None:
            self.acknowledgement = None  # data says the same, and newer
            self.cost -= SEGMENT_COST
        for held in self.newest:
            if start <= held.start and held.end <= end:
                held.number, held.ip, held.tcp = number, segment.ip, segment.tcp
        if gaps:
            self.newest = [self._keep(number, segment, start, gap) for gap in gaps]
        if self.cost > limit:
            self.shrink(limit)

    def _cover(self, start: int, end: int) -> list[tuple[int, int]] | None:
        """What of *start* to *end* is not held, and now will be; None if that is a run too many."""
        gaps, apart, at, run = [], [], start, (start, end)
        for held in self.runs:
            if held[1] < start or end < held[0]:
                apart.append(held)
                continue
            if at < held[0]:
                gaps.append((at, held[0]))
            at = max(at, held[1])
            run = min(run[0], held[0]), max(run[1], held[1])
        if at < end:
            gaps.append((at, end))
        if len(apart) >= RUNS:
            return None
        self.runs = sorted([*apart, run])
        return gaps

    def _keep(self, number: int, segment: Segment, start: int, gap: tuple[int, int]) -> Piece:
        payload, fin = segment.payload, segment.fin and gap[1] == start + segment.length
        payload = payload[gap[0] - start : gap[1] - start]
        piece = Piece(number, segment, gap[0], payload, fin=fin)
        insort(self.pieces, piece, key=lambda held: held.start)
        self.cost += piece.cost
        return piece

    def shrink(self, limit: int) -> None:
        """Drop what does not fit, from the right end."""
        while self.pieces and self.cost > limit:
            piece = self.pieces.pop()
            self.cost -= piece.cost
            self.refused += 1
            self.ceiling = piece.start
            first, _ = self.runs.pop()
            if first < piece.start:
                self.runs.append((first, piece.start))
        if self.acknowledgement is not None and self.cost > limit:
            self.acknowledgement = None
            self.cost -= SEGMENT_COST


class Store:
    """All streams of a move.

    kept: for each key of a kept connection, as it arrives, that by which the process knows it.
    """

    def __init__(self, kept: dict[bytes, bytes], total: int = TOTAL, each: int = EACH) -> None:
        self.kept, self.total, self.each = kept, total, each
        self.streams: dict[bytes, Stream] = {}
        self.cost = self.number = self.cut = 0

    def add(self, packet: bytes, *, verify: bool = False) -> None:
        """Keep what is in *packet*, if it is a segment of a kept connection.

        verify: its checksum has to be right.
        """
        segment = parse(packet)
        if segment is None or segment.key not in self.kept:
            return
        if verify and not segment.is_intact():
            return
        stream = self.streams.get(segment.key)
        if stream is None:
            stream = Stream(self.kept[segment.key], segment.seq)
            self.streams[segment.key] = stream
        self.number += 1
        before = stream.cost
        stream.add(self.number, segment, self.each)
        self.cost += stream.cost - before
        if self.cost > self.total:
            self._shrink(stream)

    def _shrink(self, newest: Stream) -> None:
        while self.cost > self.total and self.each > LEAST:
            self.each = max(self.each // 2, LEAST)
            for stream in self.streams.values():
                stream.shrink(self.each)
            self.cost = sum(stream.cost for stream in self.streams.values())
        if self.cost > self.total:
            before = newest.cost
            newest.shrink(before - (self.cost - self.total))
            self.cost += newest.cost - before

    @property
    def refused(self) -> int:
        """Segments for which there was no room; cut: those that did not fit the buffer."""
        return self.cut + sum(stream.refused for stream in self.streams.values())

    def replay(self) -> Iterator[tuple[Stream, Piece]]:
        """All that is held, oldest first."""
        held = [(piece, stream) for stream in self.streams.values() for piece in stream.pieces]
        held += [(s.acknowledgement, s) for s in self.streams.values() if s.acknowledgement]
        for piece, stream in sorted(held, key=lambda pair: pair[0].number):
            yield stream, piece


def make_packets(stream: Stream, piece: Piece, size: int = PACKET_SIZE) -> Iterator[bytes]:
    """IP packets of at most *size* octets that bring *piece* back, to OLD from the known peer."""
    ip, tcp, at = piece.ip, piece.tcp, 0
    room = size - len(ip) - len(tcp)
    while True:
        payload = piece.payload[at : at + room]
        seq = (stream.base + piece.start + at) % _SPAN
        at += len(payload)
        last = at == len(piece.payload)
        yield _make_packet(ip, tcp, stream.known, seq, payload, fin=piece.fin and last)
        if last:
            return


def _make_packet(
    ip: bytes, tcp: bytes, known: bytes, seq: int, payload: bytes, *, fin: bool
) -> bytes:
    segment = bytearray(tcp)
    length, width = len(segment) + len(payload), (len(known) - 4) // 2
    pack_into("!I", segment, 4, seq)
    segment[:4] = known[2 * width :]
    segment[13] = segment[13] & ~_FIN | (_FIN if fin else 0)
    segment[16:18] = b"\0\0"
    header = make_header(ip, known, length)
    pseudo = pseudo_header(header, length, _TCP)
    pack_into("!H", segment, 16, checksum(b"".join((pseudo, segment, payload))))
    return b"".join((header, segment, payload))


def make_header(ip: bytes, known: bytes, length: int) -> bytearray:
    """The IP header *ip*, from the peer to the local end of *known*, before *length* octets."""
    header, width = bytearray(ip), (len(known) - 4) // 2
    ends = known[width : 2 * width] + known[:width]
    if width == 4:
        pack_into("!H", header, 2, len(header) + length)
        header[12:20], header[10:12] = ends, b"\0\0"
        pack_into("!H", header, 10, checksum(header))
    else:
        pack_into("!H", header, 4, length)
        header[8:40] = ends
    return header


def pseudo_header(header: bytes | bytearray, length: int, protocol: int) -> bytes:
    """What a checksum of *protocol* covers of the IP *header*; length: of what is behind it."""
    ends = header[12:20] if header[0] >> 4 == 4 else header[8:40]
    return b"".join((ends, pack("!II", length, protocol)))


def checksum(octets: bytes | bytearray) -> int:
    """The internet checksum (RFC 1071) of *octets*.

    A sum in ones' complement is a remainder of 65535, and long integers divide faster than a loop.
    """
    if len(octets) % 2:
        octets = bytes(octets) + b"\0"
    return ~(int.from_bytes(octets, "big") % 0xFFFF) & 0xFFFF


def holder_name(move_id: str) -> str:
    """Of the socket in the state directory by which a move's holder is found."""
    return f"{move_id}.hold"


# ---- the holder's connections, as a file ---------------------------------------------------------


def pack_kept(maps: list[tuple[int, bytes, bytes]]) -> bytes:
    """For the holder: of each map its IP version, and the records of its connections.

    As they arrive, and the same as the process sees them, in the same order.
    """
    return b"".join(
        pack("!BI", version, len(arriving)) + arriving + known for version, arriving, known in maps
    )


def unpack_kept(packed: bytes) -> dict[bytes, bytes]:
    """What a Store is made of, from what `pack_kept` made."""
    kept: dict[bytes, bytes] = {}
    at = 0
    while at < len(packed):
        version, length = unpack_from("!BI", packed, at)
        width, size = _RECORD[version]
        at += 5
        for i in range(at, at + length, size):
            kept[_key(packed, i, width, size)] = _key(packed, i + length, width, size)
        at += 2 * length
    return kept


def _key(records: bytes, at: int, width: int, size: int) -> bytes:
    """The key of the record that stands *at*."""
    ports = at + width, at + width + 2
    return records[at : ports[0]] + records[ports[1] : at + size] + records[ports[0] : ports[1]]
