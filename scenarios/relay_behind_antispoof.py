"""The source host stays as a relay: nothing between it and the destination translates.

    client 10.1.0.2 ═══ router ═══ source 10.2.0.10 (OLD)                        before

    client ═══ router ═══ relay ═══ router ═══ destination 10.3.0.20 (NEW)       afterwards
           peer > OLD     OLD, 10.2.0.11 (FROM)   ┌──────────┐
                          FROM:q > NEW            │ server   │ peer > OLD
                                                  └──────────┘

In front of each host is a filter that lets it send from its own addresses only.
"""

from natkeep.lab.relay import ByRelay


def run(lab):
    by = ByRelay(lab)
    by.begin(connections=3)
    by.move()
    lab.traffic.talk_on()
    by.finish()
