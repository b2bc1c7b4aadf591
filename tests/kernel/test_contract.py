"""the laws of natkeep/kernel/__init__.py, held by the real kernel and the fake alike.

Every test runs on both. `picture` is all that could have changed at the site: for the real one
the ruleset, addresses, routes, conntrack entries and sysctls as their tools print them, compared
as text; there are other people's rules and entries in it too, and they must stay.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import islice
from pathlib import Path
from typing import Protocol

import pytest
from fake_kernel import FakeKernel, FakeSite, chains_left, revert_step

from natkeep.errors import KernelError, RefusedError
from natkeep.kernel.interface import Kernel
from natkeep.kernel.linux import LinuxKernel
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.plan.drift import find_drift
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import (
    AddAddress,
    AddRoute,
    AddRules,
    FillSet,
    GuardSite,
    HoldSegments,
    InsertEntries,
    InstallGate,
    InstallTranslation,
    OpenGate,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
    Step,
)
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple

MAPS = {
    4: Map(ip_address("10.2.0.10"), ip_address("10.3.0.20")),
    6: Map(ip_address("fd00:2::10"), ip_address("fd00:3::20")),
}
PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}

PREPARE = {
    Role.GATEWAY: (InstallGate, FillSet, InstallTranslation, PurgeEntries, InsertEntries),
    Role.DESTINATION: (
        InstallGate,
        FillSet,
        RaiseLoopback,
        AddRules,
        AddAddress,
        InstallTranslation,
        PurgeEntries,
        InsertEntries,
    ),
    Role.PEER: (
        InstallGate,
        FillSet,
        RaiseLoopback,
        AddRoute,
        InstallTranslation,
        PurgeEntries,
        InsertEntries,
    ),
}
DAEMONS = [
    (Role.GATEWAY, GuardSite),
    (Role.DESTINATION, GuardSite),
    (Role.DESTINATION, HoldSegments),
]
STEPS = [(role, kind) for role, kinds in PREPARE.items() for kind in (*kinds, OpenGate)] + DAEMONS
EACH_STEP = pytest.mark.parametrize(
    ("role", "kind"), STEPS, ids=[f"{role}-{kind.__name__}" for role, kind in STEPS]
)
EACH_ROLE = pytest.mark.parametrize("role", list(PREPARE))
EACH_VERSION = pytest.mark.parametrize("version", [4, 6])
EACH_MODE = pytest.mark.parametrize("mode", list(Mode))


class Scene(Protocol):
    """A site of one kernel, and what a test does to it behind natkeep's back."""

    kernel: Kernel
    netns: str

    def picture(self) -> object: ...
    def is_bare(self) -> bool: ...
    def add_address(self, address: Address) -> None: ...
    def lower_loopback(self, *, keep: bool) -> None: ...
    def loopback_is_up(self) -> bool: ...
    def track(self, tuple_: FourTuple) -> None: ...


@dataclass
class FakeScene:
    kernel: FakeKernel
    netns: str = "site"

    def __post_init__(self) -> None:
        self.kernel.sites[self.netns] = FakeSite(loopback=True)

    def picture(self) -> object:
        return copy.deepcopy(self.kernel.sites[self.netns])

    def is_bare(self) -> bool:
        here = self.kernel.sites[self.netns]
        return not (here.gates or here.sets or here.loaded)

    def add_address(self, address: Address) -> None:
        self.kernel.sites[self.netns].addresses.add(address)

    def lower_loopback(self, *, keep: bool) -> None:
        self.kernel.sites[self.netns].loopback = False

    def loopback_is_up(self) -> bool:
        return self.kernel.sites[self.netns].loopback

    def track(self, tuple_: FourTuple) -> None:
        self.kernel.sites[self.netns].entries[tuple_] = tuple_


