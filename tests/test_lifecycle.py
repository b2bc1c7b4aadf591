"""tests of the conductor on the fake kernel: order, rollback at each step, what a kill leaves.

A "killed" process is one whose kernel and state directory refuse to do anything more from that
moment on (Mortal...), so that what natkeep would still do to clean up cannot happen, as after
SIGKILL. The next process has a kernel of its own and finds the sites as they were left.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import pytest
from fake_kernel import FakeKernel, FakeSite, FakeSnapshot, KilledError

from natkeep.errors import (
    JournalError,
    KernelError,
    LeftoverError,
    NatkeepError,
    RefusedError,
    UsageError,
)
from natkeep.kernel.interface import Remember
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.kernel.old_address import Needs
from natkeep.lifecycle import drain as draining
from natkeep.lifecycle.check import check, find_new
from natkeep.lifecycle.drain import count_alive, drain
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.repair import repair
from natkeep.lifecycle.replace import replace_move
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.identity import Identity
from natkeep.plan.maps import Map, parse_map
from natkeep.plan.move import Fate, Move, Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.step_undo import Undo
from natkeep.plan.steps import (
    AddAddress,
    AddRules,
    InsertEntries,
    InstallGate,
    OpenGate,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
    Step,
)
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.plan.wanted import want
from natkeep.state.directory import StateDirectory
from natkeep.state.files import MARK

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
SITES = (DESTINATION, GATEWAY)

MAPS = {
    "ipv4": ("10.2.0.10=10.3.0.20", "10.2.0.11=10.3.0.21"),
    "ipv6": ("fd00:2::10=fd00:3::20", "fd00:2::11=fd00:3::21"),
    "both": ("10.2.0.10=10.3.0.20", "fd00:2::11=fd00:3::21"),
    "unkept": ("10.2.0.10=10.3.0.20", "fd00:2::11=fd00:3::21"),
    "udp": ("10.2.0.10=10.3.0.20", "fd00:2::11=fd00:3::21"),
}
"""What a move maps; in "unkept" there are connections besides that are reset, in "udp" sockets."""


def ported(*texts: str) -> tuple[Map, ...]:
    """Maps whose NEW is named."""
    wishes = map(parse_map, texts)
    return tuple(wish.to(wish.new) for wish in wishes if wish.new is not None)


def maps(*texts: str) -> tuple[Map, ...]:
    pairs = [text.split("=") for text in texts]
    return tuple(Map(parse_address(old), parse_address(new)) for old, new in pairs)


def listed(*rows: str) -> Connections:
    """Connections from `LOCAL PEER`, as in a connections file."""
    ends = [map(Endpoint.parse, row.split()) for row in rows]
    return Connections.of(FourTuple(source=peer, destination=local) for local, peer in ends)


CONNECTIONS = listed(
    "10.2.0.10:5000 10.1.0.2:50001",
    "10.2.0.10:5000 10.1.0.2:50002",
    "10.2.0.11:5000 10.1.0.2:50003",
    "[fd00:2::10]:5000 [fd00:1::2]:50001",
    "[fd00:2::11]:5000 [fd00:1::2]:50002",
)
LOST = listed("10.2.0.10:5000 10.1.0.2:60001", "[fd00:2::11]:5000 [fd00:1::2]:60002")


def make_move(family: str = "ipv4", move_id: str = "web", sites: tuple[Site, ...] = SITES) -> Move:
    if family == "unkept":
        return Move(move_id, maps(*MAPS[family]), sites, unkept=Fate.RESET, lost=LOST)
    if family == "udp":
        ends = tuple(map(Endpoint.parse, ("10.2.0.10:53", "[fd00:2::11]:53")))
        return Move(move_id, maps(*MAPS[family]), sites, udp=LOST, udp_servers=ends)
    return Move(move_id, maps(*MAPS[family]), sites)


PLANS = {family: make_plan(make_move(family), CONNECTIONS) for family in MAPS}


def steps_of(family: str, gate: Gate) -> tuple[Step, ...]:
    return PLANS[family].steps if gate == Gate.OPEN else PLANS[family].prepare


class RecordingKernel(FakeKernel):
    """Notes what was done, in order; at `stuck` kinds of steps revert fails."""

    def __init__(self, sites: dict[str, FakeSite] | None = None) -> None:
        super().__init__()
        self.sites = sites if sites is not None else {"gw": FakeSite(), "dst": FakeSite()}
        self.done: list[tuple[str, type, Role]] = []
        self.stuck: tuple[type, ...] = ()
        self.gone: set[str] = set()

    def open_sites(self, sites: Iterable[Site], known: dict[Site, Identity] | None = None) -> None:
        for site in sites:
            if site.netns in self.gone:
                raise NamespaceGoneError(f"the network namespace {site.netns!r} is gone")
            super().open_sites([site], known)

    def apply(self, step: Step, remember: Remember) -> Prior:
        prior = super().apply(step, remember)
        self.done.append(("apply", type(step), step.site.role))
        return prior

    def undo_step(self, step: Step, prior: Prior, undo: Undo | None = None) -> None:
        if isinstance(step, self.stuck):
            raise KernelError(f"{step.site}: told not to undo {type(step).__name__}")
        super().undo_step(step, prior, undo)
        self.done.append(("revert", type(step), step.site.role))


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about a power cut, and it is most of the time that these tests take."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def kernel() -> RecordingKernel:
    return RecordingKernel()


@pytest.fixture
def state(tmp_path: Path) -> StateDirectory:
    return StateDirectory(str(tmp_path / "state"), create=True)


@pytest.fixture
def executor(kernel: RecordingKernel, state: StateDirectory) -> Executor:
    return Executor(kernel, state)


def files(state: StateDirectory) -> dict[str, bytes]:
    """What the state directory holds, without the lock, which is never removed."""
    found = {path.name: path.read_bytes() for path in Path(state.path).iterdir()}
    assert found.pop("lock", MARK) == MARK
    return found


def observe(kernel: FakeKernel, plan: Plan) -> dict[str, object]:
    """Everything that the sites hold, and what natkeep itself sees of the plan there."""
    seen = {site: kernel.observe(site, plan) for site in plan.move.sites}
    return {"content": copy.deepcopy(kernel.sites), "seen": seen}


def empty_sites() -> dict[str, FakeSite]:
    return {"gw": FakeSite(), "dst": FakeSite()}


def sites_with_old_and_lo() -> dict[str, FakeSite]:
    """A destination that has lo up and one OLD of each family, as after an earlier attempt."""
    olds = {parse_address("10.2.0.10"), parse_address("fd00:2::10"), parse_address("10.3.0.20")}
    return {"gw": FakeSite(loopback=True), "dst": FakeSite(loopback=True, addresses=olds)}


def sites_with_another_move() -> dict[str, FakeSite]:
    """As another move with the same addresses and other connections leaves them."""
    kernel = FakeKernel()
    kernel.sites = empty_sites()
    others = ("10.2.0.10:99 10.1.0.9:1", "[fd00:2::11]:99 [fd00:1::9]:1")
    move = Move("other", maps(*MAPS["both"]), SITES)
    for step in make_plan(move, listed(*others)).steps:
        kernel.apply(step, lambda prior: None)
    return kernel.sites


STARTS = [empty_sites, sites_with_old_and_lo, sites_with_another_move]
EACH_START = pytest.mark.parametrize("start", STARTS, ids=lambda start: start.__name__)
EACH_STEP = pytest.mark.parametrize(
    ("start", "family", "gate", "number"),
    [
        pytest.param(
            *(start, family, gate, number),
            id=f"{start.__name__}-{family}-{gate}-{number}-{type(step).__name__}",
            # An open move has the steps of a closed one, and "both" those of each family.
            marks=[]
            if (start, gate) == (empty_sites, Gate.OPEN) and family not in ("ipv4", "ipv6")
            else pytest.mark.whole,
        )
        for start in STARTS
        for family in (MAPS if start is empty_sites else ("both",))
        for gate in (Gate.CLOSED, Gate.OPEN)
        for number, step in enumerate(steps_of(family, gate))
    ],
)


# ---- failure and rollback --------------------------------------------------------------------


@EACH_STEP
def test_prepare_that_fails_at_a_step_leaves_nothing(
    family: str,
    gate: Gate,
    number: int,
    start: Callable[[], dict[str, FakeSite]],
    state: StateDirectory,
) -> None:
    kernel = RecordingKernel(start())
    before = observe(kernel, PLANS[family])
    kernel.fail_at = number

    with pytest.raises(KernelError) as caught:
        prepare(Executor(kernel, state), make_move(family), CONNECTIONS, gate)

    assert (
        f"{steps_of(family, gate)[number].site}: told to fail",
        5,
    ) == (str(caught.value), caught.value.exit_code)
    assert before == observe(kernel, PLANS[family])
    assert files(state) == {}
    assert number == sum(verb == "apply" for verb, *_ in kernel.done)


@EACH_START
@pytest.mark.parametrize("family", MAPS)
@pytest.mark.parametrize("gate", [Gate.CLOSED, Gate.OPEN])
def test_teardown_restores_what_was_there_and_twice_is_once(
    family: str, gate: Gate, start: Callable[[], dict[str, FakeSite]], state: StateDirectory
) -> None:
    kernel = RecordingKernel(start())
    before = observe(kernel, PLANS[family])
    executor = Executor(kernel, state)
    prepare(executor, make_move(family), CONNECTIONS, gate)
    assert before != observe(kernel, PLANS[family])

    assert teardown(executor, "web") is True
    assert before == observe(kernel, PLANS[family])
    assert files(state) == {}

    kernel.done.clear()
    assert teardown(executor, "web") is False
    assert before == observe(kernel, PLANS[family])
    assert kernel.done == []


def test_teardown_of_an_unknown_id_is_fine_and_touches_no_file_outside_the_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user's own web.connections, in the directory that natkeep is called in, stays."""
    monkeypatch.chdir(tmp_path)
    for name in ("web.connections", "web.journal"):
        Path(name).write_text("mine\n")
    executor = Executor(FakeKernel(), StateDirectory(str(tmp_path / "nowhere"), create=False))

    assert teardown(executor, "web") is False
    assert {"web.connections", "web.journal"} == {path.name for path in tmp_path.iterdir()}


