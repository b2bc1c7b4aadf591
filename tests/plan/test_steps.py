"""plan/steps.py: which steps, in which order, and how each says what it does."""

from __future__ import annotations

import json
import subprocess
from ipaddress import ip_address

import pytest

from natkeep.errors import RefusedError
from natkeep.plan.arp import arp_table
from natkeep.plan.base_chains import shared_names
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.nft import Chain, Set
from natkeep.plan.plan_text import describe_plan, render_nft
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import (
    AddAddress,
    AddRules,
    FillSet,
    InsertEntries,
    InstallGate,
    InstallTranslation,
    Loads,
    OpenGate,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
)
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.values import replace

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
MAPS = (
    Map(ip_address("10.2.0.10"), ip_address("10.3.0.20")),
    Map(ip_address("fd00:2::10"), ip_address("fd00:3::20")),
)


def connections(count: int) -> Connections:
    """As many of either family."""
    return Connections.of(
        FourTuple(Endpoint.parse(f"{peer}:{port}"), Endpoint.parse(f"{local}:80"))
        for port in range(5000, 5000 + count)
        for peer, local in (("10.1.0.2", "10.2.0.10"), ("[fd00:1::2]", "[fd00:2::10]"))
    )


def plan_for(*sites: Site, count: int = 1) -> Plan:
    return make_plan(Move("web", MAPS, sites), connections(count))


def test_the_order_is_gate_address_translation_purge_entries_and_the_gateway_first() -> None:
    plan = plan_for(DESTINATION, GATEWAY)

    pairs = [PurgeEntries, InsertEntries] * 2
    assert [(GATEWAY, k) for k in (InstallGate, FillSet, FillSet, InstallTranslation, *pairs)] + [
        (DESTINATION, k)
        for k in (
            InstallGate,
            FillSet,
            FillSet,
            RaiseLoopback,
            AddRules,
            AddAddress,
            AddAddress,
            InstallTranslation,
            *pairs,
        )
    ] == [(step.site, type(step)) for step in plan.prepare]


def test_gates_open_gateway_first_and_after_everything_else() -> None:
    plan = plan_for(DESTINATION, GATEWAY)

    assert plan.open == (OpenGate(GATEWAY, "web"), OpenGate(DESTINATION, "web"))
    assert plan.steps == (*plan.prepare, *plan.open)


def test_a_plan_is_a_function_of_what_is_wished() -> None:
    """The journal has only the wish and step numbers, so the plan must come out the same."""
    assert plan_for(GATEWAY, DESTINATION, count=5) == plan_for(GATEWAY, DESTINATION, count=5)


def test_a_plan_for_no_connection_is_refused() -> None:
    with pytest.raises(RefusedError):
        plan_for(DESTINATION, count=0)


def test_a_move_of_one_family_has_no_step_for_the_other() -> None:
    plan = make_plan(Move("web", MAPS, (DESTINATION,)), Connections(v6=connections(1).v6))

    assert [AddAddress(DESTINATION, MAPS[1].old, MAPS[1].new)] == [
        step for step in plan.steps if isinstance(step, AddAddress)
    ]
    assert "10." not in "\n".join(describe_plan(plan))


ADDED4 = "ip address add 10.2.0.10/32 dev lo"


@pytest.mark.parametrize(
    ("netns", "command"),
    [
        ("", ADDED4),
        ("dst", f"ip netns exec dst {ADDED4}"),
        ("pid:7", f"nsenter --target 7 --net {ADDED4}"),
        ("/run/x", f"nsenter --net=/run/x {ADDED4}"),
    ],
)
def test_a_step_describes_itself_as_a_command_in_its_namespace(netns: str, command: str) -> None:
    step = AddAddress(Site(Role.DESTINATION, netns), MAPS[0].old)

    assert (command,) == step.describe()


