"""plan/drift.py: what counts as a difference between the plan and what a site shows."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest

from natkeep.plan.base_chains import is_address_chain
from natkeep.plan.drift import find_drift
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate, Observation, SeenEntry
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.plan.wanted import want

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
OLD4, OLD6 = ip_address("10.2.0.10"), ip_address("fd00:2::10")
MAPS = (Map(OLD4, ip_address("10.3.0.20")), Map(OLD6, ip_address("fd00:3::20")))
KEPT = Connections.of(
    FourTuple(Endpoint.parse(f"{peer}:{port}"), Endpoint.parse(f"{local}:80"))
    for port in (5000, 5001, 5002)
    for peer, local in (("10.1.0.2", "10.2.0.10"), ("[fd00:1::2]", "[fd00:2::10]"))
)
PLAN = make_plan(Move("web", MAPS, (GATEWAY, DESTINATION)), KEPT)

LIVE, WRONG = SeenEntry(True, 1, 1, True), SeenEntry(False, 1, 1, True)
DESTINATION_RULES = {
    f"{dispatch}-at-{address}"
    for dispatch, addresses in {
        "gate": ("10.2.0.10", "10.3.0.20", "fd00_2__10", "fd00_3__20"),
        "in": ("10.3.0.20", "fd00_3__20"),
        "out": ("10.2.0.10", "fd00_2__10"),
    }.items()
    for address in addresses
}
AS_PLANNED = Observation(
    gate=Gate.CLOSED,
    missing={"kept-web-0": 0, "kept-web-1": 0},
    addresses=frozenset((OLD4, OLD6)),
    entries={0: (LIVE,) * 3, 1: (LIVE,) * 3},
    alive=6,
)


@pytest.mark.parametrize("gate", [Gate.CLOSED, Gate.OPEN])
def test_a_site_that_shows_what_the_plan_put_there_has_no_drift(gate: Gate) -> None:
    assert find_drift(PLAN, DESTINATION, replace(AS_PLANNED, gate=gate)) == ()


def test_a_gateway_needs_neither_addresses_nor_a_gate_at_new() -> None:
    assert find_drift(PLAN, GATEWAY, replace(AS_PLANNED, addresses=frozenset())) == ()
    olds, news = ("10.2.0.10", "fd00_2__10"), ("10.3.0.20", "fd00_3__20")
    at = {"gate": olds, "mark": news + olds, "in": olds, "out": news + olds, "from": news,
          "to": news + olds, "invalid-in": olds, "invalid-out": news + olds,
          "invalid-to": olds}  # fmt: skip
    chains = {f"{dispatch}-at-{each}" for dispatch, some in at.items() for each in some}
    assert chains == {key.name for key in want(PLAN, GATEWAY) if is_address_chain(key.name)}


def test_where_nothing_is_there_one_line_says_so() -> None:
    """It stands for all the others, that would only say the same."""
    nothing = Observation(
        Gate.ABSENT, {"kept-web-0": 3}, frozenset((OLD4, OLD6)), {}, 0,
        gone=frozenset(want(PLAN, DESTINATION)),
    )  # fmt: skip

    assert find_drift(PLAN, DESTINATION, nothing) == (
        "table inet natkeep: nothing of move web is there",
    )


@pytest.mark.parametrize("chain", sorted(DESTINATION_RULES))
def test_a_rule_that_is_gone_is_drift(chain: str) -> None:
    ours = {key for key in want(PLAN, DESTINATION) if (key.kind, key.name) == ("rule", chain)}
    seen = replace(AS_PLANNED, gone=frozenset(ours))

    assert find_drift(PLAN, DESTINATION, seen) == (f"chain {chain}: no rule of this move",)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"missing": {"kept-web-0": 2, "kept-web-1": 0}},
            ("set kept-web-0: 2 of 3 connections are missing",),
        ),
        ({"addresses": frozenset((OLD4,))}, ("address fd00:2::10: not on this host",)),
        (
            {"entries": {0: (LIVE, WRONG, WRONG), 1: (LIVE,) * 3}},
            ("conntrack: 2 entries for 10.2.0.10=10.3.0.20 do not translate",),
        ),
    ],
)
def test_what_differs_is_named(change: dict[str, object], expected: tuple[str, ...]) -> None:
    assert expected == find_drift(PLAN, DESTINATION, replace(AS_PLANNED, **change))


@pytest.mark.parametrize(
    ("entries", "alive", "lost"),
    [
        ({0: (None, LIVE, LIVE), 1: (LIVE,) * 3}, 6, 1),
        ({0: (None,) * 3, 1: (None,) * 3}, 6, 6),
        ({0: (None, None, LIVE), 1: (LIVE,) * 3}, 5, 1),
        ({0: (None, None, LIVE), 1: (LIVE,) * 3}, 4, 0),
        ({0: (None,) * 3, 1: (LIVE,) * 3}, 3, 0),
        ({0: (None,) * 3, 1: (None,) * 3}, 0, 0),
    ],
)
def test_a_missing_entry_is_drift_only_while_its_connection_lives(
    entries: dict[int, tuple[SeenEntry | None, ...]], alive: int, lost: int
) -> None:
    drift = find_drift(PLAN, DESTINATION, replace(AS_PLANNED, entries=entries, alive=alive))

    numbers = [int(line.split()[1]) for line in drift if "no entry" in line]
    assert lost == sum(numbers)
    assert len(numbers) == len(drift)
