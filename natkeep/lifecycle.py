"""the conductor: prepare, open, status, teardown; order, rollback and locking.

Rule: this file knows when things happen and nothing of how. It checks everything before it
changes anything, writes the journal before and after each step, and undoes in reverse. What
it could not undo it names (LeftoverError); it never flushes, and touches nothing that the
journal does not say is ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from natkeep.errors import (
    JournalError,
    LeftoverError,
    NatkeepError,
    RefusedError,
    UsageError,
)
from natkeep.journal import Journal, Record, StateDirectory, read_boot_id
from natkeep.kernel import Kernel
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.plan import ruleset
from natkeep.plan.drift import Gate, MoveStatus, SiteStatus, find_drift
from natkeep.plan.move import Mode, Move, Role, Site, Translation
from natkeep.plan.order import make_plan
from natkeep.plan.reception import refuse_one_end_for_two
from natkeep.plan.steps import (
    AddAddress,
    InsertEntries,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
    Step,
    TakeOverLock,
)
from natkeep.plan.tuples import NO_CONNECTIONS, RECORD_SIZE, Address, Connections, Endpoint

if TYPE_CHECKING:
    from natkeep.plan.findings import Finding

Talk = Callable[[str], None]
"""Where progress goes; one line without its newline."""

_DRAIN_INTERVAL = 0.2
_QUEUE_INTERVAL = 0.02


@dataclass
class Lifecycle:
    """The verbs, on one kernel and one state directory."""

    kernel: Kernel
    state: StateDirectory
    talk: Talk = lambda line: None

    def prepare(
        self,
        move: Move,
        connections: Connections,
        gate: Gate = Gate.CLOSED,
        replaces: str | None = None,
        image: str | None = None,
        *,
        frozen: bool = False,
    ) -> Plan:
        """Make every site ready; with Gate.OPEN let the connections through as well.

        image: the run id of the dump that the connections were read from, for `open`'s confirm.
        replaces: the id of an earlier move of the same process. At the sites that both have,
        this move's gate closes in front of it, and when all is ready the earlier one is taken
        out there: no packet meets both, and none meets neither.
        frozen: CRIU holds the process at the source just now, so its sockets are to be there.

        Raises what was refused or failed; then everything has been undone, and if it could not
        be, LeftoverError says what is there.
        """
        with self.state.locked():
            plan = self.check(move, connections, replaces, frozen=frozen)
            if replaces is not None:
                return self._replace(plan, connections, gate, replaces, image)
            self._begin_and_apply(plan, connections, gate, image)
        return plan

    def _begin_and_apply(
        self, plan: Plan, connections: Connections, gate: Gate, image: str | None
    ) -> None:
        move = plan.move
        steps = plan.steps if gate == Gate.OPEN else plan.prepare
        identities = tuple(self.kernel.identity(site) for site in move.sites)
        quiesce = self.state.load(move.id) if _takes_over(move) else None
        journal = self.state.begin(
            move, connections, plan.surroundings, identities, _kinds(plan), image
        )
        try:
            self._apply_or_undo(journal, plan, list(range(len(steps))))
        except BaseException:
            if quiesce is not None and move.id not in self.state.ids():
                self._hold_again(quiesce)
            raise

    def _hold_again(self, quiesce: Journal) -> None:
        """The move that took a quiesce over has failed and was undone: all is as before it."""
        plan = _plan_of(quiesce)
        journal = self.state.begin(
            quiesce.move, NO_CONNECTIONS, plan.surroundings, quiesce.namespaces, quiesce.kinds
        )
        self._apply_or_undo(journal, plan, list(range(len(plan.steps))))

    def _replace(
        self, plan: Plan, connections: Connections, gate: Gate, replaces: str, image: str | None
    ) -> Plan:
        earlier, old = self._load(replaces)
        self._refuse_earlier_boot(earlier)
        shared = self._shared_sites(earlier, plan.move)
        numbers = [n for n, step in enumerate(old.steps) if step.site in shared]
        entries = [n for n in numbers if isinstance(old.steps[n], InsertEntries | PurgeEntries)]
        # What was purged is the new move's to give back. Stateful entries of both moves have the
        # same tuples: from now on a teardown of the earlier move must not delete those of the
        # new one. Stateless ones say NEW, so they differ.
        same = {earlier.move.mode, plan.move.mode} == {Mode.STATEFUL}
        for number in entries:
            if same or isinstance(old.steps[number], PurgeEntries):
                earlier.note(number, "undone", Prior())
        self.kernel.open_sites(shared, {site: earlier.identity(site) for site in shared})
        try:
            self._begin_and_apply(plan, connections, gate, image)
        except BaseException:
            for number in entries:
                self._apply(earlier, old.steps[number], number)
            raise
        left = self._undo(earlier, old, _without_lock(old, reversed(numbers)))
        if left:
            raise _leftover(earlier, left)
        for number in numbers:
            if isinstance(old.steps[number], TakeOverLock):
                earlier.note(number, "undone", Prior())
        if all(record.state == "undone" for record in earlier.records.values()):
            earlier.remove()
        return plan

    def _shared_sites(self, earlier: Journal, move: Move) -> list[Site]:
        ours = {self.kernel.identity(site) for site in move.sites}
        shared = [site for site in earlier.move.sites if earlier.identity(site) in ours]
        if not shared:
            raise RefusedError(f"{move.id} and {earlier.move.id} have no site in common")
        return shared

    def check(
        self,
        move: Move,
        connections: Connections,
        replaces: str | None = None,
        *,
        frozen: bool = False,
    ) -> Plan:
        """The plan, if it could be carried out as things stand; nothing is changed."""
        self._open_sites(move)
        move = self._with_hold(move)
        surroundings = self.kernel.look_around(move, connections)
        if replaces is not None:
            earlier = self.state.load(replaces).surroundings
            surroundings = surroundings.carry_on(earlier, connections)
        plan = make_plan(move, connections, surroundings)
        self._refuse_conflicts(plan, replaces)
        if not frozen:
            self._refuse_living(plan)
        for step in plan.steps:
            self.kernel.check(step)
        return plan

    def examine(self, sites: tuple[Site, ...]) -> tuple[Finding, ...]:
        """What about the machine stops or endangers a move with these sites."""
        from natkeep.plan.findings import find

        self.kernel.open_sites(sites)
        return tuple(finding for site in sites for finding in find(site, self.kernel.survey(site)))

    def require_devices(self, move: Move, devices: frozenset[str]) -> None:
        """RefusedError when the destination lacks a device that a socket is bound to."""
        destinations = [site for site in move.sites if site.role == Role.DESTINATION]
        self.kernel.open_sites(destinations)
        for site in destinations:
            missing = sorted(devices - self.kernel.devices(site)) if devices else []
            if missing:
                raise RefusedError(
                    f"{site}: no device {', '.join(missing)}, which a socket is bound to",
                    hint="CRIU could not restore the socket there",
                )

    def find_new(self, old: Address, sites: tuple[Site, ...]) -> Address:
        """What NEW=auto means for *old*: the one address of its family at the destination."""
        destinations = [site for site in sites if site.role == Role.DESTINATION]
        if not destinations:
            raise UsageError("NEW can be `auto` only where there is a site destination")
        self.kernel.open_sites(destinations)
        found = [a for a in self.kernel.addresses(destinations[0], old.version) if a != old]
        if len(found) != 1:
            listed = ", ".join(str(address) for address in found) or "none"
            raise RefusedError(
                f"NEW=auto for {old}: {destinations[0]} has not one IPv{old.version} address "
                f"but {listed}",
                hint="name it: --map OLD=NEW",
            )
        return found[0]

    def _open_sites(self, move: Move) -> None:
        self.kernel.open_sites(move.sites)
        seen: dict[tuple[int, int], Site] = {}
        for site in move.sites:
            other = seen.setdefault(self.kernel.identity(site), site)
            if other is not site:
                raise RefusedError(f"{site} and {other} are the same network namespace")

    def _refuse_conflicts(self, plan: Plan, replaces: str | None) -> None:
        """Two moves may share an address, but no tuple on either side of a site."""
        if plan.move.id in self.state.ids() and not _takes_over(plan.move):
            raise RefusedError(
                f"the id {plan.move.id} is in use",
                hint=f"natkeep teardown {plan.move.id}, or another id",
            )
        ours = {self.kernel.identity(site): site for site in plan.move.sites}
        for move_id in self.state.ids():
            found = self.state.read_move(move_id)
            if found is None or move_id in (replaces, plan.move.id):
                continue
            other, namespaces, boot = found
            if not set(namespaces) & set(ours) or boot != read_boot_id():
                continue
            _refuse_remapped(plan.move, other)
            refuse_one_end_for_two(plan.move, other)
            if _shares_address(plan.move, other):
                journal = self.state.load(move_id)
                _refuse_overlap(plan, _plan_of(journal))

    def _apply_or_undo(self, journal: Journal, plan: Plan, numbers: list[int]) -> None:
        try:
            for number in numbers:
                self._apply(journal, plan.steps[number], number)
        except BaseException as error:
            # Ctrl-C and SIGTERM too: leaving half a translation is what gets connections reset.
            self.talk(f"natkeep: {error or type(error).__name__}: undoing")
            left = self._undo(journal, plan, reversed(numbers))
            if left:
                raise _leftover(journal, left) from error
            if not numbers[0]:
                journal.remove()
            raise

    def _apply(self, journal: Journal, step: Step, number: int) -> None:
        for line in step.describe():
            self.talk(f"[+] {line}")
        prior = self.kernel.apply(step, lambda found: journal.note(number, "doing", found))
        journal.note(number, "done", prior)

    def _undo(self, journal: Journal, plan: Plan, numbers: Iterable[int]) -> list[NatkeepError]:
        """Undo those of the steps that were begun, going on after a failure."""
        left: list[NatkeepError] = []
        for number in numbers:
            record = journal.records.get(number)
            if record is None or record.state == "undone":
                continue
            step = plan.steps[number]
            self.talk(f"[-] {type(step).__name__} at {step.site}")
            try:
                if not self._hand_over(journal, step, record):
                    self.kernel.revert(step, record.prior)
            except NatkeepError as error:
                left.append(error)
                continue
            # A full disk must not stop this: what the journal still has is only undone again.
            with suppress(JournalError):
                journal.note(number, "undone", Prior())
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
            for number, theirs in enumerate(_plan_of(other).steps):
                same = _is_same_thing(step, theirs) and other.identity(theirs.site) == identity
                if same and other.is_done(number):
                    other.note(number, "done", record.prior)
                    return True
        return False

    def open(self, move_id: str, confirm: Callable[[Journal], None] | None = None) -> None:
        """Let the kept connections through at every site, gateway first; again is fine.

        confirm: asked, under the lock, before anything is opened; whatever it raises is the end.
        KernelError when a site no longer has the move's gate, JournalError when it was not
        prepared to the end: then nothing is opened.
        """
        with self.state.locked():
            journal, plan = self._load(move_id)
            self._refuse_earlier_boot(journal)
            if journal.move.quiesces:
                raise RefusedError(
                    f"{move_id} only holds listeners so far: there is no gate to open",
                    hint=f"natkeep prepare {move_id} --site source=...; teardown lets callers in",
                )
            if confirm is not None:
                confirm(journal)
            self._open_known(journal, plan)
            prepared = range(len(plan.prepare))
            if not all(journal.is_done(number) for number in prepared):
                raise JournalError(
                    f"move {move_id} was not prepared to the end",
                    hint=f"natkeep teardown {move_id}, then prepare again",
                )
            numbers = range(len(plan.prepare), len(plan.steps))
            self._apply_or_undo(journal, plan, [n for n in numbers if not journal.is_done(n)])

    def _load(self, move_id: str) -> tuple[Journal, Plan]:
        journal = self.state.load(move_id)
        plan = _plan_of(journal)
        if _kinds(plan) != journal.kinds:
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

    def _open_known(self, journal: Journal, plan: Plan) -> None:
        for site in plan.move.sites:
            self.kernel.open_sites([site], {site: journal.identity(site)})

    def status(self, move_ids: tuple[str, ...]) -> tuple[MoveStatus, ...]:
        """How the moves stand; all of them when none is named."""
        found = []
        for move_id in move_ids or self.state.ids():
            journal, plan = self._load(move_id)
            sites = tuple(
                self._look(journal, plan, site)
                for site in plan.move.sites
                if not _is_retired(journal, plan, site)
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

    def teardown(self, move_id: str) -> bool:
        """Undo a move, best effort; whether there was one. A second time is fine."""
        with self.state.locked():
            if move_id not in self.state.ids():
                self.state.remove(move_id)
                return False
            journal, plan = self._load(move_id)
            left: list[NatkeepError] = []
            if journal.boot == read_boot_id():
                reachable = {site for site in plan.move.sites if self._reach(journal, site)}
                numbers = [
                    number
                    for number in range(len(plan.steps) - 1, -1, -1)
                    if plan.steps[number].site in reachable
                ]
                # The gates close first, at every site: while the destination is taken apart
                # the gateway must not hand it packets that it would answer with a reset.
                left = self._undo(journal, plan, _without_lock(plan, numbers))
            if left:
                raise _leftover(journal, left)
            journal.remove()
            return True

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

    def quiesce(self, move: Move, ports: frozenset[int], seconds: float) -> tuple[Endpoint, ...]:
        """Have new connections to the source's listeners wait, and return when nobody else does.

        ports: those listeners only, or all where it is empty. When somebody still waits to be
        accepted after *seconds*, the hold is released and NatkeepError says where.
        """
        [site] = move.sites
        with self.state.locked():
            self._open_sites(move)
            found = self.kernel.find_listeners(site, frozenset(m.old for m in move.maps))
            listeners = tuple(end for end in found if not ports or end.port in ports)
            if not listeners:
                olds = ", ".join(str(map_.old) for map_ in move.maps)
                raise RefusedError(
                    f"{site}: nobody listens at {olds} or at the wildcard address",
                    hint="then there is nothing to wait for: dump",
                )
            move = replace(move, held=listeners, quiesces=True)
            plan = self.check(move, NO_CONNECTIONS)
            self._begin_and_apply(plan, NO_CONNECTIONS, Gate.CLOSED, None)
        try:
            self._await_accepted(site, listeners, time.monotonic() + seconds)
        except BaseException:
            self.teardown(move.id)
            raise
        return listeners

    def _await_accepted(self, site: Site, listeners: tuple[Endpoint, ...], deadline: float) -> None:
        # Twice in a row: a SYN that passed just before the hold was in may be on its way still.
        clean = 0
        while clean < 2:
            waiting = self.kernel.count_waiting(site, listeners)
            clean = 0 if waiting else clean + 1
            if waiting and time.monotonic() >= deadline:
                told = ", ".join(f"{number} at {end}" for end, number in waiting.items())
                raise NatkeepError(
                    f"{site}: connections are not accepted: {told}; new ones may come again",
                    hint="--timeout SECONDS waits longer; criu dump --skip-in-flight loses them",
                )
            time.sleep(_QUEUE_INTERVAL)

    def _refuse_living(self, plan: Plan) -> None:
        """A process that still lives at the source would own its connections twice (T7)."""
        for site in plan.move.sites:
            if site.role != Role.SOURCE or plan.move.quiesces:
                continue
            alive = self.kernel.observe(site, plan).alive
            if alive:
                raise RefusedError(
                    f"{site}: {alive} of the connections still have their sockets there",
                    hint="was it dumped with --leave-running? End that process first",
                )

    def _with_hold(self, move: Move) -> Move:
        """*move*, with the listeners that a quiesce of the same id holds at its source."""
        if move.quiesces or move.id not in self.state.ids():
            return move
        found = self.state.read_move(move.id)
        if found is None or not found[0].quiesces or found[2] != read_boot_id():
            return move
        sources = [site for site in move.sites if site.role == Role.SOURCE]
        if [self.kernel.identity(site) for site in sources] != [*found[1]]:
            return move
        return replace(move, held=found[0].held)

    def _reach(self, journal: Journal, site: Site) -> bool:
        try:
            self.kernel.open_sites([site], {site: journal.identity(site)})
        except NamespaceGoneError as error:
            self.talk(f"natkeep: {error}, and with it all that was in it")
            return False
        return True


def _takes_over(move: Move) -> bool:
    """Whether *move* goes on from a quiesce of the same id."""
    return bool(move.held) and not move.quiesces


def _without_lock(plan: Plan, numbers: Iterable[int]) -> list[int]:
    """CRIU's lock is put back when prepare fails, and never by a teardown."""
    return [number for number in numbers if not isinstance(plan.steps[number], TakeOverLock)]


