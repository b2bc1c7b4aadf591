"""The keys of the store; the node comes first, so that its rights are a prefix.

/natkeep/v1/move/ID              a move, by who orders it (order.py)
/natkeep/v1/conn/ID/LIST/NNNN    its connections, in pieces (listing.py)
/natkeep/v1/owner/OLD            the id of the move that has OLD
/natkeep/v1/node/NODE/want/ID    what the node is ordered (want.py)
/natkeep/v1/group/GROUP/want/ID  the same for each node of a group
/natkeep/v1/node/NODE/done/ID    how far it is, by that node alone (done.py)
/natkeep/v1/node/NODE/alive      that its agent runs; it goes with the agent's lease
"""

from __future__ import annotations

import re

from natkeep.errors import UsageError

TOP = "/natkeep/v1/"
MOVES, NODES = f"{TOP}move/", f"{TOP}node/"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def parse_name(text: str) -> str:
    """The name of a node or a group: as a host's; UsageError if it is none."""
    if not _NAME.fullmatch(text):
        raise UsageError(
            f"{text!r} is not a name of a node or group",
            hint="a letter or digit, then up to 62 of a-z, A-Z, 0-9, ., - and _",
        )
    return text


def move(move_id: str) -> str:
    """A move."""
    return f"{MOVES}{move_id}"


def lists(move_id: str) -> str:
    """All lists of its connections begin so."""
    return f"{TOP}conn/{move_id}/"


def pieces(move_id: str, generation: int, sha256: str) -> str:
    """The list of one order; all pieces of it begin so."""
    return f"{lists(move_id)}{generation}-{sha256[:16]}/"


def generation_of(pieces: str) -> int:
    """Of which order a list is; 0 where that is not known."""
    number = pieces.split("/")[-2].partition("-")[0]
    return int(number) if number.isdecimal() else 0


def after(folder: str) -> str:
    """The first key that can come behind all that begin with *folder*."""
    return f"{folder[:-1]}{chr(ord('/') + 1)}"


def owner(old: object) -> str:
    """Whose OLD is: an address, perhaps with a port."""
    return f"{TOP}owner/{old}"


def node(name: str) -> str:
    """All that is of a node begins so."""
    return f"{NODES}{name}/"


def wants(name: str) -> str:
    """All that a node is ordered begins so."""
    return f"{node(name)}want/"


def group_wants(name: str) -> str:
    """All that the nodes of a group are ordered begins so."""
    return f"{TOP}group/{name}/want/"


def dones(name: str) -> str:
    """All that a node says of moves begins so."""
    return f"{node(name)}done/"


def done(name: str, move_id: str) -> str:
    """What a node says of a move."""
    return f"{dones(name)}{move_id}"


def alive(name: str) -> str:
    """That a node's agent runs."""
    return f"{node(name)}alive"


def split(key: str) -> tuple[str, str]:
    """What a key begins with, and its last part: an id, where it is of a want or done."""
    folder, slash, last = key.rpartition("/")
    return folder + slash, last
