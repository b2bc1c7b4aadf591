"""the expressions of nf_tables that a rule's statements are: what nft_messages.py packs rules of.

Rule: statements of plan/nft.py in, octets out, in the registers that libnftables takes; a statement
of another form is a TypeError. Numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

from natkeep.kernel.netlink import attribute, nested
from natkeep.plan.nft import (
    IP,
    Add,
    Match,
    Meta,
    Nat,
    Octets,
    OctetsIn,
    Protocol,
    Statement,
    TcpFlags,
    Verdict,
    Write,
    WriteMap,
    WriteOctets,
)
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.tuples import Address

_REGISTER = 8
"""NFT_REG32_00: registers of four octets, so that the parts of a key lie behind each other."""
_SECOND_REGISTER = _REGISTER + 4
"""NFT_REG_2, behind an address of sixteen octets."""
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
    "tcp urgptr": (_TRANSPORT, 18, 2),
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
_JUMP = 0xFFFFFFFD  # NFT_JUMP, -3
_NAT_TYPES, _NAT_FAMILIES = {"snat": 0, "dnat": 1}, {"ip": 2, "ip6": 10}
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


def pack_statement(statement: Statement, known: set[str]) -> Iterator[Packed]:
    """Its expressions; known: the protocols that the rule has asked for already.

    TypeError for a statement that goes by its text.
    """
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
            yield "immediate", (integer(1, 0), nested(2, nested(2, integer(1, _VERDICTS[name]))))
        case Verdict("jump", chain):
            yield "immediate", (integer(1, 0), nested(2, pack_jump(chain)))
        case Nat():
            yield from _pack_nat(statement, known)
        case Write(field, value):
            yield from _depend(field.partition(" ")[0], known)
            yield _immediate(pack_value(value))
            yield _store(*_find_place(field), _CHECKSUMS[field.partition(" ")[0]])
        case Add(fields, name):
            yield from _load_fields(fields, known)
            yield "dynset", (attribute(1, string(name)), *_integers({3: 0, 4: _REGISTER}))
        case Verdict("reject with tcp reset"):
            yield "reject", (integer(1, 1),)  # NFT_REJECT_TCP_RST
        case Protocol(number):
            yield from (_load_meta(_META_L4PROTO), _compare(bytes((number,))))
        case Octets(base, offset, value):
            yield from (_load(base, offset, len(value)), _compare(value))
        case OctetsIn(name, fields, equal):
            yield from _load_key((_TRANSPORT, *each) for each in fields)
            yield _look_up(name, equal=equal)
        case WriteMap():
            yield from _pack_write_map(statement, known)
        case WriteOctets():
            yield _immediate(statement.value)
            sums = {} if statement.checksum is None else {6: _CSUM_INET, 7: statement.checksum}
            sums |= {8: _CSUM_PSEUDO} if statement.pseudo else {}
            yield _store(statement.base, statement.offset, len(statement.value), sums)
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
    yield from _load_key(map(_find_place, fields))


def _find_place(field: str) -> tuple[int, int, int]:
    if field not in _PLACES:
        raise TypeError(f"{field} goes by its text")
    return _PLACES[field]


def _load_key(places: Iterable[tuple[int, int, int]]) -> Iterator[Packed]:
    register = _REGISTER
    for base, offset, octets in places:
        yield _load(base, offset, octets, register)
        register += (octets + 3) // 4  # each part of a key begins a register


def _pack_write_map(write: WriteMap, known: set[str]) -> Iterator[Packed]:
    """What the map has goes behind the key's registers, and from there into the packet."""
    yield from _load_fields(write.fields, known)
    register = _REGISTER + sum((_PLACES[name][2] + 3) // 4 for name in write.fields)
    yield "lookup", (attribute(1, string(write.name)), *_integers({2: _REGISTER, 3: register}))
    for name in write.to:
        place = _find_place(name)
        yield _store(*place, _CHECKSUMS[name.partition(" ")[0]], register)
        register += (place[2] + 3) // 4


def _pack_match(match: Match, known: set[str]) -> Iterator[Packed]:
    yield from _load_fields(match.fields, known)
    if isinstance(match.to, str):
        yield _look_up(match.to.removeprefix("@"), equal=match.equal)
    else:
        yield _compare(pack_value(match.to), equal=match.equal)


def _pack_nat(nat: Nat, known: set[str]) -> Iterator[Packed]:
    """Address and port into a register each, whether they are values or fields of the packet."""
    at = nat.address
    family = at.partition(" ")[0] if isinstance(at, str) else IP[at.version]
    for value, register in ((at, _REGISTER), (nat.port, _SECOND_REGISTER)):
        if isinstance(value, str):
            yield from _depend(value.partition(" ")[0], known)
            yield _load(*_find_place(value), register)
        else:
            yield _immediate(pack_value(value), register)
    numbers = {1: _NAT_TYPES[nat.kind], 2: _NAT_FAMILIES[family], 3: _REGISTER, 5: _SECOND_REGISTER}
    yield "nat", _integers(numbers)


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


def _store(
    base: int, offset: int, octets: int, sums: dict[int, int], register: int = _REGISTER
) -> Packed:
    """The register into the packet, and its checksums with it."""
    return "payload", _integers({5: register, 2: base, 3: offset, 4: octets, **sums})


def _immediate(value: bytes, register: int = _REGISTER) -> Packed:
    return "immediate", (integer(1, register), nested(2, attribute(1, value)))


def _compare(value: bytes, *, equal: bool = True) -> Packed:
    how = integer(2, 0 if equal else 1)
    return "cmp", (integer(1, _REGISTER), how, nested(3, attribute(1, value)))


def _look_up(name: str, *, equal: bool = True) -> Packed:
    found = attribute(1, string(name)), integer(2, _REGISTER)
    return "lookup", found if equal else (*found, integer(5, 1))  # NFT_LOOKUP_F_INV


def pack_value(value: Address | int) -> bytes:
    """An address, or a number of two octets, as the packet has it."""
    return value.to_bytes(2, "big") if isinstance(value, int) else value.packed


def pack_jump(chain: str) -> bytes:
    """The verdict, as a rule's and as an element's data."""
    return nested(2, integer(1, _JUMP), attribute(2, string(chain)))


def string(value: str) -> bytes:
    """A name as the kernel has it."""
    return value.encode("ascii") + b"\0"


def _integers(numbers: dict[int, int]) -> tuple[bytes, ...]:
    return tuple(integer(type_, value) for type_, value in numbers.items())


def integer(type_: int, value: int) -> bytes:
    """An attribute that is a number of 32 bits."""
    return attribute(type_, value.to_bytes(4, "big"))
