"""the sight: what the sites of a move showed at one time, and what follows from that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from natkeep.plan.drift import Observation, find_drift
from natkeep.plan.move import Site
from natkeep.plan.steps import Plan
from natkeep.values import dataclass

if TYPE_CHECKING:
    from natkeep.plan.liveness import Life, Sighting
    from natkeep.plan.repair import Patch


@dataclass(frozen=True, slots=True)
class Sight:
    """What all sites of a move showed at one time, and what follows from that.

    earlier: what the last repair saw of entries at a gateway.
    ways: routes and addresses of others that are gone, with the numbers of their steps.
    begun: when the looking began, in milliseconds of the monotonic clock.
    """

    plan: Plan
    begun: int
    looks: dict[Site, Observation]
    lives: dict[Site, Life]
    opened: dict[Site, bool]
    earlier: Sighting | None
    ways: dict[Site, tuple[tuple[int, tuple[str, ...]], ...]]

    def drift(self, site: Site) -> tuple[str, ...]:
        """What is not there as it was put there, in words."""
        seen, life = self.looks[site], self.lives[site]
        from natkeep.plan.repair import describe_ways

        lost = [line for _, notes in self.ways[site] for line in describe_ways(notes)]
        return (*find_drift(self.plan, site, seen, life, opened=self.opened[site]), *lost)

    def patches(self, site: Site) -> list[tuple[int, Patch]]:
        """What puts it back, each with the number of its step."""
        from natkeep.plan.repair import PutWays, find_patches

        seen, life = self.looks[site], self.lives[site]
        found = [*find_patches(self.plan, site, seen, life, opened=self.opened[site])]
        return [*found, *((number, PutWays(site, notes)) for number, notes in self.ways[site])]
