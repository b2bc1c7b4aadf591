"""What peers of UDP say while the process is frozen is held, and delivered when it is back.

    client 10.1.0.2            gateway            source 10.2.0.10 (OLD), left silent
    ┌──────┐  10.2.0.10:5000  ┌───────┐  10.3.0.20:5000  ┌───────┐  10.2.0.10:5000  ┌────────┐
    │ peer │══════════════════│OLD⇄NEW│══════════════════│NEW⇄OLD│═══════╗══════════│ server │
    └──────┘    4 sockets     └───────┘    anti-spoof    └───────┘ holder╚═lo═══════└────────┘
                                                         destination 10.3.0.20 (NEW)

The destination's gate is closed, and the holder keeps a copy of each datagram that is dropped. It
delivers them through lo before the gate opens: each once, in the order in which it was said.
"""

from natkeep.kernel import segment_holder
from natkeep.lab.holder import HOLDS, await_held, check_datagrams, check_ended

SETUP = {**HOLDS, "udp": True}
CONNECTIONS, DATAGRAMS, OCTETS = 4, 25, 100


def run(lab):
    lab.begin(connections=CONNECTIONS, pause=True)
    lab.traffic.connect(0)  # the others are peers of the server's own socket
    lab.freeze()
    lab.prepare()
    for _ in range(DATAGRAMS):
        lab.traffic.client.do({"push": OCTETS})
    await_held(lab, segment_holder.look, CONNECTIONS * DATAGRAMS * OCTETS)
    lab.restore()
    check_ended(lab, segment_holder.look)
    lab.traffic.talk()
    lab.traffic.talk_on()
    lab.finish()
    check_datagrams(lab, DATAGRAMS)
