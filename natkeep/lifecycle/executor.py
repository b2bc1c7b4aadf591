"""The executor: does and undoes steps at one kernel, and notes both in the journal.

Rule: the journal is written before and after each step. An undo goes on after a failure, and
what it could not undo it names (LeftoverError); it touches nothing that the journal does not say
is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import TypeVar

from natkeep import faultpoints
from natkeep.errors import JournalError, LeftoverError, NatkeepError, RefusedError
from natkeep.kernel.interface import Kernel
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.kernel.old_address import find_needs, find_own, needs_loopback
from natkeep.kernel.undone_table import find_arriving
from natkeep.lifecycle.owners import give_up_claims
from natkeep.lifecycle.progress import numbers_before, plan_of
from natkeep.plan.findings import Finding
from natkeep.plan.identity import Identity
from natkeep.plan.move import Move, Site
from natkeep.plan.nft import TABLE
from natkeep.plan.step_undo import (
    UNDONE_AGAIN,
    CloseGates,
    LowerLoopback,
    PutLockBack,
    RemoveAddress,
    RemoveGate,
    RemoveRules,
    RestoreEntries,
    Undo,
)
from natkeep.plan.steps import DropUndone, OpenGate, Plan, Prior, Step, Unknown
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections
from natkeep.plan.undone import SECONDS
from natkeep.state.directory import StateDirectory
from natkeep.state.journal import Journal, Record
from natkeep.values import dataclass, field, replace

T = TypeVar("T")
Talk = Callable[[str], None]
"""Where progress goes; one line without its newline."""


@dataclass(slots=True)
class Executor:
    """One kernel, one state directory.

    staying: in words the addresses that the undo at work has left, since connections of no move
    need them. drops: for how many seconds an undo at a destination goes on dropping what gateways
    may send there, breaks: of what has lived there alone; dropped: where, how many. warned: by a
    prepare.
    """

    kernel: Kernel
    state: StateDirectory
    talk: Talk = lambda line: None
    staying: list[str] = field(default_factory=list)
    drops: int = SECONDS
    breaks: bool = False
    dropped: dict[Identity, int] = field(default_factory=dict)
    warned: list[Finding] = field(default_factory=list)

    # ---- namespaces and journals ---------------------------------------------------------------

    def open_sites(self, move: Move) -> None:
        """Find the namespaces of a new move; RefusedError when two sites are the same one."""
        self.kernel.open_sites(move.sites)
        seen: dict[Identity, Site] = {}
        for site in move.sites:
            other = seen.setdefault(self.kernel.identity(site), site)
            if other is not site:
                raise RefusedError(f"{site} and {other} are the same network namespace")

    def open_known(self, journal: Journal, sites: Iterable[Site]) -> None:
        """Open the very namespaces that *sites* were; NamespaceGoneError when one is gone."""
        for site in sites:
            self.kernel.open_sites([site], {site: journal.identity(site)})

    def reach(self, journal: Journal, site: Site) -> bool:
        """Open the namespace of *site*; False, and a word about it, when it is gone."""
        try:
            self.open_known(journal, [site])
        except NamespaceGoneError as error:
            self.talk(f"natkeep: {error}, and with it all that was in it")
            return False
        return True

    def is_home(self, journal: Journal, site: Site) -> bool:
        """Whether the process of the move may live at *site*."""
        self.kernel.open_sites([site])
        here = self.kernel.identity(site)
        return any(journal.identity(home) == here for home in journal.move.homes())

    def load(self, move_id: str) -> tuple[Journal, Plan]:
        """A journal and the plan that it was written for; JournalError when this is not ours.

        Before anything of it is undone, its undo has to be read: `load_undo`, or `resolve`.
        """
        journal = self.state.load(move_id)
        plan = plan_of(journal)
        if journal.schema == 1:
            if any(isinstance(step, Unknown) for step in plan.steps):
                raise JournalError(
                    f"move {move_id} was prepared by a natkeep that does other steps",
                    hint="use that version for it",
                )
            journal.adopt(plan.steps, tuple(numbers_before(plan)))
        return journal, plan

    def load_undo(self, move_id: str) -> Journal:
        """A journal alone, with all that undoes its move."""
        journal = self.state.load(move_id)
        if journal.schema == 1:
            return self.load(move_id)[0]
        journal.resolve()
        return journal

    # ---- do ------------------------------------------------------------------------------------

    def apply_or_undo(
        self, journal: Journal, plan: Plan, numbers: list[int],
        last: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """Do these steps in order, and then *last*; if anything fails, undo all of them."""
        try:
            for number in numbers:
                self.apply(journal, plan.steps[number], number)
            last()
        except BaseException as error:
            # Ctrl-C and SIGTERM too: leaving half a translation is what gets connections reset.
            self.talk(f"natkeep: {error or type(error).__name__}: undoing")
            finish(partial(self.undo_all, journal, numbers, error))
            raise

    def apply(self, journal: Journal, step: Step, number: int) -> None:
        """Do one step, noted before and after."""
        for line in step.describe():
            self.talk(f"[+] {line}")
        kind = type(step).__name__
        faultpoints.reach("apply", kind)
        earlier = journal.records.get(number)

        def remember(found: Prior) -> None:
            journal.note(number, "doing", _as_before_us(earlier, found), step)
            faultpoints.reach("begun", kind)

        prior = self.kernel.apply(step, remember)
        faultpoints.reach("applied", kind)
        at = time.monotonic_ns() if isinstance(step, OpenGate) else 0
        journal.note(number, "done", _as_before_us(earlier, prior), at=at)
        faultpoints.reach("done", kind)

    # ---- undo ----------------------------------------------------------------------------------

    def undo_all(self, journal: Journal, numbers: list[int], reason: BaseException) -> None:
        """Undo these steps, last first; the journal goes with them if nothing else was done."""
        left = self.undo_move(journal, sorted(numbers, reverse=True))
        for words in self.staying:
            self.talk(f"natkeep: {words}")
        if left:
            raise leftover(journal, left) from reason
        if set(journal.records) <= set(numbers):  # nothing was done besides
            forget(journal)

    def undo_move(self, journal: Journal, numbers: list[int]) -> list[NatkeepError]:
        """Undo these steps, those of the destination last, which leaves no host that answers.

        Each gate closes first, so that no site hands another what that one would reset. What a
        gateway may still send goes on being dropped (plan/undone.py); one that is undone does not.
        """
        journal.resolve()
        standing = {n: r for n in numbers if (r := journal.records.get(n)) and r.state != "undone"}
        gated = {one.site for one in standing.values() if isinstance(one.undo, RemoveGate)}
        ends = [site for site in journal.move.sites if site in gated and site.row.puts_old]
        late = {n for n, r in standing.items() if r.site in ends and type(r.undo) is not CloseGates}
        gateways = [site for site in journal.move.sites if site.row.passes_on]
        arriving = {} if gateways else self._find_arriving(journal, ends)
        left = self.undo(journal, [n for n in numbers if n not in late])
        still = [r for n, r in journal.records.items() if left or n not in numbers]
        passing = (r for r in still if r.site in gateways and r.state != "undone")
        if any(type(r.undo) is not PutLockBack for r in passing):  # which lets nothing pass
            arriving = self._find_arriving(journal, ends)
        try:
            self.drop(arriving)
        except NatkeepError as error:  # then the gates stay
            return [*left, error]
        return left + self.undo(journal, [n for n in numbers if n in late]) if late else left

    def drop(self, arriving: Mapping[Site, Connections]) -> None:
        """Go on dropping it at each of these sites, for as long as was asked for."""
        for site, some in arriving.items():
            if self.drops and len(some):
                self.kernel.apply(DropUndone(site, some, self.drops), lambda prior: None)
                self.dropped[self.kernel.identity(site)] = len(some)

    def _find_arriving(self, journal: Journal, sites: Iterable[Site]) -> dict[Site, Connections]:
        """What a gateway may still send to each of *sites*."""
        asked = (journal.move.id, frozenset(map_.old for map_ in journal.move.maps), self.breaks)
        return {site: self.kernel.ask(site, find_arriving, *asked) for site in sites}

    def undo(
        self, journal: Journal, numbers: Iterable[int], noted: Prior | None = None
    ) -> list[NatkeepError]:
        """Undo those of the steps that were begun, going on after a failure; *noted* of each."""
        left, incomplete = list[NatkeepError](), set[Site]()
        self.staying.clear()
        journal.resolve()
        for number in numbers:
            record = journal.records.get(number)
            if record is None or record.state == "undone":
                continue
            assert record.site is not None  # of schema 1 too: see adopt
            assert isinstance(record.undo, Undo)
            kind = journal.kinds[number]
            error = self._undo_step(journal, kind, record.site, record.undo, record.prior)
            if error is not None:
                left.append(error)
                incomplete.add(record.site)
                continue
            if isinstance(record.undo, UNDONE_AGAIN) and record.site in incomplete:
                continue
            # A full disk must not stop this: what the journal still has is only undone again.
            with suppress(Exception):
                journal.note(number, "undone", noted or Prior())
                faultpoints.reach("undone", kind)
        return left

    def undo_for_now(self, journal: Journal, numbers: Iterable[int]) -> None:
        """Undo these, last first: they may be done again, and no undoing of the move has begun."""
        if left := self.undo(journal, sorted(numbers, reverse=True), Prior(facts={"closed": True})):
            raise leftover(journal, left)

    def _undo_step(
        self, journal: Journal, kind: str, site: Site, undo: Undo, prior: Prior
    ) -> NatkeepError | None:
        """Undo one step; the error when that failed. kind: of the step, in words."""
        self.talk(f"[-] {kind} at {site}")
        try:
            faultpoints.reach("revert", kind)
            if isinstance(undo, RemoveRules):
                undo = self._leave_shared(journal, site, undo)
            if isinstance(undo, RestoreEntries):
                prior = give_up_claims(self.state, journal, site, undo, prior)
            if not self._hand_over(journal, site, undo, prior) and not (
                not prior.present and self._is_needed(journal, site, undo, prior)
            ):
                self.kernel.revert(site, undo, prior)
                self._remove_rules_of_others(journal, site, undo, prior)
            faultpoints.reach("reverted", kind)
        except NatkeepError as error:
            return error
        except Exception as error:  # a bug in one step must not keep the others in place
            return NatkeepError(f"{kind} at {site}: {error or type(error).__name__}")
        return None

    def _remove_rules_of_others(
        self, journal: Journal, site: Site, undo: Undo, prior: Prior
    ) -> None:
        """Where an address went by the journal of another natkeep, which knows of no rules, or had
        them behind it."""
        if not isinstance(undo, RemoveAddress) or prior.present:
            return
        here = (one for one in journal.records.values() if one.site == site)
        if not any(isinstance(one.undo, RemoveRules) and one.state != "undone" for one in here):
            self.kernel.revert(site, RemoveRules((), (undo.address,)), Prior())

    def _leave_shared(self, journal: Journal, site: Site, undo: RemoveRules) -> RemoveRules:
        """Without the rules that another move has, too, as one that replaces this one does."""
        identity, rules = journal.identity(site), set(undo.rules)
        for header in self.state.others_at(identity, journal.move.id) if rules else ():
            other = self.load_undo(header.move.id)
            for record in other.records.values():
                if not isinstance(record.undo, RemoveRules) or record.state == "undone":
                    continue
                if record.site is not None and other.identity(record.site) == identity:
                    rules -= set(record.undo.rules)
        return replace(undo, rules=tuple(rule for rule in undo.rules if rule in rules))

    def _is_needed(self, journal: Journal, site: Site, undo: Undo, prior: Prior) -> bool:
        """Whether an address (or lo) has to stay, for another move or for connections of none."""
        move_id = journal.move.id
        if isinstance(undo, LowerLoopback):
            # Those that could not be taken away are tried again, and lo would not be.
            here = (r for r in journal.records.values() if r.site == site and r.state != "undone")
            left = (r.undo.address for r in here if isinstance(r.undo, RemoveAddress))
            return self.kernel.ask(site, needs_loopback, frozenset(left))
        if not isinstance(undo, RemoveAddress):
            return False
        own = _own(journal, undo.address, prior)
        ends = journal.move.listeners
        ours = frozenset(one.what for one in journal.nft_undos(site) if one.kind == "rule")
        needs = self.kernel.ask(site, find_needs, undo.address, move_id, own, ends, ours)
        moves = needs.moves
        if moves:
            # One of this directory would have been handed it, had its prepare come that far.
            known = {one.move.id for one in self.state.others_at(journal.identity(site), move_id)}
            moves = tuple(one for one in moves if one not in known)
        if moves:
            self.talk(f"natkeep: {undo.address} stays at {site} for {', '.join(moves)}")
        elif needs.sockets:
            self.staying.append(
                f"{undo.address} stays on lo at {site}: {needs.sockets} connections there are not "
                f"of {move_id}"
            )
        return bool(moves or needs.sockets)

    def _hand_over(self, journal: Journal, site: Site, undo: Undo, prior: Prior) -> bool:
        """Leave an address (or lo) that another move uses as well, and make that move its owner.

        Only the move that added it knows that it was not there before.
        """
        if not isinstance(undo, RemoveAddress | LowerLoopback) or prior.present:
            return False
        identity = journal.identity(site)
        for header in self.state.others_at(identity, journal.move.id):
            other = self.load_undo(header.move.id)
            for number, theirs in other.records.items():
                if theirs.undo != undo or theirs.site is None:
                    continue
                if not (other.is_done(number) or _has_left_an_address(other, theirs)):
                    continue
                if other.identity(theirs.site) == identity:
                    if isinstance(undo, RemoveAddress):
                        own = _own(journal, undo.address, prior)
                        ended = self.kernel.ask(site, find_own, undo.address, own)
                        prior = _with_ended(
                            prior, theirs.prior, ended.records(undo.address.version)
                        )
                    other.note(number, "done", prior)
                    faultpoints.reach("handed-over")
                    return True
        return False


def _has_left_an_address(journal: Journal, record: Record) -> bool:
    """Whether its move, half undone, still has an address there that lo has to be up for."""
    return isinstance(record.undo, LowerLoopback) and any(
        isinstance(one.undo, RemoveAddress) and one.site == record.site and journal.is_done(number)
        for number, one in journal.records.items()
    )


def _own(journal: Journal, old: Address, prior: Prior) -> Connections:
    """The connections of the move, with those at *old* of moves that were undone before it."""
    came = NO_CONNECTIONS if journal.change is None else journal.change.came
    ended = bytes.fromhex(str(prior.facts.get("ended", "")))
    before = Connections.packed(ended, old.version)
    return Connections.joined((journal.connections, came, journal.move.lost, before))


def _with_ended(prior: Prior, theirs: Prior, ended: bytes) -> Prior:
    """*prior* for the move that an address is left to: for the sockets *ended* it need not stay."""
    found = ended.hex() + str(theirs.facts.get("ended", ""))
    return Prior(prior.present, {**prior.facts, "ended": found}) if found else prior


def _as_before_us(earlier: Record | None, found: Prior) -> Prior:
    """What a step that was begun before, and killed perhaps, found then: that counts."""
    if earlier is None or earlier.state == "undone":
        return found
    return Prior(earlier.prior.present, {**found.facts, **earlier.prior.facts})


def finish(undo: Callable[[], T]) -> T:
    """What *undo* (which can be done again) returns; a signal is heeded when it is through."""
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


def leftover(journal: Journal, left: list[NatkeepError]) -> LeftoverError:
    """What to say of a move that could not be undone to the end."""
    return LeftoverError(
        f"move {journal.move.id}: not undone: " + "; ".join(str(error) for error in left),
        hint=f"natkeep teardown {journal.move.id} tries again; table {TABLE} is ours alone",
    )
