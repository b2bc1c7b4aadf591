"""the packing of rules, expression by expression, for assembler.py and expressions.py.

Numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.kernel.netlink import attribute, nested

NEWRULE = 6
REGISTER = 8
"""NFT_REG32_00: registers of four octets, so that the parts of a key lie behind each other."""

_META_L4PROTO = 16
_EQUAL, _UNEQUAL = 0, 1
_VERDICT_REGISTER = 0
_CSUM_INET, _CSUM_PSEUDO = 1, 1

Packed = tuple[str, tuple[bytes, ...]]
"""An expression's name and its attributes."""


def pack_rule(chain: str, expressions: Iterable[Packed], comment: str) -> bytes:
    """The body of NEWRULE behind the table's name."""
    elements = [
        nested(1, attribute(1, name.encode() + b"\0"), nested(2, *attributes))
        for name, attributes in expressions
    ]
    text = comment.encode() + b"\0"
    return (
        attribute(2, chain.encode() + b"\0")
        + nested(4, *elements)
        + (attribute(7, bytes((0, len(text))) + text) if comment else b"")
    )


def load_protocol(protocol: int) -> tuple[Packed, Packed]:
    """The packet's transport protocol is *protocol*."""
    return load_meta(_META_L4PROTO), compare(bytes((protocol,)))


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


def look_up(name: str, *, is_map: bool = False) -> Packed:
    """The register is in the set; of a map the element's verdict is the rule's."""
    where = (attribute(1, name.encode() + b"\0"), integer(2, REGISTER))
    return "lookup", (*where, integer(3, _VERDICT_REGISTER)) if is_map else where


def put(value: bytes, register: int = REGISTER) -> Packed:
    """A value into the register."""
    return "immediate", (integer(1, register), nested(2, attribute(1, value)))


def store(base: int, offset: int, octets: int, *, checksum: int | None, pseudo: bool) -> Packed:
    """The register into the packet, and its checksums with it.

    checksum: where the header that it is in has one; pseudo: TCP's is about it, too.
    """
    numbers = {5: REGISTER, 2: base, 3: offset, 4: octets}
    if checksum is not None:
        numbers |= {6: _CSUM_INET, 7: checksum}
    if pseudo:
        numbers[8] = _CSUM_PSEUDO
    return "payload", tuple(integer(type_, value) for type_, value in numbers.items())


def decide(code: int, chain: str = "") -> Packed:
    """The rule's verdict: NF_…, or NFT_JUMP to a chain."""
    return "immediate", (integer(1, _VERDICT_REGISTER), nested(2, verdict(code, chain)))


def verdict(code: int, chain: str = "") -> bytes:
    """The same as what a map has it as."""
    to = attribute(2, chain.encode() + b"\0") if chain else b""
    return nested(2, integer(1, code), to)
