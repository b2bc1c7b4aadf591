"""Reads the rules that others have in nf_tables, as far as plan/other_rules.py follows them.

Rule: read only, in the namespace that the calling thread is in; our own table is left out. What
is not understood is told as unknown, never left out. Of sets and maps nothing is read beforehand:
they may be large, and the kernel tells what one has for a key. Numbers are from
linux/netfilter/nf_tables.h, those of iptables' matches and targets from linux/netfilter/xt_*.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

from natkeep.kernel import nftables_dump as dump
from natkeep.kernel.conntrack_zones import read_legacy_tables
from natkeep.kernel.netlink import (
    NETLINK_NETFILTER,
    Netlink,
    attribute,
    attributes,
    find_attribute,
    nested,
)
from natkeep.kernel.nft_messages import SUBSYSTEM, nfgenmsg
from natkeep.kernel.once import ask_once
from natkeep.plan.nft import TABLE
from natkeep.plan.other_rules import Chain, Element, Expression, Hook, Ruleset
from natkeep.plan.packet import UNTRACKED

_NAMES = {1: "inet", 2: "ip", 5: "netdev", 10: "ip6"}
_HOOKS = ["prerouting", "input", "forward", "output", "postrouting", "ingress"]
_DEVICE_HOOKS = ["ingress", "egress"]
_NUMBERS = {name: number for number, name in _NAMES.items()}
_OPERATORS = {0: "==", 1: "!=", 2: "<", 3: "<=", 4: ">", 5: ">="}
_VERDICTS = {0: "drop", 1: "accept", -3: "jump", -4: "goto", -5: "return", -1: "continue",
             3: "queue"}  # fmt: skip
_META = {3: "mark", 4: "iif", 5: "oif", 6: "iifname", 7: "oifname", 15: "nfproto", 16: "l4proto",
         1: "protocol"}  # fmt: skip
_CT = {0: "state", 1: "direction", 2: "status", 3: "mark"}
_HARMLESS = frozenset({"counter", "log", "last"})
_OBJECTS = {1: "", 3: "helper", 7: "", 8: "", 9: "", 10: "synproxy"}
"""What named objects do, of those that let a rule go on."""
_DOES = {"masq": "masquerade", "redir": "redirect", "synproxy": "synproxy", "tproxy": "tproxy",
         "notrack": "notrack", "queue": "queue", "reject": "drop",
         "flow_offload": "flow offload"}  # fmt: skip
_TARGETS = {"MASQUERADE": "masquerade", "SNAT": "snat", "DNAT": "dnat", "REDIRECT": "redirect",
            "NETMAP": "dnat", "TPROXY": "tproxy", "NOTRACK": "notrack", "REJECT": "drop",
            "SYNPROXY": "synproxy", "NFQUEUE": "queue"}  # fmt: skip
_REWRITTEN = {(1, 12, 4), (1, 16, 4), (1, 8, 16), (1, 24, 16), (2, 0, 2), (2, 2, 2)}
"""Header, offset and octets of addresses and ports."""
_COMES_AND_GOES = 0x10 | 0x20 | 0x40
"""A set with NFT_SET_TIMEOUT or NFT_SET_EVAL; NFT_SET_OBJECT is a map of objects."""
_GETSETELEM, _CATCHALL = 13, 2
_ZONE = 17  # NFT_CT_ZONE
_CT_NOTRACK, _RESTORE = 1, 2  # XT_CT_NOTRACK; XT_CONNMARK_RESTORE, behind SET and SAVE
_STATE_SNAT, _STATE_DNAT, _STATE_UNTRACKED = 0x40, 0x80, 0x100  # XT_CONNTRACK_STATE_…
_FIB_OIF, _FIB_BACK, _FIB_PRESENT = 1, 0x1 | 0x8, 0x20
"""NFT_FIB_RESULT_OIF; NFTA_FIB_F_SADDR and NFTA_FIB_F_IIF; NFTA_FIB_F_PRESENT."""
_FIB_MAY = 0x4 | _FIB_PRESENT  # NFTA_FIB_F_MARK


def read_ruleset(version: int) -> Ruleset:
    """The chains and rules that packets of IP *version* may meet, without natkeep's own.

    What sets have is asked later, in the namespace that the calling thread is in then.
    """
    return ask_once(("ruleset", version), lambda: _read_ruleset(version))


def _read_ruleset(version: int) -> Ruleset:
    family = 2 if version == 4 else 10
    chains: dict[tuple[str, str], Chain] = {}
    with Netlink(NETLINK_NETFILTER) as netlink:
        for number in (1, 5, family):
            others = _find_other_tables(netlink, number)
            # A thousand moves of natkeep have 20,000 chains, which are not asked for in vain.
            for answer in _request(netlink, dump.GETCHAIN, number) if others else ():
                found = attributes(answer)
                if found[1] in others:
                    name = f"{_NAMES[number]} {dump.text(found[1])}"
                    chains[name, dump.text(found[3])] = _read_chain(number, found)
            for table in others:
                for answer in _request(netlink, dump.GETRULE, number, attribute(1, table)):
                    found = attributes(answer)
                    name = f"{_NAMES[number]} {dump.text(table)}"
                    chain = chains.get((name, dump.text(found[2])))
                    if chain is not None:
                        expressions = _read(netlink, number, table, found.get(4, b""))
                        chain.rules.append(tuple(expressions))
    return Ruleset(chains, cache(_find_element))


def _find_other_tables(netlink: Netlink, family: int) -> list[bytes]:
    """Names of the tables that are not natkeep's, as they are in messages."""
    tables = (find_attribute(each, 1) for each in _request(netlink, dump.GETTABLE, family))
    own = TABLE.encode("ascii")
    return [one for one in tables if one != own + b"\0" and not one.startswith(own + b"-")]


