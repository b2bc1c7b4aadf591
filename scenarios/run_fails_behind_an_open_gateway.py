"""`natkeep run` fails while the gateway, a move of its own, is open; the process goes back.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD)
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│       │══════════════════│ server │   restored from the same image
    └──────┘  4 connections   └───┬───┘                  └────────┘
                                  │ 10.3.0.20:5000       ┌────────┐
                                  └─────────────────────▶│ gate ✗ │   destination 10.3.0.20 (NEW)
                                                         └────────┘

CRIU finds the server's pid taken. `run` leaves its gate closed, since the gateway is no site of its
move, and peers that talk meanwhile hear nothing. The way back: `natkeep rollback` on each machine.
"""

import time

from natkeep.lab.criu_restore import CriuRestore, Machine

SETUP = {"engine": "criu"}
CONNECTIONS, OCTETS = 4, 200


def run(lab):
    lab.begin(connections=CONNECTIONS)
    gateway, destination = (
        Machine(lab, "gateway"),
        Machine(lab, "destination", state="natkeep-state"),
    )
    before = [machine.ruleset() for machine in (gateway, destination)]
    lab.freeze()
    moved = CriuRestore(lab)
    order = lab.place_order(move_id="web")
    destination.prepare("web", *lab.frozen.options)
    gateway.prepare("web", *lab.frozen.options, "--gate", "open")
    moved.take_pid(lab.traffic.server.pid)
    moved.must_fail(1, "stays prepared", moved.start_run(order, sites=[destination.site]))
    lab.traffic.client.do({"push": OCTETS})
    time.sleep(0.5)  # for that to arrive, and an answer to leave: none is waited for
    gateway.refuses("nothing has come from NEW: a rollback?", "teardown", "web")
    gateway.natkeep("rollback", "web")
    lab.restore_at_source()
    lab.traffic.talk_on()
    destination.natkeep("rollback", "web")
    destination.natkeep("gc", "--site", destination.site)
    after = [machine.ruleset() for machine in (gateway, destination)]
    lab.report.check("both machines' tables are as before", before == after)
    lab.finish(moved=False)
