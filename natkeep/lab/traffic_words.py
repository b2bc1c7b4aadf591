"""The kept connections of one server: who opens, sends and closes what, and that it arrives.

    lab.traffic.talk(); lab.traffic.quiet(); lab.traffic.talk_on()   requests and answers
    lab.traffic.client_says(); lab.traffic.server_says()             unasked, and heard
    lab.traffic.client_closes(); lab.traffic.server_closes()         a FIN, seen by the other end

Rule: each of these ends when the other end's application has what was sent, and ends the
scenario when that does not happen: the captures are then judged as they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from natkeep.lab.application import (
    SCRIPT,
    Application,
    Applications,
    Source,
    TrafficError,
    all_open,
    answered,
    handed_over,
    octets_agree,
    sockets_agree,
    start_client,
    sum_of,
    tuple_of,
)
from natkeep.lab.application import Report as Status
from natkeep.lab.engine import Engine, Moving
from natkeep.lab.host import Host, LabError, await_true
from natkeep.lab.report import Assertion, Report, ScenarioOver
from natkeep.plan.tuples import Endpoint, FourTuple

PORT = 5000
_ARRIVES_WITHIN_S = 3.0
_ALIVE = ("open", "eof", "shut")


class Traffic:
    """A server that moves, its client, and their connections.

    kept: as the client sees them, from client to server. views: the same as the server sees them.
    carried_on: whether anything arrived after the move.
    """

    script = SCRIPT
    client: Application
    server: Moving

    def __init__(self, name: str, directory: Path, report: Report) -> None:
        self.name, self.directory, self.report = name, directory, report
        self.kept: tuple[FourTuple, ...] = ()
        self.views: dict[FourTuple, FourTuple] = {}
        self.carried_on = False

    @property
    def process(self) -> Application:
        """The server's application."""
        return self.server.application

    @property
    def patience_s(self) -> float:
        """How long to wait for what is on its way.

        A peer that retransmits doubles its pauses: the next one may be as long as the blackout.
        """
        return _ARRIVES_WITHIN_S + 2 * (self.report.blackout_ms or 0) / 1000

    # Beginning

    def serve(self, engine: Engine, host: Host, listen: str) -> None:
        """A server at *host* listens."""
        application = Application(self.directory / f"serve-{self.name}", self.script)
        pid = engine.start(host, application, application.serve_line(listen))
        application.wait(lambda report: report["listening"], "listening")
        self.server = Moving(application, "serve", pid)

    def dial(self, host: Host, to: Endpoint, *, count: int, source: Source) -> None:
        """The client at *host* opens *count* connections, to be kept beside earlier ones."""
        before = [self.client] if self.kept else []
        name = f"dial-{self.name}{'-more' * len(before)}"
        client = start_client(host, name, to, count=count, source=source, script=self.script)
        self.client = Applications(*before, client) if before else client
        self.keep()

    def dial_one_by_one(self, host: Host, to: Endpoint, count: int) -> None:
        """As `dial`, where a NAT on the way makes the two ends' four-tuples differ.

        In order, so that each of the server's connections can be matched with the client's.
        """
        self.client = start_client(host, "dial", to)
        for opened in range(1, count + 1):
            if opened > 1:
                self.client.do({"open": None})
            for each in (self.client, self.process):
                each.wait(all_open(opened), f"connected, {opened}")
        self.keep(tuple_of(each).reply() for each in self.process.fresh()["connections"])

    def keep(self, inside: Iterable[FourTuple] = ()) -> None:
        """The client's connections are what is to be kept; *inside*: as the server sees them."""
        self.kept = tuple(tuple_of(each) for each in self.client.fresh()["connections"])
        self.views = dict(zip(self.kept, inside or self.kept, strict=True))
        known = self.report.before
        self.report.before += [name for each in self.kept if (name := str(each)) not in known]
        self.server.connections = tuple(self.list_kept())

    def list_kept(self) -> Iterable[str]:
        """The lines of natkeep's --connections."""
        return (f"{each.destination} {each.source}" for each in self.views.values())

    # Requests and answers

    def talk(self, *, exchanges: int = 10) -> None:
        """The client asks and is answered on every connection, without pause, from now on."""
        pause = max(10, 2 * len(self.kept))  # 50 connections shall not fill a processor
        self.client.do({"talk": {"interval_ms": pause, "size": 64, "answer": 64}})
        self.client.wait(answered(exchanges), f"{exchanges} answers on each connection")

    def talk_on(self, *, exchanges: int = 10) -> None:
        """Every connection carries as many exchanges again."""
        goal = [each["answered"] + exchanges for each in self.client.fresh()["connections"]]
        report, carried = _await_each(
            self.client, lambda each, index: each["answered"] >= goal[index],
            self.patience_s, alive=("open",),
        )  # fmt: skip
        name = "the connections carry on after the move"
        if not carried:
            states = (f"{each['state']} after {each['answered']} answers" for each in report)
            self.report.check(name, False, _counted(states))
            return
        self._note_arrival()
        self.report.check(name, True, f"{exchanges} more answers on each")

    def mark(self) -> None:
        """Silences are measured from here on."""
        self.client.do("mark")

    def quiet(self) -> None:
        """The client asks nothing more; returns when nothing is under way."""
        self.client.do("quiet")
        await_true(self._is_settled, "everything to arrive", seconds=self.patience_s)

    def _is_settled(self) -> bool:
        client, server = self.client.fresh(), self.process.fresh()
        agree = octets_agree(client, server, self.views).ok
        return agree and handed_over(client) and handed_over(server)

    # One side sends

    def client_says(self, octets: int = 64) -> None:
        """The client sends on every connection, unasked, and the server answers."""
        self._push(self.client, self.client, octets, "what the client says is answered")

    def server_says(self, octets: int = 64) -> None:
        """The server sends on every connection, unasked."""
        self._push(self.process, self.client, octets, "what the server says arrives")

    def client_sends(self, octets: int) -> None:
        """The client sends much on every connection; the server does not answer it."""
        self.process.do("swallow")
        self._push(self.client, self.process, octets, f"{octets:,} octets from the client arrive")
        self.process.do("answer")

    def server_sends(self, octets: int) -> None:
        """The server sends much on every connection."""
        self._push(self.process, self.client, octets, f"{octets:,} octets from the server arrive")

    def client_closes(self) -> None:
        """The client shuts its writing side of every connection; the server sees the end."""
        with self.report.must("the client's FIN arrives"):
            self._shut(self.client, self.process)

    def server_closes(self) -> None:
        """The server shuts its writing side of every connection; the client sees the end."""
        with self.report.must("the server's FIN arrives"):
            self._shut(self.process, self.client)

    def _push(self, sender: Application, reader: Application, octets: int, name: str) -> None:
        goal = [each["rx"] + octets for each in reader.fresh()["connections"]]
        with self.report.must(name):
            sender.do({"push": octets})
            self._await(reader, lambda each, index: each["rx"] >= goal[index])
        self._note_arrival()

    def _shut(self, closer: Application, reader: Application) -> None:
        closer.do("shutdown_write")
        self._await(reader, lambda each, _: each["state"] in ("eof", "done"))
        self.carried_on = True

    def _await(self, reader: Application, done: Callable[[dict[str, Any], int], bool]) -> None:
        within = self.patience_s
        report, all_done = _await_each(reader, done, within, alive=_ALIVE)
        if not all_done:
            said = _counted(f"{each['state']} with {each['rx']} octets" for each in report)
            raise TrafficError(f"{reader.directory.name}: not within {within:.1f} s: {said}")

    def all_arrived(self, client: Status, server: Status) -> Assertion:
        """What both ends said has arrived."""
        return octets_agree(client, server, self.views)

    def _note_arrival(self) -> None:
        silences = [each["longest_silence_ms"] for each in self.client.fresh()["connections"]]
        self.report.stall_ms = max(silences)
        self.carried_on = True

    # The end

    def check_ends(self) -> None:
        """Stop talking; the octets at both ends, and their sockets' names."""
        if not self.carried_on:
            raise ScenarioOver  # nothing arrives any more: only the captures are left to judge
        with suppress(LabError):  # what did not arrive is shown by octets_agree
            self.quiet()
        client, server = self.client.fresh(), self.process.fresh()
        self.report.assertions += [
            self.all_arrived(client, server),
            sockets_agree(client, server, self.views),
        ]
        self.report.after += [str(tuple_of(each)) for each in client["connections"]]
        self.report.octets = (sum_of(server, "rx"), sum_of(client, "rx"))


def _await_each(
    reader: Application, done: Callable[[dict[str, Any], int], bool], within: float,
    *, alive: Sequence[str],
) -> tuple[list[dict[str, Any]], bool]:  # fmt: skip
    """Wait until *done* is true of every connection, or none is *alive*; all of them, and if so."""

    def all_done(report: Status) -> bool:
        return all(done(each, index) for index, each in enumerate(report["connections"]))

    def decided(report: Status) -> bool:
        return all_done(report) or not any(c["state"] in alive for c in report["connections"])

    with suppress(TrafficError):
        reader.wait(decided, "for it", within=within)
    report = reader.fresh()
    return report["connections"], all_done(report)


def _counted(texts: Iterable[str]) -> str:
    """`48 x open, 2 x reset`, the most frequent first."""
    return ", ".join(f"{count} x {text}" for text, count in Counter(texts).most_common(4))
