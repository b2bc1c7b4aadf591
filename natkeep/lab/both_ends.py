"""Both ends of the kept connections move at once, and nothing between them translates.

    client 10.1.0.2 (P)  ─────── router ─────── source 10.2.0.10 (OLD)         before
    third 10.4.0.30 (Q)  ─────── router ─────── destination 10.3.0.20 (NEW)    afterwards

    peer = BothEnds(lab); peer.begin(); peer.move(); lab.traffic.talk_on(); peer.finish()

Each end has a natkeep and a move of its own, which knows of the other where its peers were and are
(`--peer-map`). What passes the wires says NEW and Q; it is judged as the client's process sees it.
With *gateway* the router translates for the server's move, so that Q's side goes on seeing OLD.

Rule: as lab.py: what fails becomes an assertion, never a traceback.
"""

from __future__ import annotations

from dataclasses import replace

from natkeep.lab.application import Application, all_open
from natkeep.lab.capture import Frame
from natkeep.lab.engine import Moving
from natkeep.lab.lab import Frames, Lab
from natkeep.lab.topology import DESTINATION, SOURCE, THIRD, Seat
from natkeep.lab.translators import TRANSLATORS
from natkeep.plan.tuples import Endpoint, FourTuple, Local

CLIENT = Seat("client", "near", 2, first_pid=3000)
SETUP = {"seats": (CLIENT, SOURCE, DESTINATION, THIRD)}


class BothEnds:
    """The client of *lab*, which moves to `third` while the server moves to `destination`."""

    def __init__(self, lab: Lab, *, gateway: bool = False) -> None:
        self.lab = lab
        lab.crosses = gateway

    def begin(self, *, connections: int = 1, pause: bool = False) -> None:
        """A server, a client that can move as well, and requests and answers between them."""
        lab = self.lab
        application = Application(lab.directory / "dial-peer", lab.traffic.script)
        lab.serve()
        self.host, dial = lab.topology["client"], str(lab.server_endpoint)
        line = application.dial_line(dial, count=connections)
        pid = lab.engine.start(self.host, application, line)
        application.wait(all_open(connections), "connected")
        lab.traffic.client = application
        lab.traffic.keep()
        proto = "udp " if lab.udp else ""
        ends = tuple(f"{proto}{each.source} {each.destination}" for each in lab.traffic.kept)
        self.moving = Moving(application, "dial", pid, ends, lab.udp)
        self.party = lab.beside(CLIENT, "peer")
        self.party.site, self.party.wire_port = THIRD, self.party.port
        self.party.settle()
        self.party.orders, self.party.undone, self.party.crosses = [], [], False
        directory = lab.directory / "peer"
        directory.mkdir()
        self.party.translator = TRANSLATORS[lab.report.translator](directory)
        lab.peers = ((self.party.old, self.party.new),)
        self.party.peers = () if lab.crosses else (self._server(),)
        lab.select_frames = self._as_the_client_sees_them
        lab.traffic.talk()
        if pause:
            lab.traffic.quiet()

    def move(self) -> None:
        """Both are frozen, then both prepared, then both restored: the server first."""
        self.freeze()
        self.lab.prepare()
        self.prepare()
        self.lab.restore()
        self.restore()

    def freeze(self) -> None:
        """Both processes."""
        lab = self.lab
        lab.freeze()
        with lab.report.must("the engine freezes the client"):
            into = lab.directory / "frozen-peer"
            self.party.frozen = lab.engine.freeze(self.host, self.moving, into)

    def prepare(self) -> None:
        """The client's destination."""
        self.party.place_order(move_id="peer")
        with self.lab.report.must("the translator prepares the client's destination"):
            self.party.translator.prepare(self.party.order)

    def restore(self) -> None:
        """The client."""
        lab, party = self.lab, self.party
        self.host = lab.topology[THIRD.role]
        with lab.report.must("the engine restores the client"):
            opening = party.translator.opening(party.order)
            lab.engine.restore(self.host, self.moving, party.frozen, opening)
        lab.note_restored()

    def move_on(self, site: Seat) -> None:
        """The server moves on, and the client's destination learns where it is then."""
        lab, party = self.lab, self.party
        earlier, lab.site, lab.new = lab.order, site, site.address(lab.family)
        with lab.report.must("the gate closes before the freeze"):
            lab.translator.close(earlier)
        lab.freeze()
        lab.prepare()
        party.peers = (self._server(),)
        party.place_order(party.order, move_id="peer-2")
        with lab.report.must("the translator replaces the client's move"):
            party.translator.prepare(party.order)
        lab.restore()
        with lab.report.must("and opens it"):
            party.translator.opening(party.order).open()
        with lab.report.should("what is left of the earlier moves is undone"):
            lab.translator.retire(earlier)
            party.translator.retire(party.orders[0])
        lab.undone.append(earlier)

    def _server(self) -> tuple[Local, Local]:
        """Where the client's peer was, and where it is on the wire."""
        lab = self.lab
        if lab.wire_port == lab.port:
            return lab.old, lab.new
        return lab.server_endpoint, Endpoint(lab.new, lab.wire_port)

    def finish(self) -> None:
        """Check octets and four-tuples, take the client's move down, and judge as ever."""
        self.lab.traffic.check_ends()
        self.conclude()

    def conclude(self) -> None:
        """Without a look at the octets."""
        with self.lab.report.should("teardown of the client's move succeeds"):
            self.party.translator.teardown(self.party.order)
        self.lab.conclude()

    def _as_the_client_sees_them(self, frames: Frames) -> Frames:
        orders = (*self.lab.orders, *self.party.orders)
        names = {order.new: order.old for order in orders}
        ports = {self.lab.wire_port: self.lab.port}

        def known(end: Endpoint) -> Endpoint:
            address = names.get(end.address)
            return end if address is None else Endpoint(address, ports.get(end.port, end.port))

        def turn(frame: Frame) -> Frame:
            if (segment := frame.segment) is None:
                return frame
            ends = FourTuple(known(segment.tuple.source), known(segment.tuple.destination))
            return replace(frame, segment=replace(segment, tuple=ends))

        seen = [*frames["client"], *map(turn, frames[THIRD.role])]
        # On the client's side of a gateway the server is where it was.
        beyond = ("third", "third-gateway") if self.lab.crosses else ()
        return {**frames, "client": seen, **{point: [] for point in beyond}}
