"""The destination is rolled back while the gateway still sends there; no peer hears of it.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD)
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│       │══════════════════│ server │   restored from the same image
    └──────┘  4 connections   └───┬───┘                  └────────┘
                                  │ 10.3.0.20:5000       ┌────────┐
                                  └─────────────────────▶│  drop  │   destination 10.3.0.20 (NEW)
                                                         └────────┘   has no such socket any more

Each machine has a move of its own, prepared and never opened at the destination. Whichever is
rolled back first: what comes to the destination is dropped there, by its gate or what stays of it,
until peers reach the source again. `gc` leaves no trace of it.
"""

import time

from natkeep.lab.application import received
from natkeep.lab.criu_restore import Machine

CONNECTIONS, OCTETS = 4, 200
ORDER = ("destination", "gateway")


def run(lab, order=ORDER):
    lab.serve()
    lab.dial(connections=CONNECTIONS)
    lab.traffic.client.do({"push": OCTETS})
    lab.traffic.client.wait(received(OCTETS), "answers")  # so what is said next leaves at once
    machines = {role: Machine(lab, role) for role in ("gateway", "destination")}
    before = [machine.ruleset() for machine in machines.values()]
    lab.freeze()
    for machine in machines.values():
        machine.prepare("web", "--mode", lab.mode, *lab.frozen.options)
    machines["gateway"].natkeep("open", "web")
    undone_ns = {}
    for role in order:
        machines[role].natkeep("rollback", "web")
        undone_ns[role] = time.time_ns()
        lab.traffic.client.do({"push": OCTETS})
        time.sleep(0.5)  # for that to arrive, and an answer to leave: none is waited for
    lab.restore_at_source()
    with lab.report.must("all of it is answered"):
        goal = OCTETS * (1 + len(order))
        lab.traffic.client.wait(received(goal), "answers", within=10)
    lab.traffic.talk()
    lab.traffic.talk_on()
    destination = machines["destination"]
    destination.natkeep("gc", "--site", destination.site)
    after = [machine.ruleset() for machine in machines.values()]
    lab.report.check("both machines' tables are as before", before == after)
    lab.finish(moved=False)
    check_silence(lab, undone_ns)


def check_silence(lab, undone_ns):
    """Nothing answered at the destination, though peers' packets came while it was undone."""
    frames = [f for f in lab.captures["destination"].frames() if f.segment]
    said = [f for f in frames if f.segment.tuple.source.address in (lab.old, lab.new)]
    detail = "; ".join(frame.summary for frame in said[:3])
    lab.report.check("the destination never said anything", not said, detail)
    if undone_ns["destination"] < undone_ns["gateway"]:
        came = [f for f in frames if undone_ns["destination"] < f.at_ns < undone_ns["gateway"]]
        lab.report.check("while it was undone peers' packets came", bool(came), f"{len(came)}")
