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

at_peer(32, "the peers' own host translates")(under_traffic(PeerHost, WHERE))
at_peer(32, "the peers' own host, tcp_loose=0")(not_loose(PeerHost, WHERE))
at_peer(32, "the peers' own host, the client closes first")(
    in_order(PeerHost, "client_closes", "server_says", "server_closes")
)
at_peer(32, "the peers' own host, the server closes first")(
    in_order(PeerHost, "server_closes", "client_closes")
)
at_peer(32, "the peers' own host, flushed before a FIN", probes=(True,))(
    flushed_before_fins(PeerHost, WHERE)
)
at_peer(32, "the peers' own host, path MTU drops", setup={"routed": ("near", "far")})(
    narrow(PeerHost, "far", "near")
)


class _ByService(PeerHost):
    """The client has dialled a service address, which its host translates."""

    begin = PeerHost.begin_by_service


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
