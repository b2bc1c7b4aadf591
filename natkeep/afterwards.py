"""what a command leaves to be done once it has ended: whoever waits for it is in a blackout.

A restore waits for its hook, and a script for `natkeep open`. What only makes packets quicker
later on, and waits for the kernel meanwhile, is done by a process that nobody waits for. It is not
needed: without it everything works, and the next repair does it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

_SECONDS = 10
_works: list[Callable[[], object]] = []


def do_afterwards(work: Callable[[], object]) -> None:
    """Have *work* done when the program has ended; it must not matter whether it is."""
    _works.append(work)


def begin() -> None:
    """Start it, if there is any, in a process of its own; the program ends at once after this."""
    if not _works or os.fork():
        return
    try:
        signal.alarm(_SECONDS)  # whatever the kernel does, nothing stays
        _detach()
        for work in _works:
            work()
    finally:
        os._exit(0)


def _detach() -> None:
    """Hold no pipe that somebody reads to its end, and get no terminal's signals."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
