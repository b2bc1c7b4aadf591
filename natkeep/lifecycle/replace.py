"""replace: a move is prepared in the place of an earlier one of the same process.

At the sites that both have, the new move's gate closes in front of the earlier one's, and when all
is ready the earlier move is taken out there: no packet meets both, and none meets neither.
"""

from __future__ import annotations

from functools import partial

from natkeep import faultpoints
from natkeep.errors import JournalError, LeftoverError, RefusedError
from natkeep.lifecycle.check import check
from natkeep.lifecycle.executor import Executor, finish, forget, leftover
from natkeep.lifecycle.prepare import carry_out
from natkeep.lifecycle.progress import puts_lock_back, refuse_earlier_boot, without_lock
from natkeep.plan.conntrack import NOT_TRACKED, directions_of
from natkeep.plan.identity import Identity
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.steps import InsertEntries, Plan, Prior, PurgeEntries
from natkeep.plan.tuples import Connections, FourTuple
from natkeep.state.journal import Journal


def replace_move(
    executor: Executor,
    replaces: str,
    move: Move,
    connections: Connections,
    gate: Gate = Gate.CLOSED,
    image: str | None = None,
) -> Plan:
    """`prepare`, in the place of the move *replaces*; what fails leaves that one as it was."""
    with executor.state.changing(replaces, move.id):
        plan = check(executor, move, connections, replaces, run_id=image)
        journal, old = executor.load(replaces)
        journal.resolve()
        _Replacement(executor, journal, old, plan).carry_out(connections, gate, image)
        if gate == Gate.OPEN:
            executor.kernel.unhook_gates()
    return plan


class _Replacement:
    """The earlier move and the plan that takes its place.

    numbers: the earlier move's steps at the sites that both have; entries: those of conntrack.
    """

    def __init__(self, executor: Executor, earlier: Journal, old: Plan, plan: Plan) -> None:
        refuse_earlier_boot(earlier)
        self.executor, self.earlier, self.old, self.plan = executor, earlier, old, plan
        self.shared = _shared_sites(executor, earlier, plan.move)
        self.numbers = [n for n, step in enumerate(old.steps) if step.site in self.shared]
        kinds = InsertEntries | PurgeEntries
        self.entries = [n for n in self.numbers if isinstance(old.steps[n], kinds)]

    def carry_out(self, connections: Connections, gate: Gate, image: str | None) -> None:
        self.executor.open_known(self.earlier, self.shared)
        faultpoints.reach("replace-begin")
        try:
            carry_out(self.executor, self.plan, connections, gate, image, self._inherit_purged)
            faultpoints.reach("replace-prepared")
            self._pass_entries_on()
            faultpoints.reach("replace-noted")
        except BaseException as error:
            finish(partial(self._go_back, error))
            raise
        backwards = without_lock(self.earlier, reversed(self.numbers))
        left = self.executor.undo(self.earlier, backwards)
        if left:
            raise leftover(self.earlier, left)
        self._retire()

    def _inherit_purged(self, journal: Journal) -> None:
        """What the earlier move purged is the new one's to give back, whatever comes between.

        And the new one's journal says which it was, when that one's may be gone (rollback.py).
        """
        earlier = self.earlier.move
        facts: dict[str, str | int | bool] = {
            "replaced": f"{earlier.id} {','.join(map(str, earlier.maps))}"
        }
        purged: dict[tuple[Identity, FourTuple], str] = {}
        for number, step in enumerate(self.old.steps):
            record = self.earlier.records.get(number)
            if isinstance(step, PurgeEntries) and record is not None and record.state != "undone":
                here = self.earlier.identity(step.site)
                found = zip(step.translation.kept, directions_of(record.prior.facts), strict=False)
                purged |= {(here, tuple_): direction for tuple_, direction in found}
        for number, step in enumerate(self.plan.steps):
            if isinstance(step, PurgeEntries):
                if purged:
                    here = journal.identity(step.site)
                    known = (purged.get((here, t), NOT_TRACKED) for t in step.translation.kept)
                    facts = {**facts, "inherited": "".join(known)}
                journal.note(number, "doing", Prior(facts=facts), step)

    def _pass_entries_on(self) -> None:
        """From now on the entries are the new move's, which both had until here.

        So that each could be torn down after a crash. Stateful entries of both have the same
        tuples: a teardown of the earlier move must not delete those of the new one. Stateless
        ones say NEW, so they differ.
        """
        same = {self.earlier.move.mode, self.plan.move.mode} == {Mode.STATEFUL}
        for number in self.entries:
            if same or isinstance(self.old.steps[number], PurgeEntries):
                self.earlier.note(number, "undone", Prior())

    def _go_back(self, reason: BaseException) -> None:
        """The new move is undone, if it is not yet, and has taken the earlier one's entries along.

        What it could not undo it has named, and does not try again here.
        """
        executor, new = self.executor, self.plan
        if executor.state.knows(new.move.id) and not isinstance(reason, LeftoverError):
            journal = executor.state.load(new.move.id)
            executor.undo_all(journal, list(range(len(new.steps))), reason)
        missing = []
        for number in self.entries:
            try:
                executor.apply(self.earlier, self.old.steps[number], number)
            except Exception as error:
                missing.append(f"{type(self.old.steps[number]).__name__}: {error}")
        if missing:
            earlier_id = self.earlier.move.id
            raise LeftoverError(
                f"move {earlier_id} is left without entries: {'; '.join(missing)}",
                hint=f"natkeep repair {earlier_id}",
            ) from reason

    def _retire(self) -> None:
        """All that *numbers* did is undone; with that the earlier move may be at its end."""
        try:
            for number in self.numbers:
                if puts_lock_back(self.earlier, number):
                    self.earlier.note(number, "undone", Prior())
        except JournalError as error:
            raise leftover(self.earlier, [error]) from error
        if all(record.state == "undone" for record in self.earlier.records.values()):
            forget(self.earlier)


def _shared_sites(executor: Executor, earlier: Journal, move: Move) -> list[Site]:
    ours = {executor.kernel.identity(site) for site in move.sites}
    shared = [site for site in earlier.move.sites if earlier.identity(site) in ours]
    if not shared:
        raise RefusedError(f"{move.id} and {earlier.move.id} have no site in common")
    return shared
