"""`--map OLD:80=NEW:8080`: what each site makes of a map of one port, and what is refused."""

from __future__ import annotations

from itertools import starmap

import pytest

from natkeep.errors import RefusedError
from natkeep.plan.conntrack import entries, stale_tuples
from natkeep.plan.kept_sets import sets_of
from natkeep.plan.liveness import Life
from natkeep.plan.maps import make_map
from natkeep.plan.move import Fate, Move, Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.repair import find_patches
from natkeep.plan.resets import Reset
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.step_undo import RestoreEntries, undo_of
from natkeep.plan.steps import FillSet, InstallGate, InstallReception, PassKept, PurgeEntries
from natkeep.plan.strays import SeenTable
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_local
from natkeep.plan.via import parse_via
from natkeep.plan.wanted import split_opening
from natkeep.report import plan_to_json
from natkeep.state.codec import move_from_json, move_to_json
from natkeep.state.undo_codec import Files, undo_from_json, undo_to_json

GATEWAY, DESTINATION, SOURCE, RELAY = (
    Site(role, role.value) for role in (Role.GATEWAY, Role.DESTINATION, Role.SOURCE, Role.RELAY)
)
P, OLD, NEW, NEW2, FROM = "10.1.0.2", "10.2.0.10", "10.3.0.20", "10.3.0.21", "10.2.0.9"


def inbound(peer: str, local: str) -> FourTuple:
    return FourTuple(Endpoint.parse(peer), Endpoint.parse(local))


def moves(maps: str, *sites: Site, **options: object) -> Move:
    pairs = ((parse_local(end) for end in text.split("=")) for text in maps.split())
    return Move("web", tuple(starmap(make_map, pairs)), sites or (GATEWAY, DESTINATION), **options)


KEPT = Connections.of(
    [
        inbound(f"{P}:5000", f"{OLD}:80"),
        inbound(f"{P}:5001", f"{OLD}:80"),
        inbound(f"{P}:5000", f"{OLD}:443"),
        inbound(f"{P}:25", f"{OLD}:40000"),
    ]
)
WEB = f"{OLD}:80={NEW}:8080"


def test_each_port_goes_where_its_map_says_and_the_rest_where_the_last_one_says() -> None:
    move = moves(f"{OLD}={NEW} {WEB} {OLD}:443={NEW2}:8443", GATEWAY)
    translations = make_plan(move, KEPT).translations

    assert [[str(one) for one in t.inner] for t in translations] == [
        [f"{P}:25 > {NEW}:40000"],
        [f"{P}:5000 > {NEW}:8080", f"{P}:5001 > {NEW}:8080"],
        [f"{P}:5000 > {NEW2}:8443"],
    ]
    assert [t.ports() for t in translations] == [None, (80, 8080), (443, 8443)]


def test_what_no_map_names_is_left() -> None:
    plan = make_plan(moves(WEB), KEPT)

    assert [len(t.kept) for t in plan.translations] == [2, 2]
    with pytest.raises(RefusedError, match=f"none of the 4 .* local address {OLD}:81"):
        make_plan(moves(f"{OLD}:81={NEW}:8080"), KEPT)


def test_the_entries_of_both_sites_name_both_ports_and_all_that_may_be_stale_is_purged() -> None:
    gateway, destination = make_plan(moves(WEB), KEPT).translations

    entry = next(entries(gateway))
    assert (str(entry.original), str(entry.reply)) == (
        f"{P}:5000 > {OLD}:80",
        f"{NEW}:8080 > {P}:5000",
    )
    entry = next(entries(destination))
    assert (str(entry.original), str(entry.reply)) == (
        f"{P}:5000 > {NEW}:8080",
        f"{OLD}:80 > {P}:5000",
    )
    for translation in (gateway, destination):
        stale = {str(one) for one in stale_tuples(translation)}
        assert {f"{P}:5000 > {NEW}:8080", f"{OLD}:80 > {P}:5000"} <= stale
        assert translation.renames
        assert not translation.masks


def test_each_set_has_the_ports_of_its_side() -> None:
    gateway, destination = make_plan(moves(WEB), KEPT).translations

    def ports(some: dict[str, Connections]) -> dict[str, int]:
        return {name: next(iter(each)).destination.port for name, each in some.items()}

    assert ports(sets_of("web", gateway)) == {"kept-web-0": 8080, "outer-web-0": 80}
    assert ports(sets_of("web", destination)) == {"kept-web-0": 80, "outer-web-0": 8080}


