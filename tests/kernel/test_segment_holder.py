"""hold and replay between real sockets: what a peer says while the gate is closed arrives at open.

    peer 10.1.0.2 ── veth ── destination 10.3.0.20 (NEW), which will have OLD 10.2.0.10

The peer's socket is one that talks to NEW, as packets look behind the gateway; the process's
socket at OLD is re-created by TCP_REPAIR when the gate is about to open. Where the cable is cut
before that, nothing but the holder can have brought what the process reads.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cable_hosts import DEADLINE, NEW, OLD, PEER, Cable, cable
from running import is_running
from socket_state import make_state

from natkeep.kernel import daemon, segment_holder, segment_holderd
from natkeep.kernel.interface import Place
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import Namespace, inside
from natkeep.lab import tcp_repair
from natkeep.lab.tcp_repair import RepairSocket, SocketState
from natkeep.plan import replay
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import HoldSegments, OpenGate, Prior, Step
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root
__all__ = ["cable"]

PORT = 80
SEQ = {"peer": 2**32 - 700, "process": 5_000}

EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
EACH_MODE = pytest.mark.parametrize("mode", list(Mode))


@dataclass
class Network(Cable):
    """Both ends, a move that is prepared at the destination, and its holder."""

    kernel: LinuxKernel = field(default_factory=LinuxKernel)
    done: list[tuple[Step, Prior]] = field(default_factory=list)
    kept: Connections = field(default_factory=Connections)
    require: Callable[[str], None] = lambda name: None

    def prepare(self, *peers: Endpoint, mode: Mode = Mode.STATEFUL, hold: bool = False) -> None:
        """The gate closed, OLD there, everything translated: all but open."""
        self.kept = Connections.of(
            FourTuple(peer, Endpoint(OLD[peer.address.version], PORT)) for peer in peers
        )
        versions = sorted({peer.address.version for peer in peers})
        maps = tuple(Map(OLD[version], NEW[version]) for version in versions)
        move = Move("web", maps, (Site(Role.DESTINATION, self.names[1]),), mode, hold=hold)
        self.plan = make_plan(move, self.kept)
        self.kernel.open_sites(move.sites)
        self.apply(self.plan.prepare)

    def apply(self, steps: Any) -> None:
        for step in steps:
            self.done.append((step, self.kernel.apply(step, lambda prior: None)))

    def hold(self, *, age: int = segment_holder.AGE, move_id: str = "web") -> int:
        """Start the holder; its pid."""
        maps = [
            (v, self.kept.at(OLD[v]).toward(NEW[v]).records(v), self.kept.records(v))
            for v in (4, 6)
            if self.kept.records(v)
        ]
        place = Place(Site(Role.DESTINATION, self.names[1]), self.site, self.state)
        pid = segment_holder.start(place, move_id, maps, age)
        self.end_with_test(pid, move_id)
        return pid

    def connect(self, peer: Endpoint) -> RepairSocket:
        """The peer's socket, which talks to NEW."""
        to = Endpoint(NEW[peer.address.version], PORT)
        state = make_state(peer, to, SEQ["peer"], SEQ["process"])
        return self._make(self.peer, state, live=True)

    def restore(self, peer: Endpoint) -> RepairSocket:
        """The process's socket, at OLD, in repair: as it is when CRIU calls post-restore."""
        self.require("powers")  # the socket is bound below 1024, by the test and not by natkeep
        local = Endpoint(OLD[peer.address.version], PORT)
        return self._make(self.site, make_state(local, peer, SEQ["process"], SEQ["peer"]))

    def _make(self, where: Namespace, state: SocketState, *, live: bool = False) -> RepairSocket:
        with inside(where):
            sock = self.stack.enter_context(tcp_repair.recreate(state))
        if live:
            tcp_repair.leave_repair_silently(sock)
        return sock

    def cut_cable(self) -> None:
        self.run(self.names[0], "ip", "link", "set", "eth0", "down")

    def open(self) -> segment_holder.Held | None:
        """The gate opens, and what is held is delivered."""
        self.apply(step for step in self.plan.open if isinstance(step, OpenGate))
        return segment_holder.deliver(self.state, "web")


@pytest.fixture
def network(cable: Cable, require: Callable[[str], None]) -> Network:
    return Network(**vars(cable), require=require)


