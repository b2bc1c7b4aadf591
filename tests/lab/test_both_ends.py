"""Both ends of a connection are moved, one after the other, and every other verb runs meanwhile.

The server goes from OLD (source) to the destination, the client from the near network to a third,
each by a move of its own, through one gateway; or both go to one host. Beside the connection that
both have, each has one with a peer that stays.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import pytest

from natkeep.errors import RefusedError
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import entered
from natkeep.lab import tcp_repair
from natkeep.lab.host_state import difference, read_surfaces
from natkeep.lab.topology import (
    CLIENT,
    DESTINATION,
    SECOND_CLIENT,
    SOURCE,
    THIRD,
    Seat,
    Topology,
)
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.repair import repair
from natkeep.lifecycle.replace import replace_move
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.lab]

STAYS = Seat("stays", "old", 11)
SITES = ("gateway", "destination", "third")
SILENCE = """
add table inet silence
add chain inet silence in { type filter hook input priority -400; policy drop; }
add chain inet silence out { type filter hook output priority -400; policy drop; }
"""


class Party:
    """One process that moves: where it is at home, where it is, and its sockets by their names."""

    def __init__(self, name: str, home: Seat) -> None:
        self.name, self.home, self.at = name, home, home
        self.sockets: dict[str, socket.socket] = {}


class Pairs:
    """A server and a client, both of which move, and peers of each that do not."""

    def __init__(self, family: int, directory: Path) -> None:
        seats = (CLIENT, SECOND_CLIENT, SOURCE, STAYS, DESTINATION, THIRD)
        self.family, self.topology = family, Topology(seats)
        self.directory, self.apart = directory, False
        self.server, self.client = Party("server", SOURCE), Party("client", CLIENT)
        self.peers: dict[str, socket.socket] = {}

    def executor(self, role: str = "") -> Executor:
        """As each verb has one of its own; *role*: where each host has a directory of its own."""
        path = self.directory / role if self.apart else self.directory
        state = StateDirectory(str(path), create=True)
        return Executor(LinuxKernel(state.path), state)

    def executors(self) -> list[Executor]:
        """One for each directory."""
        return [self.executor(role) for role in (SITES if self.apart else ("",))]

    def inside(self, seat: Seat):
        return entered(self.topology.name(seat.role))

    def connect(self) -> None:
        """One connection between the two; one of each with a peer that stays."""
        ours = self._dial(CLIENT, SOURCE)
        of_client, of_server = self._dial(CLIENT, STAYS), self._dial(SECOND_CLIENT, SOURCE)
        self.client.sockets = {"both": ours[0], "client": of_client[0]}
        self.server.sockets = {"both": ours[1], "server": of_server[1]}
        self.peers = {"client": of_client[1], "server": of_server[0]}

    def _dial(self, near: Seat, to: Seat) -> tuple[socket.socket, socket.socket]:
        kind = socket.AF_INET if self.family == 4 else socket.AF_INET6
        with self.inside(to):
            listener = socket.create_server((str(to.address(self.family)), 0), family=kind)
        with listener, self.inside(near):
            dialled = socket.create_connection(listener.getsockname()[:2], 5)
            return dialled, listener.accept()[0]

    def move(
        self, party: Party, to: Seat, mode: Mode = Mode.STATEFUL, *, replaces: str | None = None
    ) -> None:
        """Freeze, prepare, create again at *to*, open. RefusedError: all goes on as it was."""
        with suppress(Exception):
            self.topology[party.at.role].run("nft", "delete", "table", "inet", "silence")
        self.topology[party.at.role].nft(SILENCE)
        states = {name: tcp_repair.freeze(one) for name, one in party.sockets.items()}
        move_id = party.name if replaces is None else f"{party.name}-again"
        old, new = party.home.address(self.family), to.address(self.family)
        sites = (
            Site(Role.GATEWAY, self.topology.name("gateway")),
            Site(Role.DESTINATION, self.topology.name(to.role)),
        )
        moves = [
            (self.executor(role), Move(move_id, (Map(old, new),), here, mode))
            for role, here in (
                (("gateway", sites[:1]), (to.role, sites[1:])) if self.apart else (("", sites),)
            )
        ]
        kept = Connections.of(_tuple(state) for state in states.values())
        try:
            for executor, move in moves:
                if replaces is None:
                    prepare(executor, move, kept)
                else:
                    replace_move(executor, replaces, move, kept)
        except RefusedError:
            self.topology[party.at.role].run("nft", "delete", "table", "inet", "silence")
            for name, one in party.sockets.items():
                tcp_repair.thaw(one, states[name])
            raise
        for one in party.sockets.values():
            one.close()
        with self.inside(to):
            again = {name: tcp_repair.recreate(state) for name, state in states.items()}
        for executor, _ in moves:
            open_move(executor, move_id)
        for one in again.values():
            tcp_repair.leave_repair(one)
        self.topology[party.at.role].run("nft", "delete", "table", "inet", "silence")
        party.sockets, party.at = dict(again), to

    def talk(self, *names: str) -> None:
        """Each of these connections carries in both directions."""
        for name in names or ("both", "client", "server"):
            ends = [p.sockets[name] for p in (self.server, self.client) if name in p.sockets]
            ends += [self.peers[name]] if name in self.peers else []
            for one, other in (ends, reversed(ends)):
                one.sendall(name.encode())
                other.settimeout(20)
                assert other.recv(100) == name.encode(), name

    def disturb(self, times: int = 2) -> None:
        """Every verb that the timers run; none of them finds anything to do."""
        for executor in self.executors() * times:
            for status in read_status(executor, ()):
                assert [site.drift for site in status.sites if site.drift] == []
            for move_id in executor.state.ids():
                assert repair(executor, move_id) == ()
            assert gc(executor, ()).cleared == ()


def _tuple(state: tcp_repair.SocketState) -> FourTuple:
    local, peer = (Endpoint(ip_address(str(a)), port) for a, port in (state.local, state.peer))
    return FourTuple(source=peer, destination=local)


@pytest.fixture(params=[4, 6])
def pairs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pairs]:
    pairs = Pairs(request.param, tmp_path / "state")
    with pairs.topology as topology:
        before = {role: read_surfaces(topology[role]) for role in SITES}
        pairs.connect()
        pairs.talk()
        yield pairs
        for executor in pairs.executors():
            for move_id in executor.state.ids():
                teardown(executor, move_id)
        left = {role: difference(before[role], read_surfaces(topology[role])) for role in SITES}
        assert not any(left.values())


class Order(NamedTuple):
    """Which of the two moves first, and where each goes."""

    first: str
    server: Seat = DESTINATION
    client: Seat = THIRD

    def carry_out(self, pairs: Pairs, *modes: Mode) -> None:
        both = [(pairs.server, self.server), (pairs.client, self.client)]
        for (party, to), mode in zip(
            both if self.first == "server" else both[::-1], modes, strict=True
        ):
            pairs.move(party, to, mode)


ORDERS = {
    "server, client": Order("server"),
    "client, server": Order("client"),
    "server, client to one host": Order("server", client=DESTINATION),
    "client, server to one host": Order("client", client=DESTINATION),
}
STATEFUL = (Mode.STATEFUL, Mode.STATEFUL)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_connection_lives_whatever_runs_meanwhile(order: Order, pairs: Pairs) -> None:
    order.carry_out(pairs, *STATEFUL)
    pairs.talk()
    pairs.disturb()
    pairs.talk()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_so_it_does_where_each_host_has_a_natkeep_of_its_own(order: Order, pairs: Pairs) -> None:
    pairs.apart = True
    order.carry_out(pairs, *STATEFUL)
    pairs.talk()
    pairs.disturb()
    pairs.talk()


@pytest.mark.parametrize("last", ["server", "client"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_one_move_is_undone_and_what_the_other_keeps_lives(
    order: Order, last: str, pairs: Pairs
) -> None:
    order.carry_out(pairs, *STATEFUL)
    pairs.talk()
    undone = "client" if last == "server" else "server"
    teardown(pairs.executor(), undone)
    # On one host the later move still has all that the connection of both needs.
    through_lo = order.client == order.server and undone == order.first
    pairs.talk(last, *(["both"] if through_lo else []))
    if order.client == order.server and undone != order.first:
        repair(pairs.executor(), last)  # puts the entry back that lo had no use for
    pairs.disturb()
    pairs.talk(last)


@pytest.mark.parametrize("order", ["server, client", "client, server"])
def test_one_end_moves_on_and_both_live(order: str, pairs: Pairs) -> None:
    ORDERS[order].carry_out(pairs, *STATEFUL)
    pairs.move(pairs.server, THIRD, replaces="server")
    pairs.talk()
    pairs.disturb()
    teardown(pairs.executor(), "server")
    pairs.disturb()
    pairs.talk()


@pytest.mark.parametrize("order", ["server, client", "client, server"])
def test_it_lives_where_its_entries_were_deleted(order: str, pairs: Pairs) -> None:
    ORDERS[order].carry_out(pairs, *STATEFUL)
    for loose in (0, 1):
        setting = f"net.netfilter.nf_conntrack_tcp_loose={loose}"
        pairs.topology["gateway"].run("sysctl", "-qw", setting)
        pairs.topology["gateway"].run("conntrack", "-F")
        pairs.talk()


@pytest.mark.parametrize(
    "modes",
    [
        (Mode.STATELESS, Mode.STATELESS),
        (Mode.STATELESS, Mode.STATEFUL),
        (Mode.STATEFUL, Mode.STATELESS),
    ],
    ids=lambda modes: "-".join(modes),
)
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_without_conntrack_it_is_kept_or_refused(
    order: Order, modes: tuple[Mode, Mode], pairs: Pairs
) -> None:
    if order.client == order.server:
        order.carry_out(pairs, *modes)
    else:
        with pytest.raises(RefusedError, match="only one end"):
            order.carry_out(pairs, *modes)
    pairs.talk()
    pairs.disturb()
    pairs.talk()
