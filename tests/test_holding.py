"""hold and replay by natkeep's own verbs: what prepare leaves running, what open and teardown end.

The holder itself: tests/kernel/test_segment_holder.py; what it keeps: tests/plan/test_replay.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_kernel import FakeKernel, FakeSite

from natkeep.kernel import segment_holder
from natkeep.kernel.interface import Remember
from natkeep.lab.host import await_true
from natkeep.lifecycle.drain import count_alive
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import find_unheld, prepare
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.steps import HoldSegments, Prior, Step
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

OLD, NEW = parse_address("10.2.0.10"), parse_address("10.3.0.20")
KEPT = Connections.of(
    FourTuple(Endpoint(parse_address("10.1.0.2"), port), Endpoint(OLD, 5000))
    for port in (50001, 50002)
)
LIST = "10.2.0.10:5000 10.1.0.2:50001\n"
SITES = (Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst"))

HOOK = Path(sys.executable).with_name("natkeep-hook")


# ---- on the fake kernel ------------------------------------------------------------------------


class WithoutPrivilege(FakeKernel):
    """Nobody may hold anything there."""

    def apply(self, step: Step, remember: Remember) -> Prior:
        super().apply(step, remember)
        refused = isinstance(step, HoldSegments)
        return Prior(facts={"refused": "Operation not permitted"}) if refused else Prior()


def make_executor(kernel: FakeKernel, directory: Path) -> Executor:
    kernel.sites = {"gw": FakeSite(), "dst": FakeSite()}
    return Executor(kernel, StateDirectory(str(directory), create=True))


def prepared(executor: Executor, **options: bool) -> Executor:
    move = Move("web", (Map(OLD, NEW),), SITES, **options)  # type: ignore[arg-type]
    prepare(executor, move, KEPT)
    return executor


def test_the_gateway_stands_open_and_the_move_is_closed(tmp_path: Path) -> None:
    kernel = FakeKernel()
    executor = prepared(make_executor(kernel, tmp_path), hold=True)

    [status] = read_status(executor, ())
    gates = {name: site.gates["web"] for name, site in kernel.sites.items()}

    assert gates == {"gw": Gate.OPEN, "dst": Gate.CLOSED}
    assert status.gate == Gate.CLOSED
    assert [line for site in status.sites for line in site.drift] == []
    assert kernel.sites["dst"].holders == {"web"}


def test_open_lets_through_and_ends_the_holder(tmp_path: Path) -> None:
    kernel = FakeKernel()
    executor = prepared(make_executor(kernel, tmp_path), hold=True)

    open_move(executor, "web")

    [status] = read_status(executor, ())
    assert status.gate == Gate.OPEN
    assert kernel.sites["dst"].holders == set()


def test_while_it_is_not_open_nobody_lives_though_the_gateway_lets_through(tmp_path: Path) -> None:
    executor = prepared(make_executor(FakeKernel(), tmp_path), hold=True)

    closed = count_alive(executor, "web")
    open_move(executor, "web")

    assert closed == 0
    assert count_alive(executor, "web") == 2


def test_a_journal_says_that_the_move_holds(tmp_path: Path) -> None:
    executor = prepared(make_executor(FakeKernel(), tmp_path), hold=True)

    journal = executor.state.load("web")

    assert journal.move.hold
    assert journal.is_prepared()
    assert not journal.is_opened()


def test_teardown_leaves_the_sites_as_they_were(tmp_path: Path) -> None:
    kernel = FakeKernel()
    executor = prepared(make_executor(kernel, tmp_path), hold=True)

    teardown(executor, "web")

    assert kernel.sites == {"gw": FakeSite(), "dst": FakeSite()}


@pytest.mark.parametrize(
    ("kernel", "hold_", "told"),
    [
        (FakeKernel(), True, ()),
        (WithoutPrivilege(), True, ("Operation not permitted",)),
        (WithoutPrivilege(), False, ()),
    ],
)
def test_what_cannot_be_held_is_told_and_no_failure(
    kernel: FakeKernel, hold_: bool, told: tuple[str, ...], tmp_path: Path
) -> None:
    executor = prepared(make_executor(kernel, tmp_path), hold=hold_)

    lines = find_unheld(executor, "web")

    assert lines == tuple(
        f"destination=dst: what peers say meanwhile is not held: {reason}" for reason in told
    )


# ---- by the command line -----------------------------------------------------------------------


class Verbs:
    """natkeep with a state directory of its own, and a destination."""

    def __init__(self, directory: Path, netns: str) -> None:
        self.state, self.netns = directory / "state", netns
        self.listing = directory / "list"
        self.listing.write_text(LIST)

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "natkeep.cli", "--state-dir", str(self.state), *arguments],
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr

    def prepare(self, *more: str) -> str:
        return self(
            "prepare", "web", f"--map={OLD}={NEW}", f"--site=destination={self.netns}",
            f"--connections={self.listing}", *more,
        )  # fmt: skip

    @property
    def held(self) -> segment_holder.Held | None:
        return segment_holder.look(str(self.state), "web")


@pytest.fixture
def verbs(make_netns: Callable[[], str], tmp_path: Path) -> Verbs:
    netns = make_netns()
    for line in (
        "link add eth0 type veth peer name wire", "address add 10.3.0.20/24 dev eth0",
        "link set eth0 up", "link set wire up", "route add default via 10.3.0.1",
    ):  # fmt: skip
        subprocess.run(["ip", "-n", netns, *line.split()], check=True)
    return Verbs(tmp_path, netns)


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_prepare_starts_a_holder_that_outlives_it_and_teardown_ends_it(verbs: Verbs) -> None:
    verbs.prepare()
    running = verbs.held

    verbs("teardown", "web")

    assert running == segment_holder.Held(0, 0, 0)
    assert verbs.held is None
    assert os.listdir(verbs.state) == ["lock"]


@pytest.mark.root
@pytest.mark.needs("nftables")
@pytest.mark.parametrize("option", ["--no-hold", "--gate=open"])
def test_nobody_holds_where_nobody_is_to_or_the_gate_stands_open(verbs: Verbs, option: str) -> None:
    verbs.prepare(option)

    assert verbs.held is None
    assert not (verbs.state / "web.hold").exists()
    verbs("teardown", "web", "--yes")


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_open_has_it_deliver_and_notes_how_much(verbs: Verbs) -> None:
    verbs.prepare()

    verbs("open", "web")

    lines = [json.loads(line) for line in (verbs.state / "web.journal").read_text().splitlines()]
    assert lines[-1]["state"] == "done"
    assert lines[-1]["prior"] == {"present": False, "segments": 0, "refused": 0}
    assert verbs.held is None
    verbs("teardown", "web", "--yes")


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_the_quick_hook_has_it_deliver(verbs: Verbs) -> None:
    verbs.prepare()
    inhabitant = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{verbs.netns}", "sh", "-c", "echo in; exec cat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert inhabitant.stdout is not None
        assert inhabitant.stdout.readline() == b"in\n"
        done = subprocess.run(
            [HOOK],
            env={
                "CRTOOLS_SCRIPT_ACTION": "post-restore", "CRTOOLS_INIT_PID": str(inhabitant.pid),
                "NATKEEP_ID": "web", "NATKEEP_STATE_DIR": str(verbs.state),
            },
            capture_output=True, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        inhabitant.communicate()

    assert (done.returncode, done.stderr) == (0, "natkeep-hook: web: gate open\n")
    # It goes on beside the restore, and ends with that.
    await_true(lambda: verbs.held is None and not (verbs.state / "web.hold").exists(), "its end")
    verbs("teardown", "web", "--yes")


@pytest.mark.root
@pytest.mark.needs("nftables")
def test_a_holder_that_is_gone_or_does_not_answer_keeps_no_gate_closed(verbs: Verbs) -> None:
    verbs.prepare()
    segment_holder.end(str(verbs.state), "web")
    with socket.socket(socket.AF_UNIX) as mute:  # accepts, and never says a word
        mute.bind(str(verbs.state / "web.hold"))
        mute.listen()

        verbs("open", "web")

    shown = subprocess.run(
        ["ip", "netns", "exec", verbs.netns, "nft", "list", "chain", "inet", "natkeep", "gate-web"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert 'accept comment "open"' in shown
    verbs("teardown", "web", "--yes")
