"""A server that moved away behind a relay comes home to it, and all is as it was.

    ┌────────┐     ┌──────────────────────┐
    │ client │═════│ server, OLD          │                         before, and in the end
    └────────┘     └──────────────────────┘
    ┌────────┐     ┌──────────────────────┐     ┌─────────────┐
    │ client │═════│ OLD ⇄ relay ⇄ FROM:q │═════│ NEW, server │     in between
    └────────┘     └──────────────────────┘     └─────────────┘

The process is restored at the relay while that still passes on what peers say, and is quiet until
the teardown, at CRIU's `post-restore`: the gate closes, the translation and forwarding go, and last
the gate. No peer hears a host that has no socket.
"""

from natkeep.lab.relay import FLAT, ByRelay

SETUP = FLAT


def run(lab):
    by = ByRelay(lab)
    by.begin(connections=3)
    by.move()
    lab.traffic.talk_on()
    by.move_back()
    lab.traffic.talk_on()
    by.finish()
