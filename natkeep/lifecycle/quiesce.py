"""quiesce: before a dump, new connections wait, and whoever waits to be accepted is."""

from __future__ import annotations

import time

from natkeep import faultpoints
from natkeep.errors import NatkeepError, RefusedError
from natkeep.lifecycle.prepare import Preparing
from natkeep.lifecycle.teardown import Ending
from natkeep.plan.drift import Gate
from natkeep.plan.move import Move, Site
from natkeep.plan.tuples import NO_CONNECTIONS, Endpoint
from natkeep.values import replace

_QUEUE_INTERVAL = 0.02


class Quiescing(Preparing, Ending):
    """The verb quiesce, undone by teardown."""

    def quiesce(self, move: Move, ports: frozenset[int], seconds: float) -> tuple[Endpoint, ...]:
        """Have new connections to the source's listeners wait, and return when nobody else does.

        ports: those listeners only, or all where it is empty. When somebody still waits to be
        accepted after *seconds*, the hold is released and NatkeepError says where.
        """
        [site] = move.sites
        with self.state.locked():
            self._open_sites(move)
            found = self.kernel.find_listeners(site, frozenset(m.old for m in move.maps))
            listeners = tuple(end for end in found if not ports or end.port in ports)
            if not listeners:
                olds = ", ".join(str(map_.old) for map_ in move.maps)
                raise RefusedError(
                    f"{site}: nobody listens at {olds} or at the wildcard address",
                    hint="then there is nothing to wait for: dump",
                )
            move = replace(move, held=listeners, quiesces=True)
            plan = self.check(move, NO_CONNECTIONS)
            self._begin_and_apply(plan, NO_CONNECTIONS, Gate.CLOSED, None)
        try:
            faultpoints.reach("quiesce-held")
            self._await_accepted(site, listeners, time.monotonic() + seconds)
        except BaseException:
            self.teardown(move.id)
            raise
        return listeners

    def _await_accepted(self, site: Site, listeners: tuple[Endpoint, ...], deadline: float) -> None:
        # Twice in a row: a SYN that passed just before the hold was in may be on its way still.
        clean = 0
        while clean < 2:
            waiting = self.kernel.count_waiting(site, listeners)
            clean = 0 if waiting else clean + 1
            if waiting and time.monotonic() >= deadline:
                told = ", ".join(f"{number} at {end}" for end, number in waiting.items())
                raise NatkeepError(
                    f"{site}: connections are not accepted: {told}; new ones may come again",
                    hint="--timeout SECONDS waits longer; criu dump --skip-in-flight loses them",
                )
            time.sleep(_QUEUE_INTERVAL)