@dataclass
class LinuxScene:
    kernel: LinuxKernel
    netns: str
    run: Callable[..., str]
    take_picture: Callable[[str], list[str]]
    state: str

    def picture(self) -> object:
        return self.take_picture(self.netns), sorted(os.listdir(self.state))

    def is_bare(self) -> bool:
        return "natkeep" not in self.run(self.netns, "nft", "list", "tables")

    def add_address(self, address: Address) -> None:
        to = f"{address}/{address.max_prefixlen}"
        nodad = ["nodad"] if address.version == 6 else []
        self.run(self.netns, "ip", "address", "add", to, "dev", "eth0", *nodad)
        await_addresses(self.netns)

    def lower_loopback(self, *, keep: bool) -> None:
        self.run(self.netns, "ip", "link", "set", "lo", "down")
        if not keep:
            self.run(self.netns, "ip", "address", "flush", "dev", "lo")

    def loopback_is_up(self) -> bool:
        return "UP" in self.run(self.netns, "ip", "link", "show", "dev", "lo").split(">")[0]

    def track(self, tuple_: FourTuple) -> None:
        source, destination = tuple_.source, tuple_.destination
        self.run(
            self.netns,
            *("conntrack", "-I", "-p", "tcp", "-s", str(source.address)),
            *("-d", str(destination.address), "--sport", str(source.port)),
            *("--dport", str(destination.port), "--state", "ESTABLISHED", "--timeout", "999"),
        )  # fmt: skip


FOREIGN = """
table ip theirs {
    chain nat { type nat hook postrouting priority srcnat; oifname "none" masquerade; }
    chain mangle { type filter hook prerouting priority -350; ct state new counter; }
}
"""


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.root)])
def scene(request: pytest.FixtureRequest) -> Scene:
    """A site with other people's rules and entries in it."""
    if request.param == "fake":
        made: Scene = FakeScene(FakeKernel())
    else:
        netns = request.getfixturevalue("make_site")()
        run = request.getfixturevalue("run")
        run(netns, "nft", "-f", "-", stdin=FOREIGN)
        state = str(request.getfixturevalue("tmp_path"))
        take_picture = request.getfixturevalue("take_picture")
        made = LinuxScene(LinuxKernel(state), netns, run, take_picture, state)
    for version in (4, 6):
        made.track(next(iter(some(version, port=9000))))  # a neighbour, not kept by any test
    return made


