"""A process behind a relay moves on to a third host, and the relay is pointed there.

    ┌────────┐     ┌──────────────────────┐     ┌─────────────────────────┐
    │ client │═════│ OLD ⇄ relay ⇄ FROM:q │═════│ server at NEW 10.3.0.20 │     at first
    └────────┘     └──────────────────────┘     └─────────────────────────┘
    ┌────────┐     ┌──────────────────────┐     ┌─────────────────────────┐
    │ client │═════│ OLD ⇄ relay ⇄ FROM:q │═════│ server at NEW 10.4.0.30 │     then
    └────────┘     └──────────────────────┘     └─────────────────────────┘

One relay, never two in a row: at the source the second move replaces the first, under a gate that
is closed, and to the third host it counts its ports anew. What the host that was left still says
goes no further. A second relay at the destination is refused. In the end the process comes home,
and forwarding is as it was before the first of the moves.
"""

from natkeep.lab.relay import ByRelay
from natkeep.lab.topology import THIRD, USUAL

SETUP = {"seats": (*USUAL, THIRD)}


def run(lab):
    by = ByRelay(lab)
    by.begin(connections=3)
    by.move()
    lab.traffic.talk_on()
    by.check_stacked(THIRD)
    by.move_on(THIRD)
    lab.traffic.talk_on()
    by.move_back()
    lab.traffic.talk_on()
    by.finish()
