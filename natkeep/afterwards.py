"""What a command leaves to be done once it has ended, since a blackout lasts until it ends.

A restore waits for its hook, and a script for `natkeep open`. What only makes packets quicker
later on, and waits for the kernel meanwhile, is done by a process of its own. It is not
needed: without it everything works, and the next repair does it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

_REST = 1.0
"""Seconds after which the blackout is over, if it is not known.

Not earlier: the kernel's grace periods are one queue, and the end of a restore waits in it, too.
"""
_LIMIT = 10  # seconds
_works: list[Callable[[], object]] = []


def do_afterwards(work: Callable[[], object]) -> None:
    """Have *work* done when the program has ended; it must not matter whether it is."""
    _works.append(work)


def begin(beside: int = 0) -> None:
    """Start it, if there is any, in a process of its own; the verb ends at once after this.

    beside: the number of the process that restores; with its end, at the latest after _REST
    seconds, the blackout is over.
    """
    works, _works[:] = _works[:], []
    try:
        if not works or os.fork():
            return
    except OSError:  # no room for another process; what was asked for is done
        return
    try:
        signal.alarm(_LIMIT)  # whatever the kernel does, nothing stays
        _detach()
        _rest(beside)
        for work in works:
            work()
    finally:
        os._exit(0)


def _detach() -> None:
    """Hold nothing of our parent's that others wait for, and get no terminal's signals."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")


def _rest(beside: int) -> None:
    if not beside:
        time.sleep(_REST)
        return
    import select

    with suppress(ProcessLookupError):  # it has ended already
        poll = select.poll()
        poll.register(os.pidfd_open(beside), select.POLLIN)
        poll.poll(_REST * 1000)
