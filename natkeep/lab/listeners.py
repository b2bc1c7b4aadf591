"""the calls: new connections that clients try to open to OLD, and what became of them.

    lab.listeners = True                      before `prepare`: natkeep is told --listeners
    early = lab.call(); lab.has_wait(early)   dialled while nobody can answer
    lab.lets_in(early, lab.call())            both reach the process, octets and names are checked
    lab.turns_away(lab.call(port=5001))       refused, and nothing of it came near the destination

Rule: what the applications say is asserted here, what the wires say in `judge_calls`, which
`conclude` asks for; a call is a stranger to everything that is asserted of the kept connections.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from natkeep.lab.application import Application, TrafficError, all_in, all_open, received
from natkeep.lab.application import Report as Traffic
from natkeep.lab.capture import RST, Segment
from natkeep.lab.ends import octets_agree, sockets_agree, tuple_of
from natkeep.lab.engine import Moving
from natkeep.lab.report import Assertion, Report
from natkeep.lab.topology import Address, Topology
from natkeep.lab.wire_checks import Points
from natkeep.plan.tuples import Endpoint, FourTuple

PORT = 5000
_WITHIN_S = 8.0  # a SYN that was dropped comes again after 1, 3 and 7 s
_OCTETS = 4096


@dataclass(slots=True)
class Call:
    """One attempt of a client to reach an endpoint; answered: what is expected of it."""

    application: Application
    tuple: FourTuple
    answered: bool = False


@dataclass(slots=True)
class Calls:
    """All calls of a story; shared by its parties."""

    made: list[Call] = field(default_factory=list)

    @property
    def callers(self) -> frozenset[Endpoint]:
        """The ends from which they came."""
        return frozenset(call.tuple.source for call in self.made)


class Calling(Protocol):
    """What of a Lab these words need."""

    calls: Calls
    directory: Path
    topology: Topology
    old: Address
    server: Moving
    report: Report

    def should(self, name: str) -> AbstractContextManager[None]: ...


class Caller:
    """The words; mixed into Lab."""

    def call(
        self: Calling, *, role: str = "client", to: Address | None = None, port: int = PORT
    ) -> Call:
        """Dial *to* (OLD) and *port*; whether anybody answers is seen later."""
        name = f"call-{len(self.calls.made)}"
        application = Application(self.directory / name)
        line = application.dial_line(str(Endpoint(to or self.old, port)))
        self.topology[role].start(name, *line)
        report = application.wait(lambda report: report["connections"], "to have dialled")
        call = Call(application, tuple_of(report["connections"][0]))
        self.calls.made.append(call)
        return call

    def has_wait(self: Calling, *calls: Call) -> None:
        """Nobody has answered these calls so far, not even by a reset."""
        for call in calls:
            [mine] = call.application.fresh()["connections"]
            name = f"{call.tuple} has to wait"
            ok = mine["state"] == "connecting"
            self.report.assertions.append(Assertion(name, ok, mine["state"]))

    def lets_in(self: Calling, *calls: Call, octets: int = _OCTETS) -> None:
        """Each call reaches the process, which sees it come to OLD, and is answered in full."""
        for call in calls:
            call.answered = True
            with self.should(f"{call.tuple} is let in and answered"):
                call.application.wait(_is_decided, "to be let in", within=_WITHIN_S)
                call.application.wait(all_open(1), "to be let in", within=0)
                call.application.do({"push": octets})
                call.application.wait(received(octets), "an answer in full", within=_WITHIN_S)
                client, server = call.application.fresh(), self.server.application.fresh()
                views = {call.tuple: call.tuple}
                for ends in (octets_agree(client, server, views),
                             sockets_agree(client, server, views)):  # fmt: skip
                    if not ends.ok:
                        raise TrafficError(f"{ends.name}: {ends.detail}")

    def turns_away(self: Calling, *calls: Call) -> None:
        """Each call is refused, and the process knows nothing of it."""
        for call in calls:
            with self.should(f"{call.tuple} is turned away"):
                call.application.wait(all_in("failed", 1), "to be refused", within=_WITHIN_S)
                [mine] = call.application.fresh()["connections"]
                if mine["error"] != "ECONNREFUSED":
                    raise TrafficError(f"it ended with {mine['error']}")
                peers = [each["peer"] for each in self.server.application.fresh()["connections"]]
                if str(call.tuple.source) in peers:
                    raise TrafficError("the process has it")


def judge_calls(
    calls: Sequence[Call], near: Points, far: Points, news: Mapping[Address, Sequence[Address]]
) -> list[Assertion]:
    """What the wires say: who is let in is never reset and goes to NEW; others stay away.

    news: for each OLD where it went. Who called somebody else is not judged.
    """
    answered = [call.tuple for call in calls if call.answered]
    turned = {
        call.tuple.source
        for call in calls
        if not call.answered and call.tuple.destination.address in news
    }
    inside = {
        FourTuple(each.source, Endpoint(new, each.destination.port))
        for each in answered
        for new in news[each.destination.address]
    }
    segments = [s for at in (near, far) for s in _segments(at) if _of(s, answered)]
    resets = sum(1 for s in segments if s.flags & RST)
    beyond = [s.tuple for s in _segments(far) if _of(s, answered)]
    strange = {each for each in beyond if each not in inside and each.reply() not in inside}
    astray = [s for s in _segments(far) if {s.tuple.source, s.tuple.destination} & turned]
    return [
        Assertion("callers: no reset", not resets, f"{resets} in {len(segments)} segments"),
        Assertion(
            "callers: between gateway and destination they go to NEW, ports unchanged",
            not strange and bool(beyond) == bool(answered),
            ", ".join(map(str, strange)) or f"{len(beyond)} segments",
        ),
        Assertion(
            "callers who are turned away come no further than the gateway",
            not astray, f"{len(astray)} segments",
        ),
    ]  # fmt: skip


def _is_decided(report: Traffic) -> bool:
    return not all_in("connecting", 1)(report)


def _segments(points: Points) -> list[Segment]:
    return [frame.segment for frames in points.values() for frame in frames if frame.segment]


def _of(segment: Segment, calls: Iterable[FourTuple]) -> bool:
    ends = {segment.tuple.source, segment.tuple.destination}
    return any(call.source in ends for call in calls)
