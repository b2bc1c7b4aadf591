"""tests of moves that are prepared from a living process: what comes and goes until the freeze.

On the fake kernel; a killed process is one that stops at a line of the journal, as SIGKILL would.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
from fake_kernel import FakeKernel, FakeSite, KilledError

from natkeep import policy
from natkeep.checkpoint import Checkpoint, Inventory, NetworkLock
from natkeep.errors import JournalError, KernelError, RefusedError, UsageError
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.progress import plan_of
from natkeep.lifecycle.repair import repair
from natkeep.lifecycle.replace import replace_move
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.translation import Compared
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory
from natkeep.values import replace

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
V4, V6 = ["10.2.0.10", "10.3.0.20"], ["fd00:2::10", "fd00:3::20"]
MAPS = tuple(Map(parse_address(old), parse_address(new)) for old, new in (V4, V6))


def listed(*ports: int, local: str = "10.2.0.10:5000", peer: str = "10.1.0.2") -> Connections:
    return Connections.of(
        FourTuple(Endpoint.parse(f"{peer}:{port}"), Endpoint.parse(local)) for port in ports
    )


def both(*some: Connections) -> Connections:
    return Connections(b"".join(one.v4 for one in some), b"".join(one.v6 for one in some))


SIX = listed(6001, local="[fd00:2::10]:5000", peer="[fd00:1::2]")
PREPARED = listed(1, 2, 3)
FOUND = both(listed(2, 3, 4, 5), SIX)  # 1 went; 4, 5 and the first of IPv6 came


def image(connections: Connections = FOUND, run_id: str | None = "dump") -> Checkpoint:
    return Checkpoint(connections, (), Inventory(NetworkLock.NFTABLES, run_id))


def move_of(sites: tuple[Site, ...] = (DESTINATION, GATEWAY), **more: Any) -> Move:
    return Move("web", MAPS, sites, **{"live": True, **more})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No disk is waited for, and there is no operator's file."""
    monkeypatch.setattr("os.fsync", lambda fd: None)
    monkeypatch.setattr(policy, "PATH", str(tmp_path / "natkeep.toml"))


@pytest.fixture
def kernel() -> FakeKernel:
    kernel = FakeKernel()
    kernel.open_sites([GATEWAY, DESTINATION])
    return kernel


@pytest.fixture
def executor(kernel: FakeKernel, tmp_path: Path) -> Executor:
    return Executor(kernel, StateDirectory(str(tmp_path / "state"), create=True))


def files(executor: Executor) -> set[str]:
    return {path.name for path in Path(executor.state.path).iterdir()} - {"lock"}


def kept_at(kernel: FakeKernel, site: Site) -> set[FourTuple]:
    """What the sets of a site hold, as the process sees it."""
    new = {parse_address(pair[1]): parse_address(pair[0]) for pair in (V4, V6)}
    found = set()
    for some in kernel.sites[site.netns].sets.values():
        for each in some:
            address = new.get(each.destination.address, each.destination.address)
            found.add(FourTuple(each.source, Endpoint(address, each.destination.port)))
    return found


def drift(executor: Executor) -> list[str]:
    [status] = read_status(executor, ("web",))
    return [line for site in status.sites for line in site.drift]


def redirects_nothing(kernel: FakeKernel) -> bool:
    """Whether the gateway has rules, at most, and not one connection that they are for."""
    seen = kernel.sites["gw"]
    return not (kept_at(kernel, GATEWAY) or seen.entries or seen.addresses)


def test_prepare_redirects_nothing_anywhere(executor: Executor, kernel: FakeKernel) -> None:
    prepare(executor, move_of(), PREPARED)

    assert kernel.sites["gw"].loaded
    assert redirects_nothing(kernel)
    assert kernel.sites["dst"].gates == {"web": Gate.CLOSED}
    assert kept_at(kernel, DESTINATION) == set(PREPARED)
    assert drift(executor) == []
    assert "web.ready" not in files(executor)  # so the hook compares


