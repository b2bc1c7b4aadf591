"""the hook with NATKEEP_UNKEPT: the process is told of what cannot be kept, once it is there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_kernel import FakeKernel
from hook_caller import Criu

from natkeep import policy
from natkeep.criu import environment
from natkeep.kernel import linux
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import prepare
from natkeep.plan.move import Fate, Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

IMAGES = Path(__file__).parents[1] / "checkpoint/corpus/unkeepable"
MAP = Map(parse_address("10.2.0.10"), parse_address("10.3.0.20"))
DIALS = "10.9.0.9:80 > 10.2.0.10:5300"  # what the process of that image was dialling
TREE = f"pid:{os.getpid()}"

Call = Callable[..., int]


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeKernel:
    kernel = FakeKernel()
    monkeypatch.setattr(linux, "LinuxKernel", lambda *_: kernel)
    monkeypatch.setattr(policy, "PATH", str(tmp_path / "natkeep.toml"))
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path / "state"))
    return kernel


@pytest.fixture
def call(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> Iterator[Call]:
    """`call(action, NAME=VALUE...)`: what the hook exits with when CRIU calls it for IMAGES."""
    criu = Criu(kernel, IMAGES, monkeypatch)
    yield criu.call
    os.close(criu.handle)


def told(kernel: FakeKernel) -> list[str]:
    return [str(each) for each in kernel.told]


def test_the_process_is_told_at_post_restore_and_not_before(kernel: FakeKernel, call: Call) -> None:
    asked = {"NATKEEP_MAP": str(MAP), "NATKEEP_UNKEPT": "reset"}
    assert call("post-setup-namespaces", **asked) == 0
    assert told(kernel) == []
    assert call("post-restore", **asked) == 0
    assert told(kernel) == [DIALS]
    assert kernel.sites[TREE].resets == {environment.own_id(os.getpid()): Gate.OPEN}


def test_standing_orders_may_say_it(kernel: FakeKernel, call: Call) -> None:
    """Without it there is nothing to keep in that image, and nothing is done."""
    file = Path(policy.PATH)
    file.write_text(f'[hook]\nmap = ["{MAP}"]\n')
    file.chmod(0o600)
    assert call("post-restore") == 0
    assert kernel.sites == {}

    file.write_text(f'[hook]\nmap = ["{MAP}"]\nunkept = "reset"\n')
    assert call("post-restore") == 0
    assert told(kernel) == [DIALS]


def test_it_counts_as_a_connection(kernel: FakeKernel, call: Call) -> None:
    file = Path(policy.PATH)
    file.write_text("max_connections = 0\n")
    file.chmod(0o600)

    assert call("post-restore", NATKEEP_MAP=str(MAP), NATKEEP_UNKEPT="reset") == 4
    assert kernel.sites.get(TREE) is None or not kernel.sites[TREE].gates


@pytest.mark.parametrize(
    ("asked", "prepared", "code"),
    [("", Fate.REPORT, 0), ("report", Fate.REPORT, 0), ("reset", Fate.RESET, 0),
     ("", Fate.RESET, 0), ("reset", Fate.REPORT, 2), ("report", Fate.RESET, 2)],
)  # fmt: skip
def test_a_prepared_move_is_opened_as_it_was_prepared(
    asked: str,
    prepared: Fate,
    code: int,
    kernel: FakeKernel,
    call: Call,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lost, kept = (
        Connections.of([FourTuple(Endpoint.parse(peer), Endpoint.parse("10.2.0.10:80"))])
        for peer in ("10.1.0.7:9", "10.1.0.2:9")
    )
    reset = {"unkept": Fate.RESET, "lost": lost} if prepared == Fate.RESET else {}
    move = Move("web", (MAP,), (Site(Role.DESTINATION, TREE),), **reset)
    prepare(Executor(kernel, StateDirectory(create=True)), move, kept)

    assert call("post-restore", NATKEEP_ID="web", NATKEEP_UNKEPT=asked) == code

    said = capsys.readouterr().err
    assert (f"prepared with --unkept {prepared}" in said) == bool(code)
    assert bool(told(kernel)) == (prepared == Fate.RESET and not code)
