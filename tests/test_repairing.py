"""repair and gc on the fake kernel: what is journalled, what is refused, what a kill leaves.

What each thing that others remove looks like to the real kernel is in kernel/test_mend.py; here
it is that the verbs do what they say, and nothing to a move that is none of their business.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fake_kernel import FakeKernel, FakeSite, KilledError, revert_step

from natkeep.errors import JournalError, KernelError, LeftoverError, NatkeepError, RefusedError
from natkeep.kernel.netns import NamespaceGoneError
from natkeep.lifecycle.drain import count_alive, drain
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import Cleared, Collected, demand_nothing_left, gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.progress import opened_at
from natkeep.lifecycle.repair import repair
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.conntrack import entries
from natkeep.plan.drift import MoveStatus
from natkeep.plan.identity import Identity
from natkeep.plan.liveness import Sighting
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import InsertEntries, OpenGate, Plan, Prior
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.plan.wanted import split_opening
from natkeep.state.directory import StateDirectory
from natkeep.values import replace

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
SOURCE = Site(Role.SOURCE, "src")
MAP = Map(parse_address("10.2.0.10"), parse_address("10.3.0.20"))
OTHER_MAP = Map(parse_address("10.2.0.11"), parse_address("10.3.0.21"))
KEPT = Connections.of(
    FourTuple(Endpoint.parse(f"10.1.0.2:{port}"), Endpoint.parse(f"{old}:80"))
    for old in ("10.2.0.10", "10.2.0.11")
    for port in (5000, 5001, 5002)
)
BEFORE_BOOT = "11111111-1111-1111-1111-111111111111"


class MortalKernel(FakeKernel):
    """Namespaces in `gone` are no more; `ended`: entries of connections that are over."""

    def __init__(self, sites: dict[str, FakeSite]) -> None:
        super().__init__()
        self.sites = sites
        self.gone: set[str] = set()
        self.ended: set[int] = set()

    def open_sites(self, sites: Iterable[Site], known: dict[Site, Identity] | None = None) -> None:
        for site in sites:
            if site.netns in self.gone:
                raise NamespaceGoneError(f"the network namespace {site.netns!r} is gone")
            super().open_sites([site], known)

    def observe(self, site: Site, plan: Plan) -> Observation:
        """Entries of ended connections are shown as such, and counted as carrying."""
        seen = super().observe(site, plan)
        rows = {
            number: tuple(
                entry and replace(entry, alive=i not in self.ended, packets_in=3)
                for i, entry in enumerate(some)
            )
            for number, some in seen.entries.items()
        }
        return replace(seen, entries=rows)


def as_if_older(sighting: Sighting) -> Sighting:
    """As if it had been made a second before."""
    ending = tuple(
        (number, tuple((place, packets, since - 1000) for place, packets, since in some))
        for number, some in sighting.ending
    )
    return replace(sighting, at=sighting.at - 1000, ending=ending)


class World:
    """One machine, and a natkeep on it that starts anew for every verb."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "state"
        self.sites = {name: FakeSite() for name in ("", "gw", "dst", "src")}
        self.kernel = MortalKernel(self.sites)
        self.said: list[str] = []

    @property
    def state(self) -> StateDirectory:
        return StateDirectory(str(self.directory), create=True, patience=0.01)

    def prepare(
        self,
        *sites: Site,
        gate: Gate = Gate.CLOSED,
        move_id: str = "web",
        map_: Map = MAP,
        listeners: tuple[Endpoint, ...] = (),
    ) -> Plan:
        move = Move(move_id, (map_,), sites or (GATEWAY, DESTINATION), listeners=listeners)
        plan = prepare(Executor(self.kernel, self.state), move, KEPT, gate)
        self.live(plan)
        return plan

    def live(self, plan: Plan, *, how_many: int = 3) -> None:
        """The first ones of the kept connections have their sockets at the destination."""
        [kept] = {translation.kept for translation in plan.translations}
        self.sites["dst"].sockets = set(list(kept)[:how_many])

    def repair(self, move_id: str = "web") -> list[str]:
        repairing = Executor(self.kernel, self.state, self.said.append)
        return [line for one in repair(repairing, move_id) for line in one.drift]

    def pass_a_second(self) -> None:
        """What a look has seen is a second old."""
        boot = self.state.load("web").boot
        if (sighting := self.state.read_sighting("web", boot)) is not None:
            self.state.write_sighting("web", boot, as_if_older(sighting))

    def gc(self, *sites: Site, hook: Callable[[str], bool] = lambda _: False) -> Collected:
        return gc(Executor(self.kernel, self.state), sites or (Site(Role.DESTINATION),), hook)

    def status(self, move_id: str = "web") -> MoveStatus:
        """With the moments that the journal has: since when is measured anew in each look."""
        executor = Executor(self.kernel, self.state)
        [status] = read_status(executor, (move_id,))
        journal, plan = executor.load(move_id)
        at = {one.site: opened_at(journal, plan, one.site) for one in status.sites}
        sites = (replace(s, opened=None if s.opened is None else at[s.site]) for s in status.sites)
        last = max((moment or 0 for moment in at.values()), default=0)
        opened = None if status.opened_at is None else last
        return replace(status, sites=tuple(sites), opened_at=opened)

    def drift(self) -> list[str]:
        return [line for site in self.status().sites for line in site.drift]

    def records(self) -> list[dict[str, object]]:
        lines = (self.directory / "web.journal").read_text().splitlines()[1:]
        return [json.loads(line) for line in lines]

    def files(self) -> set[str]:
        return {path.name for path in self.directory.iterdir()} - {"lock"}

    def rewrite(self, name: str, change: Callable[[str], str]) -> None:
        path = self.directory / name
        path.write_text(change(path.read_text()))

    def is_bare(self) -> bool:
        for here in self.sites.values():
            here.sockets = set()
        return all(here in (FakeSite(), FakeSite(loopback=True)) for here in self.sites.values())


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def lose_everything(world: World, plan: Plan) -> None:
    """`nft flush ruleset; conntrack -F` at both sites, OLD and lo gone at the destination."""
    for site in plan.move.sites:
        here = world.sites[site.netns]
        prepared, opened = split_opening(plan, site)
        here.broken |= prepared | opened
        here.gates["web"] = Gate.ABSENT
        here.sets = dict.fromkeys(here.sets, Connections())
        here.entries.clear()
        here.addresses.clear()
        here.loopback = False


