"""repair: what another program took away is put back, and nothing else is touched.

A site is looked at once; what is missing there (plan/repair.py) is done again in the order in
which it was done first: a gate is closed before there is a translation, and its accept comes last,
so that no segment passes what is only half there.

Rule: the look, which takes seconds for a million connections, has no lock. What is missing is put
back under the locks, if the journal is as it was and the tables lack the same; else all is looked
at again. An address is given back to a host only where no other on its links has it by now.
"""

from __future__ import annotations

from natkeep import faultpoints
from natkeep.errors import NatkeepError, RefusedError
from natkeep.kernel.neighbours import find_owner
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.owners import is_left_to_others
from natkeep.lifecycle.progress import is_retired, is_waiting, refuse_earlier_boot, unprepared
from natkeep.lifecycle.status import Sight, look_around, note_sighting, remember_sighting
from natkeep.plan.base_chains import EARLY, early_hook, gate_hook
from natkeep.plan.move import Site
from natkeep.plan.repair import Patch, RestoreRoutes, StopCounting
from natkeep.plan.steps import AddAddress, InsertEntries, Plan, Prior
from natkeep.plan.tuples import Address
from natkeep.state.journal import Journal
from natkeep.values import dataclass

ADDED = ("rules that the natkeep which prepared the move did not have",)
"""In the place of what is missing, where none of it ever was there."""