def test_teardown_does_not_leave_the_state_directory_by_the_id(
    tmp_path: Path, executor: Executor
) -> None:
    (tmp_path / "web.connections").write_text("mine\n")
    with pytest.raises(UsageError):
        teardown(executor, "../web")
    assert (tmp_path / "web.connections").read_text() == "mine\n"


def test_prepare_that_cannot_be_undone_says_what_is_left_and_teardown_finishes_it(
    kernel: RecordingKernel, executor: Executor, state: StateDirectory
) -> None:
    before = copy.deepcopy(kernel.sites)
    kernel.fail_at = len(PLANS["ipv4"].prepare) - 1
    kernel.stuck = (RaiseLoopback,)

    with pytest.raises(LeftoverError) as caught:
        prepare(executor, make_move(), CONNECTIONS)

    assert caught.value.exit_code == 8
    expected = "move web: not undone: destination=dst: told not to undo RaiseLoopback"
    assert expected == str(caught.value)
    assert "natkeep teardown web" in str(caught.value.hint)
    assert isinstance(caught.value.__cause__, KernelError)
    # What could be undone was: only lo is still up.
    assert {**before, "dst": FakeSite(loopback=True)} == kernel.sites
    assert state.ids() == ("web",)

    kernel.stuck = ()
    assert teardown(executor, "web") is True
    assert before == kernel.sites
    assert files(state) == {}


@pytest.mark.parametrize("kind", [InstallGate, AddAddress, InsertEntries, RaiseLoopback])
def test_teardown_that_fails_names_what_is_left_and_a_second_finishes(
    kind: type, kernel: RecordingKernel, executor: Executor, state: StateDirectory
) -> None:
    before = copy.deepcopy(kernel.sites)
    prepare(executor, make_move(), CONNECTIONS, Gate.OPEN)
    kernel.stuck = (kind,)

    with pytest.raises(LeftoverError) as caught:
        teardown(executor, "web")

    stuck = sum(isinstance(step, kind) for step in PLANS["ipv4"].steps)
    assert stuck == str(caught.value).count(f"told not to undo {kind.__name__}")
    assert caught.value.exit_code == 8
    assert state.ids() == ("web",)

    kernel.stuck = ()
    kernel.done.clear()
    assert teardown(executor, "web") is True
    # Where anything was left, what comes after all else comes again: the table goes with the
    # gate, rules with OLD, and what a gateway had of its own is given back.
    again = {kind, InstallGate, AddRules, PurgeEntries}
    assert {kind} <= {step for _, step, _ in kernel.done} <= again
    assert before == kernel.sites
    assert files(state) == {}


class FullState(StateDirectory):
    """A disk that is full from the record number `room` on."""

    room = 1000

    def append(self, name: str, line: dict[str, object]) -> None:
        self.room -= 1
        if self.room < 0:
            raise JournalError(f"cannot write {self.path}/{name}: No space left on device")
        super().append(name, line)


@pytest.mark.parametrize("room", range(2 * len(PLANS["ipv4"].steps)))
def test_a_disk_that_fills_up_in_prepare_leaves_nothing_at_the_sites(
    room: int, kernel: RecordingKernel, tmp_path: Path
) -> None:
    before = copy.deepcopy(kernel.sites)
    state = FullState(str(tmp_path / "state"), create=True)
    state.room = room

    with pytest.raises(JournalError, match="No space left on device"):
        prepare(Executor(kernel, state), make_move(), CONNECTIONS, Gate.OPEN)

    assert before == kernel.sites
    assert files(state) == {}


