"""A site of role peer: which connections its host translates, and what is left to the gateway."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from natkeep.errors import RefusedError
from natkeep.plan.move import Fate, Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import AddRoute, InstallGate, InstallTranslation, OpenEarly
from natkeep.plan.translation import Change, Surroundings
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.report import kept_of, summary
from natkeep.state.codec import peers_to_json, read_surroundings

ONE, OTHER = Site(Role.PEER, "one"), Site(Role.PEER, "other")
GATEWAY, DESTINATION = Site(Role.GATEWAY, "gw"), Site(Role.DESTINATION)
MAP = Map(ip_address("10.2.0.10"), ip_address("10.3.0.20"))


def inbound(peer: str, local: str = "10.2.0.10:80") -> FourTuple:
    return FourTuple(Endpoint.parse(peer), Endpoint.parse(local))


AT_ONE, AT_OTHER, ELSEWHERE = map(inbound, ("10.1.0.2:5000", "10.1.0.3:5000", "10.9.0.9:5000"))
KEPT = Connections.of([AT_ONE, AT_OTHER, ELSEWHERE])
HOMES = (
    (ONE, frozenset({ip_address("10.1.0.2")})),
    (OTHER, frozenset({ip_address("10.1.0.3")})),
)
AROUND = Surroundings(at_peers=HOMES)


def moves(*sites: Site, **options: object) -> Move:
    return Move("web", (MAP,), sites, **options)  # type: ignore[arg-type]  # a test names them


def test_each_host_translates_its_own_and_the_gateway_the_others() -> None:
    plan = make_plan(moves(ONE, OTHER, GATEWAY, DESTINATION), KEPT, AROUND)

    there = {one.site: [*one.kept] for one in plan.translations}
    assert there == {
        ONE: [AT_ONE],
        OTHER: [AT_OTHER],
        GATEWAY: [ELSEWHERE],
        DESTINATION: [*KEPT],
    }


def test_a_service_address_is_taken_over_with_a_route_to_it() -> None:
    service = inbound("10.1.0.2:5000", "10.96.0.10:8080")
    around = Surroundings(
        carried=Connections.of([AT_ONE]), carriers=Connections.of([service]), at_peers=HOMES
    )
    plan = make_plan(moves(ONE), KEPT, around)

    [there] = plan.translations
    assert next(there.tuples()) == (service, inbound("10.1.0.2:5000", "10.3.0.20:80"))
    [route] = [step.address for step in plan.prepare if isinstance(step, AddRoute)]
    assert route == ip_address("10.96.0.10")


@pytest.mark.parametrize("hold", [True, False])
def test_it_is_prepared_and_opened_as_a_gateway_is(hold: bool) -> None:
    plan = make_plan(moves(DESTINATION, ONE, OTHER, hold=hold), KEPT, AROUND)
    gates = [step.site for step in plan.prepare if isinstance(step, InstallGate)]
    kinds = [type(step) for step in plan.prepare if step.site == ONE]

    assert gates == ([DESTINATION, ONE, OTHER] if hold else [ONE, OTHER, DESTINATION])
    assert (OpenEarly in kinds) == hold
    assert kinds.index(InstallGate) < kinds.index(AddRoute) < kinds.index(InstallTranslation)


def test_where_no_peer_is_nothing_is_prepared() -> None:
    nobody = Surroundings(at_peers=((ONE, frozenset()), HOMES[1]))

    with pytest.raises(RefusedError, match="peer=one: no connection's peer is there"):
        make_plan(moves(ONE, OTHER), KEPT, nobody)


def test_mode_stateless_is_refused_beforehand() -> None:
    with pytest.raises(RefusedError, match="stateless translates nothing at the peers' own host"):
        moves(ONE, mode=Mode.STATELESS)


def test_no_reset_is_promised_there() -> None:
    lost = Connections.of([inbound("10.1.0.2:6000")])
    move = moves(ONE, DESTINATION, unkept=Fate.RESET, lost=lost)

    assert [one.site for one in make_plan(move, KEPT, AROUND).resets] == [DESTINATION]


def test_a_journal_says_which_peers_were_where() -> None:
    columns = (Connections(), Connections())
    line = {"local": [], **peers_to_json(AROUND)}

    assert read_surroundings(moves(ONE, OTHER), line, columns) == AROUND
    del line["at_peers"]
    assert read_surroundings(moves(ONE, OTHER), line, columns) == Surroundings()


def test_each_connection_is_shown_once_whatever_site_has_it() -> None:
    for sites in ((ONE, OTHER), (ONE, OTHER, GATEWAY), (ONE, OTHER, GATEWAY, DESTINATION)):
        plan = make_plan(moves(*sites), KEPT, AROUND)
        count = len(KEPT) - (GATEWAY not in sites)

        assert sum(map(len, kept_of(plan))) == count
        assert f"{count} connections" in summary(plan)


def test_a_host_whose_last_connection_has_ended_by_the_dump_keeps_nobody_from_opening() -> None:
    went = Connections.of([AT_ONE])
    plan = make_plan(moves(ONE, OTHER, DESTINATION, live=True), KEPT, AROUND)
    assert {one.site for one in plan.translations} == {ONE, OTHER, DESTINATION}

    change = Change(went=went, surroundings=AROUND)
    changed = make_plan(moves(ONE, OTHER, DESTINATION, live=True), KEPT, AROUND, change)

    assert {one.site for one in changed.translations} == {OTHER, DESTINATION}
