"""the end of a move of UDP: nothing is heard any more, or no socket is there."""

from __future__ import annotations

import json
import time
from ipaddress import ip_address
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from natkeep.checkpoint.ended import parse_ended
from natkeep.lifecycle import drain as draining
from natkeep.lifecycle import status as looking
from natkeep.lifecycle.check import check
from natkeep.lifecycle.drain import count_alive, drain, find_exposed
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.status import read_status
from natkeep.plan import protocols
from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.observation import Gate, Held, Observation
from natkeep.plan.roles import Role
from natkeep.plan.silence import Silences
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple
from natkeep.report.status import move_as_json, status_lines
from natkeep.state.directory import StateDirectory

SOURCE = Site(Role.SOURCE, "src")
GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
OLD, NEW = ip_address("10.2.0.10"), ip_address("10.3.0.20")
INBOUND = FourTuple(Endpoint(ip_address("10.1.0.2"), 50594), Endpoint(OLD, 443))
UDP = Connections.of([INBOUND])
[CONNECTED] = UDP.each()
SERVER = Endpoint(OLD, 53)
SERVER_KEY = OLD.packed + (53).to_bytes(2, "big")


@pytest.fixture
def kernel() -> FakeKernel:
    return FakeKernel()


@pytest.fixture
def executor(kernel: FakeKernel, tmp_path: Path) -> Executor:
    return Executor(kernel, StateDirectory(str(tmp_path / "state"), create=True))


def begin(executor: Executor, *sites: Site, server: bool = False) -> None:
    """A move of one connected socket, and of one that any peer may speak to; it is open."""
    servers = (SERVER,) if server else ()
    move = Move("web", (Map(OLD, NEW),), sites, udp=UDP, udp_servers=servers)
    prepare(executor, move, NO_CONNECTIONS)
    open_move(executor, "web")