@pytest.mark.parametrize(
    ("netns", "words"),
    [
        ("/tmp/a b", ["nsenter", "--net=/tmp/a b"]),
        ("/tmp/$(id)", ["nsenter", "--net=/tmp/$(id)"]),
        ("a;id", ["ip", "netns", "exec", "a;id"]),
        ("a'b", ["ip", "netns", "exec", "a'b"]),
        ("pid:7;id", ["nsenter", "--target", "7;id", "--net"]),
    ],
)
def test_a_described_command_is_one_command_whatever_the_namespace_is_called(
    netns: str, words: list[str]
) -> None:
    """It is there to be typed: nobody's file name may add a word to it, or a command."""
    [line] = AddAddress(Site(Role.DESTINATION, netns), MAPS[0].old).describe()

    typed = subprocess.run(["sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True)

    assert [*words, *ADDED4.split()] == typed.stdout.splitlines()


def test_an_ipv6_address_is_added_without_duplicate_detection() -> None:
    step = AddAddress(Site(Role.DESTINATION), MAPS[1].old)

    assert step.describe() == (
        "ip address add fd00:2::10/128 dev lo nodad noprefixroute preferred_lft 0",
    )


def test_the_whole_plan_describes_itself() -> None:
    """Every step has a line, in order, and the gates are told apart from the rest."""
    plan = make_plan(
        Move("web", MAPS[:1], (Site(Role.DESTINATION),)), Connections(v4=connections(1).v4)
    )

    lines = list(describe_plan(plan))

    tell_tale = [
        "nft 'add chain inet natkeep gate-web'",
        "nft 'add element inet natkeep kept-web-0 { 10.1.0.2 . 5000 . 80 }'",
        "ip link set lo up",
        ADDED4,
        "nft 'add chain inet natkeep in-at-10.3.0.20'",
        "conntrack -D -p tcp -s 10.1.0.2 -d 10.3.0.20 --sport 5000 --dport 80",
        "conntrack -I -p tcp -s 10.1.0.2 -d 10.3.0.20 --sport 5000 --dport 80"
        " --dst-nat 10.2.0.10:80 --state ESTABLISHED --status SEEN_REPLY,ASSURED --timeout 432000",
        "# when the sockets are there (natkeep open, or natkeep-hook at post-restore):",
        "nft 'insert rule inet natkeep gate-web accept comment \"open\"'",
    ]
    places = [lines.index(line) for line in tell_tale]
    assert sorted(places) == places
    assert lines[-1] == "# later, unless another gate is closed: delete chain gate"
    assert len(lines) - 2 == places[-1]


@pytest.mark.parametrize(
    ("count", "shown", "more"),
    [(1, 1, []), (3, 3, []), (4, 3, ["# ... and 1 more"]), (40, 3, ["# ... and 37 more"])],
)
def test_a_description_shows_a_few_connections_and_says_how_many_more(
    count: int, shown: int, more: list[str]
) -> None:
    [fill] = [s for s in plan_for(DESTINATION, count=count).steps if isinstance(s, FillSet)][:1]
    [insert] = [
        s for s in plan_for(DESTINATION, count=count).steps if isinstance(s, InsertEntries)
    ][:1]

    assert shown == sum("conntrack -I" in line for line in insert.describe())
    assert more == [line for line in insert.describe() if line.startswith("#")]
    assert shown == fill.describe()[0].count("10.1.0.2")
    assert all(line in fill.describe()[0] for line in more)


def test_a_purge_counts_tuples_since_a_connection_has_four() -> None:
    [purge] = [s for s in plan_for(DESTINATION).steps if isinstance(s, PurgeEntries)][:1]

    assert purge.describe()[-1] == "# ... and 1 more"


def test_the_nft_script_has_every_connection_and_what_the_steps_load() -> None:
    plan = plan_for(GATEWAY, DESTINATION, count=40)

    scripts = dict(render_nft(plan))

    assert list(scripts) == [GATEWAY, DESTINATION]
    for site, lines in scripts.items():
        elements = [line for line in lines if line.startswith("add element inet natkeep kept-")]
        assert [line.count(" . 80") for line in elements] == [40, 40]
        for step in plan.prepare:
            if step.site == site and isinstance(step, InstallGate | InstallTranslation):
                assert set(step.lines()) <= set(lines)
        assert (site == DESTINATION) == ("create table arp natkeep" in lines)


PRIORS = [
    Prior(),
    Prior(present=True),
    Prior(facts={"addresses": 2}),
    Prior(present=True, facts={"acct": "0", "up": False}),
]


@pytest.mark.parametrize("prior", PRIORS)
def test_a_prior_comes_back_from_the_journal_as_it_went(prior: Prior) -> None:
    assert prior == Prior.from_json(json.loads(json.dumps(prior.to_json())))


@pytest.mark.parametrize(
    "value", [{}, {"present": 1}, {"present": None}, {"present": True, "acct": [1]}]
)
def test_a_prior_that_nobody_wrote_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(TypeError):
        Prior.from_json(value)


def test_reading_a_prior_leaves_the_journal_record_alone() -> None:
    record: dict[str, object] = {"present": True, "acct": "0"}

    Prior.from_json(record)

    assert record == {"present": True, "acct": "0"}


@pytest.mark.parametrize("mode", Mode)
def test_what_stands_for_all_moves_is_known_by_name(mode: Mode) -> None:
    """What is not known is taken for another move's, and the tables would never go."""
    roles = (Role.GATEWAY, Role.DESTINATION, Role.SOURCE)
    sites = tuple(Site(role, str(role)) for role in roles)
    move = replace(plan_for(*sites).move, mode=mode)
    plan = make_plan(move, connections(1))
    static = [part for step in plan.steps if isinstance(step, Loads) for part in step.static()]
    names = {one.name for part in static for one in part if isinstance(one, Chain | Set)}
    arp = {one.name for one in arp_table() if isinstance(one, Chain | Set)}
    assert names - arp <= shared_names()
