"""which UDP sockets of a move speak: no packet tells an end, so silence has to.

A socket is named by its key: a connected one by its packed record, as the process sees it, one that
any peer may speak to by its OLD and port, packed.

Rule: values only. What nothing is known of has been silent for as long as the kernel would have
remembered it, and not longer.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.plan.maps import find_map
from natkeep.plan.move import Move, Site
from natkeep.plan.observation import Observation
from natkeep.plan.protocols import UDP
from natkeep.plan.steps import Plan
from natkeep.plan.tuples import RECORD_SIZE
from natkeep.values import dataclass, field


def server_keys(move: Move) -> dict[bytes, bytes]:
    """Of each socket that any peer may speak to its local ends on either side, and its key."""
    found: dict[bytes, bytes] = {}
    for end in move.kept_servers:
        if (map_ := find_map(move.maps, end)) is not None:
            found[end.packed] = found[map_.on_wire(end).packed] = end.packed
    return found


def find_keys(plan: Plan, site: Site, seen: Observation) -> frozenset[bytes]:
    """The kept UDP sockets that are at *site*, or may be."""
    if seen.sockets is not None:
        return seen.bound.union(seen.datagrams.each())
    here = (one for one in plan.translations if one.site == site and one.protocol == UDP)
    return frozenset(server_keys(plan.move).values()).union(*(one.kept.each() for one in here))


def connected(keys: Iterable[bytes]) -> frozenset[bytes]:
    """Those of *keys* that have a peer."""
    return frozenset(key for key in keys if len(key) in RECORD_SIZE.values())


@dataclass(frozen=True, slots=True)
class Silences:
    """When packets of UDP sockets passed last, as one look after the other has shown it.

    idle: seconds of silence from which on a socket does not speak any more; None is as long as an
    entry of one lasts at the site. last: seconds of a clock, by site and key.
    """

    idle: float | None = None
    last: dict[tuple[Site, bytes], float] = field(default_factory=dict)

    def find_speaking(
        self, site: Site, keys: Iterable[bytes], seen: Observation, now: float
    ) -> frozenset[bytes]:
        """Those of *keys* that are not silent for long enough *now*; seen: what *site* shows."""
        idle = seen.forgets if self.idle is None else self.idle
        speaking = set()
        for key in keys:
            ago = seen.silences.get(key, seen.forgets)
            at = self.last[site, key] = max(self.last.get((site, key), now - ago), now - ago)
            if now - at < idle:
                speaking.add(key)
        return frozenset(speaking)
