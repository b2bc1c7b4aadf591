"""status: how the moves stand, what lives of them, and waiting until nothing does."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING

from natkeep.errors import JournalError
from natkeep.kernel.interface import Kernel, Snapshot
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.lifecycle.executor import Ground, is_waiting
from natkeep.lifecycle.sight import Sight
from natkeep.plan.drift import Gate, MoveStatus, SiteStatus
from natkeep.plan.move import Role, Site
from natkeep.plan.steps import HoldSegments, InstallTranslation, OpenGate, Plan, TakeOverLock
from natkeep.plan.tuples import NO_CONNECTIONS
from natkeep.state.journal import Journal, read_boot_id

if TYPE_CHECKING:
    from natkeep.lifecycle.overview import Overview

_DRAIN_INTERVAL = 0.2


class Looking(Ground):
    """The verb status, and the questions before a teardown."""

    def status(
        self, move_ids: tuple[str, ...], unreadable: list[JournalError] | None = None
    ) -> tuple[MoveStatus, ...]:
        """How the moves stand; all of them when none is named.

        unreadable: takes what is wrong with a journal, so that the other moves are shown.
        """
        if len(move_ids) == 1:  # who asks for one waits for nothing that is for many
            loaded = self._load_each(move_ids, unreadable)
            return tuple(_sum_up(plan, self._look_at_sites(of, plan)) for of, plan in loaded)
        move_ids = move_ids or self.state.ids()
        with _overview(self.kernel) as overview:
            many = [*self._load_each(move_ids, unreadable, overview)]
            return tuple(self._see_each(many, overview, unreadable))

    def _see_each(
        self,
        loaded: Iterable[tuple[Journal, Plan]],
        overview: Overview,
        unreadable: list[JournalError] | None,
    ) -> Iterator[MoveStatus]:
        for journal, plan in loaded:
            yield from self._see(journal, plan, overview, unreadable)

    def _load_each(
        self,
        move_ids: Iterable[str],
        unreadable: list[JournalError] | None,
        overview: Overview | None = None,
    ) -> Iterator[tuple[Journal, Plan]]:
        for move_id in move_ids:
            try:
                journal, plan = self._load(move_id)
            except JournalError as error:
                if unreadable is None:
                    raise
                if self.state.knows(move_id):  # else it has been torn down meanwhile
                    unreadable.append(error)
                continue
            if overview is not None:
                overview.expect(journal, plan)
            yield journal, plan

    def _see(
        self,
        journal: Journal,
        plan: Plan,
        overview: Overview,
        unreadable: list[JournalError] | None,
    ) -> Iterator[MoveStatus]:
        """How the move stands; not at all if it has been torn down meanwhile."""
        sites = self._look_at_sites(journal, plan, overview)
        shown = any(overview.at(journal, site) for site in plan.move.sites)
        if shown and any(status.drift for status in sites):
            # Missing may be what was just being made or undone: so it is looked at for itself.
            for again, now in self._load_each([plan.move.id], unreadable):
                yield _sum_up(now, self._look_at_sites(again, now))
        else:
            yield _sum_up(plan, sites)

    def _look_at_sites(
        self, journal: Journal, plan: Plan, overview: Overview | None = None
    ) -> tuple[SiteStatus, ...]:
        """Each site that no other move has taken over; what lives is asked at all of them."""
        sites = [site for site in plan.move.sites if not is_retired(journal, plan, site)]
        if journal.boot != read_boot_id():
            why = "prepared before the last boot: nothing is there"
            return tuple(SiteStatus(site, None, (why,)) for site in sites)
        waiting = {site for site in sites if is_waiting(journal, plan, site)}
        gone: dict[Site, str] = {}
        eyes: dict[Site, Kernel | Snapshot] = {}
        for site in sites:
            eyes[site] = (overview and overview.at(journal, site)) or self.kernel
            try:
                if eyes[site] is self.kernel:
                    self.kernel.open_sites([site], {site: journal.identity(site)})
            except NamespaceGoneError as error:
                gone[site] = str(error)
        there = [site for site in sites if site not in gone and site not in waiting]
        sight = self._look_around(journal, plan, there, eyes)
        self.kernel.close_sites(sites)  # there may be more moves than descriptors
        return tuple(
            SiteStatus(site, None, (gone[site],))
            if site in gone
            else SiteStatus(site, None, ())
            if site in waiting
            else SiteStatus(site, sight.looks[site], sight.drift(site))
            for site in sites
        )

    def _look_around(
        self,
        journal: Journal,
        plan: Plan,
        sites: Iterable[Site],
        eyes: Mapping[Site, Kernel | Snapshot] = MappingProxyType({}),
    ) -> Sight:
        """What these opened sites show, and which connections live as far as that tells.

        eyes: who looks at a site, if it is not the kernel.
        """
        begun = time.monotonic_ns() // 1_000_000
        looks = {site: eyes.get(site, self.kernel).observe(site, plan) for site in sites}
        earlier = self.state.read_sighting(journal.move.id, journal.boot)
        age = time.monotonic() - earlier.at / 1000 if earlier is not None else 0.0
        frozen = not any(has_been_opened(journal, plan, site) for site in _ends(plan))
        from natkeep.plan.liveness import find_life  # a prepare need not wait for it

        lives = {}
        for site, seen in looks.items():
            recent = earlier.alive_at(plan, site) if earlier and age < seen.lingers else None
            lives[site] = find_life(
                plan, site, looks, frozen=frozen, recent=recent or NO_CONNECTIONS
            )
        opened = {site: has_been_opened(journal, plan, site) for site in looks}
        ways = {
            site: _find_lost_routes(journal, plan, site, eyes.get(site, self.kernel))
            for site in looks
        }
        return Sight(plan, begun, looks, lives, opened, earlier, ways)

    def _note_sighting(self, journal: Journal, sight: Sight) -> None:
        """What a gateway alone will know of its connections only if it is remembered."""
        if {site.role for site in sight.looks} == {Role.GATEWAY}:
            from natkeep.plan.liveness import make_sighting

            sighting = make_sighting(
                sight.plan, sight.begun, sight.looks, sight.lives, sight.earlier
            )
            self.state.write_sighting(journal.move.id, journal.boot, sighting)

    def count_alive(self, move_id: str) -> int:
        """How many connections a teardown would break; 0 while the move has not been opened.

        The destination's sockets tell, and elsewhere conntrack: where somebody has flushed it,
        nothing of it lives to be seen, though the connections may.
        """
        journal, plan = self._load(move_id)
        alive: dict[Role, list[int]] = {}
        opened = any(has_been_opened(journal, plan, site) for site in _ends(plan))
        for status in self._look_at_sites(journal, plan):
            site, seen = status.site, status.seen
            if seen is None:
                continue
            if site.role == Role.GATEWAY and plan.move.holds and not opened:
                continue  # its gate is open so that the holder hears the peers
            # A gate that was being opened when natkeep was killed is open, though nobody noted it.
            if seen.gate == Gate.OPEN or has_been_opened(journal, plan, site):
                alive.setdefault(site.role, []).append(seen.alive + seen.callers)
        # Opened at the source, the process is back where OLD is at home, and needs nothing.
        return min(alive.get(Role.DESTINATION) or alive.get(Role.GATEWAY) or [0])

    def find_unheld(self, move_id: str) -> tuple[str, ...]:
        """Why what peers say meanwhile is not held, where it should be; else nothing."""
        journal, plan = self._load(move_id)
        records = {n: record.prior.facts for n, record in journal.records.items()}
        return tuple(
            f"{step.site}: what peers say meanwhile is not held: {records[number]['refused']}"
            for number, step in enumerate(plan.prepare)
            if isinstance(step, HoldSegments) and "refused" in records.get(number, {})
        )

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
        looked = self._look_at_sites(journal, plan)
        looks = {one.site: one.seen for one in looked if one.site.role == Role.SOURCE}
        found = []
        for site in plan.move.sites:
            seen = looks.get(site)
            if seen and seen.gate == Gate.CLOSED and seen.addresses and not seen.alive:
                olds = ", ".join(str(old) for old in sorted(seen.addresses, key=str))
                peers = {t.source for one in plan.translations for t in one.kept}
                found.append(
                    f"{site} still has OLD {olds}: it would answer {len(peers)} peers with a reset"
                )
        return tuple(found)


@contextmanager
def _overview(kernel: Kernel) -> Iterator[Overview]:
    from natkeep.lifecycle.overview import Overview  # for status of many moves alone

    with closing(Overview(kernel)) as overview:
        yield overview


def _sum_up(plan: Plan, sites: tuple[SiteStatus, ...]) -> MoveStatus:
    opening = {step.site for step in plan.open if isinstance(step, OpenGate)}
    gates = {s.seen.gate for s in sites if s.seen is not None and s.site in opening}
    return MoveStatus(plan, Gate.OPEN if gates == {Gate.OPEN} else Gate.CLOSED, sites)


def _find_lost_routes(
    journal: Journal, plan: Plan, site: Site, eyes: Kernel | Snapshot
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Routes and addresses that were there at prepare, each with the step that noted them."""
    found = []
    for number, step in enumerate(plan.prepare):
        record = journal.records.get(number)
        if step.site == site and isinstance(step, InstallTranslation) and record is not None:
            lost = eyes.find_lost_routes(site, str(record.prior.facts.get("ways", "")))
            if lost:
                found.append((number, lost))
    return tuple(found)


def has_been_opened(journal: Journal, plan: Plan, site: Site) -> bool:
    """Whether the connections were let through at *site*, and are to be."""
    opening = range(len(plan.prepare), len(plan.steps))
    return any(plan.steps[n].site == site and journal.has_been_done(n) for n in opening)


def _ends(plan: Plan) -> list[Site]:
    """Where opening means that the process runs: at the destination, if that is a site."""
    sites = [site for site in plan.move.sites if site.role == Role.DESTINATION]
    return sites or list(plan.move.sites)


def is_retired(journal: Journal, plan: Plan, site: Site) -> bool:
    """Whether another move has replaced this one at *site*."""
    numbers = [n for n, step in enumerate(plan.steps) if step.site == site]
    records = [journal.records[n].state for n in numbers if n in journal.records]
    return bool(records) and set(records) == {"undone"}
