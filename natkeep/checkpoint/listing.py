"""the reader and writer of a connections file: one line `LOCAL PEER` for each connection.

    # what runs on web1
    10.2.0.10:5000 10.1.0.2:50594
    [fd00:2::10]:5000 [fd00:1::2]:50594     # IPv6 in brackets

    udp 10.2.0.10:4433 10.1.0.2:50594       # a connected socket of UDP
    udp 0.0.0.0:53 *                        # one that any peer may speak to

    dump 2d9c5a5c-…                         # which dump of CRIU's it was read from, if any

Or one JSON document, as `natkeep inspect --live PID --json` prints it.

Rule: each line is a connection, a comment or blank, or else an ImageError that names the line; a
list that is empty, cut, or says the same thing twice is a mistake.
This file must never wait for ever: a list may come through a pipe, but not at its leisure.

100,000 lines have to be read before a move can begin, so addresses and ports are understood once
each, by the text that they are written as. A list of IPv4 alone, as natkeep writes it, is taken by
the block (0.3 us a line); anything else is read line by line (0.7 us), also to say what is wrong.
"""

from __future__ import annotations

import os
import re
import select
import socket
import stat
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache

from natkeep.checkpoint import Checkpoint, shorten
from natkeep.errors import ImageError
from natkeep.plan.tuples import NO_CONNECTIONS, RECORD_SIZE, Connections, Endpoint, FourTuple

MAX_LISTING = 32 << 20  # 300,000 of the longest lines
MAX_LINES = 1 << 20  # more than there may be connections in a move
PATIENCE = 30.0  # seconds, for the whole of a list that comes through a pipe

_USUAL_LINE = b"...: ...:\n"
"""A line of IPv4 without its digits: nothing else can be in its place."""

_UDP = "udp"
"""The word before the ends of a socket of UDP; a line without one is of TCP."""

_DUMP = "dump"
"""The word before a dump's own id."""

_BLOCK = 1 << 14
"""Octets of a list that are taken at once, so that what they become stays in the cache."""

_SIZES = frozenset(RECORD_SIZE.values())

_RUN_ID = re.compile("[0-9A-Za-z-]{1,64}")

_Line = bytes | tuple[str, bytes] | Endpoint | str
"""A line that was read: the record of a connection, that of a socket of UDP with its word, the
local end of one that has no peer, or a dump's id."""


def read_listing(path: str | os.PathLike[str]) -> Checkpoint:
    """The connections in the file or pipe at *path*; ImageError if they cannot be read."""
    return parse_octets(read_octets(path), os.fsdecode(path))


def read_octets(path: str | os.PathLike[str]) -> bytes:
    """All of the file or pipe at *path*; ImageError if it cannot be read."""
    name = os.fsdecode(path)
    try:
        _demand_file(name, os.stat(path))  # to open a device could start something
        # With O_NONBLOCK a FIFO opens at once, whether it has a writer or not.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(path, flags)
        try:
            _demand_file(name, os.fstat(descriptor))
            return _read(descriptor, name)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"cannot read {name}: {reason}") from None


def parse_octets(data: bytes, name: str) -> Checkpoint:
    """The connections in *data*, which has to be UTF-8 text; as `parse_listing`."""
    if usual := _read_usual(data):
        return Checkpoint(Connections(usual))
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ImageError(f"{name}:{line}: this is not UTF-8 text") from None
    return _read_any(text, name)


def parse_listing(text: str, name: str) -> Checkpoint:
    """The connections in *text*; *name* says in messages where it came from."""
    if usual := _read_usual(text.encode("ascii", "replace")):
        return Checkpoint(Connections(usual))
    return _read_any(text, name)


def _read_any(text: str, name: str) -> Checkpoint:
    if text.lstrip(" \t\r\n").startswith("{"):  # with which no line begins
        from natkeep.checkpoint.described import parse_described

        return parse_described(text, name)
    if text.count("\n") > MAX_LINES:
        raise ImageError(f"{name}: more than {MAX_LINES} lines")
    return _read_lines(text, name)


