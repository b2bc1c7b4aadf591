"""the laws of natkeep/kernel/__init__.py for the steps of `--unkept reset`, on both kernels.

As test_contract.py, whose scene this is: `picture` is all that could have changed at the site.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
from fake_kernel import FakeKernel, FakeSite, chains_left, revert_step

from natkeep.errors import KernelError
from natkeep.kernel.linux import LinuxKernel
from natkeep.plan import filters
from natkeep.plan.base_chains import is_address_chain
from natkeep.plan.drift import find_drift
from natkeep.plan.move import Fate, Map, Mode, Move, Site
from natkeep.plan.nft import Rule
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import (
    AddAddress,
    FillSet,
    InstallResets,
    Plan,
    Prior,
    SendResets,
    Step,
)
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.plan.wanted import objects_of, split_opening, want

OLD = {4: parse_address("10.2.0.10"), 6: parse_address("fd00:2::10")}
NEW = {4: parse_address("10.3.0.20"), 6: parse_address("fd00:3::20")}
PEER = {4: parse_address("10.1.0.2"), 6: parse_address("fd00:1::2")}
ROLES = [Role.GATEWAY, Role.DESTINATION, Role.SOURCE]
KINDS = [InstallResets, FillSet, SendResets]
EACH_ROLE = pytest.mark.parametrize("role", ROLES)
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
EACH_MODE = pytest.mark.parametrize("mode", list(Mode))


def some(version: int, port: int, count: int = 2) -> Iterator[FourTuple]:
    for number in range(count):
        yield FourTuple(Endpoint(PEER[version], port + number), Endpoint(OLD[version], 80))


class Scene:
    """A site of one kernel, with somebody else's table in it."""

    def __init__(self, kernel, netns, picture, flush):
        self.kernel, self.netns, self.picture, self.flush = kernel, netns, picture, flush

    def plan(self, role: Role, *, move_id="web", port=5000, mode=Mode.STATEFUL, count=2) -> Plan:
        """One kept connection of each family, and *count* lost ones, from *port* on."""
        site = Site(role, self.netns)
        maps = tuple(Map(OLD[version], NEW[version]) for version in (4, 6))
        lost = Connections.of(t for version in (4, 6) for t in some(version, port + 100, count))
        kept = Connections.of(t for version in (4, 6) for t in some(version, port, 1))
        self.kernel.open_sites([site])
        move = Move(move_id, maps, (site,), mode, unkept=Fate.RESET, lost=lost)
        return make_plan(move, kept)

    def apply(self, steps) -> list[tuple[Step, Prior, Prior]]:
        done = []
        for step in steps:
            told: list[Prior] = []
            returned = self.kernel.apply(step, told.append)
            assert len(told) == 1
            done.append((step, told[0], returned))
        return done

    def revert(self, done) -> None:
        for step, _, prior in reversed(done):
            revert_step(self.kernel, step, prior)

    def observe(self, plan: Plan):
        return self.kernel.observe(plan.move.sites[0], plan)

    def drift(self, plan: Plan) -> tuple[str, ...]:
        return find_drift(plan, plan.move.sites[0], self.observe(plan))


@pytest.fixture(params=["fake", pytest.param("linux", marks=pytest.mark.root)])
def scene(request) -> Scene:
    if request.param == "fake":
        kernel = FakeKernel()
        kernel.sites["site"] = FakeSite(loopback=True)
        here = kernel.sites

        def forget() -> None:
            here["site"].resets.pop("web", None)
            here["site"].broken |= {
                one.key() for step in here["site"].loaded for one in objects_of(step)
                if isinstance(one, Rule)
                and one.chain.startswith(("reset-", "refuse-at-10.", "answer-at-10."))
            }  # fmt: skip

        return Scene(kernel, "site", lambda: copy.deepcopy(here["site"]), forget)
    netns = request.getfixturevalue("make_site")()
    run, take = (request.getfixturevalue(name) for name in ("run", "take_picture"))
    run(netns, "nft", "add table ip theirs")
    # As at a living site, the next hop has an address: what cannot be sent fills the socket's
    # buffer, and each question to a peer behind it then waits for 20 ms.
    for hop in ("10.3.0.1", "fd00:3::1"):
        run(netns, *f"ip neighbour add {hop} lladdr 02:00:00:00:00:01 dev eth0".split())

    def flush() -> None:
        run(netns, "nft", f"flush chain inet natkeep {filters.reset_chain('web')}")
        for chain in ("refuse-at-10.2.0.10", "answer-at-10.2.0.10"):
            if chain in run(netns, "nft", "list chains"):
                run(netns, "nft", f"flush chain inet natkeep {chain}")

    return Scene(LinuxKernel(), netns, lambda: take(netns), flush)


def up_to(plan: Plan, kind: type[Step]) -> tuple[tuple[Step, ...], Step]:
    """The steps before the last of *kind* (its FillSet is of what is lost), and that one."""
    numbers = [number for number, step in enumerate(plan.steps) if isinstance(step, kind)]
    return plan.steps[: numbers[-1]], plan.steps[numbers[-1]]


