"""the nf_tables messages that natkeep packs itself; everything else libnftables makes from text.

    elements in bulk     a hundred thousand as text take eight times as long
    what opens a gate    the hook sends it, which has no time to import libnftables
    raw rules            nft's text cannot say them (plan/icmp_errors.py)
    an owned table       it lives by the socket that makes it, which libnftables keeps to itself

Rule: objects of plan/nft.py in, octets out; an object of another form is a TypeError. Packed as
libnftables packs them (tests/kernel/test_nft_messages.py holds the two against each other).
Numbers are from linux/netfilter/nf_tables.h; what nft keeps about a set is libnftnl's user data.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address
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
from natkeep.plan.nft import (
    TABLE,
    Chain,
    Match,
    Meta,
    Object,
    Octets,
    OctetsIn,
    Protocol,
    Rule,
    Set,
    Statement,
    Table,
    TcpFlags,
    Verdict,
    WriteMap,
    WriteOctets,
)
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.tuples import RECORD_SIZE, Connections

SUBSYSTEM = 10 << 8
_INET = 1  # NFPROTO_INET
_BATCH_BEGIN, _BATCH_END, _BATCH_GENERATION = 16, 17, 1
_NEWTABLE, _NEWCHAIN, _DELCHAIN, _NEWRULE, _DELRULE, _NEWSET, _NEWSETELEM = 0, 3, 5, 6, 8, 9, 12

_ATTRIBUTE_MAX = 65_532
"""A netlink attribute's length is 16 bits: longer lists of elements are several messages."""

_HOOKS = {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4}
_TYPES = {"ipv4_addr": (7, 4), "ipv6_addr": (8, 16), "inet_service": (13, 2)}
"""nft's number of a data type, and its octets."""
_TYPE_BITS = 6
_OWNER = 2  # NFT_TABLE_F_OWNER

_REGISTER = 8
"""NFT_REG32_00: registers of four octets, so that the parts of a key lie behind each other."""
_NETWORK, _TRANSPORT = 1, 2
_PLACES = {
    "ip saddr": (_NETWORK, 12, 4),
    "ip daddr": (_NETWORK, 16, 4),
    "ip6 saddr": (_NETWORK, 8, 16),
    "ip6 daddr": (_NETWORK, 24, 16),
    "tcp sport": (_TRANSPORT, 0, 2),
    "tcp dport": (_TRANSPORT, 2, 2),
    "udp sport": (_TRANSPORT, 0, 2),
    "udp dport": (_TRANSPORT, 2, 2),
}
"""Where a field stands: counted from which header, at which octet, how many of them."""
_META_OIF, _META_NFPROTO, _META_L4PROTO = 5, 15, 16
_LOOPBACK = (1).to_bytes(4, sys.byteorder)
"""lo's index, which is the same in every namespace (LOOPBACK_IFINDEX)."""
_PROTOCOLS = {
    **{one.name: (_META_L4PROTO, one.number) for one in (TCP, UDP)},
    "ip": (_META_NFPROTO, 2),
    "ip6": (_META_NFPROTO, 10),
}
"""What of a packet tells that it is one, and its value."""
_TCP_FLAGS_AT = 13
_TCP_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "ack": 16}
_VERDICTS = {"drop": 0, "accept": 1}
_CSUM_INET, _CSUM_PSEUDO = 1, 1
_CHECKSUMS = {
    "ip": {6: _CSUM_INET, 7: 10, 8: _CSUM_PSEUDO},
    "ip6": {8: _CSUM_PSEUDO},
    "tcp": {6: _CSUM_INET, 7: 16},
    "udp": {6: _CSUM_INET, 7: 6},
}
"""How the checksums that cover a header's fields are mended (NFTA_PAYLOAD_CSUM_…)."""

Packed = tuple[str, tuple[bytes, ...]]
"""An expression's name and its attributes."""


class Message(NamedTuple):
    """One message of a transaction about an inet table: its type, its attributes."""

    type: int
    body: bytes
    flags: int = NLM_F_CREATE


