"""what a site shows of a move at one moment, as plain values.

Rule: it is gathered by kernel/snapshot.py; what it means is decided in drift.py and liveness.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import NamedTuple

from natkeep.plan.ip_rules import IpRule
from natkeep.plan.nft import Key
from natkeep.plan.protocols import UDP
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections
from natkeep.values import dataclass


class Gate(StrEnum):
    """The state of a move's gate at a site."""

    ABSENT = "absent"
    CLOSED = "closed"
    OPEN = "open"


class SeenEntry(NamedTuple):
    """A kept connection in the conntrack table.

    packets: None without accounting, and in mode stateless where some have passed, and no rule on
    the host has any tracked.
    alive: its TCP state is not one of those in which a connection has ended.
    A tuple, since there may be 100,000, and it is made in a quarter of the time.
    """

    translated: bool
    packets_in: int | None
    packets_out: int | None
    alive: bool


@dataclass(frozen=True, slots=True)
class Held:
    """What a holder has, or has delivered: segments and datagrams, and octets of both.

    refused: of both, what found no room, or was too old.
    """

    segments: int
    octets: int
    refused: int
    datagrams: int = 0


@dataclass(frozen=True, slots=True)
class Observation:
    """What a site shows of a move.

    missing: for each set of kept connections, how many are not in it (all, when it is gone).
    addresses: those of the move's OLD addresses that are local here.
    entries: one for each kept connection of each translation, in order; None where the table
    has none.
    alive: how many kept connections still have a socket here (destination, source) or an entry
    that carries traffic (gateway).
    holds: new connections to the listeners of a quiesce wait here.
    callers: how many connections of callers live here. inner: how many ends, at an OLD, of the
    process' connections with itself do (destination, source).
    gone: what prepare put into the tables and is not there; shut: the same of open.
    loopback: lo is up.
    sockets: at a destination or source, the kept connections that have one, as the process sees
    them; None elsewhere.
    datagrams: the same of UDP. bound: of the sockets that any peer may speak to those that are
    there, by their keys (plan/silence.py). silences: of each UDP socket that the connection table
    has an entry of, for how many seconds at least no packet has passed. forgets: after how many an
    entry goes (nf_conntrack_udp_timeout_stream).
    lingers: for how long at least, in seconds, the kernel keeps the entry of a connection that
    has ended.
    guarded: the guard's process lives, if the move has one here.
    unanswered: of the kept connections those whose socket says the same again for 5 s and more.
    heard: at a destination of those whose entry counts nothing from the peer those that were heard
    since the move was opened, as the table has noted: an entry that was made anew counts anew.
    spoken: the same at a gateway, of what has come from NEW since the move was prepared.
    lacking: of the rules in front of `lookup local` those that are not there.
    unruled: those of addresses that natkeep has put there and that a rule for NEW does not hold
    for (kernel/policy_rules.py).
    back: at a relay, how many kept connections have their sockets there (again).
    off: of a relay's settings those that are not on.
    """

    gate: Gate
    missing: dict[str, int]
    addresses: frozenset[Address]
    entries: dict[int, tuple[SeenEntry | None, ...]]
    alive: int
    holds: bool = False
    callers: int = 0
    inner: int = 0
    gone: frozenset[Key] = frozenset()
    shut: frozenset[Key] = frozenset()
    loopback: bool = True
    sockets: Connections | None = None
    lingers: float = 0.0
    guarded: bool = True
    unanswered: frozenset[bytes] = frozenset()
    heard: frozenset[bytes] = frozenset()
    spoken: frozenset[bytes] = frozenset()
    lacking: tuple[IpRule, ...] = ()
    unruled: frozenset[Address] = frozenset()
    back: int = 0
    off: frozenset[str] = frozenset()
    datagrams: Connections = NO_CONNECTIONS
    bound: frozenset[bytes] = frozenset()
    silences: Mapping[bytes, float] = MappingProxyType({})
    forgets: float = float(UDP.timeout[1])

    @property
    def living(self) -> int:
        """How many kept connections live here, and UDP sockets that any peer may speak to."""
        return self.alive + len(self.bound)
