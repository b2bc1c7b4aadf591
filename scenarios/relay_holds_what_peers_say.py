"""What peers say while the process is frozen is held behind a relay, too.

    client 10.1.0.2 ── relay: OLD, 10.1.0.11 (FROM) ── destination 10.1.0.20 (NEW)
                       its gate is open                ┌────────┐      ┌────────┐
                       FROM:q > NEW:p  ────────────────│ holder │─ lo ─│ server │ peer > OLD
                                                       └────────┘      └────────┘

The holder turns FROM:q into the peer again, as the translation does, and delivers each octet once.
"""

from natkeep.kernel import segment_holder
from natkeep.lab.application import received
from natkeep.lab.holder import HOLDS, await_held, check_ended, check_replay
from natkeep.lab.relay import FLAT, ByRelay

SETUP = {**FLAT, **HOLDS}
CONNECTIONS, OCTETS = 3, 3000


def run(lab):
    by = ByRelay(lab)
    by.stand()
    lab.serve()
    lab.dial(connections=CONNECTIONS)
    lab.traffic.client.do({"push": 100})
    lab.traffic.client.wait(received(100), "answers")
    lab.freeze()
    lab.prepare()
    by.read_wires()
    by.take_over()
    lab.traffic.client.do({"push": OCTETS})
    await_held(lab, segment_holder.look, CONNECTIONS * OCTETS)
    lab.restore()
    check_ended(lab, segment_holder.look)
    with lab.report.must("it is answered"):
        lab.traffic.client.wait(received(100 + OCTETS), "answers", within=5)
    lab.traffic.talk()
    lab.traffic.talk_on()
    by.finish()
    check_replay(lab, lab.traffic.kept, OCTETS)
