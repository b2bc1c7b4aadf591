"""Locks of the state directory: one of each move, and one for what moves share.

    ID.journal         flock on the journal itself: to change that move, or note how far it is
    lock               flock: to change what moves share at a site, or add or remove a journal

Opening a move of a frozen process takes the first alone, so no work on another move holds a hook
up. All else that changes a site takes both, the moves' first: in this order no two wait for each
other. What only looks takes none.

Rule: a lock is given up when the block ends, and no process that is started inherits it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from natkeep import faultpoints
from natkeep.errors import JournalError, UsageError
from natkeep.state.files import StateFiles

LOCK_TIMEOUT = 30.0
"""Seconds to wait for other natkeeps to finish, where $NATKEEP_LOCK_TIMEOUT does not say."""


class Locks:
    """The locks of one directory; where there is none, nothing is locked."""

    def __init__(self, files: StateFiles) -> None:
        self._files = files
        self._begun: ExitStack | None = None

    @contextmanager
    def shared(self, seconds: float) -> Iterator[None]:
        """Hold the directory's; JournalError when another process keeps it for *seconds*."""
        with self._files.opened("lock", os.O_RDWR | os.O_CREAT) as fd:
            if fd is not None:
                _lock(fd, f"{self._files.path}/lock", seconds)
                faultpoints.reach("locked")
            yield

    @contextmanager
    def move(self, name: str, seconds: float) -> Iterator[bool]:
        """Hold the lock of the journal *name*; False where there is none (any more)."""
        with ExitStack() as stack:
            yield self._hold(stack, name, seconds)

    @contextmanager
    def changing(self, names: frozenset[str], seconds: float) -> Iterator[None]:
        """Hold the locks of these journals, as far as there are, and the directory's.

        A journal that is begun meanwhile (`begin`) is locked until the block ends, too.
        """
        while True:
            with ExitStack() as stack:
                held = {name for name in sorted(names) if self._hold(stack, name, seconds)}
                stack.enter_context(self.shared(seconds))
                if held != {name for name in names if self._files.has(name)}:
                    continue  # one was begun while we waited
                self._begun = stack
                try:
                    yield
                finally:
                    self._begun = None
                return

    def begin(self, fd: int) -> None:
        """Lock the file *fd*, which is to be a journal and has no name yet."""
        if self._begun is not None:
            own = os.dup(fd)
            self._begun.callback(os.close, own)
            fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _hold(self, stack: ExitStack, name: str, seconds: float) -> bool:
        while self._files.has(name):
            with ExitStack() as trying:
                try:
                    fd = trying.enter_context(self._files.opened(name, os.O_RDONLY))
                except (FileNotFoundError, JournalError):
                    return False  # what is wrong with it is said where it is read
                if fd is None:
                    return False
                _lock(fd, f"{self._files.path}/{name}", seconds)
                if os.fstat(fd).st_nlink:  # else it was removed or replaced while we waited
                    faultpoints.reach("locked")
                    stack.push(trying.pop_all())
                    return True
        return False


def read_lock_timeout() -> float:
    """Seconds to wait for the lock: $NATKEEP_LOCK_TIMEOUT, or LOCK_TIMEOUT; UsageError if none."""
    text = os.environ.get("NATKEEP_LOCK_TIMEOUT", "")
    if not text:
        return LOCK_TIMEOUT
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise UsageError(f"NATKEEP_LOCK_TIMEOUT: {text!r} is not a number of seconds (0 to 99999)")
    return float(text)


def _lock(fd: int, name: str, seconds: float) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not (seconds and _queue_up(fd, seconds)):
            raise JournalError(
                f"another natkeep holds {name}",
                hint=f"waited {seconds:g} s: end it, or NATKEEP_LOCK_TIMEOUT=SECONDS waits longer",
            ) from None


def _queue_up(fd: int, seconds: float) -> bool:
    """Wait in the kernel's queue for the lock of *fd*; whether it came in time.

    Who waits in flock() is served in order, and at once; who asks again and again is not, and of
    16 processes one can be passed over for ever. flock() knows no time-out, so a thread waits.
    What it gets too late goes back at once, with the last descriptor of this opening.
    """
    import threading  # only who has to wait pays for it

    own, taken = os.dup(fd), threading.Event()

    def wait() -> None:
        try:
            fcntl.flock(own, fcntl.LOCK_EX)
        finally:
            os.close(own)
        taken.set()

    threading.Thread(target=wait, daemon=True).start()
    return taken.wait(seconds)