@EACH_ROLE
def test_what_was_applied_is_observed(scene: Scene, role: Role) -> None:
    plan = scene.plan(role)
    sets = {filters.reset_set("web", number) for number in (0, 1)}
    seen = []
    for kind in (*KINDS, None):
        before = plan.steps if kind is None else up_to(plan, kind)[0]
        done = scene.apply(before)
        now = scene.observe(plan)
        missing = [now.missing[name] for name in sorted(sets)]
        told = not now.shut & split_opening(plan, plan.move.sites[0])[1]
        comment = f"{filters.reset_comment('web')}: "
        rules = [key for key in want(plan, plan.move.sites[0]) if key.what.startswith(comment)]
        chains = {k.name for k in rules if k not in now.gone and is_address_chain(k.name)}
        seen.append((told, len(chains), missing))
        scene.revert(done)

    assert [each[:2] for each in seen] == [
        (False, 0), (False, 2), (False, 2), (True, 2),
    ]  # fmt: skip
    assert [each[2] for each in seen] == [[2, 2], [0, 2], [0, 0], [0, 0]]


@EACH_MODE
@EACH_ROLE
def test_a_prepared_and_opened_site_has_no_drift(scene: Scene, role: Role, mode: Mode) -> None:
    plan = scene.plan(role, mode=mode)

    for steps in (plan.prepare, plan.open):
        scene.apply(steps)
        assert scene.drift(plan) == ()


@EACH_MODE
@EACH_ROLE
def test_all_of_it_is_reverted_without_a_trace(scene: Scene, role: Role, mode: Mode) -> None:
    plan = scene.plan(role, mode=mode)
    picture = scene.picture()

    scene.revert(scene.apply(plan.steps))

    assert picture == scene.picture()


@EACH_KIND
@EACH_ROLE
def test_reverting_up_to_any_step_leaves_the_site_as_it_was(
    scene: Scene, role: Role, kind: type[Step]
) -> None:
    plan = scene.plan(role)
    picture = scene.picture()
    before, step = up_to(plan, kind)

    scene.revert(scene.apply((*before, step)))

    assert picture == scene.picture()


class KilledError(BaseException):
    """As SIGKILL would, at the moment when the journal has been written."""


@EACH_KIND
@EACH_ROLE
def test_a_step_that_was_interrupted_or_never_began_is_reverted(
    scene: Scene, role: Role, kind: type[Step]
) -> None:
    plan = scene.plan(role)
    picture = scene.picture()
    before, step = up_to(plan, kind)
    done = scene.apply(before)
    halfway, told = scene.picture(), []

    def die(prior: Prior) -> None:
        told.append(prior)
        raise KilledError

    with pytest.raises(KilledError):
        scene.kernel.apply(step, die)
    assert halfway == scene.picture()
    revert_step(scene.kernel, step, told[0])
    assert halfway == scene.picture()

    [(_, remembered, _)] = scene.apply([step])
    revert_step(scene.kernel, step, remembered)
    revert_step(scene.kernel, step, remembered)
    scene.revert(done)

    assert picture == scene.picture()


@EACH_ROLE
def test_resetting_again_changes_nothing_and_is_not_undone(scene: Scene, role: Role) -> None:
    plan = scene.plan(role)
    scene.apply(plan.steps)
    sending = [step for step in plan.steps if isinstance(step, SendResets)]
    opened = scene.picture()

    again = scene.apply(sending)

    assert opened == scene.picture()
    assert [prior.present for _, _, prior in again] == [True]
    scene.revert(again)
    assert not scene.observe(plan).shut


@pytest.mark.parametrize("order", ["first-in-first-out", "last-in-first-out"])
@EACH_ROLE
def test_moves_share_a_site_and_leave_it_one_by_one(scene: Scene, role: Role, order: str) -> None:
    picture = scene.picture()
    plans = [scene.plan(role, move_id=i, port=p) for i, p in (("web", 5000), ("web-0", 6000))]
    done = [scene.apply(plan.steps) for plan in plans]
    first, second = (0, 1) if order == "first-in-first-out" else (1, 0)
    assert [scene.drift(plan) for plan in plans] == [(), ()]

    # An address that two moves use changes hands in lifecycle/; its rules stay as long as it does.
    handed = [one for one in done[first] if isinstance(one[0], AddAddress)]
    scene.revert([one for one in done[first] if one not in handed])

    assert not chains_left(plans[first], scene.observe(plans[first]))
    assert scene.drift(plans[second]) == ()
    scene.revert([*done[second], *handed])
    assert picture == scene.picture()


@EACH_ROLE
def test_what_somebody_removed_is_drift(scene: Scene, role: Role) -> None:
    plan = scene.plan(role)
    done = scene.apply(plan.steps)
    picture = scene.picture()
    scene.flush()

    drift = " / ".join(scene.drift(plan))

    chain = "answer-at-10.2.0.10" if role == Role.DESTINATION else "refuse-at-10.2.0.10"
    assert picture != scene.picture()
    assert f"chain {chain}" in drift
    assert f"chain {filters.reset_chain('web')}" in drift
    scene.revert(done)


@EACH_ROLE
def test_sending_without_what_leads_there_fails_and_changes_nothing(
    scene: Scene, role: Role
) -> None:
    plan = scene.plan(role)
    picture = scene.picture()
    [step] = [step for step in plan.steps if isinstance(step, SendResets)]

    with pytest.raises(KernelError):
        scene.apply([step])

    assert picture == scene.picture()


@EACH_ROLE
def test_a_thousand_of_either_family(scene: Scene, role: Role) -> None:
    """More than fit one netlink message, asked and reset."""
    plan = scene.plan(role, count=1000)
    picture = scene.picture()

    done = scene.apply(plan.steps)

    assert scene.drift(plan) == ()
    scene.revert(done)
    assert picture == scene.picture()
