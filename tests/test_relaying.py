"""A move by a relay on the fake kernel: refused, prepared, rolled back, torn down."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from natkeep.errors import RefusedError
from natkeep.lifecycle.check import check
from natkeep.lifecycle.drain import find_exposed
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.relay import find_vias
from natkeep.lifecycle.replace import replace_move
from natkeep.lifecycle.rollback import RESTORE, rollback
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.relay import RelayFacts
from natkeep.plan.roles import Role
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple, parse_address
from natkeep.plan.via import Via
from natkeep.state.directory import StateDirectory

RELAY, DESTINATION = Site(Role.RELAY, "rel"), Site(Role.DESTINATION, "dst")
OLD, NEW, FROM = map(parse_address, ("10.2.0.10", "10.3.0.20", "10.2.0.11"))
KEPT = FourTuple(Endpoint.parse("10.1.0.2:50001"), Endpoint.parse("10.2.0.10:5000"))
ALL = Connections.of([KEPT])
FORWARDING = "ipv4/conf/eth0/forwarding"


def move(*sites: Site, move_id: str = "web", hold: bool = False) -> Move:
    made = sites or (RELAY, DESTINATION)
    return Move(move_id, (Map(OLD, NEW),), made, vias=(Via(FROM),), hold=hold)


@pytest.fixture
def kernel() -> FakeKernel:
    made = FakeKernel()
    made.surroundings = Surroundings(forwarding=(FORWARDING,))
    return made


@pytest.fixture
def executor(kernel: FakeKernel, tmp_path: Path) -> Executor:
    return Executor(kernel, StateDirectory(str(tmp_path / "state"), create=True))


def at_home(kernel: FakeKernel) -> None:
    """OLD is an address of the relay, as it was before."""
    kernel.open_sites([RELAY])
    kernel.sites[RELAY.netns].addresses.add(OLD)


def test_its_address_is_asked_for_there(executor: Executor, kernel: FakeKernel) -> None:
    kernel.source = FROM

    assert find_vias(executor, (RELAY,), (Map(OLD, NEW),)) == (Via(FROM),)
    assert find_vias(executor, (DESTINATION,), (Map(OLD, NEW),)) == ()
    kernel.source = None
    with pytest.raises(RefusedError, match="rel has no IPv4 address beside OLD"):
        find_vias(executor, (RELAY,), (Map(OLD, NEW),))


@pytest.mark.parametrize("living", [0, 1])
def test_what_stands_in_its_way_is_refused_and_changes_nothing(
    executor: Executor, kernel: FakeKernel, living: int
) -> None:
    kernel.relay = RelayFacts(bool(living), frozenset({FROM}), range(32768, 61000), None, living)

    with pytest.raises(RefusedError, match="still have their sockets" if living else "no route"):
        prepare(executor, move(), ALL)
    assert not kernel.applied


@pytest.mark.parametrize("lost", [NEW, KEPT.source.address])
def test_without_a_route_to_new_or_to_a_peer_it_is_refused(
    executor: Executor, kernel: FakeKernel, lost: Address
) -> None:
    kernel.unreached = {lost}

    with pytest.raises(RefusedError, match=f"rel: no route to {lost}"):
        prepare(executor, move(), ALL)
    assert not kernel.applied


def elsewhere(*sites: Site, move_id: str = "next") -> Move:
    """The process of `move` moves on to a third host."""
    further = Map(OLD, ip_address("10.4.0.30"))
    return Move(move_id, (further,), sites or (RELAY,), vias=(Via(FROM),))


@pytest.mark.parametrize("replaces", [None, "web"])
def test_a_relay_behind_a_relay_is_refused(executor: Executor, replaces: str | None) -> None:
    prepare(executor, move(), ALL)
    stacked = elsewhere(Site(Role.RELAY, "dst"))

    with pytest.raises(RefusedError) as refused:
        check(executor, stacked, ALL, replaces)

    why = "only a relay is re-pointed" if replaces else f"{OLD} is moved to {NEW} by web already"
    assert why in str(refused.value)
    assert "--replace web" in str(refused.value.hint)


@pytest.mark.parametrize("site", [DESTINATION, Site(Role.GATEWAY, "rel")])
def test_no_other_site_takes_the_place_of_a_relay_s_move(executor: Executor, site: Site) -> None:
    prepare(executor, move(), ALL)
    vias = () if site.role == Role.GATEWAY else (Via(FROM),)
    other = Move("next", (Map(OLD, NEW),), (site,), vias=vias)

    with pytest.raises(RefusedError, match="only a relay is re-pointed"):
        check(executor, other, ALL, "web")


def test_a_relay_is_pointed_elsewhere_and_forwards_until_the_last_of_its_moves_ends(
    executor: Executor, kernel: FakeKernel
) -> None:
    prepare(executor, move(), ALL)
    open_move(executor, "web")

    replace_move(executor, "web", elsewhere(), ALL)

    relay = kernel.sites["rel"]
    assert relay.gates == {"next": Gate.CLOSED}
    assert relay.settings == {FORWARDING}
    teardown(executor, "web")
    assert not kernel.sites["dst"].gates
    with pytest.raises(RefusedError, match="next took the place of web") as refused:
        rollback(executor, "next")
    assert f"--site relay=rel --via {FROM}" in str(refused.value.hint)
    teardown(executor, "next")
    assert not any((relay.settings, relay.gates, relay.sets, relay.loaded))


def test_all_of_it_goes_at_a_teardown(executor: Executor, kernel: FakeKernel) -> None:
    prepare(executor, move(), ALL)
    assert kernel.sites["rel"].settings == {FORWARDING}
    open_move(executor, "web")

    teardown(executor, "web")

    left = kernel.sites["rel"]
    assert not any((left.settings, left.gates, left.sets, left.loaded))


@pytest.mark.parametrize("hold", [False, True])
def test_before_it_was_opened_a_teardown_would_have_old_answer(
    executor: Executor, kernel: FakeKernel, hold: bool
) -> None:
    at_home(kernel)
    prepare(executor, move(hold=hold), ALL)
    [line] = find_exposed(executor, "web")
    assert line == "relay=rel still has OLD 10.2.0.10: it would answer 1 peers with a reset"

    open_move(executor, "web")

    assert find_exposed(executor, "web") == ()


@pytest.mark.parametrize("hold", [False, True])
def test_a_rollback_closes_the_gate_until_the_process_is_back(
    executor: Executor, kernel: FakeKernel, hold: bool
) -> None:
    prepare(executor, move(hold=hold), ALL)
    assert kernel.sites["rel"].gates["web"] == (Gate.OPEN if hold else Gate.CLOSED)
    again = "natkeep rollback web"

    done = rollback(executor, "web")

    assert kernel.sites["rel"].gates == {"web": Gate.CLOSED}
    assert done.undone == ()
    assert done.next == ((Role.RELAY, RESTORE), (Role.RELAY, again))
    assert gc(executor, ()).cleared == ()
    kernel.sites["rel"].sockets.add(KEPT)
    done = rollback(executor, "web")
    assert {*done.undone} == {RELAY, DESTINATION}
    assert done.next == ()
    assert not kernel.sites["rel"].gates
    assert not kernel.sites["rel"].settings


def test_a_destination_alone_is_undone_behind_its_relay(executor: Executor) -> None:
    prepare(executor, move(DESTINATION), ALL)

    done = rollback(executor, "web")

    again = "natkeep rollback web"
    assert done.undone == (DESTINATION,)
    assert done.next == ((Role.RELAY, again), (Role.RELAY, RESTORE), (Role.RELAY, again))
