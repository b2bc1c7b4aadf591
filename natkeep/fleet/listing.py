"""A list of connections in the store: in pieces, since a store takes no large values.

Each order has a list of its own, by its generation and checksum: an order that is refused, or is
never written to the end, leaves that of the one before it as it is.

Rule: what does not match its checksum is no list (ImageError), and nothing is made of it.
"""

from __future__ import annotations

import hashlib

from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.listing import parse_octets
from natkeep.errors import ImageError
from natkeep.fleet import keys
from natkeep.fleet.store import Store
from natkeep.fleet.want import Listed, Want

PIECE = 512 << 10  # octets; etcd takes requests of 1.5 MiB, in base64


def cut(move_id: str, generation: int, text: str, count: int) -> tuple[Listed, dict[str, str]]:
    """What is said of the list *text* (ASCII), and its pieces by key."""
    parts = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    listed = Listed(len(parts), count, hashlib.sha256(text.encode()).hexdigest())
    return listed, dict(zip(_names(move_id, generation, listed), parts, strict=True))


def _names(move_id: str, generation: int, listed: Listed) -> list[str]:
    folder = keys.pieces(move_id, generation, listed.sha256)
    return [f"{folder}{n:04}" for n in range(listed.pieces)]


def fetch(store: Store, move_id: str, want: Want) -> Checkpoint:
    """The list of a move; ImageError where it is not the one that was written."""
    return parse_octets(fetch_octets(store, move_id, want), f"the connections of {move_id}")


def fetch_octets(store: Store, move_id: str, want: Want) -> bytes:
    """The same as it was written."""
    items = store.range(keys.pieces(move_id, want.generation, want.listed.sha256)).items
    names = _names(move_id, want.generation, want.listed)
    octets = "".join(items[name].value for name in names if name in items).encode()
    if hashlib.sha256(octets).hexdigest() != want.listed.sha256:
        raise ImageError(
            f"{move_id}: the connections in the store do not match their checksum",
            hint="natkeep fleet apply writes them again",
        )
    return octets


def sweep(store: Store, move_id: str, generation: int) -> None:
    """Delete the lists of orders before that generation."""
    start = ""
    while items := store.range(keys.lists(move_id), start, 1).items:
        [key] = items
        folder = f"{key.rpartition('/')[0]}/"
        if keys.generation_of(folder) < generation:
            store.delete(folder)
        start = keys.after(folder)
