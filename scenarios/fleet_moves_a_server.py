"""A move is ordered in a store; an agent at the destination and one at the gateway follow it.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │──────────────────│OLD⇄NEW│──────────────────│NEW⇄OLD│──────────────────│ server │
    └──────┘                  └───────┘    anti-spoof    └───────┘                  └────────┘
                                agent         store         agent
                             group edge   a directory   destination 10.3.0.20 (NEW)

The gateway opens once the destination is prepared. Then the store is lost, and the restore opens
the destination all the same; both agents are killed while the store is away, and come back. Nothing
of that is heard by the client, nor changes a journal; an order to end the move undoes it.
"""

from natkeep.lab.fleet import NODES, Fleet


def run(lab):
    lab.begin(connections=3)
    fleet = Fleet(lab)
    lab.freeze()
    lab.prepare()
    fleet.lose_store()
    lab.restore()
    lab.traffic.talk_on()
    journals = [fleet.journal(role, lab.order.id) for role in NODES]
    before = [path.read_bytes() for path in journals]
    for role in NODES:
        fleet.kill(role)
    lab.traffic.talk_on()
    for role in NODES:
        fleet.start(role)
    lab.traffic.talk_on()
    fleet.find_store()
    with lab.report.must("the agents are back, and say that the move is open"):
        fleet.wait_alive()
        fleet.call("fleet", "wait", lab.order.id, "--for", "open")
    after = [path.read_bytes() for path in journals]
    lab.report.check("no agent has touched a journal", before == after)
    lab.traffic.talk_on()
    lab.finish()
