"""the nf_tables objects read by raw netlink: what stands in our tables, and in those of others.

Rule: read only. Own code, because libnftables reads every element of every set before it answers
anything (1.3 s beside a set of 100,000). Objects are found by the keys of plan/nft.py; what others
have in their tables is looked at only as far as it is asked for.
Numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
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
from natkeep.kernel.nft_expressions import string
from natkeep.kernel.nft_messages import SUBSYSTEM, list_keys, nfgenmsg
from natkeep.plan.nft import TABLE, Key, describe_rule, number_alike
from natkeep.plan.tuples import Connections
from natkeep.values import dataclass

GETTABLE, GETCHAIN, GETRULE, GETSET, _GETSETELEM = 1, 4, 7, 10, 13
_GETGEN, _GETFLOWTABLE, _GENERATION = 16, 23, 1
_FAMILY = {"inet": 1, "ip": 2, "arp": 3, "ip6": 10}  # NFPROTO_…
_FILTERS = ("inet", "ip", "ip6")
_ATTEMPTS = 50  # of a dump, while others change the ruleset; one of a thousand rules takes 1 ms
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting", "ingress")

_NETWORK, _TRANSPORT = 1, 2
_VERDICTS = {0: "drop", 1: "accept"}
_JUMP = -3
_LENGTH = struct.Struct("=H")
_PORT = (_TRANSPORT, 2, 2)
_TO = ((_NETWORK, 16, 4), (_NETWORK, 24, 16))


@dataclass(frozen=True, slots=True)
class BaseChain:
    """A chain that the kernel calls: its family, table, name, type (`nat`, …), hook, priority."""

    family: str
    table: str
    name: str
    type: str
    hook: str
    priority: int


@dataclass(frozen=True, slots=True)
class SeenRule:
    """A rule as far as natkeep needs it: its chain, the kernel's number for it, its comment."""

    chain: str
    handle: int
    comment: str


def read_generation() -> int:
    """The number of the ruleset's state in this namespace; every transaction makes another."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        [answer] = netlink.request(SUBSYSTEM | _GETGEN, 0, nfgenmsg(0))
    return _number(find_attribute(answer[4:], _GENERATION))


# ---- by name -------------------------------------------------------------------------------------


def has_table(family: str, table: str) -> bool:
    """Whether the table is there."""
    return string(table) in [find_attribute(each, 1) for each in _dump(GETTABLE, family)]


def has_chain(table: str, chain: str) -> bool:
    """Whether the inet table has the chain; as quick in a table of a thousand moves as of one."""
    scope = attribute(1, string(table)) + attribute(3, string(chain))
    try:
        with Netlink(NETLINK_NETFILTER) as netlink:
            body = nfgenmsg(_FAMILY["inet"]) + scope
            return any(netlink.request(SUBSYSTEM | GETCHAIN, 0, body))
    except FileNotFoundError:
        return False


def chain_names(table: str) -> frozenset[str]:
    """The chains of the inet table; empty when it is not there."""
    chains = map(attributes, _dump(GETCHAIN, "inet"))
    return frozenset(text(chain[3]) for chain in chains if text(chain[1]) == table)


def set_names(table: str) -> frozenset[str]:
    """The sets and maps of the inet table, without reading an element."""
    found = _dump(GETSET, "inet", attribute(1, string(table)))
    return frozenset(text(find_attribute(each, 2)) for each in found)


def rules(table: str, chain: str) -> tuple[SeenRule, ...]:
    """The rules of one chain, in order; empty when the chain is not there."""
    return rules_by_chain(table, [chain])[chain]


def rules_by_chain(table: str, chains: Iterable[str]) -> dict[str, tuple[SeenRule, ...]]:
    """The same of each of these chains."""
    found = {}
    with Netlink(NETLINK_NETFILTER) as netlink:
        for chain in chains:
            scope = attribute(1, string(table)) + attribute(2, string(chain))
            answers = map(_read_rule, _request(netlink, GETRULE, _FAMILY["inet"], scope))
            found[chain] = tuple(rule for rule in answers if rule.chain == chain)
    return found


def rules_of_chains(table: str, *beginnings: str) -> Iterator[SeenRule]:
    """The rules of all chains of the inet table whose names begin so, chain by chain, in order.

    None when the table is not there. A thousand moves have ten thousand rules, of which a few are
    asked for: the kernel puts the chain's name behind the table's, so most are seen by that.
    """
    scope, names = attribute(1, string(table)), tuple(name.encode("ascii") for name in beginnings)
    for rule in _dump(GETRULE, "inet", scope):
        if rule.startswith(names, len(scope) + 4):
            yield _read_rule(rule)


def _read_rule(answer: bytes) -> SeenRule:
    rule = attributes(answer)
    return SeenRule(text(rule[2]), _number(rule[3]), _comment(rule.get(7, b"")))


def _dump(type_: int, family: str, scope: bytes = b"") -> Iterator[bytes]:
    with Netlink(NETLINK_NETFILTER) as netlink:
        yield from _request(netlink, type_, _FAMILY[family], scope)


def _request(netlink: Netlink, type_: int, family: int, scope: bytes = b"") -> Iterator[bytes]:
    """The attributes of each answer of a dump; none where what is asked about is gone."""
    try:
        for answer in dump_whole(netlink, type_, nfgenmsg(family) + scope):
            yield answer[4:]
    except FileNotFoundError:
        return


def dump_whole(netlink: Netlink, type_: int, body: bytes) -> list[bytes]:
    """The answers of a dump during which nothing changed, as far as one can be had.

    From one datagram to the next the kernel goes on by the number of objects that it has told, so
    it leaves out one for each that another program removed before it: a rule of ours seems to be
    missing. It says so by a flag, and where not (elements of sets) by the ruleset's generation,
    which each answer bears (res_id).
    """
    answers: list[bytes] = []
    for _ in range(_ATTEMPTS):
        answers = [*netlink.request(SUBSYSTEM | type_, NLM_F_DUMP, body)]
        if not netlink.interrupted and len({answer[2:4] for answer in answers}) < 2:
            break
    return answers


# ---- the elements of a set -----------------------------------------------------------------------


def read_keys(table: str, name: str) -> list[bytes]:
    """The key of each element of the set or map, as the kernel has it; none when it is gone."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        return dump_keys(netlink, "inet", table, name)


