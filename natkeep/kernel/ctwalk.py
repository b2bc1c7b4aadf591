"""the walk through the connection table: all its TCP entries read at once, for who asks for many.

Rule: read only. What an entry says is taken from where it stands only after each attribute header
up to there was found to be as in an entry that was taken apart; whatever looks different is taken
apart itself.

Theory of operation. The kernel takes 2.5 us to write an entry, and Python ten times as long to take
it apart. But entries of one length are nearly always alike: the same attributes in the same places.
So of each length one is taken apart, and a regular expression made of it, in which the headers are
literals and the values groups. A datagram whose matches fill it is read; of others each message is
looked at. The kernel writes while it is asked, and meanwhile nobody needs the interpreter: so a
thread waits for the answers, and the rest of the looking goes on.

An entry may be missed, or come twice, when others are made and deleted meanwhile.
"""

from __future__ import annotations

import re
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from operator import itemgetter

from natkeep.kernel.ctnetlink import (
    COUNTERS_ORIG,
    COUNTERS_REPLY,
    GET,
    PROTOINFO,
    STATUS_BITS,
    TUPLE_ORIG,
    TUPLE_REPLY,
    ZONE,
    Row,
    ask_for_tcp,
    read_row,
)
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink, attributes, messages

_HEADERS = 20
"""Octets of the netlink header and of nfgenmsg, in front of the attributes."""

_PATIENCE = 2e-5
"""Seconds for which the waiting thread is kept from an answer, of which there are a thousand; the
interpreter's own 5 ms would make the walk last as long as all the rest."""

_TYPE = 0x3FFF
_ORIGINAL = itemgetter(0)
_TCP = b"\x06"
_ZONE_OF_TUPLE = 3
_ZONES = {(ZONE,), (TUPLE_ORIG, _ZONE_OF_TUPLE), (TUPLE_REPLY, _ZONE_OF_TUPLE)}
_NUMBERS = {(TUPLE_ORIG, 2, 1), (TUPLE_REPLY, 2, 1)}
_PARENTS = {
    *((type_, part) for type_ in (TUPLE_ORIG, TUPLE_REPLY) for part in (1, 2)),
    (PROTOINFO,), (PROTOINFO, 1), (COUNTERS_ORIG,), (COUNTERS_REPLY,),
}  # fmt: skip
_GROUPS = (
    (TUPLE_ORIG,), (TUPLE_REPLY,), (STATUS_BITS,), (PROTOINFO, 1, 1), (PROTOINFO, 1, 4),
    (COUNTERS_ORIG, 1), (COUNTERS_REPLY, 1),
)  # fmt: skip
"""The attributes that are read, by their path, in the order of a Row."""


class Walk:
    """The TCP entries of IP *version* in the namespace in which it was begun."""

    def __init__(self, version: int) -> None:
        self._netlink = Netlink(NETLINK_NETFILTER)
        self._datagrams: list[bytes] = []
        self._error: OSError | None = None
        self._rows: dict[bytes, Row] | None = None
        self._answered: dict[bytes, Row] | None = None
        self._elsewhere: list[Row] = []
        self._patience = sys.getswitchinterval()
        sys.setswitchinterval(_PATIENCE)
        self._thread = threading.Thread(target=self._read, args=(version,), daemon=True)
        self._thread.start()

    def _read(self, version: int) -> None:
        try:
            with self._netlink as netlink:
                self._datagrams += netlink.datagrams(GET, ask_for_tcp(version))
        except OSError as error:
            self._error = error

    def close(self) -> None:
        """Come to the end of it."""
        self._thread.join()
        sys.setswitchinterval(self._patience)

    def finish(self) -> None:
        """Have read all of it; OSError when the kernel gave none."""
        self._read_all()

    def find_each(self, tuples: list[bytes]) -> list[Row | None]:
        """For each the entry of zone 0 that it belongs to, in either direction."""
        found = [*map(self._read_all().get, tuples)]
        if None in found:
            if self._answered is None:
                self._answered = {row[1]: row for row in self._read_all().values()}
            answered = self._answered
            found = [row or answered.get(t) for row, t in zip(found, tuples, strict=True)]
        return found

    def each(self) -> Iterator[Row]:
        """All entries, of whatever zone."""
        yield from self._read_all().values()
        yield from self._elsewhere

    def _read_all(self) -> dict[bytes, Row]:
        if self._rows is None:
            self.close()
            if self._error is not None:
                raise self._error
            self._rows = {}
            for rows in read_rows(self._datagrams, self._elsewhere):
                self._rows.update(zip(map(_ORIGINAL, rows), rows, strict=True))
            self._datagrams.clear()
        return self._rows


