"""What an agent has heard from the store: its orders, what others say, what itself has said.

Rule: nothing is known to be absent before all that concerns the node was heard once, whole.
"""

from __future__ import annotations

from collections.abc import Mapping

from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.fleet import keys, restored
from natkeep.fleet.done import NOTHING, Done, parse_done
from natkeep.fleet.observed import Observed
from natkeep.fleet.store import ABSENT, Item
from natkeep.fleet.wake import Heard
from natkeep.fleet.want import Phase, Want, parse_want
from natkeep.plan.move import is_id
from natkeep.values import replace

Order = Want | NatkeepError
"""What is ordered, or why it is no order."""
_NOTHING = Item("", ABSENT)


class Known:
    """See above. prefixes: what of the store concerns the node from the beginning."""

    def __init__(self, node: str, groups: tuple[str, ...]) -> None:
        self.node = node
        self.prefixes = keys.node(node), *map(keys.group_wants, groups)
        self.told: dict[str, Done] = {}  # by id; the agent adds what it says
        self._orders: dict[str, dict[str, Order]] = {}  # by id and folder
        self._others: dict[str, Item] = {}  # what other nodes say, by key
        self._missing = {*self.prefixes}
        self.by_restore = set[str]()  # the ids of destinations that their restore prepares

    def is_whole(self) -> bool:
        """Whether all that concerns the node was heard once."""
        return not self._missing

    def take(self, heard: Heard) -> set[str]:
        """The ids of the moves of which something was heard."""
        items = heard.items
        if heard.whole:
            self._missing.discard(heard.prefix)
            items = {**dict.fromkeys(self._below(heard.prefix)), **items}
        ids = set()
        for key, item in items.items():
            folder, move_id = keys.split(key)
            if not is_id(move_id) or folder == keys.node(self.node):  # that is `alive`
                continue
            if folder == keys.dones(self.node):
                if not heard.whole:
                    continue  # by ourselves
                self.told[move_id] = parse_done(item and item.value)
            elif folder.endswith("/done/"):
                before = self._others.get(key)
                self._others[key] = item or _NOTHING
                if before is not None and _says(before) == _says(item):
                    continue  # something else was observed there
            else:
                self._take_order(folder, move_id, item)
            ids.add(move_id)
        return ids

    def find_order(self, move_id: str) -> Order | None:
        """What the node is ordered for a move; None: nothing is, as far as is known."""
        orders = [*self._orders.get(move_id, {}).values()]
        if len(orders) > 1:
            return RefusedError(f"{move_id} is ordered to {self.node} twice, by a group as well")
        return orders[0] if orders else None

    def other(self, node: str, move_id: str) -> Item | None:
        """What another node says; None where that was never heard of, nor that there is nothing."""
        return self._others.get(keys.done(node, move_id))

    def find_told(self, here: str) -> tuple[str, Done] | None:
        """The order that what was prepared here by the id *here* is of, and what was said of it."""
        for move_id in [*self.by_restore]:  # at once: it is asked by another thread
            told = self.told.get(move_id)
            if told and told.maps and here == (told.hooked or move_id):
                return move_id, told
        return None

    def about(self, ids: set[str]) -> set[str]:
        """The moves that journals of these ids may be of."""
        hooked = any(each.startswith(restored.HOOKS) for each in ids)
        return ids | self.by_restore if hooked else ids

    def phases(self) -> dict[str, Phase]:
        """How far each move is that is there, by its id here."""
        told = [*self.told.items()]  # at once: it is asked by another thread
        return {done.hooked or each: done.phase for each, done in told if done.is_there()}

    def compare(self, seen: Mapping[str, Observed]) -> dict[str, Done]:
        """What is to be said where something else was seen, by ids here, than was said."""
        found = {}
        for move_id, told in self.told.items():
            observed = seen.get(told.hooked or move_id)
            if observed is not None and told.is_there() and observed != told.observed:
                found[move_id] = replace(told, observed=observed)
        return found

    def _below(self, prefix: str) -> list[str]:
        """The keys below *prefix* that were there when it was heard last."""
        ours = [f"{folder}{each}" for each, by in self._orders.items() for folder in by]
        ours += [keys.done(self.node, each) for each, told in self.told.items() if told != NOTHING]
        return [key for key in (*ours, *self._others) if key.startswith(prefix)]

    def _take_order(self, folder: str, move_id: str, item: Item | None) -> None:
        orders = self._orders.setdefault(move_id, {})
        if item is None:
            orders.pop(folder, None)
        else:
            try:
                orders[folder] = parse_want(item.value)
            except UsageError as error:
                orders[folder] = error
        order = self.find_order(move_id)
        by_restore = isinstance(order, Want) and order.by_restore()
        (self.by_restore.add if by_restore else self.by_restore.discard)(move_id)


def _says(item: Item | None) -> Done:
    """What a node says, but for what it has observed."""
    return replace(parse_done(item and item.value), observed=None)