def nfgenmsg(family: int) -> bytes:
    """What every message about nf_tables begins with."""
    return struct.pack("!BBH", family, 0, 0)


def string(value: str) -> bytes:
    """A name as the kernel has it."""
    return value.encode("ascii") + b"\0"


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
    match one:
        case Table(name=name, owner=owner):
            flags = _integer(2, _OWNER if owner else 0)
            return Message(_NEWTABLE, attribute(1, string(name)) + flags, NLM_F_CREATE | NLM_F_EXCL)
        case Chain(name=name, table=table):
            body = attribute(1, string(table)) + attribute(3, string(name)) + _pack_hook(one)
            return Message(_NEWCHAIN, body)
        case Set(table=table, verdicts=False, data=()):
            return Message(_NEWSET, attribute(1, string(table)) + _pack_set(one, number))
        case Rule(table=table, insert=insert):
            flags_ = NLM_F_CREATE | (0 if insert else NLM_F_APPEND)
            return Message(_NEWRULE, attribute(1, string(table)) + _pack_rule(one), flags_)
    raise TypeError(f"{one} goes by its text")


def _pack_hook(chain: Chain) -> bytes:
    if not chain.hook:
        return b""
    place = _integer(1, _HOOKS[chain.hook]) + _integer(2, int(chain.priority) & 0xFFFFFFFF)
    return nested(4, place) + attribute(7, string(chain.type))


def _pack_set(one: Set, number: int) -> bytes:
    key = octets = 0
    for name in one.type:
        key = key << _TYPE_BITS | _TYPES[name][0]
        octets += (_TYPES[name][1] + 3) & ~3
    size = _integer(1, one.size) if one.size else b""
    order = bytes((0, 4)) + (0).to_bytes(4, sys.byteorder)  # libnftnl: the key's byte order
    about = _integer(4, key) + _integer(5, octets) + nested(9, size) + _integer(10, number)
    return attribute(2, string(one.name)) + about + attribute(13, order)


def _pack_rule(rule: Rule) -> bytes:
    known: set[str] = set()
    packed = [each for statement in rule.statements for each in _pack_statement(statement, known)]
    expressions = [
        nested(1, attribute(1, string(name)), nested(2, *attributes)) for name, attributes in packed
    ]
    text = string(rule.comment)
    comment = attribute(7, bytes((0, len(text))) + text) if rule.comment else b""
    return attribute(2, string(rule.chain)) + nested(4, *expressions) + comment


# ---- statements ----------------------------------------------------------------------------------


def _pack_statement(statement: Statement, known: set[str]) -> Iterator[Packed]:
    """Its expressions; known: the protocols that the rule has asked for already."""
    match statement:
        case Match():
            yield from _pack_match(statement, known)
        case TcpFlags():
            yield from _pack_flags(statement, known)
        case Meta("oif", '"lo"', equal):
            yield from (_load_meta(_META_OIF), _compare(_LOOPBACK, equal=equal))
        case Meta("meta l4proto", "tcp", True):
            yield from _depend("tcp", known)
        case Verdict(name, "") if name in _VERDICTS:
            code = nested(2, nested(2, _integer(1, _VERDICTS[name])))
            yield "immediate", (_integer(1, 0), code)
        case Verdict("reject with tcp reset"):
            yield "reject", (_integer(1, 1),)  # NFT_REJECT_TCP_RST
        case Protocol(number):
            yield from (_load_meta(_META_L4PROTO), _compare(bytes((number,))))
        case Octets(base, offset, value):
            yield from (_load(base, offset, len(value)), _compare(value))
        case OctetsIn(name, fields, equal):
            register = _REGISTER
            for offset, octets in fields:
                yield _load(_TRANSPORT, offset, octets, register)
                register += (octets + 3) // 4
            yield _look_up(name, equal=equal)
        case WriteMap():
            yield from _pack_write_map(statement, known)
        case WriteOctets():
            yield "immediate", (_integer(1, _REGISTER), nested(2, attribute(1, statement.value)))
            yield _store(statement)
        case _:
            raise TypeError(f"{statement} goes by its text")


