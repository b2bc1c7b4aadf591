"""the raw rules: rules that nft's text cannot say, packed expression by expression.

Rule: only values of plan/quoted.py come in here. Numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.kernel.elements import INET, send_batch
from natkeep.kernel.netlink import attribute, nested
from natkeep.kernel.rawrule import (
    NEWRULE,
    REGISTER,
    Packed,
    compare,
    integer,
    load,
    load_protocol,
    pack_rule,
)
from natkeep.plan.quoted import Base, Compare, Expression, IsProtocol, LookUp, RawRule, Store

_CSUM_INET, _CSUM_PSEUDO = 1, 1


def insert_rules(table: str, rules: Iterable[RawRule]) -> None:
    """Insert *rules* in front of their chains of the inet table, all or none; or OSError."""
    send_batch(INET, [(NEWRULE, _pack_rule(table, rule)) for rule in rules])


def _pack_rule(table: str, rule: RawRule) -> bytes:
    expressions = [packed for expression in rule.expressions for packed in _pack(expression)]
    return pack_rule(table, rule.chain, expressions, rule.comment)


def _pack(expression: Expression) -> Iterator[Packed]:
    match expression:
        case IsProtocol(number):
            yield from load_protocol(number)
        case Compare(base, offset, value):
            yield load(base, offset, len(value), REGISTER)
            yield compare(value)
        case LookUp(name, fields):
            register = REGISTER
            for offset, octets in fields:
                yield load(Base.TRANSPORT, offset, octets, register)
                register += (octets + 3) // 4
            yield "lookup", (attribute(1, name.encode() + b"\0"), integer(2, REGISTER))
        case Store():
            yield "immediate", (integer(1, REGISTER), nested(2, attribute(1, expression.value)))
            yield _store(expression)


def _store(store: Store) -> Packed:
    attributes = [
        integer(5, REGISTER),
        integer(2, store.base),
        integer(3, store.offset),
        integer(4, len(store.value)),
    ]
    if store.checksum is not None:
        attributes += [integer(6, _CSUM_INET), integer(7, store.checksum)]
    if store.pseudo:
        attributes.append(integer(8, _CSUM_PSEUDO))
    return "payload", tuple(attributes)