def read_all(sock: socket.socket, octets: int) -> bytes:
    """What has arrived: *octets*, and whatever comes in excess at once."""
    data, deadline = b"", time.monotonic() + DEADLINE
    while len(data) < octets:
        ready, _, _ = select.select([sock], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"{len(data)} of {octets} octets arrived"
        chunk = sock.recv(1 << 20)
        assert chunk, f"the peer closed after {len(data)} octets"
        data += chunk
    with contextlib.suppress(BlockingIOError):
        data += sock.recv(1 << 20, socket.MSG_DONTWAIT)
    return data


def await_end(pid: int) -> None:
    deadline = time.monotonic() + DEADLINE
    while is_running(pid):
        assert time.monotonic() < deadline, "the holder lives on"
        time.sleep(0.005)


@EACH_MODE
@EACH_VERSION
def test_what_a_peer_said_at_a_closed_gate_reaches_the_restored_socket(
    network: Network, version: int, mode: Mode
) -> None:
    end = Endpoint(PEER[version], 50594)
    network.prepare(end, mode=mode)
    network.hold()
    peer = network.connect(end)

    for word in (b"first,", b"second,", b"third"):
        peer.send(word)
    network.await_held(3)
    network.cut_cable()
    process = network.restore(end)
    delivered = network.open()
    tcp_repair.leave_repair_silently(process)

    assert read_all(process, 18) == b"first,second,third"
    assert delivered == segment_holder.Held(3, 18, 0)


@EACH_VERSION
def test_the_connection_goes_on_and_both_ends_agree(network: Network, version: int) -> None:
    end = Endpoint(PEER[version], 50594)
    network.prepare(end)
    network.hold()
    peer = network.connect(end)
    peer.send(b"question")
    network.await_held(1)

    process = network.restore(end)
    network.open()
    tcp_repair.leave_repair(process)
    asked = read_all(process, 8)
    process.send(b"answer")
    answered = read_all(peer, 6)
    peer.send(b"another")

    assert (asked, answered) == (b"question", b"answer")
    assert read_all(process, 7) == b"another"


def test_a_window_full_of_data_returns_whole_and_once(network: Network) -> None:
    end = Endpoint(PEER[4], 50594)
    network.prepare(end)
    network.hold()
    peer = network.connect(end)
    data = bytes(range(256)) * 240
    peer.setblocking(False)
    sent = peer.send(data)
    process = network.restore(end)
    held = network.await_held(2)
    network.open()
    tcp_repair.leave_repair(process)

    assert sent > held.octets > 10_000  # its congestion window, and what waits behind it
    assert read_all(process, sent) == data[:sent]


def test_a_peer_that_repeats_itself_is_heard_once(network: Network) -> None:
    end = Endpoint(PEER[4], 50594)
    network.prepare(end)
    network.hold()
    peer = network.connect(end)
    peer.send(b"Is anybody there?")
    network.await_held(1)
    first = _newest_number(peer)
    deadline = time.monotonic() + DEADLINE
    while _newest_number(peer) < first + 2:
        assert time.monotonic() < deadline, "the peer does not retransmit"
        time.sleep(0.005)
    held = segment_holder.look(network.state, "web")
    network.cut_cable()

    process = network.restore(end)
    delivered = network.open()
    tcp_repair.leave_repair_silently(process)

    assert held == delivered == segment_holder.Held(1, 17, 0)
    assert read_all(process, 17) == b"Is anybody there?"


def _newest_number(sock: socket.socket) -> int:
    """How often the kernel has sent something again (tcp_info.tcpi_total_retrans)."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int.from_bytes(info[100:104], "little")


def test_both_families_and_many_connections_each_get_their_own(network: Network) -> None:
    ends = [Endpoint(PEER[4 if n % 2 else 6], 40_000 + n) for n in range(60)]
    network.prepare(*ends)
    network.hold()
    peers = [network.connect(end) for end in ends]
    for number, peer in enumerate(peers):
        peer.send(b"I am %d." % number)
    network.await_held(60)
    network.cut_cable()
    processes = [network.restore(end) for end in ends]
    network.open()
    for process in processes:
        tcp_repair.leave_repair_silently(process)

    for number, process in enumerate(processes):
        expected = b"I am %d." % number
        assert read_all(process, len(expected)) == expected


def test_a_peer_that_closes_at_a_closed_gate_is_heard_to_close(network: Network) -> None:
    end = Endpoint(PEER[4], 50594)
    network.prepare(end)
    network.hold()
    peer = network.connect(end)
    peer.send(b"good bye")
    network.await_held(1)
    peer.shutdown(socket.SHUT_WR)
    network.await_held(2)
    network.cut_cable()

    process = network.restore(end)
    network.open()
    tcp_repair.leave_repair_silently(process)

    assert read_all(process, 8) == b"good bye"
    select.select([process], [], [], DEADLINE)
    assert process.recv(1) == b""


def test_others_at_new_are_not_held(network: Network) -> None:
    end, other = Endpoint(PEER[4], 50594), Endpoint(PEER[4], 50595)
    network.prepare(end)
    network.hold()
    stranger = network.connect(other)
    stranger.send(b"of no concern")
    peer = network.connect(end)
    peer.send(b"mine")

    held = network.await_held(1)

    assert held == segment_holder.Held(1, 4, 0)


# ---- as steps of a move --------------------------------------------------------------------------


def test_a_move_that_holds_delivers_when_its_gate_opens(network: Network) -> None:
    end = Endpoint(PEER[4], 50594)
    network.kernel = LinuxKernel(network.state)
    network.prepare(end, hold=True)
    network.stack.callback(_reap_all)
    peer = network.connect(end)
    peer.send(b"Is anybody there?")
    network.await_held(1)
    network.cut_cable()
    process = network.restore(end)

    network.apply(network.plan.open)
    tcp_repair.leave_repair_silently(process)

    assert read_all(process, 17) == b"Is anybody there?"
    assert network.done[-1][1] == Prior(facts={"segments": 1, "refused": 0})
    deadline = time.monotonic() + DEADLINE  # it answers first, and ends then
    while os.listdir(network.state):
        assert time.monotonic() < deadline, "the holder has left its socket"


def test_a_move_whose_holder_may_not_start_is_prepared_without_it(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(segment_holder, "_open_packets", refuse)
    network.kernel = LinuxKernel(network.state)

    network.prepare(Endpoint(PEER[4], 50594), hold=True)

    [prior] = [prior for step, prior in network.done if isinstance(step, HoldSegments)]
    assert prior == Prior(facts={"refused": "Operation not permitted"})
    network.apply(network.plan.open)
    assert network.done[-1][1] == Prior()


def _reap_all() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


# ---- what it never does ------------------------------------------------------------------------


class Wire:
    """What arrives at the peer's end of the cable from now on: destination and TCP flags."""

    def __init__(self, network: Network) -> None:
        with inside(network.peer):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(3))
        network.stack.callback(self.socket.close)
        self.socket.settimeout(DEADLINE)
        with inside(network.site):
            self.marker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        network.stack.callback(self.marker.close)

    def read(self) -> list[tuple[bytes, int]]:
        """All that was sent before the datagram that is sent last; TCP only."""
        self.marker.sendto(b"", (str(PEER[4]), 9))
        found = []
        while True:
            packet, about = self.socket.recvfrom(1 << 16)
            if about[1] == 0x0800 and packet[9] == 17:
                return found
            end, tcp = ((16, 20), 20) if about[1] == 0x0800 else ((24, 40), 40)
            if about[1] in (0x0800, 0x86DD) and packet[9 if tcp == 20 else 6] == 6:
                found.append((packet[slice(*end)], packet[tcp + 13]))


