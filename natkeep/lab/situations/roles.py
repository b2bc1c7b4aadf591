"""Other roles: which side dialled, over which family's socket, and how many processes moved.

The direction from peer to process is always the original one, whichever side dialled: then the
same translation fits all of them.
"""

from __future__ import annotations

from natkeep.lab.application import Application, all_open, received, start_server
from natkeep.lab.engine import Moving
from natkeep.lab.lab import Lab
from natkeep.lab.situations import situation, usual_end
from natkeep.lab.topology import CLIENT, USUAL, Seat
from natkeep.lab.traffic_words import PORT
from natkeep.plan.tuples import Endpoint

SECOND_SOURCE = Seat("source2", "old", 11, first_pid=2000)
TWO_SOURCES = {"seats": (*USUAL, SECOND_SOURCE)}
FIRST_PORT, OTHER_PORT = 40_000, 41_000


@situation(14, "the process is the client")
def process_dialled(lab: Lab) -> None:
    """The migrated process dialled, from OLD and a port that the kernel chose."""
    begin_dialled(lab)
    usual_end(lab)


def begin_dialled(lab: Lab) -> None:
    """As Lab.begin, with three connections that the process at the source dials."""
    lab.settle()
    to = Endpoint(CLIENT.address(lab.family), PORT)
    script = lab.traffic.script
    lab.traffic.client = start_server(lab.topology["client"], "peer", to, script=script)
    process = Application(lab.directory / "process", script)
    lab.at = lab.topology["source"]
    program = lab.at.start("process", *process.dial_line(str(to), count=3))
    lab.traffic.server = Moving(process, "dial", program.pid, udp=lab.udp)
    if lab.udp:  # a server hears of its peers by what they say
        process.do({"push": 64})
        process.wait(received(64), "answered")
    lab.traffic.client.wait(all_open(3), "connected")
    process.do("answer")
    lab.traffic.keep()
    lab.traffic.talk()


@situation(15, "IPv4-mapped sockets", engine="criu", families=(4,), probes=(True,))
def mapped(lab: Lab) -> None:
    """The server listens on [::] for both families, and the peer speaks IPv4."""
    lab.begin(connections=3, listen=f"[::]:{PORT}")
    usual_end(lab)


@situation(15, "IPv4-mapped sockets, without CRIU", families=(4,))
def mapped_by_repair(lab: Lab) -> None:
    """The same; without a probe, too."""
    mapped(lab)


@situation(18, "two processes, one NEW", setup=TWO_SOURCES)
def two_processes(lab: Lab) -> None:
    """Two OLDs become one NEW, at the same port of it; what differs is the peer's port."""
    other = _begin_two(lab, OTHER_PORT)
    lab.move()
    other.move()
    lab.traffic.talk_on()
    other.traffic.talk_on()
    other.traffic.check_ends()
    lab.finish()


@situation(18, "two processes, one tuple at NEW", probes=(True,), setup=TWO_SOURCES)
def one_tuple(lab: Lab) -> None:
    """The peer's ports are equal too: only one of the two can move, and the other one stays."""
    other = _begin_two(lab, FIRST_PORT)
    lab.move()
    lab.traffic.talk_on()
    other.freeze()
    tuples = [str(each) for party in (lab, other) for each in party.traffic.kept]
    if other.must_refuse(*tuples):
        other.restore_at_source()
    else:
        other.restore()
    lab.traffic.talk_on()
    other.traffic.talk_on()
    other.traffic.check_ends()
    lab.finish()


def _begin_two(lab: Lab, port: int) -> Lab:
    """Two servers on two hosts, with one client each; the second's connections come from *port*."""
    other = lab.beside(SECOND_SOURCE, "other")
    for each, first in ((lab, FIRST_PORT), (other, port)):
        each.begin(source=Endpoint(CLIENT.address(lab.family), first))
    return other
