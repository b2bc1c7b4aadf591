"""The agent's socket: a restore asks, and is answered when the gateways are ready."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fleet_nodes import LISTING, Fleet
from fleet_restores import AUTO, DUMP, hear_hooks, prepare_in_hook
from fleet_restores import fleet as fleet
from hook_caller import BEFORE, OLD, Criu
from hook_caller import criu as criu
from hook_caller import images as images

from natkeep import agent_socket
from natkeep.checkpoint import Inventory, NetworkLock
from natkeep.checkpoint.listing import parse_listing
from natkeep.errors import RefusedError, UnreachableError
from natkeep.fleet import apply as orders
from natkeep.fleet import progress
from natkeep.fleet.order import parse_file
from natkeep.fleet.ready import ReadyServer
from natkeep.plan.observation import Gate
from natkeep.values import replace

ASKED = {"verb": "ready", "id": "criu-7-1a", "new": "10.3.0.20"}


class Desk:
    """The socket of host-b's agent; woken: what it was told to look at."""

    def __init__(self, fleet: Fleet, listening: socket.socket, path: str) -> None:
        agent = fleet.nodes["host-b"].agent
        assert agent is not None
        self.fleet, self.path, self.woken = fleet, path, threading.Event()
        ReadyServer(listening, fleet.store, agent.known.find_told, self.wake).start()

    def wake(self, ids: set[str]) -> None:
        self.woken.set()

    def begin(self, request: dict[str, Any], seconds: float = 60) -> list[dict[str, Any]]:
        """Ask; the answer is in the list once `end` returns."""
        answers: list[dict[str, Any]] = []
        ask = agent_socket.ask
        self.asking = threading.Thread(
            target=lambda: answers.append(ask(self.path, request, seconds)), daemon=True
        )
        self.asking.start()
        assert self.woken.wait(30)
        return answers

    def end(self) -> None:
        self.asking.join(60)
        assert not self.asking.is_alive()


