"""`--peer-map P=Q`: what a move makes of peers that have moved themselves, and what it refuses."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.plan.conntrack import entries, stale_tuples
from natkeep.plan.liveness import Life
from natkeep.plan.maps import Map, parse_peer_map
from natkeep.plan.move import Fate, Mode, Move, Site
from natkeep.plan.observation import Gate, Observation
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.repair import find_patches
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.step_undo import RestoreEntries, undo_of
from natkeep.plan.steps import FillSet, HoldSegments, PurgeEntries
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, FourTuple
from natkeep.plan.wanted import split_opening
from natkeep.report import plan_to_json
from natkeep.state.codec import move_from_json, move_to_json
from natkeep.values import replace

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION)
P, Q, OLD, NEW, STAYS = "10.1.0.2", "10.4.0.30", "10.2.0.10", "10.3.0.20", "10.1.0.3"


def inbound(peer: str, local: str) -> FourTuple:
    return FourTuple(Endpoint.parse(peer), Endpoint.parse(local))


def moves(peers: str, *sites: Site, maps: str = f"{OLD}={NEW}", **options: object) -> Move:
    pairs = (text.split("=") for text in maps.split())
    made = tuple(Map(ip_address(old), ip_address(new)) for old, new in pairs)
    peer_maps = tuple(map(parse_peer_map, peers.split()))
    return Move("web", made, sites or (DESTINATION,), peer_maps=peer_maps, **options)


# The process listens at one port and has dialled from another; one peer has not moved.
KEPT = Connections.of(
    [
        inbound(f"{P}:5000", f"{OLD}:80"),
        inbound(f"{P}:443", f"{OLD}:40000"),
        inbound(f"{STAYS}:5000", f"{OLD}:80"),
    ]
)


def test_the_destination_turns_the_peers_of_the_wire_into_those_that_the_process_knows() -> None:
    [there] = make_plan(moves(f"{P}={Q}"), KEPT).translations

    assert there.kept == there.inner == KEPT
    assert [str(one) for one in there.outer] == [
        f"{Q}:5000 > {NEW}:80",
        f"{Q}:443 > {NEW}:40000",
        f"{STAYS}:5000 > {NEW}:80",
    ]
    assert there.routed == there.outer.toward(there.map.old)
    assert there.turns_peers
    assert there.ports() is None  # each keeps its own


def test_its_entries_name_both_ends_and_all_that_may_be_stale_is_purged() -> None:
    [there] = make_plan(moves(f"{P}={Q}"), KEPT).translations

    first = next(entries(there))
    assert (str(first.original), str(first.reply)) == (
        f"{Q}:5000 > {NEW}:80",
        f"{OLD}:80 > {P}:5000",
    )
    stale = {str(one) for one in stale_tuples(there)}
    assert {f"{Q}:5000 > {NEW}:80", f"{P}:5000 > {OLD}:80", f"{NEW}:80 > {Q}:5000"} <= stale


@pytest.mark.parametrize("protocol", [TCP, UDP], ids=["tcp", "udp"])
def test_what_is_held_arrives_from_where_the_peer_is(protocol: Protocol) -> None:
    streams, datagrams = (KEPT, NO_CONNECTIONS) if protocol == TCP else (NO_CONNECTIONS, KEPT)
    plan = make_plan(moves(f"{P}={Q}", hold=True, udp=datagrams), streams)

    [step] = [step for step in plan.prepare if isinstance(step, HoldSegments)]
    [(version, arriving, known)] = step.kept(protocol)

    assert (version, known) == (4, KEPT.v4)
    assert Connections(arriving) == plan.translations[0].outer


def test_a_gateway_leaves_the_peers_to_the_destination_and_gives_back_what_was_there() -> None:
    plan = make_plan(moves(f"{P}={Q}", GATEWAY, DESTINATION), KEPT)
    gateway, destination = plan.translations

    assert str(next(iter(gateway.outer))) == f"{Q}:5000 > {OLD}:80"
    assert gateway.inner == destination.outer == gateway.wire == destination.wire
    assert not gateway.renames
    [purge] = [s for s in plan.prepare if isinstance(s, PurgeEntries) and s.site == GATEWAY]
    undo = undo_of(purge)
    assert isinstance(undo, RestoreEntries)
    assert undo.outer == undo.kept == KEPT


def test_a_reset_is_promised_to_no_peer_that_has_moved() -> None:
    lost = Connections.of([inbound(f"{P}:6000", f"{OLD}:80")])
    move = replace(moves(f"{P}={Q}", GATEWAY, DESTINATION), unkept=Fate.RESET, lost=lost)

    assert [one.site for one in make_plan(move, KEPT).resets] == [DESTINATION]


def test_a_journal_has_the_maps_and_one_without_them_is_read() -> None:
    move = moves(f"{P}={Q} fd00:1::2=fd00:4::30")
    written = move_to_json(move)

    assert move_from_json(written) == move
    del written["peer_maps"]
    assert move_from_json(written) == replace(move, peer_maps=())
    assert "peer_maps" not in move_to_json(replace(move, peer_maps=()))


@pytest.mark.parametrize(
    ("peers", "error", "why"),
    [
        (f"{P}={P}", UsageError, f"--peer-map {P}={P}: .*nothing"),
        (f"{P}=fd00:4::30", UsageError, "different families"),
        (f"{P}=auto", UsageError, "auto is read at no site"),
        (P, UsageError, "not of the form"),
        (f"{P}={Q} {P}={STAYS}", UsageError, f"maps {P} twice"),
        (f"{P}=127.0.0.1", RefusedError, "127.0.0.1 is loopback"),
        (f"{P}={OLD}", RefusedError, f"{OLD} is an OLD or a NEW"),
        (f"{P}={NEW}", RefusedError, f"{NEW} is an OLD or a NEW"),
        (f"{NEW}={Q}", RefusedError, f"{NEW} is an OLD or a NEW"),
        ("10.1.0.9=10.4.0.9", RefusedError, "no connection has a peer at 10.1.0.9"),
        (f"{P}={STAYS}", RefusedError, f"{STAYS}:5000 > {NEW}:80 would stand for two"),
    ],
)
def test_a_map_that_cannot_be_is_refused(peers: str, error: type[NatkeepError], why: str) -> None:
    with pytest.raises(error, match=why):
        make_plan(moves(peers), KEPT)


@pytest.mark.parametrize("end", [P, Q])
def test_a_peer_at_the_destination_itself_is_refused(end: str) -> None:
    around = Surroundings(local=frozenset({ip_address(end)}))

    with pytest.raises(RefusedError, match=f"{end} is an address of the destination"):
        make_plan(moves(f"{P}={Q}"), KEPT, around)


def test_a_peer_whose_own_move_has_this_gateway_needs_no_map() -> None:
    moved = inbound(f"{Q}:5000", f"{OLD}:80")
    around = Surroundings(carried=Connections.of([*KEPT][:1]), carriers=Connections.of([moved]))

    with pytest.raises(RefusedError, match=f"translates peers at {P} already"):
        make_plan(moves(f"{P}={Q}", GATEWAY), KEPT, around)


def test_nor_does_a_peer_that_speaks_udp() -> None:
    moved = Connections.of([inbound(f"{Q}:5000", f"{OLD}:80")])
    around = Surroundings(udp_carried=Connections.of([*KEPT][:1]), udp_carriers=moved)

    with pytest.raises(RefusedError, match=f"translates peers at {P} already"):
        make_plan(moves(f"{P}={Q}", GATEWAY, udp=KEPT), NO_CONNECTIONS, around)


def test_mode_stateless_is_refused_beforehand() -> None:
    with pytest.raises(RefusedError, match="stateless translates no peers"):
        moves(f"{P}={Q}", mode=Mode.STATELESS)


def test_two_peers_change_places() -> None:
    [there] = make_plan(moves(f"{P}={STAYS} {STAYS}={P}"), KEPT).translations

    assert [str(one.source) for one in there.outer] == [
        f"{STAYS}:5000", f"{STAYS}:443", f"{P}:5000",
    ]  # fmt: skip


def test_a_repair_takes_those_for_heard_that_the_wire_brings() -> None:
    plan = make_plan(moves(f"{P}={Q}"), KEPT)
    [there] = plan.translations
    prepared, opening = split_opening(plan, DESTINATION)
    sets = {f"{name}-web-0": 3 for name in ("kept", "outer", "to-outer", "to-inner")}
    seen = Observation(Gate.ABSENT, sets, frozenset(), {}, 3, gone=prepared, shut=opening)

    life = Life(True, KEPT)
    found = [one for _, one in find_patches(plan, DESTINATION, seen, life, opened=True)]

    filled = {one.name: one.connections for one in found if isinstance(one, FillSet)}
    assert filled["heard-web-0"] == there.outer.toward(there.map.old)
    assert filled["outer-web-0"] == there.outer
    assert filled["kept-web-0"] == KEPT


def test_a_plan_says_what_the_wire_shows_where_that_differs() -> None:
    document = plan_to_json(make_plan(moves(f"{P}={Q}", GATEWAY, DESTINATION), KEPT))

    assert document["peer_maps"] == [{"old": P, "new": Q}]
    assert [one.get("wire") for one in document["connections"]] == [
        {"local": f"{NEW}:80", "peer": f"{Q}:5000"},
        {"local": f"{NEW}:40000", "peer": f"{Q}:443"},
        None,
    ]
    assert "peer_maps" not in plan_to_json(make_plan(moves(""), KEPT))


def test_a_peer_that_has_moved_to_another_port_has_that_on_the_wire() -> None:
    kept = Connections.of(
        [*KEPT, inbound(f"{STAYS}:443", f"{OLD}:40001"), inbound(f"{P}:9", f"{OLD}:40002")]
    )
    plan = make_plan(moves(f"{P}:443={Q}:8443 {P}=10.1.0.77"), kept)
    [there] = plan.translations

    assert [str(one.source) for one in there.outer] == [
        "10.1.0.77:5000", f"{Q}:8443", f"{STAYS}:5000", f"{STAYS}:443", "10.1.0.77:9",
    ]  # fmt: skip
