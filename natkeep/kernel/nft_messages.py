"""the nf_tables messages that natkeep packs itself; everything else libnftables makes from text.

    elements in bulk     a hundred thousand as text take eight times as long
    what opens a gate    the hook sends it, which has no time to import libnftables
    raw rules            nft's text cannot say them (plan/icmp_errors.py)
    an owned table       it lives by the socket that makes it, which libnftables keeps to itself
    many moves at once   libnftables reads all chains of all tables before it sends anything: a
                         second beside ten thousand moves, for each transaction

Rule: objects of plan/nft.py in, octets out; an object of another form is a TypeError. Packed as
libnftables packs them (tests/kernel/test_nft_messages.py holds the two against each other).
Numbers are from linux/netfilter/nf_tables.h; what nft keeps about a set is libnftnl's user data.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from natkeep.kernel.netlink import (
    NLM_F_ACK,
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    attribute,
    column,
    message,
    nested,
    replicate,
)
from natkeep.kernel.nft_expressions import (
    integer,
    pack_jump,
    pack_statement,
    pack_value,
    string,
)
from natkeep.plan.nft import TABLE, Chain, Elements, Object, Rule, Set, Table, Undo
from natkeep.plan.tuples import RECORD_SIZE, Address, Connections

SUBSYSTEM = 10 << 8
_INET = 1  # NFPROTO_INET
_BATCH_BEGIN, _BATCH_END, _BATCH_GENERATION = 16, 17, 1
_NEWTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE = 0, 3, 5, 6, 8
_NEWSET, _DELSET, _NEWSETELEM, _DELSETELEM = 9, 11, 12, 14

_ATTRIBUTE_MAX = 65_532
"""A netlink attribute's length is 16 bits: longer lists of elements are several messages."""

_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_TYPES = {"ipv4_addr": (7, 4), "ipv6_addr": (8, 16), "inet_service": (13, 2)}
"""nft's number of a data type, and its octets."""
_TYPE_BITS = 6
_OWNER = 2  # NFT_TABLE_F_OWNER
_EVAL = 0x20  # NFT_SET_EVAL: packets may add to it


class Message(NamedTuple):
    """One message of a transaction about an inet table: its type, its attributes."""

    type: int
    body: bytes
    flags: int = NLM_F_CREATE


def nfgenmsg(family: int) -> bytes:
    """What every message about nf_tables begins with."""
    return struct.pack("!BBH", family, 0, 0)


def pack_batch(messages: Sequence[Message], generation: int = 0) -> bytes:
    """One nf_tables transaction; its last message, whose number is how many, is acknowledged.

    generation: the ruleset's state that it is for; in any other the kernel refuses it (ERESTART).
    """
    state = attribute(_BATCH_GENERATION, generation.to_bytes(4, "big")) if generation else b""
    batch = [_batch_frame(_BATCH_BEGIN, 0, state)]
    for number, (type_, body, flags) in enumerate(messages, 1):
        flags |= NLM_F_ACK if number == len(messages) else 0
        batch.append(message(SUBSYSTEM | type_, flags, nfgenmsg(_INET) + body, number))
    batch.append(_batch_frame(_BATCH_END, len(messages) + 1))
    return b"".join(batch)


def _batch_frame(type_: int, sequence: int, more: bytes = b"") -> bytes:
    return message(type_, 0, struct.pack("!BBH", 0, 0, SUBSYSTEM >> 8) + more, sequence)


# ---- elements ------------------------------------------------------------------------------------


def pack_fill(
    table: str, name: str, connections: Connections, peers: Connections | None = None
) -> list[Message]:
    """What adds *connections* (of one IP version) to the set; to a map, with these *peers*."""
    version = 4 if connections.v4 else 6
    width = 4 if version == 4 else 16
    # All elements as attributes of equal size; each part of a key is padded to four octets.
    key = nested(1, attribute(1, bytes(width + 8)))
    data = nested(2, attribute(1, bytes(width + 4))) if peers is not None else b""
    template = nested(1, key, data)
    begin = len(template) - len(data) - width - 8
    columns = [(begin + at, values) for at, values in _key_columns(connections, version)]
    if peers is not None:
        begin = len(template) - width - 4
        columns += [(begin + at, values) for at, values in _key_columns(peers, version)[:2]]
    elements = replicate(template, columns, len(connections))
    owner = attribute(1, string(table)) + attribute(2, string(name))
    per_message = _ATTRIBUTE_MAX // len(template) * len(template)
    chunks = (elements[i : i + per_message] for i in range(0, len(elements), per_message))
    return [Message(_NEWSETELEM, owner + nested(3, bytes(chunk))) for chunk in chunks]


def pack_keys(connections: Connections) -> frozenset[bytes]:
    """The keys that a set of *connections* should have, as the kernel has them."""
    return frozenset(list_keys(connections))


