"""What was never kept opens nothing at the destination (threats T5 and T6).

A translation is as wide as one four-tuple, and lasts only while that lives.
"""

from __future__ import annotations

from natkeep.lab.intruder import Intruder
from natkeep.lab.lab import Lab
from natkeep.lab.peer_host import PeerHost
from natkeep.lab.relay import ByRelay
from natkeep.lab.situations import TWO_CLIENTS, situation
from natkeep.lab.situations.two_ends import move_in_a_pause
from natkeep.plan.tuples import FourTuple


@situation(23, "default deny", setup=TWO_CLIENTS)
def default_deny(lab: Lab) -> None:
    """Other ports, sources and protocols, spoofed segments, and a SYN after the end."""
    lab.begin(pause=True)
    lab.move()
    _intrude(lab)


@situation(23, "default deny, by a relay", setup=TWO_CLIENTS, may_refuse=("stateless",))
def by_relay(lab: Lab) -> None:
    """What is not kept ends at the relay, whose own stack has no listener."""
    by = move_in_a_pause(ByRelay, lab)
    [wire] = by.peers or [None]
    _intrude(lab, wire)


@situation(23, "default deny, the peers' own host", setup=TWO_CLIENTS, may_refuse=("stateless",))
def at_peer(lab: Lab) -> None:
    """What a host puts on the wire untranslated goes where it is addressed."""
    PeerHost(lab)
    default_deny(lab)


def _intrude(lab: Lab, wire: FourTuple | None = None) -> None:
    lab.traffic.client_says()
    lab.traffic.server_says()
    intruder = Intruder(lab, wire)
    intruder.try_everything()
    lab.traffic.client_says()
    lab.traffic.server_says()
    lab.traffic.client_closes()
    lab.traffic.server_closes()
    intruder.try_again()
    lab.finish()
