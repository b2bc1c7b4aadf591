"""the order of work where what peers say is held: who closes first, and who stands open."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.plan_text import describe_plan
from natkeep.plan.protocols import UDP
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import (
    AddAddress,
    FillSet,
    HoldSegments,
    InsertEntries,
    InstallGate,
    InstallTranslation,
    OpenEarly,
    OpenGate,
    Plan,
    PurgeEntries,
    Step,
    TakeOverLock,
)
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
SOURCE = Site(Role.SOURCE, "src")
MAPS = tuple(
    Map(ip_address(old), ip_address(new))
    for old, new in (("10.2.0.10", "10.3.0.20"), ("fd00:2::10", "fd00:3::20"))
)
KEPT = Connections.of(
    FourTuple(Endpoint(ip_address(peer), 50594), Endpoint(map_.old, 80))
    for peer, map_ in zip(("10.1.0.2", "fd00:1::2"), MAPS, strict=True)
)

EACH_MODE = pytest.mark.parametrize("mode", list(Mode))


def plan_for(*sites: Site, hold: bool = True, mode: Mode = Mode.STATEFUL) -> Plan:
    lock = DumpLock(NetworkLock.NFTABLES, "run", False, 2) if SOURCE in sites else None
    return make_plan(Move("web", MAPS, sites, mode, lock=lock, hold=hold), KEPT)


def place(plan: Plan, kind: type[Step], site: Site) -> int:
    """Where the first such step stands."""
    return next(n for n, s in enumerate(plan.steps) if type(s) is kind and s.site == site)


@EACH_MODE
def test_the_gateway_opens_when_the_destination_is_closed_and_its_holder_hears(mode: Mode) -> None:
    plan = plan_for(GATEWAY, DESTINATION, mode=mode)

    assert place(plan, HoldSegments, DESTINATION) < place(plan, AddAddress, DESTINATION)
    assert place(plan, FillSet, DESTINATION) < place(plan, HoldSegments, DESTINATION)
    assert place(plan, InsertEntries, DESTINATION) < place(plan, InstallGate, GATEWAY)
    assert isinstance(plan.prepare[-1], OpenEarly)
    assert plan.prepare[-1].site == GATEWAY
    assert [(type(step), step.site) for step in plan.open] == [(OpenGate, DESTINATION)]
    assert plan.open[0] == OpenGate(DESTINATION, "web", delivers=True)


def test_the_gateway_is_closed_for_as_short_as_can_be() -> None:
    plan = plan_for(GATEWAY, DESTINATION)

    kinds = [type(step) for step in plan.prepare if step.site == GATEWAY]

    begin = kinds.index(FillSet)
    assert kinds[:begin] == [InstallGate, InstallTranslation]
    assert kinds[begin:] == [
        *[FillSet] * 2, *[PurgeEntries, InsertEntries] * 2, OpenEarly,
    ]  # fmt: skip


def test_the_source_comes_last_all_the_same() -> None:
    plan = plan_for(SOURCE, GATEWAY, DESTINATION)

    assert isinstance(plan.prepare[-1], TakeOverLock)
    assert place(plan, OpenEarly, GATEWAY) < place(plan, InstallGate, SOURCE)
    assert [step.site for step in plan.open] == [DESTINATION]


def test_a_destination_alone_holds_and_delivers() -> None:
    plan = plan_for(DESTINATION)

    assert [type(s) for s in plan.steps].count(HoldSegments) == 1
    assert plan.open == (OpenGate(DESTINATION, "web", delivers=True),)


def test_a_gateway_alone_is_prepared_closed() -> None:
    with_hold, without = plan_for(GATEWAY), plan_for(GATEWAY, hold=False)

    assert with_hold.steps == without.steps
    assert with_hold.open == (OpenGate(GATEWAY, "web"),)


def test_without_hold_the_gateway_comes_first_and_stays_closed() -> None:
    plan = plan_for(GATEWAY, DESTINATION, hold=False)

    assert not any(isinstance(step, HoldSegments | OpenEarly) for step in plan.steps)
    assert place(plan, InsertEntries, GATEWAY) < place(plan, InstallGate, DESTINATION)
    assert [step.site for step in plan.open] == [GATEWAY, DESTINATION]


def test_the_holder_is_told_each_map_with_its_connections() -> None:
    plan = plan_for(DESTINATION)

    [step] = [step for step in plan.prepare if isinstance(step, HoldSegments)]

    assert step.kept() == [
        (v, KEPT.at(map_.old).toward(map_.new).records(v), KEPT.records(v))
        for map_ in MAPS
        for v in [map_.old.version]
    ]
    assert any("keep what peers say on 2 connections" in line for line in describe_plan(plan))


def test_datagrams_are_held_beside_segments_and_delivered_before_the_gate_opens() -> None:
    plan = make_plan(Move("web", MAPS, (GATEWAY, DESTINATION), udp=KEPT, hold=True), KEPT)

    [step] = [step for step in plan.prepare if isinstance(step, HoldSegments)]
    assert step.kept(UDP) == step.kept() != []
    assert plan.open == (OpenGate(DESTINATION, "web", delivers=True, datagrams=True),)
    assert any("keep what peers say on 4 connections" in line for line in describe_plan(plan))
