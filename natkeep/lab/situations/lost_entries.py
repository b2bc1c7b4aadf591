"""Connections whose entries end before they do: by time, or because another program deletes them.

Conntrack forgets a connection that rests: one that one side has closed after 60 s, others after
days, or as soon as a firewall says (here 2 s). The next segment may be one that it calls invalid.
"""

from __future__ import annotations

import time
from functools import partial

from natkeep.lab.application import Report
from natkeep.lab.capture import RST
from natkeep.lab.lab import Frames, Lab
from natkeep.lab.situations import situation

FORGOTTEN_AFTER_S = 2
resting = partial(situation, probes=(True,))


def _rest(lab: Lab) -> None:
    """The connection has been moved, and nothing knows it any more."""
    lab.conditions.conntrack_timeouts(FORGOTTEN_AFTER_S)
    lab.begin(pause=True)
    lab.move()
    lab.conditions.await_forgotten()


@resting(24, "rests, then the client ends it")
def client_ends(lab: Lab) -> None:
    """It closes its side; the process works, answers and closes, after a rest each time."""
    _rest(lab)
    lab.traffic.client_closes()
    lab.conditions.await_forgotten()
    lab.traffic.server_says()
    lab.conditions.await_forgotten()
    lab.traffic.server_closes()
    lab.finish()


@resting(24, "rests, then the process ends it")
def process_ends(lab: Lab) -> None:
    """The same the other way round; nothing is said between the two ends."""
    _rest(lab)
    lab.traffic.server_closes()
    lab.conditions.await_forgotten()
    lab.traffic.client_closes()
    lab.finish()


@resting(24, "rests, then either side speaks")
def either_speaks(lab: Lab) -> None:
    """After a rest of its own each; the last one where conntrack picks no connection up."""
    _rest(lab)
    traffic = lab.traffic
    for says in (traffic.server_says, traffic.client_says):
        says()
        lab.conditions.await_forgotten()
    lab.conditions.conntrack_loose(0)
    for says_on in (traffic.server_says, traffic.client_says, traffic.client_closes):
        says_on()
    lab.conditions.conntrack_loose(1)
    lab.finish()


@resting(24, "rests, then the client aborts")
def client_aborts(lab: Lab) -> None:
    """Its reset is the first segment."""
    _abort(lab, "client")


@resting(24, "rests, then the process aborts")
def process_aborts(lab: Lab) -> None:
    """The same the other way round."""
    _abort(lab, "process")


def _abort(lab: Lab, who: str) -> None:
    _rest(lab)
    lab.traffic.client_says()
    lab.conditions.await_forgotten()
    aborts, hears = lab.traffic.client, lab.traffic.process
    if who == "process":
        aborts, hears = hears, aborts
    since = time.time_ns()
    lab.select_frames = partial(_without_resets, since)  # which are right from now on
    aborts.do("reset")
    with lab.report.must("the other end is told"):
        hears.wait(_is_reset, "the reset", within=lab.traffic.patience_s)
    lab.conclude()


def _is_reset(report: Report) -> bool:
    return all(each["state"] == "reset" for each in report["connections"])


def _without_resets(since_ns: int, frames: Frames) -> Frames:
    return {
        at: [f for f in some
             if f.at_ns < since_ns or f.segment is None or not f.segment.flags & RST]
        for at, some in frames.items()
    }  # fmt: skip


@situation(25, "entries deleted")
def deleted(lab: Lab) -> None:
    """One by one, at either site, under traffic and before either side speaks or closes."""
    lab.begin(connections=3, pause=True)
    lab.move()
    lab.traffic.talk()
    for role in lab.topology.sites:
        lab.conditions.delete_entries(role)
        lab.traffic.talk_on()
    lab.traffic.quiet()
    words = (lab.traffic.server_says, lab.traffic.client_says,
             lab.traffic.server_closes, lab.traffic.client_closes)  # fmt: skip
    for says in words:
        for role in lab.topology.sites:
            lab.conditions.delete_entries(role)
        says()
    lab.finish()


@situation(25, "not tracked any more", probes=(True,))
def not_tracked(lab: Lab) -> None:
    """Rules of another program keep TCP from conntrack at either site, once it has been moved."""
    lab.begin(pause=True)
    lab.move()
    for role in lab.topology.sites:
        lab.conditions.not_tracked(role)
        lab.traffic.client_says()
        lab.traffic.server_says()
    lab.traffic.server_closes()
    lab.traffic.client_closes()
    for role in lab.topology.sites:
        lab.topology[role].nft("delete table inet busy\n")
    lab.finish()
