"""A move of a pod is given up after the checkpoint; the old pod goes on as if nothing had been.

    client 10.1.0.2            gateway           node 10.2.0.10: pod web-a 10.12.0.10 (OLD)
    ┌──────┐  10.12.0.10:5000 ┌───────┐ 10.12.0.10:5000 ┌────────────────┐
    │ peer │══════════════════│       │═════════════════│ pod web-a      │  runs, and is heard again
    └──────┘  3 connections   └───────┘                 └────────────────┘
                                         node 10.3.0.20: pod web-b, where nothing was restored

A checkpoint leaves its container running; natkeep-hook has closed its gate. In the order of an
undo: the gateway, then the source, then the new pod is removed.
"""

from natkeep.lab.pods.move import Pods

SETUP = {"engine": "containerd"}


def run(lab):
    pods = Pods(lab)
    lab.begin(connections=3)
    pods.make_destination()
    lab.freeze()
    lab.prepare()
    with lab.report.must("natkeep teardown at the gateway"):
        lab.translator.teardown(lab.order)
    lab.undone.append(lab.order)
    pods.open_source()
    lab.traffic.talk_on()
    lab.traffic.quiet()
    lab.traffic.server_says()
    lab.traffic.check_ends()
    lab.conclude(moved=False)
    pods.remove_destination()
