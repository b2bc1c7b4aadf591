"""One command on the destination moves a server there; there is no gateway, so the source relays.

                  ┌── client       10.1.0.2
    one switch ───┼── source       10.1.0.10 (OLD), then the relay: 10.1.0.11 (FROM)
                  └── destination  10.1.0.20 (NEW): natkeep migrate source:PID local

What the destination's own check says of a gateway here is why: no peer's packet passes through it.
So the source goes on receiving what is sent to OLD. `natkeep finish` ends that.
"""

from natkeep.lab.relay import FLAT, ByRelay
from natkeep.lab.ssh import Machines

SETUP = {**FLAT, "engine": "criu"}


def run(lab):
    by = ByRelay(lab)
    by.stand()
    machines = Machines(lab, "source", controller="destination", addresses={"source": by.source})
    lab.begin(connections=3)
    said = machines.migrate()
    by.note_wires(machines.status("source"))
    lab.report.check("the source is the relay", f"as a relay from {by.source}" in said, said)
    lab.traffic.talk_on()
    by.check_strangers()
    lab.traffic.check_ends()
    lab.traffic.server_closes()
    lab.traffic.client_closes()
    with lab.report.must("natkeep finish undoes it everywhere"):
        machines.call("finish", "web", "--drain", "30")
    lab.conclude()