def dump_keys(netlink: Netlink, family: str, table: str, name: str) -> list[bytes]:
    """The same by a socket that is there already, of a table of any family."""
    scope = attribute(1, string(table)) + attribute(2, string(name))
    answers = _request(netlink, _GETSETELEM, _FAMILY[family], scope)
    return [key for each in answers for key in _element_keys(find_attribute(each, 3))]


def count_heard(netlink: Netlink, names: Iterable[str]) -> int:
    """How many elements these sets have, of those that plan/base_chains.py calls heard_set.

    Each is a peer that has said by the wire something else than a reset since its move was opened.
    """
    return sum(len(dump_keys(netlink, "inet", TABLE, name)) for name in names)


def find_unheard(netlink: Netlink, name: str, kept: Connections) -> Iterator[bytes]:
    """The records of those of *kept* (of one IP version) that the heard_set *name* has not."""
    heard = frozenset(dump_keys(netlink, "inet", TABLE, name))
    for record, key in zip(kept.each(), list_keys(kept), strict=True):
        if key not in heard:
            yield record


def are_all_heard(netlink: Netlink, dispatch: str) -> bool:
    """Whether every kept connection of every move of HEARD or SPOKEN was heard: full sets.

    Where some are local to this host, they are never heard by the wire.
    """
    for answer in _request(netlink, GETSET, _FAMILY["inet"], attribute(1, string(TABLE))):
        each = attributes(answer)
        name = text(each[2])
        if name.startswith(f"{dispatch}-"):
            size = _number(attributes(each[9]).get(1, b""))
            if count_heard(netlink, [name]) < size:
                return False
    return True


def _element_keys(elements: bytes) -> list[bytes]:
    width = _plain_width(elements)
    if width:
        return [key for (key,) in struct.iter_unpack(f"12x{width}s", elements)]
    return [attributes(attributes(each)[1])[1] for each in values(elements)]


def _plain_width(elements: bytes) -> int:
    """How long the keys are, if each element is a key and nothing else; 0 if not all are alike."""
    if len(elements) < 16:
        return 0
    size, key = (_LENGTH.unpack_from(elements, at)[0] for at in (0, 8))
    if size != 8 + key or key <= 4 or key % 4 or len(elements) % size:
        return 0
    count = len(elements) // size
    alike = all(elements[i::size] == elements[i : i + 1] * count for i in range(12))
    return int(key) - 4 if alike else 0


# ---- everything in our tables --------------------------------------------------------------------


def find_standing(netlink: Netlink, family: str) -> tuple[set[Key], dict[str, list[str]]]:
    """All that is in the table natkeep but elements, of all moves; of each chain its comments."""
    comments: dict[str, list[str]] = {}
    name, scope = string(TABLE), attribute(1, string(TABLE))
    number = _FAMILY[family]
    if name not in [find_attribute(each, 1) for each in _request(netlink, GETTABLE, number)]:
        return set(), comments
    found = {Key(family, "table")}
    for kind, type_, at in (("chain", GETCHAIN, 3), ("set", GETSET, 2)):
        for answer in _request(netlink, type_, number, scope):
            if find_attribute(answer, 1) == name:
                found.add(Key(family, kind, text(find_attribute(answer, at))))
    rules: dict[bytes, Key] = {}  # by its handle: one may come twice when others are made
    for rule in map(attributes, _request(netlink, GETRULE, number, scope)):
        if rule[1] == name and rule[3] not in rules:
            chain, comment = text(rule[2]), _comment(rule.get(7, b""))
            rules[rule[3]] = Key(family, "rule", chain, describe_rule(comment, _marks(rule[4])))
            comments.setdefault(chain, []).append(comment)
    found.update(number_alike(rules.values()))
    return found, comments