def test_the_gateway_drops_what_the_old_host_says_by_its_own_port() -> None:
    plan = make_plan(moves(WEB, GATEWAY), KEPT)
    lines = [line for step in plan.prepare if hasattr(step, "lines") for line in step.lines()]

    [drop] = [line for line in lines if f" out-at-{OLD} " in line and " drop" in line]
    assert "@outer-web-0" in drop


def test_where_a_gateway_publishes_the_port_there_are_three_and_each_has_its_set() -> None:
    kept = Connections.of([inbound(f"{P}:5000", f"{OLD}:80")])
    around = Surroundings(
        carried=kept, carriers=Connections.of([inbound(f"{P}:5000", "10.9.9.9:8000")])
    )
    plan = make_plan(moves(WEB, GATEWAY), kept, around)
    [there] = plan.translations
    [fill, *_] = [step for step in plan.prepare if isinstance(step, FillSet)]

    assert there.ports() == (8000, 8080)
    assert {one.name: str(next(iter(one.keys)).destination) for one in fill.more} == {
        "old-web-0": f"{OLD}:80"
    }
    lines = [line for step in plan.prepare if hasattr(step, "lines") for line in step.lines()]
    [drop] = [line for line in lines if f" out-at-{OLD} " in line and " drop" in line]
    assert "@old-web-0" in drop
    assert SeenTable(sets=("old-web-0",)).ids() == {"web"}  # gone with its move, by name
    [purge] = [step for step in plan.prepare if isinstance(step, PurgeEntries)]
    undo = undo_of(purge)
    assert isinstance(undo, RestoreEntries)
    assert (undo.outer, undo.kept) == (there.outer, kept)


def test_a_gateway_gives_back_plain_entries_and_the_journal_has_them() -> None:
    plan = make_plan(moves(WEB, GATEWAY), KEPT)
    [purge] = [step for step in plan.prepare if isinstance(step, PurgeEntries)]
    undo = undo_of(purge)

    assert isinstance(undo, RestoreEntries)
    assert undo.outer == undo.kept == plan.translations[0].kept
    files = Files((plan.move.maps[0].old,), connections=KEPT)
    assert undo_from_json(undo_to_json(undo, files), files) == undo


def test_the_source_is_kept_quiet_about_the_mapped_ports_alone() -> None:
    [there] = make_plan(moves(WEB, SOURCE), KEPT).translations

    assert {str(one.destination) for one in there.kept} == {f"{OLD}:80"}
    assert sets_of("web", there) == {"kept-web-0": there.kept}


def test_a_relay_counts_its_ports_for_each_port_of_the_wire() -> None:
    kept = Connections.of(
        [inbound(f"{P}:1", f"{OLD}:80"), inbound(f"{P}:2", f"{OLD}:443"), *[*KEPT][3:]]
    )
    maps = f"{WEB} {OLD}:443={NEW}:8080 {OLD}={NEW}"
    plan = make_plan(moves(maps, RELAY, DESTINATION, vias=(parse_via(f"{FROM}:100-101"),)), kept)

    at_relay = [t for t in plan.translations if t.site == RELAY]
    assert [str(one) for t in at_relay for one in t.inner] == [
        f"{FROM}:100 > {NEW}:8080",
        f"{FROM}:101 > {NEW}:8080",
        f"{FROM}:100 > {NEW}:40000",
    ]
    assert [str(one) for t in plan.translations if t.site == DESTINATION for one in t.outer] == [
        str(one) for t in at_relay for one in t.inner
    ]
    assert all(one.turns_peers for one in plan.translations if one.site == DESTINATION)


def test_a_relay_passes_on_what_its_first_rule_has_addressed_to_the_other_port() -> None:
    move = moves(WEB, RELAY, vias=(parse_via(FROM),))
    plan = make_plan(move, KEPT, Surroundings(forwarding=("ipv4/conf/eth0/forwarding",)))
    [passing] = [step for step in plan.prepare if isinstance(step, PassKept)]
    [routed] = [
        f
        for s in plan.prepare
        if isinstance(s, FillSet)
        for f in s.more
        if f.name == "routed-web-0"
    ]

    assert {one.destination.port for one in routed.keys} == {8080}
    accepts = [line for line in passing.lines() if f" {NEW} " in line]
    assert len(accepts) == 2
    assert all("@routed-web-0" in line for line in accepts)


