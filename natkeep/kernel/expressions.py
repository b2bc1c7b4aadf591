"""the raw rules: what nft's text cannot say, or not fast enough, packed expression by expression.

Rule: only values of plan/quoted.py come in here, and the one rule that opens a gate: inside a
blackout libnftables would take longer to load than all the rest of the hook takes
(tests/kernel/test_expressions.py holds that rule against nft's own). Numbers are from
linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.kernel.elements import INET, send_batch
from natkeep.kernel.netlink import attribute, nested
from natkeep.plan.quoted import Base, Compare, Expression, IsProtocol, LookUp, RawRule, Store

_NEWRULE = 6
_META_L4PROTO = 16
_TCP, _TCP_FLAGS, _SYN, _SYN_ACK_RST_FIN = 6, 13, 0x02, 0x17
_EQUAL, _UNEQUAL = 0, 1
_NF_ACCEPT = 1
_REGISTER = 8
"""NFT_REG32_00: registers of four octets, so that the parts of a key lie behind each other."""

_CSUM_INET, _CSUM_PSEUDO = 1, 1

_Packed = tuple[str, tuple[bytes, ...]]
"""An expression's name and its attributes."""


def insert_rules(table: str, rules: Iterable[RawRule]) -> None:
    """Insert *rules* in front of their chains of the inet table, all or none; or OSError."""
    packed = [
        (rule, [each for expression in rule.expressions for each in _pack(expression)])
        for rule in rules
    ]
    send_batch(
        INET,
        [
            (_NEWRULE, _pack_rule(table, rule.chain, expressions, rule.comment))
            for rule, expressions in packed
        ],
    )


def insert_accepts(table: str, chains: Iterable[tuple[str, bool]], comment: str) -> None:
    """Insert an accept in front of each of *chains*, all or none; or OSError.

    chains: name, and whether a bare SYN stays refused there.
    """
    accept = ("immediate", (_number(1, 0), nested(2, nested(2, _number(1, _NF_ACCEPT)))))
    send_batch(
        INET,
        [
            (_NEWRULE, _pack_rule(table, chain, [*(_NOT_SYN if guarded else ()), accept], comment))
            for chain, guarded in chains
        ],
    )


def _pack_rule(table: str, chain: str, expressions: Iterable[_Packed], comment_: str) -> bytes:
    elements = [
        nested(1, attribute(1, name.encode() + b"\0"), nested(2, *attributes))
        for name, attributes in expressions
    ]
    comment = comment_.encode() + b"\0"
    return (
        attribute(1, table.encode() + b"\0")
        + attribute(2, chain.encode() + b"\0")
        + nested(4, *elements)
        + attribute(7, bytes((0, len(comment))) + comment)
    )


def _pack(expression: Expression) -> Iterator[_Packed]:
    match expression:
        case IsProtocol(number):
            yield "meta", (_number(1, _REGISTER), _number(2, _META_L4PROTO))
            yield _compare(bytes((number,)))
        case Compare(base, offset, value):
            yield _load(base, offset, len(value), _REGISTER)
            yield _compare(value)
        case LookUp(name, fields):
            register = _REGISTER
            for offset, octets in fields:
                yield _load(Base.TRANSPORT, offset, octets, register)
                register += (octets + 3) // 4
            yield "lookup", (attribute(1, name.encode() + b"\0"), _number(2, _REGISTER))
        case Store():
            yield "immediate", (_number(1, _REGISTER), nested(2, attribute(1, expression.value)))
            yield _store(expression)


def _load(base: Base, offset: int, octets: int, register: int) -> _Packed:
    return "payload", (
        _number(1, register),
        _number(2, base),
        _number(3, offset),
        _number(4, octets),
    )


def _compare(value: bytes, how: int = _EQUAL) -> _Packed:
    return "cmp", (_number(1, _REGISTER), _number(2, how), nested(3, attribute(1, value)))


def _mask(mask: bytes) -> _Packed:
    return "bitwise", (
        _number(1, _REGISTER),
        _number(2, _REGISTER),
        _number(3, len(mask)),
        nested(4, attribute(1, mask)),
        nested(5, attribute(1, bytes(len(mask)))),
    )


def _store(store: Store) -> _Packed:
    attributes = [
        _number(5, _REGISTER),
        _number(2, store.base),
        _number(3, store.offset),
        _number(4, len(store.value)),
    ]
    if store.checksum is not None:
        attributes += [_number(6, _CSUM_INET), _number(7, store.checksum)]
    if store.pseudo:
        attributes.append(_number(8, _CSUM_PSEUDO))
    return "payload", tuple(attributes)


def _number(type_: int, value: int) -> bytes:
    return attribute(type_, value.to_bytes(4, "big"))


_NOT_SYN = (
    *_pack(IsProtocol(_TCP)),
    _load(Base.TRANSPORT, _TCP_FLAGS, 1, _REGISTER),
    _mask(bytes((_SYN_ACK_RST_FIN,))),
    _compare(bytes((_SYN,)), _UNEQUAL),
)
