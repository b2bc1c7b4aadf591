"""Collects what a watch of a store tells, in a thread."""

from __future__ import annotations

import threading
from collections.abc import Callable

from natkeep.errors import UnreachableError
from natkeep.fleet.store import Changes, Store

PATIENCE = 20.0  # s


class Watcher:
    """changes: the newest value of each key; ended: the watch has, and says nothing more."""

    def __init__(self, store: Store, prefix: str, revision: int) -> None:
        self.changes: dict[str, str | None] = {}
        self.count, self.ended = 0, False
        self._lock = threading.Condition()
        work = threading.Thread(target=self._work, args=(store, prefix, revision), daemon=True)
        work.start()

    def _work(self, store: Store, prefix: str, revision: int) -> None:
        try:
            for changes in store.watch(prefix, revision):
                self._take(changes)
        except UnreachableError:
            pass
        with self._lock:
            self.ended = True
            self._lock.notify_all()

    def _take(self, changes: Changes) -> None:
        with self._lock:
            self.count += len(changes)
            self.changes |= {key: item and item.value for key, item in changes.items()}
            self._lock.notify_all()

    def wait(self, until: Callable[[Watcher], bool]) -> bool:
        """Whether it comes to that."""
        with self._lock:
            return self._lock.wait_for(lambda: until(self), PATIENCE)
