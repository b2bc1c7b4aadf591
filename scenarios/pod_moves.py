"""A container goes from a pod of one node into a pod of another; its client notices nothing.

    client 10.1.0.2            gateway           node 10.2.0.10: pod web-a 10.12.0.10 (OLD)
    ┌──────┐  10.12.0.10:5000 ┌───────┐ 10.13.0.10:5000 ┌────────────────┬───────┐
    │ peer │══════════════════│OLD⇄NEW│═════════════════│ pod web-b      │NEW⇄OLD│
    └──────┘  3 connections   └───────┘   anti-spoof    └────────────────┴───────┘
                                         node 10.3.0.20: pod web-b 10.13.0.10 (NEW)

containerd at both nodes, asked by the CRI as a kubelet asks; the network is CNI's bridge, with
natkeep-cni at its end. While the server runs, the new pod is made: natkeep-cni finds its order and
prepares the destination, closed. A connection that begins afterwards is in the image alone. The
checkpoint leaves the server running, so natkeep-hook closes the source at post-dump; the gateway is
opened; CRIU restores in the new pod, whose gate natkeep-hook opens. Then the old pod is removed.
(docs/kubernetes.md)
"""

from natkeep.lab.pods.move import Pods

SETUP = {"engine": "containerd"}


def run(lab, *, closes_source=True, gateway_first=True, shares_pids=False):
    """closes_source, gateway_first: what it takes; without either the connections are lost."""
    pods = Pods(lab, closes_source=closes_source, shares_pids=shares_pids)
    lab.begin(connections=2)
    pods.make_destination()
    lab.dial()
    lab.traffic.talk()
    lab.freeze()
    if gateway_first:
        lab.prepare()
        lab.restore()
    else:
        lab.place_order()
        lab.restore()
        lab.translator.prepare(lab.order)
    pods.remove_source()
    lab.traffic.talk_on()
    lab.finish()
    pods.remove_destination()