def _plan_of(journal: Journal) -> Plan:
    return make_plan(journal.move, journal.connections, journal.surroundings)


def _kinds(plan: Plan) -> tuple[str, ...]:
    return tuple(type(step).__name__ for step in plan.steps)


def _is_retired(journal: Journal, plan: Plan, site: Site) -> bool:
    """Whether another move has replaced this one at *site*."""
    numbers = [n for n, step in enumerate(plan.steps) if step.site == site]
    records = [journal.records[n].state for n in numbers if n in journal.records]
    return bool(records) and set(records) == {"undone"}


def _is_same_thing(ours: Step, theirs: Step) -> bool:
    if isinstance(ours, AddAddress) and isinstance(theirs, AddAddress):
        return ours.address == theirs.address
    return isinstance(ours, RaiseLoopback) and isinstance(theirs, RaiseLoopback)


def _leftover(journal: Journal, left: list[NatkeepError]) -> LeftoverError:
    return LeftoverError(
        f"move {journal.move.id}: not undone: " + "; ".join(str(error) for error in left),
        hint=f"natkeep teardown {journal.move.id} tries again; table {ruleset.TABLE} is ours alone",
    )


def _refuse_remapped(move: Move, other: Move) -> None:
    new_of = {map_.old: map_.new for map_ in other.maps}
    for map_ in move.maps:
        if new_of.get(map_.old, map_.new) != map_.new:
            raise RefusedError(
                f"{map_.old} is moved to {new_of[map_.old]} by {other.id} already",
                hint=f"natkeep teardown {other.id} first",
            )


