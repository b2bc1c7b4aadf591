"""the raw rules: rules that nft's text cannot say, packed expression by expression.

Rule: only values of plan/icmp_errors.py come in here. Numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.kernel.netlink import attribute
from natkeep.kernel.nftables import Message, send_batch
from natkeep.kernel.rawrule import (
    NEWRULE,
    REGISTER,
    Packed,
    compare,
    load,
    load_protocol,
    look_up,
    pack_rule,
    put,
    store,
)
from natkeep.plan.icmp_errors import Base, Compare, Expression, IsProtocol, LookUp, RawRule, Store


def insert_rules(table: str, rules: Iterable[RawRule]) -> None:
    """Insert *rules* in front of their chains of the inet table, all or none; or OSError."""
    send_batch([Message(NEWRULE, _pack_rule(table, rule)) for rule in rules])


def _pack_rule(table: str, rule: RawRule) -> bytes:
    expressions = [packed for expression in rule.expressions for packed in _pack(expression)]
    return attribute(1, table.encode() + b"\0") + pack_rule(rule.chain, expressions, rule.comment)


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
            yield look_up(name)
        case Store():
            yield put(expression.value)
            place = expression.base, expression.offset, len(expression.value)
            yield store(*place, checksum=expression.checksum, pseudo=expression.pseudo)
