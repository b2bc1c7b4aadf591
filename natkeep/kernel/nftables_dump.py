"""the inventory: which of the things that a move wants are in the tables of the thread's namespace.

Rule: read only, and of the table only what the move wants, whatever others have there. Things are
what plan/things.py says they are; numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache
from ipaddress import ip_address

from natkeep.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_DUMP,
    Netlink,
    attribute,
    attributes,
    find_attribute,
)
from natkeep.kernel.nftables import dump_keys, pack_key
from natkeep.plan.ruleset import TABLE
from natkeep.plan.things import Thing, describe_rule, known_thing, number_alike

_SUBSYSTEM = 10 << 8
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = 1, 4, 7, 10, 13
_FAMILIES = {"inet": 1, "arp": 3}
_NAME = TABLE.encode() + b"\0"
_TABLE = attribute(1, _NAME)

_FEW = 16
"""Keys up to which each is asked for, instead of all being read."""

_NETWORK, _TRANSPORT = 1, 2
_VERDICTS = {0: "drop", 1: "accept"}
_JUMP = -3
_LENGTH = struct.Struct("=H")
_PORT = (_TRANSPORT, 2, 2)
_TO = ((_NETWORK, 16, 4), (_NETWORK, 24, 16))


def find_things(wanted: Iterable[Thing]) -> frozenset[Thing]:
    """Those of *wanted* that are there."""
    things = frozenset(wanted)
    found: set[Thing] = set()
    with Netlink(NETLINK_NETFILTER) as netlink:
        for family in sorted({thing.family for thing in things}):
            if _has_table(netlink, family):
                found.add(Thing(family, "table"))
                found |= _read_inside(netlink, family, things)
    return things & found


def find_standing(netlink: Netlink, family: str) -> tuple[set[Thing], dict[str, list[str]]]:
    """All that is there but elements, whosever it is; and of each chain its rules' comments."""
    comments: dict[str, list[str]] = {}
    if not _has_table(netlink, family):
        return set(), comments
    found = {known_thing(family, "table", "", "", 0)}
    for kind, type_, at in (("chain", _GETCHAIN, 3), ("set", _GETSET, 2)):
        for answer in _answers(netlink, type_, family, _TABLE):
            if find_attribute(answer, 1) == _NAME:
                name = _text(find_attribute(answer, at))
                found.add(known_thing(family, kind, name, "", 0))
    rules: dict[bytes, Thing] = {}  # by its handle: one may come twice when others are made
    for handle, comment, thing in _read_rules(netlink, family, ""):
        if handle not in rules:
            rules[handle] = thing
            comments.setdefault(thing.name, []).append(comment)
    found.update(number_alike(rules.values()))
    return found, comments


def _has_table(netlink: Netlink, family: str) -> bool:
    # To its end, since the socket is used again.
    return _NAME in [table.get(1) for table in _dump(netlink, _GETTABLE, family, b"")]


def _read_inside(netlink: Netlink, family: str, wanted: frozenset[Thing]) -> set[Thing]:
    # Asked for by name, since the table may be shared by a thousand moves.
    here = [thing for thing in wanted if thing.family == family]
    found = {
        Thing(family, kind, name)
        for kind, type_, at in (("chain", _GETCHAIN, 3), ("set", _GETSET, 2))
        for name in {thing.name for thing in here if thing.kind == kind}
        if _ask(netlink, type_, family, attribute(at, name.encode() + b"\0"))
    }
    for name in {thing.name for thing in here if thing.kind == "element"}:
        keys = {thing.what for thing in here if thing.kind == "element" and thing.name == name}
        there = _find_keys(netlink, family, name, [*map(bytes.fromhex, keys)])
        found |= {Thing(family, "element", name, key.hex()) for key in there}
    chains = {thing.name for thing in here if thing.kind == "rule"}
    rules = (thing for chain in chains for _, _, thing in _read_rules(netlink, family, chain))
    found |= set(number_alike(rules))
    return found


def _find_keys(netlink: Netlink, family: str, name: str, keys: list[bytes]) -> Iterable[bytes]:
    """Those of *keys* that the set has, or, where that is quicker, all that it has."""
    if len(keys) > _FEW:
        return dump_keys(netlink, _FAMILIES[family], TABLE, name)
    owner = attribute(2, name.encode() + b"\0")
    return [key for key in keys if _ask(netlink, _GETSETELEM, family, owner + pack_key(key))]


