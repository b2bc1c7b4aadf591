"""A move of a pod is ordered in a store: agents at the gateway and at the new pod's node.

    client 10.1.0.2            gateway           node 10.2.0.10: pod web-a 10.12.0.10 (OLD)
    ┌──────┐  10.12.0.10:5000 ┌───────┐ 10.13.0.10:5000 ┌────────────────┬───────┐
    │ peer │══════════════════│OLD⇄NEW│═════════════════│ pod web-b      │NEW⇄OLD│
    └──────┘  3 connections   └───────┘   anti-spoof    └────────────────┴───────┘
                                agent         store       agent, natkeep-cni
                             group edge   a directory   node 10.3.0.20

NEW is `auto`. The order for the destination alone reaches its node's agent, which puts the pod's
order where natkeep-cni looks. The pod is made, and the plugin tells the agent NEW. A connection
that begins now is in the image alone. After the checkpoint the rest is ordered, from the archive:
the gateway opens, and the container is restored.
"""

from natkeep.lab.pods.fleet import PodFleet
from natkeep.lab.pods.move import Pods

SETUP = {"engine": "containerd"}


def run(lab):
    pods = Pods(lab, agent=True)
    fleet = PodFleet(lab, pods)
    lab.begin(connections=2)
    fleet.stage()
    pods.run_destination()
    lab.dial()
    lab.traffic.talk()
    lab.freeze()
    lab.prepare()
    lab.restore()
    pods.remove_source()
    lab.traffic.talk_on()
    lab.finish()
    pods.remove_destination()
