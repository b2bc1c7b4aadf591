"""Packs and reads netlink messages and attributes: by the thousand, and dumps as bytes.

Rule: this file knows netlink's framing (netlink(7)) and nothing of what is in a message; what
conntrack, nf_tables, rtnetlink and sock_diag put there is in the files of these names.

Why own code: what builds an object for each message takes five to twenty times as long for
100,000 set elements or conntrack entries, inside the blackout (docs/performance.md).

Two traps (seen on Linux 6.18). Errors are answered without NLM_F_ACK too, so only the last message
of a batch has the flag: when its acknowledgement has arrived, all errors before it have, too. And
close() of an nfnetlink socket after a *deletion* in nf_tables waits for an RCU grace period (6 to
47 ms).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator

from natkeep import faultpoints
from natkeep.values import dataclass

NETLINK_ROUTE = 0
NETLINK_NETFILTER = 12

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP = 0x300
_NLM_F_DUMP_INTR = 0x10
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_APPEND = 0x800

_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_NLA_NESTED = 0x8000
_NLA_TYPE = 0x3FFF
_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")

BUFFER = 1 << 22
"""Octets asked for as socket buffers; a transaction that is longer is given what it needs."""

CHUNK = 1 << 17
"""Octets of independent messages that are sent before their answers are read."""

_DATAGRAM = 1 << 18
"""Octets of the longest datagram; a dump's are 32 KiB, and pages not written to cost nothing."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The kernel's refusal of message number *index* of a batch; errno is positive."""

    index: int
    errno: int


def message(type_: int, flags: int, body: bytes, sequence: int = 0) -> bytes:
    """One netlink message; NLM_F_REQUEST is added."""
    length = _HEADER.size + len(body)
    return _HEADER.pack(length, type_, flags | NLM_F_REQUEST, sequence, 0) + body


def attribute(type_: int, value: bytes) -> bytes:
    """One attribute, padded to four octets."""
    return _ATTRIBUTE.pack(4 + len(value), type_) + value + bytes(-len(value) % 4)


def nested(type_: int, *attributes: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attribute(type_ | _NLA_NESTED, b"".join(attributes))


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in *data*, by type (the last one wins)."""
    found: dict[int, bytes] = {}
    offset = 0
    while offset + 4 <= len(data):
        length, type_ = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found[type_ & _NLA_TYPE] = data[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def find_attribute(data: bytes, type_: int) -> bytes:
    """The first attribute of that type; empty where there is none."""
    offset, end = 0, len(data) - 4
    while offset <= end:
        length, here = _ATTRIBUTE.unpack_from(data, offset)
        if here & _NLA_TYPE == type_:
            return data[offset + 4 : offset + length]
        if length < 4:
            break
        offset += (length + 3) & ~3
    return b""


def replicate(template: bytes, columns: Iterable[tuple[int, bytes]], count: int) -> bytearray:
    """*template* *count* times, with columns written over it.

    columns: pairs of an offset in the template and the values for all copies, one behind the
    other, each of the same width. Written a column of octets at a time, which is what makes
    100,000 messages take 7 ms; not those that all say what the template says already.
    """
    filled = bytearray(template * count)
    stride = len(template)
    for offset, values in columns:
        width = len(values) // count if count else 0
        for i in range(width):
            octets = values[i::width]
            if octets.count(template[offset + i]) != count:
                filled[offset + i :: stride] = octets
    return filled


@dataclass(frozen=True, slots=True)
class Batch:
    """Independent messages of equal size, each a template with its own values written over it.

    They are packed when they are sent, a chunk at a time: that stays in the processor's cache,
    where all of 100,000 messages at once take six times as long, and 23 MB.
    columns: as of `replicate`. Each message's sequence number must be its index in the batch.
    """

    template: bytes
    columns: tuple[tuple[int, bytes], ...]
    count: int

    def pack(self, first: int, end: int) -> bytearray:
        """The messages from number *first* to before *end*."""
        return replicate(self.template, self._columns(first, end), end - first)

    def chunks(self, octets: int) -> Iterator[tuple[int, int]]:
        """Where each chunk of at most so many *octets* begins and ends."""
        step = max(1, octets // len(self.template))
        for first in range(0, self.count, step):
            yield first, min(first + step, self.count)

    def head(self, count: int) -> Batch:
        """The first *count* of them."""
        return Batch(self.template, tuple(self._columns(0, count)), count)

    def _columns(self, first: int, end: int) -> Iterator[tuple[int, bytes]]:
        for offset, values in self.columns:
            width = len(values) // self.count
            yield offset, values[first * width : end * width]


def column(records: bytes, size: int, start: int, width: int) -> bytes:
    """The fields at *start*, *width* octets wide, of all fixed-*size* records."""
    count = len(records) // size
    values = bytearray(width * count)
    for i in range(width):
        values[i::width] = records[start + i :: size]
    return bytes(values)


def sequences(count: int) -> bytes:
    """The column of sequence numbers 0 to count-1, in the machine's own byte order."""
    return struct.pack(f"={count}I", *range(count))


class Netlink:
    """One netlink socket in the namespace that the thread was in when it was made."""

    def __init__(self, protocol: int) -> None:
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
        )
        self.interrupted = False  # whether what was dumped last changed meanwhile
        self._socket.bind((0, 0))
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        # Received into, since recv() takes and returns all this memory for each datagram anew.
        self._buffer = memoryview(bytearray(_DATAGRAM))
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._grow(option, BUFFER)

    def _grow(self, option: int, size: int) -> None:
        # SO_SNDBUFFORCE is 32, SO_RCVBUFFORCE 33: beyond the sysctl's limit, for root.
        force = 32 if option == socket.SO_SNDBUF else 33
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, force, size)
        except PermissionError:
            self._socket.setsockopt(socket.SOL_SOCKET, option, size)

    def __enter__(self) -> Netlink:
        return self

    def fileno(self) -> int:
        """The socket's descriptor: what it owns in the kernel lives as long as this is open."""
        return self._socket.fileno()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def send_batch(self, batch: Batch) -> list[Refusal]:
        """Send all messages and read the refusals."""
        refusals: list[Refusal] = []
        for first, end in batch.chunks(CHUNK):
            if first:
                faultpoints.reach("between-chunks")
            chunk = batch.pack(first, end)
            flags_at = len(chunk) - len(batch.template) + 6
            flags = struct.unpack_from("=H", chunk, flags_at)[0] | NLM_F_ACK
            struct.pack_into("=H", chunk, flags_at, flags)
            self._socket.send(chunk)
            refusals += self._read_refusals(end - 1)
        return refusals

    def _read_refusals(self, last: int) -> list[Refusal]:
        refusals: list[Refusal] = []
        while True:
            for type_, sequence, body in self._receive():
                if type_ != _NLMSG_ERROR:
                    continue
                if number := _errno(body):
                    refusals.append(Refusal(sequence, number))
                if sequence == last:
                    return refusals

    def send_transaction(self, messages: bytes, last_sequence: int) -> None:
        """Send one nf_tables batch, whole or nothing; OSError with the kernel's first errno.

        The message with *last_sequence* must carry NLM_F_ACK. A refused batch answers with the
        errors and no acknowledgement, or with the acknowledgement alone.
        """
        if len(messages) > BUFFER:
            # It is one message to the socket, and one that its buffer does not hold is EMSGSIZE:
            # a set of 350,000 IPv4 or 240,000 IPv6 tuples (the kernel doubles what is asked for).
            self._grow(socket.SO_SNDBUF, len(messages))
        self._socket.send(messages)
        while True:
            for type_, sequence, body in self._receive():
                if type_ != _NLMSG_ERROR:
                    continue
                _raise_refused(body)
                if sequence == last_sequence:
                    return

    def request(self, type_: int, flags: int, body: bytes) -> Iterator[bytes]:
        """Send one request and yield the body of each answer; OSError when it is refused."""
        dump = flags & NLM_F_DUMP == NLM_F_DUMP
        self.interrupted = False
        self._socket.send(message(type_, flags if dump else flags | NLM_F_ACK, body, 1))
        while True:
            for answer, _, payload in self._receive():
                if answer == _NLMSG_DONE:
                    return
                if answer == _NLMSG_ERROR:
                    _raise_refused(payload)
                    return
                yield payload

    def send_queries(self, queries: Batch) -> Iterator[bytes | None]:
        """For each query its one answer's body, or None for ENOENT.

        Queries are chunked so that the answers of a chunk fit the receive buffer.
        """
        for answered, end in queries.chunks(CHUNK // 8):
            self._socket.send(queries.pack(answered, end))
            while answered < end:
                for type_, _, body in self._receive():
                    answered += 1
                    if type_ != _NLMSG_ERROR:
                        yield body
                        continue
                    if _errno(body) != errno.ENOENT:
                        _raise_refused(body)
                    yield None

    def _receive(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, sequence number and body of each message of one datagram."""
        data = self._receive_datagram()
        for offset, length, type_, flags, sequence in _headers(data):
            self.interrupted |= flags & _NLM_F_DUMP_INTR != 0
            yield type_, sequence, data[offset + _HEADER.size : offset + length]

    def _receive_datagram(self) -> bytes:
        size = self._socket.recv_into(self._buffer, 0, socket.MSG_TRUNC)
        if size > _DATAGRAM:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        return bytes(self._buffer[:size])


def _errno(body: bytes) -> int:
    """What a message NLMSG_ERROR says; 0 is an acknowledgement."""
    number: int = -struct.unpack_from("=i", body)[0]
    return number


def _raise_refused(body: bytes) -> None:
    if number := _errno(body):
        raise OSError(number, os.strerror(number))


def _headers(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Offset, length, type, flags and sequence number of each message of a datagram."""
    offset, size = 0, len(data)
    while offset + _HEADER.size <= size:
        length, type_, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if length < _HEADER.size:
            return
        yield offset, length, type_, flags, sequence
        offset += (length + 3) & ~3
