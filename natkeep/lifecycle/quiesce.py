"""quiesce: before a dump new connections wait, and those not accepted yet are waited for.

Undone by teardown, or taken over by a prepare of the same id.
"""

from __future__ import annotations

import time

from natkeep import faultpoints
from natkeep.errors import NatkeepError, RefusedError
from natkeep.kernel import sock_diag
from natkeep.lifecycle.check import check
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import carry_out
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.tuples import NO_CONNECTIONS, Endpoint
from natkeep.values import replace

_QUEUE_INTERVAL = 0.02


def quiesce(
    executor: Executor, move: Move, ports: frozenset[int], seconds: float
) -> tuple[Endpoint, ...]:
    """Have new connections to the source's listeners wait, and return when all others are accepted.

    ports: those listeners only, or all where it is empty. When a connection still waits to be
    accepted after *seconds*, the listeners are released and NatkeepError says where.
    """
    [site] = move.sites
    with executor.state.changing(move.id):
        executor.open_sites(move)
        olds = frozenset(map_.old for map_ in move.maps)
        found = executor.kernel.ask(site, sock_diag.find_listeners, olds)
        asked = (end for end in found if not ports or end.port in ports)
        listeners = tuple(end for end in asked if _moves(move, end))
        if not listeners:
            named = ", ".join(str(map_.old_end) for map_ in move.maps)
            raise RefusedError(
                f"{site}: no socket listens at {named} or at the wildcard address",
                hint="then there is nothing to wait for: dump",
            )
        move = replace(move, held=listeners, quiesces=True)
        plan = check(executor, move, NO_CONNECTIONS)
        carry_out(executor, plan, NO_CONNECTIONS, Gate.CLOSED, None)
    try:
        faultpoints.reach("quiesce-held")
        _await_accepted(executor, site, listeners, time.monotonic() + seconds)
    except BaseException:
        teardown(executor, move.id)
        raise
    return listeners


def _moves(move: Move, listener: Endpoint) -> bool:
    """Whether a map is of its port; one of all addresses is at each OLD."""
    everywhere = listener.address.is_unspecified
    maps = (map_ for map_ in move.maps if everywhere or map_.old == listener.address)
    return not {map_.old_port for map_ in maps}.isdisjoint({None, listener.port})


def _await_accepted(
    executor: Executor, site: Site, listeners: tuple[Endpoint, ...], deadline: float
) -> None:
    # Twice in a row: a SYN that passed just before the rules were in may be on its way still.
    clean = 0
    while clean < 2:
        waiting = executor.kernel.ask(site, sock_diag.count_waiting, listeners)
        clean = 0 if waiting else clean + 1
        if waiting and time.monotonic() >= deadline:
            told = ", ".join(f"{number} at {end}" for end, number in waiting.items())
            raise NatkeepError(
                f"{site}: connections are not accepted: {told}; new ones may come again",
                hint="--timeout SECONDS waits longer; criu dump --skip-in-flight loses them",
            )
        time.sleep(_QUEUE_INTERVAL)
