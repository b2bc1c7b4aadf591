"""the laws of natkeep/kernel/__init__.py for a source's steps, on the real kernel and the fake.

As test_contract.py: `picture` is all that could have changed at the site, and the lock of another
dump is in it too, which must stay.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Protocol

import pytest
from fake_kernel import FakeKernel, FakeSite, chains_left, revert_step

from natkeep.errors import KernelError
from natkeep.kernel.interface import Kernel
from natkeep.kernel.linux import LinuxKernel
from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.drift import find_drift
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import (
    FillSet,
    HoldListeners,
    InstallGate,
    OpenGate,
    Plan,
    Prior,
    Step,
    TakeOverLock,
)
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple

MAPS = {
    4: Map(ip_address("10.2.0.10"), ip_address("10.9.0.20")),
    6: Map(ip_address("fd00:2::10"), ip_address("fd00:9::20")),
}
PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
LOCK = DumpLock(NetworkLock.NFTABLES, "aaf6b8e3-c33b-47e9-baff-d0ec3de03291")
OTHER = DumpLock(NetworkLock.NFTABLES, "0a0b0c0d-c33b-47e9-baff-d0ec3de03291")
HELD = (Endpoint.parse("10.2.0.10:80"), Endpoint.parse("[::]:443"))
KINDS = [InstallGate, FillSet, HoldListeners, TakeOverLock, OpenGate]

EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_VERSION = pytest.mark.parametrize("version", [4, 6])


def some(*versions: int, port: int = 5000) -> Connections:
    return Connections.of(
        FourTuple(Endpoint(PEER[v], port + n), Endpoint(MAPS[v].old, 80))
        for v in versions
        for n in range(3)
    )


class Scene(Protocol):
    kernel: Kernel
    netns: str

    def picture(self) -> object: ...
    def lock(self, lock: DumpLock, connections: Connections) -> None: ...
    def locked(self, lock: DumpLock) -> bool: ...


@dataclass
class FakeScene:
    kernel: FakeKernel
    netns: str = "site"

    def __post_init__(self) -> None:
        self.kernel.sites[self.netns] = FakeSite()

    def picture(self) -> object:
        return copy.deepcopy(self.kernel.sites[self.netns])

    def lock(self, lock: DumpLock, connections: Connections) -> None:
        self.kernel.sites[self.netns].locks[lock.table] = set(connections)

    def locked(self, lock: DumpLock) -> bool:
        return lock.table in self.kernel.sites[self.netns].locks


@dataclass
class LinuxScene:
    kernel: LinuxKernel
    netns: str
    run: Callable[..., str]
    take_picture: Callable[[str], list[str]]

    def picture(self) -> object:
        """Handles left out: a lock that was put back is equal and not the same."""
        return [re.sub(r'"handle": \d+', "", line) for line in self.take_picture(self.netns)]

    def lock(self, lock: DumpLock, connections: Connections) -> None:
        lines = [
            f"add table inet {lock.table}",
            f"add set inet {lock.table} conns4 {{ type ipv4_addr . inet_service . ipv4_addr . "
            "inet_service; }",
            f"add set inet {lock.table} conns6 {{ type ipv6_addr . inet_service . ipv6_addr . "
            "inet_service; }",
        ]
        for chain in ("output", "input"):
            at = f"inet {lock.table} {chain}"
            lines.append(f"add chain {at} {{ type filter hook {chain} priority 0; }}")
            lines.append(f"add rule {at} meta mark 0xc114 accept")
            for ip, name in (("ip", "conns4"), ("ip6", "conns6")):
                key = f"{ip} saddr . tcp sport . {ip} daddr . tcp dport"
                lines.append(f"add rule {at} {key} @{name} drop")
        for inbound in connections:
            name = f"conns{inbound.source.address.version}"
            for t in (inbound, inbound.reply()):
                ends = [f"{end.address} . {end.port}" for end in (t.source, t.destination)]
                lines.append(f"add element inet {lock.table} {name} {{ {' . '.join(ends)} }}")
        self.run(self.netns, "nft", "-f", "-", stdin="\n".join(lines) + "\n")

    def locked(self, lock: DumpLock) -> bool:
        return lock.table in self.run(self.netns, "nft", "list", "tables")


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.root)])
def scene(request: pytest.FixtureRequest) -> Scene:
    """A source just after two dumps."""
    if request.param == "fake":
        made: Scene = FakeScene(FakeKernel())
    else:
        netns = request.getfixturevalue("make_site")()
        run = request.getfixturevalue("run")
        made = LinuxScene(LinuxKernel(), netns, run, request.getfixturevalue("take_picture"))
    made.lock(OTHER, some(4, port=9000))
    made.lock(LOCK, some(4, 6))
    return made


def make(scene: Scene, *versions: int, move_id: str = "web", port: int = 5000) -> Plan:
    site, maps = Site(Role.SOURCE, scene.netns), tuple(MAPS[v] for v in versions)
    scene.kernel.open_sites([site])
    move = Move(move_id, maps, (site,), lock=LOCK, held=HELD)
    return make_plan(move, some(*versions, port=port))


def apply(scene: Scene, steps: Iterable[Step]) -> list[tuple[Step, Prior]]:
    done = []
    for step in steps:
        scene.kernel.check(step)
        told: list[Prior] = []
        prior = scene.kernel.apply(step, told.append)
        assert [prior] == told
        done.append((step, told[0]))
    return done


def revert(scene: Scene, done: Iterable[tuple[Step, Prior]]) -> None:
    for step, prior in reversed([*done]):
        revert_step(scene.kernel, step, prior)


def observe(scene: Scene, plan: Plan) -> Observation:
    return scene.kernel.observe(plan.move.sites[0], plan)


def up_to(plan: Plan, kind: type[Step]) -> tuple[tuple[Step, ...], Step]:
    at = [type(step) for step in plan.steps].index(kind)
    return plan.steps[:at], plan.steps[at]


@EACH_VERSION
def test_the_lock_goes_last_and_only_this_dumps(scene: Scene, version: int) -> None:
    plan = make(scene, version, version ^ 2)
    assert isinstance(plan.prepare[-1], TakeOverLock)
    apply(scene, plan.prepare[:-1])
    assert scene.locked(LOCK)
    assert observe(scene, plan).gate == Gate.CLOSED
    assert set(observe(scene, plan).missing.values()) == {0}

    apply(scene, plan.prepare[-1:])

    assert not scene.locked(LOCK)
    assert scene.locked(OTHER)


def test_connections_that_are_not_of_the_move_stay_locked(scene: Scene) -> None:
    apply(scene, make(scene, 4).prepare)

    assert scene.locked(LOCK)


@pytest.mark.parametrize("kind", [InstallGate, HoldListeners])
def test_what_was_applied_is_observed(scene: Scene, kind: type[Step]) -> None:
    plan = make(scene, 4)
    before, step = up_to(plan, kind)
    apply(scene, before)
    seen = observe(scene, plan)
    assert not seen.holds

    apply(scene, [step])

    seen = observe(scene, plan)
    if kind is InstallGate:
        assert {name.partition("-")[0] for name in chains_left(plan, seen)} == {"gate", "mute"}
    else:
        assert seen.holds


def test_a_prepared_and_opened_source_has_no_drift(scene: Scene) -> None:
    plan = make(scene, 4, 6)
    for steps in (plan.prepare, plan.open):
        apply(scene, steps)
        assert find_drift(plan, plan.move.sites[0], observe(scene, plan)) == ()
    assert observe(scene, plan).gate == Gate.OPEN


def test_a_hold_that_was_removed_is_drift(scene: Scene) -> None:
    plan = make(scene, 4)
    done = apply(scene, plan.prepare)
    revert(scene, [each for each in done if isinstance(each[0], HoldListeners)])

    drift = find_drift(plan, plan.move.sites[0], observe(scene, plan))

    assert drift == ("listeners: their new connections do not wait",)


def test_check_and_remember_change_nothing(scene: Scene) -> None:
    plan = make(scene, 4, 6)
    for step in plan.steps:
        before, seen = scene.picture(), []
        scene.kernel.check(step)
        assert before == scene.picture()
        scene.kernel.apply(step, lambda prior, seen=seen: seen.append(scene.picture()))
        assert seen == [before]


@EACH_KIND
@pytest.mark.parametrize("versions", [(4,), (4, 6)], ids=["some locked", "all locked"])
def test_reverting_up_to_any_step_leaves_the_source_as_it_was(
    scene: Scene, kind: type[Step], versions: tuple[int, ...]
) -> None:
    """Whether CRIU's table was ours alone or not."""
    plan = make(scene, *versions)
    picture = scene.picture()
    before, step = up_to(plan, kind)
    done = apply(scene, (*before, step))
    assert picture != scene.picture()

    for _ in range(2):
        revert(scene, done)
        assert _unordered(picture) == _unordered(scene.picture())