def test_teardown_needs_no_room_on_the_disk(kernel: RecordingKernel, tmp_path: Path) -> None:
    before = copy.deepcopy(kernel.sites)
    state = FullState(str(tmp_path / "state"), create=True)
    executor = Executor(kernel, state)
    prepare(executor, make_move(), CONNECTIONS, Gate.OPEN)
    state.room = 0

    assert teardown(executor, "web") is True
    assert before == kernel.sites
    assert files(state) == {}


# ---- being killed ----------------------------------------------------------------------------


class MortalState(StateDirectory):
    """Writes nothing any more once the process is dead."""

    dead = False

    def append(self, name: str, line: dict[str, object]) -> None:
        self.demand_life()
        super().append(name, line)

    def remove(self, move_id: str) -> None:
        self.demand_life()
        super().remove(move_id)

    def demand_life(self) -> None:
        if self.dead:
            raise KilledError

    def die(self) -> NoReturn:
        self.dead = True
        raise KilledError


MOMENTS = ("before it is begun", "before the change", "after the change")


class MortalKernel(FakeKernel):
    """Dies at the apply or revert number `at`, at one of MOMENTS; then it does nothing any more."""

    def __init__(self, sites: dict[str, FakeSite], state: MortalState) -> None:
        super().__init__()
        self.sites, self.state = sites, state
        self.at, self.moment, self.reverted = -1, "", 0

    def apply(self, step: Step, remember: Remember) -> Prior:
        self.state.demand_life()

        def remember_and_die(prior: Prior) -> None:
            remember(prior)
            self.state.die()

        if self.applied != self.at:
            return super().apply(step, remember)
        if self.moment == MOMENTS[0]:
            self.state.die()
        super().apply(step, remember_and_die if self.moment == MOMENTS[1] else remember)
        self.state.die()

    def undo_step(self, step: Step, prior: Prior, undo: Undo | None = None) -> None:
        self.state.demand_life()
        number, self.reverted = self.reverted, self.reverted + 1
        if number == self.at and self.moment != MOMENTS[2]:
            self.state.die()
        super().undo_step(step, prior, undo)
        if number == self.at:
            self.state.die()


def next_process(kernel: FakeKernel, state: StateDirectory) -> tuple[RecordingKernel, Executor]:
    """What starts after the death: it knows the sites and the state directory, nothing else."""
    revived = RecordingKernel(kernel.sites)
    return revived, Executor(revived, StateDirectory(state.path, create=False))


def prepare_and_die(
    tmp_path: Path,
    number: int,
    moment: str,
    *,
    family: str = "ipv4",
    gate: Gate = Gate.CLOSED,
    sites: dict[str, FakeSite] | None = None,
) -> tuple[RecordingKernel, Executor, StateDirectory]:
    """Kill prepare at step *number*; the sites and the next process."""
    state = MortalState(str(tmp_path / "state"), create=True)
    kernel = MortalKernel(empty_sites() if sites is None else sites, state)
    kernel.at, kernel.moment = number, moment
    with pytest.raises(KilledError):
        prepare(Executor(kernel, state), make_move(family), CONNECTIONS, gate)
    assert number + (moment != MOMENTS[0]) == kernel.applied
    assert kernel.reverted == 0  # a dead process cleans nothing up
    revived, executor = next_process(kernel, state)
    return revived, executor, executor.state


@pytest.mark.parametrize("moment", MOMENTS)
@EACH_STEP
def test_what_a_kill_in_prepare_leaves_is_cleaned_by_teardown(
    family: str,
    gate: Gate,
    number: int,
    moment: str,
    start: Callable[[], dict[str, FakeSite]],
    tmp_path: Path,
) -> None:
    kernel, executor, state = prepare_and_die(
        tmp_path, number, moment, family=family, gate=gate, sites=start()
    )
    assert state.ids() == ("web",)
    if moment == MOMENTS[2] and number == 0:
        assert start() != kernel.sites

    assert teardown(executor, "web") is True
    assert start() == kernel.sites
    assert files(state) == {}
    assert teardown(executor, "web") is False


@pytest.mark.parametrize("moment", MOMENTS[1:])
@pytest.mark.parametrize("number", range(len(PLANS["both"].steps)))
def test_what_a_kill_in_teardown_leaves_is_cleaned_by_the_next(
    number: int, moment: str, tmp_path: Path
) -> None:
    state = MortalState(str(tmp_path / "state"), create=True)
    kernel = MortalKernel(empty_sites(), state)
    executor = Executor(kernel, state)
    prepare(executor, make_move("both"), CONNECTIONS, Gate.OPEN)
    kernel.at, kernel.moment = number, moment
    with pytest.raises(KilledError):
        teardown(executor, "web")

    revived, executor = next_process(kernel, state)
    assert teardown(executor, "web") is True
    assert empty_sites() == revived.sites
    assert files(executor.state) == {}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("which", [0, 1])
def test_what_a_kill_in_open_leaves_can_be_opened_or_torn_down(
    which: int, moment: str, tmp_path: Path
) -> None:
    state = MortalState(str(tmp_path / "state"), create=True)
    kernel = MortalKernel(empty_sites(), state)
    executor = Executor(kernel, state)
    prepare(executor, make_move(), CONNECTIONS)
    kernel.at, kernel.moment = len(PLANS["ipv4"].prepare) + which, moment
    with pytest.raises(KilledError):
        open_move(executor, "web")

    revived, executor = next_process(kernel, state)
    open_move(executor, "web")
    assert [revived.sites[s].gates["web"] for s in ("gw", "dst")] == [Gate.OPEN, Gate.OPEN]
    teardown(executor, "web")
    assert empty_sites() == revived.sites


@pytest.mark.parametrize("number", range(1, len(PLANS["ipv4"].prepare)))
def test_open_refuses_a_move_that_was_prepared_in_part(number: int, tmp_path: Path) -> None:
    kernel, executor, _ = prepare_and_die(tmp_path, number, MOMENTS[0])
    before = copy.deepcopy(kernel.sites)

    with pytest.raises(JournalError, match="move web was not prepared to the end") as caught:
        open_move(executor, "web")

    assert caught.value.exit_code == 7
    assert "natkeep teardown web" in str(caught.value.hint)
    assert before == kernel.sites
    assert kernel.done == []


def test_an_id_that_a_killed_prepare_used_is_in_use_until_it_is_torn_down(tmp_path: Path) -> None:
    _, executor, _ = prepare_and_die(tmp_path, 3, MOMENTS[1])
    with pytest.raises(RefusedError, match="the id web is in use"):
        prepare(executor, make_move(), CONNECTIONS)
    teardown(executor, "web")
    prepare(executor, make_move(), CONNECTIONS)


# ---- open ------------------------------------------------------------------------------------


