"""gc: what a crash or a reboot left is cleared; what is in use, or cannot be read, is not.

Cleared are moves of an earlier boot (nothing of them is there), moves whose namespaces are all
gone, moves that were begun and never prepared to the end, moves whose undoing was begun and never
ended, moves that the hook prepared for a CRIU that is no more, and moves whose connections have
all ended. Then what bears our names and no journal knows, in the state directory and at the sites.

Rule: the looks have no lock. What is cleared is cleared under the locks, if its journal is as it
was when it was looked at; a move that another natkeep is at work on is left to the next gc. A
journal that cannot be read is named and left alone, and so is what bears its id.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from natkeep import faultpoints
from natkeep.errors import JournalError, LeftoverError, NatkeepError
from natkeep.kernel import nft_strays, sock_diag
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.kernel.old_address import find_idle
from natkeep.kernel.stray_connections import count_living
from natkeep.kernel.undone_table import has_undone, read_undone
from natkeep.lifecycle.executor import Executor, forget
from natkeep.lifecycle.progress import has_been_opened, is_retired, was_closed
from natkeep.lifecycle.status import look_around, remember_sighting
from natkeep.lifecycle.teardown import end
from natkeep.plan.identity import Identity
from natkeep.plan.liveness import Sighting
from natkeep.plan.move import Site
from natkeep.plan.roles import Role
from natkeep.plan.silence import find_keys
from natkeep.plan.step_undo import RemoveAddress, RemoveRules, RemoveUndone
from natkeep.plan.steps import Plan, Prior
from natkeep.plan.tuples import Address
from natkeep.state.directory import read_boot_id
from natkeep.state.journal import Journal
from natkeep.values import dataclass, field


@dataclass(frozen=True, slots=True)
class Cleared:
    """What was cleared (`move`, `file`, `table`, `address` or `drop`), its name, and why."""

    kind: str
    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Collected:
    """What gc cleared, or would, and what it could not, as errors."""

    cleared: tuple[Cleared, ...]
    left: tuple[NatkeepError, ...]


def gc(
    executor: Executor,
    sites: tuple[Site, ...],
    is_abandoned: Callable[[str], bool] = lambda move_id: False,
    *,
    dry_run: bool = False,
    yes: bool = False,
) -> Collected:
    """Clear what is not needed any more, at *sites* and where journals say that moves were.

    is_abandoned: whether a move was made for a CRIU that is no more. dry_run: only say what.
    yes: also what no journal knows and connections live by; it may be another state directory's.
    """
    executor.state.refuse_foreign_path()
    collection = _Collection(executor, dry_run, yes)
    places: dict[tuple[str, Identity | None], Site] = {(site.netns, None): site for site in sites}
    for move_id in executor.state.ids():
        header = executor.state.read_header(move_id)
        if header is not None and header.boot == read_boot_id():
            for site, identity in zip(header.move.sites, header.namespaces, strict=True):
                places.setdefault((site.netns, identity), site)
        collection.clear_move(move_id, is_abandoned)
        # There may be more moves than descriptors.
        executor.kernel.close_sites(header.move.sites if header is not None else ())
    collection.clear_files()
    for (_, known), site in places.items():
        collection.clear_site(site, known)
        executor.kernel.close_sites([site])
    return Collected(tuple(collection.cleared), tuple(collection.left))


@dataclass(slots=True)
class _Collection:
    """What has been cleared, or would be, and what could not; gone: the moves among it."""

    executor: Executor
    dry_run: bool
    yes: bool
    cleared: list[Cleared] = field(default_factory=list)
    left: list[NatkeepError] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    seen: set[Identity] = field(default_factory=set)

    def clear_move(self, move_id: str, is_abandoned: Callable[[str], bool]) -> None:
        state = self.executor.state
        is_same = state.watch(move_id)
        try:
            reason = _find_reason(self.executor, move_id, is_abandoned, dry_run=self.dry_run)
            if not reason or not (self.dry_run or self._end_move(move_id, is_same)):
                return
        except NatkeepError as error:
            if is_same():  # else another natkeep was at it
                self.left.append(error)
            return
        self.gone.add(move_id)
        self.cleared.append(Cleared("move", move_id, reason))

    def _end_move(self, move_id: str, is_same: Callable[[], bool]) -> bool:
        """Undo it, if its journal is as it was."""
        state = self.executor.state
        with state.changing(move_id):
            if not is_same():
                return False
            journal = state.load(move_id)
            if journal.boot != read_boot_id():
                forget(journal)  # whatever its steps were: nothing of them is there
            else:
                end(self.executor, move_id)
            faultpoints.reach("collected", "move")
        return True

    def clear_files(self) -> None:
        state = self.executor.state
        if not (strays := state.strays()):
            return
        if not state.is_natkeeps():
            hint = "remove them by hand, if they are"
            names = f"{', '.join(strays)}: {state.path} was not made by natkeep"
            self.left.append(LeftoverError(f"not known to be natkeep's: {names}", hint=hint))
            return
        # Without the locks they may be of a natkeep that is just writing them.
        with state.changing(*strays.values()):
            for name in sorted(state.strays().keys() & strays):
                if not self.dry_run:
                    state.remove_stray(name)
                self.cleared.append(Cleared("file", name, "no journal knows it"))

    def clear_site(self, site: Site, identity: Identity | None) -> None:
        kernel = self.executor.kernel
        try:
            kernel.open_sites([site], None if identity is None else {site: identity})
        except NamespaceGoneError:
            return
        here = kernel.identity(site)
        if here in self.seen:
            return
        self.seen.add(here)
        try:
            self._clear_undone(site, here)
            if self._has_strays(site, here):
                with self.executor.state.locked():  # what is just being prepared is known by then
                    self._clear_strays(site, here)
            if kernel.ask(site, find_idle):
                with self.executor.state.locked():
                    self._clear_addresses(site, here)
        except NatkeepError as error:
            self.left.append(error)

    def _clear_undone(self, site: Site, here: Identity) -> None:
        """What undos have left there for a while, but for those of this very gc."""
        kernel = self.executor.kernel
        if here in self.executor.dropped or not kernel.ask(site, has_undone):
            return
        some = kernel.ask(site, read_undone)
        if not self.dry_run:
            kernel.revert(site, RemoveUndone(some), Prior())
        self.cleared.append(Cleared("drop", str(site), f"of {len(some)} connections undone"))

    def _clear_addresses(self, site: Site, here: Identity) -> None:
        """What the last move there could not take away, since connections of none needed it."""
        _, olds, sure = _find_known(self.executor, here, ())
        for old in self.executor.kernel.ask(site, find_idle) if sure else ():
            if old in olds:  # of a process that talks to itself alone: there is no rule for it
                continue
            if not self.dry_run:
                for undo in (RemoveAddress(old), RemoveRules((), (old,))):
                    self.executor.kernel.revert(site, undo, Prior())
            self.cleared.append(Cleared("address", f"{old} at {site}", "nothing needs it any more"))

    def _has_strays(self, site: Site, here: Identity) -> bool:
        known, _, sure = _find_known(self.executor, here, self.gone if self.dry_run else ())
        table = self.executor.kernel.ask(site, nft_strays.read_table)
        whole = not known and sure and (table.there or table.silent)
        if table.ids() - known - (self.gone if self.dry_run else set()):
            return True
        return whole and not (self.dry_run and self.gone)

    def _clear_strays(self, site: Site, here: Identity) -> None:
        kernel = self.executor.kernel
        if not self._has_strays(site, here):
            return
        known, olds, sure = _find_known(self.executor, here, self.gone if self.dry_run else ())
        table = kernel.ask(site, nft_strays.read_table)
        strays = table.ids() - known - (self.gone if self.dry_run else set())
        living = {} if self.yes else kernel.ask(site, count_living, table, strays, olds)
        if living:
            self.left.append(_name_living(site, living))
            known, strays = known | living.keys(), strays - living.keys()
            if not strays:
                return
        if not self.dry_run:
            kernel.clear_strays(site, known, olds, sure=sure and not living)
            faultpoints.reach("collected", "table")
        for old in [old for old in table.held if old not in olds] if sure and not living else []:
            # Whether it was there before us only the journal knew: it is named, not taken.
            prefix = f"{old}/{old.max_prefixlen}"
            hint = f"ip address del {prefix} dev lo, unless it is at home there"
            self.left.append(LeftoverError(f"{site}: OLD {old} may still be on lo", hint=hint))
        names = ", ".join(sorted(strays)) or "nothing of any move"
        self.cleared.append(Cleared("table", str(site), f"no journal knows {names}"))


def _name_living(site: Site, living: dict[str, tuple[int, str]]) -> LeftoverError:
    told = "; ".join(
        f"{number} connections of {move_id or 'no move'} live (as that of {peer})"
        for move_id, (number, peer) in sorted(living.items())
    )
    return LeftoverError(
        f"{site}: {told}: no journal here knows them, and one of another state directory may",
        hint="natkeep gc --yes clears them all the same, and ends these connections",
    )


def _find_known(
    executor: Executor, here: Identity, gone: Collection[str]
) -> tuple[frozenset[str], frozenset[Address], bool]:
    """Ids and OLDs of the moves at a namespace, and whether every journal could be read."""
    known: set[str] = set()
    olds: set[Address] = set()
    sure = True
    for move_id in executor.state.ids():
        header = executor.state.read_header(move_id)
        if header is None:
            known.add(move_id)
            sure = False
        elif header.is_at(here) and move_id not in gone:
            known.add(move_id)
            olds |= header.olds()
    return frozenset(known), frozenset(olds), sure


# ---- is a move needed? -------------------------------------------------------------------------


def _find_reason(
    executor: Executor, move_id: str, is_abandoned: Callable[[str], bool], *, dry_run: bool
) -> str:
    """Why the move is not needed any more; empty when it may be."""
    header = executor.state.read_header(move_id)
    if header is not None and header.boot != read_boot_id():
        return "of an earlier boot"
    journal, plan = executor.load(move_id)
    here = [site for site in plan.move.sites if executor.reach(journal, site)]
    if not here:
        return "its namespaces are gone"
    if not journal.is_whole():
        return "begun and never prepared to the end"
    if _is_half_undone(executor, journal, plan):
        return "its undoing was begun and never ended"
    opened = [site for site in plan.move.sites if has_been_opened(journal, plan, site)]
    leaves = any(site.role in (Role.SOURCE, Role.RELAY) for site in plan.move.sites)
    closed = any(was_closed(journal, plan, site) for site in plan.move.sites)
    if is_abandoned(move_id) and not (opened or closed or leaves):
        return "the CRIU that it was prepared for is no more"
    if (
        opened
        and not plan.move.quiesces
        and _has_ended(executor, journal, plan, here, dry_run=dry_run)
    ):
        return "its connections have all ended"
    return ""


def _is_half_undone(executor: Executor, journal: Journal, plan: Plan) -> bool:
    """Whether a teardown was killed; one whose site is being taken over is another's."""
    if {record.state for record in journal.records.values()} == {"undone"}:
        return True
    for site in plan.move.sites:
        steps = (n for n, step in enumerate(plan.steps) if step.site == site)
        known = (n for n in steps if n in journal.records and not journal.is_closed_again(n))
        states = {journal.records[n].state for n in known}
        if "undone" in states and len(states) > 1:
            return not _is_replaced(executor, journal, site)
    return False


