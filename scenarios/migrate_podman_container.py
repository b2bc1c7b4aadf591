"""One command moves a container of podman over ssh; its clients notice nothing.

    client 10.1.0.2            gateway               container 10.2.0.10 (OLD)
    ┌──────┐  10.2.0.10:5000  ┌─────────┐ podman   ┌───────────┐
    │ peer │══════════════════│ natkeep │ container checkpoint─┘
    └──────┘  4 connections   │ migrate │ podman   ┌───────────┐
                              │   ssh   │ container│ restore   │ 10.3.0.20 (NEW)
                              └─────────┘──────────┴───────────┘

The archive goes, with the path of the container's network namespace, the same on both hosts. podman
passes no environment on, and still its CRIU calls the hook for this move.
"""

from natkeep.lab.ssh import ContainerMachines

SETUP = {"engine": "podman"}


def run(lab):
    machines = ContainerMachines(lab, "source", "destination", controller="gateway")
    lab.begin(connections=4)
    said = machines.migrate()
    lab.report.check("all peers were heard", "4 of 4 peers were heard" in said, said)
    machines.finish()
    lab.conclude()
