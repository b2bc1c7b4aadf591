"""A route to OLD at the peers' own host: added where there is none, and gone with the last move."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address

import pytest
from fake_kernel import revert_step

from natkeep.kernel.linux import LinuxKernel
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan, Prior, Step
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root

Run = Callable[..., str]
OLD = {4: ip_address("10.2.0.10"), 6: ip_address("fd00:2::10")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
OWN = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}


@pytest.fixture(params=[4, 6])
def version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def apply(kernel: LinuxKernel, plan: Plan) -> list[tuple[Step, Prior]]:
    return [(step, kernel.apply(step, lambda _: None)) for step in plan.steps]


def undo(kernel: LinuxKernel, done: list[tuple[Step, Prior]]) -> None:
    for step, prior in reversed(done):
        revert_step(kernel, step, prior)


def make(kernel: LinuxKernel, netns: str, version: int, move_id: str, port: int) -> Plan:
    move = Move(move_id, (Map(OLD[version], NEW[version]),), (Site(Role.PEER, netns),))
    kept = Connections.of([FourTuple(Endpoint(OWN[version], port), Endpoint(OLD[version], 80))])
    kernel.open_sites(move.sites)
    return make_plan(move, kept, kernel.look_around(move, kept))


def by_lo(netns: str, run: Run, version: int) -> bool:
    routes = run(netns, "ip", f"-{version}", "route", "show", "table", "main", "dev", "lo")
    return str(OLD[version]) in routes


def test_it_is_added_once_and_goes_with_the_last_move(
    make_site: Callable[[], str], run: Run, version: int
) -> None:
    netns, kernel = make_site(), LinuxKernel()
    own = f"{OWN[version]}/{OWN[version].max_prefixlen}"
    run(netns, "ip", "address", "add", own, "dev", "eth0", *(["nodad"] if version == 6 else []))
    first = apply(kernel, make(kernel, netns, version, "web", 5000))
    assert by_lo(netns, run, version)
    second = apply(kernel, make(kernel, netns, version, "web2", 5001))

    undo(kernel, first)
    assert by_lo(netns, run, version)

    undo(kernel, second)
    assert not by_lo(netns, run, version)


def test_a_route_that_is_there_is_left_alone(
    make_site: Callable[[], str], run: Run, version: int
) -> None:
    netns, kernel = make_site(), LinuxKernel()
    own = f"{OWN[version]}/{OWN[version].max_prefixlen}"
    run(netns, "ip", "address", "add", own, "dev", "eth0", *(["nodad"] if version == 6 else []))
    old = f"{OLD[version]}/{OLD[version].max_prefixlen}"
    run(netns, "ip", f"-{version}", "route", "add", old, "dev", "eth0")
    before = run(netns, "ip", f"-{version}", "route")

    done = apply(kernel, make(kernel, netns, version, "web", 5000))
    assert not by_lo(netns, run, version)
    undo(kernel, done)

    assert run(netns, "ip", f"-{version}", "route") == before
