"""A TCP peer that sends any segment, to sockets that are restored in place or behind a translator.

    client (mute kernel, raw sockets) ── gateway ──┬── source       OLD: sockets begin and stay here
                                                   └── destination  or go on here, still as OLD

Both ends are in this process. Each connection has a port of the peer's, plays its own row of steps,
and notes what the peer hears and what the application reads. All rows are played at once, a step
each a round. A round is over when a request and its answer have passed on one more connection, the
fence: the lab has one processor, so all that was sent before has been dealt with by then.

Rule: nothing waits for time to pass. An acknowledgement that is delayed is called for
(TCP_QUICKACK), and a step that takes a timer of the kernel's returns what ends the wait.
The old host has no lock: what reaches it untranslated is answered with a reset.
"""

from __future__ import annotations

import contextlib
import errno
import json
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import scapy.layers.inet as ipv4
import scapy.layers.inet6 as ipv6
from scapy.packet import Packet

from natkeep.kernel.netns import entered
from natkeep.lab import tcp_repair
from natkeep.lab.engine import Opening
from natkeep.lab.host import await_true
from natkeep.lab.topology import CLIENT, DESTINATION, SOURCE, Topology
from natkeep.lab.translators import TRANSLATORS, Order
from natkeep.plan.tuples import Endpoint, FourTuple

PATIENCE = 20.0  # s, for what takes one at most, unless it is broken
KEPT, LISTENING = 5000, 5001  # ports of OLD; at the second a listener moves along
FIRST_PORT = 40_000  # of the peer's
IN_PLACE = "in place"
MSS, SCALE = 1400, 4
MUCH = 10_000  # octets: how many a receive buffer has room for differs from time to time

Step = Callable[["Connection"], Callable[[], bool] | None]