# ---- repair -------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", list(Gate)[1:])
def test_all_that_is_lost_comes_back_and_the_gate_as_it_was(world: World, gate: Gate) -> None:
    plan = world.prepare(gate=gate)
    whole = world.status()
    lose_everything(world, plan)

    lost = world.drift()
    repaired = world.repair()

    assert repaired == lost
    assert {line.split()[0] for line in lost} == {"table", "device", "address", "conntrack:"}
    assert whole == world.status()
    assert whole.gate == gate
    assert world.drift() == []


def test_without_drift_nothing_is_done_or_noted(world: World) -> None:
    world.prepare()
    before, files = world.kernel.applied, world.records()

    assert world.repair() == []

    assert (before, files) == (world.kernel.applied, world.records())
    assert world.said == []


def test_each_command_is_told_before_it_is_done(world: World) -> None:
    plan = world.prepare(gate=Gate.OPEN)
    lose_everything(world, plan)

    world.repair()

    assert all(line.startswith("[+] ") for line in world.said)
    for site in plan.move.sites:
        told = [line for line in world.said if f"exec {site.netns} " in line]
        [gate] = [i for i, line in enumerate(told) if "add rule inet natkeep gate-web drop" in line]
        [opens] = [i for i, line in enumerate(told) if "gate-web" in line and '"open"' in line]
        made = [i for i, line in enumerate(told) if "conntrack -I" in line]
        assert gate < min(made) < max(made) < opens == len(told) - 1


