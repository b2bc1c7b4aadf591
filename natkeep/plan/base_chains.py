"""the tables `inet natkeep` and `arp natkeep`: what stands there for all moves, and all names.

A site has one table `inet natkeep`, shared by all moves: base chains, and verdict maps from a local
address to the chain in which moves have their rules (ruleset.py draws a packet's way). The part
that all moves share is listed here and nowhere else.

Size: over 400 lines, because of that: an object that is missing is looked for in one place.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache
from typing import NamedTuple

from natkeep.plan.criu_lock import CRIU_MARK
from natkeep.plan.ip_rules import HERE, STRANGE
from natkeep.plan.move import Mode
from natkeep.plan.nft import (
    ACCEPT,
    ADDRESS_TYPE,
    DROP,
    FAMILIES,
    IP,
    NOTRACK,
    TABLE,
    TPROXY,
    Chain,
    Elements,
    MarkBits,
    Match,
    Meta,
    Object,
    Rule,
    Set,
    Statement,
    Table,
    TcpFlags,
    VerdictMap,
    jump,
)
from natkeep.plan.protocols import TCP, Protocol
from natkeep.plan.roles import ROLES, RoleRow
from natkeep.plan.tuples import Address

_OPENING_FLAGS = ("fin", "syn", "rst", "ack")
SYN = TcpFlags(_OPENING_FLAGS, ("syn",))
"""A bare SYN: it begins a connection."""
NOT_SYN = TcpFlags(_OPENING_FLAGS, ("syn",), equal=False)
SYN_ACK = TcpFlags(("syn", "ack"), ("syn", "ack"))
RST = TcpFlags(("rst",), ("rst",))
SENT_TO_OLD = "tcp urgptr", CRIU_MARK
"""What a gateway writes into a segment for the destination to know that it was sent to OLD.

