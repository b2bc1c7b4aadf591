"""tests of the faults: the list of points is closed, and a short run of `make faults` is clean."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from fake_kernel import FakeKernel, FakeSite, KilledError

from natkeep import faultpoints
from natkeep.errors import JournalError, UsageError
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.progress import plan_of
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.step_undo import Undo
from natkeep.plan.steps import (
    AddAddress,
    DropUndone,
    InsertEntries,
    InstallGate,
    OpenGate,
    Prior,
    Step,
    Unknown,
)
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

ROOT = Path(__file__).resolve().parent.parent
FIGURES = re.compile(
    r"(?P<points>\d+) points, (?P<reached>\d+) of them reached; (?P<faults>\d+) faults; "
    r"(?P<kills>\d+) kills at random, \d+ of them half-way; (?P<compared>\d+) surfaces compared; "
    r"(?P<differences>\d+) differences"
)


def find_calls() -> dict[str, set[int]]:
    """Each place that the code says can be reached, and how many arguments are said with it."""
    found: dict[str, set[int]] = {}
    for path in (ROOT / "natkeep").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "faultpoints.reach":
                place = node.args[0]
                assert isinstance(place, ast.Constant), f"{path}: {ast.unparse(node)}"
                found.setdefault(str(place.value), set()).add(min(len(node.args), 2))
    return found


def test_the_code_has_the_listed_places_and_no_others() -> None:
    calls = find_calls()

    assert calls.keys() == faultpoints.PLACES.keys()
    for place, several in faultpoints.PLACES.items():
        assert calls[place] == {2 if several else 1}, place
    assert len(set(faultpoints.POINTS)) == len(faultpoints.POINTS) >= 30


def test_each_kind_of_step_has_its_points() -> None:
    """A new step lands with its faults; one of another natkeep is never done.

    That of no plan, which an undo does and no journal notes, has a place of its own.
    """
    kinds = {*typing.get_args(Step)} - {Unknown, DropUndone}
    assert set(faultpoints.STEPS) == {kind.__name__ for kind in kinds}
    assert "drop" in faultpoints.POINTS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no point ''"),
        ("begun", "there is no point 'begun'"),
        ("begun-FillSet,nowhere:kill", "there is no point 'nowhere'"),
        ("locked:maim", "'maim' is none of kill, error, errno"),
        ("locked:kill=9", "'kill=9' is none of kill, error, errno"),
        ("locked:errno=EWHAT", "there is no errno 'EWHAT'"),
    ],
)
def test_an_unknown_fault_is_refused_at_once(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faultpoints, "_ARMED", faultpoints._parse(text))

    with pytest.raises(UsageError) as raised:
        faultpoints.demand_known()

    assert str(raised.value) == f"NATKEEP_FAULT: {message}"


def run_program(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **environment}, cwd=ROOT,
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_program_reads_the_variable() -> None:
    done = run_program("-m", "natkeep.cli", "status", NATKEEP_FAULT="nowhere")

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("natkeep: NATKEEP_FAULT: there is no point 'nowhere'\n")


@pytest.mark.parametrize(
    ("kind", "code", "last"),
    [
        ("kill", -9, "natkeep: fault locked:kill"),
        ("error", 1, "natkeep.faultpoints.FaultError: fault at locked"),
        ("errno", 1, "natkeep: [Errno 12] Cannot allocate memory"),
        ("errno=EPERM", 1, "natkeep: [Errno 1] Operation not permitted"),
    ],
)
@pytest.mark.root
def test_each_kind_strikes_as_it_says(kind: str, code: int, last: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)

    done = run_program(
        "-m", "natkeep.cli", "teardown", "web",
        NATKEEP_FAULT=f"locked:{kind}", NATKEEP_STATE_DIR=str(tmp_path),
    )  # fmt: skip

    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == last


@pytest.mark.root
def test_the_hook_takes_no_orders_to_fail(tmp_path: Path) -> None:
    """The same point that has just killed a verb; CRIU's environment may be anybody's."""
    tmp_path.chmod(0o700)
    orders = {"NATKEEP_ID": "web", "CRTOOLS_SCRIPT_ACTION": "post-restore"}
    orders |= {"NATKEEP_FAULT": "locked:kill", "NATKEEP_STATE_DIR": str(tmp_path)}

    done = run_program("-I", "-m", "natkeep.criu.hook", **orders)

    assert done.returncode == 7
    assert "no move web" in done.stderr


@pytest.mark.root
def test_a_short_run_leaves_nothing() -> None:
    done = run_program("bench/faults", "--sample", "12", "--kills", "6", PYTHONPATH=str(ROOT))

    assert done.returncode == 0, done.stdout + done.stderr
    figures = FIGURES.search(done.stdout)
    assert figures
    said = {name: int(number) for name, number in figures.groupdict().items()}
    assert said["reached"] == said["points"] == len(faultpoints.POINTS)
    assert (said["faults"], said["kills"], said["differences"]) == (12, 6, 0)
    # Twelve of one site at the least, and one directory, of each run.
    assert said["compared"] >= 12 * (said["faults"] + said["kills"])


# ---- on the fake kernel: what a fault had found -------------------------------------------------

OLD, NEW = parse_address("10.2.0.10"), parse_address("10.3.0.20")
SITES = (Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst"))
MOVE = Move("web", (Map(OLD, NEW),), SITES)
CONNECTIONS = Connections.of(
    FourTuple(Endpoint.parse(f"10.1.0.2:{port}"), Endpoint(OLD, 5000)) for port in (1, 2)
)


class InterruptedKernel(FakeKernel):
    """A signal comes while the first step of *kind* is undone, and before that is done."""

    kind: type = type(None)

    def undo_step(self, step: Step, prior: Prior, undo: Undo | None = None) -> None:
        if isinstance(step, self.kind):
            self.kind = type(None)  # a second one does not come: the command line sees to that
            raise KeyboardInterrupt
        super().undo_step(step, prior, undo)


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(str(tmp_path / "state"), create=True)


@pytest.mark.parametrize("kind", [InstallGate, AddAddress, InsertEntries, OpenGate])
def test_a_signal_during_teardown_is_heeded_when_nothing_is_left(
    kind: type, state: StateDirectory
) -> None:
    kernel = InterruptedKernel()
    kernel.sites = {"gw": FakeSite(), "dst": FakeSite()}
    executor = Executor(kernel, state)
    prepare(executor, MOVE, CONNECTIONS, Gate.OPEN)
    kernel.kind = kind

    with pytest.raises(KeyboardInterrupt):
        teardown(executor, "web")

    assert kernel.sites == {"gw": FakeSite(), "dst": FakeSite()}
    assert [name for name in os.listdir(state.path) if name != "lock"] == []


def test_an_open_that_was_killed_is_ours_to_close_when_it_is_opened_again(
    state: StateDirectory,
) -> None:
    kernel = FakeKernel()
    executor = Executor(kernel, state)
    prepare(executor, MOVE, CONNECTIONS)
    kernel.die_at = kernel.applied  # the gate is open, and nobody has written that down
    journal = state.load("web")
    number = journal.kinds.index("OpenGate")
    step = plan_of(journal).steps[number]
    with pytest.raises(KilledError):
        kernel.apply(step, lambda prior: journal.note(number, "doing", prior, step))

    open_move(executor, "web")

    record = state.load("web").records[number]
    assert (record.state, record.prior) == ("done", Prior(present=False))


def test_what_is_in_the_way_of_a_journal_that_cannot_be_renamed_is_removed(
    state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faultpoints, "_ARMED", {"journal-rename-journal": "errno"})
    executor = Executor(FakeKernel(), state)

    with pytest.raises(JournalError, match="No space left on device"):
        prepare(executor, MOVE, CONNECTIONS)

    assert [name for name in os.listdir(state.path) if name != "lock"] == []