@pytest.mark.parametrize("sites", [(GATEWAY, DESTINATION), (DESTINATION,), (GATEWAY,)])
def test_drain_waits_until_a_socket_is_silent(
    executor: Executor,
    kernel: FakeKernel,
    sites: tuple[Site, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begin(executor, *sites)
    at = kernel.sites[sites[-1].netns]
    at.sockets.add(INBOUND)
    at.silences[CONNECTED] = 3.0
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        assert seconds == draining._UDP_INTERVAL
        now[0] += 30
        at.silences[CONNECTED] += 30

    monkeypatch.setattr(time, "sleep", sleep)

    assert drain(executor, "web", 0) == 1
    assert drain(executor, "web", None) == 0
    assert at.silences[CONNECTED] == 123.0


def test_drain_waits_as_long_as_it_is_told(executor: Executor, kernel: FakeKernel) -> None:
    begin(executor, GATEWAY, DESTINATION)
    at = kernel.sites["dst"]
    at.sockets.add(INBOUND)
    at.silences[CONNECTED] = 3.0

    assert drain(executor, "web", 0, 3.5) == 1
    assert drain(executor, "web", 0, 3.0) == 0
    at.silences.clear()  # nothing for 120 s, as far as can be known
    assert drain(executor, "web", 0) == 0
    assert drain(executor, "web", 0, 121.0) == 1


def test_a_socket_that_is_gone_is_not_waited_for(executor: Executor, kernel: FakeKernel) -> None:
    begin(executor, GATEWAY, DESTINATION)
    kernel.sites["dst"].silences[CONNECTED] = 0.0

    assert drain(executor, "web", 0) == 0


def test_a_teardown_asks_for_each_connected_socket_and_for_a_server_that_is_spoken_to(
    executor: Executor, kernel: FakeKernel
) -> None:
    begin(executor, DESTINATION, server=True)
    at = kernel.sites["dst"]
    assert count_alive(executor, "web") == 0

    at.sockets.add(INBOUND)
    at.bound.add(SERVER_KEY)
    assert count_alive(executor, "web") == 1
    at.silences[SERVER_KEY] = 3.0
    assert count_alive(executor, "web") == drain(executor, "web", 0) + 1 == 2


@pytest.mark.parametrize("what", ["sockets", "bound", "silences"])
def test_gc_clears_a_move_whose_sockets_are_gone_and_whose_peers_are_silent(
    executor: Executor, kernel: FakeKernel, what: str
) -> None:
    begin(executor, GATEWAY, DESTINATION, server=True)
    at = kernel.sites["dst"]
    {"sockets": at.sockets, "bound": at.bound, "silences": at.silences}[what].update(
        {"sockets": {INBOUND}, "bound": {SERVER_KEY}, "silences": {CONNECTED: 3.0}}[what]
    )
    assert gc(executor, ()).cleared == ()

    for some in (at.sockets, at.bound, at.silences):
        some.clear()
    assert [(one.kind, one.name) for one in gc(executor, ()).cleared] == [("move", "web")]


def test_gc_leaves_a_gateway_alone_that_cannot_know(executor: Executor) -> None:
    begin(executor, GATEWAY)

    assert gc(executor, ()).cleared == ()


def test_what_one_look_has_shown_is_known_when_the_entry_has_gone() -> None:
    silences = Silences(60.0)

    def speaks(ago: float | None, now: float) -> bool:
        silent = {} if ago is None else {CONNECTED: ago}
        seen = Observation(Gate.OPEN, {}, frozenset(), {}, 0, silences=silent)
        return bool(silences.find_speaking(DESTINATION, [CONNECTED], seen, now))

    assert speaks(20.0, 1000.0)
    assert speaks(None, 1039.0)  # an entry of one packet is gone after 30 s
    assert not speaks(None, 1040.0)
    assert speaks(0.0, 1050.0)
    assert speaks(None, 1109.0)
    assert not speaks(None, 1110.0)


@pytest.mark.parametrize(
    ("there", "speaks", "expected"),
    [(True, True, "live"), (True, False, "silent"), (False, True, None), (False, False, "ended")],
)
def test_status_says_which_sockets_are_silent(
    executor: Executor, kernel: FakeKernel, there: bool, speaks: bool, expected: str | None
) -> None:
    begin(executor, GATEWAY, DESTINATION, server=True)
    at = kernel.sites["dst"]
    at.sockets.update([INBOUND] if there else [])
    at.bound.update([SERVER_KEY] if there else [])
    at.silences.update(dict.fromkeys([CONNECTED, SERVER_KEY], 3.0) if speaks else {})

    [status] = read_status(executor, ("web",))

    text = move_as_json(status, "host")
    document = json.loads(text)
    assert [one["state"] for one in document["connections"]] == [expected]
    assert document["udp_states"] == {str(SERVER): expected}
    told = any("all have ended" in line for line in status_lines(status, "host", verbose=False))
    assert told == (expected == "ended")
    over = parse_ended(f'{{"schema": 1, "moves": [{text}]}}'.encode(), "status", protocols.UDP)
    assert over == (UDP if expected in ("silent", "ended") else NO_CONNECTIONS)


def test_status_says_what_is_held_while_the_gate_is_closed(
    executor: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(2, 345, 1, 3)
    monkeypatch.setattr(looking, "look", lambda directory, move_id: held)
    move = Move("web", (Map(OLD, NEW),), (DESTINATION,), udp=UDP, hold=True)
    prepare(executor, move, NO_CONNECTIONS)

    [status] = read_status(executor, ("web",))
    expected = {"segments": 2, "datagrams": 3, "octets": 345, "refused": 1}
    assert json.loads(move_as_json(status, "host"))["held"] == expected
    lines = [*status_lines(status, "host", verbose=False)]
    assert "  held for the process: 2 segments and 3 datagrams, 345 octets, 1 lost" in lines

    open_move(executor, "web")
    [status] = read_status(executor, ("web",))
    assert "held" not in json.loads(move_as_json(status, "host"))


@pytest.mark.parametrize("sites", [(SOURCE,), (GATEWAY, DESTINATION)])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_source_behind_the_dump_is_warned_of(
    executor: Executor, sites: tuple[Site, ...], frozen: bool, whole: bool
) -> None:
    lock = DumpLock(NetworkLock.NFTABLES, "run", whole, 1) if sites == (SOURCE,) else None
    move = Move("web", (Map(OLD, NEW),), sites, udp=UDP, lock=lock)

    check(executor, move, NO_CONNECTIONS, frozen=frozen)

    expected = ["udp-unlocked"] if sites == (SOURCE,) and not (frozen or whole) else []
    assert [one.code for one in executor.warned] == expected


@pytest.mark.parametrize("mode", Mode)
def test_a_source_is_warned_of_what_is_kept_of_udp(executor: Executor, mode: Mode) -> None:
    servers = (SERVER, Endpoint(OLD, 54))
    move = Move("web", (Map(OLD, NEW),), (SOURCE,), mode, udp=UDP, udp_servers=servers)

    check(executor, move, Connections.of([INBOUND]))

    told = [one.detail.partition(" are ")[0] for one in executor.warned]
    assert told == (["datagrams to 3 UDP sockets"] if mode == Mode.STATEFUL else [])


def test_the_source_is_done_with_sockets_that_are_silent_elsewhere(
    executor: Executor, kernel: FakeKernel
) -> None:
    move = Move("web", (Map(OLD, NEW),), (SOURCE,), udp=UDP)
    prepare(executor, move, NO_CONNECTIONS)
    kernel.sites["src"].addresses.add(OLD)

    [line] = find_exposed(executor, "web")

    assert "src still has OLD 10.2.0.10: it would tell 1 peers of UDP that the port" in line
    assert len(find_exposed(executor, "web", {protocols.TCP: UDP})) == 1
    assert find_exposed(executor, "web", {protocols.UDP: UDP}) == ()