def _request(netlink: Netlink, type_: int, family: int, scope: bytes = b"") -> Iterator[bytes]:
    """The attributes of each answer of a dump; none where a table is gone meanwhile."""
    with suppress(FileNotFoundError):
        for answer in dump.dump_whole(netlink, type_, nfgenmsg(family) + scope):
            if answer[0] == family:
                yield answer[4:]


def _read_chain(number: int, found: dict[int, bytes]) -> Chain:
    if 4 not in found:
        return Chain(None, [])
    hook = attributes(found[4])
    names = _DEVICE_HOOKS if _NAMES[number] == "netdev" else _HOOKS
    where = _number(hook[1])
    return Chain(
        Hook(
            names[where] if where < len(names) else "",
            int.from_bytes(hook[2], "big", signed=True),
            dump.text(found.get(7, b"")),
            found.get(5) == bytes(4),
            tuple(dump.text(one) for one in (hook.get(3), *dump.values(hook.get(4, b""))) if one),
        ),
        [],
    )


def _read(netlink: Netlink, family: int, table: bytes, packed: bytes) -> Iterator[Expression]:
    for each in dump.values(packed):
        outer = attributes(each)
        name, body = dump.text(outer[1]), attributes(outer.get(2, b""))
        if name == "lookup":
            yield _read_lookup(netlink, family, table, body)
        elif name == "target" and dump.text(body[1]) == "CT":
            yield from _read_ct_target(body[3])
        elif name not in _HARMLESS:
            yield _read_plain(name, body)


def _read_plain(name: str, body: dict[int, bytes]) -> Expression:
    match name:
        case "payload" if 5 not in body:
            where = tuple(_number(body[i]) for i in (2, 3, 4))
            return Expression("load", _number(body[1]), f"payload {where[0]}", where[1:])
        case "payload":
            where = tuple(_number(body[i]) for i in (2, 3, 4))
            return Expression("do", 0, "rewrite" if where in _REWRITTEN else "", ())
        case "meta" if 1 in body:
            return Expression("load", _number(body[1]), _META.get(_number(body[2]), "?"), ())
        case "meta" if _META.get(_number(body.get(2, b""))) == "mark":
            return Expression("mark", _number(body.get(3, b"")), "", ())
        case "ct" if 1 in body:
            key = _CT.get(_number(body[2]), "?")
            return Expression("load", _number(body[1]), f"ct {key}", ())
        case "ct" if _CT.get(_number(body[2])) == "mark":
            return Expression("connmark", _number(body[4]), "", ())
        case "fib" if _number(body[2]) == _FIB_OIF and _number(body[3]) & ~_FIB_MAY == _FIB_BACK:
            present = " present" if _number(body[3]) & _FIB_PRESENT else ""
            return Expression("load", _number(body[1]), f"fib{present}", ())
        case "ct" if _number(body[2]) == _ZONE:
            return Expression("do", 0, "zone", ())
        case "ct":
            return Expression("always", 0, "", ())
        case "objref" if (does := _OBJECTS.get(_number(body.get(1, b"")))) is not None:
            return Expression("do" if does else "always", 0, does, ())
        case "bitwise" if 4 in body and 5 in body:
            mask, xor = attributes(body[4])[1], attributes(body[5])[1]
            return Expression("mask", _number(body[2]), "", (_number(body[1]), mask, xor))
        case "cmp":
            operator = _OPERATORS[_number(body[2])]
            return Expression("cmp", _number(body[1]), operator, (attributes(body[3])[1],))
        case "range":
            operator = "!=" if _number(body[2]) else "=="
            ends = tuple(attributes(body[i])[1] for i in (3, 4))
            return Expression("range", _number(body[1]), operator, ends)
        case "immediate":
            return _read_immediate(body)
        case "nat":
            return Expression("do", 0, "dnat" if _number(body[1]) else "snat", ())
        case "target":
            return _read_target(dump.text(body[1]), _number(body[2]), body.get(3, b""))
        case "match":
            return _read_match(body)
    return Expression("do" if name in _DOES else "unknown", 0, _DOES.get(name, name), ())


def _read_immediate(body: dict[int, bytes]) -> Expression:
    data = attributes(body[2])
    if 2 not in data:
        return Expression("set", _number(body[1]), "", (data.get(1, b""),))
    verdict, chain, _ = _read_element(data)
    return Expression("verdict", 0, verdict, (chain,))


