"""Takes the TCP sockets of other processes out of repair (TCP_REPAIR), by pidfd_getfd(2).

CRIU puts them into it for a dump. One that is killed leaves them there: the process goes on, and
recv(2) says EPERM, or nothing ever becomes readable.

Rule: nothing is sent for it (TCP_REPAIR_OFF_NO_WP, Linux 4.19). Acts in any network namespace.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress

from natkeep.errors import KernelError

_TCP_REPAIR, _OFF_NO_WP = 19, -1
_PIDFD_GETFD = 438  # of all architectures


def end_repair(pids: Iterable[int]) -> int:
    """How many sockets of these processes were in repair, and are not any more.

    KernelError where the kernel does not let us.
    """
    count = 0
    for pid in pids:
        for held in _sockets(pid):
            with held:
                if not _is_in_repair(held):
                    continue
                try:
                    held.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _OFF_NO_WP)
                except OSError as error:
                    raise KernelError(
                        f"a socket of process {pid} stays in repair: {error}"
                    ) from None
                count += 1
    return count


def _is_in_repair(held: socket.socket) -> bool:
    with suppress(OSError):  # of another protocol
        return bool(held.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR))
    return False


def _sockets(pid: int) -> Iterator[socket.socket]:
    """Our own descriptors of its TCP sockets."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(FileNotFoundError):  # it was closed
                if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                    held = socket.socket(fileno=_get(process, int(name)))
                    if held.family in (socket.AF_INET, socket.AF_INET6):
                        yield held
                    held.close()
    except (ProcessLookupError, FileNotFoundError):
        return  # it has ended
    except OSError as error:
        raise KernelError(f"the sockets of process {pid}: {error.strerror}") from None
    finally:
        os.close(process)


def _get(process: int, descriptor: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    got = libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
    if got < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(got)
