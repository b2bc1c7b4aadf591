"""One command moves a server over ssh; its clients' own hosts translate, and nothing else does.

    client   10.1.0.2  OLD⇄NEW ─┐              ┌─ source       10.2.0.10 (OLD), quiet afterwards
    client2  10.1.0.3  OLD⇄NEW ─┴─── router ───┴─ destination  10.3.0.20 (NEW)

`natkeep migrate source:PID destination --via peers`, given on the router: each client's host is
reached as its address, and made ready beside the copy of the image. `natkeep finish` undoes it on
all four.
"""

from natkeep.lab.peer_host import PeerHost
from natkeep.lab.ssh import Machines
from natkeep.lab.topology import SECOND_CLIENT, USUAL

SETUP = {"engine": "criu", "seats": (*USUAL, SECOND_CLIENT)}


def run(lab):
    PeerHost(lab, lab.topology.peers)
    hosts = ("source", "destination", *lab.peer_sites)
    machines = Machines(lab, *hosts, controller="gateway", options=("--via", "peers"))
    lab.serve()
    for role in lab.peer_sites:
        lab.dial(connections=3, role=role)
    lab.traffic.talk()
    said = machines.migrate()
    clients = ", ".join(str(machines.addresses[role]) for role in lab.peer_sites)
    lab.report.check("both hosts are named", f"{clients} translate, as the peers'" in said, said)
    lab.report.check("all peers were heard", "6 of 6 peers were heard" in said, said)
    machines.finish()
    lab.conclude()
