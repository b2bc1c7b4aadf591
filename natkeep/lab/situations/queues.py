"""Full queues: what was under way, or waited, when the process was frozen.

CRIU sends what was unsent while it restores the socket, some 25 ms before it calls its last
script: the translation must be there by then, and the gate must not drop the answers for good
(point T1).
"""

from __future__ import annotations

import re
from functools import partial

from natkeep.lab.application import Application, received
from natkeep.lab.engine import end_silence
from natkeep.lab.host import Host, await_true
from natkeep.lab.lab import Lab
from natkeep.lab.situations import situation

MUCH = 3_000_000  # more than all buffers of a connection hold
PATIENCE_S = 5.0  # so long the octets themselves may take, at most

queued = partial(situation, engine="criu", probes=(True,))


@queued(13, "unsent data at the freeze")
def unsent(lab: Lab) -> None:
    """The congestion window was full, so there are octets that were never on a wire."""
    _begin(lab)
    goal = _freeze_unsent(lab)
    lab.prepare()
    lab.restore()
    _arrive(lab, lab.traffic.client, goal)
    lab.finish()


@queued(13, "unsent data at the freeze, moved back")
def unsent_moved_back(lab: Lab) -> None:
    """They leave from A while the gateway still has them at B: it must not translate them."""
    _begin(lab)
    lab.move()
    lab.traffic.server_says()
    goal = _freeze_unsent(lab)
    end_silence(lab.topology[lab.home.role])  # nothing of the first dump is left there
    lab.withdraw()
    _arrive(lab, lab.traffic.client, goal)
    lab.finish()


def _freeze_unsent(lab: Lab) -> int:
    """Freeze the process with octets to be sent; how many the client will have with them."""
    with lab.conditions.loses(lab.at.role, "meta l4proto tcp"):
        goal = _read(lab.traffic.client) + MUCH
        lab.traffic.process.do({"push": MUCH})
        await_true(lambda: _unsent(lab.at) > 0, "data that cannot be sent")
        lab.freeze()
    return goal


@queued(13, "full queues both ways")
def full(lab: Lab) -> None:
    """Neither side reads: all receive and send queues are full, both windows closed."""
    _begin(lab)
    ends = (lab.traffic.client, lab.traffic.process)
    goals = [_read(each) + MUCH for each in ends]
    for order in ("pause_reading", {"push": MUCH}):
        for each in ends:
            each.do(order)
    for host in (lab.topology["client"], lab.at):
        await_true(partial(_is_full, host), "full queues")
    lab.move()
    for each in ends:
        each.do("resume_reading")
    for each, goal in zip(ends, goals, strict=True):
        _arrive(lab, each, goal)
    lab.finish()


@queued(13, "bulk both ways at the freeze")
def bulk(lab: Lab) -> None:
    """Both send as fast as they can, before and after."""
    _begin(lab)
    ends = (lab.traffic.client, lab.traffic.process)
    for each in ends:
        each.do({"bulk": None})
    for each in ends:
        _arrive(lab, each, _read(each) + MUCH)
    lab.move()
    for each in ends:
        _arrive(lab, each, _read(each) + MUCH)
    for each in ends:
        each.do("quiet")
    lab.finish()


def _begin(lab: Lab) -> None:
    """After some exchanges the server answers nothing any more."""
    lab.begin(pause=True)
    lab.traffic.process.do("swallow")


def _read(reader: Application) -> int:
    octets: int = reader.fresh()["connections"][0]["rx"]
    return octets


def _arrive(lab: Lab, reader: Application, goal: int) -> None:
    with lab.report.must(f"{goal:,} octets arrive"):
        within = PATIENCE_S + lab.traffic.patience_s
        reader.wait(received(goal), f"for {goal} octets", within=within)
    lab.traffic.carried_on = True


def _unsent(host: Host) -> int:
    """Octets in the host's send queue that were never on a wire."""
    found = re.findall(r"notsent:(\d+)", _sockets(host))
    return max((int(each) for each in found), default=0)


def _is_full(host: Host) -> bool:
    """Whether the host has more to send, and waits for its peer to read: it probes the window."""
    return _unsent(host) > 0 and "timer:(persist" in _sockets(host)


def _sockets(host: Host) -> str:
    return host.run("ss", "-Htnio", "state", "connected").stdout