def _ask(netlink: Netlink, type_: int, family: str, scope: bytes) -> bool:
    body = struct.pack("!BBH", _FAMILIES[family], 0, 0) + _TABLE + scope
    try:
        # To its end: an acknowledgement follows, and the socket is used again.
        return bool([*netlink.request(_SUBSYSTEM | type_, 0, body)])
    except FileNotFoundError:
        return False


def _read_rules(netlink: Netlink, family: str, chain: str) -> Iterator[tuple[bytes, str, Thing]]:
    """Handle and comment of each rule, of one chain or of all, and what it is."""
    scope = _TABLE + (attribute(2, chain.encode() + b"\0") if chain else b"")
    for rule in _dump(netlink, _GETRULE, family, scope):
        if rule[1] == _NAME and chain in ("", _text(rule[2])):
            comment = _comment(rule.get(7, b""))
            what = describe_rule(comment, _marks(rule.get(4, b"")))
            yield rule[3], comment, known_thing(family, "rule", _text(rule[2]), what, 0)


def _marks(expressions: bytes) -> list[str]:
    found: list[str] = []
    loaded: tuple[int, ...] = ()
    for each in _each(expressions):
        marks, loads, value = _read_expression(each)
        found += marks
        if value is not None:
            found += _compared(loaded, value)
        loaded = loads
    return found


@lru_cache(maxsize=1 << 12)  # of a thousand moves' rules most are the same
def _read_expression(
    expression: bytes,
) -> tuple[tuple[str, ...], tuple[int, ...], bytes | None]:
    """Its marks, what of a packet it loads, and the value that it compares what is loaded with."""
    outer = attributes(expression)
    name, body = _text(outer[1]), attributes(outer.get(2, b""))
    if name in ("lookup", "dynset"):
        asked = _text(body[1])
        return (() if asked.startswith("__") else (f"@{asked}",)), (), None
    if name in ("nat", "notrack", "reject"):
        return (name,), (), None
    if name == "immediate":
        return tuple(_verdict(attributes(body[2]).get(2))), (), None
    if name == "cmp":
        return (), (), attributes(body[3])[1]
    if name == "payload":
        return (("writes",) if 5 in body else ()), tuple(_number(body[i]) for i in (2, 3, 4)), None
    return (), (), None


def _verdict(data: bytes | None) -> Iterator[str]:
    if data is None:
        return
    verdict = attributes(data)
    code = int.from_bytes(verdict[1], "big", signed=True)
    if code in _VERDICTS:
        yield _VERDICTS[code]
    elif code == _JUMP:
        yield f">{_text(verdict[2])}"


def _compared(loaded: tuple[int, ...], value: bytes) -> Iterator[str]:
    if loaded == _PORT:
        yield f"port {int.from_bytes(value, 'big')}"
    elif loaded in _TO and len(value) == loaded[2]:
        yield f"to {ip_address(value)}"


def _comment(userdata: bytes) -> str:
    # libnftnl's user data: type, length, value; type 0 is the comment, with its final NUL.
    if len(userdata) > 2 and userdata[0] == 0:
        return _text(userdata[2 : 2 + userdata[1]])
    return ""


def _dump(netlink: Netlink, type_: int, family: str, scope: bytes) -> Iterator[dict[int, bytes]]:
    return map(attributes, _answers(netlink, type_, family, scope))


def _answers(netlink: Netlink, type_: int, family: str, scope: bytes) -> Iterator[bytes]:
    body = struct.pack("!BBH", _FAMILIES[family], 0, 0) + scope
    try:
        for answer in netlink.request(_SUBSYSTEM | type_, NLM_F_DUMP, body):
            yield answer[4:]
    except FileNotFoundError:  # gone between two looks
        return


def _each(data: bytes) -> list[bytes]:
    """The value of each attribute of a list, whose types are all the same."""
    found, offset = [], 0
    while offset + 4 <= len(data):
        length = _LENGTH.unpack_from(data, offset)[0]
        if length < 4:
            break
        found.append(data[offset + 4 : offset + length])
        offset += (length + 3) & ~3
    return found


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("ascii", "replace")