@EACH_VERSION
def test_what_has_no_socket_is_not_delivered_and_not_reset(network: Network, version: int) -> None:
    end = Endpoint(PEER[version], 50594)
    network.prepare(end)
    network.hold()
    network.connect(end).send(b"Is anybody there?")
    network.await_held(1)
    wire = Wire(network)

    with inside(network.site):
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        # It has the port, and no such connection.
        listener = socket.create_server((str(OLD[version]), PORT), family=family)
    network.stack.callback(listener.close)
    delivered = segment_holder.deliver(network.state, "web")

    assert delivered == segment_holder.Held(0, 0, 0)
    assert [flags for _, flags in wire.read() if flags & 0x04] == []


@EACH_VERSION
def test_where_old_is_not_local_any_more_nothing_goes_onto_a_wire(
    network: Network, version: int
) -> None:
    end = Endpoint(PEER[version], 50594)
    network.prepare(end)
    network.hold()
    network.connect(end).send(b"Is anybody there?")
    network.await_held(1)
    network.restore(end)  # has OLD, whether it is an address or not
    key = f"net.ipv{version}.conf.all.forwarding"
    network.run(network.names[1], "sysctl", "-qw", f"{key}=1")
    network.run(network.names[1], "nft", "flush", "ruleset")
    neighbour = (str(OLD[version]), "lladdr", "02:00:00:00:00:01", "dev", "eth0")
    network.run(network.names[1], "ip", "neighbour", "add", *neighbour)
    network.run(network.names[0], "ip", "link", "set", "eth0", "promisc", "on")
    wire = Wire(network)

    network.run(network.names[1], "ip", "address", "del", str(OLD[version]), "dev", "lo")
    segment_holder.deliver(network.state, "web")

    assert [to for to, _ in wire.read() if to == OLD[version].packed] == []