_TRIES = 3
"""Looks without a lock; the one after them has it."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """What was missing at a site, in words, and the commands that put it back.

    left: what is missing still, since another host would be harmed.
    """

    site: Site
    drift: tuple[str, ...]
    commands: tuple[str, ...]
    left: tuple[str, ...] = ()


def repair(executor: Executor, move_id: str) -> tuple[Repaired, ...]:
    """Put back what is missing of a move; a site at which nothing is missing is left out.

    JournalError when the move is of an earlier boot or was never prepared to the end,
    RefusedError when one of its namespaces is gone. An error of the kernel leaves what was
    put back until then; the rest is put back by the next repair, or undone by teardown.
    """
    for _ in range(_TRIES):
        is_same = executor.state.watch(move_id)
        try:
            work = _look(executor, move_id)
        except NatkeepError:  # of a move that another natkeep is at, perhaps
            with executor.state.holding(move_id):
                if is_same():
                    raise
            continue
        try:
            if work.is_nothing():
                work.finish(executor)
                return work.found
            with executor.state.changing(move_id):
                if is_same() and work.is_needed_still(executor):
                    return _carry_out(executor, work)
        finally:
            executor.kernel.close_sites(work.plan.move.sites)
    with executor.state.changing(move_id):
        work = _look(executor, move_id)
        try:
            return _carry_out(executor, work)
        finally:
            executor.kernel.close_sites(work.plan.move.sites)


@dataclass(frozen=True, slots=True)
class _Work:
    """What a look at all sites of a move has shown, and what is to be done about it."""

    journal: Journal
    plan: Plan
    sight: Sight
    found: tuple[Repaired, ...]
    patches: tuple[tuple[int, Patch], ...]

    def is_nothing(self) -> bool:
        """Whether nothing is missing, and nothing unfinished."""
        return not self.patches and not any(r.again for r in self.journal.records.values())

    def is_needed_still(self, executor: Executor) -> bool:
        """Whether the tables lack the same, and no newer move has come to own what they lack.

        All else is added again without harm.
        """
        entries = [patch for _, patch in self.patches if isinstance(patch, InsertEntries)]
        for patch in entries:
            if is_left_to_others(executor.state, self.journal, patch.site, patch.translation):
                return False
        hooks = [one for dispatch in EARLY for one in early_hook(dispatch)]
        hook = {one.key() for one in (*gate_hook(), *hooks)}
        return all(
            executor.kernel.find_missing(site, self.plan) - hook == (seen.gone | seen.shut) - hook
            for site, seen in self.sight.looks.items()
        )

    def finish(self, executor: Executor) -> None:
        """What is done after each look."""
        remember_sighting(executor, self.journal, self.sight)
        executor.kernel.unhook_gates()


def _look(executor: Executor, move_id: str) -> _Work:
    journal, plan = executor.load(move_id)
    refuse_earlier_boot(journal)
    _refuse_unprepared(journal, plan)
    sites = [
        site
        for site in plan.move.sites
        if not (is_retired(journal, plan, site) or is_waiting(journal, plan, site))
    ]
    try:
        executor.open_known(journal, sites)
    except NamespaceGoneError as error:
        raise RefusedError(
            f"move {plan.move.id}: {error}",
            hint=f"natkeep teardown {plan.move.id} clears the rest",
        ) from error
    sight = look_around(executor, journal, plan, sites)
    found, patches = [], []
    for site in sites:
        here = [*_find_unfinished(journal, plan, site), *sight.patches(site)]
        taken = _find_taken(executor, plan, site, [patch for _, patch in here])
        here = [(n, p) for n, p in here if not (isinstance(p, AddAddress) and p.address in taken)]
        commands = tuple(line for _, patch in here for line in patch.describe())
        if here or taken:
            absent = {f"address {old}: not on this host" for old in taken}
            drift = tuple(line for line in sight.drift(site) if line not in absent)
            drift = drift or (ADDED if here else ())
            found.append(Repaired(site, drift, commands, tuple(taken.values())))
        patches += here
    # In the plan's order, so that no gate opens before all that stands behind it is there; what
    # others have taken, by which the rest finds its way, before.
    patches.sort(key=lambda each: (not isinstance(each[1], RestoreRoutes), each[0]))
    return _Work(journal, plan, sight, tuple(found), tuple(patches))


def _find_taken(
    executor: Executor, plan: Plan, site: Site, patches: list[Patch]
) -> dict[Address, str]:
    """Of the addresses that are to be put back those that another host has by now, in words."""
    taken = {}
    for patch in patches:
        if isinstance(patch, AddAddress):
            news = [map_.new for map_ in plan.move.maps if map_.old == patch.address]
            owner = executor.kernel.ask(site, find_owner, patch.address, *news)
            if owner:
                taken[patch.address] = f"address {patch.address}: another host has it, {owner}"
    return taken


def _carry_out(executor: Executor, work: _Work) -> tuple[Repaired, ...]:
    journal = work.journal
    for number, patch in work.patches:
        _mend(executor, journal, work.plan, number, patch)
    for number, record in journal.records.items():
        if record.again:  # an earlier repair was killed before it could say so
            journal.note(number, "done", record.prior)
    note_sighting(executor, journal, work.sight)
    executor.kernel.unhook_gates()
    return work.found


def _mend(executor: Executor, journal: Journal, plan: Plan, number: int, patch: Patch) -> None:
    for line in patch.describe():
        executor.talk(f"[+] {line}")
    kind, before = type(plan.steps[number]).__name__, journal.records[number].prior
    if isinstance(patch, StopCounting):
        before = Prior(before.present, {k: v for k, v in before.facts.items() if k != "acct"})
    faultpoints.reach("repair", kind)

    def remember(found: Prior) -> None:
        # What was there before the move counts, not what there is now; but an accounting that
        # is switched on for a moment must be known if we are killed in that moment.
        now = {key: value for key, value in found.facts.items() if key == "acct"}
        prior = Prior(before.present, {**before.facts, **now})
        journal.note(number, "doing", prior, plan.steps[number])
        faultpoints.reach("repair-begun", kind)

    executor.kernel.mend(patch, remember)
    faultpoints.reach("repaired", kind)
    journal.note(number, "done", before)


def _refuse_unprepared(journal: Journal, plan: Plan) -> None:
    for number, step in enumerate(plan.prepare):
        if journal.has_been_done(number) or is_waiting(journal, plan, step.site):
            continue
        if not is_retired(journal, plan, step.site):
            raise unprepared(journal)


def _find_unfinished(journal: Journal, plan: Plan, site: Site) -> list[tuple[int, Patch]]:
    """Accounting that an earlier repair switched on and, killed in that moment, left on."""
    return [
        (number, StopCounting(site))
        for number, step in enumerate(plan.steps)
        if step.site == site
        and (record := journal.records.get(number)) is not None
        and record.again
        and "acct" in record.prior.facts
    ]