The field means nothing in a segment without URG.
"""
_HAS_ENTRY = Meta("ct state", "established,related,new")
_CRIU_MARKED = Meta("meta mark", f"{CRIU_MARK:#x}")
NOT_CRIU = Meta("meta mark", f"{CRIU_MARK:#x}", equal=False)
FROM_WIRE = Meta("iif", '"lo"', equal=False)
TO_WIRE = Meta("oif", '"lo"', equal=False)
_OWN = Meta("iif", "0")
"""What this host has sent itself came by no device."""
CAME = Meta("iif", "0", equal=False)
"""All else. Where a datagram of this host itself is dropped, the send fails (EPERM)."""

GATE = "gate"
HEARD = "heard"
"""The dispatch behind the gate at a destination, which ignores resets of peers not heard yet."""
SPOKEN = "spoken"
"""The dispatch of what destinations send to a gateway, which ignores their resets at first."""
EARLY = (HEARD, SPOKEN)
"""The two of them, whose base chains go once all are heard."""
MARK = "mark"
"""The dispatch of resets at a gateway, from the chain that asks whether a packet has an entry."""
INJECTED = "injected"
SAID = "said"
"""The dispatch of what a destination says as NEW, which may be of a socket of UDP (servers.py)."""
PASSING, REDIRECTING = "passing", "redirecting"
"""Base chains of a relay that natkeep has made pass packets on (relay.py)."""
LEAVING = "leaving"
HALF_OPEN = "half-open"
"""Name of the chain that SYN-ACKs are sent to, at a destination."""
DEFRAGMENT = "defragment"
"""Name of the chain that has the kernel defragment, in mode stateless; nothing jumps there."""
ERRORS = "errors"
"""Name of the chain for departing ICMP errors; the base chain sends nothing else there."""
OPEN = "open"
"""Comment of the rule that opens a gate."""


class Dispatch(NamedTuple):
    """A base chain that sends packets, by the address in *field*, to the chain of that address."""

    chain: str
    type: str
    hook: str
    priority: str
    field: str

    def base(self) -> Chain:
        """The base chain."""
        return Chain(self.chain, self.hook, self.priority, self.type)


DISPATCHES = {
    # filters, in front of everything: gate and mute of the kept, reset of the unkept connections
    GATE: Dispatch(GATE, "filter", "prerouting", "-350", "daddr"),
    "mute": Dispatch("muted", "filter", "output", "-350", "saddr"),
    "dial": Dispatch("dialled", "filter", "output", "-350", "daddr"),
    MARK: Dispatch("marked-resets", "filter", "", "", "daddr"),
    HEARD: Dispatch("early-resets", "filter", "prerouting", "-340", "daddr"),
    SPOKEN: Dispatch("early-answers", "filter", "prerouting", "-340", "saddr"),
    "refuse": Dispatch("refusing", "filter", "prerouting", "-360", "daddr"),
    "answer": Dispatch("answering", "filter", "output", "-360", "saddr"),
    # at a destination, in front of conntrack: UDP that the kernel has given NEW as its source
    SAID: Dispatch("said-as-new", "filter", "output", "-300", "saddr"),
    # translation, stateful
    "in": Dispatch("inbound", "nat", "prerouting", "dstnat - 20", "daddr"),
    "out": Dispatch("outbound", "nat", "postrouting", "srcnat - 20", "saddr"),
    # and of the peers, at a gateway: what else is there shall not masquerade or redirect anew
    "from": Dispatch("peer-inbound", "nat", "prerouting", "dstnat - 19", "saddr"),
    "to": Dispatch("peer-outbound", "nat", "postrouting", "srcnat - 19", "daddr"),
    # both once more, for packets that have no entry and so never get to the nat chains
    "invalid-in": Dispatch("invalid-inbound", "filter", "prerouting", "dstnat - 10", "daddr"),
    "invalid-from": Dispatch("invalid-inbound", "filter", "prerouting", "dstnat - 10", "saddr"),
    "invalid-out": Dispatch("invalid-outbound", "filter", "postrouting", "srcnat - 10", "saddr"),
    "invalid-to": Dispatch("invalid-outbound", "filter", "postrouting", "srcnat - 10", "daddr"),
    # translation, stateless
    "set": Dispatch("arriving", "filter", "prerouting", "-300", "daddr"),
    "put": Dispatch("departing", "filter", "postrouting", "300", "saddr"),
    # at a destination whose peers have moved, behind all that translates
    "half": Dispatch("half-translated", "filter", "input", "350", "daddr"),
    # at the peers' own host: what has NEW as its source there is not translated
    "new": Dispatch("untranslated", "filter", "input", "350", "saddr"),
}
_LOCAL = (
    (Chain("local-inbound", "output", "-120", "nat"), "in"),
    (Chain("local-outbound", "input", "80", "nat"), "out"),
    (Chain("invalid-local-inbound", "output", "-110", "route"), "invalid-in"),
    (Chain("invalid-local-outbound", "input", "90"), "invalid-out"),
)
"""What a gateway itself says as a peer, and hears, passes other hooks, and asks the same maps."""
_LOCAL_GATE = Chain("local-gate", "output", "-350")
_PEERS = (
    (Chain("peer-output", "output", "-120", "nat"), "from"),
    (Chain("peer-input", "input", "80", "nat"), "to"),
    (Chain("invalid-peer-output", "output", "-110", "route"), "invalid-from"),
    (Chain("invalid-peer-input", "input", "90"), "invalid-to"),
)
"""What a destination translates of peers that have moved: in the hooks beside its sockets."""
DIRECTIONS = {Mode.STATEFUL: ("in", "out"), Mode.STATELESS: ("set", "put")}
"""Inbound and outbound dispatch of each mode; GATE is every mode's."""


def kept_set(move_id: str, number: int) -> str:
    """Name of the set of kept connections of the move's translation *number*."""
    return f"kept-{move_id}-{number}"


def outer_set(move_id: str, number: int) -> str:
    """Name of the set of the same connections as they look outside, where that differs."""
    return f"outer-{move_id}-{number}"


def ended_set(move_id: str, number: int) -> str:
    """Name of the set of those of them that have ended, in mode stateless."""
    return f"ended-{move_id}-{number}"


def heard_set(move_id: str, number: int) -> str:
    """Name of the set of those of them whose peers were heard since the move was opened."""
    return f"{HEARD}-{move_id}-{number}"


def spoken_set(move_id: str, number: int) -> str:
    """Name of the set of those of them with which the destination has spoken, at a gateway."""
    return f"{SPOKEN}-{move_id}-{number}"


def routed_set(move_id: str, number: int) -> str:
    """Name of the set of the same as they are routed, where neither of those two has that."""
    return f"routed-{move_id}-{number}"


def old_set(move_id: str, number: int) -> str:
    """Name of the set of the same as the old host says them, where neither of those has that."""
    return f"old-{move_id}-{number}"


