"""What peers say while the process is frozen is held, and delivered when it is back.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│═══════╗══════════│ server │
    └──────┘   4 connections  └───────┘    anti-spoof    └───────┘ holder╚═lo═══════└────────┘
                                                         destination 10.3.0.20 (NEW)

The gateway's gate stands open, the destination's is closed: there the segments are dropped, and the
holder keeps a copy of each. When the gate opens it delivers them through lo, each octet once, and
ends.
"""

from natkeep.kernel import segment_holder
from natkeep.lab.application import all_open, received
from natkeep.lab.holder import HOLDS, await_held, check_ended, check_replay

SETUP = HOLDS
CONNECTIONS, OCTETS = 4, 3000


def run(lab):
    lab.serve()
    lab.dial(connections=CONNECTIONS)
    lab.traffic.client.do({"push": 100})
    lab.traffic.client.wait(received(100), "answers")
    lab.freeze()
    lab.prepare()
    lab.traffic.client.do({"push": OCTETS})
    await_held(lab, segment_holder.look, CONNECTIONS * OCTETS)
    lab.restore()
    check_ended(lab, segment_holder.look)
    goal = 100 + OCTETS
    with lab.report.must("it is answered"):
        lab.traffic.client.wait(received(goal), "answers", within=5)
        lab.traffic.client.wait(all_open(CONNECTIONS), "the connections to be open")
    lab.traffic.talk()
    lab.traffic.talk_on()
    lab.finish()
    check_replay(lab, lab.traffic.kept, OCTETS)
