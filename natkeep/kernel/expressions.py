"""the raw rules: rules that nft's text cannot say, packed expression by expression.

Rule: only values of plan/quoted.py come in here. Numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.kernel.elements import INET, send_batch
from natkeep.kernel.netlink import attribute, nested
from natkeep.plan.quoted import Base, Compare, Expression, IsProtocol, LookUp, RawRule, Store

_NEWRULE = 6
_META_L4PROTO = 16
_REGISTER = 8
"""NFT_REG32_00: registers of four octets, so that the parts of a key lie behind each other."""

_CSUM_INET, _CSUM_PSEUDO = 1, 1


def insert_rules(table: str, rules: Iterable[RawRule]) -> None:
    """Insert *rules* in front of their chains of the inet table, all or none; or OSError."""
    send_batch(INET, [(_NEWRULE, _pack_rule(table, rule)) for rule in rules])


def _pack_rule(table: str, rule: RawRule) -> bytes:
    expressions = [
        nested(1, attribute(1, name.encode() + b"\0"), nested(2, *attributes))
        for expression in rule.expressions
        for name, attributes in _pack(expression)
    ]
    comment = rule.comment.encode() + b"\0"
    return (
        attribute(1, table.encode() + b"\0")
        + attribute(2, rule.chain.encode() + b"\0")
        + nested(4, *expressions)
        + attribute(7, bytes((0, len(comment))) + comment)
    )


def _pack(expression: Expression) -> Iterator[tuple[str, tuple[bytes, ...]]]:
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


def _load(base: Base, offset: int, octets: int, register: int) -> tuple[str, tuple[bytes, ...]]:
    return "payload", (
        _number(1, register),
        _number(2, base),
        _number(3, offset),
        _number(4, octets),
    )


def _compare(value: bytes) -> tuple[str, tuple[bytes, ...]]:
    return "cmp", (_number(1, _REGISTER), _number(2, 0), nested(3, attribute(1, value)))


def _store(store: Store) -> tuple[str, tuple[bytes, ...]]:
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
