"""hold and replay of datagrams between real sockets: each once, whole, and in order.

    peer 10.1.0.2 ── veth ── destination 10.3.0.20 (NEW), which has OLD 10.2.0.10

The process's sockets are at OLD; rules of the test's own close the gate and translate.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cable_hosts import DEADLINE, NEW, OLD, PEER, Cable, cable

from natkeep.kernel import segment_holder
from natkeep.kernel.interface import Place
from natkeep.kernel.netns import inside
from natkeep.plan.move import Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import RECORD_SIZE, Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root
__all__ = ["cable"]

PORT, PEER_PORT = 53, 40_000
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
UDP_SEGMENT = 103
SO_RCVBUFFORCE = 33

EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
CONNECTED_OR_SERVER = pytest.mark.parametrize("server", [False, True])

RULES = """
table inet gate {
    chain gate {
        type filter hook prerouting priority -350
        meta mark 0xc114 notrack accept
        udp dport 53 drop
    }
    chain translate {
        type filter hook prerouting priority -300
        meta mark 0xc114 accept
        ip daddr 10.3.0.20 udp dport 53 notrack ip daddr set 10.2.0.10
        ip6 daddr fd00:3::20 udp dport 53 notrack ip6 daddr set fd00:2::10
    }
    chain defragmented {
        type filter hook prerouting priority 0
        ct state established
    }
}
"""


class Network(Cable):
    """The gate closed."""

    def hold(
        self, *versions: int, server: bool = False, tcp: segment_holder.Kept | None = None
    ) -> None:
        kept = [(version, *make_records(version, server=server)) for version in versions]
        place = Place(Site(Role.DESTINATION, self.names[1]), self.site, self.state)
        self.end_with_test(segment_holder.start(place, "web", tcp or [], udp=kept))

    def speak(self, version: int, port: int = PEER_PORT) -> socket.socket:
        """A peer's socket, which talks to NEW."""
        with inside(self.peer):
            sock = self.stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM))
            sock.bind((str(PEER[version]), port))
            sock.connect((str(NEW[version]), PORT))
        return sock

    def restore(self, version: int, *, server: bool = False) -> socket.socket:
        """The process's socket."""
        with inside(self.site):
            sock = self.stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((str(OLD[version]), PORT))
            if not server:
                sock.connect((str(PEER[version]), PEER_PORT))
        return sock

    def open(self) -> segment_holder.Held | None:
        segment_holder.deliver_datagrams(self.state, "web")
        self.run(self.names[1], "nft", "flush", "chain", "inet", "gate", "gate")
        return segment_holder.deliver(self.state, "web")


def make_records(version: int, *, server: bool = False) -> tuple[bytes, bytes]:
    """Those of the process's socket: as datagrams arrive, and as they are known."""
    kept = Connections.of(
        [FourTuple(Endpoint(PEER[version], PEER_PORT), Endpoint(OLD[version], PORT))]
    )
    half = RECORD_SIZE[version] // 2
    records = [kept.toward(NEW[version]).records(version), kept.records(version)]
    arriving, known = (one[:half] + bytes(half) if server else one for one in records)
    return arriving, known


@pytest.fixture
def network(cable: Cable, tmp_path: Path, require: Callable[[str], None]) -> Network:
    """OLD and the rules at the destination."""
    require("powers")  # sockets are bound below 1024, by the test and not by natkeep
    made = Network(**vars(cable))
    site = made.names[1]
    made.run(site, "ip", "address", "add", f"{OLD[4]}/32", "dev", "lo")
    made.run(site, "ip", "address", "add", f"{OLD[6]}/128", "dev", "lo", "nodad")
    (tmp_path / "rules").write_text(RULES)
    made.run(site, "nft", "-f", str(tmp_path / "rules"))
    return made


def read_all(sock: socket.socket, count: int) -> list[tuple[bytes, tuple[str, int]]]:
    """What has arrived: *count* datagrams and senders, and whatever comes in excess at once."""
    found, deadline = [], time.monotonic() + DEADLINE
    while True:
        wait = max(deadline - time.monotonic(), 0) if len(found) < count else 0.05
        if not select.select([sock], [], [], wait)[0]:
            assert len(found) >= count, f"{len(found)} of {count} datagrams arrived"
            return found
        data, sender = sock.recvfrom(1 << 17)
        found.append((data, sender[:2]))


