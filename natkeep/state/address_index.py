"""Which moves have an address as OLD or NEW, by the first lines of their journals.

Rule: of a thousand moves each is read once, and again only when another file has its name; what is
written to a journal later says nothing of its addresses. A number that the file system gives again
could hide that, so whatever is about to be changed under the locks is read anew (`forget`).
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from natkeep.state.files import StateFiles

_TICK = 1_000_000_000
"""Nanoseconds that the time of a change in the directory may stand still, on any file system."""
_ADDRESS = re.compile(rb'"(old|new)":"([0-9a-f.:]+)"')


class _Header(NamedTuple):
    """Of one journal: the inode that was read, and its addresses, packed."""

    inode: int
    olds: frozenset[bytes]
    news: frozenset[bytes]


class AddressIndex:
    """The addresses in each journal of a directory.

    locked: no other process adds or removes a journal just now.
    """

    def __init__(self, files: StateFiles) -> None:
        self._files = files
        self.locked = False
        self.forget()

    def forget(self) -> None:
        """Read all of them again when one is next asked for."""
        self._turns = -1
        self._headers: dict[str, _Header] = {}
        self._olds: dict[bytes, set[str]] = {}
        self._news: dict[bytes, set[str]] = {}
        self._changed = 0

    def find(self, addresses: Iterable[bytes], *, olds_only: bool = False) -> tuple[str, ...]:
        """The ids of the journals with one of the packed *addresses* as OLD (or NEW), sorted."""
        if not (self.locked and self._turns == self._files.turns):
            self._refresh()
            self._turns = self._files.turns
        indexes = (self._olds,) if olds_only else (self._olds, self._news)
        wanted = frozenset(addresses)
        found = (index[one] for index in indexes for one in wanted.intersection(index))
        return tuple(sorted(set[str]().union(*found)))

    def _refresh(self) -> None:
        changed = self._files.changed()
        if changed == self._changed:
            return
        there, known = self._files.inodes(".journal"), self._headers
        self.forget()
        for name, inode in there.items():
            header = known.get(name)
            with suppress(OSError, ValueError):  # what cannot be read, `status` reports
                if header is None or header.inode != inode:
                    header = self._read(name, inode)
                self._enter(name, header)
        if time.time_ns() - changed > _TICK:  # else it may change again and say the same
            self._changed = changed

    def _enter(self, name: str, header: _Header) -> None:
        self._headers[name] = header
        for index, addresses in ((self._olds, header.olds), (self._news, header.news)):
            for address in addresses:
                index.setdefault(address, set()).add(name.removesuffix(".journal"))

    def _read(self, name: str, inode: int) -> _Header:
        line = self._files.read_start(name).split(b"\n", 1)[0]
        found: dict[bytes, set[bytes]] = {b"old": set(), b"new": set()}
        for which, address in _ADDRESS.findall(line):
            family = socket.AF_INET6 if b":" in address else socket.AF_INET
            found[which].add(socket.inet_pton(family, address.decode("ascii")))
        return _Header(inode, *map(frozenset, found.values()))
