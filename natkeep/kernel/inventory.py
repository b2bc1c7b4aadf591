"""the inventory: which of the things that a move wants are in the tables of the thread's namespace.

Rule: read only, and of the table only what the move wants, whatever others have there. Things are
what plan/things.py says they are; numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from natkeep.kernel.elements import pack_key
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_DUMP, Netlink, attribute, attributes
from natkeep.plan.ruleset import TABLE
from natkeep.plan.things import Thing, describe_rule, number_alike

_SUBSYSTEM = 10 << 8
_GETTABLE, _GETCHAIN, _GETRULE, _GETSET, _GETSETELEM = 1, 4, 7, 10, 13
_FAMILIES = {"inet": 1, "arp": 3}
_TABLE = attribute(1, TABLE.encode() + b"\0")

_FEW = 16
"""Keys up to which each is asked for, instead of all being read."""

_NETWORK, _TRANSPORT = 1, 2
_VERDICTS = {0: "drop", 1: "accept"}
_JUMP = -3
_PORT = (_TRANSPORT, 2, 2)
_TO = ((_NETWORK, 16, 4), (_NETWORK, 24, 16))


def find_things(wanted: Iterable[Thing]) -> frozenset[Thing]:
    """Those of *wanted* that are there."""
    things = frozenset(wanted)
    found: set[Thing] = set()
    with Netlink(NETLINK_NETFILTER) as netlink:
        for family in sorted({thing.family for thing in things}):
            if Thing(family, "table") in _read_tables(netlink, family):
                found.add(Thing(family, "table"))
                found |= _read_inside(netlink, family, things)
    return things & found


def _read_tables(netlink: Netlink, family: str) -> set[Thing]:
    names = (_text(table.get(1, b"")) for table in _dump(netlink, _GETTABLE, family, b""))
    return {Thing(family, "table") for name in names if name == TABLE}


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
    found |= set(number_alike(rule for c in chains for rule in _read_rules(netlink, family, c)))
    return found


def _find_keys(netlink: Netlink, family: str, name: str, keys: list[bytes]) -> Iterable[bytes]:
    """Those of *keys* that the set has, or, where that is quicker, all that it has."""
    if len(keys) > _FEW:
        return _keys(netlink, family, name)
    owner = attribute(2, name.encode() + b"\0")
    return [key for key in keys if _ask(netlink, _GETSETELEM, family, owner + pack_key(key))]


def _ask(netlink: Netlink, type_: int, family: str, scope: bytes) -> bool:
    body = struct.pack("!BBH", _FAMILIES[family], 0, 0) + _TABLE + scope
    try:
        # To its end: an acknowledgement follows, and the socket is used again.
        return bool([*netlink.request(_SUBSYSTEM | type_, 0, body)])
    except FileNotFoundError:
        return False


def _keys(netlink: Netlink, family: str, name: str) -> Iterator[bytes]:
    for answer in _dump(netlink, _GETSETELEM, family, _TABLE + attribute(2, name.encode() + b"\0")):
        for element in _each(answer.get(3, b"")):
            yield attributes(attributes(element)[1])[1]


def _read_rules(netlink: Netlink, family: str, chain: str) -> Iterator[Thing]:
    for rule in _dump(netlink, _GETRULE, family, _TABLE + attribute(2, chain.encode() + b"\0")):
        if _text(rule[1]) == TABLE and _text(rule[2]) == chain:
            what = describe_rule(_comment(rule.get(7, b"")), _marks(rule.get(4, b"")))
            yield Thing(family, "rule", _text(rule[2]), what)


def _marks(expressions: bytes) -> Iterator[str]:
    loaded: tuple[int, ...] = ()
    for each in _each(expressions):
        outer = attributes(each)
        name, body = _text(outer[1]), attributes(outer.get(2, b""))
        if name in ("lookup", "dynset"):
            yield from (f"@{asked}" for asked in [_text(body[1])] if not asked.startswith("__"))
        elif name in ("nat", "notrack", "reject"):
            yield name
        elif name == "immediate":
            yield from _verdict(attributes(body[2]).get(2))
        elif name == "payload" and 5 in body:
            yield "writes"
        elif name == "cmp":
            yield from _compared(loaded, body)
        loaded = tuple(_number(body[i]) for i in (2, 3, 4)) if name == "payload" else ()


def _verdict(data: bytes | None) -> Iterator[str]:
    if data is None:
        return
    verdict = attributes(data)
    code = int.from_bytes(verdict[1], "big", signed=True)
    if code in _VERDICTS:
        yield _VERDICTS[code]
    elif code == _JUMP:
        yield f">{_text(verdict[2])}"


def _compared(loaded: tuple[int, ...], body: dict[int, bytes]) -> Iterator[str]:
    value = attributes(body[3])[1]
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
    body = struct.pack("!BBH", _FAMILIES[family], 0, 0) + scope
    try:
        for answer in netlink.request(_SUBSYSTEM | type_, NLM_F_DUMP, body):
            yield attributes(answer[4:])
    except FileNotFoundError:  # gone between two looks
        return


def _each(data: bytes) -> Iterator[bytes]:
    """The value of each attribute of a list, whose types are all the same."""
    offset = 0
    while offset + 4 <= len(data):
        length = struct.unpack_from("=H", data, offset)[0]
        if length < 4:
            return
        yield data[offset + 4 : offset + length]
        offset += (length + 3) & ~3


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")


def _text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("ascii", "replace")