def test_what_is_done_again_is_noted_with_what_was_there_before_the_move(world: World) -> None:
    """Else teardown would leave an address that only the repair found missing, or take one."""
    world.sites["dst"].addresses.add(MAP.old)
    world.prepare()
    world.sites["dst"].addresses.clear()
    before = len(world.records())

    world.repair()

    doing, done = world.records()[before:]
    assert (doing["state"], done["state"]) == ("doing", "done")
    assert doing["step"] == done["step"]
    assert doing["prior"] == done["prior"] == {"present": True}
    teardown(Executor(world.kernel, world.state), "web")
    assert world.sites["dst"].addresses == {MAP.old}


def count_patches(world: World, plan: Plan) -> int:
    lose_everything(world, plan)
    before = world.kernel.applied
    world.repair()
    return world.kernel.applied - before


WHOLE = [pytest.param(verb, marks=pytest.mark.whole) for verb in ("repair", "gc")]


@pytest.mark.parametrize("gate", list(Gate)[1:])
@pytest.mark.parametrize("after", ["teardown", *WHOLE])
@pytest.mark.parametrize("how", ["die_at", "fail_at"])
def test_killed_or_refused_anywhere_in_it(tmp_path: Path, gate: Gate, after: str, how: str) -> None:
    """At each of its patches: teardown then leaves nothing, and another repair all."""
    total = 0
    for number in range(40):
        world = World(tmp_path / str(number))
        world.directory.parent.mkdir()
        plan = world.prepare(gate=gate)
        whole = world.status()
        total = total or count_patches(world, plan)
        if number >= total:
            break
        lose_everything(world, plan)
        setattr(world.kernel, how, world.kernel.applied + number)

        with pytest.raises((KilledError, KernelError)):
            world.repair()

        world.kernel.fail_at = world.kernel.die_at = None
        if after == "gc":
            assert world.gc().cleared == ()
        if after == "repair":
            world.repair()
            assert whole == world.status()
            assert world.repair() == []
            assert {record["state"] for record in world.records()[-1:]} == {"done"}
        assert teardown(Executor(world.kernel, world.state), "web")
        assert world.is_bare()
        assert world.files() == set()
    assert total > 8


def test_a_move_whose_repair_was_killed_counts_as_opened_still(world: World) -> None:
    plan = world.prepare(gate=Gate.OPEN)
    lose_everything(world, plan)
    world.kernel.die_at = world.kernel.applied + count_steps(plan) - 1
    with pytest.raises(KilledError):
        world.repair()
    world.kernel.die_at = None

    journal = world.state.load("web")

    assert journal.is_opened()
    lose_everything(world, plan)
    world.repair()
    assert world.status().gate == Gate.OPEN


def count_steps(plan: Plan) -> int:
    """Of the steps, those that are patched when all is lost."""
    return sum(not type(step).__name__.startswith("Purge") for step in plan.steps)


def test_a_repair_that_was_killed_while_it_counted_switches_that_off(world: World) -> None:
    """It had set nf_conntrack_acct for a moment; only its journal knows that it was 0."""
    world.prepare(gate=Gate.OPEN)
    plan = make_plan(Move("web", (MAP,), (GATEWAY, DESTINATION)), KEPT)
    number = next(n for n, step in enumerate(plan.steps) if isinstance(step, InsertEntries))
    row = {"step": number, "state": "doing", "prior": {"present": False, "acct": "0"}}
    world.rewrite("web.journal", lambda text: text + json.dumps(row) + "\n")

    world.repair()

    assert any("nf_conntrack_acct = 0" in line for line in world.said)
    assert world.records()[-1] == {"step": number, "state": "done", "prior": {"present": False}}
    assert world.repair() == []


# ---- what repair refuses -------------------------------------------------------------------------


def test_an_unknown_move_is_not_repaired(world: World) -> None:
    with pytest.raises(JournalError, match="no move web"):
        world.repair()


