"""Peers with no gateway on their way, and others that NEW serves.

A peer on the destination itself reaches OLD over lo from then on, without a translation; one
that stays behind on the source host can be reached by no means, and is refused beforehand
(hazards H26, H28 and H29, point T13).
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

from natkeep.lab.application import (
    Application,
    answered,
    octets_agree,
    start_client,
    start_server,
    tuple_of,
)
from natkeep.lab.host import LabError, await_true
from natkeep.lab.lab import Lab
from natkeep.lab.report import Assertion
from natkeep.lab.situations import TWO_CLIENTS, situation, usual_end
from natkeep.lab.topology import CLIENT, SECOND_CLIENT, Seat
from natkeep.lab.traffic_words import PORT
from natkeep.lab.unkept import LOOPBACK, dial_locally
from natkeep.plan.tuples import Endpoint, FourTuple

OTHERS_PORT, KEPT_PORT = 42_000, 40_000

refused = partial(situation, probes=(True,), may_refuse=("stateful", "stateless"))


@situation(19, "the peer is on the destination", setup={"points": {"lo": ("destination", "lo")}})
def peer_at_destination(lab: Lab) -> None:
    """The peer's address is NEW; after the move both talk over lo."""
    lab.peer_points = ["destination", "lo"]
    lab.serve()
    lab.dial(role="destination", connections=3)
    lab.traffic.talk()
    lab.freeze()
    lab.prepare()
    lab.clean_from_ns = time.time_ns()  # until then OLD was elsewhere, and addressed by its peer
    lab.restore()
    lab.traffic.talk_on()
    lab.finish()


@refused(20, "the peer is on the source")
def peer_at_source(lab: Lab) -> None:
    """Both ends have OLD; only one of them moves."""
    lab.serve()
    lab.dial(role="source")
    _refuse(lab, "is on the source host too")


@refused(20, "the peer is loopback")
def peer_is_loopback(lab: Lab) -> None:
    """An address that is never on a wire."""
    lab.serve()
    lab.dial(role="source", source=LOOPBACK[lab.family])
    _refuse(lab, "is not on any wire")


def _refuse(lab: Lab, reason: str) -> None:
    lab.traffic.talk()
    lab.freeze()
    if not lab.must_refuse(reason):
        lab.restore()
        lab.traffic.talk_on()
    lab.finish()


@situation(20, "peers on source, loopback and a wire", engine="criu", probes=(True,))
def mixed(lab: Lab) -> None:
    """What can be kept is kept, although the image has connections that cannot."""
    lab.serve()
    dial_locally(lab)
    lab.dial(connections=3)
    lab.traffic.talk()
    usual_end(lab)


@situation(22, "NEW serves the same port to others", setup=TWO_CLIENTS)
def others_at_new(lab: Lab) -> None:
    """The same client host, with other ports, and another one; all the while they talk."""
    lab.settle()
    others = _Others(lab)
    lab.begin(connections=3, source=Endpoint(CLIENT.address(lab.family), KEPT_PORT))
    others.talk_on("before")
    lab.move()
    lab.traffic.talk_on()
    others.talk_on("after")
    others.end()
    lab.finish()


@refused(22, "NEW has the very same tuple", setup=TWO_CLIENTS)
def same_tuple_at_new(lab: Lab) -> None:
    """The same client host with the same port: of the two only one could be told from the other."""
    lab.settle()
    others = _Others(lab, KEPT_PORT)
    lab.begin(source=Endpoint(CLIENT.address(lab.family), KEPT_PORT))
    lab.freeze()
    (kept,) = lab.traffic.kept
    if not lab.must_refuse(str(FourTuple(kept.source, Endpoint(lab.new, PORT)))):
        lab.restore()
        lab.traffic.talk_on()
    others.talk_on("after")
    lab.finish()


class _Others:
    """A server on NEW with clients on two hosts, none of which knows of the move."""

    def __init__(self, lab: Lab, port: int = OTHERS_PORT) -> None:
        self.lab, self.port = lab, port
        target = Endpoint(lab.new, PORT)
        self.server = start_server(lab.topology[lab.site.role], "others-serve", target)
        self.clients = [self._dial(seat, target) for seat in (CLIENT, SECOND_CLIENT)]
        lab.others += [each for client in self.clients for each in _tuples(client)]

    def _dial(self, seat: Seat, target: Endpoint) -> Application:
        host, source = (
            self.lab.topology[seat.role],
            Endpoint(seat.address(self.lab.family), self.port),
        )
        client = start_client(host, f"others-{seat.role}", target, count=2, source=source)
        client.do({"talk": {"interval_ms": 10, "size": 64}})
        return client

    def talk_on(self, when: str) -> None:
        for client in self.clients:
            more = 10 + max(each["answered"] for each in client.fresh()["connections"])
            with self.lab.report.should(f"others at NEW are served {when} the move"):
                client.wait(answered(more), "10 more answers each")

    def end(self) -> None:
        """Every octet of theirs has arrived, too."""
        for client in self.clients:
            client.do("quiet")
            with suppress(LabError):
                await_true(partial(self._agrees, client), "it all to arrive")
            found = self._agree(client)
            self.lab.report.assertions.append(replace(found, name=f"others at NEW: {found.name}"))

    def _agrees(self, client: Application) -> bool:
        return self._agree(client).ok

    def _agree(self, client: Application) -> Assertion:
        views = {each: each for each in _tuples(client)}
        return octets_agree(client.fresh(), self.server.fresh(), views)


def _tuples(client: Application) -> list[FourTuple]:
    return [tuple_of(each) for each in client.fresh()["connections"]]