def _depend(protocol: str, known: set[str]) -> Iterator[Packed]:
    """A field is one of its IP version, or of TCP: that is asked for before, once a rule."""
    if protocol not in known:
        known.add(protocol)
        meta, number = _PROTOCOLS[protocol]
        yield from (_load_meta(meta), _compare(bytes((number,))))


def _load_fields(fields: Sequence[str], known: set[str]) -> Iterator[Packed]:
    for name in fields:
        yield from _depend(name.partition(" ")[0], known)
    register = _REGISTER
    for name in fields:
        base, offset, octets = _PLACES[name]
        yield _load(base, offset, octets, register)
        register += (octets + 3) // 4  # each part of a key begins a register


def _pack_write_map(write: WriteMap, known: set[str]) -> Iterator[Packed]:
    """What the map has goes behind the key's registers, and from there into the packet."""
    yield from _load_fields(write.fields, known)
    register = _REGISTER + sum((_PLACES[name][2] + 3) // 4 for name in write.fields)
    yield "lookup", (attribute(1, string(write.name)), *_integers({2: _REGISTER, 3: register}))
    for name in write.to:
        base, offset, octets = _PLACES[name]
        numbers = {5: register, 2: base, 3: offset, 4: octets, **_CHECKSUMS[name.partition(" ")[0]]}
        yield "payload", _integers(numbers)
        register += (octets + 3) // 4


def _pack_match(match: Match, known: set[str]) -> Iterator[Packed]:
    yield from _load_fields(match.fields, known)
    if isinstance(match.to, str):
        yield _look_up(match.to.removeprefix("@"), equal=match.equal)
    elif isinstance(match.to, IPv4Address | IPv6Address):
        yield _compare(match.to.packed, equal=match.equal)
    else:
        yield _compare(match.to.to_bytes(2, "big"), equal=match.equal)


def _pack_flags(flags: TcpFlags, known: set[str]) -> Iterator[Packed]:
    asked, wanted = (
        bytes((sum(_TCP_FLAGS[name] for name in names),)) for names in (flags.mask, flags.value)
    )
    yield from _depend("tcp", known)
    yield _load(_TRANSPORT, _TCP_FLAGS_AT, 1)
    numbers = _integers({1: _REGISTER, 2: _REGISTER, 3: 1})
    yield "bitwise", (*numbers, nested(4, attribute(1, asked)), nested(5, attribute(1, b"\0")))
    yield _compare(wanted, equal=flags.equal)


def _load_meta(key: int) -> Packed:
    return "meta", _integers({1: _REGISTER, 2: key})


def _load(base: int, offset: int, octets: int, register: int = _REGISTER) -> Packed:
    """So many octets of the packet into *register*."""
    return "payload", _integers({1: register, 2: base, 3: offset, 4: octets})


def _store(write: WriteOctets) -> Packed:
    """The register into the packet, and its checksums with it."""
    numbers = {5: _REGISTER, 2: write.base, 3: write.offset, 4: len(write.value)}
    if write.checksum is not None:
        numbers |= {6: _CSUM_INET, 7: write.checksum}
    if write.pseudo:
        numbers[8] = _CSUM_PSEUDO
    return "payload", _integers(numbers)


def _compare(value: bytes, *, equal: bool = True) -> Packed:
    how = _integer(2, 0 if equal else 1)
    return "cmp", (_integer(1, _REGISTER), how, nested(3, attribute(1, value)))


def _look_up(name: str, *, equal: bool = True) -> Packed:
    found = attribute(1, string(name)), _integer(2, _REGISTER)
    return "lookup", found if equal else (*found, _integer(5, 1))  # NFT_LOOKUP_F_INV


def _integers(numbers: dict[int, int]) -> tuple[bytes, ...]:
    return tuple(_integer(type_, value) for type_, value in numbers.items())


def _integer(type_: int, value: int) -> bytes:
    return attribute(type_, value.to_bytes(4, "big"))
