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
from ipaddress import ip_address
from itertools import count

from natkeep.kernel.elements import ARP, INET, Message
from natkeep.kernel.netlink import (
    NLM_F_APPEND,
    NLM_F_CREATE,
    NLM_F_EXCL,
    attribute,
    nested,
)
from natkeep.kernel.rawrule import (
    REGISTER,
    Packed,
    accept,
    compare,
    integer,
    load,
    load_meta,
    load_protocol,
    mask,
    pack_rule,
    verdict,
)
from natkeep.plan.ruleset import TABLE

_WORD = re.compile(r'"[^"]*"|[{}();,]|[^\s{}();,"]+')
_FAMILIES = {"inet": INET, "arp": ARP}
_NEWTABLE, _NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM = 0, 3, 6, 9, 12
_DELTABLE, _DELCHAIN, _DELRULE, _DELSET, _DELSETELEM = 2, 5, 8, 11, 14

_HOOKS = {
    INET: {"prerouting": 0, "input": 1, "forward": 2, "output": 3, "postrouting": 4},
    ARP: {"input": 0, "output": 1},
}
_PRIORITIES = {"dstnat": -100, "srcnat": 100}

_TYPES = {"ipv4_addr": (7, 4), "ipv6_addr": (8, 16), "inet_service": (13, 2)}
"""nft's number of a data type, and its octets."""
_TYPE_BITS, _VERDICT_TYPE = 6, 0xFFFFFF00
_BIG_ENDIAN, _NO_ORDER = 2, 0
_SET_IS_MAP = 8

_LOOPBACK = (1).to_bytes(4, sys.byteorder)
"""lo's index, which is the same in every namespace (LOOPBACK_IFINDEX)."""
_META = {"mark": 3, "iif": 4, "oif": 5}
_NFPROTO = 15
_VERSIONS, _OCTETS = {"ip": 2, "ip6": 10}, {"ip": 4, "ip6": 16}
_TCP, _FLAGS_AT = 6, 13
_FLAGS = {"fin": 1, "syn": 2, "rst": 4, "ack": 16}
_NETWORK, _TRANSPORT = 1, 2
_PLACES = {
    ("ip", "saddr"): (_NETWORK, 12, 4),
    ("ip", "daddr"): (_NETWORK, 16, 4),
    ("ip6", "saddr"): (_NETWORK, 8, 16),
    ("ip6", "daddr"): (_NETWORK, 24, 16),
    ("tcp", "sport"): (_TRANSPORT, 0, 2),
    ("tcp", "dport"): (_TRANSPORT, 2, 2),
}
"""Where a field stands: counted from which header, at which octet, how many of them."""
_ARP_ADDRESSES = {"saddr": 14, "daddr": 24}
_IPV4_CHECKSUM = 10
_ADDRESS_REGISTER, _PORT_REGISTER = 1, 2
_JUMP = -3 & 0xFFFFFFFF
_VERDICTS: dict[str, Packed] = {
    "accept": accept(),
    "drop": ("immediate", (integer(1, 0), nested(2, verdict(0)))),
}


class NotUnderstood(Exception):
    """A line in a form that only libnftables knows."""


def assemble(lines: Iterable[str]) -> list[Message]:
    """The messages of one transaction; NotUnderstood where a line has another form than ours."""
    ids = count(1)
    try:
        return [_assemble(_WORD.findall(line), ids) for line in lines]
    except (IndexError, KeyError, ValueError, OverflowError) as error:
        raise NotUnderstood(f"{type(error).__name__}: {error}") from None


def _assemble(words: list[str], ids: Iterator[int]) -> Message:
    match words:
        case [verb, kind, family, table, *rest] if table == TABLE and family in _FAMILIES:
            owner = attribute(1, _text(table))
        case _:
            raise NotUnderstood(" ".join(words))
    flags, body = NLM_F_CREATE, b""
    match verb, kind, rest:
        case "add" | "create", "table", []:
            # The flags of a table are said always, and there are none.
            type_, body = _NEWTABLE, integer(2, 0)
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
            return _pack_rule(verb, family, chain, statements)
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
    match words:
        case ["type", *type_, ";"] if ";" not in type_:
            size = b""
        case ["type", *type_, ";", "size", limit, ";"] if ";" not in type_:
            size = integer(1, int(limit))
        case _:
            raise NotUnderstood(" ".join(words))
    maps = type_[1:] == [":", "verdict"]
    keys = type_[:1] if maps else type_[::2]
    if not maps and set(type_[1::2]) - {"."}:
        raise NotUnderstood(" ".join(words))
    key, octets = 0, 0
    for name in keys:
        key = key << _TYPE_BITS | _TYPES[name][0]
        octets += _TYPES[name][1] if len(keys) == 1 else _padded(_TYPES[name][1])
    told = [(0, _BIG_ENDIAN if len(keys) == 1 else _NO_ORDER), *([(1, 0), (6, 0)] if maps else ())]
    data = [integer(3, _SET_IS_MAP), integer(6, _VERDICT_TYPE), integer(7, 16)] if maps else []
    user = b"".join(bytes((type_, 4)) + value.to_bytes(4, sys.byteorder) for type_, value in told)
    about = (integer(4, key), integer(5, octets), nested(9, size), integer(10, number))
    return b"".join((*about, *data, attribute(13, user)))