def _shares_address(move: Move, other: Move) -> bool:
    def addresses(of: Move) -> set[object]:
        return {end for map_ in of.maps for end in (map_.old, map_.new)}

    return bool(addresses(move) & addresses(other))


def _refuse_overlap(plan: Plan, other: Plan) -> None:
    """No two moves may have one tuple at one address, be it OLD or NEW."""
    for ours in plan.translations:
        for theirs in other.translations:
            shared = {ours.map.old, ours.map.new} & {theirs.map.old, theirs.map.new}
            if not shared:
                continue
            common = _keys(ours) & _keys(theirs)
            if common:
                raise RefusedError(_describe_overlap(ours, theirs, common, other.move.id))


def _keys(translation: Translation) -> set[bytes]:
    """Local port, peer and peer port of each kept connection, packed."""
    version = translation.map.old.version
    records, size = translation.kept.records(version), RECORD_SIZE[version]
    width = 4 if version == 4 else 16
    return {records[i + width : i + size] for i in range(0, len(records), size)}


def _describe_overlap(
    ours: Translation, theirs: Translation, common: set[bytes], other_id: str
) -> str:
    version = ours.map.old.version
    key = min(common)
    texts = []
    for translation in (ours, theirs):
        record = translation.map.old.packed + key
        packed = Connections(v4=record) if version == 4 else Connections(v6=record)
        texts.append(str(next(iter(packed))))
    return (
        f"{texts[0]} and {texts[1]} (of move {other_id}) would be one tuple at "
        f"{'OLD' if ours.map.old == theirs.map.old else 'NEW'}; {len(common)} in all"
    )