def list_keys(connections: Connections) -> list[bytes]:
    """The same in the order of the connections, which are of one IP version."""
    version = 4 if connections.v4 else 6
    width, count = (4 if version == 4 else 16), len(connections)
    packed = replicate(bytes(width + 8), _key_columns(connections, version), count)
    return [key for (key,) in struct.iter_unpack(f"{width + 8}s", packed)]


def _key_columns(connections: Connections, version: int) -> list[tuple[int, bytes]]:
    """Where in a key each of its parts stands, and that part of each connection."""
    records, size = connections.records(version), RECORD_SIZE[version]
    width = 4 if version == 4 else 16
    return [
        (0, column(records, size, width + 2, width)),
        (width, column(records, size, 2 * width + 2, 2)),
        (width + 4, column(records, size, width, 2)),
    ]


# ---- objects -------------------------------------------------------------------------------------


def pack_objects(objects: Iterable[Object]) -> list[Message]:
    """What adds *objects* of inet tables, in their order."""
    return [_pack_object(one, number) for number, one in enumerate(objects, 1)]


def pack_chain_removal(chain: str) -> list[Message]:
    """What takes a chain of the table natkeep away, with its rules."""
    owner = attribute(1, string(TABLE))
    return [
        Message(_DELRULE, owner + attribute(2, string(chain))),
        Message(_DELCHAIN, owner + attribute(3, string(chain))),
    ]


def _pack_object(one: Object, number: int) -> Message:
    if one.family != "inet":
        raise TypeError(f"{one} goes by its text")
    match one:
        case Table(name=name, owner=owner):
            flags = integer(2, _OWNER if owner else 0)
            return Message(_NEWTABLE, attribute(1, string(name)) + flags, NLM_F_CREATE | NLM_F_EXCL)
        case Chain(name=name, table=table, priority=priority) if _is_number(priority or "0"):
            body = attribute(1, string(table)) + attribute(3, string(name)) + _pack_hook(one)
            return Message(_NEWCHAIN, body)
        case Set(table=table, verdicts=False, data=()):
            return Message(_NEWSET, attribute(1, string(table)) + _pack_set(one, number))
        case Elements(name=name, values=values):
            place = attribute(1, string(TABLE)) + attribute(2, string(name))
            return Message(_NEWSETELEM, place + nested(3, *_list_elements(values, one.chain)))
        case Rule(table=table, insert=insert):
            flags_ = NLM_F_CREATE | (0 if insert else NLM_F_APPEND)
            return Message(_NEWRULE, attribute(1, string(table)) + _pack_rule(one), flags_)
    raise TypeError(f"{one} goes by its text")


def _is_number(priority: str) -> bool:
    """Not a name, as `dstnat`, nor what is counted from one."""
    return priority.removeprefix("-").isdecimal()


def _pack_hook(chain: Chain) -> bytes:
    if not chain.hook:
        return b""
    place = integer(1, _HOOKS[chain.hook]) + integer(2, int(chain.priority) & 0xFFFFFFFF)
    return nested(4, place) + attribute(7, string(chain.type))


def _pack_set(one: Set, number: int) -> bytes:
    key, octets = _TYPES[one.type[0]]
    if len(one.type) > 1:  # each part begins four octets of their own
        octets = sum((_TYPES[name][1] + 3) & ~3 for name in one.type)
    for name in one.type[1:]:
        key = key << _TYPE_BITS | _TYPES[name][0]
    size = integer(1, one.size) if one.size else b""
    added_to = integer(3, _EVAL) if one.dynamic else b""
    order = bytes((0, 4)) + (0).to_bytes(4, sys.byteorder)  # libnftnl: the key's byte order
    about = integer(4, key) + integer(5, octets) + nested(9, size) + integer(10, number)
    return attribute(2, string(one.name)) + added_to + about + attribute(13, order)


def _list_elements(values: Iterable[Address | int], chain: str) -> Iterator[bytes]:
    """Elements of a set, or with a *chain* of a verdict map."""
    leads = nested(2, pack_jump(chain)) if chain else b""
    return (nested(1, nested(1, attribute(1, pack_value(value))), leads) for value in values)


def _pack_rule(rule: Rule) -> bytes:
    known: set[str] = set()
    packed = [each for statement in rule.statements for each in pack_statement(statement, known)]
    expressions = [
        nested(1, attribute(1, string(name)), nested(2, *attributes)) for name, attributes in packed
    ]
    text = string(rule.comment)
    comment = attribute(7, bytes((0, len(text))) + text) if rule.comment else b""
    return attribute(2, string(rule.chain)) + nested(4, *expressions) + comment


# ---- and out again -------------------------------------------------------------------------------


def pack_removal(removals: Sequence[tuple[Undo, int]]) -> list[Message] | None:
    """What takes these away; the number is that of a rule, 0: all rules of the chain go.

    None where one of them is of a form that goes by its text.
    """
    messages = []
    for undo, handle in removals:
        message = _pack_undo(undo, handle) if undo.family == "inet" else None
        if message is None:
            return None
        messages.append(message)
    return messages


def _pack_undo(undo: Undo, handle: int) -> Message | None:
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
