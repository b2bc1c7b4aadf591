"""the stage: a lab network with the words in which stories are told.

    with Lab("name", engine="criu", family=6) as lab:
        lab.serve(); lab.dial(); lab.talk()
        lab.freeze(); lab.prepare(); lab.restore()
        lab.talk_on(); lab.finish()
    lab.report.passed

Rule: whatever fails becomes an assertion of the report, never a traceback; what makes going on
pointless raises StoryOver, after which `conclude` still judges the wires and undoes everything.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from natkeep.errors import NatkeepError, RefusedError
from natkeep.lab import capture, wire_checks
from natkeep.lab.application import (
    Application,
    TrafficError,
    all_open,
    answered,
    handed_over,
)
from natkeep.lab.application import Report as Traffic
from natkeep.lab.ends import octets_agree, sockets_agree, sum_of, tuple_of
from natkeep.lab.engine import Engine, Frozen, Moving, end_silence
from natkeep.lab.engines import choose_engine
from natkeep.lab.host import LabError, Program, await_true
from natkeep.lab.host_state import difference, read_surfaces
from natkeep.lab.journey import Journey
from natkeep.lab.listeners import PORT as PORT
from natkeep.lab.listeners import Caller, Calls, judge_calls
from natkeep.lab.network_conditions import Terrain, lose_first_probe
from natkeep.lab.report import Assertion, Report
from natkeep.lab.topology import DESTINATION, SOURCE, USUAL, Address, Seat, Topology
from natkeep.lab.traffic_words import Speech, patience
from natkeep.lab.translators import TRANSLATORS, Order, TranslatorError
from natkeep.plan.tuples import Endpoint, FourTuple


class StoryOver(Exception):
    """Something failed after which the story cannot go on."""


class Lab(Speech, Terrain, Journey, Caller):
    """A lab network with the words of a story; collects the report.

    family 4|6, mode stateful|stateless (handed to natkeep), probe: whether CRIU's window probe
    arrives, translator: see translators.py. `topology` gives scenarios the hosts themselves.
    """

    def __init__(
        self,
        scenario: str,
        *,
        engine: str = "auto",
        family: int = 4,
        mode: str = "stateful",
        probe: bool = True,
        translator: str = "natkeep",
        seats: Iterable[Seat] = USUAL,
        routed: Iterable[str] = (),
        points: Mapping[str, tuple[str, str]] | None = None,
    ) -> None:
        self.engine: Engine = choose_engine(engine, probe=probe)
        self.family, self.mode, self.probe = family, mode, probe
        self.topology = Topology(seats, routed=routed)
        self.report = Report(scenario, engine=self.engine.name, translator=translator, mode=mode)
        self.name, self.home, self.site = "lab", SOURCE, DESTINATION
        self.kept: tuple[FourTuple, ...] = ()
        self.refused, self.carried_on = "", False  # why natkeep refused; whether octets arrived
        self.views: dict[FourTuple, FourTuple] = {}
        self.strangers: list[FourTuple] = []
        self.listeners, self.calls = False, Calls()  # --listeners; new connections, as dialled
        self.parties, self.orders, self.undone = [self], [], list[Order]()
        self.peer_points = [seat.role for seat in self.topology.seats if seat.network == "near"]
        self.clean_from_ns = 0
        self.sieve: Callable[[dict[str, list[capture.Frame]]], dict[str, list[capture.Frame]]] = (
            dict
        )
        self._points, self.freezes, self._concluded = points or {}, 0, False
        self._surfaces: dict[str, dict[str, str]] = {}
        self.frozen_ns: int | None = None
        self.restored_ns = None

    def __enter__(self) -> Lab:
        self.topology.__enter__()
        directory = self.directory = self.topology.directory
        self.topology.defer(self.engine.close)
        try:
            self.translator = TRANSLATORS[self.report.translator](directory)
            self.tap = capture.Wiretap(self.topology, directory, self._points)
        except BaseException:
            self.topology.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self.topology.__exit__(None, None, None)

    # The words, in the order in which a usual story uses them.

    def settle(self) -> None:
        """Say which address is OLD, and which NEW."""
        self.old, self.new = self.home.address(self.family), self.site.address(self.family)
        if self.parties[0] is self:
            self.report.old, self.report.new = str(self.old), str(self.new)

    def serve(self, *, listen: str | None = None) -> None:
        """A server at the source listens on OLD, or as *listen* says."""
        self.settle()
        application = Application(self.directory / f"serve-{self.name}")
        line = application.serve_line(listen or str(Endpoint(self.old, PORT)))
        self.at = self.topology[self.home.role]
        pid = self.engine.start(self.at, application, line)
        application.wait(lambda report: report["listening"], "listening")
        self.server = Moving(application, "serve", pid)

    def dial(
        self, *, connections: int = 1, role: str = "client", source: str | None = None
    ) -> None:
        """The client opens *connections* to OLD."""
        self.client = Application(self.directory / f"dial-{self.name}")
        target = str(Endpoint(self.old, PORT))
        line = self.client.dial_line(target, count=connections, source=source)
        self._start(role, f"dial-{self.name}", line)
        self.client.wait(all_open(connections), "connected")
        self.keep()

    def keep(self, inside: Iterable[FourTuple] = ()) -> None:
        """The client's connections are what is to be kept; *inside*: as the process sees them."""
        report = self.client.fresh()
        self.kept = tuple(tuple_of(each) for each in report["connections"])
        self.views = dict(zip(self.kept, inside or self.kept, strict=True))
        self.report.before += [str(each) for each in self.kept]
        self.server.connections = tuple(
            f"{each.destination} {each.source}" for each in self.views.values()
        )

    def talk(self, *, exchanges: int = 10) -> None:
        """The client asks and is answered on every connection, without pause, from now on."""
        pause = max(10, 2 * len(self.kept))  # 50 connections shall not fill a processor
        self.client.do({"talk": {"interval_ms": pause, "size": 64, "answer": 64}})
        self.client.wait(answered(exchanges), f"{exchanges} answers on each connection")

    def quiet(self) -> None:
        """The client asks nothing more; returns when nothing is under way."""
        self.client.do("quiet")
        await_true(self._settled, "everything to arrive", seconds=patience(self.report))

    def move(self) -> None:
        """Freeze, prepare, restore: the usual order."""
        self.freeze()
        self.prepare()
        self.restore()

    def freeze(self) -> None:
        """The engine freezes the server; the source is silent from here on."""
        self.freezes += 1
        self.client.do("mark")
        self._frozen_at = time.monotonic()
        if self.freezes == 1:
            self.look_at_sites()
            self.frozen_ns = time.time_ns()
        with self.must("the engine freezes the server"):
            into = self.directory / f"frozen-{self.name}-{self.freezes}"
            self.frozen: Frozen = self.engine.freeze(self.at, self.server, into)

    def look_at_sites(self) -> None:
        """Remember how the sites are before anything is done there; the first look counts."""
        for role in self.sites:
            if role not in self._surfaces:
                self._surfaces[role] = read_surfaces(self.topology[role])

    def prepare(self, *, replaces: Order | None = None) -> None:
        """The translator prepares gateway and destination, or moves on what *replaces* did."""
        self.place_order(replaces)
        with self.must("the translator prepares gateway and destination"):
            try:
                self.translator.prepare(self.order)
            except TranslatorError as error:
                self.refused = str(error) if error.code == RefusedError.exit_code else ""
                raise

    def place_order(self, replaces: Order | None = None) -> None:
        """Say what the translator is to do; it is undone in the end, done or not."""
        self.order = Order(
            self.name if self.freezes == 1 else f"{self.name}-{self.freezes}",
            self.old, self.new, self.topology["gateway"], self.topology[self.site.role],
            tuple(self.views.values()), self.frozen.options, self.mode, replaces,
            self.listeners,
        )  # fmt: skip
        self.orders.append(self.order)

    def restore(self) -> None:
        """The engine restores the server at the destination, opening on the way."""
        if not self.probe and self.engine.name != "repair":
            lose_first_probe(self.topology["switch"], self.site.role)
        with self.must("the engine restores the server"):
            opening = self.translator.opening(self.order)
            self.at = self.topology[self.site.role]
            self.engine.restore(self.at, self.server, self.frozen, opening)
        self.note_restored()

    def note_restored(self) -> None:
        """The server is back."""
        self.restored_ns = time.time_ns()
        self.report.blackout_ms = (time.monotonic() - self._frozen_at) * 1000

    def talk_on(self, *, exchanges: int = 10) -> None:
        """Every connection carries as many exchanges again."""
        start = [each["answered"] for each in self.client.fresh()["connections"]]
        goal = [before + exchanges for before in start]

        def talked(report: Traffic) -> bool:
            got = [each["answered"] for each in report["connections"]]
            return all(have >= want for have, want in zip(got, goal, strict=True))

        def decided(report: Traffic) -> bool:
            alive = any(each["state"] == "open" for each in report["connections"])
            return talked(report) or not alive

        name = "the connections carry on after the move"
        with suppress(TrafficError):
            self.client.wait(decided, f"{exchanges} more answers", within=patience(self.report))
        report = self.client.fresh()
        if not talked(report):
            states = [f"{each['state']} after {each['answered']} answers"
                      for each in report["connections"]]  # fmt: skip
            self.report.assertions.append(Assertion(name, False, _counted(states)))
            return
        self.report.stall_ms = max(e["longest_silence_ms"] for e in report["connections"])
        self.carried_on = True
        self.report.assertions.append(Assertion(name, True, f"{exchanges} more answers on each"))

    def finish(self) -> None:
        """Stop talking; check octets, tuples, wires, and that teardown leaves nothing."""
        if not self.carried_on:
            raise StoryOver  # nothing arrives any more: what is left is to judge the wires
        with suppress(LabError):  # what did not arrive is told by octets_agree
            self.quiet()
        self.check_ends()
        self.conclude()

    def check_ends(self) -> None:
        """The octets at both ends, and their sockets' names."""
        client, server = self.client.fresh(), self.server.application.fresh()
        self.report.assertions += [
            octets_agree(client, server, self.views),
            sockets_agree(client, server, self.views),
        ]
        self.report.after += [str(tuple_of(each)) for each in client["connections"]]
        self.report.octets = (sum_of(server, "rx"), sum_of(client, "rx"))

    def conclude(self) -> None:
        """Judge the wires and take the translation down; once."""
        if self._concluded:
            return
        self._concluded = True
        self._judge_wires()
        self._teardown()

    # What the words are made of.

    @property
    def sites(self) -> tuple[str, ...]:
        """The roles at which the translator works."""
        beyond = (seat.role for seat in self.topology.seats if seat.network not in ("near", "old"))
        return ("gateway", *beyond)

    @contextmanager
    def should(self, name: str) -> Iterator[None]:
        """Assert that what is done inside succeeds; the story goes on even if not."""
        began = time.monotonic()
        try:
            yield
        except (NatkeepError, TrafficError) as error:
            self.report.assertions.append(failure(name, error))
        else:
            took = (time.monotonic() - began) * 1000
            self.report.assertions.append(Assertion(name, True, f"{took:.0f} ms"))

    @contextmanager
    def must(self, name: str) -> Iterator[None]:
        """Like `should`, but without it the story is over."""
        count = len(self.report.assertions)
        with self.should(name):
            yield
        if not self.report.assertions[count].ok:
            raise StoryOver

    def _start(self, role: str, name: str, line: list[str]) -> Program:
        return self.topology[role].start(name, *line)

    def _settled(self) -> bool:
        """Nothing is under way any more: each end has what the other end sent."""
        client, server = self.client.fresh(), self.server.application.fresh()
        agree = octets_agree(client, server, self.views).ok
        return agree and handed_over(client) and handed_over(server)

    def _judge_wires(self) -> None:
        frames = self.tap.stop()
        self.report.assertions.append(self.tap.captured_all())
        if not self._surfaces:
            return  # nothing was frozen
        frames = self.sieve(frames)
        kept = self._whats_kept()
        far = capture.beyond_gateway(self.topology)
        peers = {at: frames[at] for at in self.peer_points}
        at_peers = sorted((f for each in peers.values() for f in each), key=lambda f: f.at_ns)
        self.report.assertions += wire_checks.judge_wires(
            kept, peers, {"near": frames["near"]}, {at: frames[at] for at in far}
        )
        if self.strangers:
            self.report.assertions += wire_checks.judge_strangers(at_peers, kept, self.strangers)
        if self.calls.made:
            beyond = {at: frames[at] for at in far}
            self.report.assertions += judge_calls(self.calls.made, peers, beyond, kept.news)
        self.report.segments = wire_checks.count_segments(at_peers, kept)
        self.report.resets = wire_checks.count_resets(at_peers, kept)
        self.report.silence_ms = wire_checks.longest_silence_ms(at_peers, kept)

    def _whats_kept(self) -> wire_checks.Kept:
        """What all parties' connections, moves and strangers come to."""
        views = {peers: own for party in self.parties for peers, own in party.views.items()}
        news: dict[Address, tuple[Address, ...]] = {party.old: () for party in self.parties}
        for order in self.orders:
            news[order.old] = (*news[order.old], order.new)
        return wire_checks.Kept(
            tuple(views), news,
            min(party.frozen_ns for party in self.parties if party.frozen_ns),
            max(party.restored_ns or 0 for party in self.parties) or None,
            frozenset(each.source for each in self.strangers) | self.calls.callers,
            tuple(views.values()), self.clean_from_ns,
        )  # fmt: skip

    def _teardown(self) -> None:
        if not self.orders:
            return
        with self.should("teardown succeeds"):
            for order in [each for each in reversed(self.orders) if each not in self.undone]:
                self.translator.teardown(order)
        for role, before in self._surfaces.items():
            end_silence(self.topology[role])  # the engine's, where the process moved on
            left = difference(before, read_surfaces(self.topology[role]))
            self.report.assertions.append(
                Assertion(f"teardown leaves the {role} byte-identical", not left, left)
            )


def failure(name: str, error: Exception) -> Assertion:
    """*name* does not hold, for the reason that *error* says (traffic adds a whole report)."""
    return Assertion(name, False, str(error).partition("; last report:")[0][:600])


def _counted(texts: Iterable[str]) -> str:
    """`48 x open, 2 x reset`, the most frequent first."""
    return ", ".join(f"{count} x {text}" for text, count in Counter(texts).most_common(4))
