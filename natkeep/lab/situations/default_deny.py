"""What was never kept opens nothing at the destination (threats T5 and T6).

A translation is as wide as one four-tuple, and lasts only while that lives.
"""

from __future__ import annotations

from natkeep.lab.intruder import Intruder
from natkeep.lab.lab import Lab
from natkeep.lab.situations import TWO_CLIENTS, situation


@situation(23, "default deny", setup=TWO_CLIENTS)
def default_deny(lab: Lab) -> None:
    """Other ports, sources and protocols, spoofed segments, and a SYN after the end."""
    lab.begin(pause=True)
    lab.move()
    lab.traffic.client_says()
    lab.traffic.server_says()
    intruder = Intruder(lab)
    intruder.try_everything()
    lab.traffic.client_says()
    lab.traffic.server_says()
    lab.traffic.client_closes()
    lab.traffic.server_closes()
    intruder.try_again()
    lab.finish()
