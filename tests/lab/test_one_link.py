"""Peers, OLD and NEW are on one link, without a gateway: the peers' own hosts translate.

Two hosts have a peer each, in moves and state directories of their own, as three machines would.
No host but the source may claim OLD (the anti-spoof filter), and the source goes silent.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from natkeep.errors import RefusedError
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import entered
from natkeep.lab import tcp_repair
from natkeep.lab.host_state import difference, read_surfaces
from natkeep.lab.topology import Seat, Topology
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.repair import repair
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.lab]

OLD, NEW = Seat("source", "far", 10), Seat("destination", "far", 20)
PEERS = Seat("one", "far", 2), Seat("other", "far", 3)
SILENCE = """
add table inet silence
add chain inet silence in { type filter hook input priority -400; policy drop; }
add chain inet silence out { type filter hook output priority -400; policy drop; }
"""


class OneLink:
    """A server at OLD, a peer on each of two hosts, and a natkeep at each host but OLD's."""

    def __init__(self, topology: Topology, family: int, directory: Path) -> None:
        self.topology, self.family, self.directory = topology, family, directory
        self.ends: list[tuple[socket.socket, socket.socket]] = []

    def executor(self, seat: Seat) -> Executor:
        state = StateDirectory(str(self.directory / seat.role), create=True)
        return Executor(LinuxKernel(state.path), state)

    def inside(self, seat: Seat):
        return entered(self.topology.name(seat.role))

    def connect(self) -> None:
        kind = socket.AF_INET if self.family == 4 else socket.AF_INET6
        with self.inside(OLD):
            listener = socket.create_server((str(OLD.address(self.family)), 0), family=kind)
        with listener:
            for seat in PEERS:
                with self.inside(seat):
                    dialled = socket.create_connection(listener.getsockname()[:2], 5)
                    self.ends.append((dialled, listener.accept()[0]))

    def move(self) -> Connections:
        """Freeze, prepare at each host, create again at NEW, open: the destination last."""
        self.topology["source"].nft(SILENCE)
        states = [tcp_repair.freeze(server) for _, server in self.ends]
        kept = Connections.of(map(_tuple, states))
        for seat, role in ((NEW, Role.DESTINATION), *((seat, Role.PEER) for seat in PEERS)):
            prepare(self.executor(seat), self.make_move(seat, role), kept)
        for _, server in self.ends:
            server.close()
        with self.inside(NEW):
            again = [tcp_repair.recreate(state) for state in states]
        for seat in (*PEERS, NEW):
            open_move(self.executor(seat), "web")
        for one in again:
            tcp_repair.leave_repair(one)
        self.ends = [(peer, server) for (peer, _), server in zip(self.ends, again, strict=True)]
        return kept

    def make_move(self, seat: Seat, role: Role) -> Move:
        map_ = Map(OLD.address(self.family), NEW.address(self.family))
        return Move("web", (map_,), (Site(role, self.topology.name(seat.role)),))

    def talk(self) -> None:
        for pair in self.ends:
            for one, other in (pair, pair[::-1]):
                one.sendall(b"0123456789")
                other.settimeout(20)
                assert other.recv(100) == b"0123456789"


def _anti_spoof() -> str:
    """No host but the source has OLD as its source, or says that it is there; all may ask."""
    lines = []
    for port in (seat.role for seat in (*PEERS, NEW)):
        chain = f"netdev antispoof {port}"
        target = f"@th,64,128 {int(OLD.address(6)):#x}"
        lines += [
            f"add rule {chain} {match} drop"
            for match in (
                f"ip saddr {OLD.address(4)}",
                f"arp saddr ip {OLD.address(4)}",
                f"ip6 saddr {OLD.address(6)}",
                f"icmpv6 type nd-neighbor-advert {target}",
            )
        ]
    return "\n".join(lines) + "\n"


def _tuple(state: tcp_repair.SocketState) -> FourTuple:
    local, peer = (Endpoint(ip_address(str(a)), port) for a, port in (state.local, state.peer))
    return FourTuple(source=peer, destination=local)


@pytest.fixture(params=[4, 6])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OneLink]:
    with Topology((*PEERS, OLD, NEW)) as topology:
        topology["switch"].nft(_anti_spoof())
        made = OneLink(topology, request.param, tmp_path)
        yield made
        for one in (end for pair in made.ends for end in pair):
            one.close()


def test_connections_live_on_one_link_and_nothing_is_left(link: OneLink) -> None:
    before = {seat: read_surfaces(link.topology[seat.role]) for seat in (*PEERS, NEW)}
    link.connect()
    link.talk()
    link.move()
    link.talk()
    for seat in (*PEERS, NEW):
        link.topology[seat.role].run("conntrack", "-F")
        link.talk()
    for seat in (*PEERS, NEW):
        executor = link.executor(seat)
        for status in read_status(executor, ()):
            assert [site.drift for site in status.sites if site.drift] == []
        repair(executor, "web")
        assert gc(executor, ()).cleared == ()
    link.talk()
    for seat in (*PEERS, NEW):
        executor = link.executor(seat)
        executor.drops = 0  # nobody sends there any more
        teardown(executor, "web")
    left = {seat: difference(was, read_surfaces(link.topology[seat.role]))
            for seat, was in before.items()}  # fmt: skip
    assert not any(left.values())


def test_a_host_without_a_peer_is_refused_and_left_as_it_is(link: OneLink) -> None:
    before = read_surfaces(link.topology["destination"])
    link.connect()
    kept = Connections.of(
        [FourTuple(Endpoint(PEERS[0].address(link.family), 5000),
                   Endpoint(OLD.address(link.family), 80))]
    )  # fmt: skip

    with pytest.raises(RefusedError, match="no connection's peer is there"):
        prepare(link.executor(PEERS[1]), link.make_move(PEERS[1], Role.PEER), kept)

    assert not difference(before, read_surfaces(link.topology["destination"]))
