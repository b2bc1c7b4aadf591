"""the guard: a table of its own that survives `nft flush ruleset`, and the process it lives by.

Without it, whoever flushes the ruleset of a destination or a gateway ends every kept connection
that carries anything, within one round trip and before anybody could repair: peers' segments reach
NEW un-translated, where there is no socket, or the process's reach the peer so, and both are
answered with a reset. The kernel spares a table that has an owner (`flags owner`, Linux 5.12), an
open netlink socket; so this table (plan/guard.py) is made by a socket that a resident process then
keeps, which libnftables' would not be: it keeps its own to itself.

So after a flush the kept connections are silent until `natkeep repair`, at whatever point of the
move, and TCP then sends again what was dropped.

Rule: the table never passes what the kernel would not; without its process it is not there.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic, sleep

from natkeep.errors import KernelError
from natkeep.kernel.daemon import FIRST, spawn
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.netns import Namespace, inside, path_of
from natkeep.kernel.nft_messages import Message, pack_batch, pack_fill, pack_objects
from natkeep.plan.filters import owned_sets, owned_table, owned_table_name
from natkeep.plan.translation import Translation

_PATIENCE = 2.0
"""Seconds to wait for the guardian's first word, and for its end."""


def start(
    directory: str, move_id: str, namespace: Namespace, netns: str,
    translations: Iterable[Translation],
) -> int:  # fmt: skip
    """Guard *translations*, those of one site, in *namespace* (named *netns*); the guardian's pid.

    One of the same move there is ended first. OSError where the kernel says no, or KernelError;
    then there is neither table nor process.
    """
    end(directory, move_id, namespace)
    name = _file_name(move_id, namespace)
    with ExitStack() as stack:
        home = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(name, flags, 0o600, dir_fd=home)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with inside(namespace):
                netlink = stack.enter_context(Netlink(NETLINK_NETFILTER))
            batch = _pack_table(move_id, translations)
            netlink.send_transaction(pack_batch(batch), len(batch))
            device, inode = namespace.identity
            arguments = [name, netns and path_of(netns), f"{device}:{inode}"]
            handed = (netlink.fileno(), lock, home)
            return spawn("owned_tabled.py", arguments, dict(enumerate(handed, FIRST)))
        except BaseException:
            os.unlink(name, dir_fd=home)
            raise


def _pack_table(move_id: str, translations: Iterable[Translation]) -> list[Message]:
    """All of the guard's table, as one transaction."""
    translations, table = tuple(translations), owned_table_name(move_id)
    fills = (
        message
        for translation in translations
        for name, connections in owned_sets(translation).items()
        for message in pack_fill(table, name, connections)
    )
    return [*pack_objects(owned_table(move_id, translations)), *fills]


def is_guarded(directory: str, move_id: str, namespace: Namespace) -> bool:
    """Whether the guardian of the move at this site lives."""
    with _opened(directory, move_id, namespace) as lock:
        return lock is not None and _is_locked(lock)


def end(directory: str, move_id: str, namespace: Namespace) -> None:
    """End the guard of the move at this site, if there is one; KernelError if it does not end."""
    with _opened(directory, move_id, namespace) as lock:
        if lock is None:
            return
        deadline = monotonic() + _PATIENCE
        while _is_locked(lock):
            if monotonic() > deadline:
                raise KernelError(
                    f"the guardian of {move_id} does not end",
                    hint="its command line has owned_tabled.py and "
                    f"{_file_name(move_id, namespace)}: kill it",
                )
            _stop(lock, deadline)
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, _file_name(move_id, namespace)))


def _file_name(move_id: str, namespace: Namespace) -> str:
    return f"{move_id}.guard-{namespace.inode}"


@contextmanager
def _opened(directory: str, move_id: str, namespace: Namespace) -> Iterator[int | None]:
    path = os.path.join(directory, _file_name(move_id, namespace))
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield lock
    finally:
        os.close(lock)


def _is_locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


def _stop(lock: int, deadline: float) -> None:
    """Kill who has the lock, and wait for the end; none other, whose pid it may be since."""
    said = os.pread(lock, 32, 0).strip()
    if not said.isdigit():
        sleep(0.005)  # it has the lock from its start, and its first word is not out yet
        return
    try:
        process = os.pidfd_open(int(said))
    except ProcessLookupError:
        return
    try:
        if _is_locked(lock):  # so it lived when it was opened, and its number was its own
            signal.pidfd_send_signal(process, signal.SIGKILL)
            poll = select.poll()
            poll.register(process, select.POLLIN)
            poll.poll(max(deadline - monotonic(), 0) * 1000)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