def test_nothing_of_an_earlier_boot_is_believed(world: World) -> None:
    plan = world.prepare()
    lose_everything(world, plan)
    boot = world.state.load("web").boot
    world.rewrite("web.journal", lambda text: text.replace(boot, BEFORE_BOOT))

    with pytest.raises(JournalError, match="before the last boot"):
        world.repair()
    assert world.sites["gw"].gates == {"web": Gate.ABSENT}


def test_a_vanished_namespace_is_refused_and_nothing_else_touched(world: World) -> None:
    plan = world.prepare()
    lose_everything(world, plan)
    world.kernel.gone.add("dst")

    with pytest.raises(RefusedError, match="'dst' is gone"):
        world.repair()
    assert world.sites["gw"].gates == {"web": Gate.ABSENT}


@pytest.mark.parametrize("steps", range(13))
def test_a_move_that_was_never_prepared_to_the_end_is_not_repaired_but_collected(
    world: World, steps: int
) -> None:
    """Its natkeep was killed in that step of prepare: `doing` is the last that it could say."""
    plan = world.prepare()
    assert steps < len(plan.prepare)
    world.rewrite("web.journal", lambda text: "".join(text.splitlines(True)[: 2 + 2 * steps]))
    for step in reversed(plan.prepare[steps + 1 :]):  # rules of OLD go only behind it
        revert_step(world.kernel, step, Prior())

    with pytest.raises(JournalError, match="not prepared to the end"):
        world.repair()
    assert world.gc().cleared == (Cleared("move", "web", "begun and never prepared to the end"),)
    assert world.is_bare()
    assert world.files() == set()


def test_who_holds_the_lock_is_waited_for(world: World) -> None:
    world.prepare()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with world.state.locked():
            held.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    try:
        assert world.repair() == []  # to look needs no lock
        assert world.gc().cleared == ()
        world.sites["dst"].addresses.clear()
        with pytest.raises(JournalError, match="another natkeep holds"):
            world.repair()
    finally:
        release.set()
        thread.join()


# ---- which connections come back -----------------------------------------------------------------


def entries_at(world: World, name: str) -> int:
    return len(world.sites[name].entries)


def test_only_what_has_a_socket_at_the_destination_gets_its_entries_back(world: World) -> None:
    """At the gateway too, since both are sites of one move."""
    plan = world.prepare(gate=Gate.OPEN)
    world.live(plan, how_many=1)
    for name in ("gw", "dst"):
        world.sites[name].entries.clear()

    assert len(world.repair()) == 2

    assert (entries_at(world, "gw"), entries_at(world, "dst")) == (1, 1)
    assert world.repair() == []


def test_before_it_is_opened_every_connection_lives(world: World) -> None:
    """The process is frozen, in the image: nothing of it has a socket yet."""
    plan = world.prepare()
    world.live(plan, how_many=0)
    world.sites["gw"].entries.clear()

    world.repair()

    assert entries_at(world, "gw") == 3


def test_a_gateway_alone_brings_back_what_it_saw_a_moment_ago(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Younger than the kernel keeps an ended entry, the loss is somebody's deed; older, unknown."""
    import time

    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "monotonic_ns", lambda: int(now[0] * 1e9))
    world.prepare(GATEWAY, gate=Gate.OPEN)
    world.sites["gw"].entries.clear()
    assert world.repair() == []  # nobody had looked before
    assert entries_at(world, "gw") == 0

    fill(world)
    world.repair()
    now[0] += 9.9
    world.sites["gw"].entries.clear()
    assert world.repair() == ["conntrack: 3 live connections of 10.2.0.10=10.3.0.20 have no entry"]
    assert entries_at(world, "gw") == 3

    now[0] += 10.1
    world.sites["gw"].entries.clear()
    assert world.repair() == []


def fill(world: World, move_id: str = "web") -> None:
    """The gateway's rules have picked all three up."""
    plan = make_plan(Move(move_id, (MAP,), (GATEWAY,)), KEPT)
    [translation] = plan.translations
    world.sites["gw"].entries = {e.original: e.reply for e in entries(translation)}


