"""what every verb stands on: one kernel, one state directory; doing, undoing, and noting both.

Rule: the journal is written before and after each step. An undo goes on after a failure, and
what it could not undo it names (LeftoverError); it touches nothing that the journal does not say
is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from natkeep import faultpoints
from natkeep.errors import JournalError, LeftoverError, NatkeepError, RefusedError
from natkeep.kernel.interface import Kernel
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.plan.move import Move, Site
from natkeep.plan.nft import TABLE
from natkeep.plan.plan import make_plan
from natkeep.plan.steps import (
    AddAddress,
    InstallGate,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
    Step,
    TakeOverLock,
)
from natkeep.state.journal import Journal, Record, StateDirectory, read_boot_id
from natkeep.values import dataclass

T = TypeVar("T")
Talk = Callable[[str], None]
"""Where progress goes; one line without its newline."""


@dataclass
class Ground:
    """One kernel and one state directory."""

    kernel: Kernel
    state: StateDirectory
    talk: Talk = lambda line: None

    def _open_sites(self, move: Move) -> None:
        self.kernel.open_sites(move.sites)
        seen: dict[tuple[int, int], Site] = {}
        for site in move.sites:
            other = seen.setdefault(self.kernel.identity(site), site)
            if other is not site:
                raise RefusedError(f"{site} and {other} are the same network namespace")

    def _open_known(self, journal: Journal, plan: Plan) -> None:
        for site in plan.move.sites:
            self.kernel.open_sites([site], {site: journal.identity(site)})

    def _reach(self, journal: Journal, site: Site) -> bool:
        try:
            self.kernel.open_sites([site], {site: journal.identity(site)})
        except NamespaceGoneError as error:
            self.talk(f"natkeep: {error}, and with it all that was in it")
            return False
        return True

    def _load(self, move_id: str) -> tuple[Journal, Plan]:
        journal = self.state.load(move_id)
        plan = plan_of(journal)
        if kinds_of(plan) != journal.kinds:
            raise JournalError(
                f"move {move_id} was prepared by a natkeep that does other steps",
                hint="use that version to tear it down",
            )
        return journal, plan

    def _refuse_earlier_boot(self, journal: Journal) -> None:
        if journal.boot != read_boot_id():
            raise JournalError(
                f"move {journal.move.id} was prepared before the last boot; nothing of it is there",
                hint=f"natkeep teardown {journal.move.id}",
            )

    def _apply_or_undo(
        self,
        journal: Journal,
        plan: Plan,
        numbers: list[int],
        last: Callable[[], None] | None = None,
    ) -> None:
        try:
            for number in numbers:
                self._apply(journal, plan.steps[number], number)
            if last is not None:
                last()
        except BaseException as error:
            # Ctrl-C and SIGTERM too: leaving half a translation is what gets connections reset.
            self.talk(f"natkeep: {error or type(error).__name__}: undoing")
            finish(partial(self._undo_all, journal, plan, numbers, error))
            raise

    def _undo_all(
        self, journal: Journal, plan: Plan, numbers: list[int], reason: BaseException
    ) -> None:
        left = self._undo(journal, plan, reversed(numbers))
        if left:
            raise leftover(journal, left) from reason
        if set(journal.records) <= set(numbers):  # nothing was done besides
            forget(journal)

    def _apply(self, journal: Journal, step: Step, number: int) -> None:
        for line in step.describe():
            self.talk(f"[+] {line}")
        kind = type(step).__name__
        faultpoints.reach("apply", kind)
        earlier = journal.records.get(number)

        def remember(found: Prior) -> None:
            journal.note(number, "doing", _as_before_us(earlier, found))
            faultpoints.reach("begun", kind)

        prior = self.kernel.apply(step, remember)
        faultpoints.reach("applied", kind)
        journal.note(number, "done", _as_before_us(earlier, prior))
        faultpoints.reach("done", kind)

    def _undo(self, journal: Journal, plan: Plan, numbers: Iterable[int]) -> list[NatkeepError]:
        """Undo those of the steps that were begun, going on after a failure."""
        left: list[NatkeepError] = []
        incomplete: set[Site] = set()
        for number in numbers:
            record = journal.records.get(number)
            if record is None or record.state == "undone":
                continue
            step = plan.steps[number]
            self.talk(f"[-] {type(step).__name__} at {step.site}")
            kind = type(step).__name__
            try:
                faultpoints.reach("revert", kind)
                if not self._hand_over(journal, step, record):
                    self.kernel.revert(step, record.prior)
                faultpoints.reach("reverted", kind)
            except NatkeepError as error:
                left.append(error)
                incomplete.add(step.site)
                continue
            except Exception as error:  # a bug in one step must not keep the others in place
                left.append(NatkeepError(f"{kind} at {step.site}: {error or type(error).__name__}"))
                incomplete.add(step.site)
                continue
            if isinstance(step, InstallGate | PurgeEntries) and step.site in incomplete:
                # Undone once more when the rest is: the table goes with the last gate, and what
                # is given back could be taken for entries of ours that were left.
                continue
            # A full disk must not stop this: what the journal still has is only undone again.
            with suppress(Exception):
                journal.note(number, "undone", Prior())
                faultpoints.reach("undone", kind)
        return left

    def _hand_over(self, journal: Journal, step: Step, record: Record) -> bool:
        """Leave an address (or lo) that another move uses as well, and make that move its owner.

        Only the move that added it knows that it was not there before.
        """
        if not isinstance(step, AddAddress | RaiseLoopback) or record.prior.present:
            return False
        identity = journal.identity(step.site)
        for move_id in self.state.ids():
            found = self.state.read_move(move_id)
            if move_id == journal.move.id or found is None or identity not in found[1]:
                continue
            other = self.state.load(move_id)
            if other.boot != journal.boot:
                continue
            for number, theirs in enumerate(plan_of(other).steps):
                same = _is_same_thing(step, theirs) and other.identity(theirs.site) == identity
                if same and other.is_done(number):
                    other.note(number, "done", record.prior)
                    faultpoints.reach("handed-over")
                    return True
        return False


def _as_before_us(earlier: Record | None, found: Prior) -> Prior:
    """What a step that was begun before, and killed perhaps, found then: that counts."""
    if earlier is None or earlier.state == "undone":
        return found
    return Prior(earlier.prior.present, {**found.facts, **earlier.prior.facts})


def finish(undo: Callable[[], T]) -> T:
    """What *undo* returns; a signal that comes meanwhile is heeded when it is through.

    So it must be one that can be done again, as everything is that goes by the journal.
    """
    try:
        return undo()
    except Exception:
        raise
    except BaseException:
        undo()
        raise


def forget(journal: Journal) -> None:
    """Remove the journal of a move of which nothing is left at any site."""
    try:
        journal.remove()
    except Exception as error:
        raise LeftoverError(
            f"move {journal.move.id}: all is undone, but its journal is left: {error}",
            hint=f"natkeep teardown {journal.move.id} tries again",
        ) from error


def plan_of(journal: Journal) -> Plan:
    return make_plan(journal.move, journal.connections, journal.surroundings, journal.change)


def numbers_before(plan: Plan) -> list[int]:
    """The steps that prepare does: of a live process those that leave it and its peers alone."""
    steps = enumerate(plan.prepare)
    return [number for number, step in steps if not plan.move.waits(step.site)]


def is_waiting(journal: Journal, plan: Plan, site: Site) -> bool:
    """Whether *site* has nothing of the move yet, since it is made ready by open."""
    begun = [n for n, record in journal.records.items() if record.state != "undone"]
    return plan.move.waits(site) and site not in {plan.steps[n].site for n in begun}


def is_whole(journal: Journal, plan: Plan) -> bool:
    """Whether prepare came to its end: every step was done once, also where it is undone since.

    One that was killed has failed, as others do.
    """
    if journal.change is not None:
        return True  # which is noted only then
    records = [journal.records.get(number) for number in numbers_before(plan)]
    return all(
        record is not None and (record.state != "doing" or record.again) for record in records
    )


def kinds_of(plan: Plan) -> tuple[str, ...]:
    return tuple(type(step).__name__ for step in plan.steps)


def without_lock(plan: Plan, numbers: Iterable[int]) -> list[int]:
    """CRIU's lock is put back when prepare fails, and never by a teardown."""
    return [number for number in numbers if not isinstance(plan.steps[number], TakeOverLock)]


def _is_same_thing(ours: Step, theirs: Step) -> bool:
    if isinstance(ours, AddAddress) and isinstance(theirs, AddAddress):
        return ours.address == theirs.address
    return isinstance(ours, RaiseLoopback) and isinstance(theirs, RaiseLoopback)


def leftover(journal: Journal, left: list[NatkeepError]) -> LeftoverError:
    return LeftoverError(
        f"move {journal.move.id}: not undone: " + "; ".join(str(error) for error in left),
        hint=f"natkeep teardown {journal.move.id} tries again; table {TABLE} is ours alone",
    )