def test_repair_and_gc_leave_what_waits_alone(executor: Executor, kernel: FakeKernel) -> None:
    prepare(executor, move_of(), PREPARED)
    state = StateDirectory(executor.state.path, create=False)

    assert repair(Executor(kernel, state), "web") == ()
    assert gc(Executor(kernel, state), ()).cleared == ()
    assert redirects_nothing(kernel)


@pytest.mark.parametrize("mode", Mode)
def test_open_adds_what_came_and_the_gateway_never_hears_of_what_went(
    mode: Mode, executor: Executor, kernel: FakeKernel
) -> None:
    prepare(executor, move_of(mode=mode), PREPARED)

    assert open_move(executor, "web", lambda journal: image()) == Compared(3, 1)

    assert kept_at(kernel, GATEWAY) == set(FOUND)
    assert kept_at(kernel, DESTINATION) == {*PREPARED, *FOUND}
    assert {site.gates["web"] for site in kernel.sites.values()} == {Gate.OPEN}
    olds = {map_.old for map_ in MAPS}
    assert kernel.sites["dst"].addresses == olds  # that of IPv6 came with its connection
    assert len(kernel.sites["gw"].entries) == len(FOUND)
    assert len(kernel.sites["dst"].entries) == len(PREPARED) + 3
    kernel.sites["dst"].sockets = set(FOUND)
    assert drift(executor) == []
    assert executor.state.load("web").image == "dump"

    assert teardown(executor, "web")
    kernel.sites["dst"].sockets = set()
    assert set(map(repr, kernel.sites.values())) == {repr(FakeSite())}
    assert files(executor) == set()


@pytest.mark.parametrize("hold", [False, True])
def test_an_image_with_the_same_connections_changes_nothing_at_the_destination(
    hold: bool, executor: Executor, kernel: FakeKernel
) -> None:
    prepare(executor, move_of(hold=hold), PREPARED)
    before = copy.deepcopy(kernel.sites["dst"])

    assert open_move(executor, "web", lambda journal: image(PREPARED)) == Compared(0, 0)

    before.gates["web"] = Gate.OPEN
    after = kernel.sites["dst"]
    assert (after.sets, after.entries, after.gates) == (before.sets, before.entries, before.gates)
    assert kept_at(kernel, GATEWAY) == set(PREPARED)


def test_a_comparison_makes_all_ready_and_opens_nothing(
    executor: Executor, kernel: FakeKernel
) -> None:
    prepare(executor, move_of(), PREPARED)
    assert "web.ready" not in files(executor)

    assert open_move(executor, "web", lambda journal: image(), opens=False) == Compared(3, 1)

    assert kept_at(kernel, GATEWAY) == set(FOUND)
    assert kept_at(kernel, DESTINATION) == {*PREPARED, *FOUND}
    assert {site.gates["web"] for site in kernel.sites.values()} == {Gate.CLOSED}
    assert open_move(executor, "web", lambda journal: image()) == Compared(3, 1)
    assert {site.gates["web"] for site in kernel.sites.values()} == {Gate.OPEN}


def test_without_an_image_it_is_opened_as_prepared(executor: Executor, kernel: FakeKernel) -> None:
    prepare(executor, move_of(), PREPARED)

    assert open_move(executor, "web") is None

    assert kept_at(kernel, GATEWAY) == kept_at(kernel, DESTINATION) == set(PREPARED)
    with pytest.raises(RefusedError, match="was opened before its image was known: 3 conn"):
        open_move(executor, "web", lambda journal: image())
    assert open_move(executor, "web", lambda journal: image(listed(1, 2))) == Compared(0, 1)


def test_opened_again_it_is_the_same_and_another_dump_is_refused(
    executor: Executor, kernel: FakeKernel
) -> None:
    prepare(executor, move_of(), PREPARED)
    open_move(executor, "web", lambda journal: image())
    before, lines = (
        copy.deepcopy(kernel.sites),
        Path(executor.state.path, "web.journal").read_text(),
    )

    assert open_move(executor, "web", lambda journal: image()) == Compared(3, 1)

    assert kernel.sites == before
    assert Path(executor.state.path, "web.journal").read_text() == lines
    with pytest.raises(RefusedError, match="prepared from the image of another dump"):
        open_move(executor, "web", lambda journal: image(run_id="another"))


