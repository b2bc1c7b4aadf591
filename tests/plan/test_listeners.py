"""plan/listeners.py: who is let in, when, and in front of what; and what is refused beforehand.

The text as a whole is in tests/plan/golden (test_ruleset.py); here is what must hold of any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natkeep.errors import RefusedError
from natkeep.plan import base_chains, listeners
from natkeep.plan.base_chains import is_address_chain
from natkeep.plan.drift import find_drift
from natkeep.plan.listeners import Reception, make_receptions, refuse_one_end_for_two
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.nft import OctetsIn
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.plan_text import render_nft
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import (
    AddAddress,
    ForgetCalls,
    InstallGate,
    InstallReception,
    InstallTranslation,
    Plan,
    TranslateErrors,
)
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple
from natkeep.plan.wanted import want

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION, "dst")
MAP4 = Map(ip_address("10.2.0.10"), ip_address("10.3.0.20"))
MAP6 = Map(ip_address("fd00:2::10"), ip_address("fd00:3::20"))
WEB = Endpoint(MAP4.old, 80)
KEPT = Connections.of([FourTuple(Endpoint.parse("10.1.0.2:50594"), WEB)])

ROLES = pytest.mark.parametrize("site", [GATEWAY, DESTINATION], ids=lambda site: str(site.role))
MODES = pytest.mark.parametrize("mode", list(Mode))
SYN = "tcp flags & (fin | syn | rst | ack) == syn"


def move_of(*listeners: Endpoint, site: Site = GATEWAY, mode: Mode = Mode.STATEFUL) -> Move:
    return Move("web", (MAP4, MAP6), (site,), mode, listeners)


def lines_of(plan: Plan) -> tuple[str, ...]:
    [(_, lines)] = render_nft(plan)
    return lines


def rules_for_callers(plan: Plan) -> list[str]:
    return [line for line in lines_of(plan) if line.endswith('comment "web:listeners"')]


@ROLES
@MODES
def test_without_listeners_nothing_is_rendered_for_callers(site: Site, mode: Mode) -> None:
    plan = make_plan(move_of(site=site, mode=mode), KEPT)

    assert not [step for step in plan.steps if isinstance(step, InstallReception | ForgetCalls)]
    assert not re.search("listen|callers", "\n".join(lines_of(plan)))
    [rule] = plan.open[0].objects()
    assert rule.chain == base_chains.gate_chain("web")


@ROLES
@MODES
def test_a_listener_of_each_family_has_a_reception_with_all_its_ports(
    site: Site, mode: Mode
) -> None:
    ends = (Endpoint(MAP4.old, 443), WEB, WEB, Endpoint(MAP6.old, 80))

    receptions = make_receptions(move_of(*ends, site=site, mode=mode), site)

    assert [(each.number, each.map, each.ports) for each in receptions] == [
        (0, MAP4, (80, 443)),
        (1, MAP6, (80,)),
    ]
    assert {(each.mode, each.site) for each in receptions} == {(mode, site)}


def test_those_that_translate_receive() -> None:
    received = {
        role: len(make_receptions(move_of(WEB, site=Site(role)), Site(role)))
        for role in Role
        if role != Role.RELAY  # refused: test_relay.py
    }

    assert {role for role, number in received.items() if number} == {
        Role.GATEWAY,
        Role.DESTINATION,
        Role.PEER,
    }


def without_answers(rules: Iterable[str]) -> list[str]:
    """Less those by which what a listener answers leaves the destination."""
    return [rule for rule in rules if base_chains.HALF_OPEN not in rule]


def test_a_listener_answers_also_who_calls_from_the_port_of_a_kept_connection() -> None:
    """Such a SYN-ACK is dropped where nobody is to call; the newest rule has the word."""
    lines = [line for _, some in render_nft(make_plan(move_of(WEB, site=DESTINATION), KEPT))
             for line in some]  # fmt: skip

    dropped, answered = (
        line for line in lines if f"rule inet natkeep {base_chains.HALF_OPEN}" in line
    )

    assert dropped.startswith("add ")
    assert "@kept-web-0 drop" in dropped
    assert answered.startswith("insert ")
    assert "tcp sport @listen-web-0 accept" in answered


@ROLES
def test_a_stateful_rule_begins_with_a_bare_syn_and_asks_for_the_port(site: Site) -> None:
    rules = without_answers(rules_for_callers(make_plan(move_of(WEB, site=site), KEPT)))

    assert len(rules) == (2 if site == GATEWAY else 3)
    assert all(f" {SYN} tcp dport @listen-web-0 " in rule for rule in rules)


@ROLES
def test_a_stateless_rule_asks_for_the_address_that_it_changes(site: Site) -> None:
    plan = make_plan(move_of(WEB, site=site, mode=Mode.STATELESS), KEPT)
    [receiving] = make_receptions(plan.move, site)

    resets = 1 if site == GATEWAY else 0  # a gateway marks them
    arriving, *others, departing = without_answers(rules_for_callers(plan))[-2 - resets :]

    assert f"ip daddr {receiving.before} tcp dport @listen-web-0" in arriving
    assert f"ip daddr set {receiving.after}" in arriving
    assert [" tcp urgptr set 49428 " in other for other in others] == [True] * resets
    assert f"ip saddr {receiving.after} tcp sport @listen-web-0" in departing
    assert f"ip saddr set {receiving.before}" in departing


@ROLES
@MODES
def test_the_rules_stand_in_front_and_the_gate_is_closed_with_them(site: Site, mode: Mode) -> None:
    """In one transaction, so that there is no moment in which a caller gets through."""
    plan = make_plan(move_of(WEB, site=site, mode=mode), KEPT)
    [step] = [step for step in plan.prepare if isinstance(step, InstallReception)]

    assert all(line.startswith("insert rule ") for line in rules_for_callers(plan))
    assert "add rule inet natkeep callers-web drop" in step.lines()
    accepts = [line for line in without_answers(step.lines()) if "accept" in line]
    assert all("gate" not in line and "callers-web" not in line for line in accepts)
    assert set(rules_for_callers(plan)) <= set(step.lines())


@ROLES
@MODES
def test_opening_lets_callers_in_as_well(site: Site, mode: Mode) -> None:
    plan = make_plan(move_of(WEB, site=site, mode=mode), KEPT)

    [opening] = plan.open

    assert tuple(rule.chain for rule in opening.objects()) == ("gate-web", "callers-web")
    assert opening.lines()[1:] == ('insert rule inet natkeep callers-web accept comment "open"',)


def test_at_the_destination_callers_are_held_back_at_both_addresses() -> None:
    """Also those on the destination itself, whom lo would lead to an OLD without a listener."""
    plan = make_plan(move_of(WEB, site=DESTINATION), KEPT)

    gates = [rule for rule in rules_for_callers(plan) if "jump callers-web" in rule]

    assert [rule.split()[4] for rule in gates] == ["gate-at-10.3.0.20", "gate-at-10.2.0.10"]


@MODES
def test_listeners_alone_are_a_move(mode: Mode) -> None:
    plan = make_plan(move_of(WEB, site=DESTINATION, mode=mode), NO_CONNECTIONS)

    assert [step.address for step in plan.steps if isinstance(step, AddAddress)] == [MAP4.old]
    assert f"add element inet natkeep held4 {{ {MAP4.old} }}" in lines_of(plan)


def test_unanswered_calls_are_forgotten_when_they_are_held_back() -> None:
    plan = make_plan(move_of(WEB), KEPT)
    kinds = [type(step) for step in plan.prepare]

    assert kinds.index(InstallReception) < kinds.index(ForgetCalls)
    assert kinds.index(InstallGate) < kinds.index(InstallTranslation)
    [step] = [step for step in plan.prepare if isinstance(step, ForgetCalls)]
    assert step.describe() == (
        "ip netns exec gw conntrack -D -p tcp --orig-dst 10.2.0.10 --orig-port-dst 80 "
        "--state SYN_SENT",
    )


@ROLES
def test_what_errors_quote_is_translated_for_callers_after_the_kept_ones(site: Site) -> None:
    """Inserted one by one: the last one is asked first."""
    plan = make_plan(move_of(WEB, site=site, mode=Mode.STATELESS), KEPT)
    [step] = [step for step in plan.prepare if isinstance(step, TranslateErrors)]

    rules = step.rules()

    assert [rule.comment for rule in rules] == ["web:listeners"] * 2 + ["web"] * 2
    assert [rule.chain for rule in rules[:2]] == [rule.chain for rule in rules[2:]]
    asked = [each for rule in rules[:2] for each in rule.statements if isinstance(each, OctetsIn)]
    # ICMP's header and an IPv4 header of 20 octets stand before the quoted ports.
    assert asked == [OctetsIn("listen-web-0", ((28, 2),)), OctetsIn("listen-web-0", ((30, 2),))]


def test_two_olds_with_one_new_cannot_both_have_a_listener_on_a_port() -> None:
    other = Map(ip_address("10.2.0.11"), MAP4.new)
    ends = (WEB, Endpoint(other.old, 80))
    move = Move("web", (MAP4, other), (GATEWAY,), listeners=ends)

    with pytest.raises(RefusedError, match=r"10\.3\.0\.20:80 would stand for two listeners"):
        make_plan(move, KEPT)
    make_plan(replace(move, listeners=(WEB, Endpoint(other.old, 81))), KEPT)


def test_two_moves_cannot_both_have_a_listener_at_one_end() -> None:
    ours, theirs = move_of(WEB), replace(move_of(WEB), id="other")

    with pytest.raises(RefusedError, match="of moves web and other"):
        refuse_one_end_for_two(ours, theirs)
    refuse_one_end_for_two(ours, move_of(Endpoint(MAP4.old, 81)), move_of(Endpoint(MAP6.old, 80)))
    refuse_one_end_for_two(ours, move_of())


@ROLES
@MODES
def test_a_rule_for_callers_that_is_gone_is_drift(site: Site, mode: Mode) -> None:
    plan = make_plan(move_of(WEB, site=site, mode=mode), NO_CONNECTIONS)
    whole = Observation(Gate.OPEN, {}, frozenset({MAP4.old}), {}, 0)
    rules = [
        key for key in want(plan, site) if key.what.startswith(listeners.comment(plan.move.id))
    ]
    names = {key.name for key in rules if is_address_chain(key.name)}
    assert {
        base_chains.address_chain("gate", local)
        for local in make_receptions(plan.move, site)[0].gated
    } < names

    assert find_drift(plan, site, whole) == ()
    for name in names:
        without = replace(whole, gone=frozenset(key for key in rules if key.name == name))
        assert find_drift(plan, site, without) == (f"chain {name}: no rule for callers",)


_PORTS = st.lists(st.integers(1, 65535), min_size=1, max_size=8, unique=True)


@given(st.from_regex("[A-Za-z0-9][A-Za-z0-9_-]{0,31}", fullmatch=True), _PORTS, st.booleans())
def test_whatever_is_given_what_is_added_is_removed(
    move_id: str, ports: list[int], at_destination: bool
) -> None:
    site = DESTINATION if at_destination else GATEWAY
    for mode in Mode:
        receiving = Reception(site, 0, MAP6, mode, tuple(ports))

        objects = listeners.objects(move_id, [receiving])
        lines = [str(one) for one in objects]
        undos = [undo for one in objects for undo in one.undo()]
        removal = [undo.command(7) for undo in undos]

        assert all(
            re.fullmatch(r'[A-Za-z0-9 .:@_"=&|!(){};,-]+', line) for line in (*lines, *removal)
        )
        own = {f"callers-{move_id}", f"listen-{move_id}-0"}
        assert {u.name for u in undos if u.kind in ("chain", "set") and not u.unused} == own
        added = {line.split()[4] for line in lines if re.match("add (chain|set) ", line)}
        assert own <= added
        chains = added - own
        assert all(map(is_address_chain, chains))
        gated = {base_chains.address_chain("gate", local) for local in receiving.gated}
        assert gated < chains
        shared = {base_chains.HALF_OPEN} if at_destination else set()
        into = {line.split()[4] for line in lines if line.startswith("insert rule ")}
        assert into == chains | shared
