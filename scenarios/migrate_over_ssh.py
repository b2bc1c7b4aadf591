"""One command on the gateway moves a server over ssh; its clients notice nothing.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD)
    ┌──────┐  10.2.0.10:5000  ┌─────────┐ ssh    ┌────────┐
    │ peer │══════════════════│ natkeep │────────│ server │
    └──────┘  20 connections  │ migrate │        └────────┘
                              │         │ ssh    ┌────────┐
                              └─────────┘────────│ server │   destination 10.3.0.20 (NEW)
                                                 └────────┘

OLD is read from the process' sockets and NEW from the destination's route to the peers. The
gateway is the host that it runs on. `natkeep finish` undoes it on all three, when the
connections have ended.
"""

from natkeep.lab.ssh import Machines

SETUP = {"engine": "criu"}


def run(lab):
    machines = Machines(lab, "source", "destination", controller="gateway")
    lab.begin(connections=20)
    before = lab.topology["source"].run("nft", "list", "ruleset").stdout
    said = machines.migrate()
    lab.report.check("all peers were heard", "20 of 20 peers were heard" in said, said)
    machines.finish()
    left = lab.topology["source"].run("nft", "list", "ruleset").stdout
    lab.report.check("the source's ruleset is as before", left == before, left)
    lab.conclude()
