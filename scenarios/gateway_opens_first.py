"""The gateway is open before the destination is prepared, which has no such socket and resets.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    └──────┘  2 connections   └───────┘    anti-spoof    └───────┘                  └────────┘
                              1. open              2. resets  3. natkeep run

Its resets come as far as the gateway, which has not heard anything else of NEW yet. The peers say
again what was lost, and are answered once the process is there.
"""

import time
from functools import partial

from natkeep.lab.capture import RST
from natkeep.lab.criu_restore import CriuRestore, Machine
from natkeep.lab.host import await_true

SETUP = {"engine": "criu"}
EARLY = 10.0
"""Seconds from the gateway's opening in which the peers say all again, and are reset."""


def run(lab):
    lab.begin(connections=2)
    lab.freeze()
    gateway, moved = Machine(lab, "gateway"), CriuRestore(lab)
    order = lab.place_order(move_id="web")
    gateway.prepare("web", *lab.frozen.options, "--gate", "open")
    with lab.report.must("the destination's host resets peers"):
        await_true(lambda: find_resets(lab.captures["far"].frames()), "a reset", seconds=EARLY)
    running = moved.start_run(order)
    await_true(partial(is_shut, lab), "natkeep's gate at the destination")
    ready_ns = time.time_ns()

    def without_early_resets(frames):
        """What the destination's host says for no socket, on the wire to the gateway alone."""
        for at in ("far", "destination"):
            early = [frame for frame in find_resets(frames[at]) if frame.at_ns < ready_ns]
            frames[at] = [frame for frame in frames[at] if frame not in early]
        return frames

    lab.select_frames = without_early_resets
    moved.must_succeed(running)
    lab.traffic.talk_on()
    lab.traffic.check_ends()
    gateway.natkeep("teardown", "web", "--yes")
    lab.conclude()


def is_shut(lab):
    """Whether natkeep's gate at the destination asks for each peer: nothing resets it any more."""
    rules = lab.topology["destination"].run("nft", "list", "ruleset").stdout
    ends = (f"{each.source.address} . {each.source.port} ." for each in lab.traffic.kept)
    return all(end in rules for end in ends)


def find_resets(frames):
    return [frame for frame in frames if frame.segment and frame.segment.flags & RST]
