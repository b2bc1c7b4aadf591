"""What a CRIU that was killed in the midst of a dump leaves behind, where the process lives on.

Its lock, a table for its run id; and, where it had got into the process, TCP sockets in repair.

Rule: sockets first, then the lock: a socket in repair acknowledges what it does not give to the
process. Only a caller that knows that no CRIU is at work there, and that the process was restored
nowhere, may ask for this.
"""

from __future__ import annotations

from natkeep.checkpoint.live import find_tree
from natkeep.kernel import criu_lock
from natkeep.kernel.netns import entered
from natkeep.kernel.socket_repair import end_repair
from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.tuples import NO_CONNECTIONS


def find_lock(netns: str, run_id: str) -> str:
    """The nftables table at *netns* by which the dump *run_id* locks; "" where there is none."""
    with entered(netns):
        return _find_lock(_lock_of(run_id))


def release(netns: str, run_id: str, pid: int) -> str:
    """Let the process and its descendants go on; the table that was removed, or "".

    run_id: "" where CRIU did not tell it. KernelError, and ImageError where the process has ended.
    """
    end_repair(find_tree(pid))
    if not run_id:
        return ""
    lock = _lock_of(run_id)
    with entered(netns):
        table = _find_lock(lock)
        criu_lock.take_lock(lock, NO_CONNECTIONS)
    return table


def _lock_of(run_id: str) -> DumpLock:
    """All of it, since no image says what is kept."""
    return DumpLock(NetworkLock.NFTABLES, run_id, whole=True)


def _find_lock(lock: DumpLock) -> str:
    return lock.table if criu_lock.find_lock(lock, NO_CONNECTIONS).facts else ""
