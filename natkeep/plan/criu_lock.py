"""CRIU's network lock: what of it is on the source, which is this dump's, and its text.

After a dump that kills, CRIU leaves its network lock for ever. It takes four forms (CRIU 4.2.1):

    nftables, process     table `inet CRIU-RUN`, its sets conns4 and conns6 hold each connection
                          in both directions
    nftables, namespace   the same table with chains of policy drop and no sets: all is locked
    iptables, process     two rules a connection in the filter table, in INPUT and in OUTPUT
    iptables, namespace   a chain CRIU in the filter table: all is locked

RUN is the dump's run id, of which CRIU's buffer leaves the first 21 characters. "namespace"
means that the process was dumped with (or in) another network namespace than CRIU's own.

Rule: which lock is meant follows from the image's run id, or from four-tuples of the plan, never
from a pattern: other dumps' locks protect other people's connections.
This file must never run anything.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Iterator
from enum import StrEnum
from ipaddress import ip_interface
from itertools import pairwise

from natkeep.plan.tuples import RECORD_SIZE, Connections, Endpoint, FourTuple
from natkeep.values import dataclass

RUN_ID_SHOWN = 21
"""CRIU prints `inet CRIU-RUN` into 32 octets (netfilter.c, net.c); measured with 4.2.1."""

CRIU_MARK = 0xC114
"""SOCCR_MARK: what CRIU sends itself while all else is locked."""

CHAINS = ("INPUT", "OUTPUT")
NAMESPACE_CHAIN = "CRIU"

_RUN_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
_TYPE = {4: "ipv4_addr", 6: "ipv6_addr"}
_IP = {4: "ip", 6: "ip6"}


class NetworkLock(StrEnum):
    """How CRIU locked the network of a dump; the value is what `criu --network-lock` takes."""

    IPTABLES = "iptables"
    NFTABLES = "nftables"
    SKIP = "skip"


@dataclass(frozen=True, slots=True)
class DumpLock:
    """The lock of one dump.

    run_id: None before CRIU 4.1, whose table cannot be told from other dumps'.
    whole: the process was dumped with its network namespace, all of which is locked.
    connections: how many the dump had, kept or not; None where that is unknown.
    """

    method: NetworkLock
    run_id: str | None = None
    whole: bool = False
    connections: int | None = None

    def __post_init__(self) -> None:
        if self.run_id is not None and not _RUN_ID.fullmatch(self.run_id):
            raise ValueError(f"{self.run_id!r} is not the run id of a dump")

    @property
    def table(self) -> str:
        """Name of the table that CRIU made for this dump (nftables)."""
        return table_name(self.run_id or "")

    def is_known(self) -> bool:
        """Whether there is a lock, and it can be told from those of other dumps."""
        if self.method == NetworkLock.NFTABLES:
            return self.run_id is not None
        return self.method == NetworkLock.IPTABLES


def table_name(run_id: str) -> str:
    """The table that CRIU makes for the dump *run_id*, and again for a restore from it."""
    return f"CRIU-{run_id[:RUN_ID_SHOWN]}"


def set_name(version: int) -> str:
    """CRIU's set of locked connections of IP *version*."""
    return f"conns{version}"


def pack_keys(connections: Connections, version: int) -> frozenset[bytes]:
    """The keys in CRIU's set, as the kernel has them: both directions of each connection."""
    width = RECORD_SIZE[version] // 2
    found: set[bytes] = set()
    for (record,) in struct.iter_unpack(f"{2 * width}s", connections.records(version)):
        # Each part of a key is padded to four octets, so a port is followed by two.
        local, peer = record[:width] + bytes(2), record[width:] + bytes(2)
        found.update((local + peer, peer + local))
    return frozenset(found)


def render_table(lock: DumpLock, connections: Connections) -> tuple[str, ...]:
    """The table as CRIU makes it, for a process or a whole namespace, to put it back."""
    table, versions = f"inet {lock.table}", () if lock.whole else (4, 6)
    lines = [f"create table {table}"]
    lines += [
        f"add set {table} {set_name(v)} {{ type {_TYPE[v]} . inet_service . {_TYPE[v]} . "
        "inet_service; }"
        for v in versions
    ]
    policy = " policy drop;" if lock.whole else ""
    for chain in ("output", "input"):
        hook = f"type filter hook {chain} priority 0;{policy}"
        lines.append(f"add chain {table} {chain} {{ {hook} }}")
        lines.append(f"add rule {table} {chain} meta mark {CRIU_MARK:#x} accept")
        lines += [
            f"add rule {table} {chain} {_IP[v]} saddr . tcp sport . {_IP[v]} daddr . tcp dport "
            f"@{set_name(v)} drop"
            for v in versions
        ]
    return (*lines, *(() if lock.whole else render_elements("add", lock, connections)))


def render_elements(verb: str, lock: DumpLock, connections: Connections) -> tuple[str, ...]:
    """`add` or `delete` the elements of *connections*, both directions, one command a family."""
    lines = []
    for version, some in ((4, Connections(connections.v4)), (6, Connections(v6=connections.v6))):
        elements = ", ".join(
            f"{t.source.address} . {t.source.port} . {t.destination.address} . {t.destination.port}"
            for inbound in some
            for t in (inbound, inbound.reply())
        )
        if elements:
            lines.append(f"{verb} element inet {lock.table} {set_name(version)} {{ {elements} }}")
    return tuple(lines)


