"""freezing and re-creating live connections, across namespaces that hand over one address.

peer 10.77.0.1 ── veth ── source 10.77.0.10          the veth's end, and with it the address,
                    └──── destination 10.77.0.10     moves from one to the other
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from natkeep.kernel.netns import Namespace, inside, open_namespace
from natkeep.lab import tcp_repair
from natkeep.lab.tcp_repair import RepairError, RepairSocket, SocketState, TcpState

FAMILIES = ("IPv4", "IPv6", "IPv4-mapped")
PORTS = range(5000, 5100)  # of the socket under test
PEER = {4: "10.77.0.1", 6: "fd77::1"}
LOCAL = {4: "10.77.0.10", 6: "fd77::10"}
PATIENCE = 5.0  # s, for everything that happens at once unless it is broken
FIN, RST, ACK = 1, 4, 16
FIN_WAIT2, CLOSE, CLOSE_WAIT, CLOSING = 5, 7, 8, 11

root = pytest.mark.root


class Segment(NamedTuple):
    """What a frame at the peer says; `ours`: it comes from the socket under test."""

    ours: bool
    flags: int
    seq: int
    length: int
    tsval: int | None


class Site(NamedTuple):
    name: str
    namespace: Namespace

    def run(self, *command: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.name, *command], check=True)


class Pair(NamedTuple):
    """A connection: `server` is the socket under test."""

    family: str
    server: Any
    client: socket.socket


class Network:
    """The drawing at the top; `tap` sees every frame at the peer's interface."""

    def __init__(self, make_netns: Callable[[], str]) -> None:
        self.peer, self.source, self.destination = (
            Site(name, open_namespace(name)) for name in (make_netns() for _ in range(3))
        )
        self.peer.run("ip", "link", "add", "p0", "type", "veth", "peer", "name", "h0",
                      "netns", self.source.name)  # fmt: skip
        self._address(self.peer, "p0", PEER)
        self._address(self.source, "h0", LOCAL)
        # A new socket knows no round trip: 3 s until it repeats what was lost. Capped where the
        # kernel can (6.15), with the tail loss probe, which would come first, out of the way.
        for setting in ("tcp_early_retrans=0", "tcp_rto_max_ms=1000"):
            self.destination.run("sysctl", "-eqw", f"net.ipv4.{setting}")
        self.ports = iter(PORTS)
        with inside(self.peer.namespace):
            self.tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self.tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.tap.bind(("p0", 3))
        self.tap.settimeout(PATIENCE)

    @staticmethod
    def _address(site: Site, device: str, addresses: dict[int, str]) -> None:
        site.run("ip", "link", "set", device, "up")
        site.run("ip", "addr", "add", f"{addresses[4]}/24", "dev", device)
        site.run("ip", "addr", "add", f"{addresses[6]}/64", "dev", device, "nodad")

    def move_address(self) -> None:
        self.source.run("ip", "link", "set", "h0", "netns", self.destination.name)
        self._address(self.destination, "h0", LOCAL)

    @contextlib.contextmanager
    def deaf(self, site: Site) -> Iterator[None]:
        """No TCP segment reaches *site* while the block runs, forged ones excepted."""
        site.run("nft", "add table inet deaf; add chain inet deaf input "
                 "{ type filter hook input priority 0; }; "
                 "add rule inet deaf input meta l4proto tcp meta mark != 0xc114 drop")  # fmt: skip
        yield
        site.run("nft", "delete table inet deaf")

    def connect(self, family: str = "IPv4") -> Pair:
        """A connection: the socket under test, accepted at the source, and the peer's."""
        port, version = next(self.ports), 6 if family == "IPv6" else 4
        with inside(self.source.namespace):
            if family == "IPv4":
                listener = socket.create_server((LOCAL[4], port))
            else:
                listener = socket.create_server(
                    ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
                )
        with inside(self.peer.namespace):
            client = socket.create_connection((LOCAL[version], port), timeout=PATIENCE)
        server, _ = listener.accept()
        server.settimeout(PATIENCE)
        listener.close()
        return Pair(family, server, client)

    def connect_all(self) -> list[Pair]:
        """One of each family: they wait for the kernel's timers at the same time."""
        return [self.connect(family) for family in FAMILIES]

    def move(self, pairs: list[Pair]) -> list[tuple[SocketState, Pair]]:
        """Freeze the sockets under test, move the address, re-create them; still in tcp_repair."""
        states = [freeze_and_close(pair.server) for pair in pairs]
        # Or what the peer sends again in between meets the address without a socket: RST.
        with self.deaf(self.destination):
            self.move_address()
            moved = [self.recreate(state) for state in states]
        return [
            (state, Pair(pair.family, sock, pair.client))
            for state, pair, sock in zip(states, pairs, moved, strict=True)
        ]

    def recreate(self, state: SocketState) -> RepairSocket:
        with inside(self.destination.namespace):
            sock = tcp_repair.recreate(state)
        sock.settimeout(PATIENCE)
        return sock

    def seen(self) -> list[Segment]:
        """The segments since the last call."""
        self.tap.setblocking(False)
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                if (segment := parse(self.tap.recv(65536))) is not None:
                    found.append(segment)
        self.tap.settimeout(PATIENCE)
        return found

    def await_segment(self) -> Segment:
        while True:
            if (segment := parse(self.tap.recv(65536))) is not None:
                return segment


