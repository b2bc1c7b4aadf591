"""Both ends of the connections move at once, and nothing between them translates.

    client 10.1.0.2 (P) ═════ router ═════ source 10.2.0.10 (OLD)          before

    third 10.4.0.30 (Q)                    destination 10.3.0.20 (NEW)     afterwards
    ┌──────┐  P > OLD   ┌───────┐  Q > NEW   ┌─────────┐  P > OLD  ┌────────┐
    │ peer │════════════│ P ⇄ Q │════════════│NEW ⇄ OLD│═══════════│ server │
    └──────┘            │OLD⇄NEW│   router   │ Q ⇄ P   │           └────────┘
                        └───────┘            └─────────┘

Each end has a natkeep of its own, which knows no more of the other than its `--peer-map`. What the
server says while the client is not back is held there, and comes from OLD when it is delivered.
Entries that are flushed change nothing, and a ruleset that is flushed in a pause is repaired.
"""

import json
import time

from natkeep.lab.both_ends import SETUP, BothEnds  # noqa: F401 - SETUP is the scenario's

CONNECTIONS = 3


def run(lab):
    both = BothEnds(lab)
    both.begin(connections=CONNECTIONS)
    both.move()
    lab.traffic.talk_on()
    check_status(lab, both)
    for role in ("destination", "third"):
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    lab.traffic.quiet()
    time.sleep(1)  # until nothing is said again: what comes while there is no table is reset
    for role, move, translator in (
        ("destination", lab.order.id, lab.translator),
        ("third", both.party.order.id, both.party.translator),
    ):
        lab.topology[role].run("nft", "flush", "ruleset")
        with lab.report.must(f"repair at the {role}"):
            translator.call("repair", move)
    check_status(lab, both)
    lab.traffic.server_says()
    lab.traffic.client_says()
    lab.traffic.server_closes()
    lab.traffic.client_closes()
    both.finish()


def check_status(lab, both):
    """Either side's status knows where its peers are, and misses nothing."""
    for party, translator in ((both.party, both.party.translator), (lab, lab.translator)):
        with lab.report.must(f"status of {party.new} finds no drift"):
            document = json.loads(translator.call("status", "--strict", "--json"))
        [move] = document["moves"]
        [(peer, now)] = party.peers
        wires = [each["wire"]["peer"].startswith(str(now)) for each in move["connections"]]
        ok = move["peer_maps"] == [{"old": str(peer), "new": str(now)}] and all(wires)
        lab.report.check(f"it names {now}, where the peers are", ok and len(wires) == CONNECTIONS)
