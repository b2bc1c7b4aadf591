"""the values that say which sockets a checkpointed process has, wherever that was read.

Rule: a `Checkpoint` comes from a directory of CRIU's images (images.py), a text file (listing.py)
or a living process (live.py); what is found there is only ever *reported*. Which addresses natkeep
may touch is the operator's word (`--map`), never the image's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from operator import or_
from typing import TYPE_CHECKING

from natkeep.plan.criu_lock import DumpLock
from natkeep.plan.criu_lock import NetworkLock as NetworkLock
from natkeep.plan.tuples import (
    NO_CONNECTIONS,
    Address,
    Connections,
    Endpoint,
    FourTuple,
    Local,
    address_of,
    is_at,
)
from natkeep.values import dataclass, replace

if TYPE_CHECKING:
    from natkeep.plan.process import Tree


class TcpState(StrEnum):
    """RFC 9293's names, in the kernel's order of them; the value is what `inspect` prints."""

    ESTABLISHED = "ESTABLISHED"
    SYN_SENT = "SYN-SENT"
    SYN_RECEIVED = "SYN-RECEIVED"
    FIN_WAIT_1 = "FIN-WAIT-1"
    FIN_WAIT_2 = "FIN-WAIT-2"
    TIME_WAIT = "TIME-WAIT"
    CLOSED = "CLOSED"
    CLOSE_WAIT = "CLOSE-WAIT"
    LAST_ACK = "LAST-ACK"
    LISTEN = "LISTEN"
    CLOSING = "CLOSING"


SYNCHRONIZED = frozenset(
    {TcpState.ESTABLISHED, TcpState.FIN_WAIT_1, TcpState.FIN_WAIT_2}
    | {TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.CLOSING}
)
_WAITED_FOR = SYNCHRONIZED | {TcpState.SYN_SENT, TcpState.SYN_RECEIVED}

LOOPBACK = "loopback: both ends must be moved"
"""`unkept` of a socket whose other end is not in the same place, or not known yet to be."""
ELSEWHERE = "in another network namespace than the root task"
"""`unkept` of a socket that the move has nothing to do with."""
TCP_CLOSE = "dumped with --tcp-close: CRIU restores it closed"
"""`unkept` of every connection of such a dump."""
NO_UDP = "left by --no-udp"
"""`unkept` of the UDP sockets that could be kept, where the operator does not want it."""


class Outcome(StrEnum):
    """What becomes of a socket; the value is what `inspect --json` prints.

    RESTORED: CRIU alone brings it back, and it needs nothing. LISTENER: so it does, and new
    connections to OLD reach it with --listeners. LOST: it has, or serves, an end elsewhere, which
    hears nothing of it any more.
    """

    KEPT = "kept"
    LOST = "lost"
    RESTORED = "restored"
    LISTENER = "listener"


TRANSLATED = "the host itself translates it: "
"""How `unkept` begins of a connection that is another one on the wire; what it is there follows."""


@dataclass(frozen=True, slots=True)
class Socket:
    """One inet socket of the process.

    local, peer: endpoints, or None where the socket has no port yet (or no peer).
    protocol: `tcp`, `udp`, `mptcp`, … or the protocol's number in words (`protocol 132`).
    state: for TCP only.
    bound_device: name or index of the device that it is bound to (SO_BINDTODEVICE), or None.
    unkept: why natkeep cannot keep it, as one clause, or None for connections and listeners
    that it can serve.
    both_ends: its other end is a socket of the process, too, so a move of both translates nothing.
    unsent: octets in the send queue that have never been sent (they leave before
    `post-restore`); 0 where the queues were not looked at.
    unread: octets of the receive buffer that datagrams take up (the kernel counts its own overhead,
    too), which CRIU drops; of UDP sockets of a living process, else 0.
    """

    protocol: str
    local: Endpoint | None
    peer: Endpoint | None
    state: TcpState | None = None
    bound_device: str | None = None
    unkept: str | None = None
    unsent: int = 0
    both_ends: bool = False
    unread: int = 0

    def __str__(self) -> str:
        return f"{self.protocol} {self.local or '*'} {self.peer or '*'}"

    def is_connection(self) -> bool:
        """Whether this is a TCP connection that can be kept."""
        return self.unkept is None and self.state in SYNCHRONIZED

    def is_connected_udp(self) -> bool:
        """Whether this is a UDP socket with one peer, that can be kept."""
        return self.unkept is None and self.protocol == "udp" and self.peer is not None

    def is_udp_server(self) -> bool:
        """Whether this is a UDP socket to which any peer may speak, that can be kept."""
        return self.unkept is None and self.protocol == "udp" and self.peer is None

    def is_listener(self) -> bool:
        """Whether this is a TCP socket that waits for connections."""
        return self.unkept is None and self.state == TcpState.LISTEN

    def is_translated(self) -> bool:
        """Whether the process' own host makes another connection of it on the wire."""
        return self.unkept is not None and self.unkept.startswith(TRANSLATED)

    def listens_on_loopback(self) -> bool:
        """Whether only this host speaks to it: what it hears comes and goes with the host."""
        waits = self.state == TcpState.LISTEN or (self.protocol == "udp" and self.peer is None)
        return waits and self.unkept == LOOPBACK

    def inbound(self) -> FourTuple | None:
        """The four-tuple of what arrives; None where it has no two ends of one IP version."""
        if self.local is None or self.peer is None:
            return None
        if self.local.address.version != self.peer.address.version:
            return None
        return FourTuple(self.peer, self.local)

    def why_left(self, olds: Sequence[Local]) -> str | None:
        """Why a move of *olds* (of any, when empty) does not keep it, as one clause, or None."""
        if self.unkept is not None:
            return self.unkept
        if self.is_listener():
            return "a listener: new connections reach it with --listeners only"
        if not olds:
            return None
        if self.local is None or not self._moves(self.local, olds):
            if self.is_udp_server() and self.local is not None and ends_at((self.local,), olds):
                return None
            return "its local address is not an OLD of --map"
        if self.peer is None:
            return None
        if not self.both_ends and self.peer.address in map(address_of, olds):
            return f"its peer {self.peer.address} is on the source host too"
        if self.both_ends and not self._moves(self.peer, olds):
            return f"its other end {self.peer.address} is not an OLD of --map"
        return None

    def outcome(self, olds: Sequence[Local]) -> Outcome:
        """What becomes of it in a move of *olds* (of any, when empty)."""
        if self.is_listener():
            return Outcome.LISTENER
        if self.why_left(olds) is None:
            return Outcome.RESTORED if self.both_ends else Outcome.KEPT
        return Outcome.RESTORED if self._needs_nothing() else Outcome.LOST

    def _needs_nothing(self) -> bool:
        """Whether it has no end elsewhere, though it is not kept."""
        if self.protocol in ("mptcp", "sctp", "dccp"):  # which CRIU does not bring back
            return False
        if self.protocol in ("tcp", "raw", "icmp", "icmpv6"):
            return self.peer is None or self.state in (TcpState.CLOSED, TcpState.TIME_WAIT)
        return self.local is None or self.local.address.is_loopback

    def _moves(self, end: Endpoint, olds: Sequence[Local]) -> bool:
        return is_at(end, olds) or (self.both_ends and end.address.is_loopback)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What CRIU noted about a dump as a whole.

    network_lock: how the source was locked; a restore uses the same method again.
    run_id: the dump's own id, after which CRIU calls its nftables table; None before CRIU 4.1.
    tcp_close: dumped with `--tcp-close`, so that all connections come back closed.
    own_netns: dumped with its network namespace, which CRIU then locked as a whole.
    """

    network_lock: NetworkLock
    run_id: str | None = None
    tcp_close: bool = False
    own_netns: bool = False


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All connections and listeners found in one place.

    sockets is empty where the source tells connections only (a text file); inventory is None
    where the source is not a directory of CRIU's images. live: read while the process ran. tree:
    what it needs besides, where `inspect --live` told it. connections: TCP's. udp: the sockets of
    UDP that are connected; udp_servers: address (or the wildcard one) and port of those that are
    not. listed_dump: the dump that a list says it is of.
    """

    connections: Connections
    sockets: tuple[Socket, ...] = ()
    inventory: Inventory | None = None
    live: bool = False
    tree: Tree | None = None
    udp: Connections = NO_CONNECTIONS
    udp_servers: tuple[Endpoint, ...] = ()
    listed_dump: str | None = None

    @property
    def run_id(self) -> str | None:
        """The dump's own id, where it is known."""
        return self.listed_dump if self.inventory is None else self.inventory.run_id

    @property
    def lock(self) -> DumpLock | None:
        """What CRIU left at the source; None where nothing tells."""
        if self.inventory is None:
            return None
        dump = self.inventory
        count = sum(1 for each in self.sockets if each.protocol == "tcp" and each.peer is not None)
        return DumpLock(dump.network_lock, dump.run_id, dump.own_netns, count)

    def listeners_at(self, olds: Sequence[Local]) -> tuple[Endpoint, ...]:
        """OLD and port of each listener that is bound to one of *olds*, or to all addresses."""
        ends = (each.local for each in self.sockets if each.is_listener() and each.local)
        return ends_at(ends, olds)

    def connections_at(self, olds: Sequence[Local]) -> Connections:
        """Those of TCP at *olds*."""
        return _at(self.connections, olds)

    def udp_at(self, olds: Sequence[Local]) -> Connections:
        """The connected sockets of UDP at *olds*."""
        return _at(self.udp, olds)

    def udp_servers_at(self, olds: Sequence[Local]) -> tuple[Endpoint, ...]:
        """OLD and port of each UDP socket without a peer, as `listeners_at`."""
        return ends_at(self.udp_servers, olds)

    def without_udp(self) -> Checkpoint:
        """The same, but that UDP is to be left (`--no-udp`)."""
        sockets = tuple(
            replace(each, unkept=NO_UDP, both_ends=False)
            if each.is_connected_udp() or each.is_udp_server()
            else each
            for each in self.sockets
        )
        return replace(self, sockets=sockets, udp=NO_CONNECTIONS, udp_servers=())

    def lost_at(self, olds: Sequence[Local]) -> Connections:
        """What peers of *olds* would wait for in vain: sockets that cannot be kept, with a peer.

        Not those of another network namespace than the root task's, where *olds* may be others'
        addresses; nor those whose other end is in the image too, which lives on; nor what has
        ended.
        """
        ends = {(each.local, each.peer) for each in self.sockets}
        return Connections.of(
            inbound
            for each in self.sockets
            if each.unkept not in (None, ELSEWHERE)
            and (each.protocol == "mptcp" or each.state in _WAITED_FOR)
            and (inbound := each.inbound()) is not None
            and is_at(inbound.destination, olds)
            and (inbound.source, inbound.destination) not in ends
        )

    def unmapped(self, olds: Sequence[Address]) -> tuple[Socket, ...]:
        """Sockets that CRIU will bind to an address that is none of *olds*.

        Not what it binds anywhere, or not at all: listeners and UDP of IPv6 (IP_FREEBIND), and
        connections that were dumped with --tcp-close.
        """
        # Addresses are few, and as a rule one object each: to ask each socket's costs 1 us.
        ends = {id(each.local.address): each.local for each in self.sockets if each.local}
        apart = {key for key, end in ends.items() if is_elsewhere(end.address, olds)}
        closed = self.inventory is not None and self.inventory.tcp_close
        return tuple(
            each
            for each in (self.sockets if apart else ())
            if each.local is not None
            and id(each.local.address) in apart
            and (each.local.address.version == 4 or each.peer is not None)
            and each.unkept != ELSEWHERE
            and each.state not in (TcpState.SYN_RECEIVED, TcpState.TIME_WAIT)
            and not (closed and each.state in SYNCHRONIZED)
        )

    def devices(self, olds: Sequence[Local]) -> frozenset[str]:
        """Devices that kept sockets at *olds* are bound to (SO_BINDTODEVICE)."""
        bound = [each for each in self.sockets if each.why_left(olds) is None]
        return frozenset(each.bound_device for each in bound if each.bound_device is not None)

    @classmethod
    def of(cls, sockets: tuple[Socket, ...], *, live: bool = False) -> Checkpoint:
        """A checkpoint of *sockets*; its connections are those that can be kept."""
        inbound = [Connections.of(filter(None, [each.inbound()])) for each in sockets]
        sockets = pair_up(sockets, [one.v4 or one.v6 for one in inbound])
        kept = (socket.inbound() for socket in sockets if socket.is_connection())
        udp = (socket.inbound() for socket in sockets if socket.is_connected_udp())
        return cls(
            Connections.of(filter(None, kept)), sockets, None, live,
            udp=Connections.of(dict.fromkeys(filter(None, udp))), udp_servers=servers_of(sockets),
        )  # fmt: skip


