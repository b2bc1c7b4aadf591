"""what `natkeep plan` prints, typed by a person: the same site comes out as natkeep makes."""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import ip_address

import pytest

from natkeep.kernel.linux import LinuxKernel
from natkeep.plan import arp, base_chains
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import ROLES, Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan, PurgeEntries
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root

MAPS = (
    Map(ip_address("10.2.0.10"), ip_address("10.3.0.20")),
    Map(ip_address("fd00:2::10"), ip_address("fd00:3::20")),
)
KEPT = Connections.of(
    FourTuple(Endpoint.parse(peer), Endpoint.parse(local))
    for peer, local in (
        ("10.1.0.2:50594", "10.2.0.10:80"),
        ("10.1.0.3:50595", "10.2.0.10:443"),
        ("[fd00:1::2]:50594", "[fd00:2::10]:80"),
    )
)


def picture(netns: str, run: Callable[..., str]) -> dict[str, list[str]]:
    """Rules, addresses and entries; without the order in which chains were added, and clocks."""
    rules = re.sub(r"(?m)^table .*\n|^}\n", "", run(netns, "nft", "list", "ruleset"))
    found = {"rules": sorted(block.strip() for block in re.split(r"(?m)^\t}\n", rules))}
    for version in (4, 6):
        addresses = run(netns, "ip", f"-{version}", "address", "show", "lo")
        entries = run(netns, "conntrack", "-L", "-f", f"ipv{version}")
        entries = re.sub(r"(?m)packets=\d+ bytes=\d+ |(?<=^tcp      6) \d+", "", entries)
        found[f"addresses{version}"] = addresses.splitlines()
        found[f"entries{version}"] = sorted(entries.splitlines())
    return found


def plan_at(role: Role, netns: str) -> Plan:
    return make_plan(Move("web", MAPS, (Site(role, netns),), Mode.STATEFUL), KEPT)


@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
def test_the_described_commands_do_what_natkeep_does(
    role: Role, make_site: Callable[[], str], run: Callable[..., str]
) -> None:
    ours, typed = make_site(), make_site()
    kernel, plan = LinuxKernel(), plan_at(role, ours)
    kernel.open_sites(plan.move.sites)
    for step in plan.steps:
        kernel.apply(step, lambda prior: None)

    # The parts that all moves share are not any step's own.
    at_gateway = role == Role.GATEWAY
    parts = base_chains.translation_tables(ROLES[role], plan.move.mode)
    shared = [one for part in (base_chains.base_table(), *parts) for one in part]
    early = base_chains.SPOKEN if at_gateway else base_chains.HEARD
    shared += base_chains.dispatch_table(early)
    if role == Role.DESTINATION:
        shared += [*base_chains.destination_table(), *arp.arp_table()]
    run(typed, "nft", "-f", "-", stdin="\n".join(map(str, shared)))
    for step in plan_at(role, typed).steps:
        for line in step.describe():
            if not isinstance(step, PurgeEntries):  # there is none: conntrack(8) would complain
                run(typed, "sh", "-ec", line)

    assert picture(ours, run) == picture(typed, run)
