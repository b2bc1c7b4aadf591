"""gc: what a crash or a reboot left is cleared; what is in use, or cannot be read, is not.

Cleared are moves of an earlier boot (nothing of them is there), moves whose namespaces are all
gone, moves that were begun and never prepared to the end, moves whose undoing was begun and never
ended, moves that the hook prepared for a CRIU that is no more, and moves whose connections have
all ended. Then what bears our names and no journal knows, in the state directory and at the sites.

Rule: everything is done under the lock, so whoever is still at work on a move is not disturbed. A
journal that cannot be read is named and left alone, and so is what bears its id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from natkeep import faultpoints
from natkeep.errors import JournalError, LeftoverError, NatkeepError
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.lifecycle.executor import forget, is_whole
from natkeep.lifecycle.status import Looking, has_been_opened, is_retired
from natkeep.lifecycle.teardown import Ending
from natkeep.plan.move import Role, Site
from natkeep.plan.steps import Identity, Plan
from natkeep.plan.tuples import Address
from natkeep.state.journal import Journal, read_boot_id
from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class Cleared:
    """What was cleared (`move`, `file` or `table`), its name, and why."""

    kind: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What gc cleared, or would, and what it could not, as errors."""

    cleared: tuple[Cleared, ...]
    left: tuple[NatkeepError, ...]


