"""How far a move is at its nodes, as they say.

Rule: nothing is written here. What a node said of an earlier order counts for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from natkeep.errors import JournalError, UsageError
from natkeep.fleet import keys
from natkeep.fleet.done import Done, Error, parse_done
from natkeep.fleet.order import Order, Place, parse_order
from natkeep.fleet.store import Item, Store, read
from natkeep.fleet.want import Phase, is_known
from natkeep.plan.roles import ROLES, Role

GOALS = ("staged", "ready", "open", "settled")
"""What can be waited for. staged: the destination is prepared; ready: all is as it has to be before
a restore, gateways open; open: the destination as well; settled: the same, or after an `end` that
all is undone."""


class Node(NamedTuple):
    """One node of a move. heard: it has said something of this very order."""

    name: str
    place: Place
    done: Done
    heard: bool
    alive: bool

    def error(self) -> Error | None:
        """What went wrong in this very order."""
        return self.done.error if self.heard else None

    def describe(self) -> str:
        """A line for a person."""
        words = [str(self.done.phase)]
        if self.done.observed:
            words += self.done.observed.describe(self.done.phase)
        if not self.heard:
            words.append("has not said anything of this order")
        if self.heard and self.done.waits:
            waits = ", ".join(f"{node}: {phase}" for node, phase in self.done.waits.items())
            words.append(f"waits for {waits}")
        if error := self.error():
            words.append(error.message)
        if not self.alive:
            words.append("no agent runs")
        return "; ".join(words)


class Progress(NamedTuple):
    """A move, and its nodes in the order of an undo."""

    order: Order
    nodes: tuple[Node, ...]

    def lacking(self, goal: str) -> list[Node]:
        """The nodes that are not as far."""
        if self.order.phase == "settled" and goal == "settled":
            return []
        return [node for node in self.nodes if not self._reaches(node, goal)]

    def describe(self, lacking: list[Node]) -> str:
        """What is waited for, in a line; empty where nothing is."""
        staged = "; it is staged: nothing but the destination is ordered yet"
        return describe(lacking) + (staged if lacking and self.order.phase == "staged" else "")

    def _reaches(self, node: Node, goal: str) -> bool:
        if not self.order.is_wanted():
            return goal == "settled" and node.heard and node.done.phase == Phase.GONE
        if node.place.role != Role.DESTINATION and "staged" in (goal, self.order.phase):
            return goal == "staged"
        [new] = [each.done.maps for each in self.nodes if each.place.role == Role.DESTINATION]
        if not is_known(self.order.maps) and {*node.done.maps} != {*new}:
            return False  # it has NEW as an earlier restore found it
        opened = ROLES[node.place.role].passes_on
        opened |= goal in ("open", "settled") and node.place.role == Role.DESTINATION
        return node.heard and node.done.phase.reaches(Phase.OPEN if opened else Phase.PREPARED)


def describe(nodes: Iterable[Node]) -> str:
    """A line for all of them."""
    return "; ".join(f"{node.name}: {node.describe()}" for node in nodes)


def look(store: Store, move_id: str) -> Progress:
    """One move; JournalError where the store has none of that id."""
    item = read(store, keys.move(move_id))
    if item is None:
        raise JournalError(f"no move {move_id} in the store", hint="natkeep fleet status")
    order = parse_order(item.value)
    found: dict[str, Item] = {}
    for name, _ in order.nodes():
        for key in (keys.done(name, move_id), keys.alive(name)):
            if (found_ := read(store, key)) is not None:
                found[key] = found_
    return _make(order, found)


def look_at_all(store: Store) -> tuple[list[Progress], list[str], list[str]]:
    """All moves that are not settled, the nodes whose agents run, and what cannot be read."""
    nodes = store.range(keys.NODES).items
    found, unread = list[Progress](), list[str]()
    for key, item in store.range(keys.MOVES).items.items():
        try:
            found.append(_make(parse_order(item.value), nodes))
        except UsageError as error:  # of a later natkeep, say: the others are shown
            unread.append(f"{key.removeprefix(keys.MOVES)}: {error}")
    alive = [key.split("/")[4] for key in nodes if key.endswith("/alive")]
    return [move for move in found if move.order.phase != "settled"], sorted(alive), unread


def _make(order: Order, items: dict[str, Item]) -> Progress:
    nodes = []
    for name, place in order.nodes():
        item = items.get(keys.done(name, order.id))
        done = parse_done(item and item.value)
        heard = done.generation == order.generation
        nodes.append(Node(name, place, done, heard, keys.alive(name) in items))
    return Progress(order, tuple(nodes))
