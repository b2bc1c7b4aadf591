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
before; after 3, where half a server was left behind in repair, it vanishes without a word.
"""

from natkeep.lab.criu_restore import Doors
from natkeep.lab.host_state import difference, read_surfaces
from natkeep.lab.report import Assertion

SETUP = {"engine": "criu"}
KILL = '[ "$CRTOOLS_SCRIPT_ACTION" != post-restore ] || kill -9 $PPID'


def tell(lab):
    lab.serve()
    lab.dial()
    lab.talk()
    lab.freeze()
    doors = Doors(lab)
    order = doors.order("lab")
    sites = [f"gateway={order.gateway.name}", "destination"]
    hosts = (order.gateway, order.destination)
    before = [read_surfaces(host) for host in hosts]

    def undone(when):
        after = [read_surfaces(host) for host in hosts]
        left = "; ".join(filter(None, map(difference, before, after)))
        name = f"nothing is left {when}"
        lab.report.assertions.append(Assertion(name, not left and not doors.moves(), left))

    doors.take_pid(lab.server.pid)
    doors.must_fail(1, "everything was undone", doors.start_run(order, sites=sites))
    undone("when CRIU fails")
    keep = "--keep-closed-on-failure"
    doors.must_fail(1, "stays prepared", doors.start_run(order, keep, sites=sites))
    doors.host.kill(lab.server.pid)
    killing = doors.script("kill", KILL)
    doors.must_fail(1, "killed by SIGKILL", doors.start_run(order, sites=sites, criu=killing))
    undone("when CRIU is killed")
    gone = not doors.host.alive(lab.server.pid)
    lab.report.assertions.append(Assertion("no half of a server is left", gone))
    doors.must_succeed(doors.start_run(order, sites=sites))
    lab.talk_on()
    lab.finish()
