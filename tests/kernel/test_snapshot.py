"""kernel/snapshot.py: one for many moves shows of each what one of its own shows.

That it does so of sites that others have broken is held by conftest.py, in all tests of the folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import ip_address

import pytest

from natkeep.errors import KernelError
from natkeep.kernel.ctnetlink import ask_for_tcp
from natkeep.kernel.linux import LinuxKernel
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root
Run = Callable[..., str]


def make_plans(netns: str, role: Role, count: int = 5) -> Iterator[Plan]:
    """Moves of three connections each, of both families and both modes, with listeners."""
    for number in range(count):
        maps = (
            Map(ip_address("10.2.0.10") + number, ip_address("10.3.0.20") + number),
            Map(ip_address("fd00:2::10") + number, ip_address("fd00:3::20") + number),
        )
        tuples = [
            FourTuple(Endpoint(ip_address(peer), 5000 + i), Endpoint(map_.old, 80))
            for map_, peer in zip(maps, ("10.1.0.2", "fd00:1::2"), strict=True)
            for i in range(3)
        ]
        move = Move(
            f"m{number}", maps, (Site(role, netns),), list(Mode)[number % 2],
            (Endpoint(maps[0].old, 8080 + number),),
        )  # fmt: skip
        yield make_plan(move, Connections.of(tuples))


@pytest.fixture
def kernel() -> LinuxKernel:
    return LinuxKernel()


def prepare(kernel: LinuxKernel, plans: list[Plan]) -> Site:
    [site] = plans[0].move.sites
    kernel.open_sites([site])
    for plan in plans:
        for step in plan.steps:
            kernel.apply(step, lambda prior: None)
    return site


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
def test_one_snapshot_shows_every_move_as_it_is(
    make_site: Callable[[], str], run: Run, kernel: LinuxKernel, role: Role
) -> None:
    plans = [*make_plans(make_site(), role)]
    site = prepare(kernel, plans)
    for number in range(20):  # other people's entries are among them, in other forms
        run(
            site.netns, "conntrack", "-I", "-p", "udp" if number % 2 else "tcp",
            *("-s", "10.9.0.1", "-d", f"10.9.1.{number}", "--sport", "7", "--dport", "9"),
            *("--timeout", "99"), *(() if number % 2 else ("--state", "ESTABLISHED")),
        )  # fmt: skip
    run(site.netns, "conntrack", "-D", "-p", "tcp", "--orig-port-src", "5001")

    with closing(kernel.snapshot(site)) as snapshot:
        for plan in plans:
            seen = snapshot.observe(site, plan)
            assert seen == kernel.observe(site, plan)
            assert None in seen.entries[0]


def test_an_entry_that_is_made_meanwhile_is_seen(
    make_site: Callable[[], str], run: Run, kernel: LinuxKernel
) -> None:
    """Entries come with every packet, so each is asked for when a move is observed."""
    [plan] = make_plans(make_site(), Role.GATEWAY, 1)
    site = prepare(kernel, [plan])
    run(site.netns, "conntrack", "-F")
    with closing(kernel.snapshot(site)) as snapshot:
        assert [*snapshot.observe(site, plan).entries[0]] == [None] * 3

        for step in plan.prepare:
            if type(step).__name__ == "InsertEntries":
                kernel.apply(step, lambda prior: None)

        assert None not in snapshot.observe(site, plan).entries[0]


def test_a_snapshot_holds_few_descriptors_and_leaves_none(
    make_site: Callable[[], str], kernel: LinuxKernel
) -> None:
    [plan] = make_plans(make_site(), Role.DESTINATION, 1)
    site = prepare(kernel, [plan])
    before = len(os.listdir("/proc/self/fd"))

    snapshot = kernel.snapshot(site)
    snapshot.observe(site, plan)
    held = len(os.listdir("/proc/self/fd")) - before
    snapshot.close()

    assert held <= 5
    assert before == len(os.listdir("/proc/self/fd"))


def test_a_dump_that_the_kernel_refuses_is_an_error(
    make_site: Callable[[], str], kernel: LinuxKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    [plan] = make_plans(make_site(), Role.GATEWAY, 1)
    site = prepare(kernel, [plan])
    requests = "natkeep.kernel.conntrack_listeners.ask_for_tcp"
    monkeypatch.setattr(requests, lambda version, **which: b"\0" + ask_for_tcp(version)[1:])

    with (
        closing(kernel.snapshot(site)) as snapshot,
        pytest.raises(KernelError, match=f"gateway={site.netns}: "),
    ):
        snapshot.observe(site, plan)


def test_what_the_process_began_is_seen_the_other_way_round_with_its_packets(
    make_site: Callable[[], str], run: Run, kernel: LinuxKernel
) -> None:
    """As conntrack has it after a flush, where the process spoke first."""
    [plan] = make_plans(make_site(), Role.GATEWAY, 1)
    site = prepare(kernel, [plan])
    run(site.netns, "conntrack", "-D", "-p", "tcp", "--orig-port-src", "5001")
    run(
        site.netns, "conntrack", "-I", "-p", "tcp", "--state", "ESTABLISHED", "--timeout", "99",
        *("-s", "10.3.0.20", "-d", "10.1.0.2", "--sport", "80", "--dport", "5001"),
        *("--src-nat", "10.2.0.10"),
    )  # fmt: skip

    seen = kernel.observe(site, plan)

    assert [entry and entry.translated for entry in seen.entries[0]] == [True] * 3