def test_what_came_and_cannot_be_kept_is_told(executor: Executor) -> None:
    own = listed(9, peer="10.2.0.10")
    prepare(executor, move_of(), PREPARED)

    compared = open_move(executor, "web", lambda journal: image(both(PREPARED, own)))

    assert compared is not None
    assert (compared.came, compared.went) == (0, 0)
    assert compared.unkept == (
        "10.2.0.10:9 > 10.2.0.10:5000: its peer 10.2.0.10 is on the source host too",
    )


def test_the_policy_counts_what_came(
    executor: Executor, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(executor, move_of(), PREPARED)
    before = copy.deepcopy(kernel.sites)
    monkeypatch.setattr(policy, "read_policy", lambda: policy.Policy(max_connections=5))

    with pytest.raises(RefusedError, match="6 connections are more than this machine allows, 5"):
        open_move(executor, "web", lambda journal: image())

    assert kernel.sites == before
    assert open_move(executor, "web", lambda journal: image(listed(2, 3, 4, 5))) == Compared(2, 1)


def test_what_came_and_is_another_moves_is_refused(executor: Executor, kernel: FakeKernel) -> None:
    other = replace(move_of(live=False), id="other")
    prepare(executor, move_of(), PREPARED)
    prepare(executor, other, listed(4))
    before = copy.deepcopy(kernel.sites)

    with pytest.raises(RefusedError, match="of move other"):
        open_move(executor, "web", lambda journal: image())

    assert kernel.sites == before


def test_a_source_cannot_be_kept_quiet_yet() -> None:
    with pytest.raises(UsageError, match="source of a live process"):
        move_of((DESTINATION, Site(Role.SOURCE, "src")))


class Dying(StateDirectory):
    """Nothing reaches the disk any more after so many writes; half of the last one may."""

    left = 1 << 30

    def _take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise KilledError

    def append(self, name: str, line: dict[str, Any]) -> None:
        self._take()
        super().append(name, line)

    def write_changed(self, move_id: str, packed: bytes) -> None:
        self._take()
        super().write_changed(move_id, packed)

    def remove(self, move_id: str) -> None:
        self._take()
        super().remove(move_id)


class Dead(FakeKernel):
    """Does nothing once its process is dead."""

    state: Dying

    def apply(self, step: Any, remember: Any) -> Any:
        self._demand_life()
        return super().apply(step, remember)

    def mend(self, patch: Any, remember: Any) -> None:
        self._demand_life()
        super().mend(patch, remember)

    def undo_step(self, step: Any, prior: Any, undo: Any = None) -> None:
        self._demand_life()
        super().undo_step(step, prior, undo)

    def _demand_life(self) -> None:
        if self.state.left < 0:
            raise KilledError


def die_in_open(directory: Path, writes: int) -> tuple[FakeKernel, bool]:
    """A prepared move whose open was killed after *writes* to the disk; whether it was."""
    kernel = Dead()
    kernel.open_sites([GATEWAY, DESTINATION])
    kernel.state = Dying(str(directory), create=True)
    executor = Executor(kernel, kernel.state)
    prepare(executor, move_of(), PREPARED)
    kernel.state.left = writes
    try:
        open_move(executor, "web", lambda journal: image())
    except KilledError:
        return kernel, True
    return kernel, False


def revive(kernel: FakeKernel, directory: Path) -> Executor:
    """The next process: it knows the sites and the directory, nothing else."""
    after = FakeKernel()
    after.sites = kernel.sites
    return Executor(after, StateDirectory(str(directory), create=False))


@pytest.mark.whole
def test_open_that_was_killed_goes_on_and_is_undone(tmp_path: Path) -> None:
    """At every line of the journal that it writes, and before and after ID.changed."""
    for writes in itertools.count():
        goes_on, undone = tmp_path / f"on-{writes}", tmp_path / f"undone-{writes}"
        kernel, killed = die_in_open(goes_on, writes)
        executor = revive(kernel, goes_on)
        assert open_move(executor, "web", lambda journal: image()) == Compared(3, 1)
        assert kept_at(kernel, GATEWAY) == set(FOUND)
        assert kept_at(kernel, DESTINATION) == {*PREPARED, *FOUND}
        kernel.sites["dst"].sockets = set(FOUND)
        assert drift(executor) == []

        kernel, _ = die_in_open(undone, writes)
        executor = revive(kernel, undone)
        assert teardown(executor, "web")
        assert list(map(repr, kernel.sites.values())) == [repr(FakeSite())] * 2
        assert files(executor) == set()
        if not killed:
            break
    assert writes > 30


def test_gc_lets_a_killed_open_be_repeated(tmp_path: Path) -> None:
    for writes in (1, 2, 3, 8):
        kernel, killed = die_in_open(tmp_path / str(writes), writes)
        assert killed
        executor = revive(kernel, tmp_path / str(writes))

        assert gc(Executor(executor.kernel, executor.state), ()).cleared == ()
        open_move(executor, "web", lambda journal: image())


def test_open_that_fails_can_be_repeated(executor: Executor, kernel: FakeKernel) -> None:
    prepare(executor, move_of(), PREPARED)
    for number in range(100):
        kernel.applied, kernel.fail_at = 0, number
        try:
            open_move(executor, "web", lambda journal: image())
        except KernelError:
            assert kernel.sites["gw"] == FakeSite()
            assert kernel.sites["dst"].gates == {"web": Gate.CLOSED}
            continue
        break
    assert 10 < number < 99
    kernel.sites["dst"].sockets = set(FOUND)
    assert drift(executor) == []
    assert kept_at(kernel, GATEWAY) == set(FOUND)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"again":[', '"again":[9999,'),
        ('"from":[0', '"from":[1'),
        ('"from":[0,', '"from":['),
        ('"changed":"', '"changed":"0'),
        ('"local":[]', '"local":["nowhere"]'),
        ('"image":"dump"', '"image":7'),
    ],
)
def test_a_change_that_is_not_as_written_is_refused(old: str, new: str, executor: Executor) -> None:
    prepare(executor, move_of(), PREPARED)
    open_move(executor, "web", lambda journal: image())
    path = Path(executor.state.path, "web.journal")
    text = path.read_text()
    assert old in text
    at = text.index('{"changed"')
    path.write_text(text[:at] + text[at:].replace(old, new, 1))

    with pytest.raises(JournalError, match="the journal of web is corrupt"):
        executor.state.load("web")


def test_the_plan_read_back_is_the_plan_that_was_made(executor: Executor) -> None:
    prepare(executor, move_of(), PREPARED)
    open_move(executor, "web", lambda journal: image())
    journal = executor.state.load("web")

    assert journal.change is not None
    assert set(journal.change.came) == {*listed(4, 5), *SIX}
    assert set(journal.change.went) == set(listed(1))
    assert tuple(type(step).__name__ for step in plan_of(journal).steps) == journal.kinds
    assert all(journal.is_done(number) for number in range(len(journal.kinds)))


def test_it_moves_on_with_what_came(executor: Executor, kernel: FakeKernel) -> None:
    """The next move finds one plan, whoever came when."""
    third = Site(Role.DESTINATION, "third")
    kernel.open_sites([third])
    news = [parse_address("10.4.0.20"), parse_address("fd00:4::20")]
    maps = tuple(Map(map_.old, new) for map_, new in zip(MAPS, news, strict=True))
    prepare(executor, move_of(), PREPARED)
    open_move(executor, "web", lambda journal: image())

    replace_move(executor, "web", Move("next", maps, (GATEWAY, third)), FOUND)
    open_move(executor, "next")
    assert teardown(executor, "web")
    kernel.sites["third"].sockets = set(FOUND)

    assert kernel.sites["dst"] == FakeSite()
    assert kernel.sites["gw"].gates == {"next": Gate.OPEN}
    [status] = read_status(executor, ("next",))
    assert [line for site in status.sites for line in site.drift] == []
    assert teardown(executor, "next")
    kernel.sites["third"].sockets = set()
    assert set(map(repr, kernel.sites.values())) == {repr(FakeSite())}
