"""the statements of a rule, as nft's text has them, packed into the expressions of nf_tables.

Rule: only forms that natkeep renders, each as libnftables packs it (tests/kernel/test_assembler.py
compares); anything else is NotUnderstood. Numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from ipaddress import ip_address

from natkeep.kernel.rawrule import (
    REGISTER,
    Packed,
    compare,
    decide,
    integer,
    load,
    load_meta,
    load_protocol,
    look_up,
    mask,
    put,
    store,
)

_LOOPBACK = (1).to_bytes(4, sys.byteorder)
"""lo's index, which is the same in every namespace (LOOPBACK_IFINDEX)."""
_META = {"mark": 3, "iif": 4, "oif": 5}
_NFPROTO = 15
_VERSIONS = {"ip": 2, "ip6": 10}
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
JUMP = -3 & 0xFFFFFFFF
_VERDICTS = {"drop": 0, "accept": 1}
_TCP_RESET = 1  # NFT_REJECT_TCP_RST


class NotUnderstood(Exception):
    """A line in a form that only libnftables knows."""


def pack_statements(words: list[str]) -> Iterator[Packed]:
    """The expressions of a rule of the inet table, one statement after the other."""
    known: set[str] = set()
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
            case ["meta", "l4proto", "tcp", *words]:
                yield from _depend("tcp", known)
            case ["dnat" | "snat" as kind, "ip" | "ip6" as family, "to", to, ":", *words]:
                yield from _pack_nat(kind, family, to, words, known)
            case _:
                yield _pack_ending(words)


def pack_arp_statements(words: list[str]) -> Iterator[Packed]:
    """The expressions of a rule of the ARP table: it has one form."""
    match words:
        case ["arp", "saddr" | "daddr" as field, "ip", set_, "drop"]:
            yield load(_NETWORK, _ARP_ADDRESSES[field], 4, REGISTER)
            yield _look_up(set_)
            yield decide(_VERDICTS["drop"])
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
            yield put(_pack_value(to, place[2]), REGISTER)
            checksum = _IPV4_CHECKSUM if family == "ip" else None
            yield store(*place, checksum=checksum, pseudo=True)
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
    *_, octets = _PLACES[family, "daddr"]
    yield put(_pack_value(to, octets), _ADDRESS_REGISTER)
    port = words.pop(0)
    if port == "tcp":
        yield from _depend("tcp", known)
        yield load(*_PLACES["tcp", words.pop(0)], _PORT_REGISTER)
    else:
        yield put(_pack_value(port, 2), _PORT_REGISTER)
    how = (int(kind == "dnat"), _VERSIONS[family], _ADDRESS_REGISTER, _PORT_REGISTER)
    numbers = zip((1, 2, 3, 5), how, strict=True)
    yield "nat", tuple(integer(type_, value) for type_, value in numbers)


def _pack_ending(words: list[str]) -> Packed:
    """`notrack`, or a verdict, which is a rule's last word; *words* lose it."""
    match words:
        case ["jump", chain]:
            words.clear()
            return decide(JUMP, chain)
        case [word] if word in _VERDICTS:
            words.clear()
            return decide(_VERDICTS[word])
        case ["reject", "with", "tcp", "reset"]:
            words.clear()
            return "reject", (integer(1, _TCP_RESET),)
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
    if name[0] != "@":
        raise NotUnderstood(name)
    return look_up(name[1:], is_map=is_map)


def _pack_value(text: str, octets: int) -> bytes:
    """An address or a port, as wide as its field is."""
    value = pack_key(text)
    if len(value) != octets:
        raise NotUnderstood(text)
    return value


def pack_key(text: str) -> bytes:
    """An address, or a port: the one kind of number in a set of ours."""
    return int(text).to_bytes(2, "big") if text.isdecimal() else ip_address(text).packed
