"""the situation of strangers: what was never kept opens nothing at the destination.

A translation is a door; this one has the width of one four-tuple, and only while it lives
(threats T5 and T6 of the facts).
"""

from __future__ import annotations

from natkeep.lab.intruder import NEIGHBOUR, Intruder
from natkeep.lab.lab import Lab
from natkeep.lab.situations import situation
from natkeep.lab.topology import USUAL


@situation(23, "default deny", setup={"seats": (*USUAL, NEIGHBOUR)})
def default_deny(lab: Lab) -> None:
    """Other ports, sources and protocols, spoofed segments, and a SYN after the end."""
    lab.serve()
    lab.dial()
    lab.talk()
    lab.quiet()
    lab.move()
    lab.client_says()
    lab.server_says()
    intruder = Intruder(lab)
    intruder.try_everything()
    lab.client_says()
    lab.server_says()
    lab.client_closes()
    lab.server_closes()
    intruder.try_again()
    lab.finish()
