"""the start of a program that stays: a Python of our own, with the descriptors it is handed.

Rule: it gets no environment, no streams, no other descriptor, and a session of its own, so that
nothing of whoever starts it lives on with it.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
from collections.abc import Mapping
from contextlib import ExitStack

FIRST = 3
"""The first descriptor that can be handed on; those before it are the streams."""

_ABOVE = 64  # out of the way of those that are handed on
_USUAL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)


def spawn(name: str, arguments: list[str], descriptors: Mapping[int, int]) -> int:
    """Start natkeep/kernel/*name*, descriptors by the number that it knows them by; its pid."""
    program = os.path.join(os.path.dirname(__file__), name)
    argv = [sys.executable, "-I", "-S", program, *arguments]
    with ExitStack() as stack:
        moved = {}
        for number, fd in descriptors.items():
            moved[number] = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE)
            stack.callback(os.close, moved[number])
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(FIRST)]
        handed = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in moved.items()]
        return os.posix_spawn(
            argv[0], argv, {}, file_actions=[*null, *handed],
            setsid=True, setsigmask=(), setsigdef=_USUAL,
        )  # fmt: skip
