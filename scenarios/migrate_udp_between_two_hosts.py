"""One command moves a server with UDP sockets there; there is no gateway, so the source relays.

                  ┌── client       10.1.0.2
    one switch ───┼── source       10.1.0.10 (OLD), then the relay: 10.1.0.11 (FROM)
                  └── destination  10.1.0.20 (NEW): natkeep migrate source:PID local

CRIU locks no UDP, so the relay's gate stands before the dump has ended: no peer is told that a port
is unreachable. `natkeep finish` waits until the sockets are silent.
"""

from natkeep.lab.relay import FLAT, ByRelay
from natkeep.lab.ssh import Machines

SETUP = {**FLAT, "engine": "criu", "udp": True}


def run(lab):
    by = ByRelay(lab)
    by.stand()
    machines = Machines(lab, "source", controller="destination", addresses={"source": by.source})
    for name in ("udp_timeout", "udp_timeout_stream"):  # after which a socket counts as silent
        lab.topology["destination"].run("sysctl", "-qw", f"net.netfilter.nf_conntrack_{name}=2")
    lab.begin(connections=3, pause=True)
    lab.traffic.connect()
    said = machines.migrate()
    by.note_wires(machines.status("source"))
    lab.report.check("the source is the relay", f"as a relay from {by.source}" in said, said)
    lab.traffic.talk()
    lab.traffic.talk_on()
    lab.traffic.quiet()
    lab.traffic.check_ends()
    with lab.report.must("natkeep finish undoes it everywhere"):
        machines.call("finish", "web", "--drain", "30")
    lab.conclude()
