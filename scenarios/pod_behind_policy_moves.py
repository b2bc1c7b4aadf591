"""A pod goes to a node where a policy lets nothing pass but what is its new address's.

    client 10.1.0.2            gateway           node 10.2.0.10: pod web-a 10.12.0.10 (OLD)
    ┌──────┐  10.12.0.10:5000 ┌───────┐ 10.13.0.10:5000 ┌────────────────┬───────┐
    │ peer │══════════════════│OLD⇄NEW│═════════════════│ pod web-b      │NEW⇄OLD│
    └──────┘                  └───────┘   anti-spoof    └────────────────┴───────┘
                              policy at node 10.3.0.20: of the pods 10.13.0.10 alone

OLD never leaves the pod's namespace, so the policy knows nothing of it. (One that drops what the
pod says to its peers is named, and natkeep-cni fails the pod.)
"""

from natkeep.lab.pods.move import Pods
from natkeep.lab.pods.neighbours import add_policy

SETUP = {"engine": "containerd"}


def run(lab):
    pods = Pods(lab)
    add_policy(lab)
    lab.begin(connections=3)
    pods.make_destination()
    lab.move()
    pods.remove_source()
    lab.traffic.talk_on()
    lab.traffic.quiet()
    lab.traffic.server_says()
    lab.finish()
    pods.remove_destination()
