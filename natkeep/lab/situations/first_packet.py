"""Which side sends first after the move, and which closes first.

The first packet decides, because rules alone translate by it: what conntrack makes of it holds
for the rest of the connection (hazards H1, H2 and H4, point T8).
"""

from __future__ import annotations

from natkeep.lab.situations import after_pause

# The usual case: a request is the first packet after the move.
after_pause(1, "client speaks first", "client_says", "server_says")

# A push, without a request before it.
after_pause(2, "server speaks first", "server_says", "client_says")

# The gateway's entry for the connection has no NAT, and rules are not asked again (H1).
after_pause(
    3, "gateway tracks OLD, client first", "client_says", "server_says",
    before=lambda lab: lab.conditions.gateway_tracks(),
)  # fmt: skip

# NEW's packet clashes with that entry, and rules alone give it another port (H2).
after_pause(
    4, "gateway tracks OLD, server first", "server_says", "client_says",
    before=lambda lab: lab.conditions.gateway_tracks(),
)  # fmt: skip

# A FIN is the client's first packet; conntrack picks up nothing by a FIN (H4).
after_pause(5, "client closes first", "client_closes", "server_closes")

# A FIN is the server's first packet, and with the probe lost the first one at all (H4).
after_pause(6, "server closes first", "server_closes", "client_closes")