class Collecting(Ending, Looking):
    """The verb gc."""

    def gc(
        self,
        sites: tuple[Site, ...],
        is_abandoned: Callable[[str], bool] = lambda move_id: False,
        *,
        dry_run: bool = False,
    ) -> Collected:
        """Clear what nobody needs any more, at *sites* and where journals say that moves were.

        is_abandoned: whether a move was made for a CRIU that is no more. dry_run: only say what.
        """
        with self.state.locked():
            cleared: list[Cleared] = []
            left: list[NatkeepError] = []
            places: dict[tuple[str, Identity | None], Site] = {
                (site.netns, None): site for site in sites
            }
            for move_id in self.state.ids():
                found = self.state.read_move(move_id)
                if found is not None and found[2] == read_boot_id():
                    for site, identity in zip(found[0].sites, found[1], strict=True):
                        places.setdefault((site.netns, identity), site)
                try:
                    reason = self._find_reason(move_id, is_abandoned)
                    if reason and not dry_run:
                        self._clear_move(move_id)
                except NatkeepError as error:
                    left.append(error)
                    continue
                finally:
                    # There may be more moves than descriptors.
                    self.kernel.close_sites(found[0].sites if found is not None else ())
                if reason:
                    cleared.append(Cleared("move", move_id, reason))
            gone = {one.name for one in cleared}
            cleared += self._clear_files(dry_run=dry_run)
            done: set[Identity] = set()
            for (_, known), site in places.items():
                cleared += self._clear_site(site, known, gone, done, left, dry_run=dry_run)
                self.kernel.close_sites([site])
            return Collected(tuple(cleared), tuple(left))

    def _find_reason(self, move_id: str, is_abandoned: Callable[[str], bool]) -> str:
        """Why nobody needs the move any more; empty when somebody may."""
        found = self.state.read_move(move_id)
        if found is not None and found[2] != read_boot_id():
            return "of an earlier boot"
        journal, plan = self._load(move_id)
        here = [site for site in plan.move.sites if self._reach(journal, site)]
        if not here:
            return "its namespaces are gone"
        if not is_whole(journal, plan):
            return "begun and never prepared to the end"
        if self._is_half_undone(journal, plan):
            return "its undoing was begun and never ended"
        opened = [site for site in plan.move.sites if has_been_opened(journal, plan, site)]
        leaves = any(site.role == Role.SOURCE for site in plan.move.sites)
        if is_abandoned(move_id) and not opened and not leaves:
            return "the CRIU that it was prepared for is no more"
        if opened and not plan.move.quiesces and self._has_ended(journal, plan, here):
            return "its connections have all ended"
        return ""

    def _clear_move(self, move_id: str) -> None:
        journal = self.state.load(move_id)
        if journal.boot != read_boot_id():
            forget(journal)  # whatever its steps were: nothing of them is there
        else:
            self._end(move_id)
        faultpoints.reach("collected", "move")

    def _is_half_undone(self, journal: Journal, plan: Plan) -> bool:
        """Whether a teardown was killed; one whose site is being taken over is another's."""
        if {record.state for record in journal.records.values()} == {"undone"}:
            return True
        for site in plan.move.sites:
            steps = (n for n, step in enumerate(plan.steps) if step.site == site)
            states = {journal.records[n].state for n in steps if n in journal.records}
            if "undone" in states and len(states) > 1:
                return not self._is_replaced(journal, site)
        return False

    def _is_replaced(self, journal: Journal, site: Site) -> bool:
        olds = {map_.old for map_ in journal.move.maps}
        for move_id in self.state.ids():
            found = self.state.read_move(move_id)
            if move_id == journal.move.id or found is None or found[2] != journal.boot:
                continue
            if journal.identity(site) in found[1] and olds & {m.old for m in found[0].maps}:
                return True
        return False

    def _has_ended(self, journal: Journal, plan: Plan, here: list[Site]) -> bool:
        """Whether every kept connection lived and has ended, and nobody can call any more."""
        sites = [site for site in here if not is_retired(journal, plan, site)]
        if not sites or {site.role for site in plan.move.sites} == {Role.SOURCE}:
            return False  # where the process is at home, it needs nothing: that is teardown's
        sight = self._look_around(journal, plan, sites)
        destinations = [site for site in plan.move.sites if site.role == Role.DESTINATION]
        if not destinations:
            self._note_sighting(journal, sight)
            earlier = self.state.read_sighting(journal.move.id, journal.boot)
            return not plan.move.listeners and earlier is not None and earlier.is_all_ended(plan)
        [destination] = destinations
        if destination not in sight.looks:
            return destination not in here  # with its namespace went all that lived there
        seen = sight.looks[destination]
        if not sight.opened[destination]:
            return False
        if plan.move.listeners:
            olds = frozenset(map_.old for map_ in plan.move.maps)
            if seen.callers or self.kernel.find_listeners(destination, olds):
                return False
        entries = [entry for some in seen.entries.values() for entry in some]
        # No socket may also mean that it is not restored yet, or dumped to move on: then nobody
        # has said goodbye, and conntrack believes in the connection still.
        return not seen.sockets and not any(entry and entry.alive for entry in entries)

    def _clear_files(self, *, dry_run: bool) -> list[Cleared]:
        found = []
        for name in self.state.strays():
            if not dry_run:
                self.state.remove_stray(name)
            found.append(Cleared("file", name, "no journal knows it"))
        return found

    def _clear_site(
        self,
        site: Site,
        identity: Identity | None,
        gone: set[str],
        done: set[Identity],
        left: list[NatkeepError],
        *,
        dry_run: bool,
    ) -> list[Cleared]:
        try:
            known_as = None if identity is None else {site: identity}
            self.kernel.open_sites([site], known_as)
        except NamespaceGoneError:
            return []
        here = self.kernel.identity(site)
        if here in done:
            return []
        done.add(here)
        known, olds, sure = self._find_known(here, gone if dry_run else ())
        try:
            table = self.kernel.find_strays(site)
            strays = table.ids() - known
            if dry_run:
                strays -= gone
            whole = not known and sure and (table.there or table.silent)
            if not strays and (not whole or (dry_run and gone)):
                return []
            if not dry_run:
                self.kernel.clear_strays(site, known, olds, sure=sure)
                faultpoints.reach("collected", "table")
        except NatkeepError as error:
            left.append(error)
            return []
        kept = [old for old in table.held if old not in olds] if sure else []
        left += self._find_addresses(site, kept)
        names = ", ".join(sorted(strays)) or "nothing of any move"
        return [Cleared("table", str(site), f"no journal knows {names}")]

    def _find_addresses(self, site: Site, olds: Iterable[Address]) -> list[NatkeepError]:
        # Whether such an address was there before us only the journal knew: it is named, not taken.
        return [
            LeftoverError(
                f"{site}: OLD {old} may still be on lo",
                hint=f"ip address del {old}/{old.max_prefixlen} dev lo, unless it is at home there",
            )
            for old in olds
        ]

    def _find_known(
        self, here: Identity, gone: Iterable[str]
    ) -> tuple[frozenset[str], frozenset[Address], bool]:
        """Ids and OLDs of the moves at a namespace, and whether every journal could be read."""
        known: set[str] = set()
        olds: set[Address] = set()
        sure = True
        for move_id in self.state.ids():
            found = self.state.read_move(move_id)
            if found is None:
                known.add(move_id)
                sure = False
            elif here in found[1] and found[2] == read_boot_id() and move_id not in gone:
                known.add(move_id)
                olds |= {map_.old for map_ in found[0].maps}
        return frozenset(known), frozenset(olds), sure


def demand_nothing_left(collected: Collected) -> None:
    """LeftoverError, or else JournalError, when something could not be cleared."""
    for kind in (LeftoverError, JournalError, NatkeepError):
        for error in collected.left:
            if isinstance(error, kind):
                raise error
