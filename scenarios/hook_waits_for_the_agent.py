"""NEW is known at the restore only; the hook asks the node's agent, and the gateway's is slow.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│──────────────────│NEW⇄OLD│──────────────────│ server │
    └──────┘                  └───────┘    anti-spoof    └───────┘                  └────────┘
                                agent         store        agent ◀── agent.sock ── natkeep-hook
                           3. prepared and   a directory   2. says NEW              1. prepares, and
                              open, 1 s later                                          waits

Ordered is OLD=auto. While an agent is dead, the hook ends the restore after NATKEEP_WAIT seconds,
before there is a socket, and the same image is restored again. Without the wait CRIU's sockets
speak as NEW to peers that do not know it, and each of these resets it.
"""

import threading
import time

from natkeep.lab.capture import RST
from natkeep.lab.criu_restore import CriuRestore
from natkeep.lab.fleet import Fleet
from natkeep.lab.time_scale import scaled

SETUP = {"engine": "criu"}
CONNECTIONS = 20
SLOW_S = 1.0
"""How much later the gateway's agent acts than it could."""


def run(lab, waits=True):
    """waits: whether the hook waits for the gateway; otherwise every peer resets NEW."""
    lab.begin(connections=CONNECTIONS)
    fleet = Fleet(lab)
    lab.freeze()
    order = lab.place_order()
    with lab.report.must("it is ordered"):
        fleet.apply(order, maps=[f"{order.old}=auto"])
    fleet.stop("gateway")
    moved = CriuRestore(lab)
    moved.cli = fleet
    orders = {"NATKEEP_MAP": f"{order.old}=auto"}
    socket = str(fleet.journal("destination", order.id).with_name("agent.sock"))
    if waits:
        orders["NATKEEP_AGENT"] = socket
        briefly = {**orders, "NATKEEP_WAIT": str(scaled(3))}
        orders["NATKEEP_WAIT"] = str(scaled(20))
        moved.must_abort("has not got the gateways ready", briefly)
        fleet.kill("destination")
        moved.must_abort("no agent answers", briefly)
        fleet.start("destination")
    slow = threading.Thread(target=go_on_later, args=(fleet, fleet.hooks()))
    slow.start()
    began = time.monotonic()
    moved.restore(orders)
    slow.join()
    if waits:
        lab.report.check("CRIU has waited", time.monotonic() - began > SLOW_S)
    with lab.report.must("all is open"):
        fleet.call("fleet", "wait", order.id, "--for", "open")
    lab.traffic.talk_on()
    lab.finish()
    if waits:
        moved.check_aborts_sent_nothing()
    else:
        check_resets(lab)


def check_resets(lab):
    """Each peer has said to NEW that it does not know it."""
    frames = lab.captures["client"].frames()
    resets = {f.segment.tuple for f in frames if f.segment and f.segment.flags & RST}
    ours = [each for each in resets if each.destination.address == lab.new]
    lab.report.check("each peer has reset NEW", len(ours) == CONNECTIONS, f"{len(ours)} peers")


def go_on_later(fleet, before):
    """The gateway's agent acts that much later than a hook of another id than *before* prepares."""
    until = time.monotonic() + scaled(60)
    while fleet.hooks() <= before and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(SLOW_S)  # that much later it comes: no state to wait for
    fleet.go_on("gateway")
