"""rollback: back to the source, in the order that has no host answer for a socket it lacks.

    1. gateway       undone: peers' packets go to the source again, which is quiet still
    2. source        the process is restored there, from the same image
    3. destination   undone: its gate goes last
    4. source        undone, if it was prepared

A relay is gateway and source: its gate closes first, and it is undone once the process is back.

What of this is at the sites of the move's journal here is done, as far as the order lets; the rest
is said. So it is given again wherever something is left.

Rule: not once the process has spoken at NEW: what was said since is not in the image. And not
where it had moved on (`prepare --replace`): the way back is to replace once more.
"""

from __future__ import annotations

from natkeep.errors import RefusedError
from natkeep.lifecycle.drain import has_spoken
from natkeep.lifecycle.executor import Executor, finish, leftover
from natkeep.lifecycle.progress import has_been_opened, refuse_earlier_boot, was_closed
from natkeep.lifecycle.status import look_at_sites
from natkeep.lifecycle.teardown import end
from natkeep.plan.connection_state import SiteStatus
from natkeep.plan.move import Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.step_undo import CloseGates
from natkeep.plan.steps import Plan
from natkeep.state.journal import Journal
from natkeep.values import dataclass

RESTORE = "criu restore -d -D IMAGES --tcp-established"
"""At the source; with natkeep's hook, if that was prepared by itself."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """Which sites were undone, and what is to be done next, in this order: a role and a command."""

    undone: tuple[Site, ...]
    next: tuple[tuple[Role, str], ...]


def rollback(executor: Executor, move_id: str, *, yes: bool = False) -> RolledBack:
    """Undo what the order lets be undone here; again is fine, also of an unknown id.

    RefusedError, and nothing is changed, when the process has spoken at NEW, or came to the source
    by an earlier move that this gateway carries no more, and not *yes*.
    """
    with executor.state.changing(move_id):
        if not executor.state.knows(move_id):
            return RolledBack((), _find_next(move_id, frozenset(), back=False))
        journal, plan = executor.load(move_id)
        refuse_earlier_boot(journal)
        statuses = look_at_sites(executor, journal, plan)
        if not yes:
            _refuse_replacing(journal)
            _refuse_spoken(journal, plan, statuses)
        sources = [one for one in statuses if one.site.row.mutes or one.site.row.relays]
        seen = [(one.site, one.seen) for one in sources if one.seen is not None]
        back = any(now.back if site.row.relays else now.living for site, now in seen)
        roles = frozenset(site.role for site in plan.move.sites)
        if plan.move.vias and not back and Role.RELAY in roles:
            undone = finish(lambda: _close_relay(executor, journal))
            return RolledBack(undone, _find_next_by_relay(move_id, roles, back=back))
        if sources and not back:
            undone = finish(lambda: _undo_gateways(executor, journal))
        else:
            finish(lambda: end(executor, move_id))
            undone = plan.move.ordered_sites()
        if plan.move.vias:
            return RolledBack(undone, _find_next_by_relay(move_id, roles, back=back))
        return RolledBack(undone, _find_next(move_id, roles, back=back))


def _undo_gateways(executor: Executor, journal: Journal) -> tuple[Site, ...]:
    """The rest stays closed: the process is not back yet."""
    gateways = tuple(site for site in journal.move.sites if site.row.passes_on)
    here = {site for site in gateways if executor.reach(journal, site)}
    numbers = [n for n, record in journal.records.items() if record.site in here]
    left = executor.undo_move(journal, sorted(numbers, reverse=True))
    if left:
        raise leftover(journal, left)
    return gateways


def _close_relay(executor: Executor, journal: Journal) -> tuple[Site, ...]:
    """Its gate, which may be open for those that hold; all else stays, and nothing answers."""
    journal.resolve()
    relays = {s for s in journal.move.sites if s.row.relays and executor.reach(journal, s)}
    records = [(n, r) for n, r in journal.records.items() if r.site in relays]
    opened = [n for n, r in records if isinstance(r.undo, CloseGates)]
    executor.undo_for_now(journal, opened)
    return ()


def _find_next_by_relay(
    move_id: str, here: frozenset[Role], *, back: bool
) -> tuple[tuple[Role, str], ...]:
    """The same of a move by a relay: the process is restored there while its gate is closed."""
    again = f"natkeep rollback {move_id}"
    steps = [] if Role.RELAY in here else [(Role.RELAY, again)]
    steps += [] if back else [(Role.RELAY, RESTORE), (Role.RELAY, again)]
    return (*steps, *([] if Role.DESTINATION in here else [(Role.DESTINATION, again)]))


def _refuse_replacing(journal: Journal) -> None:
    """RefusedError where the gateway's part took the place of an earlier move's."""
    for record in journal.records.values():
        replaced = str(record.prior.facts.get("replaced", ""))
        if replaced and record.site is not None and record.site.row.passes_on:
            earlier, _, maps = replaced.partition(" ")
            options = "".join(f" --map {each}" for each in maps.split(","))
            if record.site.row.relays:
                vias = (f" --via {via}" for via in journal.move.vias)
                options += f" --site {record.site}{''.join(vias)}"
            raise RefusedError(
                f"{journal.move.id} took the place of {earlier} ({maps}): the process came by that",
                hint=f"back there: natkeep prepare ID --replace {journal.move.id}{options}, then "
                "restore it; back to OLD's own host: --yes",
            )


def _refuse_spoken(journal: Journal, plan: Plan, statuses: tuple[SiteStatus, ...]) -> None:
    ends = [one for one in statuses if one.site.row.puts_old]
    opened = [
        one.site
        for one in ends
        if has_been_opened(journal, plan, one.site)
        or was_closed(journal, plan, one.site)
        or (one.seen is not None and one.seen.gate == Gate.OPEN)
    ]
    move_id = plan.move.id
    if opened:
        why = f"{move_id} was opened at {opened[0]}"
    elif not ends and has_spoken(statuses):
        why = f"the process of {move_id} has spoken at NEW"
    else:
        return
    raise RefusedError(
        f"{why}: what was said since is not in the image, and its peers would reset what is "
        "restored from it",
        hint=f"to end it: natkeep teardown {move_id}; --yes if nothing ran there",
    )


def _find_next(move_id: str, here: frozenset[Role], *, back: bool) -> tuple[tuple[Role, str], ...]:
    """What is left to do, also elsewhere; here: the roles of the journal's sites."""
    again = f"natkeep rollback {move_id}"
    alone = here == {Role.SOURCE}
    hook = " --action-script $(command -v natkeep-hook)"
    restore = f"NATKEEP_ID={move_id} {RESTORE}{hook}" if alone else RESTORE
    steps: list[tuple[Role, str]] = []
    if here.isdisjoint((Role.GATEWAY, Role.PEER)) and not back:
        steps.append((Role.GATEWAY, again))
    if not back:
        steps.append((Role.SOURCE, restore))
    if Role.DESTINATION not in here:
        steps.append((Role.DESTINATION, again))
    if not back:
        steps.append((Role.SOURCE, again))
    return tuple(steps)
