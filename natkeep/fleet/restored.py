"""A destination that its restore prepares: NEW is not known before.

Its order has `auto` in the place of NEW. What prepares it is natkeep-hook, under an id of its own
(`criu-...`), or another that knows NEW before the restore, under the order's id. The agent finds
the journal and says how far it is, with NEW; it never prepares it, but undoes it by order.

Rule: a journal is the order's if it has the same OLDs and, under another id, is of the same dump.
"""

from __future__ import annotations

from natkeep.errors import JournalError, NatkeepError
from natkeep.fleet.done import Done
from natkeep.fleet.want import Want, is_known, parse_maps
from natkeep.plan.roles import Role
from natkeep.state.directory import StateDirectory, read_boot_id
from natkeep.state.journal import Journal
from natkeep.values import replace

HOOKS = "criu-"
"""How the ids of natkeep-hook begin (criu/environment.py)."""


def find_id(state: StateDirectory, move_id: str, want: Want | None, told: Done | None) -> str:
    """Under which id this node has the move; *move_id* if it does not have it.

    told: what was said of it last, which counts where there is no order any more.
    """
    if want is None:
        return (told and told.hooked) or move_id
    if not want.by_restore() or want.image is None or state.knows(move_id):
        return move_id
    journals = (_load(state, each) for each in state.ids() if each.startswith(HOOKS))
    found = [journal for journal in journals if journal and _is_of(journal, want)]
    # One that was opened has the process; else the last restore counts: it has cleared the others.
    best = max(found, key=lambda journal: (journal.is_opened(), journal.begun), default=None)
    return best.move.id if best else move_id


def with_new(want: Want, told: Done) -> Want:
    """*want* with NEW as the node of the destination says it; as it is where that says nothing."""
    try:
        maps = parse_maps([*told.maps])
    except (ValueError, NatkeepError):
        return want
    named = {wish.old_end: wish for wish in maps}
    if not is_known(maps) or named.keys() != {wish.old_end for wish in want.maps}:
        return want
    return replace(want, maps=tuple(named[wish.old_end] for wish in want.maps))


def _load(state: StateDirectory, move_id: str) -> Journal | None:
    """None where it is gone by now, or `natkeep status` says what is wrong."""
    try:
        return state.load(move_id)
    except JournalError:
        return None


def _is_of(journal: Journal, want: Want) -> bool:
    move = journal.move
    return (
        journal.image == want.image
        and journal.boot == read_boot_id()
        and [site.role for site in move.sites] == [Role.DESTINATION]
        and {map_.old_end for map_ in move.maps} == {wish.old_end for wish in want.maps}
    )
