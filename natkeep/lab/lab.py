"""A lab network in which a server is moved while its client talks, and everything is judged.

    with Lab("name", engine="criu", family=6) as lab:
        lab.begin()                  a server at the source, a client, requests and answers
        lab.move()                   freeze, prepare, restore
        lab.traffic.talk_on()
        lab.finish()                 judges octets, sockets and captures, and tears down
    lab.report.passed

    lab.topology     hosts and wires         lab.traffic            the kept connections
    lab.captures     tcpdump at the wires    lab.new_connections    those that begin later
    lab.translator   natkeep or a baseline   lab.conditions         what others install on the way

Rule: what fails becomes an assertion of the report, never a traceback; what makes going on
pointless raises ScenarioOver, after which `conclude` still judges the captures and undoes all.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from natkeep.errors import NatkeepError, RefusedError
from natkeep.lab import capture, wire_checks
from natkeep.lab.application import Source
from natkeep.lab.engine import Engine, Frozen, Opening, end_silence
from natkeep.lab.engines import choose_engine
from natkeep.lab.host_state import difference, read_surfaces
from natkeep.lab.listeners import NewConnections, judge_new
from natkeep.lab.network_conditions import Conditions
from natkeep.lab.report import Report
from natkeep.lab.topology import DESTINATION, SOURCE, USUAL, Address, Seat, Topology
from natkeep.lab.traffic_words import PORT, Traffic
from natkeep.lab.translators import TRANSLATORS, Order, Translator, TranslatorError
from natkeep.lab.udp import Datagrams, judge_datagrams
from natkeep.plan.tuples import Endpoint, FourTuple, Local, address_of

Frames = dict[str, list[capture.Frame]]


class Lab:
    """One lab; collects the report of one scenario.

    family 4|6, mode stateful|stateless (handed to natkeep), probe: whether CRIU's window probe
    arrives, translator: see translators.py, points: captures beside the usual ones, udp: what is
    kept are UDP's sockets (udp.py).
    """

    captures: capture.Captures
    translator: Translator
    new_connections: NewConnections
    traffic: Traffic
    frozen: Frozen
    order: Order
    old: Address
    new: Address

    def __init__(
        self, scenario: str, *, engine: str = "auto", family: int = 4, mode: str = "stateful",
        probe: bool = True, translator: str = "natkeep", seats: Iterable[Seat] = USUAL,
        routed: Iterable[str] = (), points: Mapping[str, tuple[str, str]] | None = None,
        udp: bool = False,
    ) -> None:  # fmt: skip
        self.engine: Engine = choose_engine(engine, probe=probe)
        self.family, self.mode, self.probe, self.udp = family, mode, probe, udp
        self.topology = Topology(seats, routed=routed)
        self.report = Report(scenario, engine=self.engine.name, translator=translator, mode=mode)
        self.conditions = Conditions(self.topology, family, self.report)
        self.name, self.home, self.site = "lab", SOURCE, DESTINATION
        self.refused = ""  # why natkeep refused the move
        self.port = self.wire_port = PORT  # the server's, and what the wire to NEW shows for it
        self.others: list[FourTuple] = []  # connections of others with NEW
        self.listeners = False  # whether natkeep is told --listeners
        self.crosses = True  # whether peers' packets cross a gateway that translates
        self.peer_sites: tuple[str, ...] = ()  # peers' own hosts that are sites
        self.relay = ""  # the role of the host that passes on what comes to OLD, if one does
        self.peers: tuple[tuple[Local, Local], ...] = ()  # which have moved, and where they are
        self.parties, self.orders, self.undone = [self], list[Order](), list[Order]()
        self.peer_points = [*self.topology.peers]
        self.clean_from_ns = 0
        self.select_frames: Callable[[Frames], Frames] = dict  # what of the frames is judged
        self.frozen_ns: int | None = None
        self.restored_ns: int | None = None
        self._points, self._freezes, self._concluded = points or {}, 0, False
        self.seen_by_peers: list[capture.Frame] = []
        self._surfaces: dict[str, dict[str, str]] = {}

    def __enter__(self) -> Self:
        self.topology.__enter__()
        self.directory = self.topology.directory
        self.topology.defer(self.engine.close)
        self.traffic = self._make_traffic(self.name)
        self.new_connections = NewConnections(self.topology, self.traffic, self.report)
        try:
            self.translator = TRANSLATORS[self.report.translator](self.directory)
            self.captures = capture.Captures(self.topology, self._points, udp=self.udp)
        except BaseException:
            self.topology.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exception: Any) -> None:
        self.topology.__exit__(None, None, None)

    def _make_traffic(self, name: str) -> Traffic:
        kind = Datagrams if self.udp else Traffic
        return kind(name, self.directory, self.report)

    # Beginning

    def begin(
        self, *, connections: int = 1, listen: str | None = None, source: Source = None,
        pause: bool = False,
    ) -> None:  # fmt: skip
        """A server, connections to it, and requests and answers on them; then perhaps a pause."""
        self.serve(listen=listen)
        self.dial(connections=connections, source=source)
        self.traffic.talk()
        if pause:
            self.traffic.quiet()

    def settle(self) -> None:
        """Say which address is OLD, and which NEW."""
        self.old, self.new = self.home.address(self.family), self.site.address(self.family)
        if self.parties[0] is self:
            self.report.old, self.report.new = str(self.old), str(self.new)

    def serve(self, *, listen: str | None = None) -> None:
        """A server at the source listens on OLD, or as *listen* says."""
        self.settle()
        self.at = self.topology[self.home.role]
        self.traffic.serve(self.engine, self.at, listen or str(self.server_endpoint))

    @property
    def server_endpoint(self) -> Endpoint:
        """OLD and the server's port."""
        return Endpoint(self.old, self.port)

    def dial(self, *, connections: int = 1, role: str = "client", source: Source = None) -> None:
        """The client opens *connections* to OLD, from the address and port *source*."""
        host = self.topology[role]
        self.traffic.dial(host, self.server_endpoint, count=connections, source=source)

    def beside(self, home: Seat, name: str) -> Self:
        """A second process, at *home*; the report, the hosts and the end are shared.

        `traffic.check_ends` checks its own connections, and `finish` of the first one judges both.
        """
        other = copy.copy(self)
        other.name, other.home = name, home
        other.traffic = self._make_traffic(name)
        self.parties.append(other)
        return other

    # Moving

    def move(self) -> None:
        """Freeze, prepare, restore: the usual order."""
        self.freeze()
        self.prepare()
        self.restore()

    def freeze(self) -> None:
        """The engine freezes the server; the source is silent from here on."""
        self.begin_freeze()
        with self.report.must("the engine freezes the server"):
            into = self.directory / f"frozen-{self.name}-{self._freezes}"
            self.frozen = self.engine.freeze(self.at, self.traffic.server, into)

    def begin_freeze(self) -> None:
        """Remember how all is, just before the server is frozen, by whatever does that."""
        self._freezes += 1
        self.traffic.mark()
        self._frozen_at = time.monotonic()
        if self._freezes == 1:
            self.read_sites()
            self.frozen_ns = time.time_ns()

    def read_sites(self, anew: Iterable[str] = ()) -> None:
        """Remember how the sites are before anything is done there; the first time counts.

        anew: roles of hosts that have begun again since.
        """
        for role in anew:
            self._surfaces.pop(role, None)
        more = [*self.peer_sites, *([self.relay] if self.relay else [])]
        for role in (*self.topology.sites, *more):
            if role not in self._surfaces:
                self._surfaces[role] = read_surfaces(self.topology[role])

    def place_order(self, replaces: Order | None = None, *, move_id: str = "") -> Order:
        """Say what the translator is to do; it is undone in the end, done or not."""
        usual = self.name if self._freezes == 1 else f"{self.name}-{self._freezes}"
        self.order = Order(
            move_id or usual, self.old, self.new,
            self.topology["gateway"] if self.crosses else None, self.topology[self.site.role],
            tuple(self.traffic.views.values()), self.frozen.options, self.mode, replaces,
            self.listeners, self.peers,
            tuple(self.topology[role] for role in self.peer_sites),
            self.topology[self.relay] if self.relay else None, "udp" if self.udp else "tcp",
            (self.port, self.wire_port) if self.port != self.wire_port else None,
        )  # fmt: skip
        self.orders.append(self.order)
        return self.order

    def prepare(self, *, replaces: Order | None = None) -> None:
        """The translator prepares gateway and destination, or replaces what it did for a move."""
        order = self.place_order(replaces)
        with self.report.must("the translator prepares gateway and destination"):
            try:
                self.translator.prepare(order)
            except TranslatorError as error:
                self.refused = str(error) if error.code == RefusedError.exit_code else ""
                raise

    def must_refuse(self, *reasons: str) -> bool:
        """Whether the translator refuses the move beforehand; it must, giving all *reasons*.

        One that does not refuse has prepared, and the scenario may go on with what follows.
        """
        order = self.place_order()
        name = f"the move is refused, since {' and '.join(reasons)}"
        try:
            self.translator.prepare(order)
        except NatkeepError as error:
            code = getattr(error, "code", error.exit_code)
            ok = code == RefusedError.exit_code and all(reason in str(error) for reason in reasons)
            self.report.check(name, ok, str(error))
            self.orders.remove(order)
            self.refused = str(error) if ok else self.refused
            return True
        self.report.check(name, False, "it is not refused")
        return False

    def restore(self) -> None:
        """The engine restores the server at the destination, opening on the way."""
        if not self.probe and self.engine.name != "repair":
            self.conditions.lose_first_probe(self.site.role)
        with self.report.must("the engine restores the server"):
            opening = self.translator.opening(self.order)
            self.at = self.topology[self.site.role]
            self.engine.restore(self.at, self.traffic.server, self.frozen, opening)
        self.note_restored()

    def note_restored(self) -> None:
        """The server is back."""
        self.restored_ns = time.time_ns()
        self.report.blackout_ms = (time.monotonic() - self._frozen_at) * 1000

    def move_on(self, site: Seat) -> None:
        """The process moves on to *site*, and the gateway's translation is replaced."""
        earlier = self.order
        self.site, self.new = site, site.address(self.family)
        self.freeze()
        self.prepare(replaces=earlier)
        self.restore()
        with self.report.should("what is left of the earlier move is undone"):
            self.translator.retire(earlier)
        self.undone.append(earlier)

    def move_back(self) -> None:
        """The process moves to where it came from; the translation ends when it exists there."""
        self.freeze()
        self.withdraw()

    def withdraw(self) -> None:
        """The frozen process is restored where it came from, and the translation ends."""
        self.undone.append(self.order)
        self.restore_at_source(self.translator.withdrawal(self.order))

    def restore_at_source(self, opening: Opening | None = None) -> None:
        """The frozen process is restored where it came from; without *opening*, untranslated."""
        # Unsent data may leave before the restore has ended, and be all there is to say: what
        # the process sends from here on is after the move, since what is frozen sends nothing. Of
        # UDP, what comes to it meanwhile may be lost.
        beginning = time.time_ns()
        with self.report.must("the engine restores the server where it came from"):
            self.at = self.topology[self.home.role]
            opening = opening or Opening(lambda: None)
            self.engine.restore(self.at, self.traffic.server, self.frozen, opening)
        self.note_restored()
        if not self.udp:
            self.restored_ns = beginning

    # The end

    def finish(self, *, moved: bool = True) -> None:
        """Stop talking; check octets and four-tuples, then `conclude`."""
        self.traffic.check_ends()
        self.conclude(moved=moved)

    def conclude(self, *, moved: bool = True) -> None:
        """Judge the captures and take the translation down; once.

        moved: False for a process that never was anywhere else, which leaves nothing to take down.
        """
        if self._concluded:
            return
        self._concluded = True
        frames = self.captures.stop()
        if moved:
            self.report.assertions.append(self.captures.are_complete())
        if self._surfaces:  # otherwise nothing was frozen
            self._judge(self.select_frames(frames), moved)
        if moved and self.orders:
            self._teardown()

    def _judge(self, frames: Frames, moved: bool) -> None:
        report, kept = self.report, self._describe_kept()
        peers, near = {at: frames[at] for at in self.peer_points}, {"near": frames["near"]}
        far = {at: frames[at] for at in capture.beyond_gateway(self.topology)}
        if isinstance(self.traffic, Datagrams):
            heard = self.traffic.heard if self.traffic.numbered else None
            report.assertions += judge_datagrams(kept, peers, near, far, heard)
        elif moved:
            report.assertions += wire_checks.judge_move(kept, peers, near, far)
        else:
            report.assertions += wire_checks.judge_peers(kept, peers, {**peers, **near})
        if self.others:
            report.assertions += wire_checks.judge_others(peers, kept, self.others)
        if self.new_connections.made:
            report.assertions += judge_new(self.new_connections.made, peers, far, kept)
        at_peers = wire_checks.in_order(peers)
        self.seen_by_peers = at_peers
        report.segments = wire_checks.count_segments(at_peers, kept)
        report.resets = wire_checks.count_resets(at_peers, kept)
        report.silence_ms = wire_checks.longest_silence_ms(at_peers, kept)

    def _describe_kept(self) -> wire_checks.Kept:
        """The connections and moves of all parties, and the connections of others."""
        views = {peers: own for each in self.parties for peers, own in each.traffic.views.items()}
        news: dict[Address, tuple[Address, ...]] = {party.old: () for party in self.parties}
        for order in self.orders:
            news[order.old] = (*news[order.old], order.new)
        return wire_checks.Kept(
            tuple(views), news,
            min(party.frozen_ns for party in self.parties if party.frozen_ns),
            max(party.restored_ns or 0 for party in self.parties) or None,
            frozenset(each.source for each in self.others) | self.new_connections.clients,
            tuple(views.values()), self.clean_from_ns,
            {address_of(peer): address_of(now) for peer, now in self.peers},
            {one.port: one.wire_port for one in self.parties if one.wire_port != one.port},
        )  # fmt: skip

    def _teardown(self) -> None:
        with self.report.should("teardown succeeds"):
            for order in [each for each in reversed(self.orders) if each not in self.undone]:
                self.translator.teardown(order)
        for role, before in self._surfaces.items():
            end_silence(self.topology[role])  # the engine's, where the process moved on
            left = difference(before, read_surfaces(self.topology[role]))
            self.report.check(f"teardown leaves the {role} byte-identical", not left, left)
