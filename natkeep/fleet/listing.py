"""A list of connections in the store: in pieces, since a store takes no large values.

Rule: what does not match its checksum is no list (ImageError), and nothing is made of it.
"""

from __future__ import annotations

import hashlib

from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.listing import parse_octets
from natkeep.errors import ImageError
from natkeep.fleet import keys
from natkeep.fleet.store import Store
from natkeep.fleet.want import Listed

PIECE = 512 << 10  # octets; etcd takes requests of 1.5 MiB, in base64


def cut(move_id: str, text: str, count: int) -> tuple[Listed, dict[str, str]]:
    """What is said of the list *text* (ASCII), and its pieces by key."""
    parts = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    pieces = {f"{keys.pieces(move_id)}{n:04}": part for n, part in enumerate(parts)}
    return Listed(len(parts), count, hashlib.sha256(text.encode()).hexdigest()), pieces


def fetch(store: Store, move_id: str, listed: Listed) -> Checkpoint:
    """The list of a move; ImageError where it is not the one that was written."""
    return parse_octets(fetch_octets(store, move_id, listed), f"the connections of {move_id}")


def fetch_octets(store: Store, move_id: str, listed: Listed) -> bytes:
    """The same as it was written."""
    items = store.range(keys.pieces(move_id)).items
    names = [f"{keys.pieces(move_id)}{n:04}" for n in range(listed.pieces)]
    octets = "".join(items[name].value for name in names if name in items).encode()
    if hashlib.sha256(octets).hexdigest() != listed.sha256:
        raise ImageError(
            f"{move_id}: the connections in the store do not match their checksum",
            hint="natkeep fleet apply writes them again",
        )
    return octets