class Connection:
    """One connection between the scripted peer and a socket of the application's."""

    def __init__(self, peer: Peer, port: int, service: int) -> None:
        self.peer, self.port, self.service = peer, port, service
        self.iss = self.seq = port * 1000  # seq: what the other end has acknowledged
        self.irs = self.ack = 0  # ack: the end of what was heard
        self.echo = 0  # the last timestamp that was heard
        self.heard: list[str] = []
        self._sent: set[tuple[str, int, int] | None] = set()  # what takes a number, once heard
        self.app: socket.socket | None = None
        self.reads = True
        self.read: list[str] = []

    # The peer

    def send(
        self, flags: str, data: bytes = b"", *, seq: int = 0, ack: int = 0, window: int = 5000,
        options: Sequence[tuple[str, object]] | None = None, late: int = 0, tos: int = 0,
        fragment: int = 0, **fields: object,
    ) -> None:  # fmt: skip
        """A segment; seq and ack are counted from what is next, late is its timestamp's age in ms.

        fragment: octets of each fragment that it is sent in; fields: others of scapy's TCP.
        """
        if options is None:
            stamp = (self.peer.clock() - late, self.echo)
            options = [("NOP", None), ("NOP", None), ("Timestamp", stamp)]
        tcp = ipv4.TCP(
            sport=self.port, dport=self.service, flags=flags, seq=(self.seq + seq) % 2**32,
            ack=(self.ack + ack) % 2**32 if "A" in flags else 0, window=window,
            options=options, **fields,
        )  # fmt: skip
        self.peer.emit(tcp / data, tos=tos, fragment=fragment)

    def send_error(self, octets: int, *, mtu: int = 0) -> None:
        """An ICMP error that quotes the last segment heard, of so many octets of data.

        mtu: what the path is too narrow for; else the port is unreachable.
        """
        old, own = str(self.peer.other), str(self.peer.own)
        seq = (self.ack - octets) % 2**32
        tcp = ipv4.TCP(sport=self.service, dport=self.port, seq=seq, ack=self.seq, flags="PA")
        if self.peer.family == 6:
            error = ipv6.ICMPv6PacketTooBig(mtu=mtu) if mtu else ipv6.ICMPv6DestUnreach(code=4)
            quoted = ipv6.IPv6(src=old, dst=own) / tcp / (b"w" * octets)
        else:
            error = ipv4.ICMP(type=3, code=4 if mtu else 3, nexthopmtu=mtu)
            quoted = ipv4.IP(src=old, dst=own, flags="DF") / tcp / (b"w" * octets)
        self.peer.emit(error / bytes(quoted)[:512])

    def dial(self, ahead: int = 0) -> None:
        """A SYN, whose number is so far ahead of what was used last."""
        self.iss = (self.seq + ahead) % 2**32
        self.send("S", seq=ahead, window=60_000, options=[
            ("MSS", MSS), ("SAckOK", b""), ("Timestamp", (self.peer.clock(), 0)),
            ("NOP", None), ("WScale", SCALE),
        ])  # fmt: skip

    def count_anew(self) -> None:
        """Forget what was heard; the notes count from the peer's next number."""
        self.heard.clear()
        self.iss = self.seq

    def hear(self, tcp: ipv4.TCP, where: str, length: int) -> None:
        """Note a segment; what can differ from run to run is not in the note."""
        flags, options = str(tcp.flags), dict(tcp.options)
        if flags == "SA":
            self.irs = tcp.seq
        if "R" not in flags:
            end = (tcp.seq + length + ("F" in flags) + ("S" in flags)) % 2**32
            if (end - self.ack) % 2**32 < 2**31 or flags == "SA":
                self.ack = end
            if "A" in flags and (tcp.ack - self.seq) % 2**32 < 2**31:
                self.seq = tcp.ack
        if "Timestamp" in options:
            self.echo = options["Timestamp"][0]
        shown = flags.replace("P", "")  # which of several segments is pushed is a question of time
        note = f"{shown} {self._from(tcp.seq, self.irs)}:{length}"
        note += f" ack {self._from(tcp.ack, self.iss)}" if "A" in flags else ""
        note += "".join(
            f" {name} {[self._from(edge, self.iss) for edge in value] if name == 'SAck' else value}"
            for name, value in options.items()
            if name in ("MSS", "WScale", "SAck")
        )
        note += "" if tcp.window or "R" in flags else " window 0"
        note += "" if "Timestamp" in options else " no timestamp"
        note += where
        # How often it is sent again, and what it acknowledges by then, is a question of time.
        sent = (shown, tcp.seq, length) if length or "F" in flags or "S" in flags else None
        if sent not in self._sent:
            self.heard.append(note)
        self._sent |= {sent} - {None}

    @staticmethod
    def _from(number: int, first: int) -> int:
        return (number - first + 2**31) % 2**32 - 2**31

    # The application

    def take(self) -> None:
        """Read what is there, note it, and have delayed acknowledgements sent."""
        if self.app is not None and self.app.fileno() < 0:  # it was closed
            self.app = None
        while self.app is not None and self.reads and self._read_once(self.app):
            pass
        if self.app is not None:
            with contextlib.suppress(OSError):
                self.app.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _read_once(self, app: socket.socket) -> bool:
        poll = select.poll()
        poll.register(app, select.POLLPRI)
        try:
            if any(events & select.POLLPRI for _, events in poll.poll(0)):
                self.read.append(f"urgent {app.recv(1, socket.MSG_OOB)!r}")
            data = app.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError as error:
            self.read.append(errno.errorcode[error.errno or 0])
            self.reads = False
            return False
        size = len(data) if len(data) < MUCH else "much"
        self.read.append(repr(data) if len(data) < 40 else f"{size} of {set(data)}")
        self.reads = bool(data)
        return self.reads