def test_a_sighting_of_an_earlier_boot_or_a_damaged_one_is_none(world: World) -> None:
    world.prepare(GATEWAY, gate=Gate.OPEN)
    world.repair()
    boot = world.state.load("web").boot

    for damage in (lambda t: t.replace(boot, BEFORE_BOOT), lambda t: t[:20], lambda t: "[]"):
        world.repair()
        world.sites["gw"].entries.clear()
        world.rewrite("web.seen", damage)
        assert world.repair() == []
        fill(world)


# ---- gc ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", list(Gate)[1:])
def test_a_move_that_lives_is_left_alone(world: World, gate: Gate) -> None:
    world.prepare(gate=gate)
    before = world.status()

    assert world.gc() == Collected((), ())
    assert before == world.status()


def test_a_move_of_an_earlier_boot_is_forgotten_and_nothing_undone(world: World) -> None:
    """What stands there now, of the same names, is somebody else's."""
    world.prepare()
    boot = world.state.load("web").boot
    world.rewrite("web.journal", lambda text: text.replace(boot, BEFORE_BOOT))
    before = world.kernel.applied

    assert world.gc(SOURCE).cleared == (Cleared("move", "web", "of an earlier boot"),)

    assert world.files() == set()
    assert before == world.kernel.applied
    assert world.sites["dst"].addresses == {MAP.old}


def test_a_move_whose_namespaces_are_gone_is_cleared(world: World) -> None:
    world.prepare(DESTINATION)
    world.kernel.gone.add("dst")

    assert world.gc().cleared == (Cleared("move", "web", "its namespaces are gone"),)
    assert world.files() == set()


def test_a_move_one_of_whose_namespaces_is_left_is_not(world: World) -> None:
    world.prepare()
    world.kernel.gone.add("gw")

    assert world.gc().cleared == ()


def test_a_teardown_that_was_killed_is_ended(world: World) -> None:
    plan = world.prepare()
    numbers = (len(plan.prepare) - 1, len(plan.prepare) - 2)
    for number in numbers:
        revert_step(world.kernel, plan.steps[number], Prior())
    rows = [{"step": number, "state": "undone"} for number in numbers]
    world.rewrite("web.journal", lambda text: text + "".join(json.dumps(r) + "\n" for r in rows))

    reason = "its undoing was begun and never ended"
    assert world.gc().cleared == (Cleared("move", "web", reason),)
    assert world.is_bare()


@pytest.mark.parametrize("sites", [(DESTINATION,), (GATEWAY, DESTINATION)])
def test_a_move_whose_connections_have_all_ended_is_cleared(
    world: World, sites: tuple[Site, ...]
) -> None:
    plan = world.prepare(*sites, gate=Gate.OPEN)
    world.live(plan, how_many=1)
    world.kernel.ended = {0, 1, 2}
    assert world.gc().cleared == ()
    world.live(plan, how_many=0)
    world.kernel.ended = {0, 1}  # dumped perhaps, to move on: the third has not been closed
    assert world.gc().cleared == ()
    world.kernel.ended = {0, 1, 2}
    assert world.gc().cleared == ()  # never from one look
    world.pass_a_second()

    assert world.gc().cleared == (Cleared("move", "web", "its connections have all ended"),)
    assert world.is_bare()
    assert world.files() == set()


def test_an_end_is_remembered_while_others_of_the_move_live_on(world: World) -> None:
    """The entry of the first is gone for long when the last one ends."""
    plan = world.prepare(GATEWAY, DESTINATION, gate=Gate.OPEN)
    world.live(plan, how_many=1)
    world.repair()
    assert "web.seen" not in world.files()  # sockets tell
    world.kernel.ended = {0, 1}
    world.repair()
    world.pass_a_second()
    world.repair()
    first = (world.directory / "web.seen").read_bytes()
    world.repair()
    assert first == (world.directory / "web.seen").read_bytes()

    world.live(plan, how_many=0)
    for site in (GATEWAY, DESTINATION):
        for tuple_ in [*world.sites[site.netns].entries][:1]:
            del world.sites[site.netns].entries[tuple_]
    world.kernel.ended = {0, 1, 2}
    assert world.gc().cleared == ()
    world.pass_a_second()
    assert [one.reason for one in world.gc().cleared] == ["its connections have all ended"]