@pytest.fixture
def desk(fleet: Fleet, place: Path) -> Iterator[Desk]:
    path = str(place / "agent.sock")
    with agent_socket.listening(path) as listening:
        yield Desk(fleet, listening, path)
    assert not os.path.exists(path)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory of a long name."""
    place = tmp_path / ("x" * 120)
    place.mkdir(mode=0o700)
    return place


def test_the_answer_comes_when_the_gateways_are_ready(fleet: Fleet, desk: Desk) -> None:
    answers = desk.begin(ASKED)
    prepare_in_hook(fleet.nodes["host-b"])
    agent = fleet.nodes["host-b"].agent
    assert agent is not None
    agent.reconcile(agent.known.about({"criu-7-1a"}))
    assert not answers, "the gateway has not heard of it"
    fleet.turn()
    desk.end()
    assert answers == [{"ok": True, "id": "web"}]


@pytest.mark.parametrize(
    ("more", "lacking"),
    [
        ({"id": "criu-8-1b"}, "no order with NEW auto is about criu-8-1b"),
        ({"new": "10.3.0.21"}, "criu-7-1a has 10.2.0.10=10.3.0.20, and not 10.3.0.21"),
    ],
)
def test_what_is_lacking_is_said_when_the_time_is_over(
    fleet: Fleet, desk: Desk, more: dict[str, str], lacking: str
) -> None:
    prepare_in_hook(fleet.nodes["host-b"])
    hear_hooks(fleet)
    answers = desk.begin({**ASKED, **more}, 3)
    desk.end()
    assert answers[0]["ok"] is False
    assert lacking in answers[0]["message"]


def test_a_gateway_that_is_not_ready_is_named(fleet: Fleet, desk: Desk) -> None:
    prepare_in_hook(fleet.nodes["host-b"])
    agent = fleet.nodes["host-b"].agent
    assert agent is not None
    agent.reconcile(agent.known.about({"criu-7-1a"}))
    answers = desk.begin(ASKED, 3)
    desk.end()
    assert "gw-1: gone; waits for host-b: prepared" in answers[0]["message"]


def test_a_restore_does_not_begin_by_a_staged_order(fleet: Fleet, desk: Desk) -> None:
    """Its gateways are not ordered yet; natkeep-cni makes the pod, and the restore comes later."""
    fleet.end()
    fleet.turn()
    order, _ = parse_file(json.dumps({**AUTO, "phase": "staged"}))
    dump = Inventory(NetworkLock.NFTABLES, DUMP)
    orders.apply(fleet.store, order, replace(parse_listing(LISTING, "list"), inventory=dump))
    fleet.turn()
    prepare_in_hook(fleet.nodes["host-b"])
    hear_hooks(fleet)
    move = progress.look(fleet.store, "web")
    assert not move.lacking("staged")
    assert [node.name for node in move.lacking("ready")] == ["gw-1", "host-a"]
    answers = desk.begin(ASKED, 3)
    desk.end()
    assert answers[0]["ok"] is False
    assert "nothing but the destination is ordered yet" in answers[0]["message"]
    assert agent_socket.ask(desk.path, {**ASKED, "staged": True}, 60) == {"ok": True, "id": "web"}


def test_a_long_answer_is_cut_and_read(fleet: Fleet, desk: Desk) -> None:
    answers = desk.begin({**ASKED, "id": "é" * 600}, 3)
    desk.end()
    assert answers[0]["ok"] is False
    assert "no order with NEW auto is about é" in answers[0]["message"]


def test_a_move_that_is_to_end_is_not_ready(fleet: Fleet, desk: Desk) -> None:
    prepare_in_hook(fleet.nodes["host-b"])
    hear_hooks(fleet)
    fleet.end()
    answers = desk.begin(ASKED, 3)
    desk.end()
    assert "is undone, or to be" in answers[0]["message"]


@pytest.mark.parametrize(
    "said",
    [
        b"\n", b"[]\n", b"{}\n", b"\xff\xfe\n", b'{"verb": "ready"}\n', b"{" * 5000,
        b'{"verb": "ready", "id": 7}\n', b'{"verb": "ready", "id": "a", "wait_s": []}\n',
        b'{"verb": "ready", "id": "a", "wait_s": "nan"}\n', b'{"verb": "gone", "id": "a"}\n',
    ],
)  # fmt: skip
def test_what_is_no_question_is_refused(desk: Desk, said: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as link, ExitStack() as stack:
        home = os.open(os.path.dirname(desk.path), os.O_RDONLY)
        stack.callback(os.close, home)
        link.connect(f"/proc/self/fd/{home}/agent.sock")
        link.settimeout(30)
        link.sendall(said)
        answer = json.loads(link.recv(4096))
    assert answer["ok"] is False
    assert answer["message"]


def test_a_socket_that_an_agent_left_is_replaced_and_nothing_else(place: Path) -> None:
    path = str(place / "agent.sock")
    agent_socket._listen(path).close()
    with agent_socket.listening(path):
        assert os.stat(path).st_mode & 0o777 == 0o600
        with pytest.raises(RefusedError, match="another agent"), agent_socket.listening(path):
            pass
    Path(path).write_text("a file")
    with pytest.raises(RefusedError, match="is no socket"), agent_socket.listening(path):
        pass
    assert Path(path).read_text() == "a file"
    place.chmod(0o777)
    with pytest.raises(RefusedError, match="written by others"), agent_socket.listening(path):
        pass


def test_an_agent_that_comes_back_is_asked_again(fleet: Fleet, place: Path) -> None:
    prepare_in_hook(fleet.nodes["host-b"])
    hear_hooks(fleet)
    path, answers = str(place / "agent.sock"), list[dict[str, Any]]()
    with agent_socket.listening(path) as killed:
        asking = threading.Thread(target=lambda: answers.append(agent_socket.ask(path, ASKED, 60)))
        asking.start()
        killed.accept()[0].close()
    with agent_socket.listening(path) as listening:
        Desk(fleet, listening, path)
        asking.join(60)
    assert answers == [{"ok": True, "id": "web"}]


def test_without_an_agent_the_restore_ends_behind_the_closed_gate(
    criu: Criu, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UnreachableError):
        agent_socket.ask(f"{place}/agent.sock", ASKED, 0.1)
    with pytest.raises(UnreachableError, match="no time was given"):
        agent_socket.ask(f"{place}/agent.sock", ASKED, 0)
    code = criu.call("pre-restore", NATKEEP_AGENT=f"{place}/agent.sock", NATKEEP_WAIT="0.3")
    assert code == 9
    said = capsys.readouterr().err
    assert "no agent answers at" in said
    assert "nothing was sent, and the gate stays closed" in said
    assert criu.gates() == {BEFORE: {criu.id: Gate.CLOSED}}


def test_what_is_no_place_for_an_agent_is_refused_before_anything_is_prepared(
    criu: Criu, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").touch()
    open_to_others = place / "open"
    open_to_others.mkdir()
    open_to_others.chmod(0o777)
    at = f"{place}/agent.sock"
    wrong = [
        (2, {"NATKEEP_AGENT": "agent.sock"}, "is no absolute path"),
        (2, {"NATKEEP_AGENT": f"{place}/file"}, "file is no socket"),
        (2, {"NATKEEP_AGENT": at, "NATKEEP_READY": f"{place}/ready"}, "contradict each other"),
        (2, {"NATKEEP_AGENT": at, "NATKEEP_READY": "", "NATKEEP_WAIT": "0"}, "no number of"),
        (4, {"NATKEEP_AGENT": f"{open_to_others}/a", "NATKEEP_WAIT": ""}, "written by others"),
    ]
    for code, environment, said in wrong:
        assert criu.call("pre-restore", NATKEEP_MAP=f"{OLD}=auto", **environment) == code, said
        assert said in capsys.readouterr().err
    assert criu.gates() == {}
