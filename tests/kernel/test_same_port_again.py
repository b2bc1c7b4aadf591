"""a kept connection has ended, and its peer dials again from the same port: mode stateless.

    peer 10.1.0.2 ── gateway ─┬─ old host 10.2.0.10 (OLD), which serves again
                              └─ destination 10.3.0.20 (NEW), which may have a service of its own

Both ends of the kept connection are re-created by TCP_REPAIR; what comes after it is dialled.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address

import pytest
from socket_state import make_state

from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import Namespace, inside, open_namespace
from natkeep.lab import tcp_repair
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

pytestmark = [pytest.mark.root, pytest.mark.needs("powers")]

Run = Callable[..., str]

PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
OLD = {4: ip_address("10.2.0.10"), 6: ip_address("fd00:2::10")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
PORT, PEER_PORT = 80, 50594
DEADLINE = 20.0  # s; a SYN comes again after 1, 3 and 7 s
ENDS = ["the process closes", "the peer resets", "the peer is gone"]


@dataclass
class Network:
    """The namespaces by role, and their names."""

    names: dict[str, str]
    spaces: dict[str, Namespace]
    stack: contextlib.ExitStack

    def keep(self, version: int) -> tuple[socket.socket, socket.socket]:
        """Both ends, peer and process, of a connection that has been kept."""
        peer, local = Endpoint(PEER[version], PEER_PORT), Endpoint(OLD[version], PORT)
        sites = tuple(Site(role, self.names[role]) for role in (Role.GATEWAY, Role.DESTINATION))
        move = Move("web", (Map(OLD[version], NEW[version]),), sites, Mode.STATELESS)
        plan = make_plan(move, Connections.of([FourTuple(peer, local)]))
        kernel = LinuxKernel()
        kernel.open_sites(sites)
        self.stack.callback(kernel.close_sites, sites)
        for step in plan.steps:
            kernel.apply(step, lambda prior: None)
        near = self._make("peer", make_state(peer, local, 1000, 5000))
        far = self._make("destination", make_state(local, peer, 5000, 1000))
        far.send(b"kept")
        assert near.recv(9) == b"kept"
        return near, far

    def _make(self, role: str, state: tcp_repair.SocketState) -> socket.socket:
        with inside(self.spaces[role]):
            sock = self.stack.enter_context(tcp_repair.recreate(state))
        tcp_repair.leave_repair_silently(sock)
        sock.settimeout(DEADLINE)
        return sock

    def listen(self, role: str, end: Endpoint) -> socket.socket:
        family = socket.AF_INET if end.address.version == 4 else socket.AF_INET6
        with inside(self.spaces[role]):
            listener = socket.create_server((str(end.address), end.port), family=family)
        self.stack.enter_context(listener).settimeout(DEADLINE)
        return listener

    def dial_again(self, end: Endpoint) -> socket.socket:
        with inside(self.spaces["peer"]):
            again = socket.socket(socket.AF_INET if end.address.version == 4 else socket.AF_INET6)
        self.stack.enter_context(again).settimeout(DEADLINE)
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind((str(PEER[end.address.version]), PEER_PORT))
        again.connect((str(end.address), end.port))
        return again


@pytest.fixture
def network(make_netns: Callable[[], str], run: Run) -> Iterator[Network]:
    names = {role: make_netns() for role in ("peer", "gateway", "old", "destination")}
    for number, (role, own) in enumerate((("peer", PEER), ("old", OLD), ("destination", NEW)), 1):
        to = f"to-{role}"
        run(names[role], "ip", "link", "add", "eth0", "type", "veth",
            "peer", "name", to, "netns", names["gateway"])  # fmt: skip
        ends = ((names[role], "eth0", own), (names["gateway"], to, None))
        for netns, device, addresses in ends:
            run(netns, "ip", "link", "set", device, "up")
            four = addresses[4] if addresses else f"10.{number}.0.1"
            six = addresses[6] if addresses else f"fd00:{number}::1"
            run(netns, "ip", "address", "add", f"{four}/24", "dev", device)
            run(netns, "ip", "address", "add", f"{six}/64", "dev", device, "nodad")
        run(names[role], "ip", "route", "add", "default", "via", f"10.{number}.0.1")
        run(names[role], "ip", "-6", "route", "add", "default", "via", f"fd00:{number}::1")
    run(names["gateway"], "sysctl", "-qw", "net.ipv4.ip_forward=1")
    run(names["gateway"], "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
    with contextlib.ExitStack() as stack:
        spaces = {role: open_namespace(name) for role, name in names.items()}
        for space in spaces.values():
            stack.callback(os.close, space.fd)
        yield Network(names, spaces, stack)


def end(how: str, near: socket.socket, far: socket.socket) -> None:
    """None of the peer's is left, which would hold its port; the process's may be in TIME-WAIT."""
    if how == "the process closes":
        far.close()
        assert near.recv(1) == b""
        near.close()
    elif how == "the peer resets":
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        near.close()
        with pytest.raises(ConnectionResetError):
            far.recv(1)
        far.close()
    else:
        near.setsockopt(socket.IPPROTO_TCP, 19, 1)  # closed in repair mode, it says nothing
        near.close()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("to", ["old", "destination"])
@pytest.mark.parametrize("how", ENDS)
def test_the_same_port_reaches_whom_it_dials(
    network: Network, version: int, to: str, how: str
) -> None:
    near, far = network.keep(version)
    end(how, near, far)
    called = Endpoint((OLD if to == "old" else NEW)[version], PORT)
    listener = network.listen(to, called)

    again = network.dial_again(called)
    own, _ = listener.accept()
    network.stack.enter_context(own).settimeout(DEADLINE)

    for one, other, text in ((again, own, b"question"), (own, again, b"answer")):
        one.sendall(text)
        assert other.recv(99) == text
    if how == "the peer is gone":  # its SYN was answered, and the reset for that ended it
        with pytest.raises(ConnectionResetError):
            far.recv(1)


def test_a_listener_that_came_back_at_old_alone_does_not_take_it(network: Network) -> None:
    near, far = network.keep(4)
    end("the peer resets", near, far)
    called = Endpoint(OLD[4], PORT)
    at_destination = network.listen("destination", called)
    listener = network.listen("old", called)

    again = network.dial_again(called)
    own, _ = listener.accept()
    again.sendall(b"question")

    with own:
        assert own.recv(99) == b"question"
    at_destination.settimeout(0)
    with pytest.raises(BlockingIOError):
        at_destination.accept()


def test_a_connection_that_lives_outlasts_a_syn_of_its_tuple(network: Network) -> None:
    """Of an attacker's who knows the tuple, and forges resets first."""
    scapy = pytest.importorskip("scapy.all")
    near, far = network.keep(4)
    with inside(network.spaces["peer"]):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    ip = scapy.IP(src=str(PEER[4]), dst=str(OLD[4]))
    with raw:
        for flags, seq in (("R", 7), ("RA", 0), ("S", 99), ("R", 0), ("S", 98), ("FA", 3)):
            tcp = scapy.TCP(sport=PEER_PORT, dport=PORT, flags=flags, seq=seq)
            raw.sendto(bytes(ip / tcp), (str(OLD[4]), 0))
    deadline = time.monotonic() + DEADLINE

    for one, other, text in ((near, far, b"question"), (far, near, b"answer")):
        one.sendall(text)
        assert other.recv(99) == text
        assert time.monotonic() < deadline
