"""`--listeners` on a wire: who reaches the process at its new place, and who does not."""

from __future__ import annotations

import pytest

from natkeep.lab.lab import Lab
from natkeep.lab.scenario import find_scenario, perform
from natkeep.lab.topology import THIRD, USUAL
from natkeep.lab.traffic_words import PORT
from natkeep.lab.translators import TranslatorError

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.criu]
WHERE = {
    "OLD": (4, None),
    "wildcard": (4, f"0.0.0.0:{PORT}"),
    "dual stack": (4, f"[::]:{PORT}"),
    "OLD, IPv6": (6, None),
    "wildcard, IPv6": (6, f"[::]:{PORT}"),
}


def play(story, **options):
    """The failed assertions of *story*, which is told to a lab of its own."""
    with Lab("listeners", engine="criu", **options) as lab:
        perform(lab, story)
    assert lab.report.assertions
    return [str(each) for each in lab.report.assertions if not each.ok]


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
@pytest.mark.parametrize("where", WHERE)
def test_new_connections_reach_a_listener_that_moved(where, mode):
    family, listen = WHERE[where]
    tell, _ = find_scenario("listener_follows").load()

    assert play(lambda lab: tell(lab, listen), family=family, mode=mode) == []


def move(lab, *, listen=None):
    lab.begin(listen=listen)
    lab.move()
    lab.traffic.talk_on()


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
def test_without_listeners_new_connections_go_to_the_old_host(mode):
    """It refuses them: nobody listens there any more. This is also the control of all others."""

    def story(lab):
        move(lab)
        lab.new_connections.are_refused(
            lab.new_connections.dial(lab.old), lab.new_connections.dial(lab.new)
        )
        lab.finish()

    assert play(story, mode=mode) == []


def test_a_caller_who_is_not_let_in_fails_the_story():
    def story(lab):
        move(lab)
        lab.new_connections.are_accepted(lab.new_connections.dial(lab.old))
        lab.finish()

    failed, *wires = play(story)
    assert "is let in and answered" in failed
    assert [each.split(":")[1] for each in wires] == [
        " no reset",
        " between gateway and destination they go to NEW, ports unchanged",
    ]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("mode", ["stateful", "stateless"])
def test_a_caller_learns_of_a_narrow_path(mode, family):
    """The router's error quotes a packet that only the gateway and the destination can place."""

    def story(lab):
        lab.listeners = True
        lab.conditions.path_mtu("near")
        move(lab)
        lab.new_connections.are_accepted(lab.new_connections.dial(lab.old), octets=60_000)
        lab.conditions.path_was_narrow("near")
        lab.finish()

    assert play(story, mode=mode, family=family, routed=("near",)) == []


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
def test_the_listener_moves_on(mode):
    """From B to C: callers find it at both, and those of B are kept."""

    def story(lab):
        lab.listeners = True
        move(lab)
        lab.new_connections.are_accepted(lab.new_connections.dial(lab.old))
        lab.move_on(THIRD)
        lab.traffic.talk_on()
        lab.new_connections.are_accepted(lab.new_connections.dial(lab.old))
        lab.finish()

    assert play(story, mode=mode, seats=(*USUAL, THIRD)) == []


def test_callers_count_at_teardown_and_are_forgotten_with_it():
    tables = []

    def story(lab):
        lab.listeners = True
        move(lab)
        lab.new_connections.are_accepted(lab.new_connections.dial(lab.old))
        with pytest.raises(TranslatorError, match="2 connections of lab live and will break"):
            lab.translator.call("teardown", lab.order.id)
        lab.finish()
        for role in lab.topology.sites:
            tables.append(lab.topology[role].run("conntrack", "-L").stdout)

    assert play(story) == []
    assert len(tables) == 2
    assert not [table for table in tables if f"dport={PORT}" in table]


@pytest.mark.parametrize("family", [4, 6])
def test_new_connections_reach_a_listener_at_another_port_of_new(family):
    tell, _ = find_scenario("listener_follows").load()

    def story(lab):
        lab.wire_port = 8080
        tell(lab)

    assert play(story, family=family) == []
