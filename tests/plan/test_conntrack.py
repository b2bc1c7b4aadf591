"""plan/conntrack.py: what conntrack is to know of a kept connection, and what it must forget."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from natkeep.plan.conntrack import (
    Entry,
    describe_purge,
    directions_of,
    entries,
    group_entries,
    noted_from_text,
    noted_to_text,
    stale_tuples,
)
from natkeep.plan.entry_attributes import PLAIN, Attributes, Noted
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.translation import Surroundings, Translation
from natkeep.plan.tuples import Connections, Endpoint, FourTuple


def inbound(peer: str, local: str) -> FourTuple:
    return FourTuple(Endpoint.parse(peer), Endpoint.parse(local))


FAMILIES = {
    "v4": ("10.1.0.2", "10.2.0.10", "10.3.0.20"),
    "v6": ("[fd00:1::2]", "[fd00:2::10]", "[fd00:3::20]"),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
def test_an_entry_says_how_packets_arrive_from_either_side(family: str, role: Role) -> None:
    """Original: from the peer to the address before; reply: from the address after to the peer."""
    peer, old, new = FAMILIES[family]
    before, after = (old, new) if role == Role.GATEWAY else (new, old)
    map_ = Map(ip_address(old.strip("[]")), ip_address(new.strip("[]")))
    kept = [inbound(f"{peer}:{port}", f"{old}:80") for port in (5000, 5001)]

    plan = make_plan(Move("web", (map_,), (Site(role, "here"),)), Connections.of(kept))
    [translation] = plan.translations

    assert [
        Entry(
            inbound(f"{peer}:{port}", f"{before}:80"),
            FourTuple(Endpoint.parse(f"{after}:80"), Endpoint.parse(f"{peer}:{port}")),
        )
        for port in (5000, 5001)
    ] == list(entries(translation))


def plan_at(role: Role, mode: Mode = Mode.STATEFUL) -> Translation:
    map_ = Map(ip_address("10.2.0.10"), ip_address("10.3.0.20"))
    kept = Connections.of([inbound("10.1.0.2:5000", "10.2.0.10:80")])
    [translation] = make_plan(Move("web", (map_,), (Site(role),), mode), kept).translations
    return translation


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("role", [Role.GATEWAY, Role.DESTINATION])
def test_a_connection_has_four_stale_tuples(role: Role, mode: Mode) -> None:
    ends = [inbound("10.1.0.2:5000", f"{local}:80") for local in ("10.2.0.10", "10.3.0.20")]

    stale = list(stale_tuples(plan_at(role, mode)))

    assert {*ends, *(end.reply() for end in ends)} == set(stale)
    assert len(stale) == 4


@pytest.mark.parametrize(
    ("role", "seen"), [(Role.GATEWAY, "10.3.0.20"), (Role.DESTINATION, "10.2.0.10")]
)
def test_a_stateless_entry_is_plain_since_conntrack_sees_the_inner_tuple(
    role: Role, seen: str
) -> None:
    tuple_ = inbound("10.1.0.2:5000", f"{seen}:80")

    found = list(entries(plan_at(role, Mode.STATELESS)))

    assert [Entry(tuple_, tuple_.reply())] == found
    assert "nat" not in found[0].describe()


def test_an_entry_describes_itself_as_a_command() -> None:
    before, after = (
        inbound("10.1.0.2:5000", f"{local}:80") for local in ("10.2.0.10", "10.3.0.20")
    )

    assert Entry(before, after.reply()).describe() == (
        "conntrack -I -p tcp -s 10.1.0.2 -d 10.2.0.10 --sport 5000 --dport 80 "
        "--dst-nat 10.3.0.20:80 --state ESTABLISHED --status SEEN_REPLY,ASSURED --timeout 432000"
    )


def test_a_purge_describes_itself_as_a_command() -> None:
    stale = inbound("[fd00:1::2]:5000", "[fd00:2::10]:80")

    assert describe_purge(stale) == (
        "conntrack -D -p tcp -s fd00:1::2 -d fd00:2::10 --sport 5000 --dport 80"
    )


@pytest.mark.parametrize(
    ("facts", "directions"),
    [
        ({}, ""),
        ({"own": "<-"}, "<-"),
        ({"own": "", "inherited": ">-"}, ">-"),
        ({"own": "-<-", "inherited": ">--"}, "><-"),
    ],
)
def test_what_a_replaced_move_had_found_counts_where_nothing_was_found(
    facts: dict[str, str | int | bool], directions: str
) -> None:
    assert directions_of(facts) == directions


def test_each_connection_has_the_entries_that_were_noted_and_the_others_a_usual_one() -> None:
    kept = Connections.of(
        FourTuple(Endpoint.parse(f"10.1.0.2:{port}"), Endpoint.parse("10.2.0.10:80"))
        for port in range(5000, 5006)
    )
    site, marked, zone = Site(Role.GATEWAY), Attributes(mark=2), Attributes(zone=7)
    noted = (
        Noted(site, marked, kept.pick([0, 1, 2], 4)),
        Noted(site, Attributes(mark=2, process_dialled=True), kept.pick([4], 4)),
        Noted(site, zone, kept.pick([5], 4)),
        Noted(site, PLAIN, kept.pick([5], 4)),
    )
    map_ = Map(ip_address("10.2.0.10"), ip_address("10.3.0.20"))
    around = Surroundings(noted=noted)
    [translation] = make_plan(Move("web", (map_,), (site,)), kept, around).translations

    groups = group_entries(translation)

    assert groups == {PLAIN: [3, 5], marked: [0, 1, 2, 4], zone: [5]}
    text = noted_to_text(groups)
    assert '"0-2,4"' in text
    assert noted_from_text(text, 6) == {marked: [0, 1, 2, 4], zone: [5]}
    assert noted_from_text('[[{"mark":2},"0-99999999999"]]', 6) == {marked: [*range(6)]}
    assert noted_to_text({PLAIN: [0, 1]}) == ""
    described = [entry.describe() for entry in entries(translation)]
    assert len(described) == 7
    assert "--dst-nat 10.3.0.20:80 --mark 0x2 " in described[0]
    assert ["--zone 7" in each for each in described[5:]] == [True, False]