def _read_target(name: str, revision: int, info: bytes) -> Expression:
    """Of iptables' own targets, without CT."""
    if name == "MARK" and len(info) >= 8:
        return Expression("remark", 0, "mark", struct.unpack_from("=II", info))
    if name == "CONNMARK" and revision == 2 and not info[13]:  # no shift
        value, mask, of_packet, how = struct.unpack_from("=III2xB", info)
        if how == _RESTORE:
            return Expression("remark", 0, "mark", (0, of_packet, mask))
        return Expression("remark", 0, "connmark", (value, mask, of_packet)[: 2 + how])
    return Expression("do", 0, _TARGETS.get(name, "?"), ())


def _read_ct_target(info: bytes) -> Iterator[Expression]:
    flags, zone = struct.unpack_from("=HH", info)
    does = {"notrack": flags & _CT_NOTRACK, "zone": zone, "helper": info[12]}
    return (Expression("do", 0, word, ()) for word, said in does.items() if said)


def _read_match(body: dict[int, bytes]) -> Expression:
    """Of iptables' own matches, those that are about a packet alone."""
    name, info = dump.text(body[1]), body.get(3, b"")
    if name == "comment":
        return Expression("always", 0, "", ())
    if name == "mark" and len(info) >= 9:
        mark, mask, inverted = struct.unpack_from("=IIB", info)
        return Expression("marked", 0, "!=" if inverted else "==", (mark, mask))
    if name == "conntrack" and body.get(2) == (3).to_bytes(4, "big"):
        asked, inverted, states = struct.unpack_from("=HHH", info, 146)
        if asked == 1 and not states & (_STATE_SNAT | _STATE_DNAT):  # the state alone
            known = states & 0xF | (UNTRACKED if states & _STATE_UNTRACKED else 0)
            return Expression("state", 0, "!=" if inverted else "==", (known,))
    if name == "multiport" and body.get(2) == (1).to_bytes(4, "big"):
        return _read_ports(info)
    return Expression("unknown", 0, name, ())


def _read_ports(info: bytes) -> Expression:
    """xt_multiport_v1: which ports, how many, 15 of them, whether one begins a range; inverted."""
    which, count = info[:2]
    ports, begins = struct.unpack_from("=15H", info, 2), info[32:47]
    ends: list[int] = []
    at = 0
    while at < count:
        last = at + (1 if begins[at] else 0)
        ends += (ports[at], ports[last])
        at = last + 1
    return Expression("ports", 0, "!=" if info[47] else "==", (which, *ends))


def _read_lookup(netlink: Netlink, family: int, table: bytes, body: dict[int, bytes]) -> Expression:
    """A look-up in a set, or a map; none of its values where what is in it comes and goes."""
    name, inverted = body[1], bool(_number(body.get(5, b"")) & 1)
    scope = attribute(1, table) + attribute(2, name)
    try:
        [answer] = netlink.request(SUBSYSTEM | dump.GETSET, 0, nfgenmsg(family) + scope)
    except OSError:
        return Expression("unknown", 0, "lookup", ())
    found = attributes(answer[4:])
    asked = (f"{_NAMES[family]} {dump.text(table)}", dump.text(name), _number(found[5]))
    values = () if _number(found.get(3, b"")) & _COMES_AND_GOES else asked
    register = _number(body[2])
    if 3 not in body:
        return Expression("lookup", register, "!=" if inverted else "==", values)
    to = _number(body[3])
    return Expression("map" if to else "verdicts", register, str(to), values)


def _find_element(table: str, name: str, key: bytes) -> Element | None:
    """What a set or map has for *key*: the kernel knows intervals and the element for all else."""
    family, _, table = table.partition(" ")
    scope = attribute(1, table.encode() + b"\0") + attribute(2, name.encode() + b"\0")
    keyed = nested(1, attribute(1, key))
    with Netlink(NETLINK_NETFILTER) as netlink:
        for asked in (keyed, attribute(3, _CATCHALL.to_bytes(4, "big"))):
            body = nfgenmsg(_NUMBERS[family]) + scope + nested(3, nested(1, asked))
            with suppress(OSError):
                [answer] = netlink.request(SUBSYSTEM | _GETSETELEM, 0, body)
                [element] = dump.values(find_attribute(answer[4:], 3))
                return _read_element(attributes(attributes(element).get(2, b"")))
    return None


def _read_element(data: dict[int, bytes]) -> Element:
    if 2 not in data:
        return Element(data=data.get(1, b""))
    verdict = attributes(data[2])
    code = int.from_bytes(verdict[1], "big", signed=True)
    return Element(_VERDICTS.get(code, "?"), dump.text(verdict.get(2, b"")))


def has_legacy_tables() -> bool:
    """Whether iptables' own kernel part, which nf_tables does not show, has tables here."""
    return bool(read_legacy_tables())


def read_virtual_servers() -> str:
    """IPVS' table of services and real servers; empty where there is none."""
    try:
        with open("/proc/thread-self/net/ip_vs", encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")