def _pack_elements(words: list[str]) -> Iterator[bytes]:
    while words:
        match words:
            case [key, ":", "jump", chain, *words]:
                data = nested(2, verdict(_JUMP, chain))
            case [key, *words]:
                data = b""
        if words and words.pop(0) != ",":
            raise NotUnderstood("an element of several parts")
        yield nested(1, nested(1, attribute(1, _pack_key(key))), data)


def _pack_value(text: str, octets: int) -> bytes:
    """An address or a port, as wide as its field is."""
    value = _pack_key(text)
    if len(value) != octets:
        raise NotUnderstood(text)
    return value


def _pack_key(text: str) -> bytes:
    """An address, or a port: the one kind of number in a set of ours."""
    return int(text).to_bytes(2, "big") if text.isdecimal() else ip_address(text).packed


def _pack_rule(verb: str, family: str, chain: str, words: list[str]) -> Message:
    comment = ""
    match words:
        case [*before, "comment", quoted] if before and quoted[0] == quoted[-1] == '"':
            words, comment = before, quoted[1:-1]
    packed = _pack_arp_statements(words) if family == "arp" else _pack_statements(words, set())
    body = pack_rule(TABLE, chain, list(packed), comment)
    flags = NLM_F_CREATE | (NLM_F_APPEND if verb == "add" else 0)
    return Message(_NEWRULE, body, _FAMILIES[family], flags)


def _pack_statements(words: list[str], known: set[str]) -> Iterator[Packed]:
    """The expressions of a rule of the inet table, one statement after the other."""
    while words:
        match words:
            case ["tcp", "flags", "&", "(", *words]:
                yield from _pack_flags(words, known)
            case ["tcp", "sport" | "dport" as field, at, *words]:
                yield from _depend("tcp", known)
                yield from _match(_PLACES["tcp", field], at)
            case ["ip" | "ip6" as family, "saddr" | "daddr" as field, *words]:
                yield from _depend(family, known)
                yield from _pack_address(family, field, words, known)
            case ["iif" | "oif" as key, "!=", '"lo"', *words]:
                yield load_meta(_META[key])
                yield compare(_LOOPBACK, equal=False)
            case ["meta", "mark", "!=", mark, *words]:
                yield from _pack_mark(mark, equal=False)
            case ["meta", "mark", mark, *words]:
                yield from _pack_mark(mark, equal=True)
            case ["dnat" | "snat" as kind, "ip" | "ip6" as family, "to", to, ":", *words]:
                yield from _pack_nat(kind, family, to, words, known)
            case _:
                yield _pack_ending(words)


def _pack_arp_statements(words: list[str]) -> Iterator[Packed]:
    match words:
        case ["arp", "saddr" | "daddr" as field, "ip", set_, "drop"]:
            yield load(_NETWORK, _ARP_ADDRESSES[field], 4, REGISTER)
            yield _look_up(set_)
            yield _VERDICTS["drop"]
        case _:
            raise NotUnderstood(" ".join(words))


def _depend(protocol: str, known: set[str]) -> Iterator[Packed]:
    """A field is one of its IP version, or of TCP: that is asked for before, once a rule."""
    if protocol in known:
        return
    known.add(protocol)
    if protocol == "tcp":
        yield from load_protocol(_TCP)
    else:
        yield load_meta(_NFPROTO)
        yield compare(bytes((_VERSIONS[protocol],)))


