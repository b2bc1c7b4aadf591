"""the reader and writer of a connections file: one line `LOCAL PEER` for each connection.

    # what runs on web1
    10.2.0.10:5000 10.1.0.2:50594
    [fd00:2::10]:5000 [fd00:1::2]:50594     # IPv6 in brackets

Or one JSON document, as `natkeep inspect --live PID --json` prints it.

Rule: each line is a connection, a comment or blank, or else an ImageError that names the line; a
list that is empty, cut, or says the same thing twice is a mistake.
This file must never wait for ever: a list may come through a pipe, but not at its leisure.

100,000 lines have to be read before a move can begin, so addresses and ports are understood once
each, by the text that they are written as.
"""

from __future__ import annotations

import os
import select
import socket
import stat
import time
from functools import lru_cache

from natkeep.checkpoint import Checkpoint, join_records, shorten
from natkeep.errors import ImageError
from natkeep.plan.tuples import RECORD_SIZE, Connections, Endpoint, FourTuple

MAX_LISTING = 32 << 20  # 300,000 of the longest lines
MAX_LINES = 1 << 20  # more than there may be connections in a move
PATIENCE = 30.0  # seconds, for the whole of a list that comes through a pipe

_SIZES = frozenset(RECORD_SIZE.values())


def read_listing(path: str | os.PathLike[str]) -> Checkpoint:
    """The connections in the file or pipe at *path*; ImageError if they cannot be read."""
    name = os.fsdecode(path)
    try:
        _demand_file(name, os.stat(path))  # to open a device could start something
        # With O_NONBLOCK a FIFO opens at once, whether it has a writer or not.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        descriptor = os.open(path, flags)
        try:
            _demand_file(name, os.fstat(descriptor))
            data = _read(descriptor, name)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(f"cannot read {name}: {reason}") from None
    return parse_octets(data, name)


def parse_octets(data: bytes, name: str) -> Checkpoint:
    """The connections in *data*, which has to be UTF-8 text; as `parse_listing`."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ImageError(f"{name}:{line}: this is not UTF-8 text") from None
    return parse_listing(text, name)


def parse_listing(text: str, name: str) -> Checkpoint:
    """The connections in *text*; *name* says in messages where it came from."""
    if text.lstrip(" \t\r\n").startswith("{"):  # with which no line begins
        from natkeep.checkpoint.described import parse_described

        return parse_described(text, name)
    if text.count("\n") > MAX_LINES:
        raise ImageError(f"{name}: more than {MAX_LINES} lines")
    return _read_lines(text, name)


def _read_lines(text: str, name: str) -> Checkpoint:
    lines: dict[bytes, int] = {}  # which line said it first, by record
    for number, line in enumerate(text.split("\n"), 1):
        try:
            local, peer = line.split()
            host, _, port = peer.rpartition(":")
            record = _pack_end(local) + _pack_host(host) + _pack_port(port)
            usual = len(record) in _SIZES
        except ValueError:
            usual = False
        if not usual:  # a comment, a blank line, or something to complain of
            found = _read_line(line, f"{name}:{number}")
            if found is None:
                continue
            record = found
        if lines.setdefault(record, number) != number:
            raise ImageError(f"{name}:{number}: the same connection as in line {lines[record]}")
    if not lines:
        raise ImageError(f"{name} lists no connections", hint="a line is `LOCAL PEER`")
    return Checkpoint(join_records(lines))


def write_listing(connections: Connections) -> str:
    """The text that `parse_listing` reads as *connections*."""
    return "".join(f"{inbound.destination} {inbound.source}\n" for inbound in connections)


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


def _read_line(line: str, where: str) -> bytes | None:
    """The record in *line*, None if there is none in it; ImageError if it is not right."""
    parts = line.partition("#")[0].split()
    if not parts:
        return None
    try:
        if len(parts) != 2:
            raise ValueError(f"{' '.join(parts)!r} is not `LOCAL PEER`")
        local, peer = map(Endpoint.parse, parts)
        inbound = Connections.of([FourTuple(source=peer, destination=local)])
    except ValueError as error:
        hint = "as in 10.2.0.10:5000 10.1.0.2:50594"
        raise ImageError(f"{where}: {shorten(error)}", hint=hint) from None
    return inbound.v4 or inbound.v6


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
