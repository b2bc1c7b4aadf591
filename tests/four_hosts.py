"""Four hosts around a router, real sockets of UDP in them, and moves of these.

    peer ── gateway ┬─ source (OLD)
                    └─ destination (NEW; OLD on lo)

The gateway tracks connections before anything is moved, as one with a firewall does.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from fake_kernel import revert_step
from two_hosts import run_ip

from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import entered
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lab.time_scale import scaled
from natkeep.lifecycle.executor import Executor
from natkeep.plan.maps import Map
from natkeep.plan.move import Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.steps import Prior, Step
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple
from natkeep.state.directory import StateDirectory
from natkeep.values import replace

Run = Callable[..., str]

_NETWORK = """
-n {gateway} link set lo up
-n {source} link set lo up
-n {destination} link set lo up
link add out netns {gateway} type veth peer name eth0 netns {peer}
link add old netns {gateway} type veth peer name eth0 netns {source}
link add new netns {gateway} type veth peer name eth0 netns {destination}
"""
_LINKS = (("out", "peer", 1, 2), ("old", "source", 2, 10), ("new", "destination", 3, 20))
PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
OLD = {4: ip_address("10.2.0.10"), 6: ip_address("fd00:2::10")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
PORT, PEER_PORT = 5000, 50594
TRACKS = (
    "add table inet fw; add chain inet fw in { type filter hook prerouting priority -100; }; "
    "add rule inet fw in ct state new counter"
)
EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
EACH_KIND = pytest.mark.parametrize("server", [False, True], ids=["connected", "server"])


@dataclass
class Net:
    """The four namespaces, and the sockets in them."""

    names: dict[str, str]
    run: Run
    version: int
    stack: ExitStack
    kernel: LinuxKernel = field(default_factory=LinuxKernel)

    def socket(
        self,
        at: str,
        own: tuple[str, int],
        to: tuple[str, int] | None,
        *,
        shared: bool = False,
    ) -> socket.socket:
        """A socket of UDP there, connected to *to* if that is given; its address may be shared."""
        family = socket.AF_INET if self.version == 4 else socket.AF_INET6
        with entered(self.names[at]):
            made = self.stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(shared))
        made.bind(own)
        made.settimeout(scaled(0.15))
        if to is not None:
            made.connect(to)
        return made

    @property
    def peer_end(self) -> tuple[str, int]:
        return str(PEER[self.version]), PEER_PORT

    @property
    def old_end(self) -> tuple[str, int]:
        return str(OLD[self.version]), PORT

    def process(self, at: str, *, server: bool) -> socket.socket:
        """The process's socket: for any peer, or connected to the one."""
        return self.socket(at, self.old_end, None if server else self.peer_end)

    def move(self, *, server: bool = False, **more: Any) -> Move:
        """Of the process's socket, as `process` makes it, unless *more* says otherwise."""
        inbound = FourTuple(
            Endpoint(PEER[self.version], PEER_PORT), Endpoint(OLD[self.version], PORT)
        )
        sites = tuple(Site(role, self.names[role]) for role in (Role.GATEWAY, Role.DESTINATION))
        map_ = Map(OLD[self.version], NEW[self.version])
        if server:
            end = inbound.destination
            more = {"udp": NO_CONNECTIONS, "udp_servers": (end,), **more}
        return replace(Move("udp", (map_,), sites, udp=Connections.of([inbound])), **more)

    def apply(self, steps: tuple[Step, ...]) -> list[tuple[Step, Prior]]:
        """Do these, and what undoes them."""
        return [(step, self.kernel.apply(step, lambda prior: None)) for step in steps]

    def undo(self, done: list[tuple[Step, Prior]]) -> None:
        for step, prior in reversed(done):
            revert_step(self.kernel, step, prior)


@pytest.fixture
def make_net(make_netns: Callable[[], str], run: Run) -> Iterator[Callable[[int], Net]]:
    """`make_net(version)`: the four, with addresses and routes of both versions."""
    with ExitStack() as stack:

        def make(version: int) -> Net:
            names = {role: make_netns() for role in ("peer", "gateway", "source", "destination")}
            for name in names.values():
                run(name, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
            run_ip(_NETWORK, names)
            for device, at, subnet, own in _LINKS:
                for where, name, last in ((names["gateway"], device, 1), (names[at], "eth0", own)):
                    run(where, "ip", "link", "set", name, "up")
                    run(where, "ip", "address", "add", f"10.{subnet}.0.{last}/24", "dev", name)
                    address = f"fd00:{subnet}::{last}/64"
                    run(where, "ip", "address", "add", address, "dev", name, "nodad")
                run(names[at], "ip", "route", "add", "default", "via", f"10.{subnet}.0.1")
                run(names[at], "ip", "-6", "route", "add", "default", "via", f"fd00:{subnet}::1")
            for name in names.values():
                await_addresses(name, link_local=True)
            run(names["gateway"], "nft", TRACKS)
            net = Net(names, run, version, stack)
            net.kernel.open_sites(net.move().sites)
            stack.callback(net.kernel.close_sites, net.move().sites)
            return net

        yield make


def make_executor(state: Path) -> Executor:
    """The conductor of moves, with *state* as its directory."""
    return Executor(LinuxKernel(str(state)), StateDirectory(str(state), create=True))


def answered(peer: socket.socket, process: socket.socket, count: int, size: int = 5) -> int:
    """How many of the peer's datagrams came to the process, and were answered."""
    found = 0
    for number in range(count):
        said = bytes([number]) * size
        try:
            peer.send(said)
            heard, sender = process.recvfrom(65535)
            process.sendto(heard, sender)
            found += peer.recv(65535) == said
        except (TimeoutError, ConnectionError):
            continue
    return found
