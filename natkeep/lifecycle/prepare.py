"""prepare: everything is checked before anything is changed, and undone if it fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from natkeep import faultpoints
from natkeep.errors import JournalError, LeftoverError, RefusedError, UsageError
from natkeep.lifecycle.conflicts import refuse_conflicts, takes_over
from natkeep.lifecycle.executor import (
    Ground,
    finish,
    forget,
    kinds_of,
    leftover,
    numbers_before,
    plan_of,
    without_lock,
)
from natkeep.lifecycle.ready import write_ready
from natkeep.plan.conntrack import NOT_TRACKED, directions_of
from natkeep.plan.drift import Gate
from natkeep.plan.move import Mode, Move, Role, Site
from natkeep.plan.plan import make_plan
from natkeep.plan.steps import (
    Identity,
    InsertEntries,
    Plan,
    Prior,
    PurgeEntries,
    TakeOverLock,
)
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, FourTuple
from natkeep.state.journal import Journal, read_boot_id
from natkeep.values import replace

if TYPE_CHECKING:
    from natkeep.plan.diagnostics import Finding


class Preparing(Ground):
    """The verb prepare, and what is asked before it."""

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
                plan = self._replace(plan, connections, gate, replaces, image)
            else:
                self._begin_and_apply(plan, connections, gate, image)
            if gate == Gate.OPEN:
                self.kernel.unhook_gates()
        return plan

    def _begin_and_apply(
        self,
        plan: Plan,
        connections: Connections,
        gate: Gate,
        image: str | None,
        first: Callable[[Journal], None] = lambda journal: None,
    ) -> None:
        move = plan.move
        steps = range(len(plan.steps)) if gate == Gate.OPEN else numbers_before(plan)
        identities = tuple(self.kernel.identity(site) for site in move.sites)
        quiesce = self.state.load(move.id) if takes_over(move) else None
        journal = self.state.begin(
            move, connections, plan.surroundings, identities, kinds_of(plan), image
        )
        ready = partial(write_ready, self.kernel, journal, plan)
        quick = gate == Gate.CLOSED and not move.live  # else the image is to be compared
        try:
            first(journal)
        except BaseException as error:
            finish(partial(self._undo_all, journal, plan, list(steps), error))
            raise
        try:
            self._apply_or_undo(journal, plan, list(steps), ready if quick else None)
        except BaseException:
            if quiesce is not None and not self.state.knows(move.id):
                finish(partial(self._hold_again, quiesce))
            raise

    def _hold_again(self, quiesce: Journal) -> None:
        """The move that took a quiesce over has failed and was undone: all is as before it."""
        if self.state.knows(quiesce.move.id):
            return
        plan = plan_of(quiesce)
        try:
            faultpoints.reach("hold-again")
            journal = self.state.begin(
                quiesce.move, NO_CONNECTIONS, plan.surroundings, quiesce.namespaces, quiesce.kinds
            )
            self._apply_or_undo(journal, plan, list(range(len(plan.steps))))
        except Exception as error:
            raise LeftoverError(
                f"move {quiesce.move.id}: its listeners are left open to callers: {error}",
                hint=f"natkeep quiesce {quiesce.move.id} holds them again",
            ) from error

    def _replace(
        self, plan: Plan, connections: Connections, gate: Gate, replaces: str, image: str | None
    ) -> Plan:
        earlier, old = self._load(replaces)
        self._refuse_earlier_boot(earlier)
        shared = self._shared_sites(earlier, plan.move)
        numbers = [n for n, step in enumerate(old.steps) if step.site in shared]
        entries = [n for n in numbers if isinstance(old.steps[n], InsertEntries | PurgeEntries)]
        self.kernel.open_sites(shared, {site: earlier.identity(site) for site in shared})
        faultpoints.reach("replace-begin")
        try:
            inherit = partial(self._inherit_purged, earlier, old, plan)
            self._begin_and_apply(plan, connections, gate, image, inherit)
            faultpoints.reach("replace-prepared")
            self._pass_entries_on(earlier, old, plan, entries)
            faultpoints.reach("replace-noted")
        except BaseException as error:
            finish(partial(self._go_back, plan, earlier, old, entries, error))
            raise
        left = self._undo(earlier, old, without_lock(old, reversed(numbers)))
        if left:
            raise leftover(earlier, left)
        self._retire(earlier, old, numbers)
        return plan

    def _go_back(
        self,
        plan: Plan,
        earlier: Journal,
        old: Plan,
        entries: list[int],
        reason: BaseException,
    ) -> None:
        """The new move is undone, if it is not yet, and has taken the earlier one's entries along.

        What it could not undo it has named, and does not try again here.
        """
        if self.state.knows(plan.move.id) and not isinstance(reason, LeftoverError):
            journal = self.state.load(plan.move.id)
            self._undo_all(journal, plan, list(range(len(plan.steps))), reason)
        missing = []
        for number in entries:
            try:
                self._apply(earlier, old.steps[number], number)
            except Exception as error:
                missing.append(f"{type(old.steps[number]).__name__}: {error}")
        if missing:
            raise LeftoverError(
                f"move {earlier.move.id} is left without entries: {'; '.join(missing)}",
                hint=f"natkeep repair {earlier.move.id}",
            ) from reason

    def _retire(self, earlier: Journal, old: Plan, numbers: list[int]) -> None:
        """All that *numbers* did is undone; with that the earlier move may be at its end."""
        try:
            for number in numbers:
                if isinstance(old.steps[number], TakeOverLock):
                    earlier.note(number, "undone", Prior())
        except JournalError as error:
            raise leftover(earlier, [error]) from error
        if all(record.state == "undone" for record in earlier.records.values()):
            forget(earlier)

    def _pass_entries_on(self, earlier: Journal, old: Plan, plan: Plan, entries: list[int]) -> None:
        """From now on the entries are the new move's, which both had until here.

        So that each could be torn down after a crash. Stateful entries of both have the same
        tuples: a teardown of the earlier move must not delete those of the new one. Stateless
        ones say NEW, so they differ.
        """
        same = {earlier.move.mode, plan.move.mode} == {Mode.STATEFUL}
        for number in entries:
            if same or isinstance(old.steps[number], PurgeEntries):
                earlier.note(number, "undone", Prior())

    def _inherit_purged(self, earlier: Journal, old: Plan, plan: Plan, journal: Journal) -> None:
        """What the earlier move purged is the new one's to give back, whatever comes between."""
        purged: dict[tuple[Identity, FourTuple], str] = {}
        for number, step in enumerate(old.steps):
            record = earlier.records.get(number)
            if isinstance(step, PurgeEntries) and record is not None and record.state != "undone":
                here, ways = earlier.identity(step.site), directions_of(record.prior.facts)
                purged |= {
                    (here, t): way for t, way in zip(step.translation.kept, ways, strict=False)
                }
        for number, step in enumerate(plan.steps):
            if isinstance(step, PurgeEntries) and purged:
                here = journal.identity(step.site)
                known = (purged.get((here, t), NOT_TRACKED) for t in step.translation.kept)
                journal.note(number, "doing", Prior(facts={"inherited": "".join(known)}))

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
            earlier = self.state.load(replaces).surroundings_there()
            surroundings = surroundings.carry_on(earlier, connections)
        plan = make_plan(move, connections, surroundings)
        refuse_conflicts(self, plan, replaces)
        if not frozen:
            self._refuse_living(plan)
        for step in plan.steps:
            self.kernel.check(step)
        return plan

    def _with_hold(self, move: Move) -> Move:
        """*move*, with the listeners that a quiesce of the same id holds at its source."""
        if move.quiesces or not self.state.knows(move.id):
            return move
        found = self.state.read_move(move.id)
        if found is None or not found[0].quiesces or found[2] != read_boot_id():
            return move
        sources = [site for site in move.sites if site.role == Role.SOURCE]
        if [self.kernel.identity(site) for site in sources] != [*found[1]]:
            return move
        return replace(move, held=found[0].held)

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

    def examine(self, sites: tuple[Site, ...]) -> tuple[Finding, ...]:
        """What about the machine stops or endangers a move with these sites."""
        from natkeep.plan.diagnostics import find

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
