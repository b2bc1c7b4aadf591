"""the dump of the connection table: its datagrams, for which a process of its own waits.

Rule: the process only reads, and has ended when `close` returns; what it was refused is told.

The kernel takes 3 us to write an entry, and does so while it is asked. A thread could wait as well,
but it would want the interpreter for each of a thousand datagrams, and whoever works meanwhile
would take a third longer.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

from natkeep.kernel.ctnetlink import GET, ask_for_tcp
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink

_NUMBER = struct.Struct("=I")


class Dump:
    """The datagrams of TCP entries of IP *version* in the namespace in which it was begun."""

    def __init__(self, version: int) -> None:
        self._memory = os.memfd_create("natkeep-dump")
        self._told, telling = os.pipe()
        with Netlink(NETLINK_NETFILTER) as netlink:
            self._process = os.fork()
            if not self._process:
                _copy_and_exit(netlink, version, self._memory, telling)
        os.close(telling)

    def read(self) -> Iterator[bytes]:
        """Each as it comes; OSError when the kernel gave none."""
        at = 0
        with open(self._told, "rb", closefd=False) as file:
            while size := _read_number(file):
                yield os.pread(self._memory, size, at)
                at += size
            if number := _read_number(file):
                raise OSError(number, os.strerror(number))

    def close(self) -> None:
        """Wait for its end, and let go of what it has read."""
        if self._process:
            os.close(self._told)
            os.waitpid(self._process, 0)
            os.close(self._memory)
            self._process = 0


def _read_number(file: BinaryIO) -> int:
    number = file.read(_NUMBER.size)
    if len(number) < _NUMBER.size:
        raise ChildProcessError(errno.ECHILD, "who read the connection table was ended")
    return int(_NUMBER.unpack(number)[0])


def _copy_and_exit(netlink: Netlink, version: int, memory: int, telling: int) -> None:
    """Write the datagrams into *memory*, the size of each to *telling*; then 0, and an errno."""
    try:
        number = 0
        try:
            for data in netlink.datagrams(GET, ask_for_tcp(version)):
                if os.write(memory, data) < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.write(telling, _NUMBER.pack(len(data)))
        except OSError as error:
            number = error.errno or errno.EIO
        os.write(telling, _NUMBER.pack(0) + _NUMBER.pack(number))
    finally:
        os._exit(0)  # whatever came: nothing of what is written or cleared at an exit is its own