def test_open_lets_through_at_every_site_and_again_does_nothing(
    kernel: RecordingKernel, executor: Executor
) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    gates = [kernel.sites[name].gates["web"] for name in ("gw", "dst")]
    assert gates == [Gate.CLOSED, Gate.CLOSED]

    open_move(executor, "web")
    opened = copy.deepcopy(kernel.sites)
    assert [opened[name].gates["web"] for name in ("gw", "dst")] == [Gate.OPEN, Gate.OPEN]

    kernel.done.clear()
    open_move(executor, "web")
    assert opened == kernel.sites
    assert kernel.done == []


@pytest.mark.parametrize("which", [0, 1])
def test_open_that_fails_at_a_site_closes_the_others_again_and_can_be_repeated(
    which: int, kernel: RecordingKernel, executor: Executor, state: StateDirectory
) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    prepared = copy.deepcopy(kernel.sites)
    kernel.fail_at = kernel.applied + which

    with pytest.raises(KernelError, match="told to fail"):
        open_move(executor, "web")
    assert prepared == kernel.sites
    assert state.ids() == ("web",)  # still prepared, to be opened or torn down

    open_move(executor, "web")
    assert [kernel.sites[name].gates["web"] for name in ("gw", "dst")] == [Gate.OPEN, Gate.OPEN]
    teardown(executor, "web")
    assert empty_sites() == kernel.sites


def test_open_that_cannot_close_again_says_so(
    kernel: RecordingKernel, executor: Executor, state: StateDirectory
) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    kernel.fail_at = kernel.applied + 1
    kernel.stuck = (OpenGate,)
    with pytest.raises(LeftoverError, match="gateway=gw: told not to undo OpenGate"):
        open_move(executor, "web")
    assert state.ids() == ("web",)


def test_open_where_the_gate_is_gone_fails_and_opens_no_site(
    kernel: RecordingKernel, executor: Executor
) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    del kernel.sites["dst"].gates["web"]  # as `nft delete table` would
    with pytest.raises(KernelError, match="no gate of web"):
        open_move(executor, "web")
    assert kernel.sites["gw"].gates["web"] == Gate.CLOSED


def test_open_of_an_unknown_id_is_an_error_of_the_journal(executor: Executor) -> None:
    with pytest.raises(JournalError, match="no move web") as caught:
        open_move(executor, "web")
    assert caught.value.exit_code == 7


# ---- order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sites", [(GATEWAY, DESTINATION), (DESTINATION, GATEWAY)])
def test_the_gateway_comes_first_however_the_sites_are_given(
    sites: tuple[Site, ...], kernel: RecordingKernel, executor: Executor
) -> None:
    prepare(executor, make_move(sites=sites), CONNECTIONS)
    roles = [role for _, _, role in kernel.done]
    assert roles == [Role.GATEWAY] * 8 + [Role.DESTINATION] * 12

    kernel.done.clear()
    open_move(executor, "web")
    opened = [("apply", OpenGate, Role.GATEWAY), ("apply", OpenGate, Role.DESTINATION)]
    assert opened == kernel.done


@pytest.mark.parametrize("sites", [(GATEWAY, DESTINATION), (DESTINATION, GATEWAY)])
def test_teardown_closes_every_gate_before_it_removes_anything(
    sites: tuple[Site, ...], kernel: RecordingKernel, executor: Executor
) -> None:
    prepare(executor, make_move(sites=sites), CONNECTIONS, Gate.OPEN)
    applied = [(step, role) for _, step, role in kernel.done]
    kernel.done.clear()
    teardown(executor, "web")

    assert {OpenGate} == {step for _, step, _ in kernel.done[:2]}
    assert {Role.GATEWAY, Role.DESTINATION} == {role for _, _, role in kernel.done[:2]}
    assert OpenGate not in {step for _, step, _ in kernel.done[2:]}
    assert [("revert", *one) for one in order_undo(applied)] == kernel.done


def order_undo(applied: Iterable[tuple[type[Step], Role]]) -> list[tuple[type[Step], Role]]:
    """Backwards, the destination last: what a gateway sends there is dropped until then."""
    backwards = [*applied][::-1]
    return sorted(backwards, key=lambda one: one[0] != OpenGate and one[1] == Role.DESTINATION)


def test_rollback_runs_in_reverse(kernel: RecordingKernel, executor: Executor) -> None:
    kernel.fail_at = len(PLANS["ipv4"].steps) - 1
    with pytest.raises(KernelError):
        prepare(executor, make_move(), CONNECTIONS, Gate.OPEN)
    steps = [(step, role) for verb, step, role in kernel.done if verb == "apply"]
    undone = [(step, role) for verb, step, role in kernel.done if verb == "revert"]
    begun = (OpenGate, PLANS["ipv4"].steps[-1].site.role)  # the one that failed, too
    assert order_undo([*steps, begun]) == undone


def test_a_gate_and_a_purge_are_undone_again_where_anything_of_their_site_was_left(
    kernel: RecordingKernel, executor: Executor, state: StateDirectory
) -> None:
    """The tables go with the last gate, and a gateway's own entries come back behind ours."""
    prepare(executor, make_move(), CONNECTIONS, Gate.OPEN)
    kernel.stuck = (AddAddress, InsertEntries)
    with pytest.raises(LeftoverError):
        teardown(executor, "web")
    kept, again = (InstallGate, AddRules, PurgeEntries), list[tuple[type[Step], Role]]()
    journal = state.load("web")
    for step, record in zip(PLANS["ipv4"].steps, journal.records.values(), strict=True):
        again += [(type(step), step.site.role)] if isinstance(step, kept) else []
        assert (record.state == "undone") == (not isinstance(step, (*kept, *kernel.stuck)))
    kernel.stuck = ()
    kernel.done.clear()
    teardown(executor, "web")

    assert [(step, role) for _, step, role in kernel.done if step in kept] == order_undo(again)
    assert kernel.sites == {"gw": FakeSite(), "dst": FakeSite()}


def test_open_adds_and_takes_nothing_away(kernel: RecordingKernel, executor: Executor) -> None:
    """After a deletion close() of any socket waits for the kernel: not inside the blackout."""
    prepare(executor, make_move(), CONNECTIONS)
    kernel.done.clear()
    open_move(executor, "web")

    assert {(verb, step) for verb, step, _ in kernel.done} == {("apply", OpenGate)}


def test_a_replaced_move_goes_when_the_new_gate_is_closed_and_all_is_ready(
    kernel: RecordingKernel, executor: Executor
) -> None:
    prepare(executor, make_move(), CONNECTIONS, Gate.OPEN)
    kernel.done.clear()
    replace_move(executor, "web", make_move(move_id="next"), CONNECTIONS)

    verbs = [verb for verb, _, _ in kernel.done]
    first = verbs.index("revert")
    assert set(verbs[first:]) == {"revert"}
    assert [step for _, step, _ in kernel.done[:first]] == [*map(type, PLANS["ipv4"].prepare)]


