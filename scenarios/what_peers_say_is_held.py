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

from contextlib import suppress

from natkeep.kernel import segment_holder
from natkeep.lab.application import all_open, received
from natkeep.lab.host import LabError, await_true

SETUP = {"points": {"lo": ("destination", "lo")}}
CONNECTIONS, OCTETS = 4, 3000


def run(lab):
    state, check = str(lab.directory / "natkeep-state"), lab.report.check
    lab.serve()
    lab.dial(connections=CONNECTIONS)
    lab.traffic.client.do({"push": 100})
    lab.traffic.client.wait(received(100), "answers")
    lab.freeze()
    lab.prepare()
    lab.traffic.client.do({"push": OCTETS})
    held = None

    def all_held():
        nonlocal held
        held = segment_holder.look(state, lab.order.id)
        return held is None or held.octets >= CONNECTIONS * OCTETS

    with suppress(LabError):  # told by the assertion
        await_true(all_held, "what the client says to be held")
    octets = held.octets if held else 0
    ok = octets == CONNECTIONS * OCTETS
    check("what the client says meanwhile is held", ok, f"{octets} octets")
    lab.restore()
    left = segment_holder.look(state, lab.order.id)
    check("the holder has ended", left is None, str(left or ""))
    goal = 100 + OCTETS
    with lab.report.must("it is answered"):
        lab.traffic.client.wait(received(goal), "answers", within=5)
        lab.traffic.client.wait(all_open(CONNECTIONS), "the connections to be open")
    lab.traffic.talk()
    lab.traffic.talk_on()
    lab.finish()
    check_replay(lab)


def check_replay(lab):
    """What came through lo: of each connection the octets that were held, once."""
    inbound = {each: set() for each in lab.traffic.kept}
    for frame in lab.captures["lo"].frames():
        segment = frame.segment
        if segment and segment.tuple in inbound:
            places = range(segment.seq, segment.seq + segment.length)
            inbound[segment.tuple] |= {place % 2**32 for place in places}
    counts = [len(places) for places in inbound.values()]
    ok = counts == [OCTETS] * CONNECTIONS
    lab.report.check("what was held came to the process through lo", ok, f"{counts} octets")