def test_a_segment_with_a_wrong_checksum_is_not_given_a_right_one(network: Network) -> None:
    scapy = pytest.importorskip("scapy.all")
    end = Endpoint(PEER[4], 50594)
    network.prepare(end)
    network.hold()
    with inside(network.peer):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    network.stack.callback(raw.close)
    head = scapy.IP(src=str(PEER[4]), dst=str(NEW[4]))
    tcp = scapy.TCP(sport=50594, dport=PORT, flags="PA", seq=SEQ["peer"], ack=SEQ["process"])
    tcp.options = [("NOP", None), ("NOP", None), ("Timestamp", (1, 1))]

    for payload, checksum in ((b"damaged", 0x1234), (b"whole", None)):
        tcp.chksum = checksum
        raw.sendto(bytes(head / tcp / payload), (str(NEW[4]), 0))
        tcp.seq += len(payload)

    assert network.await_held(1) == segment_holder.Held(1, 5, 0)


def test_a_packet_that_was_cut_is_not_held() -> None:
    sending, receiving = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiving.setblocking(False)
    holder = object.__new__(segment_holderd.Holder)
    holder.store, holder.buffer = replay.Store({}), bytearray(100)
    seen: list[bytes] = []
    holder.store.add = lambda packet, verify: seen.append(packet)  # type: ignore[method-assign]

    with sending, receiving:
        for size in (99, 100, 101, 200):
            sending.send(bytes(size))
        more = holder.take(receiving, 10)

    assert [len(packet) for packet in seen] == [99, 100]
    assert holder.store.refused == 2
    assert not more


def test_an_opening_does_not_wait_for_a_holder_that_does_not_answer(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_holder, "PATIENCE", 0.05)
    end = Endpoint(PEER[4], 50594)
    network.prepare(end)
    pid = network.hold()
    peer = network.connect(end)
    peer.send(b"Is anybody there?")
    network.await_held(1)
    process = network.restore(end)
    network.cut_cable()

    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    delivered = network.open()
    waited = time.monotonic() - began
    tcp_repair.leave_repair_silently(process)
    os.kill(pid, signal.SIGCONT)

    assert delivered is None
    assert waited < 1  # of 50 ms, on a busy machine
    assert read_all(process, 17) == b"Is anybody there?"


def test_one_that_is_too_late_delivers_nothing(network: Network) -> None:
    end = Endpoint(PEER[4], 50594)
    network.prepare(end)
    pid = network.hold(age=2)
    peer = network.connect(end)
    peer.send(b"Is anybody there?")
    network.await_held(1)
    process = network.restore(end)
    tcp_repair.leave_repair_silently(process)
    network.cut_cable()
    os.kill(pid, signal.SIGSTOP)
    expired = time.monotonic() + 2
    asking = socket.socket(socket.AF_UNIX)
    network.stack.callback(asking.close)
    asking.connect(os.path.join(network.state, "web.hold"))
    asking.sendall(b"deliver\n")
    while time.monotonic() < expired:
        time.sleep(0.05)

    os.kill(pid, signal.SIGCONT)
    await_end(pid)

    assert select.select([process], [], [], 0) == ([], [], [])


# ---- how long it lives -------------------------------------------------------------------------


def test_it_ends_when_it_has_delivered(network: Network) -> None:
    network.prepare(Endpoint(PEER[4], 50594))
    pid = network.hold()

    network.open()

    await_end(pid)
    assert not os.listdir(network.state)
    assert segment_holder.deliver(network.state, "web") is None


def test_it_ends_on_request_and_a_second_time_is_fine(network: Network) -> None:
    network.prepare(Endpoint(PEER[4], 50594))
    pid = network.hold()

    segment_holder.end(network.state, "web")
    await_end(pid)
    segment_holder.end(network.state, "web")

    assert not os.listdir(network.state)