def _unordered(picture: object) -> object:
    """A table that is put back stands behind the others."""
    if isinstance(picture, list):
        return [sorted(re.findall(r"[^{}\[\]]+", line)) for line in picture]
    return picture


class KilledError(BaseException):
    """As SIGKILL would, at the moment when the journal has been written."""


@EACH_KIND
def test_a_step_that_never_came_to_its_change_is_reverted(scene: Scene, kind: type[Step]) -> None:
    plan = make(scene, 4, 6)
    before, step = up_to(plan, kind)
    apply(scene, before)
    picture, told = scene.picture(), []

    def die(prior: Prior) -> None:
        told.append(prior)
        raise KilledError

    with pytest.raises(KilledError):
        scene.kernel.apply(step, die)
    assert picture == scene.picture()
    revert_step(scene.kernel, step, told[0])

    assert picture == scene.picture()


def test_a_hold_again_is_the_new_hold_and_no_second_one(scene: Scene) -> None:
    """As when a move takes over what a quiesce of its id holds."""
    plan = make(scene, 4)
    site, picture = plan.move.sites[0], scene.picture()
    first = apply(scene, [HoldListeners(site, "web", HELD[:1])])
    once = scene.picture()
    apply(scene, [HoldListeners(site, "web", HELD)])
    again = apply(scene, [HoldListeners(site, "web", HELD[:1])])
    assert once == scene.picture()

    revert(scene, [*first, *again])

    assert picture == scene.picture()


