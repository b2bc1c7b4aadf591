"""The peers' own host translates: no gateway is needed (lab/peer_host.py)."""

from __future__ import annotations

from functools import partial

from natkeep.lab.lab import Lab
from natkeep.lab.peer_host import PeerHost
from natkeep.lab.situations import situation
from natkeep.lab.situations.two_ends import (
    flushed_before_fins,
    in_order,
    narrow,
    not_loose,
    under_traffic,
)

at_peer = partial(situation, may_refuse=("stateless",))
WHERE = ("client", "destination")


def _by_peer(lab: Lab) -> Lab:
    PeerHost(lab)
    return lab


at_peer(32, "the peers' own host translates")(under_traffic(_by_peer, WHERE))
at_peer(32, "the peers' own host, tcp_loose=0")(not_loose(_by_peer, WHERE))
at_peer(32, "the peers' own host, the client closes first")(
    in_order(_by_peer, "client_closes", "server_says", "server_closes")
)
at_peer(32, "the peers' own host, the server closes first")(
    in_order(_by_peer, "server_closes", "client_closes")
)
at_peer(32, "the peers' own host, flushed before a FIN", probes=(True,))(
    flushed_before_fins(_by_peer, WHERE)
)
at_peer(32, "the peers' own host, path MTU drops", setup={"routed": ("near", "far")})(
    narrow(_by_peer, "far", "near")
)


class _ByService(PeerHost):
    """The client has dialled a service address, which its host translates."""

    begin = PeerHost.begin_by_service

    def move(self) -> None:
        self.lab.move()

    def finish(self) -> None:
        self.lab.finish()


# Its translation is taken over, and goes on without its entry.
at_peer(32, "the peers' own host knows a service address")(under_traffic(_ByService, WHERE))


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