def _read_usual(data: bytes) -> bytes | None:
    """The records of a list of IPv4 connections and nothing else; None if it is not just that."""
    words = _Words()
    try:
        records = b"".join(_read_block(block, words) for block in _blocks(data))
    except (OSError, ValueError):
        return None
    few = len(records) // RECORD_SIZE[4] <= MAX_LINES
    return records if few and _are_distinct(records) else None


def _are_distinct(records: bytes) -> bool:
    """Whether none of the IPv4 records is there twice."""
    size = RECORD_SIZE[4]
    half, count = size // 2, len(records) // size
    if any(records[i::size] != records[i : i + 1] * count for i in range(half)):
        return len({record for (record,) in struct.iter_unpack(f"{size}s", records)}) == count
    # All have one local end, so that the peers tell them apart. They fit a number, of which the
    # ports shall be the lowest octets: such numbers are hashed apart, at half the price of octets.
    keys = bytearray(8 * count)
    for i in range(half):
        keys[(i if sys.byteorder == "little" else 7 - i) :: 8] = records[size - 1 - i :: size]
    return len(set(memoryview(keys).cast("Q").tolist())) == count


def _blocks(data: bytes) -> Iterator[bytes]:
    """*data* in runs of whole lines, each with its newline."""
    first = 0
    while first < len(data):
        end = data.find(b"\n", first + _BLOCK) + 1 or len(data)
        block = data[first:end]
        yield block if block.endswith(b"\n") else block + b"\n"
        first = end


def _read_block(block: bytes, words: _Words) -> bytes | bytearray:
    """The records of lines that are all usual; ValueError or OSError if one is not."""
    marks = block.translate(None, b"0123456789")
    count = len(marks) // len(_USUAL_LINE)
    if marks != _USUAL_LINE * count:
        raise ValueError
    local, _, _ = block.partition(b" ")
    # Mostly one end has them all: then half of the words need not be looked at.
    block, alike = _drop_local(block, local, count)
    found = block.replace(b":", b" ").split()
    if len(found) != (2 if alike else 4) * count:
        raise ValueError
    packed = b"".join(map(words.__getitem__, found))
    if not alike:
        return packed
    host, _, port = local.partition(b":")
    half = RECORD_SIZE[4] // 2
    records = bytearray((words[host] + words[port] + bytes(half)) * count)
    for i in range(half):
        records[half + i :: 2 * half] = packed[i::half]
    return records


def _drop_local(block: bytes, local: bytes, count: int) -> tuple[bytes, bool]:
    """The *count* lines without their local end, if it is *local* in all; and whether it is."""
    before, block = b"\n" + local + b" ", b"\n" + block
    return (block.replace(before, b" "), True) if block.count(before) == count else (block, False)


def _read_lines(text: str, name: str) -> Checkpoint:
    lines: dict[_Line, int] = {}  # which line said it first
    for number, line in enumerate(text.split("\n"), 1):
        try:
            local, peer = line.split()
            host, _, port = peer.rpartition(":")
            packed = _pack_end(local) + _pack_host(host) + _pack_port(port)
            record: _Line = packed
            usual = len(packed) in _SIZES
        except ValueError:
            usual = False
        if not usual:  # a comment, a blank line, or something to complain of
            found = _read_line(line, f"{name}:{number}")
            if found is None:
                continue
            record = found
        if lines.setdefault(record, number) != number:
            raise ImageError(f"{name}:{number}: the same connection as in line {lines[record]}")
    dumps = [line for line in lines if isinstance(line, str)]
    if len(dumps) > 1:
        first, second = (lines[dump] for dump in dumps[:2])
        raise ImageError(f"{name}:{second}: another dump than in line {first}")
    if not lines:  # what a dump has may be nothing
        raise ImageError(f"{name} lists no connections", hint="a line is `LOCAL PEER`")
    return _make_checkpoint(lines)


def _make_checkpoint(lines: Iterable[_Line]) -> Checkpoint:
    tcp, udp, servers, dump = [], [], [], None
    for line in lines:
        if isinstance(line, bytes):
            tcp.append(line)
        elif isinstance(line, Endpoint):
            servers.append(line)
        elif isinstance(line, str):
            dump = line
        else:
            udp.append(line[1])
    return Checkpoint(
        Connections.of_records(tcp), udp=Connections.of_records(udp), udp_servers=tuple(servers),
        listed_dump=dump,
    )  # fmt: skip


