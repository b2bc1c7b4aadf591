"""the nf_tables objects by raw netlink: filling a set in bulk, and reading what stands there.

Rule: sets are filled here because a hundred thousand elements as text take eight times as
long; reading is here because libnftables reads every element of every set before it answers
anything. All else is text, which goes by nft.py.

Numbers are from linux/netfilter/nf_tables.h and nfnetlink.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from natkeep.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    Netlink,
    attribute,
    attributes,
    column,
    message,
    nested,
    replicate,
)
from natkeep.plan.tuples import RECORD_SIZE, Connections
from natkeep.values import dataclass

_SUBSYSTEM = 10 << 8
_BATCH_BEGIN, _BATCH_END = 16, 17
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET = 1, 4, 7, 10
_NEWSETELEM, _GETSETELEM, _GETFLOWTABLE = 12, 13, 23
_GETGEN, _GENERATION, _BATCH_GENERATION = 16, 1, 1

INET, ARP = 1, 3

_ATTRIBUTE_MAX = 65_532
"""A netlink attribute's length is 16 bits: longer lists of elements are several messages."""


_FAMILIES = {1: "inet", 2: "ip", 10: "ip6"}
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting", "ingress")


@dataclass(frozen=True, slots=True)
class BaseChain:
    """A chain that the kernel calls: its family, table, name, type (`nat`, …), hook, priority."""

    family: str
    table: str
    name: str
    type: str
    hook: str
    priority: int


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as far as natkeep needs it: where it is and whose it is."""

    chain: str
    handle: int
    comment: str


class Message(NamedTuple):
    """One message of a transaction: its type, its attributes, of a table of which family."""

    type: int
    body: bytes
    family: int = INET
    flags: int = NLM_F_CREATE


def fill_set(table: str, name: str, connections: Connections) -> None:
    """Add all *connections* (of one IP version) to the set, in one transaction; or OSError."""
    send_batch(pack_fill(table, name, connections))


def pack_fill(table: str, name: str, connections: Connections) -> list[Message]:
    """What adds *connections* to the set."""
    elements, size = _pack_elements(connections)
    owner = attribute(1, _text(table)) + attribute(2, _text(name))
    per_message = _ATTRIBUTE_MAX // size * size
    chunks = (elements[i : i + per_message] for i in range(0, len(elements), per_message))
    return [Message(_NEWSETELEM, owner + nested(3, bytes(chunk))) for chunk in chunks]


def send_packed(batch: bytes, last: int) -> None:
    """Send what pack_batch made, whose message *last* is acknowledged; OSError if refused."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        netlink.send_transaction(batch, last)


def read_generation() -> int:
    """The number of the ruleset's state in this namespace; every transaction makes another."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        [answer] = netlink.request(_SUBSYSTEM | _GETGEN, 0, _nfgenmsg(0))
    return int.from_bytes(attributes(answer[4:])[_GENERATION], "big")


def send_batch(messages: Sequence[Message]) -> None:
    """Send them as one nf_tables transaction; OSError if refused."""
    if not messages:
        return  # the kernel would have nothing to acknowledge
    send_packed(pack_batch(messages), len(messages))


def pack_batch(messages: Sequence[Message], generation: int = 0) -> bytes:
    """One nf_tables transaction; its last message, whose number is how many, is acknowledged.

    generation: the ruleset's state that it is for; in any other the kernel refuses it (ERESTART).
    """
    state = attribute(_BATCH_GENERATION, generation.to_bytes(4, "big")) if generation else b""
    batch = [_batch_frame(_BATCH_BEGIN, 0, state)]
    for number, (type_, body, family, flags) in enumerate(messages, 1):
        flags |= NLM_F_ACK if number == len(messages) else 0
        batch.append(message(_SUBSYSTEM | type_, flags, _nfgenmsg(family) + body, number))
    batch.append(_batch_frame(_BATCH_END, len(messages) + 1))
    return b"".join(batch)


def _pack_elements(connections: Connections) -> tuple[bytearray, int]:
    """All elements as attributes of equal size, and that size in octets.

    The key is `peer . peer port . local port`, each part padded to four octets.
    """
    version = 4 if connections.v4 else 6
    width = 4 if version == 4 else 16
    template = nested(1, nested(1, attribute(1, bytes(width + 8))))
    key = len(template) - width - 8
    columns = [(key + at, values) for at, values in _key_columns(connections, version)]
    return replicate(template, columns, len(connections)), len(template)


def read_keys(table: str, name: str) -> list[bytes]:
    """The key of each element of the set or map, as the kernel has it; none when it is gone."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        return dump_keys(netlink, INET, table, name)


