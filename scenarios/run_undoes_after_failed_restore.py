"""`natkeep run` meets a CRIU that fails, undoes everything, and succeeds when it is run again.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│──────────────────│NEW⇄OLD│──────────────────│ server │
    └──────┘                  └───────┘    anti-spoof    └───────┘                  └────────┘
                                                         1. the server's pid is taken: CRIU fails
                                                         2. the same, kept closed for a retry
                                                         3. CRIU is killed when the sockets exist
                                                         4. restored

CRIU calls no hook when a restore fails. After 1 and 3 gateway and destination are byte-identical to
before; after 3, where half a server was left behind in repair, it vanishes without a segment.
"""

from natkeep.lab.criu_restore import CriuRestore
from natkeep.lab.host_state import difference, read_surfaces

SETUP = {"engine": "criu"}
KILL = '[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ] || kill -9 $PPID'


def run(lab):
    lab.begin()
    lab.freeze()
    moved = CriuRestore(lab)
    order = lab.place_order(move_id="lab")
    sites = [f"gateway={order.gateway.name}", "destination"]
    hosts = (order.gateway, order.destination)
    before = [read_surfaces(host) for host in hosts]

    def undone(when):
        after = [read_surfaces(host) for host in hosts]
        left = "; ".join(filter(None, map(difference, before, after)))
        name = f"nothing is left {when}"
        lab.report.check(name, not left and not moved.moves(), left)

    moved.take_pid(lab.traffic.server.pid)
    moved.must_fail(1, "everything was undone", moved.start_run(order, sites=sites))
    undone("when CRIU fails")
    keep = "--keep-closed-on-failure"
    moved.must_fail(1, "stays prepared", moved.start_run(order, keep, sites=sites))
    moved.host.kill(lab.traffic.server.pid)
    killing = moved.script("kill", KILL)
    moved.must_fail(1, "killed by SIGKILL", moved.start_run(order, sites=sites, criu=killing))
    undone("when CRIU is killed")
    left = moved.host.alive(lab.traffic.server.pid)
    lab.report.check("no half of a server is left", not left)
    moved.must_succeed(moved.start_run(order, sites=sites))
    lab.traffic.talk_on()
    lab.finish()
