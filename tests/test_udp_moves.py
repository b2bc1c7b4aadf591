"""moves of UDP sockets through the conductor on the fake kernel: alone, and beside those of TCP."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from fake_kernel import FakeKernel, FakeSite

from natkeep.errors import RefusedError
from natkeep.lifecycle.drain import count_alive
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.kept_connections import find_unkept_servers
from natkeep.plan.maps import Map
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import InsertEntries, PurgeEntries
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple, parse_address
from natkeep.plan.via import parse_via
from natkeep.plan.wanted import objects_of
from natkeep.state.directory import StateDirectory
from natkeep.values import replace

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
MAP = Map(parse_address("10.2.0.10"), parse_address("10.3.0.20"))


def listed(*rows: str) -> Connections:
    """Connections from `LOCAL PEER`, as in a connections file."""
    ends = [map(Endpoint.parse, row.split()) for row in rows]
    return Connections.of(FourTuple(source=peer, destination=local) for local, peer in ends)


SOME = listed("10.2.0.10:5000 10.1.0.2:50001", "10.2.0.10:5000 10.1.0.2:50002")
OTHERS = listed("10.2.0.10:5000 10.1.0.2:50003")
UDP_MOVE = Move("udp", (MAP,), (GATEWAY, DESTINATION), udp=SOME)


@pytest.fixture
def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Executor:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    kernel = FakeKernel()
    kernel.sites = {"gw": FakeSite(), "dst": FakeSite()}
    return Executor(kernel, StateDirectory(str(tmp_path / "state"), create=True))


def test_sockets_of_udp_alone_are_a_move(executor: Executor) -> None:
    plan = prepare(executor, UDP_MOVE, NO_CONNECTIONS, Gate.OPEN)

    assert {(t.site, t.protocol) for t in plan.translations} == {(GATEWAY, UDP), (DESTINATION, UDP)}
    assert not any(isinstance(step, InsertEntries) for step in plan.steps)
    assert sum(isinstance(step, PurgeEntries) for step in plan.steps) == 2
    [status] = read_status(executor, ["udp"])
    assert [site.drift for site in status.sites] == [(), ()]
    assert executor.load("udp")[1].steps == plan.steps

    teardown(executor, "udp")
    assert executor.kernel.sites == {"gw": FakeSite(), "dst": FakeSite()}  # type: ignore[attr-defined]


def test_the_sets_of_udp_come_behind_those_of_tcp(executor: Executor) -> None:
    plan = prepare(executor, UDP_MOVE, SOME)

    numbers = [(t.number, t.protocol) for t in plan.translations if t.site == GATEWAY]
    assert numbers == [(0, TCP), (1, UDP)]


def test_moves_of_tcp_and_udp_may_have_the_same_ends_and_two_of_udp_may_not(
    executor: Executor,
) -> None:
    prepare(executor, UDP_MOVE, NO_CONNECTIONS, Gate.OPEN)
    prepare(executor, replace(UDP_MOVE, id="tcp", udp=NO_CONNECTIONS), SOME, Gate.OPEN)
    prepare(executor, replace(UDP_MOVE, id="more", udp=OTHERS), NO_CONNECTIONS, Gate.OPEN)

    again = replace(UDP_MOVE, id="again", udp=listed("10.2.0.10:5000 10.1.0.2:50002"))
    with pytest.raises(RefusedError, match=r"10.1.0.2:50002 .*would be one tuple at OLD; 1 in all"):
        prepare(executor, again, NO_CONNECTIONS)


def test_what_only_a_gateway_shows_of_them_ends_no_move(executor: Executor) -> None:
    prepare(executor, replace(UDP_MOVE, sites=(GATEWAY,)), NO_CONNECTIONS, Gate.OPEN)

    assert count_alive(executor, "udp") == 2
    gc(executor, (GATEWAY,))
    assert executor.state.knows("udp")


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        (replace(UDP_MOVE, mode=Mode.STATELESS), "50001 > .*: mode stateless keeps no UDP"),
        (
            replace(UDP_MOVE, udp=listed("10.2.0.10:53 10.2.0.10:99")),
            "its peer 10.2.0.10 is on the source host too",
        ),
        (
            replace(
                UDP_MOVE,
                udp=NO_CONNECTIONS,
                udp_servers=(Endpoint.parse("10.2.0.10:53"),),
                sites=(Site(Role.RELAY, "gw"),),
                vias=(parse_via("10.2.0.11"),),
            ),
            "10.2.0.10:53: behind a relay its new peers would have the relay's address",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_where_nothing_else_is(move: Move, reason: str) -> None:
    with pytest.raises(RefusedError, match=reason):
        make_plan(move, NO_CONNECTIONS)

    plan = make_plan(move, OTHERS)
    assert [t.protocol for t in plan.translations if t.site == plan.move.sites[0]] == [TCP]
    told = [*plan.unkept, *find_unkept_servers(move)]
    assert len(told) == len(move.udp) + len(move.udp_servers)


def test_a_process_may_speak_with_itself(executor: Executor) -> None:
    """By two sockets that are connected with each other, or one that is none."""
    both = listed("10.2.0.10:53 10.2.0.10:99", "10.2.0.10:99 10.2.0.10:53")
    servers = (Endpoint.parse("10.2.0.10:53"),)
    for move in (
        replace(UDP_MOVE, udp=both),
        replace(UDP_MOVE, udp=listed("10.2.0.10:99 10.2.0.10:53"), udp_servers=servers),
    ):
        plan = make_plan(move, OTHERS)
        assert plan.unkept == ()
        assert {t.protocol for t in plan.translations} == {TCP}


def test_a_destination_is_ready_before_peers_own_hosts_which_hold_no_datagram_back() -> None:
    peer = Site(Role.PEER, "peer")
    around = Surroundings(at_peers=((peer, frozenset({parse_address("10.1.0.2")})),))
    for move, kept, first in (
        (replace(UDP_MOVE, sites=(peer, DESTINATION)), NO_CONNECTIONS, DESTINATION),
        (replace(UDP_MOVE, sites=(peer, DESTINATION), udp=NO_CONNECTIONS), SOME, peer),
    ):
        plan = make_plan(move, kept, around)
        assert plan.prepare[0].site == first
        dials = [o for s in plan.prepare for o in objects_of(s) if "dial-at" in str(o)]
        assert bool(dials) == (first == peer)


def test_a_relays_ports_are_counted_for_each_protocol() -> None:
    move = Move(
        "udp", (MAP,), (Site(Role.RELAY, "gw"), DESTINATION), vias=(parse_via("10.2.0.11"),)
    )
    alone = make_plan(move, SOME)
    both = make_plan(replace(move, udp=SOME), SOME)

    def ends(protocol: object) -> list[list[FourTuple]]:
        return [[*t.wire] for t in both.translations if t.protocol == protocol]

    assert ends(TCP) == ends(UDP) == [[*t.wire] for t in alone.translations]