def test_a_listener_that_is_still_there_keeps_its_move(world: World) -> None:
    end = Endpoint(MAP.old, 80)
    plan = world.prepare(gate=Gate.OPEN, listeners=(end,))
    world.live(plan, how_many=0)
    world.kernel.ended = {0, 1, 2}
    world.sites["dst"].waiting[end] = 0
    assert world.gc().cleared == ()

    del world.sites["dst"].waiting[end]
    assert world.gc().cleared == ()
    world.pass_a_second()
    assert [one.reason for one in world.gc().cleared] == ["its connections have all ended"]


@pytest.mark.parametrize("sites", [(GATEWAY,), (DESTINATION,), (GATEWAY, DESTINATION)])
def test_a_move_whose_entries_are_gone_is_not_cleared(
    world: World, sites: tuple[Site, ...]
) -> None:
    """The process is being dumped to move on, perhaps, and another program has flushed them."""
    plan = world.prepare(*sites, gate=Gate.OPEN)
    if DESTINATION in sites:
        world.live(plan, how_many=0)
    for site in sites:
        world.sites[site.netns].entries.clear()

    for _ in range(3):
        assert world.gc().cleared == ()
        world.pass_a_second()


def test_a_gateway_alone_counts_what_may_live_until_its_end_is_certain(world: World) -> None:
    world.prepare(GATEWAY, gate=Gate.OPEN)
    executor = Executor(world.kernel, world.state)
    world.sites["gw"].entries.clear()
    assert count_alive(executor, "web") == drain(executor, "web", 0) == 3

    fill(world)
    world.kernel.ended = {0, 1}
    world.repair()
    assert count_alive(executor, "web") == 3
    world.pass_a_second()
    assert count_alive(executor, "web") == 1
    world.repair()
    world.sites["gw"].entries.clear()
    assert count_alive(executor, "web") == drain(executor, "web", 0) == 1
    fill(world)
    world.kernel.ended = {1}  # a later packet has revived it
    assert count_alive(executor, "web") == 2


def test_a_gateway_alone_is_cleared_when_every_end_is_certain(world: World) -> None:
    """That entries are missing says nothing: another program may have flushed them."""
    world.prepare(GATEWAY, gate=Gate.OPEN)
    world.kernel.ended = {0, 1}
    world.repair()
    world.pass_a_second()
    world.repair()
    world.sites["gw"].entries.clear()
    assert world.gc().cleared == ()

    fill(world)
    world.kernel.ended = {0, 1, 2}
    assert world.gc().cleared == ()
    world.pass_a_second()
    assert [one.reason for one in world.gc().cleared] == ["its connections have all ended"]


@pytest.mark.parametrize(
    ("gate", "cleared"),
    [(Gate.CLOSED, ["the CRIU that it was prepared for is no more"]), (Gate.OPEN, [])],
)
def test_what_a_hook_made_for_a_criu_that_is_no_more(
    world: World, gate: Gate, cleared: list[str]
) -> None:
    """Never opened it did nobody any good; opened, it is in use."""
    world.prepare(DESTINATION, gate=gate, move_id="criu-7-a")

    assert [one.reason for one in world.gc(hook=lambda move_id: move_id == "criu-7-a").cleared] == (
        cleared
    )


