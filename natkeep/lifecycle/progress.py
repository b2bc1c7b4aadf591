"""How far a move got, from its journal and its plan: which steps, which sites.

Rule: nothing is looked at here but the journal, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from natkeep.errors import JournalError
from natkeep.plan.move import Site
from natkeep.plan.recorded import Written, follow
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.step_undo import PutLockBack, RemoveAddress
from natkeep.plan.steps import InstallGate, InstallTranslation, OpenGate, Plan, Step, Unknown
from natkeep.state.directory import read_boot_id
from natkeep.state.journal import Journal, Unread
from natkeep.state.object_codec import loaded_from_json, loaded_to_json
from natkeep.values import replace


def plan_today(journal: Journal) -> Plan:
    """The plan that this natkeep makes of the journal: how it translates, whatever it is called."""
    return make_plan(journal.move, journal.connections, journal.surroundings, journal.change)


def plan_of(journal: Journal) -> Plan:
    """The plan that the journal was written for, with what was loaded for it (plan/recorded.py)."""
    plan = plan_today(journal)
    noted = any(record.loaded for record in journal.records.values())
    plan = plan if noted or not journal.records else replace(plan, unnoted=True)
    if kinds_of(plan) == journal.kinds and _is_as_today(journal, plan):
        return plan
    numbers = range(len(journal.kinds))
    first = len(numbers) - len(journal.opening)
    steps = [_read_written(journal, number, number - first) for number in numbers]
    return follow(plan, steps)


def _is_as_today(journal: Journal, plan: Plan) -> bool:
    """Whether each step loaded, or will load, what it would today, as far as the journal says."""
    first = len(plan.steps) - len(journal.opening)
    for number, step in enumerate(plan.steps):
        record = journal.records.get(number)
        loaded: Mapping[str, Any] = {}
        if record is not None:
            loaded = {} if _has_more_to_do(journal, number) else record.loaded
        elif number >= first:
            loaded = journal.opening[number - first]
        if loaded and loaded != loaded_to_json(step):
            return False
    return True


def _has_more_to_do(journal: Journal, number: int) -> bool:
    """Whether a comparison with the image has found that the step has to load more, or others."""
    again = journal.records[number].again or journal.is_closed_again(number)
    return journal.change is not None and again


def _read_written(journal: Journal, number: int, later: int) -> Written:
    """What the journal says of a step; later: which of those that open the move it is."""
    kind, record = journal.kinds[number], journal.records.get(number)
    if record is None:
        loaded = journal.opening[later] if later >= 0 else {}
        return Written(kind, None, loaded_from_json(loaded))
    undo = record.undo
    undo = undo.read() if isinstance(undo, Unread) else undo
    return Written(
        kind, record.site, loaded_from_json(record.loaded),
        tuple(map(str, record.loaded["sets"])) if "sets" in record.loaded else None,
        undo.address if isinstance(undo, RemoveAddress) else None,
    )  # fmt: skip


def kinds_of(plan: Plan) -> tuple[str, ...]:
    """The kind of each step, as the journal has it."""
    return tuple(
        step.kind if isinstance(step, Unknown) else type(step).__name__ for step in plan.steps
    )


def numbers_before(plan: Plan) -> list[int]:
    """The steps that prepare does: of a live process those that leave it and its peers alone."""
    steps = enumerate(plan.prepare)
    return [n for n, step in steps if not plan.move.waits(step.site) or _redirects_nothing(step)]


def _redirects_nothing(step: Step) -> bool:
    """Whether it is only rules, which ask a set that is filled once the process is frozen."""
    return isinstance(step, InstallGate | InstallTranslation) and step.site.row.passes_on


def is_prepared(journal: Journal, plan: Plan, late: frozenset[int] = frozenset()) -> bool:
    """Whether prepare did all that open does not do where it is missing, but for *late*."""
    done = journal.is_done if journal.change is None else journal.has_been_done
    needed = (n for n, step in enumerate(plan.prepare) if not plan.move.waits(step.site))
    return all(done(number) for number in needed if number not in late)


def without_lock(journal: Journal, numbers: Iterable[int]) -> list[int]:
    """CRIU's lock is put back when prepare fails, and never by a teardown."""
    return [number for number in numbers if not puts_lock_back(journal, number)]


def puts_lock_back(journal: Journal, number: int) -> bool:
    """Whether it is CRIU's lock that undoing this step puts back."""
    record = journal.records.get(number)
    return record is not None and isinstance(record.undo, PutLockBack)


def is_waiting(journal: Journal, plan: Plan, site: Site) -> bool:
    """Whether nothing is redirected at *site* yet, since it is made ready by open."""
    early = numbers_before(plan)
    begun = [n for n, r in journal.records.items() if r.state != "undone" and n not in early]
    return plan.move.waits(site) and site not in {plan.steps[n].site for n in begun}


def is_retired(journal: Journal, plan: Plan, site: Site) -> bool:
    """Whether another move has replaced this one at *site*."""
    numbers = [n for n, step in enumerate(plan.steps) if step.site == site]
    records = [journal.records[n].state for n in numbers if n in journal.records]
    return set(records) == {"undone"} and not any(map(journal.is_closed_again, numbers))


def has_been_opened(journal: Journal, plan: Plan, site: Site) -> bool:
    """Whether the connections were let through at *site*, and are to be."""
    opening = range(len(plan.prepare), len(plan.steps))
    return any(plan.steps[n].site == site and journal.has_been_done(n) for n in opening)


def was_closed(journal: Journal, plan: Plan, site: Site) -> bool:
    """Whether what had been opened at *site* was closed again, since the move goes on."""
    steps = (n for n, step in enumerate(plan.steps) if step.site == site)
    return any(map(journal.is_closed_again, steps))


def opened_at(journal: Journal, plan: Plan, site: Site) -> int | None:
    """When the gate at *site* was opened, in nanoseconds of the monotonic clock.

    0 where the journal does not say when; None while it is closed.
    """
    steps = ((n, step) for n, step in enumerate(plan.steps) if step.site == site)
    opened = [n for n, step in steps if isinstance(step, OpenGate) and journal.has_been_done(n)]
    return max((journal.records[n].at for n in opened), default=None)


def restored_at(plan: Plan) -> list[Site]:
    """Where opening means that the process runs: at the destination, if that is a site."""
    sites = [site for site in plan.move.sites if site.role == Role.DESTINATION]
    return sites or list(plan.move.sites)


def refuse_earlier_boot(journal: Journal) -> None:
    """JournalError when the move was prepared before the last boot."""
    if journal.boot != read_boot_id():
        raise JournalError(
            f"move {journal.move.id} was prepared before the last boot; nothing of it is there",
            hint=f"natkeep teardown {journal.move.id}",
        )


def unprepared(journal: Journal) -> JournalError:
    """What to say of a move whose prepare did not come to its end."""
    return JournalError(
        f"move {journal.move.id} was not prepared to the end",
        hint=f"natkeep teardown {journal.move.id}, then prepare again",
    )
