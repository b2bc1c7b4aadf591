"""What is asked before a teardown: what it would break, and the wait until it breaks nothing."""

from __future__ import annotations

import time

from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.progress import has_been_opened, restored_at
from natkeep.lifecycle.status import look_at_sites
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.steps import TakeOverLock

_DRAIN_INTERVAL = 0.2


def drain(executor: Executor, move_id: str, seconds: float | None) -> int:
    """Wait until no kept connection lives, *seconds* at most; how many still do."""
    deadline = None if seconds is None else time.monotonic() + seconds
    last = -1
    while alive := count_alive(executor, move_id):
        if alive != last:
            executor.talk(f"natkeep: {alive} connections of {move_id} live")
            last = alive
        if deadline is not None and time.monotonic() >= deadline:
            break
        time.sleep(_DRAIN_INTERVAL)
    return alive


def count_alive(executor: Executor, move_id: str) -> int:
    """How many connections a teardown would break; 0 while the move has not been opened.

    The destination's sockets tell, and elsewhere conntrack: where another program has flushed it,
    nothing of it lives to be seen, though the connections may.
    """
    journal, plan = executor.load(move_id)
    alive: dict[Role, list[int]] = {}
    opened = any(has_been_opened(journal, plan, site) for site in restored_at(plan))
    for status in look_at_sites(executor, journal, plan):
        site, seen = status.site, status.seen
        if seen is None:
            continue
        if site.role == Role.GATEWAY and plan.move.holds and not opened:
            continue  # its gate is open so that the holder hears the peers
        # A gate that was being opened when natkeep was killed is open, though no journal says so.
        if seen.gate == Gate.OPEN or has_been_opened(journal, plan, site):
            alive.setdefault(site.role, []).append(seen.alive + seen.callers)
    # Opened at the source, the process is back where OLD is at home, and needs nothing.
    return min(alive.get(Role.DESTINATION) or alive.get(Role.GATEWAY) or [0])


def find_exposed(executor: Executor, move_id: str) -> tuple[str, ...]:
    """Why a teardown would have the source answer peers with resets; nothing when it is safe.

    It is where OLD has left the host, where the process is back, and where CRIU's own lock
    was never taken over.
    """
    journal, plan = executor.load(move_id)
    taking = [n for n, step in enumerate(plan.steps) if isinstance(step, TakeOverLock)]
    begun = [journal.records[n].state != "undone" for n in taking if n in journal.records]
    if plan.move.quiesces or (taking and not any(begun)):
        return ()
    found = []
    for site, seen in ((one.site, one.seen) for one in look_at_sites(executor, journal, plan)):
        if site.role != Role.SOURCE or seen is None:
            continue
        if seen.gate == Gate.CLOSED and seen.addresses and not seen.alive:
            olds = ", ".join(str(old) for old in sorted(seen.addresses, key=str))
            peers = {t.source for one in plan.translations for t in one.kept}
            found.append(
                f"{site} still has OLD {olds}: it would answer {len(peers)} peers with a reset"
            )
    return tuple(found)