def test_two_ports_that_would_be_one_tuple_at_new_are_refused() -> None:
    with pytest.raises(RefusedError, match=f"{P}:5000 > {NEW}:8080 would stand for two"):
        make_plan(moves(f"{WEB} {OLD}:443={NEW}:8080"), KEPT)
    twice = Connections.of([*KEPT, inbound(f"{P}:25", f"{OLD}:80")])
    with pytest.raises(RefusedError, match=f"{P}:25 > {NEW}:40000 would stand for two"):
        make_plan(moves(f"{OLD}:80={NEW}:40000 {OLD}={NEW}"), twice)


def test_a_listener_is_called_at_the_port_that_its_map_names() -> None:
    listeners = tuple(map(Endpoint.parse, (f"{OLD}:80", f"{OLD}:443", f"{OLD}:22")))
    plan = make_plan(moves(f"{WEB} {OLD}={NEW}", listeners=listeners), KEPT)
    steps = {s.site: s for s in plan.prepare if isinstance(s, InstallReception)}

    assert {
        site.role: [(r.ports, r.ports_at(r.before), r.ports_at(r.after)) for r in step.receptions]
        for site, step in steps.items()
    } == {
        Role.GATEWAY: [((80,), (80,), (8080,)), ((22, 443), (22, 443), (22, 443))],
        Role.DESTINATION: [((80,), (8080,), (80,)), ((22, 443), (22, 443), (22, 443))],
    }
    gateway, destination = (steps[site].lines() for site in (GATEWAY, DESTINATION))
    assert any(f"dnat ip to {NEW} : 8080" in line for line in gateway)
    assert any(
        "tcp dport 8080" in line and f"dnat ip to {OLD} : 80" in line for line in destination
    )
    assert any(
        "@listen-web-1" in line and f"dnat ip to {OLD} : tcp dport" in line for line in destination
    )


def test_what_cannot_be_kept_is_reset_by_the_map_of_its_port() -> None:
    lost = Connections.of(
        inbound(f"{P}:{port}", f"{OLD}:{local}") for port, local in ((7, 80), (8, 443))
    )
    plan = make_plan(moves(WEB, unkept=Fate.RESET, lost=lost), KEPT)

    assert {str(one) for reset in plan.resets for one in reset.connections} == {f"{P}:7 > {OLD}:80"}
    assert all(isinstance(reset, Reset) for reset in plan.resets)


def test_a_repair_takes_those_for_heard_that_arrive_at_the_port_of_the_wire() -> None:
    plan = make_plan(moves(WEB, DESTINATION), KEPT)
    prepared, opening = split_opening(plan, DESTINATION)
    sets = {f"{name}-web-0": 2 for name in ("kept", "outer")}
    seen = Observation(Gate.ABSENT, sets, frozenset(), {}, 2, gone=prepared, shut=opening)

    found = find_patches(plan, DESTINATION, seen, Life(True, KEPT), opened=True)

    filled = {one.name: one.connections for _, one in found if isinstance(one, FillSet)}
    assert {one.destination.port for one in filled["heard-web-0"]} == {8080}
    assert {one.destination.port for one in filled["kept-web-0"]} == {80}


def test_journals_and_json_have_the_ports_and_a_journal_without_them_is_read() -> None:
    move = moves(f"{WEB} {OLD}={NEW} [fd00:2::10]:80=[fd00:3::20]:80")
    written = move_to_json(move)

    assert move_from_json(written) == move
    assert written["maps"] == [
        {"old": OLD, "new": NEW, "old_port": 80, "new_port": 8080},
        {"old": OLD, "new": NEW},
        {"old": "fd00:2::10", "new": "fd00:3::20", "old_port": 80, "new_port": 80},
    ]
    document = plan_to_json(make_plan(moves(WEB), KEPT))
    assert document["maps"] == written["maps"][:1]
    assert [one["local"] for one in document["connections"]] == [f"{OLD}:80"] * 2


def test_the_gate_of_the_destination_stands_before_both_ports() -> None:
    plan = make_plan(moves(WEB, DESTINATION), KEPT)
    [gate] = [step for step in plan.prepare if isinstance(step, InstallGate)]
    lines = gate.lines()

    assert any(f"gate-at-{NEW} " in line and "@outer-web-0" in line for line in lines)
    assert any(f"gate-at-{OLD} " in line and "@kept-web-0" in line for line in lines)
