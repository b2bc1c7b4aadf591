"""the assembler: the nft text that natkeep renders, as the messages that libnftables makes of it.

Rule: text is the one source of what stands in the kernel; here it is only said in the kernel's own
words. What is not understood for certain is left to libnftables, a transaction as a whole: it is
slower, and never wrong. tests/kernel/test_assembler.py loads the same text in both ways, and holds
what the kernel then has, octet by octet, against each other.

Why own code: libnftables reads all chains and sets of the namespace for each transaction, which
takes 12 ms beside a thousand moves; a prepare has two, and it is part of the blackout.

Numbers are from linux/netfilter/nf_tables.h; what nft keeps about a set is libnftnl's user data.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from itertools import count

from natkeep.kernel.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    attribute,
    nested,
)
from natkeep.kernel.nftables import ARP, INET, Message
from natkeep.kernel.rawrule import NEWRULE, integer, pack_rule, verdict
from natkeep.kernel.statements import (
    JUMP,
    NotUnderstood,
    pack_arp_statements,
    pack_key,
    pack_statements,
)
from natkeep.plan.ruleset import TABLE

_WORD = re.compile(r'"[^"]*"|[{}();,]|[^\s{}();,"]+')
_FAMILIES = {"inet": INET, "arp": ARP}
_NEWTABLE, _NEWCHAIN, _NEWSET, _NEWSETELEM = 0, 3, 9, 12
_OWNER = 2
_DELTABLE, _DELCHAIN, _DELRULE, _DELSET, _DELSETELEM = 2, 5, 8, 11, 14

_HOOKS = {
    INET: {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4},
    ARP: {"input": 0, "output": 1},
}
_PRIORITIES = {"dstnat": -100, "srcnat": 100}

_TYPES = {"ipv4_addr": (7, 4), "ipv6_addr": (8, 16), "inet_service": (13, 2)}
"""nft's number of a data type, and its octets."""
_TYPE_BITS, _VERDICT_TYPE, _VERDICT_OCTETS, _IS_MAP = 6, 0xFFFFFF00, 16, 8
_KEY_ORDER, _DATA_ORDER, _DATA_INTERVAL = 0, 1, 6
"""What libnftnl's user data tells nft of a set."""
_BIG_ENDIAN = 2


def assemble(lines: Iterable[str], table: str = TABLE) -> list[Message]:
    """The messages of one transaction that is about *table*, or its ARP half.

    NotUnderstood where a line has another form than ours.
    """
    ids = count(1)
    try:
        return [_assemble(_WORD.findall(line), table, ids) for line in lines]
    except (IndexError, KeyError, ValueError, OverflowError) as error:
        raise NotUnderstood(f"{type(error).__name__}: {error}") from None


def _assemble(words: list[str], table: str, ids: Iterator[int]) -> Message:
    match words:
        case [verb, kind, family, name, *rest] if name == table and family in _FAMILIES:
            owner = attribute(1, _text(table))
        case _:
            raise NotUnderstood(" ".join(words))
    flags, body = NLM_F_CREATE, b""
    match verb, kind, rest:
        case "add" | "create", "table", [] | ["{", "flags", "owner", ";", "}"]:
            type_, body = _NEWTABLE, integer(2, _OWNER if rest else 0)
            flags |= NLM_F_EXCL if verb == "create" else 0
        case "delete", "table", []:
            type_ = _DELTABLE
        case "add", "chain", [name, *of]:
            type_, body = _NEWCHAIN, attribute(3, _text(name)) + _pack_base(_FAMILIES[family], of)
        case "delete", "chain", [name]:
            type_, body = _DELCHAIN, attribute(3, _text(name))
        case "flush", "chain", [name]:
            type_, body = _DELRULE, attribute(2, _text(name))
        case "add", "set" | "map", [name, "{", *of, "}"]:
            type_, body = _NEWSET, attribute(2, _text(name)) + _pack_set(of, next(ids))
        case "delete", "set", [name]:
            type_, body = _DELSET, attribute(2, _text(name))
        case "add" | "delete", "element", [name, "{", *of, "}"] if of:
            type_ = _NEWSETELEM if verb == "add" else _DELSETELEM
            body = attribute(2, _text(name)) + nested(3, *_pack_elements(of))
        case "delete", "rule", [chain, "handle", handle]:
            type_ = _DELRULE
            body = attribute(2, _text(chain)) + attribute(3, int(handle).to_bytes(8, "big"))
        case "add" | "insert", "rule", [chain, *statements] if statements:
            type_, body = NEWRULE, _pack_rule(family, chain, statements)
            flags |= NLM_F_APPEND if verb == "add" else 0
        case _:
            raise NotUnderstood(" ".join(words))
    return Message(type_, owner + body, _FAMILIES[family], flags)