def parse(frame: bytes) -> Segment | None:
    ethertype = frame[12:14]
    if ethertype == b"\x08\x00" and frame[23] == socket.IPPROTO_TCP:
        tcp, length = 34, int.from_bytes(frame[16:18], "big") - 20
    elif ethertype == b"\x86\xdd" and frame[20] == socket.IPPROTO_TCP:
        tcp, length = 54, int.from_bytes(frame[18:20], "big")
    else:
        return None
    sport, _, seq, _, offset, flags = struct.unpack_from("!HHIIBB", frame, tcp)
    header = (offset >> 4) * 4
    # Linux writes the timestamps of an established connection right behind two NOPs.
    stamped = header >= 32 and frame[tcp + 20 : tcp + 24] == b"\x01\x01\x08\x0a"
    tsval = int.from_bytes(frame[tcp + 24 : tcp + 28], "big") if stamped else None
    return Segment(sport in PORTS, flags, seq, length - header, tsval)


@pytest.fixture
def network(make_netns: Callable[[], str]) -> Network:
    return Network(make_netns)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def await_true(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def await_tcp_state(sock: socket.socket, number: int) -> None:
    await_true(lambda: sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == number)


def await_readable(sock: socket.socket, count: int) -> None:
    await_true(lambda: len(sock.recv(count, socket.MSG_PEEK)) == count)


def freeze_and_close(sock: socket.socket) -> SocketState:
    """The state, after a journey as JSON; the socket is gone."""
    state = tcp_repair.freeze(sock)
    sock.close()
    again = SocketState.from_text(state.to_text())
    assert state == again
    return again


def assert_talks(sock: socket.socket, peer: socket.socket) -> None:
    """Both directions work, and both ends come to a clean end."""
    peer.sendall(b"question")
    assert read_exactly(sock, 8) == b"question"
    sock.sendall(b"answer")
    assert read_exactly(peer, 6) == b"answer"
    sock.shutdown(socket.SHUT_WR)
    assert peer.recv(1) == b""
    peer.close()
    assert sock.recv(1) == b""
    sock.close()


SENT = bytes(i % 251 for i in range(60_000))  # more than a first window, less than the buffer


@root
def test_connections_with_full_queues_go_on_elsewhere(network: Network) -> None:
    """Unread, unacknowledged and unsent octets all arrive, once and in order; probe or not."""
    pairs = network.connect_all() + network.connect_all()
    for pair in pairs:
        pair.client.sendall(b"not read yet")
        await_readable(pair.server, 12)
    with network.deaf(network.peer):
        for pair in pairs:
            pair.server.sendall(SENT)
        moved = network.move(pairs)
    for (_, probed), (_, silent) in zip(moved[:3], moved[3:], strict=True):
        tcp_repair.leave_repair(probed.server)
        tcp_repair.leave_repair_silently(silent.server)

    for state, pair in moved:
        assert state.family == pair.family
        assert state.unread == b"not read yet"
        assert state.unacknowledged + state.unsent == SENT
        assert state.unacknowledged
        assert state.unsent
        assert read_exactly(pair.server, 12) == b"not read yet"
        assert read_exactly(pair.client, len(SENT)) == SENT
        assert_talks(pair.server, pair.client)
    assert not any(segment.flags & RST for segment in network.seen())


@root
def test_acknowledgements_that_were_lost_are_no_loss(network: Network) -> None:
    """The peer has read what the source takes for unacknowledged: it does not read it twice."""
    pairs = network.connect_all()
    with network.deaf(network.source):
        for pair in pairs:
            pair.server.sendall(b"read already")
            assert read_exactly(pair.client, 12) == b"read already"
        moved = network.move(pairs)
    for _, pair in moved:
        tcp_repair.leave_repair(pair.server)

    for state, pair in moved:
        assert state.unacknowledged == b"read already"
        assert_talks(pair.server, pair.client)


@root
@pytest.mark.parametrize("family", FAMILIES)
def test_leaving_repair_sends_a_window_probe(network: Network, family: str) -> None:
    ((state, pair),) = network.move([network.connect(family)])
    before = network.seen()

    tcp_repair.leave_repair(pair.server)

    probe = network.await_segment()
    assert probe[:4] == (True, ACK, state.send_seq - 1, 0)
    # Neither the source's close nor the destination's connect was on the wire.
    assert not any(segment.flags & (FIN | RST) for segment in before)
    assert_talks(pair.server, pair.client)


@root
def test_leaving_repair_silently_sends_nothing(network: Network) -> None:
    """The first segment from the new socket is what the peer's own data provokes."""
    ((state, pair),) = network.move([network.connect()])
    network.seen()

    tcp_repair.leave_repair_silently(pair.server)
    pair.client.sendall(b"question")

    assert not network.await_segment().ours
    assert network.await_segment()[:4] == (True, ACK, state.send_seq, 0)
    assert read_exactly(pair.server, 8) == b"question"


@root
def test_the_timestamps_that_the_peer_sees_go_on(network: Network) -> None:
    before = network.connect()
    before.server.sendall(b"before")
    assert read_exactly(before.client, 6) == b"before"
    last = [segment.tsval for segment in network.seen() if segment.ours][-1]
    ((state, after),) = network.move([before])

    tcp_repair.leave_repair(after.server)

    first = network.await_segment().tsval
    assert state.timestamps
    assert last is not None
    assert first is not None
    assert 0 <= (first - last) % 2**32 < 10_000  # ms


@root
@pytest.mark.parametrize("family", FAMILIES)
def test_what_both_sides_agreed_upon_stays(network: Network, family: str) -> None:
    """A second freeze finds what the first one found, and segments are as large as before."""
    before = network.connect(family)
    before.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    before.server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 77)
    before.client.sendall(b"not read yet")
    await_readable(before.server, 12)
    segment_size = before.server.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
    ((state, after),) = network.move([before])
    tcp_repair.leave_repair_silently(after.server)
    segment_size_after = after.server.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)

    again = tcp_repair.freeze(after.server)

    assert dict(again.options)["keepidle"] == 77
    assert dict(again.options)["reuseaddr"] == 1
    assert segment_size == segment_size_after
    assert dataclasses.replace(again, timestamp=state.timestamp) == state