class Peer:
    """The client's end of all connections: raw sockets in its namespace."""

    def __init__(self, topology: Topology, family: int) -> None:
        self.family = family
        self.own, self.other = CLIENT.address(family), SOURCE.address(family)
        self.connections: dict[int, Connection] = {}
        self.packets = 0
        topology["client"].nft(
            "add table inet mute\n"
            "add chain inet mute input { type filter hook prerouting priority -400; }\n"
            "add rule inet mute input meta l4proto tcp drop\n"
        )
        version = socket.AF_INET if family == 4 else socket.AF_INET6
        with within(topology, "client"):
            self.out = socket.socket(version, socket.SOCK_RAW, socket.IPPROTO_RAW)
            self.tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM)
            self.tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
            self.tap.bind(("eth0", 0x0800 if family == 4 else 0x86DD))

    def clock(self) -> int:
        """The peer's timestamps, in ms."""
        return int(time.monotonic() * 1000) % 2**31

    def emit(self, payload: Packet, *, tos: int = 0, fragment: int = 0) -> None:
        """Send *payload* to OLD, perhaps in fragments of that many octets."""
        own, other = str(self.own), str(self.other)
        self.packets += 1
        if self.family == 4:
            flags = 0 if fragment else "DF"
            whole = ipv4.IP(src=own, dst=other, tos=tos, id=self.packets, flags=flags) / payload
            parts = ipv4.fragment(whole, fragment) if fragment else [whole]
        elif fragment:
            extension = ipv6.IPv6ExtHdrFragment(id=self.packets)
            whole = ipv6.IPv6(src=own, dst=other, tc=tos) / extension / payload
            parts = ipv6.fragment6(whole, fragment + 48)  # both headers' octets
        else:
            parts = [ipv6.IPv6(src=own, dst=other, tc=tos) / payload]
        for part in parts:
            self.out.sendto(bytes(part), (other, 0))

    def pump(self) -> None:
        """Give each connection what was heard for it."""
        while True:
            try:
                data, (*_, kind, _, _) = self.tap.recvfrom(1 << 17, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if kind != socket.PACKET_OUTGOING:
                self._hear(data)

    def _hear(self, data: bytes) -> None:
        ip = ipv4.IP(data) if self.family == 4 else ipv6.IPv6(data)
        where = "" if ip.src == str(self.other) else f" from {ip.src}"
        tos = ip.tos if self.family == 4 else ip.tc
        where += f" tos {tos:#x}" if tos else ""
        if ipv4.TCP in ip:
            tcp = ip[ipv4.TCP]
            if connection := self.connections.get(tcp.dport):
                header = tcp.dataofs * 4 + (ip.ihl * 4 if self.family == 4 else 0)
                length = (ip.len if self.family == 4 else ip.plen) - header
                connection.hear(tcp, where, length)
        elif ipv4.TCPerror in ip:
            quoted = ip[ipv4.TCPerror]
            if connection := self.connections.get(quoted.sport):
                connection.heard.append(f"{ip.summary()}{where}")


@contextlib.contextmanager
def within(topology: Topology, role: str) -> Iterator[None]:
    """Sockets that are made in the block are of that host's namespace."""
    with entered(topology.name(role)):
        yield


@dataclass(frozen=True, slots=True)
class Row:
    """What is done on one connection, a step a round; to which port of OLD it goes."""

    steps: tuple[Step, ...]
    service: int = KEPT


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of a row: segments that the peer heard, what the application read."""

    heard: tuple[str, ...]
    read: tuple[str, ...]


def observe(
    family: int, how: str, rows: Mapping[str, Row], *, flush: bool = False
) -> dict[str, Seen]:
    """Play *rows* on connections that were restored as *how* says, and tell what came of each.

    how: `in place`, or a translator and its mode: `natkeep stateful`. flush: before each round all
    conntrack entries at gateway and destination are deleted, and conntrack may pick up no
    connection in its midst (tcp_loose=0).
    """
    with Topology() as topology, contextlib.closing(Wire(topology, family)) as wire:
        connections = wire.open({name: row.service for name, row in rows.items()})
        wire.move(how)
        for number in range(max(len(row.steps) for row in rows.values())):
            if flush:
                wire.flush()
            at = [(row.steps[number], connections[name])
                  for name, row in rows.items() if number < len(row.steps)]  # fmt: skip
            wire.settle([wait for step, connection in at if (wait := step(connection))])
        return {name: Seen(tuple(it.heard), tuple(it.read)) for name, it in connections.items()}


class Wire:
    """The lab with all its connections, and one more, the fence, which tells the end of a round."""

    def __init__(self, topology: Topology, family: int) -> None:
        self.topology, self.old = topology, SOURCE.address(family)
        for role in ("source", "destination"):
            # Answers to what fits no window are limited in number, and so would depend on time.
            topology[role].run(
                "sysctl", "-eqw", "net.ipv4.tcp_invalid_ratelimit=0",
                "net.ipv4.tcp_challenge_ack_limit=2147483647",
            )  # fmt: skip
            # A frame a segment, so that the MSS can be seen.
            topology[role].run("ip", "link", "set", "eth0", "gso_max_segs", "1")
        self.peer = Peer(topology, family)
        self.listeners: dict[int, socket.socket] = {}

    def close(self) -> None:
        """Close all sockets, which would keep their namespaces."""
        apps = (each.app for each in self.connections if each.app)
        for each in (self.peer.out, self.peer.tap, *self.listeners.values(), *apps):
            each.close()

    @property
    def connections(self) -> list[Connection]:
        """All of them, the fence first."""
        return list(self.peer.connections.values())

    def open(self, services: Mapping[str, int]) -> dict[str, Connection]:
        """Open a connection of each name to that port of OLD."""
        for port in (KEPT, LISTENING):
            self._listen(port, "source")
        for number, service in enumerate((KEPT, *services.values()), FIRST_PORT):
            self.peer.connections[number] = Connection(self.peer, number, service)
        for each in self.connections:
            each.dial()
            self._pump_until(lambda each=each: bool(each.heard), "a SYN-ACK")
            each.send("A")
        self._pump_until(self._are_accepted, "all connections to be accepted")
        return dict(zip(services, self.connections[1:], strict=True))

    def move(self, how: str) -> None:
        """Freeze all sockets, and restore them in place or behind a translator."""
        states = []
        for listener in self.listeners.values():
            listener.close()
        self.listeners = {}
        for each in self.connections:
            assert each.app is not None
            states.append(tcp_repair.freeze(each.app))
            each.app.close()
        place, opening = "source", Opening(lambda: None)
        if how != IN_PLACE:
            translator, _, mode = how.partition(" ")
            place, order = "destination", self._order(mode)
            made = TRANSLATORS[translator](self.topology.directory)
            made.prepare(order)
            opening = made.opening(order)
        with within(self.topology, place):
            sockets = [tcp_repair.recreate(state) for state in states]
        opening.open()
        self._listen(LISTENING, place)
        for each, restored in zip(self.connections, sockets, strict=True):
            tcp_repair.leave_repair(restored)
            each.app = restored
        for each in self.connections:  # a reset of a peer that has said nothing is not believed
            each.send("PA", b"hello")
        for role in ("gateway", "destination"):  # natkeep takes open gates away afterwards
            await_true(lambda role=role: not self._has_gate(role), "the gates to go")
        self.settle([])
        for each in self.connections:
            each.heard.clear()
            each.read.clear()

    def settle(self, waits: Sequence[Callable[[], bool]]) -> None:
        """Until all that was sent has been dealt with, and all *waits* are true."""
        self._pass_fence()
        self._take()
        self._pass_fence()
        self._pump_until(lambda: all(wait() for wait in waits), "what a step waits for")

    def flush(self) -> None:
        """Delete all conntrack entries, and have conntrack make none but for a SYN."""
        for role in ("gateway", "destination"):
            self.topology[role].run("conntrack", "-F")
            self.topology[role].run("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_loose=0")

    def _has_gate(self, role: str) -> bool:
        chain = ("nft", "list", "chain", "inet", "natkeep", "gate")
        return not self.topology[role].run(*chain, check=False).returncode

    def _pass_fence(self) -> None:
        """One processor has brought all that was sent before to its end when this is answered."""
        fence = self.connections[0]
        assert fence.app is not None
        fence.send("PA", b"?")
        fence.app.settimeout(PATIENCE)
        assert fence.app.recv(1 << 16)
        before = fence.ack
        fence.app.sendall(b"!")
        self._pump_until(lambda: fence.ack != before, "the answer at the fence")

    def _take(self) -> None:
        for each in self.connections[1:]:
            each.take()
        for listener in self.listeners.values():
            with contextlib.suppress(BlockingIOError):
                while True:
                    accepted, (_, port, *_) = listener.accept()
                    connection = self.peer.connections[port]
                    connection.app, connection.reads = accepted, True
                    connection.read.append("accepted")

    def _are_accepted(self) -> bool:
        self._take()
        return all(each.app for each in self.connections)

    def _listen(self, port: int, place: str) -> None:
        family = socket.AF_INET if self.old.version == 4 else socket.AF_INET6
        with within(self.topology, place):
            listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((str(self.old), port))
        listener.listen(len(self.peer.connections) + 64)
        listener.setblocking(False)
        self.listeners[port] = listener

    def _order(self, mode: str) -> Order:
        """The move of all connections, and of the one listener that moves along."""
        listing = self.topology.directory / "sockets.json"
        own, sockets = self.peer.own, []
        tuples = [
            FourTuple(Endpoint(own, each.port), Endpoint(self.old, each.service))
            for each in self.connections
        ]
        for peer, local in ((it.source, it.destination) for it in tuples):
            sockets.append(describe("ESTABLISHED", local, peer))
        sockets.append(describe("LISTEN", Endpoint(self.old, LISTENING), None))
        listing.write_text(json.dumps({"schema": 1, "live": True, "sockets": sockets}))
        return Order(
            "wire", self.old, DESTINATION.address(self.old.version), self.topology["gateway"],
            self.topology["destination"], tuple(tuples), ("--connections", str(listing)), mode,
            listeners=True,
        )  # fmt: skip

    def _pump_until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not ready():
            assert time.monotonic() < deadline, f"waited {PATIENCE:g} s in vain for {what}"
            self.peer.pump()


def describe(state: str, local: Endpoint, peer: Endpoint | None) -> dict[str, object]:
    """A socket, as `natkeep inspect --live PID --json` prints it."""
    return {
        "protocol": "tcp", "state": state, "local": str(local), "peer": peer and str(peer),
        "device": None, "unsent": 0, "kept": True, "reason": None,
    }  # fmt: skip
