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
    mark = ("meta", (integer(1, REGISTER), integer(2, META_MARK)))
    not_criu = compare(CRIU_MARK.to_bytes(4, sys.byteorder), _UNEQUAL)
    those = [mark, not_criu, *_no_syn()] if guarded else []
    rule = pack_rule(table, GATE, [*those, _accept()], PASS)
    return pack_batch(INET, [*_accepts(table, chains, comment), (NEWRULE, rule)], generation)


def _accepts(
    table: str, chains: Sequence[tuple[str, bool]], comment: str
) -> list[tuple[int, bytes]]:
    return [
        (NEWRULE, pack_rule(table, chain, [*(_no_syn() if guarded else ()), _accept()], comment))
        for chain, guarded in chains
    ]


def _accept() -> Packed:
    verdict = nested(2, nested(2, integer(1, _NF_ACCEPT)))
    return "immediate", (integer(1, _VERDICT_REGISTER), verdict)


def _no_syn() -> tuple[Packed, ...]:
    return (
        *load_protocol(_TCP),
        load(TRANSPORT, _FLAGS, 1, REGISTER),
        _mask(_FIN_SYN_RST_ACK),
        compare(_SYN, _UNEQUAL),
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
        + attribute(7, bytes((0, len(text))) + text)
    )


def load_protocol(protocol: int) -> tuple[Packed, Packed]:
    """The packet's transport protocol is *protocol*."""
    load_it = ("meta", (integer(1, REGISTER), integer(2, META_L4PROTO)))
    return load_it, compare(bytes((protocol,)))


def load(base: int, offset: int, octets: int, register: int) -> Packed:
    """So many octets of the packet into *register*."""
    return "payload", (
        integer(1, register),
        integer(2, base),
        integer(3, offset),
        integer(4, octets),
    )


def compare(value: bytes, how: int = _EQUAL) -> Packed:
    """The register is *value*, or is not."""
    return "cmp", (integer(1, REGISTER), integer(2, how), nested(3, attribute(1, value)))


def _mask(mask: bytes) -> Packed:
    return "bitwise", (
        integer(1, REGISTER),
        integer(2, REGISTER),
        integer(3, len(mask)),
        nested(4, attribute(1, mask)),
        nested(5, attribute(1, bytes(len(mask)))),
    )


def integer(type_: int, value: int) -> bytes:
    """An attribute that is a number of 32 bits."""
    return attribute(type_, value.to_bytes(4, "big"))
