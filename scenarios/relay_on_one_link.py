"""Two hosts on one link are enough: the source stays as a relay, and peers need no gateway.

                  ┌── client       10.1.0.2
    one switch ───┼── source       10.1.0.10 (OLD), then the relay: 10.1.0.11 (FROM)
                  └── destination  10.1.0.20 (NEW)

The relay passes on what is kept and nothing else: strangers' packets go no further, its own
connections go on from all ports that were its own before, and no redirect names the destination.
Status finds no drift; what another program removes and switches off is repaired.
"""

import json

from natkeep.lab.relay import FLAT, ByRelay

SETUP = FLAT


def run(lab):
    by = ByRelay(lab)
    by.begin(connections=3)
    by.move()
    lab.traffic.talk_on()
    by.check_strangers()
    by.check_own_dials()
    check_status(lab)
    for role in ("source", "destination"):
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    by.break_and_repair()
    check_status(lab)
    lab.traffic.server_says()
    lab.traffic.client_says()
    lab.traffic.server_closes()
    lab.traffic.client_closes()
    by.finish()


def check_status(lab):
    with lab.report.must("status finds no drift, and names the relay's port of each connection"):
        document = json.loads(lab.translator.call("status", "--strict", "--json"))
        [move] = document["moves"]
        assert all("wire" in each for each in move["connections"])
