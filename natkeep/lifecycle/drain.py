"""What is asked before a teardown: what it would break, and the wait until it breaks nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType

from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.progress import has_been_opened, restored_at
from natkeep.lifecycle.status import look_at_sites
from natkeep.plan.connection_state import SiteStatus
from natkeep.plan.liveness import Life, Sighting, make_sighting
from natkeep.plan.move import Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.roles import Role
from natkeep.plan.silence import Silences, connected, find_keys
from natkeep.plan.steps import Plan, TakeOverLock
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint
from natkeep.state.journal import Journal

_DRAIN_INTERVAL = 0.2
_UDP_INTERVAL = 1.0  # the kernel shows whole seconds, and each look reads its table of UDP


def drain(
    executor: Executor, move_id: str, seconds: float | None, idle: float | None = None
) -> int:
    """Wait until no kept connection lives, *seconds* at most; how many still do.

    idle: seconds of silence from which on a UDP socket counts no more; None: as long as the kernel
    remembers one that has spoken.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    last, sighting, silences = -1, None, Silences(idle)
    while True:
        alive, sighting = _count(executor, move_id, sighting, silences)
        if not alive or (deadline is not None and time.monotonic() >= deadline):
            return alive
        if alive != last:
            executor.talk(f"natkeep: {alive} connections of {move_id} live")
            last = alive
        time.sleep(_UDP_INTERVAL if silences.last else _DRAIN_INTERVAL)


def count_alive(executor: Executor, move_id: str) -> int:
    """How many connections a teardown would break; 0 while the move has not been opened.

    The destination's sockets tell. Without them a connection counts until its end is certain
    (plan/liveness.py): that it has no entry any more says nothing.
    """
    return _count(executor, move_id, None)[0]


def is_silent(executor: Executor, move_id: str) -> bool:
    """Whether nothing has come from the process since its gateway was made ready: a rollback?"""
    journal, plan = executor.load(move_id)
    at_gateway = all(site.row.passes_on for site in plan.move.sites)
    return at_gateway and not has_spoken(look_at_sites(executor, journal, plan))


def has_spoken(statuses: tuple[SiteStatus, ...]) -> bool:
    """Whether a gateway has seen a packet from NEW, or may have, since the move was prepared."""
    gateways = [one.seen for one in statuses if one.site.row.passes_on and one.seen is not None]
    entries = (entry for seen in gateways for some in seen.entries.values() for entry in some)
    counted = any(entry is not None and entry.packets_out != 0 for entry in entries)
    return counted or any(seen.spoken for seen in gateways)


def _count(
    executor: Executor, move_id: str, earlier: Sighting | None, silences: Silences | None = None
) -> tuple[int, Sighting]:
    """The same, and what was seen; earlier: in the last look, or else a repair's is read.

    silences: of UDP only what is not silent counts; without them all but servers that are.
    """
    at = time.monotonic_ns() // 1_000_000
    journal, plan = executor.load(move_id)
    statuses = look_at_sites(executor, journal, plan)
    looks = {status.site: status.seen for status in statuses if status.seen is not None}
    unknown = {site: Life(False) for site in looks}
    earlier = earlier or executor.state.read_sighting(move_id, journal.boot)
    sighting = make_sighting(plan, at, looks, unknown, earlier)
    alive: dict[Role, list[int]] = {}
    opened = any(has_been_opened(journal, plan, site) for site in restored_at(plan))
    for site, seen in looks.items():
        if site.row.passes_on and plan.move.holds and not opened:
            continue  # its gate is open so that the holder hears the peers
        # A gate that was being opened when natkeep was killed is open, though no journal says so.
        if seen.gate == Gate.OPEN or has_been_opened(journal, plan, site):
            known = seen.sockets is not None
            streams = seen.alive - len(seen.datagrams)
            living = streams if known else sighting.count_unended(plan, site)
            living += _count_datagrams(plan, site, seen, silences)
            alive.setdefault(site.role, []).append(living + seen.callers + seen.inner)
    # Opened at the source, the process is back where OLD is at home, and needs nothing.
    # Each peers' host has connections of its own, and all others see the same.
    beyond = [sum(alive[Role.PEER])] if Role.PEER in alive else []
    beyond += alive.get(Role.GATEWAY, []) + alive.get(Role.RELAY, [])
    return min(alive.get(Role.DESTINATION) or beyond or [0]), sighting


def _count_datagrams(plan: Plan, site: Site, seen: Observation, silences: Silences | None) -> int:
    keys = find_keys(plan, site, seen)
    if not keys:
        return 0
    speaking = (silences or Silences()).find_speaking(site, keys, seen, time.monotonic())
    return len(speaking if silences is not None else speaking | connected(keys))


def find_exposed(
    executor: Executor, move_id: str, ended: Mapping[Protocol, Connections] = MappingProxyType({})
) -> tuple[str, ...]:
    """Why a teardown would have the source answer peers with resets; nothing when it is safe.

    ended: connections that have ended elsewhere, so their peers say nothing any more, also those of
    UDP, of which the source would tell that there is no such port. It is safe,
    too, where OLD has left the host, where the process is back, and where CRIU's own lock
    was never taken over.
    """
    journal, plan = executor.load(move_id)
    taking = [n for n, step in enumerate(plan.steps) if isinstance(step, TakeOverLock)]
    begun = [journal.records[n].state != "undone" for n in taking if n in journal.records]
    if plan.move.quiesces or (taking and not any(begun)):
        return ()
    found = []
    for site, seen in ((one.site, one.seen) for one in look_at_sites(executor, journal, plan)):
        if seen is None or not (site.role == Role.SOURCE or site.row.relays):
            continue
        back = seen.back if site.row.relays else seen.living
        if not _is_open(journal, plan, site, seen) and seen.addresses and not back:
            olds = ", ".join(str(old) for old in sorted(seen.addresses, key=str))
            for protocol, answers in _ANSWERS.items():
                peers = _find_peers(plan, site, protocol, ended.get(protocol, NO_CONNECTIONS))
                if peers:
                    answer = answers.format(len(peers))
                    found.append(f"{site} still has OLD {olds}: it would {answer}")
    return tuple(found)


_ANSWERS = {
    TCP: "answer {} peers with a reset",
    UDP: "tell {} peers of UDP that the port is unreachable",
}


def _find_peers(
    plan: Plan, site: Site, protocol: Protocol, ended: Connections
) -> frozenset[Endpoint]:
    """The peers at *site* of connections that have not ended."""
    here = (t for t in plan.translations if t.site == site and t.protocol == protocol)
    left = (one.kept.minus(ended) for one in here)
    return frozenset(inbound.source for some in left for inbound in some)


def _is_open(journal: Journal, plan: Plan, site: Site, seen: Observation) -> bool:
    """Whether the gate is, and for the process: a relay's opens early for those that hold."""
    ends = restored_at(plan) if site.row.relays else ()
    return seen.gate != Gate.CLOSED and all(has_been_opened(journal, plan, end) for end in ends)