def outer_map(move_id: str, number: int) -> str:
    """Name of the map to the peer outside, from what the process says to it."""
    return f"to-outer-{move_id}-{number}"


def inner_map(move_id: str, number: int) -> str:
    """Name of the map to the peer that the process knows, from what is routed to the process."""
    return f"to-inner-{move_id}-{number}"


def gate_chain(move_id: str) -> str:
    """Name of the chain that holds the move's drop, and its accept once it is open."""
    return f"gate-{move_id}"


@lru_cache(maxsize=1 << 12)  # a move asks for each of its few a dozen times
def address_chain(dispatch: str, address: Address) -> str:
    """Name of the chain that packets of one local address are sent to.

    It never equals a gate_chain: an id has no dot, and where it begins with `at-` no `_` either.
    """
    return f"{dispatch}-at-{str(address).replace(':', '_')}"


def is_later(name: str) -> bool:
    """Whether a chain, set or map is of those that earlier natkeeps did not make."""
    notes = "ended-", f"{HEARD}-", f"{SPOKEN}-"
    of_a_move = name.startswith(("routed-", "to-outer-", "to-inner-", *notes))
    return name == DEFRAGMENT or of_a_move or name.partition("-at-")[0] in _later_names()


_LATER = ("from", "to", HEARD, MARK, SPOKEN)


@cache
def _later_names() -> frozenset[str]:
    later = [row for row in DISPATCHES if row.startswith("invalid-") or row in _LATER]
    maps = {dispatch_map(row, v) for row in later for v in FAMILIES}
    chains = [DISPATCHES[row].chain for row in later] + [chain.name for chain, _ in _LOCAL]
    chains.append(_LOCAL_GATE.name)
    return frozenset([*later, *maps, *chains])


def is_address_chain(name: str) -> bool:
    """Whether it is the name of an address_chain."""
    dispatch, _, address = name.partition("-at-")
    return dispatch in DISPATCHES and not {".", "_"}.isdisjoint(address)


def dispatch_map(dispatch: str, version: int) -> str:
    """Name of the verdict map from local address to address chain."""
    return f"{dispatch}{version}"


def held_set(version: int) -> str:
    """Name of the set of OLD addresses that a move has put on lo, and that must not leak."""
    return f"held{version}"


# ---- the part that all moves share ---------------------------------------------------------------


@cache
def base_table() -> tuple[Object, ...]:
    """The table as it is before any move; `create` fails when it is there already."""
    return (
        Table(),
        *(Set(held_set(v), (ADDRESS_TYPE[v],), shared=True) for v in FAMILIES),
        *_dispatch_maps(GATE),
        *gate_hook(),
        Chain(INJECTED, "output", "-350"),
        Rule(INJECTED, (_CRIU_MARKED, NOTRACK)),
    )


@cache
def gate_hook() -> tuple[Object, ...]:
    """The base chain `gate`, by which packets get to the gates; it is there while one is closed."""
    return (
        DISPATCHES[GATE].base(),
        Rule(GATE, (_CRIU_MARKED, NOTRACK, ACCEPT)),
        *_dispatch_rules(GATE),
    )


@cache
def early_hook(dispatch: str) -> tuple[Object, ...]:
    """The base chain by which resets of ends not heard are dropped; not there once all were."""
    return (DISPATCHES[dispatch].base(), *_dispatch_rules(dispatch))


@cache
def destination_table() -> tuple[Object, ...]:
    """What only a destination's table has besides: what must not leave it, and ARP's silence.

    A gateway has no OLD to leak, and no listener there; each packet would pay for it. What is
    passed on for others goes its way.
    """
    leaving = (
        Rule(LEAVING, (Match((f"{IP[v]} saddr",), f"@{held_set(v)}"), _OWN, TO_WIRE, DROP))
        for v in FAMILIES
    )
    return (
        Chain(LEAVING, "postrouting", "350"),
        *leaving,
        Chain(HALF_OPEN, shared=True),
        Rule(INJECTED, (SYN_ACK, jump(HALF_OPEN))),
    )