def test_everything_is_checked_before_anything_is_changed(
    kernel: RecordingKernel, executor: Executor, state: StateDirectory
) -> None:
    """A refusal by the last site, when the first has not been touched yet."""
    kernel.sites["dst"].gates["web"] = Gate.CLOSED
    with pytest.raises(RefusedError, match="destination=dst: move web is prepared there already"):
        prepare(executor, make_move(), CONNECTIONS)
    assert kernel.done == []
    assert files(state) == {}


def test_check_changes_nothing(kernel: RecordingKernel, executor: Executor) -> None:
    before = copy.deepcopy(kernel.sites)
    assert PLANS["ipv4"] == check(executor, make_move(), CONNECTIONS)
    assert before == kernel.sites
    assert kernel.done == []
    assert files(executor.state) == {}


def test_each_command_is_talked_of_as_it_is_done_and_undone(
    kernel: RecordingKernel, state: StateDirectory
) -> None:
    lines: list[str] = []
    executor = Executor(kernel, state, lines.append)
    plan = prepare(executor, make_move(), CONNECTIONS, Gate.OPEN)
    expected = [f"[+] {line}" for step in plan.steps for line in step.describe()]
    assert expected == lines

    lines.clear()
    teardown(executor, "web")
    sites = {step.site.role: step.site for step in plan.steps}
    undone = order_undo((type(step), step.site.role) for step in plan.steps)
    assert [f"[-] {step.__name__} at {sites[role]}" for step, role in undone] == lines


# ---- several moves ---------------------------------------------------------------------------


def test_an_id_in_use_is_refused(kernel: RecordingKernel, executor: Executor) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    before = copy.deepcopy(kernel.sites)
    with pytest.raises(RefusedError, match="the id web is in use") as caught:
        prepare(executor, make_move("ipv6"), CONNECTIONS)
    assert caught.value.exit_code == 4
    assert "natkeep teardown web" in str(caught.value.hint)
    assert before == kernel.sites


def test_one_old_cannot_become_two_news(kernel: RecordingKernel, executor: Executor) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    before = copy.deepcopy(kernel.sites)
    elsewhere = Move("api", maps("10.2.0.10=10.3.0.99"), SITES)
    with pytest.raises(RefusedError) as caught:
        prepare(executor, elsewhere, listed("10.2.0.10:1 10.1.0.9:1"))
    assert str(caught.value) == "10.2.0.10 is moved to 10.3.0.20 by web already"
    assert caught.value.hint == "natkeep teardown web first"
    assert before == kernel.sites


WEB, API = "10.2.0.10:80=10.3.0.20:8080", "10.2.0.10:443=10.3.0.99:8443"
AT_80, AT_443 = listed("10.2.0.10:80 10.1.0.2:1"), listed("10.2.0.10:443 10.1.0.2:1")


def test_two_ports_of_one_old_may_become_two_news(
    kernel: RecordingKernel, executor: Executor
) -> None:
    """Of either move's image both ports have connections; each keeps its own."""
    before = copy.deepcopy(kernel.sites)
    both = Connections.joined([AT_80, AT_443])
    prepare(executor, Move("web", ported(WEB), (SITES[0],)), both)
    plan = prepare(executor, Move("api", ported(API), (SITES[0],)), both)

    assert [one.kept for one in plan.translations] == [AT_443]
    assert executor.state.ids() == ("api", "web")
    for move_id in ("web", "api"):
        teardown(executor, move_id)
    assert before == kernel.sites


@pytest.mark.parametrize(
    ("second", "some", "why"),
    [
        ("10.2.0.10:80=10.3.0.99:8443", AT_80, "10.2.0.10:80 is moved to 10.3.0.20:8080 by web"),
        ("10.2.0.10:80=10.3.0.20:8081", AT_80, "10.2.0.10:80 is moved to 10.3.0.20:8080 by web"),
        (
            "10.2.0.10=10.3.0.99",
            AT_80,
            "10.1.0.2:1 > 10.2.0.10:80 and 10.1.0.2:1 > 10.2.0.10:80 (of move web) "
            "would be one tuple at OLD",
        ),
        (
            "10.2.0.10:443=10.3.0.20:8080",
            AT_443,
            "10.1.0.2:1 > 10.2.0.10:443 and 10.1.0.2:1 > 10.2.0.10:80 (of move web) "
            "would be one tuple at NEW",
        ),
        (
            "10.2.0.99=10.3.0.20",
            listed("10.2.0.99:8080 10.1.0.2:1"),
            "10.1.0.2:1 > 10.2.0.99:8080 and 10.1.0.2:1 > 10.2.0.10:80 (of move web) "
            "would be one tuple at NEW",
        ),
    ],
)
def test_moves_of_one_port_or_one_tuple_are_refused(
    kernel: RecordingKernel, executor: Executor, second: str, some: Connections, why: str
) -> None:
    prepare(executor, Move("web", ported(WEB), (SITES[0],)), AT_80)
    before = copy.deepcopy(kernel.sites)

    with pytest.raises(RefusedError) as caught:
        prepare(executor, Move("api", ported(second), (SITES[0],)), some)

    assert str(caught.value).startswith(why)
    assert before == kernel.sites


def test_a_listener_of_two_moves_goes_to_one_of_them(executor: Executor) -> None:
    listener = (Endpoint.parse("10.2.0.10:80"),)
    web = Move("web", ported(WEB), (SITES[0],), listeners=listener)
    prepare(executor, web, AT_80)
    rest = Move("rest", maps("10.2.0.10=10.3.0.99"), (SITES[0],), listeners=listener)

    with pytest.raises(RefusedError, match=r"10\.2\.0\.10:80 would stand for two listeners"):
        prepare(executor, rest, AT_443)


def test_one_old_may_become_two_news_at_different_sites(
    kernel: RecordingKernel, executor: Executor
) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    sites = (Site(Role.DESTINATION, "dst2"), Site(Role.GATEWAY, "gw2"))
    prepare(executor, Move("api", maps("10.2.0.10=10.3.0.99"), sites), CONNECTIONS)
    assert executor.state.ids() == ("api", "web")


@pytest.mark.parametrize(
    ("map_", "row", "named"),
    [
        (
            "10.2.0.10=10.3.0.20",
            "10.2.0.10:5000 10.1.0.2:50002",
            "10.1.0.2:50002 > 10.2.0.10:5000 and 10.1.0.2:50002 > 10.2.0.10:5000 (of move web) "
            "would be one tuple at OLD; 1 in all",
        ),
        (
            "10.2.0.99=10.3.0.20",
            "10.2.0.99:5000 10.1.0.2:50002",
            "10.1.0.2:50002 > 10.2.0.99:5000 and 10.1.0.2:50002 > 10.2.0.10:5000 (of move web) "
            "would be one tuple at NEW; 1 in all",
        ),
        (
            "fd00:2::99=fd00:3::21",
            "[fd00:2::99]:5000 [fd00:1::2]:50002",
            "[fd00:1::2]:50002 > [fd00:2::99]:5000 and [fd00:1::2]:50002 > [fd00:2::11]:5000 "
            "(of move web) would be one tuple at NEW; 1 in all",
        ),
    ],
)
def test_tuples_of_two_moves_that_would_be_one_are_named(
    map_: str, row: str, named: str, kernel: RecordingKernel, executor: Executor
) -> None:
    prepare(executor, make_move("both"), CONNECTIONS)
    before = copy.deepcopy(kernel.sites)
    with pytest.raises(RefusedError) as caught:
        prepare(executor, Move("api", maps(map_), SITES), listed(row))
    assert named == str(caught.value)
    assert before == kernel.sites


