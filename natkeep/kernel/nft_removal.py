"""the nf_tables messages that take objects of many moves away, packed as pack_objects packs others.

libnftables reads all chains of all tables before it sends anything: a second beside ten thousand
moves, for each transaction.

Rule: the same objects go, in the same order, as by the text of nftables.py; what this file cannot
say goes by that.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address

from natkeep.kernel.netlink import attribute, nested
from natkeep.kernel.nft_messages import Message, string
from natkeep.plan.nft import TABLE, Undo

_DELCHAIN, _DELRULE, _DELSET, _DELSETELEM = 5, 8, 11, 14


def pack_removal(removals: Sequence[tuple[Undo, int]]) -> list[Message] | None:
    """What takes these away; the number is that of a rule, 0: all rules of the chain go.

    None where one of them is of a form that goes by its text.
    """
    messages = []
    for undo, handle in removals:
        message = _pack(undo, handle) if undo.family == "inet" else None
        if message is None:
            return None
        messages.append(message)
    return messages


def _pack(undo: Undo, handle: int) -> Message | None:
    owner = attribute(1, string(TABLE))
    name = string(undo.name)
    match undo.kind:
        case "rule":
            number = attribute(3, handle.to_bytes(8, "big")) if handle else b""
            return Message(_DELRULE, owner + attribute(2, name) + number, 0)
        case "chain":
            return Message(_DELCHAIN, owner + attribute(3, name), 0)
        case "set" | "map":
            return Message(_DELSET, owner + attribute(2, name), 0)
        case "element":
            try:
                key = ip_address(undo.what).packed
            except ValueError:  # a key of several parts
                return None
            element = nested(1, nested(1, attribute(1, key)))
            return Message(_DELSETELEM, owner + attribute(2, name) + nested(3, element), 0)
    return None