def _pack_flags(words: list[str], known: set[str]) -> Iterator[Packed]:
    """`FLAGS) == FLAGS` or `!=`."""
    asked = _take_flags(words)
    closing, how = words.pop(0), words.pop(0)
    wanted = _take_flags(words)
    if closing != ")" or how not in ("==", "!="):
        raise NotUnderstood(" ".join(words))
    yield from _depend("tcp", known)
    yield load(_TRANSPORT, _FLAGS_AT, 1, REGISTER)
    yield mask(bytes((asked,)))
    yield compare(bytes((wanted,)), equal=how == "==")


def _pack_address(family: str, field: str, words: list[str], known: set[str]) -> Iterator[Packed]:
    """What is asked of an address, or done to it; *words* begin with it, and lose it."""
    place = _PLACES[family, field]
    match words[:7]:
        case [".", "tcp", one, ".", "tcp", other, set_]:
            del words[:7]
            yield from _depend("tcp", known)
            yield load(*place, REGISTER)
            register = REGISTER + place[2] // 4  # each part of a key begins a register
            yield load(*_PLACES["tcp", one], register)
            yield load(*_PLACES["tcp", other], register + 1)
            yield _look_up(set_)
        case ["vmap", map_, *_]:
            del words[:2]
            yield load(*place, REGISTER)
            yield _look_up(map_, is_map=True)
        case ["set", to, *_]:
            del words[:2]
            yield _put(_pack_value(to, place[2]), REGISTER)
            yield _store(family, place)
        case _:
            yield from _match(place, words.pop(0))


def _match(place: tuple[int, int, int], at: str) -> Iterator[Packed]:
    """The field is in a set, or equal to a value."""
    yield load(*place, REGISTER)
    yield _look_up(at) if at[0] == "@" else compare(_pack_value(at, place[2]))


def _pack_nat(
    kind: str, family: str, to: str, words: list[str], known: set[str]
) -> Iterator[Packed]:
    """To an address and a port: the packet's own one, or a number."""
    yield _put(_pack_value(to, _OCTETS[family]), _ADDRESS_REGISTER)
    port = words.pop(0)
    if port == "tcp":
        yield from _depend("tcp", known)
        yield load(*_PLACES["tcp", words.pop(0)], _PORT_REGISTER)
    else:
        yield _put(_pack_value(port, 2), _PORT_REGISTER)
    how = (int(kind == "dnat"), _VERSIONS[family], _ADDRESS_REGISTER, _PORT_REGISTER)
    numbers = zip((1, 2, 3, 5), how, strict=True)
    yield "nat", tuple(integer(type_, value) for type_, value in numbers)


def _pack_ending(words: list[str]) -> Packed:
    """`notrack`, or a verdict, which is a rule's last word; *words* lose it."""
    match words:
        case ["jump", chain]:
            words.clear()
            return "immediate", (integer(1, 0), nested(2, verdict(_JUMP, chain)))
        case [word] if word in _VERDICTS:
            words.clear()
            return _VERDICTS[word]
        case ["notrack", *_]:
            del words[0]
            return "notrack", ()
    raise NotUnderstood(" ".join(words))


def _take_flags(words: list[str]) -> int:
    """What names of flags with `|` between them say, which go."""
    flags = _FLAGS[words.pop(0)]
    while words and words[0] == "|":
        flags |= _FLAGS[words[1]]
        del words[:2]
    return flags


def _pack_mark(mark: str, *, equal: bool) -> Iterator[Packed]:
    yield load_meta(_META["mark"])
    yield compare(int(mark, 0).to_bytes(4, sys.byteorder), equal=equal)


def _look_up(name: str, *, is_map: bool = False) -> Packed:
    """In a set; the verdict of a map is the rule's."""
    if name[0] != "@":
        raise NotUnderstood(name)
    where = (attribute(1, _text(name[1:])), integer(2, REGISTER))
    return "lookup", (*where, integer(3, 0)) if is_map else where


def _put(value: bytes, register: int) -> Packed:
    return "immediate", (integer(1, register), nested(2, attribute(1, value)))


def _store(family: str, place: tuple[int, int, int]) -> Packed:
    """The register into the packet, and its checksums with it: IPv4's own, and TCP's."""
    sums = ((6, 1), (7, _IPV4_CHECKSUM), (8, 1)) if family == "ip" else ((6, 0), (8, 1))
    numbers = ((5, REGISTER), *zip((2, 3, 4), place, strict=True), *sums)
    return "payload", tuple(integer(type_, value) for type_, value in numbers)


def _padded(octets: int) -> int:
    return (octets + 3) & ~3


def _text(name: str) -> bytes:
    return name.encode("ascii") + b"\0"
