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
from natkeep.kernel.conntrack_dump import Dump
from natkeep.kernel.ctnetlink import ask_for_tcp, turn
from natkeep.kernel.interface import Snapshot
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import inside, open_namespace
from natkeep.plan.move import Map, Mode, Move, Role, Site
from natkeep.plan.plan import make_plan
from natkeep.plan.steps import Plan
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root
Run = Callable[..., str]
MANY = 1_000_000


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


def take_dump(kernel: LinuxKernel, site: Site) -> Snapshot:
    """A snapshot that reads the connection table in one dump."""
    snapshot = kernel.snapshot(site)
    for version in (4, 6):
        snapshot.expect(version, MANY)
    return snapshot


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

    snapshot = take_dump(kernel, site)

    for plan in plans:
        seen = snapshot.observe(site, plan)
        assert seen == kernel.observe(site, plan)
        assert None in seen.entries[0]
    snapshot.close()


def test_what_is_made_behind_a_dump_is_still_found(
    make_site: Callable[[], str], run: Run, kernel: LinuxKernel
) -> None:
    """A dump may miss an entry; that it is not there is said only when it was asked for."""
    [plan] = make_plans(make_site(), Role.GATEWAY, 1)
    site = prepare(kernel, [plan])
    run(site.netns, "conntrack", "-F")
    snapshot = take_dump(kernel, site)
    assert [*snapshot.observe(site, plan).entries[0]] == [None] * 3

    for step in plan.prepare:
        if type(step).__name__ == "InsertEntries":
            kernel.apply(step, lambda prior: None)

    assert None not in snapshot.observe(site, plan).entries[0]
    snapshot.close()


def test_entries_of_other_zones_are_not_ours(make_site: Callable[[], str], run: Run) -> None:
    netns = make_site()
    called = Endpoint.parse("10.2.0.10:80")
    end = called.address.packed + called.port.to_bytes(2, "big")
    tuple_ = ip_address("10.1.0.2").packed + (5000).to_bytes(2, "big") + end
    insert = "conntrack -I -p tcp -s 10.1.0.2 -d 10.2.0.10 --sport 5000 --dport 80 --timeout 99"
    for zone, there in ((("--zone", "7"), False), ((), True)):
        run(netns, *insert.split(), "--state", "ESTABLISHED", *zone)
        with inside(open_namespace(netns)):
            dump = Dump(4)
        assert (dump.find(tuple_) is not None) == (dump.find(turn(tuple_)) is not None) == there
        assert len(dump.find_to(end)) == 1 + there


def test_a_snapshot_holds_few_descriptors_and_leaves_none(
    make_site: Callable[[], str], kernel: LinuxKernel
) -> None:
    [plan] = make_plans(make_site(), Role.DESTINATION, 1)
    site = prepare(kernel, [plan])
    before = len(os.listdir("/proc/self/fd"))

    snapshot = take_dump(kernel, site)
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
    of_no_family = "natkeep.kernel.conntrack_dump.ask_for_tcp"
    monkeypatch.setattr(of_no_family, lambda version: b"\xff" + ask_for_tcp(version)[1:])

    with (
        closing(take_dump(kernel, site)) as snapshot,
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
    snapshot = take_dump(kernel, site)

    seen = snapshot.observe(site, plan)

    assert seen == kernel.observe(site, plan)
    assert [entry and entry.translated for entry in seen.entries[0]] == [True] * 3
    snapshot.close()