def servers_of(sockets: Iterable[Socket]) -> tuple[Endpoint, ...]:
    """Where the UDP servers among *sockets* are bound, each end once: they may share it."""
    ends = (each.local for each in sockets if each.is_udp_server() and each.local)
    return tuple(dict.fromkeys(ends))


def _at(connections: Connections, olds: Sequence[Local]) -> Connections:
    """Those of *connections* whose local end is one of *olds*, each once."""
    apart = (old for old in olds if old == address_of(old) or address_of(old) not in olds)
    return Connections.joined(connections.at(old) for old in apart)


def ends_at(ends: Iterable[Endpoint], olds: Sequence[Local]) -> tuple[Endpoint, ...]:
    """OLD and port of each of *ends* that is at one of *olds*, or at all addresses; sorted.

    A socket on [::] serves IPv4 as well, unless it was told otherwise (IPV6_V6ONLY), which a
    caller then notices by a reset, as before the move.
    """
    found = {
        at
        for end in ends
        for old in map(address_of, olds)
        if end.address == old or (end.address.is_unspecified and end.address.version >= old.version)
        if is_at(at := Endpoint(old, end.port), olds)
    }
    return tuple(sorted(found, key=lambda end: (end.address.version, end)))


def is_elsewhere(address: Address, olds: Sequence[Address]) -> bool:
    """Whether it is none of *olds*, and one that a host may lack."""
    everywhere = address.is_unspecified or address.is_loopback
    return (
        address not in olds
        and not everywhere
        and not (address.version == 6 and address.is_link_local)
    )


