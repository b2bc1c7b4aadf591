"""A process that has moved to B is to move on to C, whose restore fails; it goes back to B.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│ server │ destination B 10.3.0.20 (NEW)
    └──────┘  4 connections   └───┬───┘                  └────────┘ restored from its second image
                                  │ 10.4.0.30:5000       ┌────────┐
                                  └ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ▶│ gate ✗ │ third C 10.4.0.30
                                                         └────────┘

Each machine has a move of its own. A rollback at the gateway would lead peers' packets to A, where
there is no process; it is refused, and says how B gets them: the gateway replaces once more.
"""

import time

from natkeep.lab.criu_restore import Machine
from natkeep.lab.engine import Opening, end_silence
from natkeep.lab.topology import THIRD, USUAL

SETUP = {"seats": (*USUAL, THIRD)}
CONNECTIONS, OCTETS = 4, 200


def run(lab):
    lab.begin(connections=CONNECTIONS, pause=True)
    gateway, second, third = (Machine(lab, role) for role in ("gateway", "destination", "third"))
    lab.freeze()
    order = lab.place_order(move_id="web")
    second.prepare("web", "--mode", lab.mode, *lab.frozen.options)
    gateway.prepare("web", "--mode", lab.mode, *lab.frozen.options, "--gate", "open")
    restore(lab, second, second.hook("web"))
    lab.traffic.client_says()

    lab.freeze()
    lab.new = THIRD.address(lab.family)
    lab.place_order(move_id="web2")
    more = ["--mode", lab.mode, *lab.frozen.options]
    third_site = f"destination={third.host.name}"
    third.natkeep("prepare", "web2", *third.map(), "--site", third_site, *more)
    gateway.prepare("web2", "--replace", "web", "--gate", "open", *more)
    lab.traffic.client.do({"push": OCTETS})
    time.sleep(0.5)  # for that to arrive, and an answer to leave: none is waited for
    gateway.refuses(f"web2 took the place of web ({lab.old}={order.new})", "rollback", "web2")
    lab.new = order.new
    gateway.prepare("web", "--replace", "web2", "--gate", "open", *more)
    restore(lab, second, Opening(lambda: None))
    end_silence(second.host)
    lab.traffic.client_says()
    third.natkeep("rollback", "web2", "--drop", "0")
    lab.traffic.client_says()
    lab.traffic.check_ends()
    gateway.natkeep("teardown", "web", "--yes")
    second.natkeep("teardown", "web", "--yes")
    lab.undone += lab.orders
    lab.conclude()


def restore(lab, machine, opening):
    with lab.report.must(f"the server is restored at the {machine.role}"):
        lab.at = machine.host
        lab.engine.restore(lab.at, lab.traffic.server, lab.frozen, opening)
    lab.note_restored()