def dump_keys(netlink: Netlink, family: int, table: str, name: str) -> list[bytes]:
    """The same by a socket that is there already, of a table of any family."""
    body = _nfgenmsg(family) + attribute(1, _text(table)) + attribute(2, _text(name))
    found: list[bytes] = []
    try:
        for answer in netlink.request(_SUBSYSTEM | _GETSETELEM, NLM_F_DUMP, body):
            found += _element_keys(attributes(answer[4:]).get(3, b""))
    except FileNotFoundError:  # it goes, or is gone
        pass
    return found


def has_key(table: str, name: str, key: bytes) -> bool:
    """Whether the set or map has an element with *key*, without reading the others."""
    owner = attribute(1, _text(table)) + attribute(2, _text(name))
    try:
        with Netlink(NETLINK_NETFILTER) as netlink:
            body = _nfgenmsg(INET) + owner + pack_key(key)
            return any(netlink.request(_SUBSYSTEM | _GETSETELEM, 0, body))
    except FileNotFoundError:
        return False


def pack_key(key: bytes) -> bytes:
    """A list of the one element that has *key*."""
    return nested(3, nested(1, nested(1, attribute(1, key))))


def _element_keys(elements: bytes) -> list[bytes]:
    width, found, offset = _plain_width(elements), [], 0
    if width:
        return [key for (key,) in struct.iter_unpack(f"12x{width}s", elements)]
    while offset + 4 <= len(elements):
        length = struct.unpack_from("=H", elements, offset)[0]
        if length < 4:
            break
        found.append(attributes(attributes(elements[offset + 4 : offset + length])[1])[1])
        offset += (length + 3) & ~3
    return found


def _plain_width(elements: bytes) -> int:
    """How long the keys are, if each element is a key and nothing else; 0 if not all are alike."""
    if len(elements) < 16:
        return 0
    size, key = (struct.unpack_from("=H", elements, at)[0] for at in (0, 8))
    if size != 8 + key or key <= 4 or key % 4 or len(elements) % size:
        return 0
    count = len(elements) // size
    alike = all(elements[i::size] == elements[i : i + 1] * count for i in range(12))
    return int(key) - 4 if alike else 0


def pack_keys(connections: Connections) -> frozenset[bytes]:
    """The keys that a set of *connections* should have, to be compared with read_keys."""
    version = 4 if connections.v4 else 6
    width, count = (4 if version == 4 else 16), len(connections)
    packed = replicate(bytes(width + 8), _key_columns(connections, version), count)
    return frozenset([key for (key,) in struct.iter_unpack(f"{width + 8}s", packed)])


def _key_columns(connections: Connections, version: int) -> list[tuple[int, bytes]]:
    """Where in a key each of its parts stands, and that part of each connection."""
    records, size = connections.records(version), RECORD_SIZE[version]
    width = 4 if version == 4 else 16
    return [
        (0, column(records, size, width + 2, width)),
        (width, column(records, size, 2 * width + 2, 2)),
        (width + 4, column(records, size, width, 2)),
    ]


def has_table(family: int, table: str) -> bool:
    """Whether the table is there."""
    return table in {name for _, name in _names(_GETTABLE, family, b"", 1)}


def chain_names(table: str) -> frozenset[str]:
    """The chains of the inet table; empty when it is not there."""
    return frozenset(name for owner, name in _names(_GETCHAIN, INET, b"", 3) if owner == table)


def has_chain(table: str, chain: str) -> bool:
    """Whether the inet table has the chain; as quick in a table of a thousand moves as of one."""
    body = _nfgenmsg(INET) + attribute(1, _text(table)) + attribute(3, _text(chain))
    try:
        with Netlink(NETLINK_NETFILTER) as netlink:
            return any(netlink.request(_SUBSYSTEM | _GETCHAIN, 0, body))
    except FileNotFoundError:
        return False


def base_chains() -> tuple[BaseChain, ...]:
    """Every base chain of every table, whoever's."""
    found = []
    for family, name in _FAMILIES.items():
        for answer in _dump(_GETCHAIN, _nfgenmsg(family)):
            chain = attributes(answer[4:])
            if 4 not in chain:
                continue
            hook = attributes(chain[4])
            number = int.from_bytes(hook[1], "big")
            priority = int.from_bytes(hook[2], "big", signed=True)
            found.append(
                BaseChain(
                    name,
                    _string(chain[1]),
                    _string(chain[3]),
                    _string(chain.get(7, b"")),
                    _HOOKS[number] if number < len(_HOOKS) else str(number),
                    priority,
                )
            )
    return tuple(found)