def pair_up(sockets: tuple[Socket, ...], records: Sequence[bytes]) -> tuple[Socket, ...]:
    """*sockets*, of which those know it whose other end is among them.

    records: of each socket both ends, packed (plan/tuples.py); empty where it has none.
    """
    some = Connections.of_records(records)
    if not some.may_be_with_themselves():  # as a rule, and told without a look at each
        return sockets
    movable = [each.unkept in (None, LOOPBACK) and each.state in SYNCHRONIZED for each in sockets]
    here = frozenset(record for record, may in zip(records, movable, strict=True) if may)
    both = here.intersection(some.only(here).turned().each())
    within = [may and one in both for may, one in zip(movable, records, strict=True)]
    pairs = zip(sockets, map(or_, within, _speak_with_themselves(sockets)), strict=True)
    return tuple(replace(each, unkept=None, both_ends=True) if is_ else each for each, is_ in pairs)


def _speak_with_themselves(sockets: tuple[Socket, ...]) -> Iterator[bool]:
    """Of each, whether it is of UDP and its peer is another of them, connected or not."""
    udp = [each.protocol == "udp" and each.unkept in (None, LOOPBACK) for each in sockets]
    ends = {each.local for each, may in zip(sockets, udp, strict=True) if may and each.local}
    anywhere = {end.port for end in ends if end.address.is_unspecified}
    for each, may in zip(sockets, udp, strict=True):
        peer, local = each.peer, each.local
        if not may or peer is None or local is None:
            yield False
        else:
            yield peer in ends or (peer.address == local.address and peer.port in anywhere)


def shorten(error: Exception | str) -> str:
    """What *error* says, of 160 characters at most: it may quote a long line."""
    text = str(error)
    return text if len(text) <= 160 else text[:157] + "..."
