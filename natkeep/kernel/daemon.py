"""Starts the processes of natkeep that stay, and says from the inside when one has to end.

    python3 -I -S natkeep/kernel/PROGRAM NAME NETNS DEVICE:INODE [MORE ...]

    3         the state directory; the file NAME in it is how the process is found again
    4 ...     what the program's own file says

Rule: it gets no environment, no streams, no other descriptor and a session of its own, so that
nothing of the process that starts it lives on with it. It ends by itself when NAME is no longer
its own (the move is undone, or the state directory is gone), and when no other process keeps the
namespace DEVICE:INODE, which had the path NETNS (empty: none).

The daemons load this file too, by a bare interpreter beside a restore, so it imports little.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from natkeep.kernel.interface import Place

DIRECTORY = 3
"""The state directory; the first descriptor behind the streams."""
_ABOVE = 64  # out of the way of those that are handed on


def spawn(program: str, name: str, place: Place, handed: list[int], *more: str) -> int:
    """Start natkeep/kernel/*program* for *place*, *handed* as descriptors 3, 4, ...; its pid."""
    import fcntl
    import signal

    from natkeep.kernel.netns import path_of

    netns = place.site.netns
    path = os.path.join(os.path.dirname(__file__), program)
    arguments = [name, netns and path_of(netns), str(place.namespace.identity), *more]
    moved: list[int] = []
    try:
        moved.extend(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in handed)
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(DIRECTORY)]
        given = [(os.POSIX_SPAWN_DUP2, fd, n) for n, fd in enumerate(moved, DIRECTORY)]
        return os.posix_spawn(
            sys.executable, [sys.executable, "-I", "-S", path, *arguments], {},
            file_actions=[*null, *given], setsid=True, setsigmask=(),
            setsigdef=(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE),
        )  # fmt: skip
    finally:
        for fd in moved:
            os.close(fd)


# ---- inside the daemon ---------------------------------------------------------------------------


def keep_only(handed: int) -> None:
    """Close what was inherited beside the streams and the *handed* descriptors; leave the cwd."""
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd >= DIRECTORY + handed:
            try:  # noqa: SIM105 (contextlib is not worth its time here)
                os.close(fd)
            except OSError:
                pass  # the one by which the directory was read
    os.chdir("/")


class Watch:
    """Whether a daemon is needed: its file is its own, its namespace has a name or an inhabitant.

    own: status of the file NAME as it was when the daemon was started.
    """

    def __init__(self, name: str, own: os.stat_result, netns: str, identity: str) -> None:
        self.name, self.own, self.netns = name, own, netns
        # Its own sockets are in the namespace, so no other one gets the inode meanwhile.
        device, _, inode = identity.partition(":")
        self.namespace = int(device), int(inode)

    def is_found(self) -> bool:
        """Whether the file is still its own."""
        try:
            found = os.stat(self.name, dir_fd=DIRECTORY, follow_symlinks=False)
        except OSError:
            return False
        return os.path.samestat(found, self.own)

    def is_inhabited(self) -> bool:
        """Whether the namespace is kept by its name, or by a process other than this one.

        Its own sockets keep it from ending, so the kernel does not say. A process that may not be
        looked at is taken for an inhabitant where the namespace never had a name.
        """
        if self.netns and self._is_namespace(self.netns):
            return True
        own = str(os.getpid())
        pids = (pid for pid in os.listdir("/proc") if pid.isdigit() and pid != own)
        return any(self._is_namespace(f"/proc/{pid}/ns/net") for pid in pids)

    def _is_namespace(self, path: str) -> bool:
        try:
            status = os.stat(path)
        except PermissionError:
            return not self.netns
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self.namespace

    def remove_file(self) -> None:
        """Remove the file, if it is its own."""
        if self.is_found():
            os.unlink(self.name, dir_fd=DIRECTORY)