def some(version: int, count: int = 1, *, port: int = 5000) -> Connections:
    """*count* connections to OLD, from as many ports, and peers where those do not suffice."""

    def tuples() -> Iterable[FourTuple]:
        for number in range(count):
            peer = Endpoint(PEER[version] + number // 1000, port + number % 1000)
            yield FourTuple(peer, Endpoint(MAPS[version].old, 80))

    return Connections.of(tuples())


def make(
    scene: Scene,
    role: Role,
    connections: Connections,
    *versions: int,
    move_id: str = "web",
    mode: Mode = Mode.STATEFUL,
    kind: type[Step] | None = None,
    home: frozenset[Address] = frozenset(),
) -> Plan:
    """A plan at the scene's site, which is opened; with a step of *kind* if it is optional."""
    site = Site(role, scene.netns)
    maps = tuple(MAPS[version] for version in versions)
    optional = {"hold": kind is HoldSegments, "guard": kind is GuardSite}
    mode = Mode.STATEFUL if site.row.own else mode  # which is all that there is there
    move = Move(move_id, maps, (site,), mode, **optional)
    at_peers = ((site, frozenset(map(ip_address, connections.peers()))),)
    around = Surroundings(home=home, at_peers=at_peers if site.row.own else ())
    plan = make_plan(move, connections, around)
    scene.kernel.open_sites([site])
    return plan


def apply(scene: Scene, steps: Iterable[Step]) -> list[tuple[Step, Prior, Prior]]:
    """Each step with the prior that it told to remember, and the one that it returned."""
    done = []
    for step in steps:
        told: list[Prior] = []
        returned = scene.kernel.apply(step, told.append)
        done.append((step, told[0], returned))
    return done


def revert(scene: Scene, done: Iterable[tuple[Step, Prior, Prior]]) -> None:
    for step, _, prior in reversed([*done]):
        revert_step(scene.kernel, step, prior)


def observe(scene: Scene, plan: Plan) -> Observation:
    return scene.kernel.observe(plan.move.sites[0], plan)


def up_to(plan: Plan, kind: type[Step]) -> tuple[tuple[Step, ...], Step]:
    """The steps before the first of *kind*, and that one."""
    at = [type(step) for step in plan.steps].index(kind)
    return plan.steps[:at], plan.steps[at]


def shows(plan: Plan, kind: type[Step], seen: Observation) -> bool:
    """Whether an observation tells that a step of *kind* was done."""
    [translation] = plan.translations
    match kind.__name__:
        case "InstallGate":
            return seen.gate == Gate.CLOSED and any(
                c.startswith(("gate-at-", "dial-at-")) for c in chains_left(plan, seen)
            )
        case "FillSet":
            return set(seen.missing.values()) == {0}
        case "AddRules":
            return not seen.lacking
        case "AddAddress":
            return seen.addresses == {translation.map.old}
        case "InstallTranslation":
            wanted = {"gate", "in", "out", "invalid-in", "invalid-out"}
            if translation.site.row.passes_on:
                wanted |= {"from", "to", "invalid-to", "mark", "spoken"}
                wanted ^= {"gate", "dial", "new"} if translation.site.row.own else set()
            else:
                wanted.add("heard")
            return {c.partition("-at-")[0] for c in chains_left(plan, seen)} == wanted
        case "InsertEntries":
            entries = seen.entries[translation.number]
            return all(entry is not None and entry.translated for entry in entries)
        case "OpenGate":
            return seen.gate == Gate.OPEN
        case "GuardSite":
            return seen.guarded
    raise KeyError(kind)


UNSEEN = (RaiseLoopback, AddRoute, PurgeEntries, HoldSegments)
SHOWN = [(r, k) for r, k in STEPS if k not in UNSEEN]


@pytest.mark.parametrize(
    ("role", "kind"), SHOWN, ids=[f"{role}-{kind.__name__}" for role, kind in SHOWN]
)
@EACH_VERSION
def test_what_was_applied_is_observed(
    scene: Scene, role: Role, kind: type[Step], version: int
) -> None:
    plan = make(scene, role, some(version, 3), version, kind=kind)
    before, step = up_to(plan, kind)
    apply(scene, before)
    assert not shows(plan, kind, observe(scene, plan))

    apply(scene, [step])

    assert shows(plan, kind, observe(scene, plan))


@EACH_ROLE
def test_raising_lo_and_purging_show_too(scene: Scene, role: Role) -> None:
    scene.lower_loopback(keep=True)
    plan = make(scene, role, some(4), 4)
    [(before, _)] = plan.translations[0].tuples()
    scene.track(before)
    [stale] = observe(scene, plan).entries[0]
    assert stale is not None
    assert not stale.translated

    apply(scene, (*up_to(plan, PurgeEntries)[0], up_to(plan, PurgeEntries)[1]))

    assert observe(scene, plan).entries[0] == (None,)
    assert scene.loopback_is_up() == (role != Role.GATEWAY)


@EACH_MODE
@EACH_ROLE
def test_a_prepared_and_opened_site_has_no_drift(scene: Scene, role: Role, mode: Mode) -> None:
    plan = make(scene, role, Connections.of([*some(4, 3), *some(6, 3)]), 4, 6, mode=mode)

    for steps in (plan.prepare, plan.open):
        apply(scene, steps)
        assert find_drift(plan, plan.move.sites[0], observe(scene, plan)) == ()


@EACH_MODE
@EACH_ROLE
def test_check_changes_nothing_and_remember_is_called_once_before_the_change(
    scene: Scene, role: Role, mode: Mode
) -> None:
    plan = make(scene, role, some(4, 3), 4, mode=mode)

    for step in plan.steps:
        before, told = scene.picture(), []
        scene.kernel.check(step)
        scene.kernel.apply(step, lambda prior, told=told: told.append(scene.picture()))
        assert [before] == told


@EACH_STEP
def test_reverting_up_to_any_step_leaves_the_site_as_it_was(
    scene: Scene, role: Role, kind: type[Step]
) -> None:
    plan = make(scene, role, some(4, 3), 4, kind=kind)
    picture, seen = scene.picture(), observe(scene, plan)
    before, step = up_to(plan, kind)
    done = apply(scene, (*before, step))

    revert(scene, done)

    assert picture == scene.picture()
    assert seen == observe(scene, plan)


@EACH_MODE
@EACH_ROLE
def test_ipv6_is_reverted_without_a_trace_as_well(scene: Scene, role: Role, mode: Mode) -> None:
    plan = make(scene, role, some(6, 3), 6, mode=mode)
    picture = scene.picture()
    done = apply(scene, plan.steps)
    assert picture != scene.picture()

    revert(scene, done)

    assert picture == scene.picture()


@EACH_STEP
def test_a_step_that_was_interrupted_is_reverted_by_what_it_remembered(
    scene: Scene, role: Role, kind: type[Step]
) -> None:
    """The process was killed after the change; only what `remember` was told is in the journal."""
    scene.lower_loopback(keep=False)
    plan = make(scene, role, some(4, 3), 4, kind=kind)
    picture = scene.picture()
    before, step = up_to(plan, kind)
    done = apply(scene, before)
    [(_, told, _)] = apply(scene, [step])

    revert_step(scene.kernel, step, told)
    revert(scene, done)

    assert picture == scene.picture()


class KilledError(BaseException):
    """As SIGKILL would, at the moment when the journal has been written."""


@EACH_STEP
def test_a_step_that_never_came_to_its_change_is_reverted(
    scene: Scene, role: Role, kind: type[Step]
) -> None:
    scene.lower_loopback(keep=False)
    plan = make(scene, role, some(4, 3), 4, kind=kind)
    before, step = up_to(plan, kind)
    apply(scene, before)
    picture, told = scene.picture(), []

    def die(prior: Prior) -> None:
        told.append(prior)
        raise KilledError

    with pytest.raises(KilledError):
        scene.kernel.apply(step, die)
    assert picture == scene.picture()
    if kind is InstallGate:
        assert scene.is_bare()
    revert_step(scene.kernel, step, told[0])

    assert picture == scene.picture()


@EACH_MODE
@EACH_ROLE
def test_reverting_twice_is_reverting_once(scene: Scene, role: Role, mode: Mode) -> None:
    scene.lower_loopback(keep=False)
    plan = make(scene, role, Connections.of([*some(4, 3), *some(6, 3)]), 4, 6, mode=mode)
    picture = scene.picture()
    done = apply(scene, plan.steps)

    for undone in reversed(done):
        revert(scene, [undone])
        revert(scene, [undone])

    assert picture == scene.picture()
    revert(scene, done)
    assert picture == scene.picture()


@EACH_VERSION
def test_an_address_that_was_there_already_stays(scene: Scene, version: int) -> None:
    scene.add_address(MAPS[version].old)
    plan = make(scene, Role.DESTINATION, some(version), version)
    picture = scene.picture()

    done = apply(scene, plan.steps)
    [prior] = [prior for step, _, prior in done if isinstance(step, AddAddress)]
    assert prior.present
    revert(scene, done)

    assert picture == scene.picture()
    assert observe(scene, plan).addresses == {MAPS[version].old}


@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_lo_is_left_as_it_was_found(scene: Scene, up: bool, keep: bool) -> None:
    """Up, down but with its address from earlier, or never used."""
    if not up:
        scene.lower_loopback(keep=keep)
    plan = make(scene, Role.DESTINATION, Connections.of([*some(4), *some(6)]), 4, 6)
    picture = scene.picture()

    done = apply(scene, plan.steps)
    [prior] = [prior for step, _, prior in done if isinstance(step, RaiseLoopback)]
    assert up == prior.present
    assert scene.loopback_is_up()
    revert(scene, done)

    assert picture == scene.picture()
    assert up == scene.loopback_is_up()


@EACH_ROLE
def test_an_id_that_is_there_already_is_refused(scene: Scene, role: Role) -> None:
    plan = make(scene, role, some(4), 4)
    other = make(scene, role, some(4, port=6000), 4, move_id="web-2")
    done = apply(scene, plan.steps)

    with pytest.raises(RefusedError, match="web is prepared there already"):
        scene.kernel.check(plan.steps[0])
    scene.kernel.check(other.steps[0])
    revert(scene, done)

    scene.kernel.check(plan.steps[0])


@EACH_MODE
@EACH_ROLE
@pytest.mark.parametrize("order", ["first-in-first-out", "last-in-first-out"])
def test_moves_share_a_site_and_leave_it_one_by_one(
    scene: Scene, role: Role, order: str, mode: Mode
) -> None:
    """The shared table and chains go with the last of them, whichever it is."""
    scene.add_address(MAPS[4].old)
    home = frozenset({MAPS[4].old})
    bare = scene.picture()
    plans = [
        make(scene, role, some(4, 3, port=port), 4, move_id=move_id, mode=mode, home=home)
        for move_id, port in (("web", 5000), ("web-0", 6000))
    ]
    done = [apply(scene, plan.steps) for plan in plans]
    whole = [observe(scene, plan) for plan in plans]
    assert whole == [
        Observation(
            gate=Gate.OPEN,
            missing={f"kept-{plan.move.id}-0": 0},
            addresses=frozenset((MAPS[4].old,)),
            entries={0: whole[0].entries[0]},
            alive=whole[0].alive,
            sockets=whole[0].sockets,
            lingers=whole[0].lingers,
        )
        for plan in plans
    ]
    goes, stays = (0, 1) if order == "first-in-first-out" else (1, 0)

    revert(scene, done[goes])

    assert observe(scene, plans[goes]).gate == Gate.ABSENT
    assert not chains_left(plans[goes], observe(scene, plans[goes]))
    assert whole[stays] == observe(scene, plans[stays])
    assert not scene.is_bare()

    revert(scene, done[stays])

    assert scene.is_bare()
    assert bare == scene.picture()


@EACH_ROLE
def test_moves_of_other_addresses_leave_each_other_alone(scene: Scene, role: Role) -> None:
    one = make(scene, role, some(4, 3), 4, move_id="four")
    bare = scene.picture()
    done_one = apply(scene, one.steps)
    scene.kernel.unhook_gates()
    with_one, seen = scene.picture(), observe(scene, one)
    other = make(scene, role, some(6, 3), 6, move_id="six")

    done_other = apply(scene, other.steps)
    assert seen == observe(scene, one)
    revert(scene, done_other)

    assert with_one == scene.picture()
    revert(scene, done_one)
    assert bare == scene.picture()


@EACH_ROLE
@pytest.mark.parametrize("modes", [(*Mode,), (*reversed(Mode),)], ids=lambda modes: modes[0])
def test_moves_of_both_modes_share_a_site(
    scene: Scene, role: Role, modes: tuple[Mode, Mode]
) -> None:
    scene.add_address(MAPS[4].old)
    home = frozenset({MAPS[4].old})
    bare = scene.picture()
    plans = [
        make(scene, role, some(4, 3, port=port), 4, move_id=mode.value, mode=mode, home=home)
        for mode, port in zip(modes, (5000, 6000), strict=True)
    ]
    done = [apply(scene, plan.steps) for plan in plans]
    seen = [observe(scene, plan) for plan in plans]
    for plan, observation in zip(plans, seen, strict=True):
        assert find_drift(plan, plan.move.sites[0], observation) == ()

    revert(scene, done[0])

    assert observe(scene, plans[0]).gate == Gate.ABSENT
    assert seen[1] == observe(scene, plans[1])
    revert(scene, done[1])
    assert bare == scene.picture()


@EACH_ROLE
def test_opening_an_open_gate_changes_nothing_and_is_not_undone(scene: Scene, role: Role) -> None:
    plan = make(scene, role, some(4), 4)
    apply(scene, plan.steps)
    opened = scene.picture()

    again = apply(scene, plan.open)

    assert opened == scene.picture()
    assert [prior.present for _, _, prior in again] == [True]
    revert(scene, again)
    assert observe(scene, plan).gate == Gate.OPEN


@EACH_ROLE
def test_a_gate_that_is_closed_again_can_be_opened_again(scene: Scene, role: Role) -> None:
    plan = make(scene, role, some(4), 4)
    apply(scene, plan.prepare)
    closed = scene.picture()

    revert(scene, apply(scene, plan.open))

    assert observe(scene, plan).gate == Gate.CLOSED
    assert closed == scene.picture()
    apply(scene, plan.open)
    assert observe(scene, plan).gate == Gate.OPEN


@pytest.mark.parametrize("kind", [FillSet, InstallTranslation, OpenGate])
@EACH_ROLE
def test_a_step_without_its_gate_fails_and_changes_nothing(
    scene: Scene, role: Role, kind: type[Step]
) -> None:
    plan = make(scene, role, some(4), 4)
    _, step = up_to(plan, kind)
    picture = scene.picture()

    with pytest.raises(KernelError):
        apply(scene, [step])

    assert picture == scene.picture()


@EACH_ROLE
def test_entries_that_are_in_the_way_are_replaced(scene: Scene, role: Role) -> None:
    """A packet may make a stale entry between the purge and the insertion."""
    plan = make(scene, role, some(4, 3), 4)
    before, step = up_to(plan, InsertEntries)
    apply(scene, before)
    for outside, _ in islice(plan.translations[0].tuples(), 2):
        scene.track(outside)

    apply(scene, [step])

    assert shows(plan, InsertEntries, observe(scene, plan))


@pytest.mark.whole
@EACH_MODE
@EACH_ROLE
def test_three_thousand_connections_of_either_family(scene: Scene, role: Role, mode: Mode) -> None:
    """More than fit one netlink message, and one chunk of messages."""
    plan = make(scene, role, Connections.of([*some(4, 3000), *some(6, 3000)]), 4, 6, mode=mode)
    picture = scene.picture()

    done = apply(scene, plan.steps)

    seen = observe(scene, plan)
    assert set(seen.missing.values()) == {0}
    for number in (0, 1):
        assert len(seen.entries[number]) == 3000
        assert all(entry is not None and entry.translated for entry in seen.entries[number])
    assert find_drift(plan, plan.move.sites[0], seen) == ()
    revert(scene, done)
    assert picture == scene.picture()


@EACH_ROLE
def test_what_somebody_removed_is_drift_and_reverting_goes_on(scene: Scene, role: Role) -> None:
    """Another program flushed the rules; the rest is still undone."""
    plan = make(scene, role, some(4, 3), 4)
    done = apply(scene, plan.steps)
    if isinstance(scene, LinuxScene):
        scene.run(scene.netns, "nft", "flush", "ruleset")
    else:
        here = scene.kernel.sites[scene.netns]
        here.gates.clear(), here.sets.clear(), here.loaded.clear()

    drift = find_drift(plan, plan.move.sites[0], observe(scene, plan))
    revert(scene, done)

    assert drift == ("table inet natkeep: nothing of move web is there",)
    seen = observe(scene, plan)
    assert (seen.gate, seen.addresses, set(seen.entries[0])) == (Gate.ABSENT, frozenset(), {None})
    assert scene.is_bare()


@pytest.mark.root
def test_the_picture_shows_what_it_is_compared_for(
    make_site: Callable[[], str],
    run: Callable[..., str],
    take_picture: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    """The control of all comparisons above: every kind of change is one in the picture."""
    scene = LinuxScene(LinuxKernel(), make_site(), run, take_picture, str(tmp_path))
    changes: list[Callable[[], object]] = [
        lambda: run(scene.netns, "nft", "add", "table", "inet", "x"),
        lambda: scene.add_address(MAPS[4].old),
        lambda: run(scene.netns, "ip", "route", "add", "10.8.0.0/16", "via", "10.3.0.1"),
        lambda: run(scene.netns, "ip", "route", "add", "fd00:8::/64", "via", "fd00:3::1"),
        lambda: scene.track(next(iter(some(4)))),
        lambda: scene.track(next(iter(some(6)))),
        lambda: run(scene.netns, "sysctl", "-qw", "net.netfilter.nf_conntrack_acct=1"),
        lambda: scene.lower_loopback(keep=True),
        lambda: (tmp_path / "web.hold").touch(),
    ]

    for change in changes:
        before = scene.picture()
        change()
        assert before != scene.picture()


@EACH_ROLE
def test_an_identity_is_that_of_the_namespace(scene: Scene, role: Role) -> None:
    site = Site(role, scene.netns)
    scene.kernel.open_sites([site])
    known = scene.kernel.identity(site)

    scene.kernel.open_sites([site], {site: known})

    assert known == scene.kernel.identity(site)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@EACH_ROLE
def test_a_site_that_is_opened_again_takes_no_other_descriptor(scene: Scene, role: Role) -> None:
    site = Site(role, scene.netns)
    scene.kernel.open_sites([site])
    known, before = scene.kernel.identity(site), descriptors()

    for _ in range(3):
        scene.kernel.open_sites([site])
        scene.kernel.open_sites([site], {site: known})

    assert before == descriptors()


@EACH_ROLE
def test_a_site_that_is_closed_is_let_go_of_and_can_be_opened_again(
    scene: Scene, role: Role
) -> None:
    site, before = Site(role, scene.netns), descriptors()
    scene.kernel.open_sites([site])
    known = scene.kernel.identity(site)

    for _ in range(2):  # the second time there is nothing to close
        scene.kernel.close_sites([site])

    assert before == descriptors()
    with pytest.raises(KeyError):
        scene.kernel.identity(site)
    scene.kernel.open_sites([site])
    assert known == scene.kernel.identity(site)