@cache
def forwarding_table() -> tuple[Object, ...]:
    """At a destination that forwards, a mark for what came for NEW: all else to OLD goes on."""
    olds = [(FROM_WIRE, Match((f"{IP[v]} daddr",), f"@{held_set(v)}")) for v in FAMILIES]
    is_ours = Meta("meta mark", f"& {STRANGE:#x} == 0x0")
    ends = ("passed", "forward", STRANGE), ("come", "input", HERE)
    found = [Chain("strange", "prerouting", "-349"), Chain("here", "prerouting", "350")]
    found += [Chain(name, hook, "-350") for name, hook, _ in ends]
    rules = [Rule("strange", (*old, MarkBits(STRANGE))) for old in olds]
    rules += [Rule("here", (*old, is_ours, MarkBits(HERE))) for old in olds]
    rules += [Rule(name, (MarkBits(bit, on=False),)) for name, _, bit in ends]
    return (*found, *rules)


@cache
def relay_table() -> tuple[Object, ...]:
    """At a relay that natkeep makes pass packets on: what of them, and no redirects."""
    return (Chain(PASSING, "forward", "-350"), Chain(REDIRECTING, "output", "-350"))


@cache
def dispatch_table(dispatch: str) -> tuple[Object, ...]:
    """The base chain of a dispatch, its maps and its rules; the first move that uses it adds it."""
    return (*_dispatch_maps(dispatch), DISPATCHES[dispatch].base(), *_dispatch_rules(dispatch))


@cache
def mode_table(mode: Mode) -> tuple[Object, ...]:
    """The base chains of a mode, added by the first move that uses it.

    A gateway with stateless moves only has no nat chain: that would track all connections.
    """
    objects = [one for dispatch in DIRECTIONS[mode] for one in dispatch_table(dispatch)]
    if mode == Mode.STATELESS:
        departing = DISPATCHES[DIRECTIONS[mode][1]].chain
        icmp = Meta("meta l4proto", "{ icmp, ipv6-icmp }")
        # Nothing else may get there: it would ask a rule for each move.
        objects += [Chain(ERRORS, shared=True), Rule(departing, (icmp, jump(ERRORS)))]
        tcp = Meta("meta l4proto", TCP.name)
        objects += [Chain(DEFRAGMENT, shared=True), Rule(DEFRAGMENT, (tcp, TPROXY))]
    return tuple(objects)


@cache
def translation_tables(
    row: RoleRow, mode: Mode, *, peers: bool = False
) -> tuple[tuple[Object, ...], ...]:
    """What the translations of a mode need at a site of this role, each part with its base chains.

    peers: at a destination some have moved.
    """
    if mode == Mode.STATELESS:
        return (mode_table(mode),)
    parts = [mode_table(mode), dispatch_table(MARK), _invalid_table()]
    if row.passes_on:
        parts += [(*dispatch_table("from"), *dispatch_table("to"))]
        parts += [dispatch_table("half")] if row.relays else [_hooks_table(_LOCAL)]
        parts += [] if row.relays or row.own else [_local_gate()]
    if peers:
        maps = (*_dispatch_maps("from"), *_dispatch_maps("to"))
        parts += [(*maps, *_hooks_table(_PEERS, beside_lo=True)), dispatch_table("half")]
    if row.own:
        parts += [dispatch_table("new"), _own_resets()]
    return tuple(parts)


def _local_gate() -> tuple[Object, ...]:
    """The gates for what a gateway says itself as a peer, which never comes to prerouting."""
    passed = Rule(_LOCAL_GATE.name, (_CRIU_MARKED, ACCEPT))
    asked = (rule._replace(chain=_LOCAL_GATE.name) for rule in _dispatch_rules(GATE))
    return (_LOCAL_GATE, passed, *asked)


def _own_resets() -> tuple[Object, ...]:
    """Resets of the peers' own kernel are marked, or dropped, as those that pass a gateway are."""
    chain = Chain("own-resets", "output", "-330")
    return (chain, Rule(chain.name, (RST, jump(DISPATCHES[MARK].chain))))


def _hooks_table(
    chains: Iterable[tuple[Chain, str]], *, beside_lo: bool = False
) -> tuple[Object, ...]:
    """More base chains that ask the maps of a dispatch, one each.

    beside_lo: not of what lo carries, which has the peers that its sockets know.
    """
    objects: list[Object] = []
    for chain, dispatch in chains:
        guard = (_HAS_ENTRY, ACCEPT)
        objects += [chain, *([Rule(chain.name, guard)] if chain.type != "nat" else [])]
        if beside_lo:
            device = "oif" if chain.hook == "output" else "iif"
            objects.append(Rule(chain.name, (Meta(device, '"lo"'), ACCEPT)))
        objects += [rule._replace(chain=chain.name) for rule in _dispatch_rules(dispatch)]
    return tuple(objects)