@root
def test_thawed_sockets_go_on_as_if_nothing_had_been(network: Network) -> None:
    pairs = network.connect_all()
    with network.deaf(network.peer):
        for pair in pairs:
            pair.server.sendall(SENT)
            state = tcp_repair.freeze(pair.server)
            tcp_repair.thaw(pair.server, state)
            assert state.unsent

    for pair in pairs:
        assert pair.server.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == 1
        assert read_exactly(pair.client, len(SENT)) == SENT
        assert_talks(pair.server, pair.client)


@root
@pytest.mark.parametrize("unread", [b"", b"not read yet"])
def test_close_wait_goes_on_to_send(network: Network, unread: bytes) -> None:
    """The peer has closed its side and still listens."""
    pairs = network.connect_all()
    for pair in pairs:
        pair.client.sendall(unread)
        pair.client.shutdown(socket.SHUT_WR)
        await_tcp_state(pair.server, CLOSE_WAIT)
    moved = network.move(pairs)

    for state, pair in moved:
        tcp_repair.leave_repair(pair.server)
        assert state.tcp_state is TcpState.CLOSE_WAIT
        assert read_exactly(pair.server, len(unread) + 1) == unread
        pair.server.sendall(b"still here")
        assert read_exactly(pair.client, 10) == b"still here"
        pair.server.close()
        assert pair.client.recv(1) == b""
    assert not any(segment.flags & RST for segment in network.seen())


@root
def test_fin_wait2_goes_on_to_receive(network: Network) -> None:
    """We have closed our side, the peer knows, and still sends."""
    pairs = network.connect_all()
    for pair in pairs:
        pair.server.sendall(b"last words")
        pair.server.shutdown(socket.SHUT_WR)
        await_tcp_state(pair.server, FIN_WAIT2)
    moved = network.move(pairs)

    for state, pair in moved:
        tcp_repair.leave_repair(pair.server)
        assert state.tcp_state is TcpState.FIN_WAIT2
        assert read_exactly(pair.client, 11) == b"last words"
        pair.client.sendall(b"still here")
        assert read_exactly(pair.server, 10) == b"still here"
        pair.client.close()
        assert pair.server.recv(1) == b""
    assert not any(segment.flags & RST for segment in network.seen())


