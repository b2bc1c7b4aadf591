"""the overview: which namespaces are looked at once for many moves, and which for each.

Rule: nothing is said to be missing because a snapshot does not show it; see kernel/interface.py.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

from natkeep.kernel.interface import Kernel, Snapshot
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.plan.move import Site
from natkeep.plan.steps import Identity, Plan
from natkeep.state.journal import Journal, read_boot_id

_MANY = 16
"""So many moves, looked at one by one, take longer than one look at all that there is."""

_MOST = 100
"""Snapshots at a time; each has some descriptors open."""


class Overview:
    """A snapshot of each namespace that is a site of many moves; `expect` is told of each move."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._boot = read_boot_id()
        self._taken: dict[Identity, Snapshot] = {}
        self._moves: Counter[Identity] = Counter()

    def expect(self, journal: Journal, plan: Plan) -> None:
        """This move is going to be looked at."""
        for site in plan.move.sites if journal.boot == self._boot else ():
            identity = journal.identity(site)
            self._moves[identity] += 1
            if self._moves[identity] == _MANY and len(self._taken) < _MOST:
                self._take(site, identity)

    def _take(self, site: Site, identity: Identity) -> None:
        with suppress(NamespaceGoneError):
            self._kernel.open_sites([site], {site: identity})
            self._taken[identity] = self._kernel.snapshot(site)
            self._kernel.close_sites([site])

    def at(self, journal: Journal, site: Site) -> Snapshot | None:
        """The snapshot that shows *site*, if there is one."""
        return self._taken.get(journal.identity(site))

    def close(self) -> None:
        """Let go of all of them."""
        while self._taken:
            self._taken.popitem()[1].close()
