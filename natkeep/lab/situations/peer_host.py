"""The peers' own host translates: no gateway is needed (lab/peer_host.py)."""

from __future__ import annotations

from functools import partial

from natkeep.lab.lab import Lab
from natkeep.lab.peer_host import PeerHost
from natkeep.lab.situations import Moves, carry_on_after, situation

at_peer = partial(situation, may_refuse=("stateless",))
WHERE = ("client", "destination")
MUCH = 300_000


def _move_in_a_pause(lab: Lab) -> None:
    PeerHost(lab)
    lab.begin(pause=True)
    lab.move()


@at_peer(32, "the peers' own host translates")
def peer_host(lab: Lab) -> None:
    """Under traffic; then neither end has an entry any more, one after the other."""
    PeerHost(lab)
    lab.begin(connections=3)
    carry_on_after(lab, lab.move)
    for role in WHERE:
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    lab.finish()


@at_peer(32, "the peers' own host, tcp_loose=0")
def not_loose(lab: Lab) -> None:
    """Conntrack picks nothing up at any host; both sides speak, also without an entry."""
    lab.conditions.conntrack_loose(0)
    _move_in_a_pause(lab)
    for says in (lab.traffic.server_says, lab.traffic.client_says):
        says()
        for role in WHERE:
            lab.conditions.flush_conntrack(role)
    lab.traffic.server_says()
    lab.traffic.client_says()
    lab.finish()


def _ends(*words: str) -> Moves:
    def moves(lab: Lab) -> None:
        _move_in_a_pause(lab)
        for word in words:
            getattr(lab.traffic, word)()
        lab.finish()

    return moves


at_peer(32, "the peers' own host, the client closes first")(
    _ends("client_closes", "server_says", "server_closes")
)
at_peer(32, "the peers' own host, the server closes first")(_ends("server_closes", "client_closes"))


@at_peer(32, "the peers' own host, flushed before a FIN", probes=(True,))
def flushed(lab: Lab) -> None:
    """At either end before either side closes."""
    _move_in_a_pause(lab)
    lab.traffic.client_says()
    for closes in (lab.traffic.server_closes, lab.traffic.client_closes):
        for role in WHERE:
            lab.conditions.flush_conntrack(role)
        closes()
    lab.finish()


@at_peer(32, "the peers' own host knows a service address")
def service(lab: Lab) -> None:
    """Its translation is taken over, and goes on without its entry."""
    peer = PeerHost(lab)
    peer.begin_by_service(connections=3)
    carry_on_after(lab, lab.move)
    for role in WHERE:
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    lab.finish()


@at_peer(32, "the peers' own host has no route to OLD")
def no_route(lab: Lab) -> None:
    """A socket looks for one before its packet is addressed to NEW."""
    peer = PeerHost(lab)
    lab.begin(pause=True)
    peer.lose_route()
    lab.move()
    for says in (lab.traffic.client_says, lab.traffic.server_says):
        says()
    lab.finish()


@at_peer(32, "the peers' own host, path MTU drops", setup={"routed": ("near", "far")})
def narrow(lab: Lab) -> None:
    """What either end sends is too big for the router in front of the other."""
    _move_in_a_pause(lab)
    lab.traffic.client_says()
    for network in ("far", "near"):
        lab.conditions.path_mtu(network)
    lab.traffic.server_sends(MUCH)
    lab.traffic.client_sends(MUCH)
    for network in ("far", "near"):
        lab.conditions.path_was_narrow(network)
    lab.finish()
