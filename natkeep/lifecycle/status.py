"""status: how the moves stand, what lives of them, and what is not as it was put there.

One move is looked at by itself. Of many, a namespace that is a site of 16 moves or more is read
once for all of them (`make many`: 300 moves in a seventh of the time).

Rule: nothing is said to be missing because what was read for many moves does not show it; such a
move is looked at again, for itself, before that is said.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, suppress
from types import MappingProxyType

from natkeep.errors import JournalError
from natkeep.kernel.interface import Kernel, Snapshot
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.kernel.segment_holder import look
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.owners import leave_to_owners
from natkeep.lifecycle.progress import (
    has_been_opened,
    is_retired,
    is_waiting,
    opened_at,
    restored_at,
)
from natkeep.plan.connection_state import (
    ONE_WAY_S,
    SiteStatus,
    find_fallen_silent,
    find_one_way,
)
from natkeep.plan.drift import MoveStatus, find_drift
from natkeep.plan.identity import Identity
from natkeep.plan.liveness import Life, Sighting, find_life, make_sighting
from natkeep.plan.move import Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.repair import Patch, RestoreRoutes, describe_lost_routes, find_patches
from natkeep.plan.roles import Role
from natkeep.plan.step_undo import RestoreForwarding
from natkeep.plan.steps import AddRules, InsertEntries, InstallTranslation, OpenGate, Plan
from natkeep.plan.tuples import NO_CONNECTIONS
from natkeep.state.directory import read_boot_id
from natkeep.state.journal import Journal
from natkeep.values import dataclass, replace

Reader = Kernel | Snapshot
"""What shows a site: the kernel, or what was read of a namespace for many moves."""

_MANY = 16
"""So many moves, looked at one by one, take longer than reading all that there is once."""

_MOST = 100
"""Namespaces read for many moves at a time; each has some descriptors open."""


def read_status(
    executor: Executor, move_ids: tuple[str, ...], unreadable: list[JournalError] | None = None
) -> tuple[MoveStatus, ...]:
    """How the moves stand; all of them when none is named.

    unreadable: takes what is wrong with a journal, so that the other moves are shown.
    """
    if len(move_ids) == 1:
        loaded = _load_each(executor, move_ids, unreadable)
        return tuple(
            _sum_up(executor, of, plan, look_at_sites(executor, of, plan)) for of, plan in loaded
        )
    move_ids = move_ids or executor.state.ids()
    with closing(_Shared(executor.kernel)) as shared:
        many = []
        for journal, plan in _load_each(executor, move_ids, unreadable):
            shared.expect(journal, plan)
            many.append((journal, plan))
        return tuple(
            status
            for journal, plan in many
            for status in _read_one_of_many(executor, journal, plan, shared, unreadable)
        )


def _load_each(
    executor: Executor, move_ids: Iterable[str], unreadable: list[JournalError] | None
) -> Iterator[tuple[Journal, Plan]]:
    for move_id in move_ids:
        try:
            yield executor.load(move_id)
        except JournalError as error:
            if unreadable is None:
                raise
            if executor.state.knows(move_id):  # else it has been torn down meanwhile
                unreadable.append(error)


def _read_one_of_many(
    executor: Executor,
    journal: Journal,
    plan: Plan,
    shared: _Shared,
    unreadable: list[JournalError] | None,
) -> Iterator[MoveStatus]:
    """How the move stands; not at all if it has been torn down meanwhile."""
    sites = look_at_sites(executor, journal, plan, shared)
    shown = any(shared.at(journal, site) for site in plan.move.sites)
    if shown and any(status.drift for status in sites):
        # Missing may be what was just being made or undone: so it is looked at for itself.
        for again, now in _load_each(executor, [plan.move.id], unreadable):
            yield _sum_up(executor, again, now, look_at_sites(executor, again, now))
    else:
        yield _sum_up(executor, journal, plan, sites)


def _sum_up(
    executor: Executor, journal: Journal, plan: Plan, sites: tuple[SiteStatus, ...]
) -> MoveStatus:
    opening = {step.site for step in plan.open if isinstance(step, OpenGate)}
    gates = {s.seen.gate for s in sites if s.seen is not None and s.site in opening}
    gate = Gate.OPEN if gates == {Gate.OPEN} else Gate.CLOSED
    at = max((opened_at(journal, plan, site) or 0 for site in restored_at(plan)), default=0)
    before = _read_settings(journal) if plan.move.vias else {}
    if journal.boot != read_boot_id():
        return MoveStatus(plan, gate, sites, before=before)
    if not at:
        held = look(executor.state.path, plan.move.id) if plan.move.holds else None
        return MoveStatus(plan, gate, sites, held=held, before=before)
    silent = None
    frozen = not (plan.move.live or plan.move.quiesces) and journal.begun
    if frozen and any(site.role == Role.DESTINATION for site in plan.move.sites):
        silent = (at - journal.begun) // 1_000_000
    # Interrupted between the two clocks it would be less, and another second each time.
    offset = max(time.time_ns() - time.monotonic_ns() for _ in range(3))
    return MoveStatus(plan, gate, sites, (at + offset) / 1e9, silent, before=before)


def _read_settings(journal: Journal) -> dict[str, str]:
    """What each setting was that a relay switched on."""
    journal.resolve()
    records = journal.records.values()
    return {
        one.undo.setting: str(one.prior.facts["before"])
        for one in records
        if isinstance(one.undo, RestoreForwarding) and "before" in one.prior.facts
    }


class Watch:
    """Looks at the same moves again and again, and what each tells beside the others."""

    def __init__(self) -> None:
        self._looks: list[tuple[float, dict[tuple[str, Site], SiteStatus]]] = []

    def compare(self, moves: Iterable[MoveStatus]) -> tuple[MoveStatus, ...]:
        """*moves*, with the drift that shows only beside what was seen before."""
        now, found = time.monotonic(), tuple(moves)
        here = {(move.plan.move.id, site.site): site for move in found for site in move.sites}
        old = [number for number, (at, _) in enumerate(self._looks) if now - at >= ONE_WAY_S]
        if old and len(self._looks) > old[-1] + 1:
            earlier = (self._looks[old[-1]][1], self._looks[-1][1])
            found = tuple(_compare(move, earlier) for move in found)
        self._looks = [*self._looks[old[-1] if old else 0 :], (now, here)]
        return found


def _compare(
    move: MoveStatus, earlier: Iterable[Mapping[tuple[str, Site], SiteStatus]]
) -> MoveStatus:
    sites, move_id = [], move.plan.move.id
    for site in move.sites:
        looks = [look[move_id, site.site] for look in earlier if (move_id, site.site) in look]
        if len(looks) == 2 and site.site.row.leaves and not site.drift:
            lines = tuple(find_fallen_silent([*looks, site], move.sites, move_id))
            site = replace(site, drift=lines)
        sites.append(site)
    return replace(move, sites=tuple(sites))


def _seconds_since(nanoseconds: int) -> float:
    return (time.monotonic_ns() - nanoseconds) / 1e9


# ---- one move ----------------------------------------------------------------------------------


def look_at_sites(
    executor: Executor, journal: Journal, plan: Plan, shared: _Shared | None = None
) -> tuple[SiteStatus, ...]:
    """Each site that no other move has taken over; what lives is asked at all of them."""
    sites = [site for site in plan.move.sites if not is_retired(journal, plan, site)]
    if journal.boot != read_boot_id():
        why = "prepared before the last boot: nothing is there"
        return tuple(SiteStatus(site, None, (why,)) for site in sites)
    found: dict[Site, SiteStatus] = {}
    readers: dict[Site, Reader] = {}
    for site in sites:
        reader: Reader = (shared and shared.at(journal, site)) or executor.kernel
        try:
            if reader is executor.kernel:
                executor.open_known(journal, [site])
        except NamespaceGoneError as error:
            found[site] = SiteStatus(site, None, (str(error),))
            continue
        if is_waiting(journal, plan, site):
            found[site] = SiteStatus(site, None, ())
        else:
            readers[site] = reader
    sight = look_around(executor, journal, plan, readers, readers)
    executor.kernel.close_sites(sites)  # there may be more moves than descriptors
    found |= {site: _stand(journal, sight, site) for site in readers}
    # What a repair has just made counts from then on, so it says nothing yet.
    if sight.earlier is None or sight.begun - sight.earlier.at >= ONE_WAY_S * 1000:
        known = tuple(found.values())
        for site in readers:
            kept = [t for t in plan.translations if t.site == site]
            lines = find_one_way(plan.move.id, found[site], known, kept)
            found[site] = replace(found[site], drift=(*found[site].drift, *lines))
    return tuple(found[site] for site in sites)


def _stand(journal: Journal, sight: Sight, site: Site) -> SiteStatus:
    plan, at = sight.plan, opened_at(journal, sight.plan, site)
    since = None if at is None else _seconds_since(at) if at else math.inf
    ended = {}
    for number, bits in sight.earlier.ended if sight.earlier is not None else ():
        step = plan.steps[number] if number < len(plan.steps) else None
        if isinstance(step, InsertEntries) and step.site == site:
            ended[step.translation.number] = int(bits, 16)
    return SiteStatus(site, sight.looks[site], sight.drift(site), since, ended)


@dataclass(frozen=True, slots=True)
class Sight:
    """What all sites of a move showed at one time, and what follows from that.

    earlier: what the last repair saw of entries at a gateway.
    lost_routes: routes and addresses of others that are gone, with the numbers of their steps.
    begun: when the looking began, in milliseconds of the monotonic clock.
    """

    plan: Plan
    begun: int
    looks: dict[Site, Observation]
    lives: dict[Site, Life]
    opened: dict[Site, bool]
    earlier: Sighting | None
    lost_routes: dict[Site, tuple[tuple[int, tuple[str, ...]], ...]]

    def drift(self, site: Site) -> tuple[str, ...]:
        """What is not there as it was put there, in words."""
        seen, life = self.looks[site], self.lives[site]
        lost = [line for _, notes in self.lost_routes[site] for line in describe_lost_routes(notes)]
        return (*find_drift(self.plan, site, seen, life, opened=self.opened[site]), *lost)

    def entries(self) -> Sighting:
        """What the entries tell, with what was seen earlier."""
        return make_sighting(self.plan, self.begun, self.looks, self.lives, self.earlier)

    def patches(self, site: Site) -> list[tuple[int, Patch]]:
        """What puts it back, each with the number of its step."""
        seen, life = self.looks[site], self.lives[site]
        found = [*find_patches(self.plan, site, seen, life, opened=self.opened[site])]
        lost = [(number, RestoreRoutes(site, notes)) for number, notes in self.lost_routes[site]]
        # Among OLD's rules is a route with the source that the way there has, once it is back.
        steps = enumerate(self.plan.prepare)
        rules = [(n, s) for n, s in steps if isinstance(s, AddRules) and s.site == site]
        return [*lost, *found, *(one for one in rules if lost and one not in found)]


def look_around(
    executor: Executor,
    journal: Journal,
    plan: Plan,
    sites: Iterable[Site],
    readers: Mapping[Site, Reader] = MappingProxyType({}),
) -> Sight:
    """What these opened sites show, and which connections live as far as that tells.

    readers: what shows a site, if it is not the kernel.
    """
    begun = time.monotonic_ns() // 1_000_000
    by = {site: readers.get(site, executor.kernel) for site in sites}
    looks = {site: reader.observe(site, plan) for site, reader in by.items()}
    looks = leave_to_owners(executor.kernel, executor.state, journal, plan, looks, by)
    earlier = executor.state.read_sighting(journal.move.id, journal.boot)
    age = time.monotonic() - earlier.at / 1000 if earlier is not None else 0.0
    frozen = not any(has_been_opened(journal, plan, site) for site in restored_at(plan))
    lives = {}
    for site, seen in looks.items():
        recent = earlier.alive_at(plan, site) if earlier and age < seen.lingers else None
        lives[site] = find_life(plan, site, looks, frozen=frozen, recent=recent or NO_CONNECTIONS)
    opened = {site: has_been_opened(journal, plan, site) for site in looks}
    lost_routes = {
        site: _find_lost_routes(journal, plan, site, reader) for site, reader in by.items()
    }
    return Sight(plan, begun, looks, lives, opened, earlier, lost_routes)


def _find_lost_routes(
    journal: Journal, plan: Plan, site: Site, reader: Reader
) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """Routes and addresses that were there at prepare, each with the step that noted them."""
    found = []
    for number, step in enumerate(plan.prepare):
        record = journal.records.get(number)
        if step.site == site and isinstance(step, InstallTranslation) and record is not None:
            lost = reader.find_lost_routes(site, str(record.prior.facts.get("ways", "")))
            if lost:
                found.append((number, lost))
    return tuple(found)


def note_sighting(executor: Executor, journal: Journal, sight: Sight) -> None:
    """What only entries tell is known later only if it is remembered.

    Where a destination's sockets tell what lives, only of the ends is anything new to be noted.
    """
    seen, before = sight.entries(), sight.earlier or Sighting(0, ())
    known = any(look.sockets is not None for look in sight.looks.values())
    if known and (dict(seen.ended), seen.ending) == (dict(before.ended), before.ending):
        return
    executor.state.write_sighting(journal.move.id, journal.boot, seen)


def remember_sighting(executor: Executor, journal: Journal, sight: Sight) -> None:
    """The same without the move's lock, which is taken; not where another natkeep is at work."""
    with suppress(JournalError), executor.state.holding(journal.move.id, timeout=0) as there:
        if there:
            note_sighting(executor, journal, sight)


# ---- many moves --------------------------------------------------------------------------------


class _Shared:
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
        """What was read of *site*, if it was."""
        return self._taken.get(journal.identity(site))

    def close(self) -> None:
        """Let go of all of them."""
        while self._taken:
            self._taken.popitem()[1].close()
