"""What wakes an agent: changes in the store, changes of journals, and its own lease.

Each follower is a thread: a snapshot, then what comes after its revision; whenever that ends, a
snapshot again. Rule: a follower hands on what it hears, and decides nothing.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from queue import Empty, Queue
from typing import NamedTuple

from natkeep import __version__
from natkeep.errors import NatkeepError, RefusedError, UnreachableError
from natkeep.fleet import keys
from natkeep.fleet.observed import Observed
from natkeep.fleet.store import Item, Store, read
from natkeep.plan.move import is_id
from natkeep.state.directory import read_boot_id

LEASE = 10  # s
_REST = 0.2  # s, until a store that was away is asked again
_EVENT = struct.Struct("iIII")
_CHANGES = 0x2 | 0x80 | 0x200  # IN_MODIFY, IN_MOVED_TO, IN_DELETE
_OVERFLOW = 0x4000  # IN_Q_OVERFLOW: more has changed than was told


class Heard(NamedTuple):
    """Items below a prefix of the store: all there are, or those that changed."""

    prefix: str
    items: Mapping[str, Item | None]
    whole: bool


Woken = Heard | set[str] | dict[str, Observed] | NatkeepError
"""A set: the ids whose journals changed; an error: why the store cannot be followed just now."""


class Wake:
    """The followers of one agent, and the queue by which they wake it."""

    def __init__(self, store: Store) -> None:
        self._store, self._closed = store, threading.Event()
        self._queue: Queue[Woken] = Queue()
        self._followed: set[str] = set()

    def wait(self, seconds: float) -> list[Woken]:
        """What has been heard."""
        found: list[Woken] = []
        try:
            found.append(self._queue.get(timeout=seconds))
            while True:
                found.append(self._queue.get_nowait())
        except Empty:
            return found

    def hear(self, woken: Woken) -> None:
        """Have the agent hear this."""
        self._queue.put(woken)

    def follow(self, prefix: str) -> None:
        """Have all changes below *prefix* heard from now on."""
        if prefix not in self._followed:
            self._followed.add(prefix)
            self._start(self._follow_store, prefix)

    def follow_journals(self, directory: str, known: Callable[[], Iterable[str]]) -> None:
        """Have the ids heard whose journals change in *directory*; known: those that are there."""
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.inotify_init1(os.O_CLOEXEC)
        if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(directory), _CHANGES) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), directory)
        self._start(self._follow_journals, fd, directory, known)

    def demand_name(self, node: str) -> None:
        """RefusedError where an agent of another host has the name, and lives on."""
        until = time.monotonic() + LEASE + 1
        while True:
            try:
                item = read(self._store, keys.alive(node))
            except UnreachableError:
                return  # it will be back; nothing is known till then
            if item is None or json.loads(item.value).get("boot") == read_boot_id():
                return
            if time.monotonic() > until:
                raise RefusedError(
                    f"an agent of another host runs as {node}", hint="natkeep agent --node NAME"
                )
            self._closed.wait(_REST)

    def stay_alive(self, node: str, describe: Callable[[], str]) -> None:
        """Have the node's key in the store for as long as this process lives."""
        self._start(self._stay_alive, node, describe)

    def close(self) -> None:
        """Begin to end all followers."""
        self._closed.set()
        self._store.close()

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        threading.Thread(target=work, args=arguments, daemon=True).start()

    def _follow_store(self, prefix: str) -> None:
        while not self._closed.is_set():
            try:
                items, revision = self._store.range(prefix)
                self._queue.put(Heard(prefix, items, True))
                for changes in self._store.watch(prefix, revision):
                    self._queue.put(Heard(prefix, changes, False))
            except Exception as error:  # without its follower the agent would be deaf
                told = error if isinstance(error, NatkeepError) else NatkeepError(repr(error))
                self._queue.put(told)
                self._closed.wait(_REST)

    def _follow_journals(self, fd: int, directory: str, known: Callable[[], Iterable[str]]) -> None:
        while octets := os.read(fd, 1 << 16):
            names: list[str] = []
            while octets:
                _, mask, _, size = _EVENT.unpack_from(octets)
                end = _EVENT.size + size
                names.append(os.fsdecode(octets[_EVENT.size : end].rstrip(b"\0")))
                if mask & _OVERFLOW:
                    names += [*os.listdir(directory), *(f"{each}.journal" for each in known())]
                octets = octets[end:]
            ids = {name.removesuffix(".journal") for name in names if name.endswith(".journal")}
            if ids := {*filter(is_id, ids)}:
                self._queue.put(ids)

    def _stay_alive(self, node: str, describe: Callable[[], str]) -> None:
        lease, written, key = 0, "", keys.alive(node)
        own = {"pid": os.getpid(), "version": __version__, "boot": read_boot_id()}
        while not self._closed.is_set():
            try:
                before, lease = lease, self._store.lease(LEASE, lease)
                value = json.dumps({**json.loads(describe()), **own})
                if lease != before or value != written:
                    self._store.txn({key: value}, lease=lease)
                    written = value
            except Exception:  # the followers say what is wrong with the store
                lease = 0
            self._closed.wait(LEASE / 3 if lease else _REST)