def sites_after(move_id: str, connections: Connections, tmp_path: Path) -> dict[str, FakeSite]:
    """As this move alone leaves them."""
    kernel = RecordingKernel()
    state = StateDirectory(str(tmp_path / f"only-{move_id}"), create=True)
    prepare(Executor(kernel, state), make_move("both", move_id), connections)
    return kernel.sites


@pytest.mark.parametrize(("first", "last"), [("web", "api"), ("api", "web")])
def test_of_two_moves_with_one_old_either_may_go_first_and_the_last_removes_the_address(
    first: str, last: str, kernel: RecordingKernel, executor: Executor, tmp_path: Path
) -> None:
    others = listed("10.2.0.10:5000 10.1.0.2:60001", "[fd00:2::11]:5000 [fd00:1::2]:60002")
    rows = {"web": CONNECTIONS, "api": others}
    prepare(executor, make_move("both", "web"), rows["web"])
    prepare(executor, make_move("both", "api"), rows["api"])

    teardown(executor, first)
    assert sites_after(last, rows[last], tmp_path) == kernel.sites
    assert [site.drift for site in read_status(executor, (last,))[0].sites] == [()] * 2

    open_move(executor, last)  # what is left works as if it had been alone
    teardown(executor, last)
    assert empty_sites() == kernel.sites
    assert files(executor.state) == {}


def test_an_address_that_was_there_before_both_moves_stays(
    executor: Executor, kernel: RecordingKernel
) -> None:
    kernel.sites = sites_with_old_and_lo()
    prepare(executor, make_move("both", "web"), CONNECTIONS)
    prepare(executor, make_move("both", "api"), listed("10.2.0.10:5000 10.1.0.2:60001"))
    teardown(executor, "web")
    teardown(executor, "api")
    assert sites_with_old_and_lo() == kernel.sites


def test_prepare_that_fails_leaves_the_address_to_the_move_that_had_it(
    executor: Executor, kernel: RecordingKernel, state: StateDirectory
) -> None:
    prepare(executor, make_move("both", "web"), CONNECTIONS)
    before, on_disk = copy.deepcopy(kernel.sites), files(state)
    move, others = make_move("both", "api"), listed("10.2.0.10:5000 10.1.0.2:60001")
    kernel.fail_at = kernel.applied + len(make_plan(move, others).prepare) - 1
    with pytest.raises(KernelError):
        prepare(executor, move, others)
    assert (before, on_disk) == (kernel.sites, files(state))


def test_lo_goes_with_the_last_address_though_handing_one_over_has_failed(
    executor: Executor, kernel: RecordingKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(executor, make_move("both", "web"), CONNECTIONS)
    prepare(executor, make_move("both", "api"), listed("10.2.0.10:5000 10.1.0.2:60001"))
    failures = ["the disk is full"]

    def fail_once(point: str, *_: str) -> None:
        if point == "handed-over" and failures:
            raise OSError(failures.pop())

    with monkeypatch.context() as patched:
        patched.setattr("natkeep.faultpoints.reach", fail_once)
        with pytest.raises(LeftoverError, match="the disk is full"):
            teardown(executor, "web")
    teardown(executor, "api")
    teardown(executor, "web")
    assert empty_sites() == kernel.sites


def test_a_prepare_that_was_killed_before_its_address_does_not_keep_that_of_another(
    executor: Executor, kernel: RecordingKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(executor, make_move("both", "web"), CONNECTIONS)
    move, others = make_move("both", "api"), listed("10.2.0.10:5000 10.1.0.2:60001")
    steps = make_plan(move, others).prepare
    put = next(n for n, step in enumerate(steps) if isinstance(step, AddAddress))
    kernel.fail_at = kernel.applied + put
    monkeypatch.setattr(Executor, "undo_all", lambda *_: None)
    with pytest.raises(KernelError):
        prepare(executor, move, others)
    old = parse_address("10.2.0.10")
    kernel.needs = {old: Needs(("api",))}  # its rules are there
    teardown(executor, "web")
    kernel.needs = {}
    teardown(executor, "api")
    assert empty_sites() == kernel.sites


def test_a_move_whose_journal_cannot_be_read_does_not_stop_another(
    executor: Executor, state: StateDirectory
) -> None:
    (Path(state.path) / "old.journal").write_text("not json\n")
    prepare(executor, make_move(), CONNECTIONS)
    teardown(executor, "web")
    assert state.ids() == ("old",)


# ---- sites -----------------------------------------------------------------------------------


def test_two_sites_that_turn_out_to_be_one_namespace_are_refused(state: StateDirectory) -> None:
    class OneNamespace(RecordingKernel):
        def identity(self, site: Site) -> Identity:
            return (0, 1)

    with pytest.raises(RefusedError, match="are the same network namespace") as caught:
        prepare(Executor(OneNamespace(), state), make_move(), CONNECTIONS)
    assert "gateway=gw and destination=dst" in str(caught.value)
    assert files(state) == {}


def auto(kernel: FakeKernel, state: StateDirectory, *addresses: str, old: str = "10.2.0.10") -> str:
    kernel.sites = {"dst": FakeSite(addresses={parse_address(text) for text in addresses})}
    return str(find_new(Executor(kernel, state), parse_address(old), SITES))


def test_new_auto_is_the_one_address_of_the_family_that_is_not_old(
    kernel: RecordingKernel, state: StateDirectory
) -> None:
    both = ("10.3.0.20", "fd00:3::20")
    assert auto(kernel, state, *both) == "10.3.0.20"
    assert auto(kernel, state, *both, old="fd00:2::10") == "fd00:3::20"
    assert auto(kernel, state, "10.2.0.10", *both) == "10.3.0.20"


@pytest.mark.parametrize(
    ("addresses", "named"),
    [
        ((), "none"),
        (("fd00:3::20",), "none"),
        (("10.2.0.10",), "none"),
        (("10.3.0.20", "10.3.0.21"), "10.3.0.20, 10.3.0.21"),
    ],
)
def test_new_auto_with_none_or_several_addresses_is_refused(
    addresses: tuple[str, ...], named: str, kernel: RecordingKernel, state: StateDirectory
) -> None:
    with pytest.raises(RefusedError) as caught:
        auto(kernel, state, *addresses)
    expected = f"NEW=auto for 10.2.0.10: destination=dst has not one IPv4 address but {named}"
    assert expected == str(caught.value)
    assert caught.value.exit_code == 4


def test_new_auto_without_a_destination_is_a_mistake_in_the_command_line(
    executor: Executor,
) -> None:
    with pytest.raises(UsageError, match="only where there is a site destination"):
        find_new(executor, parse_address("10.2.0.10"), (GATEWAY,))


@pytest.mark.parametrize("gone", ["gw", "dst"])
def test_teardown_goes_on_where_a_namespace_is_gone_with_all_that_was_in_it(
    gone: str, kernel: RecordingKernel, state: StateDirectory
) -> None:
    lines: list[str] = []
    executor = Executor(kernel, state, lines.append)
    prepare(executor, make_move(), CONNECTIONS)
    kernel.gone.add(gone)
    lines.clear()

    assert teardown(executor, "web") is True
    there = {"gw", "dst"} - {gone}
    assert [FakeSite()] == [kernel.sites[name] for name in there]
    assert FakeSite() != kernel.sites[gone]  # it was not reached for
    assert (
        f"natkeep: the network namespace '{gone}' is gone, and with it all that was in it" in lines
    )
    assert files(state) == {}


# ---- an earlier boot -------------------------------------------------------------------------


@pytest.fixture
def rebooted(executor: Executor, kernel: RecordingKernel, state: StateDirectory) -> Executor:
    """A move that was prepared before the last boot; whatever the sites hold is not its own."""
    prepare(executor, make_move(), CONNECTIONS)
    path = Path(state.path) / "web.journal"
    header, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(header), "boot": "earlier"}) + "\n" + rest)
    kernel.done.clear()
    return executor


