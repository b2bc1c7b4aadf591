"""The guardian: the process whose open netlink socket keeps an owned table in the kernel.

    python3 -I -S owned_tabled.py FILE NETNS DEVICE:INODE

Started by owned_table.py, which has made the table by the socket that is handed over; the
arguments, and when it ends by itself, are in daemon.py.

    3         the directory in which FILE is
    4         the file FILE, locked; the pid in it is ours as long as it is locked
    5         the netlink socket; the kernel keeps the table as long as this is open

Rule: it does nothing, and can so be killed at any time: the table goes in that moment.
"""

from __future__ import annotations

import os
import sys
import time

if __name__ == "__main__":  # isolated: behind the interpreter's own modules, ours
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from natkeep.kernel.daemon import Watch, keep_only

_LOCK = 4
_LOOK_EVERY_S = 2.0


def main(arguments: list[str]) -> None:
    """Wait until the table is not needed any more."""
    name, netns, identity = arguments
    keep_only(3)
    os.pwrite(_LOCK, b"%d\n" % os.getpid(), 0)
    watch = Watch(name, os.fstat(_LOCK), netns, identity)
    while watch.is_found() and watch.is_inhabited():
        time.sleep(_LOOK_EVERY_S)
    watch.remove_file()


if __name__ == "__main__":
    main(sys.argv[1:])
