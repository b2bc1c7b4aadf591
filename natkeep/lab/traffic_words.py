"""the speech: who says what on the kept connections, and who closes them first.

    lab.client_says(); lab.server_says()             and is heard, and answered
    lab.client_sends(300_000); lab.server_sends(…)   bulk, in a bounded time
    lab.client_closes(); lab.server_closes()         a FIN, seen by the other end's application

Rule: each word ends when the other end's application has what was said, and ends the story when
that does not happen: the wires are then judged as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from natkeep.lab.application import Application, Item, TrafficError
from natkeep.lab.application import Report as Traffic
from natkeep.lab.engine import Moving
from natkeep.lab.report import Report

_HEARD_WITHIN_S = 3.0
_ALIVE = ("open", "eof", "shut")


class Speaking(Protocol):
    """What of a Lab these words need."""

    client: Application
    server: Moving
    report: Report
    carried_on: bool

    def must(self, name: str) -> AbstractContextManager[None]: ...


def patience(report: Report) -> float:
    """How long to wait for what is on its way, in seconds.

    A peer that retransmits doubles its pauses: the next one may be as long as the blackout was.
    """
    return _HEARD_WITHIN_S + 2 * (report.blackout_ms or 0) / 1000


class Speech:
    """The words; mixed into Lab."""

    def client_says(self: Speaking, octets: int = 64) -> None:
        """The client sends on every connection, unasked, and the server answers."""
        goal = _more(self.client, octets)
        with self.must("what the client says is answered"):
            self.client.do({"push": octets})
            _await_each(self.client, _have(goal), patience(self.report))
        _note_arrival(self)

    def server_says(self: Speaking, octets: int = 64) -> None:
        """The server sends on every connection, unasked."""
        goal = _more(self.client, octets)
        with self.must("what the server says arrives"):
            self.server.application.do({"push": octets})
            _await_each(self.client, _have(goal), patience(self.report))
        _note_arrival(self)

    def client_sends(self: Speaking, octets: int) -> None:
        """The client sends much on every connection; the server only listens."""
        server = self.server.application
        goal = _more(server, octets)
        with self.must(f"{octets:,} octets from the client arrive"):
            server.do("swallow")
            self.client.do({"push": octets})
            _await_each(server, _have(goal), patience(self.report))
            server.do("answer")
        self.carried_on = True

    def server_sends(self: Speaking, octets: int) -> None:
        """The server sends much on every connection."""
        goal = _more(self.client, octets)
        with self.must(f"{octets:,} octets from the server arrive"):
            self.server.application.do({"push": octets})
            _await_each(self.client, _have(goal), patience(self.report))
        _note_arrival(self)

    def client_closes(self: Speaking) -> None:
        """The client shuts its writing side of every connection; the server sees the end."""
        with self.must("the client's FIN arrives"):
            _close(self.client, self.server.application, patience(self.report))
        self.carried_on = True

    def server_closes(self: Speaking) -> None:
        """The server shuts its writing side of every connection; the client sees the end."""
        with self.must("the server's FIN arrives"):
            _close(self.server.application, self.client, patience(self.report))
        self.carried_on = True


def _close(closer: Application, hearer: Application, within: float) -> None:
    order: Item = "shutdown_write"
    closer.do(order)
    _await_each(hearer, lambda each, _: each["state"] in ("eof", "done"), within)


def _note_arrival(lab: Speaking) -> None:
    silences = [each["longest_silence_ms"] for each in lab.client.fresh()["connections"]]
    lab.report.stall_ms = max(silences)
    lab.carried_on = True


def _more(hearer: Application, octets: int) -> list[int]:
    """What each connection will have read when it has read *octets* more."""
    return [each["rx"] + octets for each in hearer.fresh()["connections"]]


def _have(goal: list[int]) -> Callable[[dict[str, Any], int], bool]:
    return lambda each, index: each["rx"] >= goal[index]


def _await_each(
    hearer: Application, done: Callable[[dict[str, Any], int], bool], within: float
) -> None:
    """Until *done* is true of every connection; TrafficError when late, or when none lives."""

    def all_done(report: Traffic) -> bool:
        return all(done(each, index) for index, each in enumerate(report["connections"]))

    def decided(report: Traffic) -> bool:
        alive = any(each["state"] in _ALIVE for each in report["connections"])
        return all_done(report) or not alive

    report = None
    try:
        report = hearer.wait(decided, "for it", within=within)
    except TrafficError:
        report = hearer.fresh()
    if not all_done(report):
        states = Counter(
            f"{each['state']} with {each['rx']} octets" for each in report["connections"]
        )
        told = ", ".join(f"{count} x {state}" for state, count in states.most_common(4))
        raise TrafficError(f"{hearer.directory.name}: not within {within:.1f} s: {told}")