def test_a_move_of_an_earlier_boot_cannot_be_opened(
    rebooted: Executor, kernel: RecordingKernel
) -> None:
    with pytest.raises(JournalError, match="before the last boot") as caught:
        open_move(rebooted, "web")
    assert caught.value.exit_code == 7
    assert kernel.done == []


def test_a_move_of_an_earlier_boot_is_told_by_status(rebooted: Executor) -> None:
    (status,) = read_status(rebooted, ())
    drift = ("prepared before the last boot: nothing is there",)
    assert [(None, drift)] * 2 == [(site.seen, site.drift) for site in status.sites]


def test_teardown_of_a_move_of_an_earlier_boot_removes_the_journal_and_touches_no_site(
    rebooted: Executor, kernel: RecordingKernel, state: StateDirectory
) -> None:
    before = copy.deepcopy(kernel.sites)
    assert teardown(rebooted, "web") is True
    assert before == kernel.sites
    assert kernel.done == []
    assert files(state) == {}


def test_a_move_of_an_earlier_boot_is_in_nobodys_way(
    rebooted: Executor, kernel: RecordingKernel
) -> None:
    kernel.sites = empty_sites()
    prepare(rebooted, Move("api", maps("10.2.0.10=10.3.0.99"), SITES), CONNECTIONS)


# ---- status and drain ------------------------------------------------------------------------


def test_status_tells_gate_connections_and_drift(
    kernel: RecordingKernel, executor: Executor
) -> None:
    assert read_status(executor, ()) == ()
    prepare(executor, make_move("both"), CONNECTIONS)
    (status,) = read_status(executor, ())
    assert (PLANS["both"], Gate.CLOSED) == (status.plan, status.gate)
    assert [(s.site, s.drift) for s in status.sites] == [(DESTINATION, ()), (GATEWAY, ())]

    open_move(executor, "web")
    assert read_status(executor, ("web",))[0].gate == Gate.OPEN

    kernel.sites["dst"].addresses.clear()
    kernel.sites["gw"].gates.clear()
    kernel.sites["gw"].loaded.clear()
    (status,) = read_status(executor, ("web",))
    assert {site.site: site.drift for site in status.sites} == {
        DESTINATION: (
            "address 10.2.0.10: not on this host",
            "address fd00:2::11: not on this host",
        ),
        GATEWAY: ("table inet natkeep: nothing of move web is there",),
    }
    assert status.gate == Gate.CLOSED  # not every gate is open


def test_status_of_an_unknown_id_is_an_error_of_the_journal(executor: Executor) -> None:
    with pytest.raises(JournalError, match="no move web"):
        read_status(executor, ("web",))


def test_status_tells_a_namespace_that_is_gone(kernel: RecordingKernel, executor: Executor) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    kernel.gone.add("dst")
    (status,) = read_status(executor, ())
    gone = ("the network namespace 'dst' is gone",)
    assert {DESTINATION: gone, GATEWAY: ()} == {site.site: site.drift for site in status.sites}


def test_status_changes_nothing(kernel: RecordingKernel, executor: Executor) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    before, on_disk = copy.deepcopy(kernel.sites), files(executor.state)
    kernel.done.clear()
    read_status(executor, ())
    assert (before, on_disk, []) == (kernel.sites, files(executor.state), kernel.done)


def test_connections_count_as_alive_only_where_the_gate_is_open(
    kernel: RecordingKernel, executor: Executor
) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    assert count_alive(executor, "web") == 0
    open_move(executor, "web")
    assert count_alive(executor, "web") == 3
    kernel.sites["dst"].entries.popitem()  # gone at one site is gone
    assert count_alive(executor, "web") == 2


class EndingKernel(RecordingKernel):
    """At each look one more kept connection has ended."""

    def observe(self, site: Site, plan: Plan) -> Observation:
        seen = super().observe(site, plan)
        if self.sites[site.netns].entries:
            self.sites[site.netns].entries.popitem()
        return seen


def test_drain_waits_until_no_connection_lives(
    state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draining, "_DRAIN_INTERVAL", 0)
    lines: list[str] = []
    executor = Executor(EndingKernel(), state, lines.append)
    prepare(executor, make_move(), CONNECTIONS, Gate.OPEN)
    lines.clear()

    assert drain(executor, "web", None) == 0
    assert [f"natkeep: {left} connections of web live" for left in (3, 2, 1)] == lines


def test_drain_gives_up_in_time_and_says_how_many_live(executor: Executor) -> None:
    prepare(executor, make_move(), CONNECTIONS, Gate.OPEN)
    assert drain(executor, "web", 0) == 3


# ---- another natkeep -------------------------------------------------------------------------


def rename_step(state: StateDirectory, number: int) -> None:
    """As if a natkeep had written it that does a step that is not known today."""
    path = Path(state.path) / "web.journal"
    header, rest = path.read_text().split("\n", 1)
    changed = json.loads(header)
    changed["steps"][number] = "InstallDoor"
    path.write_text(json.dumps(changed) + "\n" + rest)


def test_a_step_that_another_natkeep_has_done_is_left_alone_and_undone(
    executor: Executor, kernel: RecordingKernel, state: StateDirectory
) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    rename_step(state, [*state.load("web").kinds].index("RaiseLoopback"))

    open_move(executor, "web")
    assert [site.drift for site in read_status(executor, ("web",))[0].sites] == [(), ()]
    assert repair(executor, "web") == ()
    assert teardown(executor, "web")
    assert kernel.sites == {"gw": FakeSite(), "dst": FakeSite()}


