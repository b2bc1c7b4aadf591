"""New connections to OLD, which clients try to open during a move, and what became of them.

    lab.listeners = True                          before `prepare`: natkeep is told --listeners
    early = lab.new_connections.dial()            while nothing can answer
    lab.new_connections.wait(early)
    lab.new_connections.are_accepted(early)       by the process; octets and names are checked
    lab.new_connections.are_refused(other)        and nothing of it came near the destination

Rule: what the applications say is asserted here, what the captures say in `judge_new`. The checks
of the kept connections leave all of these out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from natkeep.lab.application import (
    Application,
    TrafficError,
    all_in,
    all_open,
    octets_agree,
    received,
    sockets_agree,
    tuple_of,
)
from natkeep.lab.application import Report as Status
from natkeep.lab.capture import RST, Segment
from natkeep.lab.report import Assertion, Report
from natkeep.lab.topology import Address, Topology
from natkeep.lab.traffic_words import PORT, Traffic
from natkeep.lab.wire_checks import Kept, Points
from natkeep.plan.tuples import Endpoint, FourTuple

_WITHIN_S = 8.0  # a SYN that was dropped comes again after 1, 3 and 7 s
_OCTETS = 4096


@dataclass(slots=True)
class NewConnection:
    """One attempt of a client to reach an endpoint; accepted: what is expected of it."""

    application: Application
    tuple: FourTuple
    accepted: bool = False


class NewConnections:
    """All attempts of a scenario, of which some reach the process of *traffic*."""

    def __init__(self, topology: Topology, traffic: Traffic, report: Report) -> None:
        self.topology, self.traffic, self.report = topology, traffic, report
        self.made: list[NewConnection] = []

    @property
    def clients(self) -> frozenset[Endpoint]:
        """The clients' ends."""
        return frozenset(each.tuple.source for each in self.made)

    def dial(self, to: Address, port: int = PORT, *, role: str = "client") -> NewConnection:
        """Dial *to*; whether anything answers is seen later."""
        name = f"call-{len(self.made)}"
        application = Application(self.topology.directory / name, self.traffic.script)
        self.topology[role].start(name, *application.dial_line(str(Endpoint(to, port))))
        report = application.wait(lambda report: report["connections"], "to have dialled")
        self.made.append(NewConnection(application, tuple_of(report["connections"][0])))
        return self.made[-1]

    def wait(self, *attempts: NewConnection) -> None:
        """Nothing has answered these so far, not even by a reset."""
        for each in attempts:
            [mine] = each.application.fresh()["connections"]
            state = mine["state"]
            self.report.check(f"{each.tuple} has to wait", state == "connecting", state)

    def are_accepted(self, *attempts: NewConnection, octets: int = _OCTETS) -> None:
        """Each reaches the process, which sees it come to OLD, and is answered in full."""
        for each in attempts:
            each.accepted = True
            with self.report.should(f"{each.tuple} is let in and answered"):
                application = each.application
                application.wait(_is_decided, "to be let in", within=_WITHIN_S)
                application.wait(all_open(1), "to be let in", within=0)
                application.do({"push": octets})
                application.wait(received(octets), "an answer in full", within=_WITHIN_S)
                client, server = application.fresh(), self.traffic.process.fresh()
                views = {each.tuple: each.tuple}
                for ends in (octets_agree(client, server, views),
                             sockets_agree(client, server, views)):  # fmt: skip
                    if not ends.ok:
                        raise TrafficError(f"{ends.name}: {ends.detail}")

    def are_refused(self, *attempts: NewConnection) -> None:
        """Each is refused, and the process knows nothing of it."""
        for each in attempts:
            with self.report.should(f"{each.tuple} is turned away"):
                each.application.wait(all_in("failed", 1), "to be refused", within=_WITHIN_S)
                [mine] = each.application.fresh()["connections"]
                if mine["error"] != "ECONNREFUSED":
                    raise TrafficError(f"it ended with {mine['error']}")
                peers = [one["peer"] for one in self.traffic.process.fresh()["connections"]]
                if str(each.tuple.source) in peers:
                    raise TrafficError("the process has it")


def judge_new(
    attempts: Sequence[NewConnection], near: Points, far: Points, kept: Kept
) -> list[Assertion]:  # fmt: skip
    """What was captured: the accepted are never reset and go to NEW; the refused stay away.

    kept: says where each OLD went. Connections to other addresses are not judged.
    """
    accepted = [each.tuple for each in attempts if each.accepted]
    refused = {
        each.tuple.source
        for each in attempts
        if not each.accepted and each.tuple.destination.address in kept.news
    }
    inside = {
        FourTuple(each.source, new) for each in accepted for new in kept.on_wire(each.destination)
    }
    segments = [s for at in (near, far) for s in _segments(at) if _of(s, accepted)]
    resets = sum(1 for s in segments if s.flags & RST)
    beyond = [s.tuple for s in _segments(far) if _of(s, accepted)]
    strange = {each for each in beyond if each not in inside and each.reply() not in inside}
    astray = [s for s in _segments(far) if {s.tuple.source, s.tuple.destination} & refused]
    return [
        Assertion("callers: no reset", not resets, f"{resets} in {len(segments)} segments"),
        Assertion(
            "callers: between gateway and destination they go to NEW, ports unchanged",
            not strange and bool(beyond) == bool(accepted),
            ", ".join(map(str, strange)) or f"{len(beyond)} segments",
        ),
        Assertion(
            "callers who are turned away come no further than the gateway",
            not astray, f"{len(astray)} segments",
        ),
    ]  # fmt: skip


def _is_decided(report: Status) -> bool:
    return not all_in("connecting", 1)(report)


def _segments(points: Points) -> list[Segment]:
    return [frame.segment for frames in points.values() for frame in frames if frame.segment]


def _of(segment: Segment, calls: Iterable[FourTuple]) -> bool:
    ends = {segment.tuple.source, segment.tuple.destination}
    return any(call.source in ends for call in calls)
