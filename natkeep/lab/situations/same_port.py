"""The same port again: a kept connection ends, and the peer dials OLD from the port that it had.

What was kept is a tuple of two hosts; its translation must not outlive the connection in the way
of the next one, which goes where every new connection goes.
"""

from __future__ import annotations

import time
from functools import partial

from natkeep.lab.application import Application, all_open, received, start_server
from natkeep.lab.engine import end_silence
from natkeep.lab.host import await_true
from natkeep.lab.lab import Frames, Lab
from natkeep.lab.situations import situation
from natkeep.lab.situations.half_closed import tcp_state
from natkeep.lab.topology import CLIENT
from natkeep.plan.tuples import Endpoint

_WITHIN_S = 12.0  # a SYN that was dropped comes again after 1, 3 and 7 s
_OCTETS = 4096
again = partial(situation, 29, probes=(True,))


@again("port dialled from again, the listener has moved", engine="criu")
def to_new(lab: Lab) -> None:
    """The process listens on, so it is where the next connection comes to."""
    lab.listeners = True
    _keep_and_close(lab)
    _dial_again(lab)
    lab.conclude()


@again("port dialled from again, the old host serves")
def to_old(lab: Lab) -> None:
    """Another server took the place of the one that moved; new connections are its own."""
    _keep_and_close(lab)
    source = lab.topology["source"]
    end_silence(source)
    start_server(source, "successor", lab.server_endpoint)
    _dial_again(lab)
    lab.conclude()


def _keep_and_close(lab: Lab) -> None:
    lab.serve()
    lab.dial(source=Endpoint(CLIENT.address(lab.family), 40_000))
    lab.traffic.talk()
    lab.traffic.quiet()
    lab.move()
    lab.traffic.client_says()
    lab.traffic.server_closes()
    lab.traffic.client_closes()
    (kept,) = lab.traffic.kept
    client = lab.topology["client"]
    await_true(lambda: not tcp_state(client, kept), "the end of the connection in the kernel")
    lab.traffic.check_ends()
    # What was kept is judged by what was captured until here.
    lab.select_frames = partial(_until, time.time_ns())


def _dial_again(lab: Lab) -> None:
    """From the very same port; the next connection has octets of its own."""
    (kept,) = lab.traffic.kept
    client = Application(lab.directory / "again")
    line = client.dial_line(str(kept.destination), source=str(kept.source))
    with lab.report.must("the next connection from the same port is let in and answered"):
        lab.topology["client"].start("again", *line)
        client.wait(all_open(1), "to be let in", within=_WITHIN_S)
        client.do({"push": _OCTETS})
        client.wait(received(_OCTETS), "an answer in full")


def _until(end_ns: int, frames: Frames) -> Frames:
    return {at: [frame for frame in some if frame.at_ns < end_ns] for at, some in frames.items()}
