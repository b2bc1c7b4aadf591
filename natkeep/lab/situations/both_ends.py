"""Both ends of a connection move at once, and nothing between them translates (lab/both_ends.py).

Each destination then translates both ends by itself: with entries, and without any.
"""

from __future__ import annotations

from functools import partial

from natkeep.lab.both_ends import SETUP, BothEnds
from natkeep.lab.lab import Lab
from natkeep.lab.situations import situation
from natkeep.lab.situations.two_ends import (
    in_order,
    move_in_a_pause,
    narrow,
    not_loose,
    under_traffic,
)
from natkeep.lab.topology import Seat

both_move = partial(situation, may_refuse=("stateless",))
WHERE = ("destination", "third")
FOURTH = Seat("fourth", "far", 21)


both_move(31, "both ends move", setup=SETUP)(under_traffic(BothEnds, WHERE))
both_move(31, "both ends move, tcp_loose=0", setup=SETUP)(not_loose(BothEnds, WHERE))
both_move(31, "both ends move, the client closes first", setup=SETUP)(
    in_order(BothEnds, "client_closes", "server_says", "server_closes")
)
both_move(31, "both ends move, the server closes first", setup=SETUP)(
    in_order(BothEnds, "server_closes", "client_closes")
)
both_move(31, "both ends move, path MTU drops", setup={**SETUP, "routed": ("far", "third")})(
    narrow(BothEnds, "far", "third")
)


@both_move(31, "both ends move, entries flushed before a FIN", setup=SETUP, probes=(True,))
def flushed(lab: Lab) -> None:
    """At either end before either side closes."""
    both = move_in_a_pause(BothEnds, lab)
    lab.traffic.client_says()
    lab.conditions.flush_conntrack("destination")
    lab.traffic.server_closes()
    lab.conditions.flush_conntrack("third")
    lab.conditions.flush_conntrack("destination")
    lab.traffic.client_closes()
    both.finish()


@both_move(31, "both ends move, one moves on", setup={"seats": (*SETUP["seats"], FOURTH)})
def moved_on(lab: Lab) -> None:
    """The other end's move is replaced by one that knows where it is then."""
    both = BothEnds(lab)
    both.begin(connections=3)
    both.move()
    lab.traffic.talk_on()
    both.move_on(FOURTH)
    lab.traffic.talk_on()
    both.finish()


by_criu = partial(both_move, engine="criu", probes=(True,))
by_criu(31, "both ends move by CRIU", setup=SETUP)(under_traffic(BothEnds, WHERE))
by_criu(31, "both ends move, one moves on by CRIU", setup={"seats": (*SETUP["seats"], FOURTH)})(
    moved_on
)
both_move(31, "both ends move, a gateway for one", setup=SETUP)(
    under_traffic(partial(BothEnds, gateway=True), ("gateway", *WHERE))
)