def write_listing(
    connections: Connections,
    udp: Connections = NO_CONNECTIONS,
    udp_servers: Iterable[Endpoint] = (),
    dump: str | None = None,
) -> str:
    """The text that `parse_listing` reads as a checkpoint of these; dump: its own id."""
    lines = [f"{_DUMP} {dump}\n"] if dump else []
    lines += [f"{inbound.destination} {inbound.source}\n" for inbound in connections]
    lines += [f"{_UDP} {inbound.destination} {inbound.source}\n" for inbound in udp]
    lines += [f"{_UDP} {end} *\n" for end in udp_servers]
    return "".join(lines)


class _Words(dict[bytes, bytes]):
    """Octets of an IPv4 address or a port by its text, which has dots or none."""

    def __missing__(self, word: bytes) -> bytes:
        text = word.decode("ascii")
        packed = socket.inet_pton(socket.AF_INET, text) if "." in text else _pack_port(text)
        self[word] = packed
        return packed


@lru_cache(MAX_LINES)
def _pack_host(host: str) -> bytes:
    """Octets of an address by the text before the port's colon; ValueError if it is none."""
    try:
        return socket.inet_pton(socket.AF_INET, host)  # each client may have its own
    except (OSError, ValueError):
        return Endpoint.parse(f"{host}:1").address.packed


@lru_cache(MAX_LINES)
def _pack_port(port: str) -> bytes:
    """Octets of a port by its text; ValueError if it is none."""
    value = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
    if not 1 <= value <= 65535:
        raise ValueError(port)
    return value.to_bytes(2, "big")


@lru_cache(MAX_LINES)
def _pack_end(text: str) -> bytes:
    """Octets of an endpoint by its text; ValueError if it is none."""
    end = Endpoint.parse(text)
    return end.address.packed + _pack_port(str(end.port))


def _read_line(line: str, where: str) -> _Line | None:
    """What *line* says, None if there is none in it; ImageError if it is not right."""
    parts = line.partition("#")[0].split()
    if not parts:
        return None
    if parts[0] == _DUMP:
        if len(parts) == 2 and _RUN_ID.fullmatch(parts[1]):
            return parts[1]
        raise ImageError(f"{where}: not `{_DUMP} RUN-ID`, of letters, digits and hyphens")
    word = f"{_UDP} " if parts[0] == _UDP else ""
    try:
        if len(parts) != (3 if word else 2):
            raise ValueError(f"{' '.join(parts)!r} is not `{word}LOCAL PEER`")
        local = Endpoint.parse(parts[-2])
        if word and parts[-1] == "*":
            return local
        peer = Endpoint.parse(parts[-1])
        inbound = Connections.of([FourTuple(source=peer, destination=local)])
    except ValueError as error:
        hint = f"as in {word}10.2.0.10:5000 10.1.0.2:50594"
        raise ImageError(f"{where}: {shorten(error)}", hint=hint) from None
    record = inbound.v4 or inbound.v6
    return (_UDP, record) if word else record


def _demand_file(name: str, status: os.stat_result) -> None:
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
        raise ImageError(f"{name} is neither a file nor a pipe")


def _read(descriptor: int, name: str) -> bytes:
    """All of a file or a pipe.

    A FIFO without a writer shows nothing at all, one whose writer has left shows its end.
    """
    deadline = time.monotonic() + PATIENCE
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    parts: list[bytes] = []
    size = 0
    while True:
        left = max(deadline - time.monotonic(), 0)
        if not poller.poll(left * 1000):
            raise ImageError(
                f"{name}: no end of it within {PATIENCE:g} s",
                hint="does its writer still run?",
            )
        part = os.read(descriptor, 1 << 22)
        if not part:
            return b"".join(parts)
        parts.append(part)
        size += len(part)
        if size > MAX_LISTING:
            raise ImageError(f"{name}: more than {MAX_LISTING} octets")
