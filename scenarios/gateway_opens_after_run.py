"""Each machine by itself: gateway prepared closed, `natkeep run` restores, the gateway opens.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    └──────┘  2 connections   └───────┘    anti-spoof    └───────┘                  └────────┘
                              1. closed   3. open        2. natkeep run: fails, fails, restores

Whatever a run that fails leaves at the destination: nothing answers the peers, since the gateway is
still closed.
"""

from natkeep.lab.criu_restore import CriuRestore, Machine

SETUP = {"engine": "criu"}


def run(lab):
    lab.begin(connections=2)
    lab.freeze()
    gateway, moved = Machine(lab, "gateway"), CriuRestore(lab)
    order = lab.place_order(move_id="web")
    gateway.prepare("web", *lab.frozen.options)
    failing = moved.script("failing", '[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ]')
    for _ in range(2):
        moved.must_fail(1, "criu restore exited", moved.start_run(order, criu=failing))
    moved.must_succeed(moved.start_run(order))
    gateway.natkeep("open", "web")
    lab.traffic.talk_on()
    lab.traffic.check_ends()
    gateway.natkeep("teardown", "web", "--yes")
    lab.conclude()
