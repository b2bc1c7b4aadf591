"""What does not change while many moves are checked, done or undone is read once for all of them.

    with reading_once():
        ...  ask_once("zones", read_zones)  ...      the second is answered by the first

Rule: only for what natkeep itself does not change in the block, as rules, tables and zones of
others: of a thousand moves each would read them again. Without a block all is read each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar, cast

T = TypeVar("T")

_SEEN: ContextVar[dict[Hashable, object] | None] = ContextVar("seen", default=None)


@contextmanager
def reading_once() -> Iterator[None]:
    """In the block nothing of a namespace is read twice that is asked by `ask_once`."""
    token = _SEEN.set({})
    try:
        yield
    finally:
        _SEEN.reset(token)


def ask_once(name: Hashable, question: Callable[[], T]) -> T:
    """What *question* says of the namespace that the thread is in; *name* tells questions apart."""
    seen = _SEEN.get()
    if seen is None:
        return question()
    status = os.stat("/proc/thread-self/ns/net")
    key = (status.st_dev, status.st_ino, name)
    if key not in seen:
        seen[key] = question()
    return cast(T, seen[key])
