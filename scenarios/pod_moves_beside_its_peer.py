"""A pod goes to the node of its peer, which is a pod, too: both are on one bridge there.

node 10.3.0.20                                       node 10.2.0.10
┌───────────────────────┐      10.12.0.10:5000       ┌─────────────────────────┐
│ client 10.13.0.200    │────────── gateway ─────────│ pod web-a 10.12.0.10    │  before
│   OLD⇄NEW  (site peer)│                            └─────────────────────────┘
│    ║ cni0             │
│ pod web-b 10.13.0.10  │ afterwards, and no node routes it
│   NEW⇄OLD             │
└───────────────────────┘
"""

from natkeep.lab.pods.move import Pods
from natkeep.lab.pods.neighbours import PeerBeside

SETUP = {"engine": "containerd"}


def run(lab):
    pods = Pods(lab)
    beside = PeerBeside(lab)
    beside.begin(connections=3)
    pods.make_destination()
    lab.freeze()
    lab.prepare()
    beside.restore()
    pods.remove_source()
    lab.traffic.talk_on()
    beside.finish()
    pods.remove_destination()