def _is_replaced(executor: Executor, journal: Journal, site: Site) -> bool:
    here, olds = journal.identity(site), {map_.old for map_ in journal.move.maps}
    others = executor.state.others_at(here, journal.move.id)
    return any(olds & header.olds() for header in others)


def _has_ended(
    executor: Executor, journal: Journal, plan: Plan, here: list[Site], *, dry_run: bool
) -> bool:
    """Whether every kept connection lived and has ended, and no new one can come."""
    sites = [site for site in here if not is_retired(journal, plan, site)]
    if not sites or {site.role for site in plan.move.sites} == {Role.SOURCE}:
        return False  # where the process is at home, it needs nothing: that is teardown's
    sight = look_around(executor, journal, plan, sites)
    sighting = sight.entries()
    if not dry_run:
        remember_sighting(executor, journal, sight)
    destinations = [site for site in plan.move.sites if site.role == Role.DESTINATION]
    if not destinations:
        gateways = [site for site in sight.looks if sight.looks[site].sockets is None]
        datagrams = any(find_keys(plan, site, sight.looks[site]) for site in gateways)
        return not (plan.move.listeners or datagrams) and _are_ended(plan, sighting, gateways)
    [destination] = destinations
    if destination not in sight.looks:
        return destination not in here  # with its namespace went all that lived there
    seen = sight.looks[destination]
    if not sight.opened[destination]:
        return False
    if plan.move.listeners:
        olds = frozenset(map_.old for map_ in plan.move.maps)
        if seen.callers or executor.kernel.ask(destination, sock_diag.find_listeners, olds):
            return False
    # No socket may also mean that it is not restored yet, or dumped to move on. Of UDP no entry
    # tells, but peers that go on speaking.
    if seen.sockets or seen.inner or seen.datagrams or seen.bound or seen.silences:
        return False
    return _are_ended(plan, sighting, [destination])


def _are_ended(plan: Plan, sighting: Sighting, sites: list[Site]) -> bool:
    """Whether entries have shown at all *sites* that every connection has ended, but for UDP."""
    return bool(sites) and not any(sighting.count_unended(plan, site) for site in sites)


def demand_nothing_left(collected: Collected) -> None:
    """LeftoverError, or else JournalError, when something could not be cleared."""
    for kind in (LeftoverError, JournalError, NatkeepError):
        for error in collected.left:
            if isinstance(error, kind):
                raise error
