"""Which side sends first after the move, and which closes first.

The first packet decides, because rules alone translate by it: what conntrack makes of it holds
for the rest of the connection (hazards H1, H2 and H4, point T8).
"""

from __future__ import annotations

from natkeep.lab.lab import Lab
from natkeep.lab.situations import situation


@situation(1, "client speaks first")
def client_first(lab: Lab) -> None:
    """The usual case: a request is the first packet after the move."""
    lab.begin(pause=True)
    lab.move()
    lab.traffic.client_says()
    lab.traffic.server_says()
    lab.finish()


@situation(2, "server speaks first")
def server_first(lab: Lab) -> None:
    """A push, without a request before it."""
    lab.begin(pause=True)
    lab.move()
    lab.traffic.server_says()
    lab.traffic.client_says()
    lab.finish()


@situation(3, "gateway tracks OLD, client first")
def tracked_client_first(lab: Lab) -> None:
    """The gateway's entry for the connection has no NAT, and rules are not asked again (H1)."""
    lab.conditions.gateway_tracks()
    client_first(lab)


@situation(4, "gateway tracks OLD, server first")
def tracked_server_first(lab: Lab) -> None:
    """NEW's packet clashes with that entry, and rules alone give it another port (H2)."""
    lab.conditions.gateway_tracks()
    server_first(lab)


@situation(5, "client closes first")
def client_closes_first(lab: Lab) -> None:
    """A FIN is the client's first packet; conntrack picks up nothing by a FIN (H4)."""
    lab.begin(pause=True)
    lab.move()
    lab.traffic.client_closes()
    lab.traffic.server_closes()
    lab.finish()


@situation(6, "server closes first")
def server_closes_first(lab: Lab) -> None:
    """A FIN is the server's first packet, and with the probe lost the first one at all (H4)."""
    lab.begin(pause=True)
    lab.move()
    lab.traffic.server_closes()
    lab.traffic.client_closes()
    lab.finish()
