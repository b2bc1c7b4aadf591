"""Makes and removes the owned table, which survives `nft flush ruleset`, and the process it needs.

Without it, a flush of the ruleset at a destination or a gateway ends every kept connection that
carries anything, within one round trip and before a repair can be done: peers' segments reach NEW
un-translated, where there is no socket, or the process's reach the peer so, and both are answered
with a reset. The kernel spares a table that has an owner (`flags owner`, Linux 5.12), an open
netlink socket; so this table (plan/filters.py) is made by a socket that a daemon then keeps open.
libnftables cannot do that: it does not hand out its socket.

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
from natkeep.kernel.daemon import spawn
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.netns import Namespace, inside
from natkeep.kernel.nft_messages import Message, pack_batch, pack_fill, pack_objects
from natkeep.plan.filters import owned_sets, owned_table, owned_table_name
from natkeep.plan.listeners import Reception
from natkeep.plan.step_undo import RemoveOwnedTable
from natkeep.plan.steps import GuardSite, Prior
from natkeep.plan.translation import Translation

_PATIENCE = 2.0
"""Seconds to wait for the end of the guardian."""


class OwnedTableDriver(Driver[GuardSite]):
    """The owned table; a move with --guard fails without it.

    Only making one shows whether the kernel has such tables, so there is nothing to check.
    """

    enters = False

    def apply(self, at: Place, step: GuardSite, remember: Remember) -> Prior:
        """Make it; KernelError also where there is no state directory."""
        remember(Prior())
        if not at.directory:
            raise KernelError("a guard needs a state directory")
        try:
            start(at, step.move_id, step.translations, step.servers)
        except OSError as error:
            raise KernelError(
                f"the kernel makes no guard: {error.strerror}",
                hint="it takes Linux 5.12; a move without --guard is kept as well",
            ) from error
        return Prior()

    def revert(self, at: Place, undo: RemoveOwnedTable, prior: Prior) -> None:
        """End its process, and with it the table."""
        if at.directory:
            end(at.directory, undo.move_id, at.namespace)


def start(
    place: Place,
    move_id: str,
    translations: Iterable[Translation],
    servers: Iterable[Reception] = (),
) -> int:
    """Guard *translations*, and *servers*, those of one site, at *place*; the guardian's pid.

    One of the same move there is ended first. OSError where the kernel says no, or KernelError;
    then there is neither table nor process.
    """
    end(place.directory, move_id, place.namespace)
    name = _file_name(move_id, place.namespace)
    with ExitStack() as stack:
        home = os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(name, flags, 0o600, dir_fd=home)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with inside(place.namespace):
                netlink = stack.enter_context(Netlink(NETLINK_NETFILTER))
            batch = _pack_table(move_id, translations, servers)
            netlink.send_transaction(pack_batch(batch), len(batch))
            pid = spawn("owned_tabled.py", name, place, [home, lock, netlink.fileno()])
            # It writes the same, but a loaded machine may take seconds to start its interpreter.
            os.pwrite(lock, b"%d\n" % pid, 0)
            return pid
        except BaseException:
            os.unlink(name, dir_fd=home)
            raise


def _pack_table(
    move_id: str, translations: Iterable[Translation], servers: Iterable[Reception]
) -> list[Message]:
    """All of the guard's table, as one transaction."""
    translations, table = tuple(translations), owned_table_name(move_id)
    fills = (
        message
        for translation in translations
        for name, connections in owned_sets(translation).items()
        for message in pack_fill(table, name, connections)
    )
    return [*pack_objects(owned_table(move_id, translations, servers)), *fills]


def is_guarded(directory: str, move_id: str, namespace: Namespace) -> bool:
    """Whether the guardian of the move at this site lives."""
    with _opened(directory, move_id, namespace) as lock:
        return lock is not None and _is_locked(lock)


def end(directory: str, move_id: str, namespace: Namespace) -> None:
    """End the guard of the move at this site, if there is one; KernelError if it does not end."""
    name = _file_name(move_id, namespace)
    with _opened(directory, move_id, namespace) as lock:
        if lock is None:
            return
        deadline = monotonic() + _PATIENCE
        while _is_locked(lock):
            if monotonic() > deadline:
                raise KernelError(
                    f"the guardian of {move_id} does not end",
                    hint=f"its command line has owned_tabled.py and {name}: kill it",
                )
            _stop(lock, deadline)
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, name))


def _file_name(move_id: str, namespace: Namespace) -> str:
    return f"{move_id}.guard-{namespace.identity.inode}"


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
    """Kill the process that has the lock and wait for its end; never one that has its pid since."""
    pid = os.pread(lock, 32, 0).strip()
    if not pid.isdigit():
        sleep(0.005)  # it has the lock from its start; what started it was killed then
        return
    try:
        process = os.pidfd_open(int(pid))
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
