"""The store as five calls; what is behind them nothing else knows.

Rule: each call either is done, or raises UnreachableError, and then may have been done: whatever is
written can be written again. A watch ends with UnreachableError too; then its follower takes a new
snapshot, so that it misses nothing that is there now.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

ABSENT = 0
"""The revision of a key that is not there."""


class Item(NamedTuple):
    """A value, and the revision of the store in which it was written."""

    value: str
    revision: int


class Snapshot(NamedTuple):
    """What begins with a prefix, as it was at one revision of the store."""

    items: dict[str, Item]
    revision: int


Changes = Mapping[str, Item | None]
"""What was written since, by key; None: it was deleted."""


class Store(Protocol):
    """What a fleet asks of a store."""

    def range(self, prefix: str, start: str = "", limit: int = 0) -> Snapshot:
        """All keys that begin with *prefix*; with a limit the first, from *start* on."""

    def watch(self, prefix: str, revision: int) -> Iterator[Changes]:
        """Each change below *prefix* after *revision*, in order, as it comes."""

    def txn(
        self, puts: Mapping[str, str | None], compare: Mapping[str, int] | None = None,
        lease: int = 0,
    ) -> bool:  # fmt: skip
        """Write all of *puts* (None deletes), if each key of *compare* has that revision.

        Whether it was written. lease: the values go when it ends.
        """

    def lease(self, seconds: int, lease: int = 0) -> int:
        """A lease of so many seconds, or *lease* for as long again; which one it is now."""

    def delete(self, prefix: str) -> None:
        """Delete all keys that begin with *prefix*."""

    def close(self) -> None:
        """Let go of all connections; what watches ends."""


def read(store: Store, key: str) -> Item | None:
    """The item of one key."""
    return store.range(key, limit=1).items.get(key)  # of those that begin so it is the first
