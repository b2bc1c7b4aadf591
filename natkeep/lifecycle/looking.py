"""status: how the moves stand, what lives of them, and waiting until nothing does."""

from __future__ import annotations

import time

from natkeep.journal import Journal, read_boot_id
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.lifecycle.ground import Ground
from natkeep.plan.drift import Gate, MoveStatus, SiteStatus, find_drift
from natkeep.plan.move import Role, Site
from natkeep.plan.steps import Plan, TakeOverLock

_DRAIN_INTERVAL = 0.2


class Looking(Ground):
    """The verb status, and the questions before a teardown."""

    def status(self, move_ids: tuple[str, ...]) -> tuple[MoveStatus, ...]:
        """How the moves stand; all of them when none is named."""
        found = []
        for move_id in move_ids or self.state.ids():
            journal, plan = self._load(move_id)
            sites = tuple(
                self._look(journal, plan, site)
                for site in plan.move.sites
                if not is_retired(journal, plan, site)
            )
            opening = {step.site for step in plan.open}
            gates = {s.seen.gate for s in sites if s.seen is not None and s.site in opening}
            found.append(
                MoveStatus(plan, Gate.OPEN if gates == {Gate.OPEN} else Gate.CLOSED, sites)
            )
        return tuple(found)

    def _look(self, journal: Journal, plan: Plan, site: Site) -> SiteStatus:
        if journal.boot != read_boot_id():
            return SiteStatus(site, None, ("prepared before the last boot: nothing is there",))
        try:
            self.kernel.open_sites([site], {site: journal.identity(site)})
        except NamespaceGoneError as error:
            return SiteStatus(site, None, (str(error),))
        seen = self.kernel.observe(site, plan)
        return SiteStatus(site, seen, find_drift(plan, site, seen))

    def count_alive(self, move_id: str) -> int:
        """How many connections a teardown would break; 0 while the gate is closed."""
        alive = [
            site.seen.alive + site.seen.callers
            for status in self.status((move_id,))
            for site in status.sites
            if site.seen is not None
            and site.seen.gate == Gate.OPEN
            # Opened at the source, the process is back where OLD is at home, and needs nothing.
            and site.site.role != Role.SOURCE
        ]
        return min(alive, default=0)

    def drain(self, move_id: str, seconds: float | None) -> int:
        """Wait until no kept connection lives, *seconds* at most; how many still do."""
        deadline = None if seconds is None else time.monotonic() + seconds
        last = -1
        while alive := self.count_alive(move_id):
            if alive != last:
                self.talk(f"natkeep: {alive} connections of {move_id} live")
                last = alive
            if deadline is not None and time.monotonic() >= deadline:
                break
            time.sleep(_DRAIN_INTERVAL)
        return alive

    def find_exposed(self, move_id: str) -> tuple[str, ...]:
        """Why a teardown would have the source answer peers with resets; nothing when it is safe.

        It is where OLD has left the host, where the process is back, and where CRIU's own lock
        was never taken over.
        """
        journal, plan = self._load(move_id)
        taking = [n for n, step in enumerate(plan.steps) if isinstance(step, TakeOverLock)]
        begun = [journal.records[n].state != "undone" for n in taking if n in journal.records]
        if plan.move.quiesces or (taking and not any(begun)):
            return ()
        found = []
        for site in plan.move.sites:
            seen = self._look(journal, plan, site).seen if site.role == Role.SOURCE else None
            if seen and seen.gate == Gate.CLOSED and seen.addresses and not seen.alive:
                olds = ", ".join(str(old) for old in sorted(seen.addresses, key=str))
                peers = {t.source for one in plan.translations for t in one.kept}
                found.append(
                    f"{site} still has OLD {olds}: it would answer {len(peers)} peers with a reset"
                )
        return tuple(found)


def is_retired(journal: Journal, plan: Plan, site: Site) -> bool:
    """Whether another move has replaced this one at *site*."""
    numbers = [n for n, step in enumerate(plan.steps) if step.site == site]
    records = [journal.records[n].state for n in numbers if n in journal.records]
    return bool(records) and set(records) == {"undone"}