@root
def test_fin_wait1_sends_its_fin_again(network: Network) -> None:
    """Nothing of our last words arrived; behind 60,000 octets the FIN was not even sent."""
    pairs = network.connect_all() + network.connect_all()
    sizes = [10] * 3 + [len(SENT)] * 3
    with network.deaf(network.peer):
        for size, pair in zip(sizes, pairs, strict=True):
            pair.server.sendall(SENT[:size])
            pair.server.shutdown(socket.SHUT_WR)
        moved = network.move(pairs)
    for _, pair in moved:
        tcp_repair.leave_repair(pair.server)

    for size, (state, pair) in zip(sizes, moved, strict=True):
        assert state.tcp_state is TcpState.FIN_WAIT1
        assert state.fin_unsent == (size == len(SENT))
        assert read_exactly(pair.client, size + 1) == SENT[:size]
        pair.client.sendall(b"still here")
        assert read_exactly(pair.server, 10) == b"still here"
        pair.client.close()
        assert pair.server.recv(1) == b""


@root
def test_both_sides_closed_comes_to_its_end(network: Network) -> None:
    """Our FIN is lost, the peer's is there: LAST_ACK where it was first, CLOSING elsewhere."""
    last_ack, closing = network.connect_all(), network.connect_all()
    for pair in last_ack:
        pair.client.shutdown(socket.SHUT_WR)
        await_tcp_state(pair.server, CLOSE_WAIT)
    with network.deaf(network.peer):
        for pair in last_ack + closing:
            pair.server.sendall(b"last words")
            pair.server.shutdown(socket.SHUT_WR)
        for pair in closing:
            pair.client.shutdown(socket.SHUT_WR)
            await_tcp_state(pair.server, CLOSING)
        moved = network.move(last_ack + closing)
        expected = [TcpState.LAST_ACK] * 3 + [TcpState.CLOSING] * 3
        assert [state.tcp_state for state, _ in moved] == expected
        assert [tcp_repair.freeze(pair.server).tcp_state for _, pair in moved] == expected
    for _, pair in moved:
        tcp_repair.leave_repair(pair.server)

    for _, pair in moved:
        assert read_exactly(pair.client, 11) == b"last words"
        await_tcp_state(pair.server, CLOSE)  # all acknowledged
    assert not any(segment.flags & RST for segment in network.seen())


# A process that holds an accepted connection, and says when
@root
def test_without_the_old_address_the_error_says_so(network: Network) -> None:
    for family, command in [("IPv4", "/32 dev lo"), ("IPv6", "/128 dev lo nodad")]:
        pair = network.connect(family)
        state = freeze_and_close(pair.server)

        with pytest.raises(RepairError, match="cannot bind") as caught:
            network.recreate(state)

        assert caught.value.hint is not None
        assert command in caught.value.hint


@root
def test_without_a_route_to_the_peer_the_error_says_so(network: Network) -> None:
    pair = network.connect()
    state = freeze_and_close(pair.server)
    network.destination.run("ip", "addr", "add", LOCAL[4], "dev", "lo")

    with pytest.raises(RepairError, match="Network is unreachable") as caught:
        network.recreate(state)

    assert "a route from 10.77.0.10 to 10.77.0.1" in str(caught.value.hint)


@root
def test_two_sockets_of_one_connection_are_refused(network: Network) -> None:
    pair = network.connect()
    state = tcp_repair.freeze(pair.server)

    with inside(network.source.namespace), pytest.raises(RepairError) as caught:
        tcp_repair.recreate(state)

    assert "another socket" in str(caught.value.hint)
    tcp_repair.thaw(pair.server, state)
    assert_talks(pair.server, pair.client)


@root
def test_a_socket_leaves_repair_once(network: Network) -> None:
    """Twice would send the unsent data twice."""
    ((_, pair),) = network.move([network.connect()])
    tcp_repair.leave_repair(pair.server)

    with pytest.raises(RepairError, match="has left repair"):
        tcp_repair.leave_repair_silently(pair.server)


def test_what_is_no_connection_is_refused() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, pytest.raises(RepairError, match="cannot be moved"):
        tcp_repair.freeze(listener)
    datagrams = socket.socket(type=socket.SOCK_DGRAM)
    with datagrams, pytest.raises(RepairError, match="no TCP socket"):
        tcp_repair.freeze(datagrams)


def test_a_state_goes_through_text() -> None:
    assert SocketState.from_text(EXAMPLE.to_text()) == EXAMPLE


EXAMPLE = SocketState(
    family=tcp_repair.Family.IPV4,
    local=(tcp_repair.ipaddress.IPv4Address("10.2.0.10"), 5000),
    peer=(tcp_repair.ipaddress.IPv4Address("10.1.0.2"), 50594),
    tcp_state=TcpState.ESTABLISHED,
    send_seq=2**32 - 1,
    unacknowledged=b"\0\xff",
    unsent=b"",
    fin_unsent=False,
    receive_seq=0,
    unread=b"unread",
    mss=1460,
    window_scales=None,
    sack=True,
    timestamps=False,
    timestamp=1,
    window=tcp_repair.Window(1, 2, 3, 4, 5),
    buffers=tcp_repair.Buffers(1, 2, 3),
    options=(("nodelay", 1),),
)
