"""the guardian: the process that a guard's table lives by.

    python3 -I -S owned_tabled.py FILE NETNS DEVICE:INODE

Started by guard.py, which has made the table by the socket that is handed over:

    3         the netlink socket; the kernel keeps the table as long as this is open
    4         the file FILE, locked; who finds it locked knows us by the pid that is in it
    5         the directory in which FILE is

Rule: it does nothing, and can so be killed at any time: the table goes in that moment. It ends by
itself when FILE is no longer its own (the move is undone, or the state directory is gone), and
when nobody but itself keeps the namespace any more.
"""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":  # isolated: behind the interpreter's own modules, ours
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from natkeep.kernel.segment_holderd import make_watch

_SOCKET, _LOCK, _DIRECTORY = 3, 4, 5
_LOOK_EVERY_S = 2.0


def main(arguments: list[str]) -> None:
    """Wait until nobody needs the table."""
    name, netns, identity = arguments
    device, _, inode = identity.partition(":")
    os.closerange(_DIRECTORY + 1, 1 << 16)
    os.pwrite(_LOCK, b"%d\n" % os.getpid(), 0)
    os.chdir("/")
    is_needed = make_watch(netns, (int(device), int(inode)))
    while _is_own(name):
        if not is_needed():
            os.unlink(name, dir_fd=_DIRECTORY)
            return
        time.sleep(_LOOK_EVERY_S)


def _is_own(name: str) -> bool:
    try:
        found = os.stat(name, dir_fd=_DIRECTORY, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(_LOCK))


if __name__ == "__main__":
    main(sys.argv[1:])
