"""The nodes that the store knows, and which of them send to a destination.

Rule: who is not known to be gone sends. One of a group that was started after the order is ordered
the same, though the order does not name it.
"""

from __future__ import annotations

from collections.abc import Iterator

from natkeep.fleet import keys
from natkeep.fleet.done import parse_done
from natkeep.fleet.store import ABSENT, Store, read
from natkeep.fleet.want import Phase, Want


def find_nodes(store: Store) -> Iterator[str]:
    """All there are, without all that they say: of each its first key, and then the next one's."""
    start = ""
    while items := store.range(keys.NODES, start, 1).items:
        [key] = items
        node = key.removeprefix(keys.NODES).partition("/")[0]
        yield node
        start = keys.after(keys.node(node))


def find_late(store: Store, move_id: str) -> Iterator[str]:
    """The nodes to which the move was ordered by a group, or not at all."""
    return (one for one in find_nodes(store) if read(store, keys.wants(one) + move_id) is None)


def is_there(store: Store, node: str, move_id: str) -> bool:
    """Whether the node is not known to have nothing of the move."""
    item = read(store, keys.done(node, move_id))
    return parse_done(item and item.value).phase != Phase.GONE


def find_sending(store: Store, move_id: str, want: Want) -> tuple[list[str], dict[str, int]]:
    """The nodes that send to this one, or have begun to; the revisions of what all said."""
    others, sending = dict[str, int](), list[str]()
    late = find_late(store, move_id) if want.senders else ()
    for node in dict.fromkeys((*want.senders, *late)):
        key = keys.done(node, move_id)
        item = read(store, key)
        others[key] = item.revision if item else ABSENT
        if item and parse_done(item.value).phase != Phase.GONE:
            sending.append(node)
    return sending, others