def _pack_base(family: int, words: list[str]) -> bytes:
    match words:
        case []:
            return b""
        case ["{", "type", type_, "hook", hook, "priority", *priority, ";", "}"]:
            place = integer(1, _HOOKS[family][hook]) + integer(2, _priority(priority) & 0xFFFFFFFF)
            return nested(4, place) + attribute(7, _text(type_))
    raise NotUnderstood(" ".join(words))


def _priority(words: list[str]) -> int:
    match words:
        case [name, "-", number] if name in _PRIORITIES:
            return _PRIORITIES[name] - int(number)
        case [number] if re.fullmatch(r"-?[0-9]+", number):
            return int(number)
    raise NotUnderstood(" ".join(words))


def _pack_set(words: list[str], number: int) -> bytes:
    """Its key, a type or several; whether it leads to verdicts; and its size, if that is given."""
    match words:
        case ["type", *type_, ";"] if ";" not in type_:
            size = b""
        case ["type", *type_, ";", "size", limit, ";"] if ";" not in type_:
            size = integer(1, int(limit))
        case _:
            raise NotUnderstood(" ".join(words))
    data, told = b"", {_KEY_ORDER: _BIG_ENDIAN}
    match type_:
        case [_]:
            key, octets = _TYPES[type_[0]]
        case [_, ":", "verdict"]:
            key, octets = _TYPES[type_[0]]
            data = integer(3, _IS_MAP) + integer(6, _VERDICT_TYPE) + integer(7, _VERDICT_OCTETS)
            told |= {_DATA_ORDER: 0, _DATA_INTERVAL: 0}
        case [_, ".", _, ".", _]:
            key, octets = 0, 0
            for name in type_[::2]:
                key = key << _TYPE_BITS | _TYPES[name][0]
                octets += (_TYPES[name][1] + 3) & ~3
            told = {_KEY_ORDER: 0}
        case _:
            raise NotUnderstood(" ".join(words))
    user = (bytes((what, 4)) + how.to_bytes(4, sys.byteorder) for what, how in told.items())
    about = integer(4, key) + integer(5, octets) + nested(9, size) + integer(10, number)
    return about + data + attribute(13, b"".join(user))


def _pack_elements(words: list[str]) -> Iterator[bytes]:
    while words:
        match words:
            case [key, ":", "jump", chain, *words]:
                data = nested(2, verdict(JUMP, chain))
            case [key, *words]:
                data = b""
        if words and words.pop(0) != ",":
            raise NotUnderstood("an element of several parts")
        yield nested(1, nested(1, attribute(1, pack_key(key))), data)


def _pack_rule(family: str, chain: str, words: list[str]) -> bytes:
    comment = ""
    match words:
        case [*before, "comment", quoted] if before and quoted[0] == quoted[-1] == '"':
            words, comment = before, quoted[1:-1]
    pack = pack_arp_statements if family == "arp" else pack_statements
    return pack_rule(chain, list(pack(words)), comment)


def _text(name: str) -> bytes:
    return name.encode("ascii") + b"\0"
