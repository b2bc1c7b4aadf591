"""One command moves a container of runc over ssh; its clients notice nothing.

    client 10.1.0.2            gateway               container 10.2.0.10 (OLD)
    ┌──────┐  10.2.0.10:5000  ┌─────────┐ runc     ┌───────────┐
    │ peer │══════════════════│ natkeep │ checkpoint───────────┘
    └──────┘  4 connections   │ migrate │ runc     ┌───────────┐
                              │   ssh   │ restore  │ container │ 10.3.0.20 (NEW)
                              └─────────┘──────────┴───────────┘

Both containers have network namespaces of their own, in which natkeep's sites are; natkeep and
runc are beside them. The hook is called though nothing of the containers names it.
"""

from natkeep.lab.ssh import ContainerMachines

SETUP = {"engine": "runc"}


def run(lab):
    machines = ContainerMachines(lab, "source", "destination", controller="gateway")
    lab.begin(connections=4)
    said = machines.migrate()
    lab.report.check("all peers were heard", "4 of 4 peers were heard" in said, said)
    machines.finish()
    lab.conclude()
