"""the walk through the connection table: all its TCP entries read at once, for who asks for many.

Rule: read only. An entry is found by both its tuples, octet by octet as the kernel writes them;
what does not look like that is not found here, and is to be asked for.

Theory of operation. The kernel takes 3 us to write an entry, and Python ten times as long to take
it apart. But whoever asks knows both tuples of the entry that there should be. So entries are not
read but cut in two: the tuples, as they came, are the key in a dictionary, and the rest is the
value, which is read only of those asked for (ctform.py). The kernel writes while it is asked, for
which another process waits (ctdump.py), and the rest of the looking goes on.

An entry may be missed, or come twice, when others are made and deleted meanwhile.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from natkeep.kernel.ctdump import Dump
from natkeep.kernel.ctform import Columns, Forms
from natkeep.kernel.ctnetlink import (
    KEY_SIZE,
    STATUS_HEAD,
    TUPLE_ORIG,
    TUPLE_REPLY,
    read_end,
    read_reply,
    read_said,
    read_tuple,
)
from natkeep.kernel.netlink import attributes, messages

_HEADERS = 20
"""Octets of the netlink header and of nfgenmsg, in front of the attributes."""

Call = tuple[bytes, int, int]
"""An entry's reply tuple, packed as a record; TCP state (0 of another protocol, with which older
kernels answer), and flags of the original direction."""


class Walk:
    """The TCP entries of IP *version* in the namespace in which it was begun."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._dump = Dump(version)
        self._rests: dict[bytes, bytes] | None = None
        self._others: list[dict[int, bytes]] = []
        self._by_end: dict[bytes, list[bytes]] = {}
        self._forms = Forms()

    def close(self) -> None:
        """Come to the end of it."""
        self._dump.close()

    def find_each(self, keys: Iterable[bytes]) -> list[bytes | None]:
        """For each (see ctnetlink.make_keys) the rest of the entry of zone 0, if there is one."""
        return [*map(self._read_all().get, keys)]

    def read(self, rests: Sequence[bytes]) -> Columns:
        """What these say; one at least."""
        return self._forms.read(rests)

    def find_calls(self, end: bytes) -> list[Call]:
        """The entries, of whatever zone, whose original tuple leads to *end*: address, port."""
        rests = self._read_all()
        if not self._by_end:
            for key in rests:
                self._by_end.setdefault(read_end(key), []).append(key)
        keys = self._by_end.get(end, ())
        found: list[Call] = []
        if keys:
            said = self.read([rests[key] for key in keys])
            found += zip(map(read_reply, keys), said.states, said.flags, strict=True)
        for entry in self._others:
            if read_tuple(entry[TUPLE_ORIG]).endswith(end):
                _, state, flags, *_ = read_said(entry)
                found.append((read_tuple(entry[TUPLE_REPLY]), state, flags))
        return found

    def _read_all(self) -> dict[bytes, bytes]:
        if self._rests is None:
            rests: dict[bytes, bytes] = {}
            for data in self._dump.read():
                self._cut(data, rests)
            self._dump.close()
            self._rests = rests
        return self._rests

    def _cut(self, data: bytes, rests: dict[bytes, bytes]) -> None:
        """Each entry in two."""
        size, key = struct.unpack_from("=I", data)[0], KEY_SIZE[self._version]
        if _is_plain(data, size, key):
            rests.update(struct.iter_unpack(f"{_HEADERS}x{key}s{size - _HEADERS - key}s", data))
            return
        for begin, end in messages(data):
            at = begin + _HEADERS
            if data.startswith(STATUS_HEAD, at + key):
                rests[data[at : at + key]] = data[at + key : end]
                continue
            # Of another zone, or of a protocol whose tuples are others.
            entry = attributes(data[at:end])
            if all(_is_tcp(entry[type_]) for type_ in (TUPLE_ORIG, TUPLE_REPLY)):
                self._others.append(entry)


def _is_plain(data: bytes, size: int, key: int) -> bool:
    """Whether all messages are of one size and type, with the status right behind the tuples."""
    at = _HEADERS + key
    if size % 4 or size < at + len(STATUS_HEAD) or len(data) % size:
        return False
    count, places = len(data) // size, (*range(6), *range(at, at + len(STATUS_HEAD)))
    alike = all(data[i::size] == data[i : i + 1] * count for i in places)
    return alike and data.startswith(STATUS_HEAD, at)


def _is_tcp(tuple_: bytes) -> bool:
    return attributes(attributes(tuple_)[2]).get(1) == b"\x06"