def test_what_has_no_journal_goes_and_what_has_one_stays(world: World) -> None:
    """`Can I delete the journal and still clean up?`"""
    world.prepare(DESTINATION)
    world.prepare(DESTINATION, move_id="other", map_=OTHER_MAP)
    (world.directory / "web.journal").unlink()
    (world.directory / ".web.journal.new").write_text("half of i")
    (world.directory / "notes").write_text("not ours")

    collected = world.gc()

    assert [(one.kind, one.name) for one in collected.cleared] == [
        ("file", ".web.journal.new"),
        *(("file", name) for name in sorted(collected_files(collected))),
        ("table", "destination=dst"),
    ]
    assert "web.connections" in collected_files(collected)
    assert world.sites["dst"].gates == {"other": Gate.CLOSED}
    assert not [name for name in world.files() if name.startswith("web")]
    assert {"notes", "other.journal", "other.connections"} <= world.files()
    [other] = read_status(Executor(world.kernel, world.state), ("other",))
    assert other.sites[0].drift == ()
    assert world.gc() == Collected((), ())


def test_in_a_directory_that_natkeep_has_not_made_no_file_goes(world: World) -> None:
    world.directory.mkdir(mode=0o700)
    names = ("web.ready", "notes.journal.txt", "report.connections", ".web.seen.new")
    for name in names:
        (world.directory / name).write_text("mine")

    collected = world.gc()

    assert collected.cleared == ()
    [error] = collected.left
    assert error.exit_code == 8
    assert "report.connections, web.ready" in str(error)
    assert f"{world.directory} was not made by natkeep" in str(error)
    assert world.files() == set(names)


def test_of_a_directory_that_others_can_write_to_gc_clears_nothing(world: World) -> None:
    world.prepare(DESTINATION)
    (world.directory / "api.ready").write_text("lost")
    world.directory.parent.chmod(0o777)
    with pytest.raises(JournalError, match=f"{world.directory.parent} can be written by others"):
        world.gc()
    assert "api.ready" in world.files()


