"""A move at this node: its phase as the journal has it, and what is done to it.

Rule: the journal is asked, never what was meant to be done. What was opened once, even if it was
closed again since, is undone by an order alone.
"""

from __future__ import annotations

import math
import time
from enum import Enum

from natkeep import policy
from natkeep.checkpoint import Checkpoint
from natkeep.errors import LeftoverError, RefusedError
from natkeep.fleet.jobs import Teardown
from natkeep.fleet.want import Phase, Want, make_maps
from natkeep.kernel.pods import find_netns
from natkeep.lifecycle import drain
from natkeep.lifecycle.executor import Executor, finish
from natkeep.lifecycle.teardown import end
from natkeep.plan.maps import Map
from natkeep.plan.move import Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.steps import OpenEarly, OpenGate
from natkeep.plan.undone import SECONDS
from natkeep.state.directory import StateDirectory, read_boot_id
from natkeep.state.journal import Journal
from natkeep.values import dataclass

_OPENING = (OpenGate.__name__, OpenEarly.__name__)


class Standing(Enum):
    """What a journal says of a move. HALF: it was not prepared to the end, or half undone.

    STALE: it was prepared before the last boot, and nothing of it is there.
    """

    GONE = "gone"
    STALE = "stale"
    HALF = "half"
    PREPARED = "prepared"
    OPEN = "open"

    def phase(self) -> Phase:
        """What is told of it: what is half there is neither gone nor ready."""
        known = {
            Standing.HALF: Phase.OPENING, Standing.PREPARED: Phase.PREPARED,
            Standing.OPEN: Phase.OPEN,
        }  # fmt: skip
        return known.get(self, Phase.GONE)


@dataclass(frozen=True, slots=True)
class Seen:
    """A move as its journal has it; begun: nanoseconds of the monotonic clock, 0: unknown.

    touched: a gate of it was opened once, or may have been; closed: and was closed again.
    maps: as it was prepared.
    """

    standing: Standing
    touched: bool = False
    closed: bool = False
    begun: int = 0
    maps: tuple[Map, ...] = ()

    def left(self, deadline: int) -> float:
        """Seconds until its gate has been closed for *deadline* seconds, from the beginning on."""
        if self.touched or not (self.begun and deadline):
            return math.inf
        return deadline - (time.monotonic_ns() - self.begun) / 10**9


def look(state: StateDirectory, move_id: str) -> Seen:
    """The move of that id; JournalError where its journal cannot be read."""
    if not state.knows(move_id):
        return Seen(Standing.GONE)
    journal = state.load(move_id)
    closed = any(map(journal.is_closed_again, journal.records))
    return Seen(_stand(journal), _was_touched(journal), closed, journal.begun, journal.move.maps)


def look_calmly(state: StateDirectory, move_id: str) -> Seen:
    """The same, and of what is half there once nobody is at it: a teardown or repair by hand."""
    seen = look(state, move_id)
    if seen.standing != Standing.HALF:
        return seen
    with state.holding(move_id):
        return look(state, move_id)


def _stand(journal: Journal) -> Standing:
    if journal.boot != read_boot_id():
        return Standing.STALE
    if journal.is_opened():
        return Standing.OPEN
    return Standing.PREPARED if journal.is_prepared() else Standing.HALF


def _was_touched(journal: Journal) -> bool:
    return any(kind in _OPENING and n in journal.records for n, kind in enumerate(journal.kinds))


def make_move(move_id: str, want: Want, checkpoint: Checkpoint) -> Move:
    """The move at this one site; UsageError or RefusedError where it is none, or not allowed."""
    olds = [map_.old_end for map_ in want.maps]
    move = Move(
        move_id, make_maps(want.maps), (Site(want.role, find_netns(want.netns)),), want.mode,
        want.listeners, hold=want.gate == Gate.CLOSED, udp=checkpoint.udp_at(olds),
        udp_servers=checkpoint.udp_servers_at(olds),
    )  # fmt: skip
    count = sum(map(len, move.share(checkpoint.connections))) + len(move.udp)
    policy.authorise(move, count + len(move.udp_servers))
    return move


def refuse_out_of_bounds(want: Want, bounds: policy.Agent) -> None:
    """RefusedError where the operator's file does not let the store order it here."""
    if bounds.roles is not None and want.role not in bounds.roles:
        raise RefusedError(f"{bounds.node} takes no orders as {want.role}", hint="agent.roles")
    if bounds.netns is not None and want.netns not in bounds.netns:
        raise RefusedError(
            f"{bounds.node} takes no orders in the namespace {want.netns!r}", hint="agent.netns"
        )


def undo(executor: Executor, move_id: str, want: Want) -> Teardown:
    """What undoes it by order; LeftoverError while connections live by it.

    RefusedError where the process was and is not, but OLD is still: peers would be reset.
    """
    if not want.force and executor.state.knows(move_id):
        silent = want.unopened and drain.is_silent(executor, move_id)
        alive = 0 if silent else drain.count_alive(executor, move_id)
        if alive:
            raise LeftoverError(
                f"{alive} connections live; nothing was undone",
                hint=f"natkeep fleet end {move_id} --yes ends them",
            )
        for line in drain.find_exposed(executor, move_id):
            raise RefusedError(
                line,
                hint="restore the process there, take OLD from that host, or natkeep fleet end "
                f"{move_id} --yes",
            )
    # Once all that sends to it is undone, nothing comes to a destination that it had to drop.
    return Teardown(move_id, 0 if want.after else SECONDS)


def clear(executor: Executor, move_id: str, want: Want) -> bool:
    """Undo what was never opened, nor sent to, or is of an earlier boot; whether it was undone.

    A hook may open it at the same time.
    """
    executor.drops = 0 if want.senders else SECONDS  # where others send, nothing is known of them
    with executor.state.changing(move_id):
        journal = executor.load_undo(move_id) if executor.state.knows(move_id) else None
        if journal and journal.boot == read_boot_id() and _was_touched(journal):
            return False
        finish(lambda: end(executor, move_id))
        return True
