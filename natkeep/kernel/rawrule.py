"""the packing of rules, expression by expression, and those that open a gate.

Rule: numbers are from linux/netfilter/nf_tables.h. nft's text says the opening rule as well
(tests/kernel/test_rawrule.py holds the two against each other), but inside a blackout libnftables
takes longer to load than a netlink message takes to be made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from natkeep.kernel.elements import INET, pack_batch, send_batch
from natkeep.kernel.netlink import attribute, nested
from natkeep.plan.lock import CRIU_MARK
from natkeep.plan.ruleset import GATE, PASS

NEWRULE = 6
META_MARK, META_L4PROTO = 3, 16
REGISTER = 8
"""NFT_REG32_00: registers of four octets, so that the parts of a key lie behind each other."""
TRANSPORT = 2

_EQUAL, _UNEQUAL = 0, 1
_VERDICT_REGISTER, _NF_ACCEPT = 0, 1
_TCP_RST = 1  # NFT_REJECT_TCP_RST
_TCP, _FLAGS, _SYN, _FIN_SYN_RST_ACK = 6, 13, b"\x02", b"\x17"

Packed = tuple[str, tuple[bytes, ...]]
"""An expression's name and its attributes."""


def insert_accepts(table: str, chains: Sequence[tuple[str, bool]], comment: str) -> None:
    """Insert an accept in front of each of *chains*, all or none; or OSError.

    chains: name, and whether a bare SYN stays refused there.
    """
    send_batch(INET, _accepts(table, chains, comment))


def pack_accepts(table: str, chains: Sequence[tuple[str, bool]], comment: str) -> bytes:
    """The transaction of insert_accepts; the message numbered len(chains) is acknowledged."""
    return pack_batch(INET, _accepts(table, chains, comment))


def pack_pass(
    table: str, chains: Sequence[tuple[str, bool]], comment: str, generation: int, *, guarded: bool
) -> bytes:
    """The same with the pass (plan.ruleset.render_pass) as one message more.

    generation: the state of the ruleset that it is for, see pack_batch.
    """
    not_criu = compare(CRIU_MARK.to_bytes(4, sys.byteorder), equal=False)
    those = [load_meta(META_MARK), not_criu, *_no_syn()] if guarded else []
    rule = pack_rule(table, GATE, [*those, accept()], PASS)
    return pack_batch(INET, [*_accepts(table, chains, comment), (NEWRULE, rule)], generation)


def _accepts(
    table: str, chains: Sequence[tuple[str, bool]], comment: str
) -> list[tuple[int, bytes]]:
    return [
        (NEWRULE, pack_rule(table, chain, [*(_no_syn() if guarded else ()), accept()], comment))
        for chain, guarded in chains
    ]


def accept() -> Packed:
    """The packet goes on to the next base chain."""
    return "immediate", (integer(1, _VERDICT_REGISTER), nested(2, verdict(_NF_ACCEPT)))


def verdict(code: int, chain: str = "") -> bytes:
    """The attribute that is a verdict, as one of data: NF_…, or NFT_JUMP to a chain."""
    to = attribute(2, chain.encode() + b"\0") if chain else b""
    return nested(2, integer(1, code), to)


def _no_syn() -> tuple[Packed, ...]:
    return (
        *load_protocol(_TCP),
        load(TRANSPORT, _FLAGS, 1, REGISTER),
        mask(_FIN_SYN_RST_ACK),
        compare(_SYN, equal=False),
    )


def insert_reset(table: str, chain: str, comment: str) -> None:
    """Insert in front of *chain* a rule that answers TCP with a reset; or OSError."""
    reset = ("reject", (integer(1, _TCP_RST),))
    rule = pack_rule(table, chain, [*load_protocol(_TCP), reset], comment)
    send_batch(INET, [(NEWRULE, rule)])


def pack_rule(table: str, chain: str, expressions: Iterable[Packed], comment: str) -> bytes:
    """The body of NEWRULE, without its nfgenmsg."""
    elements = [
        nested(1, attribute(1, name.encode() + b"\0"), nested(2, *attributes))
        for name, attributes in expressions
    ]
    text = comment.encode() + b"\0"
    return (
        attribute(1, table.encode() + b"\0")
        + attribute(2, chain.encode() + b"\0")
        + nested(4, *elements)
        + (attribute(7, bytes((0, len(text))) + text) if comment else b"")
    )


def load_protocol(protocol: int) -> tuple[Packed, Packed]:
    """The packet's transport protocol is *protocol*."""
    return load_meta(META_L4PROTO), compare(bytes((protocol,)))


def load_meta(key: int) -> Packed:
    """What is known of a packet besides its octets: NFT_META_…"""
    return "meta", (integer(1, REGISTER), integer(2, key))


def load(base: int, offset: int, octets: int, register: int) -> Packed:
    """So many octets of the packet into *register*."""
    return "payload", (
        integer(1, register),
        integer(2, base),
        integer(3, offset),
        integer(4, octets),
    )


def compare(value: bytes, *, equal: bool = True) -> Packed:
    """The register is *value*, or is not."""
    how = _EQUAL if equal else _UNEQUAL
    return "cmp", (integer(1, REGISTER), integer(2, how), nested(3, attribute(1, value)))


def mask(bits: bytes) -> Packed:
    """Of the register these bits and no others."""
    return "bitwise", (
        integer(1, REGISTER),
        integer(2, REGISTER),
        integer(3, len(bits)),
        nested(4, attribute(1, bits)),
        nested(5, attribute(1, bytes(len(bits)))),
    )


def integer(type_: int, value: int) -> bytes:
    """An attribute that is a number of 32 bits."""
    return attribute(type_, value.to_bytes(4, "big"))