def test_a_second_one_of_the_same_move_takes_its_place(network: Network) -> None:
    network.prepare(Endpoint(PEER[4], 50594))
    first = network.hold()

    second = network.hold()

    await_end(first)
    assert is_running(second)


def test_it_ends_when_it_is_old(network: Network) -> None:
    network.prepare(Endpoint(PEER[4], 50594))

    pid = network.hold(age=0)

    await_end(pid)


def test_it_ends_when_the_state_directory_knows_nothing_of_it_any_more(network: Network) -> None:
    network.prepare(Endpoint(PEER[4], 50594))
    pid = network.hold()
    segment_holder.look(network.state, "web")

    os.unlink(Path(network.state, "web.hold"))

    await_end(pid)


def test_it_ends_with_its_namespace(network: Network) -> None:
    network.prepare(Endpoint(PEER[4], 50594))
    pid = network.hold()
    segment_holder.look(network.state, "web")

    subprocess.run(["ip", "netns", "delete", network.names[1]], check=True)

    await_end(pid)


def test_a_namespace_that_has_lost_its_name_is_held_while_a_process_is_in_it(
    network: Network,
) -> None:
    network.prepare(Endpoint(PEER[4], 50594))
    inhabitant = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{network.names[1]}", "cat"], stdin=subprocess.PIPE
    )
    network.stack.callback(inhabitant.wait)
    assert inhabitant.stdin is not None
    network.stack.callback(inhabitant.stdin.close)
    where = f"/proc/{inhabitant.pid}/ns/net"
    deadline = time.monotonic() + DEADLINE
    while os.stat(where).st_ino != network.site.identity.inode:
        assert time.monotonic() < deadline
    pid = network.hold()
    subprocess.run(["ip", "netns", "delete", network.names[1]], check=True)

    # It looks every second: two looks on, it is still there, and then it is not.
    looked = time.monotonic() + 2.5
    while time.monotonic() < looked:
        assert is_running(pid)
        time.sleep(0.05)
    inhabitant.stdin.close()
    inhabitant.wait()
    await_end(pid)


def test_a_process_that_may_not_be_looked_at_may_be_in_a_namespace_without_a_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(path: str) -> os.stat_result:
        raise PermissionError(13, "Permission denied") if path.endswith("/ns/net") else OSError(2)

    watches = [
        daemon.Watch("web.hold", os.stat("/"), path, "1:2")
        for path in ("", "/run/netns/natkeep-test-nowhere")
    ]
    with monkeypatch.context() as patched:
        patched.setattr(daemon.os, "stat", refuse)
        found = [watch.is_inhabited() for watch in watches]

    assert found == [True, False]


def test_where_its_process_was_killed_the_move_does_without(network: Network) -> None:
    end = Endpoint(PEER[4], 50594)
    network.prepare(end)
    pid = network.hold()
    segment_holder.look(network.state, "web")

    os.kill(pid, signal.SIGKILL)
    await_end(pid)

    assert network.open() is None
    segment_holder.end(network.state, "web")
    assert not os.listdir(network.state)


def test_it_closes_what_it_has_inherited(network: Network) -> None:
    network.prepare(Endpoint(PEER[4], 50594))
    reading, writing = os.pipe()
    os.set_inheritable(writing, True)

    pid = network.hold()
    segment_holder.look(network.state, "web")
    os.close(writing)

    ready, _, _ = select.select([reading], [], [], DEADLINE)
    assert ready
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert is_running(pid)


def test_without_the_privilege_none_runs_and_nothing_is_left(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    network.prepare(Endpoint(PEER[4], 50594))

    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(segment_holder, "_open_raw", refuse)

    with pytest.raises(PermissionError):
        network.hold()
    assert not os.listdir(network.state)
    assert segment_holder.look(network.state, "web") is None


@pytest.mark.needs("powers")  # locking memory
def test_what_it_holds_is_never_written_to_a_disk(network: Network) -> None:
    network.prepare(Endpoint(PEER[4], 50594))
    pid = network.hold()
    segment_holder.look(network.state, "web")

    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    files = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]

    [core] = [line.split() for line in limits if line.startswith("Max core file size")]
    assert core[4:6] == ["0", "0"]
    assert int(status["VmLck"].split()[0]) > 0
    assert [f for f in files if not f.startswith(("socket:", "/dev/null", "/memfd:"))] == [
        network.state
    ]
