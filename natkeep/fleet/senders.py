"""Who sends to a destination, as the store has it now.

Rule: whoever is not known to be gone sends.
"""

from __future__ import annotations

from natkeep.fleet import keys
from natkeep.fleet.done import parse_done
from natkeep.fleet.store import ABSENT, Store, read
from natkeep.fleet.want import Phase, Want


def find_sending(store: Store, move_id: str, want: Want) -> tuple[list[str], dict[str, int]]:
    """The nodes that send to this one, or have begun to; the revisions of what all said."""
    others, sending = {}, []
    for node in want.senders:
        key = keys.done(node, move_id)
        item = read(store, key)
        others[key] = item.revision if item else ABSENT
        if item and parse_done(item.value).phase != Phase.GONE:
            sending.append(node)
    return sending, others