def _invalid_table() -> tuple[Object, ...]:
    """The base chains of what conntrack calls invalid, or has been told not to track.

    Most packets have an entry, and pay for the question whether they have, and are no resets.
    """
    objects: list[Object] = []
    for pair in (("invalid-in", "invalid-from"), ("invalid-out", "invalid-to")):
        base = DISPATCHES[pair[0]].base()
        objects += [one for dispatch in pair for one in _dispatch_maps(dispatch)]
        objects.append(base)
        if pair[0] == "invalid-in":
            objects.append(Rule(base.name, (RST, jump(DISPATCHES[MARK].chain))))
        objects.append(Rule(base.name, (_HAS_ENTRY, ACCEPT)))
        objects += [one for dispatch in pair for one in _dispatch_rules(dispatch)]
    return tuple(objects)


def _dispatch_maps(dispatch: str) -> tuple[Object, ...]:
    return tuple(
        Set(dispatch_map(dispatch, v), (ADDRESS_TYPE[v],), verdicts=True, shared=True)
        for v in FAMILIES
    )


def _dispatch_rules(dispatch: str) -> tuple[Rule, ...]:
    row = DISPATCHES[dispatch]
    return tuple(
        Rule(row.chain, (VerdictMap(f"{IP[v]} {row.field}", dispatch_map(dispatch, v)),))
        for v in FAMILIES
    )


# ---- a move's way into it ------------------------------------------------------------------------


def dispatch_to(dispatch: str, address: Address) -> tuple[Object, ...]:
    """Send packets of *address* to its chain, which is made if there is none."""
    chain = address_chain(dispatch, address)
    name = dispatch_map(dispatch, address.version)
    return (Chain(chain, shared=True), Elements(name, (address,), chain))


def rule_at(
    dispatch: str, address: Address, statements: tuple[Statement, ...], comment: str
) -> tuple[Object, ...]:
    """A rule in the chain of *address*, in front: the newest move of a tuple has the word."""
    chain = address_chain(dispatch, address)
    return (*dispatch_to(dispatch, address), Rule(chain, statements, comment, insert=True))


def inbound_key(version: int, protocol: Protocol = TCP) -> tuple[str, ...]:
    """What a set is asked for of a packet from a peer: peer, its port, the local one."""
    return (f"{IP[version]} saddr", protocol.sport, protocol.dport)


def outbound_key(version: int, protocol: Protocol = TCP) -> tuple[str, ...]:
    """The same of a packet to a peer."""
    return (f"{IP[version]} daddr", protocol.dport, protocol.sport)


def not_syn(protocol: Protocol) -> tuple[Statement, ...]:
    """All packets but those that begin a connection, where a protocol has such."""
    return (NOT_SYN,) if protocol.has_states else ()


def connection_set(
    name: str, version: int, size: int, *, dynamic: bool = False, table: str = TABLE
) -> Set:
    """An empty set for *size* connections: `peer . peer port . local port`."""
    type_ = (ADDRESS_TYPE[version], "inet_service", "inet_service")
    return Set(name, type_, size, dynamic=dynamic, table=table)


def peer_map(name: str, version: int, size: int) -> Set:
    """An empty map for *size* connections, from the same to `peer . peer port`."""
    to = (ADDRESS_TYPE[version], "inet_service")
    return connection_set(name, version, size)._replace(data=to)


@cache
def shared_names() -> frozenset[str]:
    """Names of the chains and sets that are there for all moves, but for the address chains."""
    parts = [base_table(), destination_table(), forwarding_table(), relay_table()]
    parts += [
        part
        for row in ROLES.values()
        for mode in Mode
        for part in translation_tables(row, mode, peers=True)
    ]
    parts += [dispatch_table(dispatch) for dispatch in DISPATCHES]
    return frozenset(one.name for part in parts for one in part if isinstance(one, Chain | Set))


def removal() -> tuple[str, ...]:
    """Remove both tables, whether they are there or not (`destroy` needs a newer nft)."""
    return tuple(
        f"{verb} table {family} {TABLE}" for family in ("inet", "arp") for verb in ("add", "delete")
    )
