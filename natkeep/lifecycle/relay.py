"""relay: the addresses by which one passes on, and what stands in its way.

Rule: nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Sequence

from natkeep.errors import RefusedError
from natkeep.kernel import relay_host
from natkeep.lifecycle.executor import Executor
from natkeep.plan.maps import Map
from natkeep.plan.move import Move, Site
from natkeep.plan.relay import refuse_relay
from natkeep.plan.steps import Plan
from natkeep.plan.via import Via
from natkeep.state.journal import Journal
from natkeep.values import replace


def find_vias(executor: Executor, sites: Sequence[Site], maps: Sequence[Map]) -> tuple[Via, ...]:
    """The address that the relay uses towards each NEW; none where no relay is among *sites*."""
    relays = [site for site in sites if site.row.relays]
    if not relays:
        return ()
    executor.kernel.open_sites(relays)
    olds = frozenset(map_.old for map_ in maps)
    found: dict[Via, None] = {}
    for map_ in maps:
        source = executor.kernel.ask(relays[0], relay_host.find_source, map_.new, olds)
        if source is None:
            raise RefusedError(
                f"{relays[0]} has no IPv{map_.new.version} address beside OLD {map_.old}, by which "
                "it could pass on what it receives for OLD",
                hint="there: ip addr add; then --via names it",
            )
        found[Via(source)] = None
    return tuple(found)


def refuse_relays(executor: Executor, plan: Plan, *, frozen: bool = False) -> None:
    """RefusedError where a relay of *plan* could not be one; frozen: as `prepare` has it."""
    move = plan.move
    for one in plan.translations:
        if one.site.row.relays:
            version = one.map.new.version
            sources = tuple(via.source for via in move.vias if via.source.version == version)
            facts = executor.kernel.ask(one.site, relay_host.survey_relay, one, sources)
            refuse_relay(one, move.vias, replace(facts, living=0) if frozen else facts)


def refuse_stacked(executor: Executor, move: Move, earlier: Journal) -> None:
    """RefusedError where *move* would replace *earlier* at a site that is not the relay of both."""
    if not (move.vias or earlier.move.vias):
        return
    found = {earlier.identity(site): site for site in earlier.move.sites}
    for site in move.sites:
        there = found.get(executor.kernel.identity(site))
        if there is not None and not (site.row.relays and there.row.relays):
            raise RefusedError(
                f"{site} is the site {there} of {earlier.move.id}: only a relay is re-pointed",
                hint=f"--replace {earlier.move.id} at the relay alone, and never a relay behind it",
            )
