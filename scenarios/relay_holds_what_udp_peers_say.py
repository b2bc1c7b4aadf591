"""Behind a relay what peers of UDP say in the blackout is held, and delivered as from themselves.

    client 10.1.0.2 ── relay: OLD, 10.1.0.11 (FROM) ── destination 10.1.0.20 (NEW)
                       its gate is open                ┌────────┐      ┌────────┐
                       FROM:q > NEW:p  ────────────────│ holder │─ lo ─│ server │ peer > OLD
                                                       └────────┘      └────────┘

The holder turns FROM:q into the peer again, as the translation does, and delivers each datagram
once, in the order in which it was said.
"""

from natkeep.kernel import segment_holder
from natkeep.lab.holder import HOLDS, await_held, check_datagrams, check_ended
from natkeep.lab.relay import FLAT, ByRelay

SETUP = {**FLAT, **HOLDS, "udp": True}
CONNECTIONS, DATAGRAMS, OCTETS = 3, 25, 100


def run(lab):
    by = ByRelay(lab)
    by.stand()
    lab.begin(connections=CONNECTIONS, pause=True)
    lab.traffic.connect()
    lab.freeze()
    lab.prepare()
    by.read_wires()
    by.take_over()
    for _ in range(DATAGRAMS):
        lab.traffic.client.do({"push": OCTETS})
    await_held(lab, segment_holder.look, CONNECTIONS * DATAGRAMS * OCTETS)
    lab.restore()
    check_ended(lab, segment_holder.look)
    lab.traffic.talk()
    lab.traffic.talk_on()
    by.finish()
    check_datagrams(lab, DATAGRAMS)