Forms = dict[bytes, "re.Pattern[bytes] | None"]
"""What entries of a length and family look like, if that is usual."""


def read_rows(datagrams: Iterable[bytes], elsewhere: list[Row]) -> Iterator[list[Row]]:
    """The TCP entries of zone 0 in each of a dump's datagrams; other zones' go *elsewhere*."""
    forms: Forms = {}
    for data in datagrams:
        size = struct.unpack_from("=I", data)[0]
        form = _form_of(data[:size], forms)
        if form is not None:
            found = form.findall(data)
            if len(found) * size == len(data):  # they fill it, so each stands where one begins
                yield found
                continue
        yield [*_read_each(data, forms, elsewhere)]


def _form_of(message: bytes, forms: Forms) -> re.Pattern[bytes] | None:
    kind = message[:4] + message[16:17]
    if kind not in forms:
        forms[kind] = _learn(message)
    return forms[kind]


def _read_each(data: bytes, forms: Forms, elsewhere: list[Row]) -> Iterator[Row]:
    for begin, end in messages(data):
        form = _form_of(data[begin:end], forms)
        match = form.match(data, begin, end) if form is not None else None
        if match is not None:
            yield match.groups()  # type: ignore[misc]  # it has as many groups as a Row
            continue
        entry = attributes(data[begin + _HEADERS : end])
        tuples = [attributes(entry[type_]) for type_ in (TUPLE_ORIG, TUPLE_REPLY)]
        if any(attributes(each[2]).get(1) != _TCP for each in tuples):
            continue  # older kernels answer with other protocols too
        if ZONE in entry or any(_ZONE_OF_TUPLE in each for each in tuples):
            elsewhere.append(read_row(entry))
        else:
            yield read_row(entry)


def _learn(message: bytes) -> re.Pattern[bytes] | None:
    """What matches all entries that have just the attributes of this one, in its places.

    None where it is none of TCP in zone 0, or has what is read in another order.
    """
    form = _Form(message)
    if not form.read(_HEADERS, len(message), ()) or not form.end():
        return None
    head = re.escape(message[:6]) + b".{10}" + re.escape(message[16:17]) + b".{3}"
    return re.compile(head + b"".join(form.parts), re.DOTALL)


class _Form:
    """The parts of a regular expression, made while one message is taken apart."""

    def __init__(self, message: bytes) -> None:
        self.message = message
        self.parts: list[bytes] = []
        self.groups = 0
        self.found: set[tuple[int, ...]] = set()

    def read(self, at: int, end: int, path: tuple[int, ...]) -> bool:
        """Take the attributes apart that stand from *at* to *end*; whether they are as usual."""
        while at + 4 <= end:
            length, type_ = struct.unpack_from("=HH", self.message, at)
            here = (*path, type_ & _TYPE)
            if not 4 <= length <= end - at or here in _ZONES:
                return False
            self.parts.append(re.escape(self.message[at : at + 4]))
            if not self._read_value(at + 4, at + length, here):
                return False
            self._skip(min(end, at + (length + 3 & ~3)) - at - length)
            at += length + 3 & ~3
        self._skip(max(0, end - at))
        return True

    def _read_value(self, at: int, end: int, path: tuple[int, ...]) -> bool:
        if path in _NUMBERS:
            self.parts.append(_TCP)
            return self.message[at:end] == _TCP
        if path in _PARENTS:
            return self.read(at, end, path)
        if path not in _GROUPS:
            self._skip(end - at)
            return True
        number = _GROUPS.index(path)
        if number < self.groups:
            return False
        self.parts.append(b"()" * (number - self.groups) + b"(")
        self.groups = number + 1
        self.found.add(path)
        if len(path) == 1 and path != (STATUS_BITS,):
            if not self.read(at, end, path):
                return False
        else:
            self._skip(end - at)
        self.parts.append(b")")
        return True

    def end(self) -> bool:
        """Add the groups of what is not there; whether all is there that an entry must have."""
        self.parts.append(b"()" * (len(_GROUPS) - self.groups))
        return {(TUPLE_ORIG,), (TUPLE_REPLY,), (STATUS_BITS,)} <= self.found

    def _skip(self, count: int) -> None:
        if count > 0:
            self.parts.append(b".{%d}" % count)