@pytest.mark.parametrize("goes_first", [0, 1])
def test_a_hold_and_a_move_of_other_ids_share_the_table(scene: Scene, goes_first: int) -> None:
    plan = make(scene, 4, 6)
    site, picture = plan.move.sites[0], scene.picture()
    quiesce = Move("other", (MAPS[4],), (site,), held=HELD, quiesces=True)
    hold = make_plan(quiesce, NO_CONNECTIONS)
    both = [apply(scene, plan.prepare), apply(scene, hold.prepare)]

    revert(scene, both[goes_first])

    stays = [(plan, "closed"), (hold, "absent")][1 - goes_first]
    seen = observe(scene, stays[0])
    assert seen.gate == stays[1]
    assert seen.holds
    revert(scene, both[1 - goes_first])
    assert _unordered(picture) == _unordered(scene.picture())


def test_a_lock_that_cannot_be_taken_leaves_everything(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make(scene, 4, 6)
    apply(scene, plan.prepare[:-1])
    picture = scene.picture()
    if isinstance(scene, FakeScene):
        scene.kernel.fail_at = scene.kernel.applied
    else:
        from natkeep.kernel import criu_lock

        def refuse(lines: Iterable[str]) -> None:
            raise KernelError("told to fail")

        monkeypatch.setattr(criu_lock.nftables, "run_transaction", refuse)

    with pytest.raises(KernelError, match="told to fail"):
        apply(scene, plan.prepare[-1:])

    assert picture == scene.picture()