def _marks(expressions: bytes) -> list[str]:
    """What plan/nft.py knows a rule by, from the kernel's expressions."""
    found: list[str] = []
    loaded: tuple[int, ...] = ()
    for each in values(expressions):
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
    name, body = text(outer[1]), attributes(outer.get(2, b""))
    if name in ("lookup", "dynset"):
        asked = text(body[1])
        return (() if asked.startswith("__") else (f"@{asked}",)), (), None
    if name in ("nat", "notrack", "reject", "tproxy"):
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
        yield f">{text(verdict[2])}"


def _compared(loaded: tuple[int, ...], value: bytes) -> Iterator[str]:
    if loaded == _PORT:
        yield f"port {int.from_bytes(value, 'big')}"
    elif loaded in _TO and len(value) == loaded[2]:
        yield f"to {ip_address(value)}"


# ---- other tables --------------------------------------------------------------------------------


def base_chains() -> tuple[BaseChain, ...]:
    """Every base chain of every table, also those of others."""
    found = []
    for family in _FILTERS:
        for chain in map(attributes, _dump(GETCHAIN, family)):
            if 4 not in chain:
                continue
            hook = attributes(chain[4])
            number = _number(hook[1])
            priority = int.from_bytes(hook[2], "big", signed=True)
            where = _HOOKS[number] if number < len(_HOOKS) else str(number)
            table, name, type_ = (text(chain.get(at, b"")) for at in (1, 3, 7))
            found.append(BaseChain(family, table, name, type_, where, priority))
    return tuple(found)


def flowtable_names() -> tuple[str, ...]:
    """`FAMILY TABLE NAME` of every flowtable; none where the kernel knows none."""
    found = []
    for family in _FILTERS:
        with suppress(OSError):
            for flowtable in map(attributes, _dump(_GETFLOWTABLE, family)):
                found.append(f"{family} {text(flowtable[1])} {text(flowtable[2])}")
    return tuple(found)


def assigns_zones(*, besides: str) -> bool:
    """Whether a rule could give packets a conntrack zone, in any table but *besides*.

    Found are `ct zone` of nft, to set or to match, and the target CT of iptables, which may.
    """
    return any(_chains_with((_CT_ZONE, _CT_TARGET), besides))


def untracking_chains(*, besides: str) -> tuple[str, ...]:
    """`FAMILY TABLE CHAIN` of chains whose rules keep packets from being tracked, or may.

    Found are `notrack` of nft and the targets NOTRACK and CT of iptables.
    """
    return tuple(dict.fromkeys(_chains_with((_NOTRACK, _NOTRACK_TARGET, _CT_TARGET), besides)))


def _chains_with(parts: tuple[bytes, ...], besides: str) -> Iterator[str]:
    """`FAMILY TABLE CHAIN` of each rule that holds one of *parts*, in any table but *besides*."""
    names = {number: family for family, number in _FAMILY.items()}
    with Netlink(NETLINK_NETFILTER) as netlink:
        answers = dump_whole(netlink, GETTABLE, nfgenmsg(0))
        for family, table in [(each[0], find_attribute(each[4:], 1)) for each in answers]:
            if table == string(besides):
                continue
            for rule in _request(netlink, GETRULE, family, attribute(1, table)):
                if any(part in rule for part in parts):
                    chain = text(find_attribute(rule, 2))
                    yield f"{names.get(family, family)} {text(table)} {chain}"


_NOTRACK = attribute(1, b"notrack\0")  # NFTA_EXPR_NAME
_NOTRACK_TARGET = attribute(1, b"NOTRACK\0")  # NFTA_TARGET_NAME
_CT_ZONE = attribute(2, (17).to_bytes(4, "big"))  # NFTA_CT_KEY, NFT_CT_ZONE
_CT_TARGET = attribute(1, b"CT\0")[:7]  # iptables-nft's `-j CT`, of which `--zone` is an option


def _comment(userdata: bytes) -> str:
    # libnftnl's user data: type, length, value; type 0 is the comment, with its final NUL.
    if len(userdata) > 2 and userdata[0] == 0:
        return text(userdata[2 : 2 + userdata[1]])
    return ""


def values(data: bytes) -> list[bytes]:
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


def text(value: bytes) -> str:
    return value.rstrip(b"\0").decode("ascii", "replace")