@EACH_VERSION
@CONNECTED_OR_SERVER
def test_what_a_peer_said_at_a_closed_gate_arrives_once_and_in_order(
    network: Network, version: int, server: bool
) -> None:
    network.hold(version, server=server)
    peer = network.speak(version)
    said = [b"%d" % (n // 2) for n in range(100)]  # two of each, which are two

    for data in said:
        peer.send(data)
    network.await_held(len(said))
    process = network.restore(version, server=server)
    held = network.open()
    peer.send(b"after")

    sender = str(PEER[version]), PEER_PORT
    assert read_all(process, len(said) + 1) == [(data, sender) for data in (*said, b"after")]
    assert held == segment_holder.Held(0, sum(map(len, said)), 0, len(said))


@EACH_VERSION
def test_what_a_peer_says_all_the_time_arrives_once_and_in_order(
    network: Network, version: int
) -> None:
    network.hold(version)
    peer, process, ended = network.speak(version), network.restore(version), threading.Event()
    # It reads only at the end; its usual buffer is full after 256, which a busy machine reaches.
    process.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
    said = []

    def speak() -> None:
        while not ended.is_set():
            peer.send(b"%d" % len(said))
            said.append(len(said))
            time.sleep(0.001)

    thread = threading.Thread(target=speak)
    thread.start()
    try:
        network.await_held(50)
        held = network.open()
        time.sleep(0.05)
    finally:
        ended.set()
        thread.join()

    heard = [int(data) for data, _ in read_all(process, 51)]
    assert held is not None
    assert heard[: held.datagrams] == [*range(held.datagrams)]
    # What was sent while the gate was being opened is lost, and nothing else.
    assert heard[held.datagrams :] == [*range(heard[held.datagrams], len(said))]


@EACH_VERSION
def test_peers_that_nothing_was_known_of_are_held_for_a_server(
    network: Network, version: int
) -> None:
    network.hold(version, server=True)
    peers = [network.speak(version, PEER_PORT + n) for n in range(3)]

    for peer in peers:
        peer.send(b"a question")
    network.await_held(3)
    process = network.restore(version, server=True)
    network.open()

    senders = [(str(PEER[version]), PEER_PORT + n) for n in range(3)]
    assert read_all(process, 3) == [(b"a question", sender) for sender in senders]


@EACH_VERSION
def test_a_datagram_of_many_fragments_arrives_whole(network: Network, version: int) -> None:
    network.hold(version)
    peer, data = network.speak(version), os.urandom(6000)

    peer.send(data)
    network.await_held(1)
    process = network.restore(version)
    network.open()
    peer.send(data[::-1])

    assert [data for data, _ in read_all(process, 2)] == [data, data[::-1]]


@EACH_VERSION
def test_datagrams_that_the_sender_has_handed_over_as_one_arrive_one_by_one(
    network: Network, version: int
) -> None:
    network.hold(version)
    peer, data = network.speak(version), os.urandom(2500)
    peer.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, 1000)

    peer.send(data)
    network.await_held(3)
    process = network.restore(version)
    network.open()

    expected = [data[:1000], data[1000:2000], data[2000:]]
    assert [data for data, _ in read_all(process, 3)] == expected


@CONNECTED_OR_SERVER
def test_without_a_socket_nothing_is_delivered_and_nothing_answered(
    network: Network, server: bool
) -> None:
    network.hold(4, server=server)
    peer = network.speak(4)

    peer.send(b"x")
    network.await_held(1)
    segment_holder.deliver_datagrams(network.state, "web")
    held = segment_holder.deliver(network.state, "web")

    assert held is not None
    assert held.datagrams == 0
    assert not select.select([peer], [], [], 0.2)[0]  # no error either


def test_an_opening_that_does_not_wait_any_longer_gets_none(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.hold(4)
    peer = network.speak(4)
    peer.send(b"x")
    network.await_held(1)
    process = network.restore(4)

    with monkeypatch.context() as patch:
        patch.setattr(segment_holder, "PATIENCE", -1.0)
        patch.setattr(socket.socket, "settimeout", lambda sock, seconds: None)
        segment_holder.deliver_datagrams(network.state, "web")
    peer.send(b"y")
    held = network.open()

    assert held == segment_holder.Held(0, 0, 1, 0)
    assert not select.select([process], [], [], 0.2)[0]


@pytest.mark.parametrize("tcp", [(), (4,), (6,), (4, 6)])
def test_both_families_are_held_whatever_else_is(network: Network, tcp: tuple[int, ...]) -> None:
    network.hold(4, 6, tcp=[(version, *make_records(version)) for version in tcp])
    peers = {version: network.speak(version) for version in (4, 6)}

    for version, peer in peers.items():
        peer.send(b"%d" % version)
    network.await_held(2)
    processes = {version: network.restore(version) for version in (4, 6)}
    network.open()

    for version, process in processes.items():
        assert [data for data, _ in read_all(process, 1)] == [b"%d" % version]
