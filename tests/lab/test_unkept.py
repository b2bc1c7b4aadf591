"""`--unkept reset` on a wire and on lo: who is told, who is not, and what happens by default."""

from __future__ import annotations

import pytest

from natkeep.kernel.linux import LinuxKernel
from natkeep.lab.application import all_in, all_open, faults, received, start_client, tuple_of
from natkeep.lab.capture import RST
from natkeep.lab.lab import Lab
from natkeep.lab.scenario import find_scenario, perform
from natkeep.lab.topology import CLIENT
from natkeep.lab.traffic_words import PORT
from natkeep.lab.translators import Natkeep
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import prepare
from natkeep.plan.move import Fate, Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.lab]


def play(story, **options):
    """The assertions of *story*, which is told to a lab of its own."""
    _, setup = find_scenario("unkept_are_reset").load()
    with Lab("unkept", **{**setup, **options}) as lab:
        perform(lab, story)
    assert lab.report.assertions
    return lab.report


def failed(report):
    return [str(each) for each in report.assertions if not each.ok]


@pytest.mark.criu
@pytest.mark.parametrize(("family", "mode"), [(6, "stateful"), (4, "stateless"), (6, "stateless")])
def test_every_end_is_told_at_once(family, mode):
    """IPv4 in mode stateful is what test_scenarios.py tells."""
    tell, _ = find_scenario("unkept_are_reset").load()

    assert failed(play(tell, family=family, mode=mode)) == []


@pytest.mark.criu
@pytest.mark.parametrize("family", [4, 6])
def test_by_default_they_are_reported_and_hang(family):
    """The control of all that is told: without resets nobody hears anything."""
    tell, _ = find_scenario("unkept_are_reset").load()
    report = play(lambda lab: tell(lab, unkept="report"), family=family)

    assert failed(report) == []
    assert "they are reported, and hang" in [each.name for each in report.assertions]


class Losing(Natkeep):
    """natkeep, called with connections to lose that no image of a dump could name so easily."""

    lost: tuple[FourTuple, ...] = ()
    listeners: tuple[Endpoint, ...] = ()

    def prepare(self, order):
        gateway, destination = order.gateway.name, order.destination.name
        sites = (Site(Role.GATEWAY, gateway), Site(Role.DESTINATION, destination))
        move = Move(
            order.id, (Map(order.old, order.new),), sites, Mode(order.mode), self.listeners,
            unkept=Fate.RESET, lost=Connections.of(self.lost),
        )  # fmt: skip
        state = StateDirectory(self.environment["NATKEEP_STATE_DIR"], create=True)
        prepare(Executor(LinuxKernel(), state), move, Connections.of(order.connections))


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
@pytest.mark.parametrize("family", [4, 6])
def test_peers_on_a_wire_are_told_at_the_gateway_and_may_come_again(family, mode):
    """One speaks, one is silent; told, both dial anew from the very same ports, and are let in."""
    told = []

    def story(lab):
        lab.translator = Losing(lab.directory)
        origin = str(Endpoint(CLIENT.address(family), 40_000))
        lab.serve()
        others = dial_two(lab, "others", origin)
        lab.dial()
        lab.traffic.talk()
        lost = tuple(tuple_of(each) for each in others.fresh()["connections"])
        lab.translator.lost = lost
        lab.translator.listeners = (Endpoint(lab.old, PORT),)
        lab.freeze()
        lab.prepare()
        others.do({"push": 64, "only": [0]})
        assert all_open(2)(others.fresh())
        lab.restore()
        others.wait(all_in("reset", 2), "to be told", within=1.0)
        process = [e for e in lab.traffic.process.fresh()["connections"] if is_one(e, lost)]
        told.extend(each["error"] for each in (*others.fresh()["connections"], *process))
        beyond = Connections.of(lost).toward(lab.new)  # who comes again is translated
        lab.select_frames = lambda frames: without(frames, (*lost, *beyond))
        again = dial_two(lab, "again", origin)
        again.do({"push": 4096})
        again.wait(received(4608), "an answer in full")
        assert faults(again.fresh()) == []
        lab.traffic.talk_on()
        lab.finish()
        judge(lab, lost)

    assert failed(play(story, family=family, mode=mode, engine="repair", points={})) == []
    assert told == ["ECONNRESET"] * 4


def dial_two(lab, name, origin):
    """Two connections from *origin* and the port after it, which have had an answer."""
    client = start_client(lab.topology["client"], name, lab.server_endpoint, count=2, source=origin)
    client.do({"push": 512})
    client.wait(received(512), "an answer")
    return client


def is_one(connection, tuples):
    return tuple_of(connection).reply() in tuples


def without(frames, tuples):
    """The usual judgement is about what is kept."""
    ours = {way for each in tuples for way in (each, each.reply())}
    return {
        at: [f for f in some if f.segment is None or f.segment.tuple not in ours]
        for at, some in frames.items()
    }


def judge(lab, lost):
    """On the wire: a reset for each lost peer, exactly where it waits, and for nobody else."""
    frames = {capture.point: capture.frames() for capture in lab.captures}
    segments = [f.segment for f in frames["client"] if f.segment]
    # A second question finds nobody any more, and is answered by the peer's own kernel.
    own = set(lost)
    resets = [s for s in segments if s.flags & RST and s.tuple not in own]
    assert sorted({s.tuple.reply() for s in resets}) == sorted(lost)
    for reset in resets:
        before = segments[: segments.index(reset)]
        assert reset.seq == [s.ack for s in before if s.tuple == reset.tuple.reply()][-1]
    far = [f.segment for at in ("far", "destination") for f in frames[at] if f.segment]
    assert far
    assert not [s for s in far if s.flags & RST]
