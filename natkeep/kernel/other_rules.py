"""Reads the rules that others have in nf_tables, as far as plan/other_rules.py follows them.

Rule: read only, in the namespace that the calling thread is in; our own table is left out. What
is not understood is told as unknown, never left out. Numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from natkeep.kernel import nftables_dump as dump
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink, attribute, attributes, find_attribute
from natkeep.kernel.nft_messages import SUBSYSTEM, nfgenmsg
from natkeep.plan.nft import TABLE
from natkeep.plan.other_rules import Chain, Expression, Hook, Ruleset

_NAMES = {1: "inet", 2: "ip", 10: "ip6"}
_OPERATORS = {0: "==", 1: "!=", 2: "<", 3: "<=", 4: ">", 5: ">="}
_VERDICTS = {0: "drop", 1: "accept", -3: "jump", -4: "goto", -5: "return", 3: "queue"}
_META = {3: "mark", 4: "iif", 5: "oif", 6: "iifname", 7: "oifname", 15: "nfproto", 16: "l4proto",
         1: "protocol"}  # fmt: skip
_CT = {0: "state", 1: "direction", 2: "status", 3: "mark"}
_HARMLESS = frozenset({"counter", "log", "last", "objref"})
_DOES = {"masq": "masquerade", "redir": "redirect", "synproxy": "synproxy", "tproxy": "tproxy",
         "notrack": "notrack", "queue": "queue", "reject": "drop",
         "flow_offload": "flow offload"}  # fmt: skip
_TARGETS = {"MASQUERADE": "masquerade", "SNAT": "snat", "DNAT": "dnat", "REDIRECT": "redirect",
            "NETMAP": "dnat", "TPROXY": "tproxy", "NOTRACK": "notrack", "REJECT": "drop",
            "SYNPROXY": "synproxy", "NFQUEUE": "queue"}  # fmt: skip
_ANONYMOUS, _INTERVAL, _MAP = 0x1, 0x4, 0x8


def read_ruleset(version: int) -> Ruleset:
    """The chains and rules that packets of IP *version* may meet, without natkeep's own."""
    family = 2 if version == 4 else 10
    chains: dict[tuple[str, str], Chain] = {}
    with Netlink(NETLINK_NETFILTER) as netlink:
        for number in (1, family):
            for answer in _request(netlink, dump.GETCHAIN, number):
                found = attributes(answer)
                table = dump.text(found[1])
                if table != TABLE and not table.startswith(f"{TABLE}-"):
                    name = f"{_NAMES[number]} {table}"
                    chains[name, dump.text(found[3])] = _read_chain(found)
            if not any(table.startswith(f"{_NAMES[number]} ") for table, _ in chains):
                continue
            for answer in _request(netlink, dump.GETRULE, number):
                found = attributes(answer)
                table = dump.text(found[1])
                chain = chains.get((f"{_NAMES[number]} {table}", dump.text(found[2])))
                if chain is not None:
                    expressions = _read(netlink, number, found[1], found.get(4, b""))
                    chain.rules.append(tuple(expressions))
    return Ruleset(chains)


def _request(netlink: Netlink, type_: int, family: int) -> Iterator[bytes]:
    for answer in dump.dump_whole(netlink, type_, nfgenmsg(family)):
        if answer[0] == family:
            yield answer[4:]


def _read_chain(found: dict[int, bytes]) -> Chain:
    if 4 not in found:
        return Chain(None, [])
    hook = attributes(found[4])
    names = ("prerouting", "input", "forward", "output", "postrouting", "ingress")
    number = int.from_bytes(hook[1], "big")
    return Chain(
        Hook(
            names[number] if number < len(names) else "",
            int.from_bytes(hook[2], "big", signed=True),
            dump.text(found.get(7, b"")),
            found.get(5) == bytes(4),
        ),
        [],
    )


def _read(netlink: Netlink, family: int, table: bytes, packed: bytes) -> Iterator[Expression]:
    for each in dump.values(packed):
        outer = attributes(each)
        name, body = dump.text(outer[1]), attributes(outer.get(2, b""))
        if name == "lookup":
            yield _read_lookup(netlink, family, table, body)
        elif name not in _HARMLESS:
            yield _read_plain(name, body)


def _read_plain(name: str, body: dict[int, bytes]) -> Expression:
    match name:
        case "payload" if 5 not in body:
            where = tuple(_number(body[i]) for i in (2, 3, 4))
            return Expression("load", _number(body[1]), f"payload {where[0]}", where[1:])
        case "meta" if 1 in body:
            return Expression("load", _number(body[1]), _META.get(_number(body[2]), "?"), ())
        case "meta" if _META.get(_number(body.get(2, b""))) == "mark":
            return Expression("mark", _number(body.get(3, b"")), "", ())
        case "ct" if 1 in body:
            key = _CT.get(_number(body[2]), "?")
            return Expression("load", _number(body[1]), f"ct {key}", ())
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
            return Expression("do", 0, _TARGETS.get(dump.text(body[1]), "?"), ())
        case "match":
            return _read_match(body)
    return Expression("do" if name in _DOES else "unknown", 0, _DOES.get(name, name), ())


def _read_immediate(body: dict[int, bytes]) -> Expression:
    data = attributes(body[2])
    if 2 not in data:
        return Expression("set", _number(body[1]), "", (data.get(1, b""),))
    verdict = attributes(data[2])
    code = int.from_bytes(verdict[1], "big", signed=True)
    return Expression("verdict", 0, _VERDICTS.get(code, "?"), (dump.text(verdict.get(2, b"")),))


def _read_match(body: dict[int, bytes]) -> Expression:
    """Of iptables' own matches: comments match all; a mark is told as what it is."""
    name, info = dump.text(body[1]), body.get(3, b"")
    if name == "comment":
        return Expression("always", 0, "", ())
    if name == "mark" and len(info) >= 9:
        mark, mask, inverted = struct.unpack_from("=IIB", info)
        return Expression("marked", 0, "!=" if inverted else "==", (mark, mask))
    return Expression("unknown", 0, name, ())


def _read_lookup(netlink: Netlink, family: int, table: bytes, body: dict[int, bytes]) -> Expression:
    """The elements of a set that is the rule's own; of what others fill all is unknown."""
    name, inverted = body[1], bool(_number(body.get(5, b"")) & 1)
    scope = attribute(1, table) + attribute(2, name)
    try:
        [answer] = netlink.request(SUBSYSTEM | dump.GETSET, 0, nfgenmsg(family) + scope)
    except OSError:
        return Expression("unknown", 0, "lookup", ())
    flags = _number(find_attribute(answer[4:], 3))
    if flags & (_ANONYMOUS | _INTERVAL | _MAP) != _ANONYMOUS or 3 in body:
        kind = "verdicts" if 3 in body else "unknown"
        return Expression(kind, 0, "lookup", ())
    keys = dump.dump_keys(netlink, _NAMES[family], dump.text(table), dump.text(name))
    return Expression("lookup", _number(body[2]), "!=" if inverted else "==", tuple(keys))


def read_virtual_servers() -> str:
    """IPVS' table of services and real servers; empty where there is none."""
    try:
        with open("/proc/thread-self/net/ip_vs", encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(value: bytes) -> int:
    return int.from_bytes(value, "big")