def render_rules(inbound: FourTuple) -> tuple[str, ...]:
    """CRIU's two rules for one connection, as iptables-save prints them behind `-A `."""
    lines = []
    for chain, tuple_ in zip(CHAINS, (inbound, inbound.reply()), strict=True):
        source, destination = tuple_.source, tuple_.destination
        length = source.address.max_prefixlen
        lines.append(
            f"{chain} -s {source.address}/{length} -d {destination.address}/{length} -p tcp "
            f"-m mark ! --mark {CRIU_MARK:#x} -m tcp --sport {source.port} "
            f"--dport {destination.port} -j DROP"
        )
    return tuple(lines)


@dataclass(frozen=True, slots=True)
class SavedRules:
    """The part of a filter table, as iptables-save prints it, that is this dump's.

    rules: CRIU's rules of the given connections (or, of a namespace, those that jump to its
    chain), without the leading `-A `, in order.
    tuples: the inbound tuples of which a rule is there.
    chain: there is a chain CRIU.
    """

    rules: tuple[str, ...]
    tuples: frozenset[FourTuple]
    chain: bool


def find_rules(saved: str, lock: DumpLock, connections: Connections) -> SavedRules:
    """What of *saved* is this dump's lock; rules of others that drop something are left alone."""
    rules, tuples, lines = [], set(), saved.splitlines()
    if lock.whole:
        rules = [line.removeprefix("-A ") for line in lines if line.removeprefix("-A ") in _JUMPS]
        chain = any(line.startswith(f":{NAMESPACE_CHAIN} ") for line in lines)
        return SavedRules(tuple(rules), frozenset(), chain)
    wanted = set(connections)
    for line in lines:
        tuple_ = _parse_rule(line)
        if tuple_ is not None and tuple_ in wanted:
            rules.append(line.removeprefix("-A "))
            tuples.add(tuple_)
    return SavedRules(tuple(rules), frozenset(tuples), chain=False)


_JUMPS = tuple(f"{chain} -j {NAMESPACE_CHAIN}" for chain in CHAINS)
_WORDS = 21
"""How many words one of CRIU's rules has: one with more is not CRIU's."""


def _parse_rule(line: str) -> FourTuple | None:
    """The inbound tuple that one of CRIU's rules drops; None for any other rule."""
    words = line.split()
    values = dict(pairwise(words))
    if len(words) != _WORDS or words[0] != "-A" or words[1] not in CHAINS:
        return None
    if [values.get(option) for option in ("-j", "-p")] != ["DROP", "tcp"]:
        return None
    if "! --mark" not in line or values.get("--mark", "").lower() != f"{CRIU_MARK:#x}":
        return None
    try:
        source, destination = (
            Endpoint(ip_interface(values[a]).ip, int(values[p]))
            for a, p in (("-s", "--sport"), ("-d", "--dport"))
        )
        tuple_ = FourTuple(source, destination)
    except (KeyError, ValueError):
        return None
    return tuple_ if words[1] == "INPUT" else tuple_.reply()


def render_deletion(found: SavedRules) -> tuple[str, ...]:
    """Input of iptables-restore --noflush that removes what was found, in one transaction."""
    lines = [f"-D {rule}" for rule in found.rules]
    if found.chain:
        lines += [f"-F {NAMESPACE_CHAIN}", f"-X {NAMESPACE_CHAIN}"]
    return _transaction(lines)


def render_restoration(lock: DumpLock, missing: Iterable[FourTuple]) -> tuple[str, ...]:
    """Input of iptables-restore --noflush that puts back the rules of *missing*, or chain CRIU."""
    if not lock.whole:
        return _transaction([f"-I {rule}" for inbound in missing for rule in render_rules(inbound)])
    mark = f"-A {NAMESPACE_CHAIN} -m mark --mark {CRIU_MARK:#x} -j ACCEPT"
    lines = [f":{NAMESPACE_CHAIN} - [0:0]", mark, f"-A {NAMESPACE_CHAIN} -j DROP"]
    return _transaction([*lines, *(f"-I {jump}" for jump in _JUMPS)])


def _transaction(lines: list[str]) -> tuple[str, ...]:
    return ("*filter", *lines, "COMMIT") if lines else ()


def describe_taking(lock: DumpLock, connections: Connections) -> Iterator[str]:
    """The removal as commands that a person could type."""
    if lock.method == NetworkLock.NFTABLES:
        yield f"nft 'delete table inet {lock.table}'"
        return
    if lock.whole:
        for line in render_deletion(SavedRules(_JUMPS, frozenset(), chain=True))[1:-1]:
            yield from (f"{tool} -w -t filter {line}" for tool in ("iptables", "ip6tables"))
        return
    for inbound in connections:
        tool = "iptables" if inbound.source.address.version == 4 else "ip6tables"
        yield from (f"{tool} -w -t filter -D {rule}" for rule in render_rules(inbound))