@pytest.mark.parametrize("verb", ["repair", "gc"])
def test_what_is_torn_down_or_begun_during_a_look_is_no_error(
    verb: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look has no lock; in the middle of it the move goes, and comes again under its id."""
    world.prepare(DESTINATION, gate=Gate.OPEN)
    real, times = MortalKernel.observe, []

    def observe(kernel: MortalKernel, site: Site, plan: Plan) -> Observation:
        times.append(True)
        if len(times) == 1:
            teardown(Executor(world.kernel, world.state), "web")
            world.sites["dst"].sockets = set()
            seen = real(kernel, site, plan)
            world.prepare(DESTINATION, gate=Gate.OPEN)
            return seen
        return real(kernel, site, plan)

    monkeypatch.setattr(MortalKernel, "observe", observe)
    if verb == "repair":
        assert world.repair() == []
    else:
        assert world.gc() == Collected((), ())
    assert world.drift() == []


def test_an_address_that_another_host_has_by_now_is_named_and_not_put_back(world: World) -> None:
    world.prepare(DESTINATION)
    here = world.sites["dst"]
    here.addresses.clear()
    here.loopback = False
    world.kernel.owners[MAP.old] = "02:00:00:00:00:07 on eth0"
    [one] = repair(Executor(world.kernel, world.state), "web")
    said = f"address {MAP.old}: another host has it, 02:00:00:00:00:07 on eth0"
    assert (one.drift, one.left) == (("device lo: it is down",), (said,))
    assert world.sites["dst"].loopback
    assert not world.sites["dst"].addresses
    [one] = repair(Executor(world.kernel, world.state), "web")
    assert (one.drift, one.commands, one.left) == ((), (), (said,))
    world.kernel.owners.clear()
    assert world.repair() == [f"address {MAP.old}: not on this host"]
    assert world.sites["dst"].addresses == {MAP.old}


def test_what_is_missing_is_put_back_once_by_two_who_saw_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.prepare(DESTINATION)
    world.sites["dst"].addresses.clear()
    real, others = StateDirectory.changing, []

    def changing(state: StateDirectory, *ids: str) -> AbstractContextManager[None]:
        if not others:
            others.append(True)
            others.append(world.repair())
        return real(state, *ids)

    monkeypatch.setattr(StateDirectory, "changing", changing)
    assert world.repair() == []
    assert others[1:] == [["address 10.2.0.10: not on this host"]]


def collected_files(collected: Collected) -> list[str]:
    return [one.name for one in collected.cleared if one.kind == "file" and one.name[0] != "."]


def test_a_table_at_a_site_that_no_journal_names_goes_where_it_is_told_to(world: World) -> None:
    world.prepare(DESTINATION)
    for path in world.directory.glob("web.*"):
        path.unlink()

    assert world.gc().cleared == ()
    assert world.gc(DESTINATION).cleared == (
        Cleared("table", "destination=dst", "no journal knows web"),
    )
    assert world.sites["dst"].gates == {}


@pytest.mark.parametrize(
    "damage", [lambda t: "x\n", lambda t: t.replace('"schema":2', '"schema":9')]
)
def test_a_journal_that_cannot_be_read_is_named_and_left_with_all_that_is_its(
    world: World, damage: Callable[[str], str]
) -> None:
    world.prepare(DESTINATION)
    world.rewrite("web.journal", damage)
    before, files = world.sites["dst"], world.files()

    collected = world.gc(DESTINATION)

    assert collected.cleared == ()
    assert [type(error) for error in collected.left] == [JournalError]
    assert before == world.sites["dst"]
    assert files == world.files()
    with pytest.raises(JournalError, match="web"):
        demand_nothing_left(collected)


def test_what_is_left_behind_weighs_more_than_what_cannot_be_read() -> None:
    errors: tuple[NatkeepError, ...] = (JournalError("a"), KernelError("b"), LeftoverError("c"))

    with pytest.raises(LeftoverError, match="c"):
        demand_nothing_left(Collected((), errors))
    with pytest.raises(KernelError, match="b"):
        demand_nothing_left(Collected((), errors[1:2]))
    demand_nothing_left(Collected((), ()))


def test_a_dry_run_says_the_same_and_does_nothing(world: World) -> None:
    plan = world.prepare(DESTINATION, gate=Gate.OPEN)
    world.live(plan, how_many=0)
    world.kernel.ended = {0, 1, 2}
    world.repair()
    world.pass_a_second()
    (world.directory / "lost.connections").write_text("")
    before, files = world.sites["dst"], world.files()

    collecting = Executor(world.kernel, world.state)
    would = gc(collecting, (DESTINATION,), dry_run=True)

    assert before == world.sites["dst"]
    assert files == world.files()
    assert would == world.gc(DESTINATION)


# ---- what teardown asks -------------------------------------------------------------------------


def test_after_a_flush_the_connections_are_counted_where_they_live(world: World) -> None:
    """The gateway's table is empty, the destination's sockets are not."""
    world.prepare(gate=Gate.OPEN)
    world.sites["gw"].entries.clear()

    assert count_alive(Executor(world.kernel, world.state), "web") == 3


def test_a_move_whose_accept_somebody_removed_still_has_live_connections(world: World) -> None:
    world.prepare(gate=Gate.OPEN)
    for name in ("gw", "dst"):
        world.sites[name].gates["web"] = Gate.CLOSED

    assert count_alive(Executor(world.kernel, world.state), "web") == 3


def test_opening_again_after_a_kill_leaves_nothing_behind_at_teardown(world: World) -> None:
    """What the first attempt found counts: the accept is ours, and the gates close first."""
    plan = world.prepare()
    opens = [n for n, step in enumerate(plan.steps) if isinstance(step, OpenGate)]
    world.kernel.die_at = world.kernel.applied
    journal = world.state.load("web")
    journal.note(opens[0], "doing", Prior(), plan.steps[opens[0]])
    world.sites["gw"].gates["web"] = Gate.OPEN
    world.kernel.die_at = None

    open_move(Executor(world.kernel, world.state), "web")

    assert world.state.load("web").records[opens[0]].prior.present is False