def flowtable_names() -> tuple[str, ...]:
    """`FAMILY TABLE NAME` of every flowtable; none where the kernel knows none."""
    found = []
    for family, name in _FAMILIES.items():
        try:
            answers = list(_dump(_GETFLOWTABLE, _nfgenmsg(family)))
        except OSError:
            continue
        for answer in answers:
            flowtable = attributes(answer[4:])
            found.append(f"{name} {_string(flowtable[1])} {_string(flowtable[2])}")
    return tuple(found)


def set_names(table: str) -> frozenset[str]:
    """The sets and maps of the inet table, without reading an element."""
    scope = attribute(1, _text(table))
    try:
        return frozenset(name for _, name in _names(_GETSET, INET, scope, 2))
    except FileNotFoundError:
        return frozenset()


def rules(table: str, chain: str) -> tuple[Rule, ...]:
    """The rules of one chain, in order; empty when the chain is not there."""
    scope = attribute(1, _text(table)) + attribute(2, _text(chain))
    return tuple(rule for rule in _rules(scope) if rule.chain == chain)


def rules_of_chains(table: str, *beginnings: str) -> Iterator[Rule]:
    """The rules of all chains of the inet table whose names begin so, chain by chain, in order.

    None when the table is not there. A thousand moves have ten thousand rules, of which a few are
    asked for: the kernel puts the chain's name behind the table's, so most are seen by that.
    """
    scope = attribute(1, _text(table))
    head, names = _nfgenmsg(INET) + scope, tuple(name.encode("ascii") for name in beginnings)
    return _rules(scope, lambda rule: rule.startswith(names, len(head) + 4))


def _rules(scope: bytes, wanted: Callable[[bytes], bool] = lambda rule: True) -> Iterator[Rule]:
    try:
        for answer in filter(wanted, _dump(_GETRULE, _nfgenmsg(INET) + scope)):
            rule = attributes(answer[4:])
            handle = int.from_bytes(rule[3], "big")
            yield Rule(_string(rule[2]), handle, _comment(rule.get(7, b"")))
    except FileNotFoundError:
        return


def assigns_zones(*, besides: str) -> bool:
    """Whether a rule could give packets a conntrack zone, in any table but our own.

    Found are `ct zone` of nft, to set or to match, and the target CT of iptables, which may.
    """
    for family, owner in [*_tables()]:
        if owner == besides:
            continue
        scope = _nfgenmsg(family) + attribute(1, _text(owner))
        try:
            for answer in _dump(_GETRULE, scope):
                if _CT_ZONE in answer or _CT_TARGET in answer:
                    return True
        except FileNotFoundError:  # it has gone meanwhile
            continue
    return False


_CT_ZONE = attribute(2, (17).to_bytes(4, "big"))
"""NFTA_CT_KEY, NFT_CT_ZONE."""

_CT_TARGET = attribute(1, b"CT\0")[:7]
"""NFTA_TARGET_NAME: how iptables-nft stores `-j CT`, which `--zone` is an option of."""


def _tables() -> Iterator[tuple[int, str]]:
    for answer in _dump(_GETTABLE, _nfgenmsg(0)):
        yield answer[0], _string(attributes(answer[4:])[1])


def _comment(userdata: bytes) -> str:
    # libnftnl's user data: type, length, value; type 0 is the comment, with its final NUL.
    if len(userdata) > 2 and userdata[0] == 0:
        return _string(userdata[2 : 2 + userdata[1]])
    return ""


def _names(type_: int, family: int, scope: bytes, attribute_type: int) -> Iterator[tuple[str, str]]:
    for answer in _dump(type_, _nfgenmsg(family) + scope):
        found = attributes(answer[4:])
        yield _string(found[1]), _string(found[attribute_type])


def _dump(type_: int, body: bytes) -> Iterator[bytes]:
    with Netlink(NETLINK_NETFILTER) as netlink:
        yield from netlink.request(_SUBSYSTEM | type_, NLM_F_DUMP, body)


def _batch_frame(type_: int, sequence: int, more: bytes = b"") -> bytes:
    return message(type_, 0, struct.pack("!BBH", 0, 0, _SUBSYSTEM >> 8) + more, sequence)


def _nfgenmsg(family: int) -> bytes:
    return struct.pack("!BBH", family, 0, 0)


def _text(name: str) -> bytes:
    return name.encode("ascii") + b"\0"


def _string(value: bytes) -> str:
    return value.rstrip(b"\0").decode("ascii", "replace")