def test_a_journal_that_is_opened_by_another_step_is_opened_by_none_but_torn_down(
    executor: Executor, kernel: RecordingKernel, state: StateDirectory
) -> None:
    """Of another natkeep: what its records have to be undone, and no plan, is all that it takes."""
    prepare(executor, make_move(), CONNECTIONS)
    rename_step(state, -1)
    before = copy.deepcopy(kernel.sites)

    with pytest.raises(JournalError, match="by a natkeep that opens it by other steps") as caught:
        open_move(executor, "web")
    assert caught.value.exit_code == 7
    assert before == kernel.sites
    assert teardown(executor, "web")
    assert kernel.sites == {"gw": FakeSite(), "dst": FakeSite()}


def test_what_changes_a_site_holds_the_lock_of_its_move_and_unless_it_opens_that_of_all(
    kernel: RecordingKernel, executor: Executor, state: StateDirectory
) -> None:
    """Asked in the middle of the work, the lock is not to be had."""
    second = StateDirectory(state.path, create=False)
    asked: list[str] = []

    class Asking(RecordingKernel):
        def apply(self, step: Step, remember: Remember) -> Prior:
            self.try_lock("apply")
            return super().apply(step, remember)

        def undo_step(self, step: Step, prior: Prior, undo: Undo | None = None) -> None:
            self.try_lock("revert")
            super().undo_step(step, prior, undo)

        def try_lock(self, verb: str) -> None:
            opens = verb == "apply" and len(asked) >= len(PLANS["ipv4"].prepare)
            if not opens:  # which changes nothing that moves share
                with pytest.raises(JournalError, match="another natkeep holds"), second.locked(0):
                    pass
            with pytest.raises(JournalError, match="holds"), second.holding("web", 0):
                pass
            asked.append(verb)

    executor = dataclasses.replace(executor, kernel=Asking(kernel.sites))
    prepare(executor, make_move(), CONNECTIONS)
    open_move(executor, "web")
    teardown(executor, "web")
    steps = len(PLANS["ipv4"].steps)
    assert ["apply"] * steps + ["revert"] * steps == asked
    with second.locked(0):  # and afterwards it is free
        pass


def test_nothing_is_kept_when_no_connection_has_an_old_address(
    executor: Executor, state: StateDirectory
) -> None:
    with pytest.raises(NatkeepError, match="has the local address"):
        prepare(executor, make_move(), listed("10.9.9.9:1 10.1.0.2:2"))
    assert files(state) == {}


def test_whoever_looks_at_many_moves_lets_go_of_each(
    executor: Executor, kernel: RecordingKernel, state: StateDirectory
) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    for look in (
        lambda: read_status(executor, ()),
        lambda: gc(Executor(kernel, state), ()),
        lambda: repair(Executor(kernel, state), "web"),
    ):
        kernel.open_sites(SITES)
        look()
        assert kernel.opened == set()


class HazyKernel(RecordingKernel):
    """Its snapshots miss the gate of some moves, which are just being changed."""

    def __init__(self) -> None:
        super().__init__()
        self.closely: list[str] = []
        self.missed: set[str] = set()
        self.taken = 0

    def observe(self, site: Site, plan: Plan) -> Observation:
        self.closely.append(plan.move.id)
        return super().observe(site, plan)

    def snapshot(self, site: Site) -> FakeSnapshot:
        self.taken += 1
        return Hazy(self)


class Hazy(FakeSnapshot):
    def observe(self, site: Site, plan: Plan) -> Observation:
        assert isinstance(self.kernel, HazyKernel)
        seen = FakeKernel.observe(self.kernel, site, plan)
        if plan.move.id in self.kernel.missed:
            return dataclasses.replace(seen, gone=frozenset(want(plan, site)), gate=Gate.ABSENT)
        return seen


def prepare_many(executor: Executor, count: int) -> list[str]:
    kept = listed("10.2.0.10:5000 10.1.0.2:50001")
    for number in range(count):
        [old], [new] = ([parse_address(f"10.{net}.0.{number + 1}")] for net in (2, 3))
        move = Move(f"m{number:02}", (Map(old, new),), (GATEWAY,))
        prepare(executor, move, kept.toward(old))
    return [f"m{number:02}" for number in range(count)]


def test_many_moves_at_a_site_are_seen_in_one_snapshot_and_drift_is_looked_at_closely(
    state: StateDirectory,
) -> None:
    kernel = HazyKernel()
    executor = Executor(kernel, state)
    ids = prepare_many(executor, 20)
    assert read_status(executor, tuple(ids[:15])) == read_status(executor, ())[:15]
    assert kernel.taken == 1  # for all, not for fifteen
    assert kernel.closely == ids[:15]

    kernel.closely.clear()
    kernel.missed = {"m03", "m04"}
    here = kernel.sites["gw"]
    del here.gates["m04"]
    here.loaded = [step for step in here.loaded if step.move_id != "m04"]
    found = read_status(executor, ())

    assert kernel.closely == ["m03", "m04"]
    drifted = [s.plan.move.id for s in found if any(site.drift for site in s.sites)]
    assert drifted == ["m04"]  # what the shared snapshot alone did not show is no drift
    assert kernel.opened == set()


def test_a_move_that_is_torn_down_while_many_are_looked_at_is_left_out(
    state: StateDirectory,
) -> None:
    kernel = HazyKernel()
    executor = Executor(kernel, state)
    ids = prepare_many(executor, 20)

    class TornDown(Hazy):
        def observe(self, site: Site, plan: Plan) -> Observation:
            if plan.move.id == "m07" and "m07" in state.ids():
                teardown(executor, "m07")
            return super().observe(site, plan)

    kernel.snapshot = lambda site: TornDown(kernel)  # type: ignore[method-assign]
    kernel.missed = {"m07"}

    unreadable: list[JournalError] = []
    assert [s.plan.move.id for s in read_status(executor, (), unreadable)] == [
        i for i in ids if i != "m07"
    ]
    assert unreadable == []


def test_what_stays_dropped_since_a_gateway_could_not_be_undone_goes_once_it_is(
    kernel: RecordingKernel, executor: Executor
) -> None:
    prepare(executor, make_move(), CONNECTIONS)
    kernel.stuck = (InsertEntries,)
    ends = [t.outer for t in PLANS["ipv4"].translations if t.site.netns == "dst"]
    kernel.arriving["dst"] = Connections.joined(ends)
    with pytest.raises(LeftoverError):
        teardown(executor, "web")
    assert kernel.sites["dst"].undone
    kernel.stuck = ()
    teardown(Executor(kernel, executor.state), "web")
    assert kernel.sites == {"gw": FakeSite(), "dst": FakeSite()}
