"""A pod behind a service's address moves; the clients' node translates, before and after.

    client 10.1.0.2        the client's node            node 10.2.0.10: web-a 10.12.0.10 (OLD)
    ┌──────┐  10.96.0.10:80  ┌───────────┐ 10.13.0.10:5000 ┌────────────────┬───────┐
    │ peer │═════════════════│SERVICE⇄OLD│═════════════════│ pod web-b      │NEW⇄OLD│
    │ new  │─ 10.96.0.10:80 ▶│    OLD⇄NEW│─ ─ ─ ─ ─ ─ ─ ─ ▶│ 10.13.0.10:5000│       │
    └──────┘                 └───────────┘   anti-spoof    └────────────────┴───────┘

What kube-proxy's rule has made of a connection natkeep takes over: only OLD becomes NEW. Once the
new pod runs, its address is the service's endpoint, and a new caller reaches it there.
"""

from natkeep.lab.pods.move import Pods
from natkeep.lab.pods.neighbours import Service

SETUP = {"engine": "containerd"}


def run(lab):
    pods = Pods(lab)
    lab.settle()
    service = Service(lab)
    service.lead_to(lab.old)
    lab.serve(listen="[::]:5000")
    lab.traffic.dial_one_by_one(lab.topology["client"], service.end, 3)
    lab.traffic.talk()
    pods.make_destination()
    lab.move()
    pods.remove_source()
    lab.traffic.talk_on()
    service.lead_to(lab.new)
    lab.traffic.talk_on()
    service.must_answer()
    service.lead_to(lab.old)  # the gateway is compared with what it was
    lab.finish()
    pods.remove_destination()
