"""Both ends of a connection move at once, and nothing between them translates (lab/both_ends.py).

Each destination then translates both ends by itself: with entries, and without any.
"""

from __future__ import annotations

from functools import partial

from natkeep.lab.both_ends import SETUP, BothEnds
from natkeep.lab.lab import Lab
from natkeep.lab.situations import Moves, situation
from natkeep.lab.topology import Seat

both_move = partial(situation, may_refuse=("stateless",))
WHERE = ("destination", "third")
MUCH = 300_000
FOURTH = Seat("fourth", "far", 21)


def _move_in_a_pause(lab: Lab) -> BothEnds:
    both = BothEnds(lab)
    both.begin(pause=True)
    both.move()
    return both


@both_move(31, "both ends move", setup=SETUP)
def both_ends(lab: Lab) -> None:
    """Under traffic; then neither end has an entry any more, one after the other."""
    both = BothEnds(lab)
    both.begin(connections=3)
    both.move()
    lab.traffic.talk_on()
    for role in WHERE:
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    both.finish()


@both_move(31, "both ends move, tcp_loose=0", setup=SETUP)
def not_loose(lab: Lab) -> None:
    """Conntrack picks nothing up at any host; both sides speak, also without an entry."""
    lab.conditions.conntrack_loose(0)
    both = _move_in_a_pause(lab)
    for says in (lab.traffic.server_says, lab.traffic.client_says):
        says()
        for role in WHERE:
            lab.conditions.flush_conntrack(role)
    lab.traffic.server_says()
    lab.traffic.client_says()
    both.finish()


def _ends(*words: str) -> Moves:
    def moves(lab: Lab) -> None:
        both = _move_in_a_pause(lab)
        for word in words:
            getattr(lab.traffic, word)()
        both.finish()

    return moves


both_move(31, "both ends move, the client closes first", setup=SETUP)(
    _ends("client_closes", "server_says", "server_closes")
)
both_move(31, "both ends move, the server closes first", setup=SETUP)(
    _ends("server_closes", "client_closes")
)


@both_move(31, "both ends move, entries flushed before a FIN", setup=SETUP, probes=(True,))
def flushed(lab: Lab) -> None:
    """At either end before either side closes."""
    both = _move_in_a_pause(lab)
    lab.traffic.client_says()
    lab.conditions.flush_conntrack("destination")
    lab.traffic.server_closes()
    lab.conditions.flush_conntrack("third")
    lab.conditions.flush_conntrack("destination")
    lab.traffic.client_closes()
    both.finish()


@both_move(31, "both ends move, path MTU drops", setup={**SETUP, "routed": ("far", "third")})
def narrow(lab: Lab) -> None:
    """What either end sends is too big for the router in front of the other."""
    both = _move_in_a_pause(lab)
    lab.traffic.client_says()
    for network in ("far", "third"):
        lab.conditions.path_mtu(network)
    lab.traffic.server_sends(MUCH)
    lab.traffic.client_sends(MUCH)
    for network in ("far", "third"):
        lab.conditions.path_was_narrow(network)
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


@both_move(31, "both ends move, a gateway for one", setup=SETUP)
def gateway_for_one(lab: Lab) -> None:
    """It leaves the peers to the destination; entries may be lost there, too."""
    both = BothEnds(lab, gateway=True)
    both.begin(connections=3)
    both.move()
    lab.traffic.talk_on()
    for role in ("gateway", *WHERE):
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    both.finish()
