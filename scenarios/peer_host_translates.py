"""The peers' own host translates: no gateway is needed, and none is there.

    client 10.1.0.2                                        source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│══════════════════│ server │
    └──────┘                  └───────┘      router      └───────┘                  └────────┘
         at the client (--site peer)                     destination 10.3.0.20 (NEW)

Entries that are flushed at either host change nothing, and a ruleset that is flushed in a pause is
repaired.
"""

import time

from natkeep.lab.peer_host import PeerHost


def run(lab):
    PeerHost(lab)
    lab.begin(connections=3)
    lab.move()
    lab.traffic.talk_on()
    for role in ("client", "destination"):
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    lab.traffic.quiet()
    time.sleep(1)  # until nothing is said again: what comes while there is no table is reset
    for role in ("client", "destination"):
        lab.topology[role].run("nft", "flush", "ruleset")
    with lab.report.must("repair puts all of it back"):
        lab.translator.call("repair", lab.order.id)
        lab.translator.call("status", "--strict")
    lab.traffic.server_says()
    lab.traffic.client_says()
    lab.finish()
