"""What is special about the network: narrow paths, and connection tracking set up otherwise.

On a narrow path a router says that packets are too big. Its error quotes the packet as it passed
there; the sender must see its own tuple in that quote, or it never learns (hazard H19, point T15).
Conntrack may pick up nothing, forget all, or be strict (H4, H5, H11 to H13 and H17, T8 and T11).
"""

from __future__ import annotations

from natkeep.lab.lab import Lab
from natkeep.lab.situations import after_pause, situation

MUCH = 300_000


# conntrack takes no connection up midway, so nothing is translated that has no entry.
after_pause(
    7, "tcp_loose=0 at every hop",
    "client_says", "server_says", "client_closes", "server_closes",
    before=lambda lab: lab.conditions.conntrack_loose(0),
)  # fmt: skip


@situation(8, "path MTU drops beyond the gateway", setup={"routed": ("near",)})
def narrow_to_client(lab: Lab) -> None:
    """The process's packets are too big for a router at the client's side of the gateway."""
    _move_then_narrow(lab, "near")


@situation(8, "path MTU drops before the destination", setup={"routed": ("far",)})
def narrow_to_process(lab: Lab) -> None:
    """The client's packets are too big for a router between gateway and destination."""
    _move_then_narrow(lab, "far")


def _move_then_narrow(lab: Lab, network: str) -> None:
    lab.begin(pause=True)
    lab.move()
    lab.traffic.client_says()
    lab.conditions.path_mtu(network)
    lab.traffic.server_sends(MUCH)
    lab.traffic.client_sends(MUCH)
    lab.conditions.path_was_narrow(network)
    lab.finish()


@situation(26, "fragments", families=(4,), setup={"routed": ("near", "far")})
def fragments(lab: Lab) -> None:
    """Hosts do not forbid it, so routers cut what is too big, on both sides of the gateway."""
    lab.conditions.fragments()
    lab.begin(pause=True)
    lab.move()
    lab.traffic.client_says(MUCH)
    lab.traffic.server_says(MUCH)
    lab.conditions.fragments_were_made()
    lab.finish()


@situation(9, "strict firewalls")
def strict_firewalls(lab: Lab) -> None:
    """`ct state invalid drop`, `established accept`, `policy drop`, at gateway and destination."""
    lab.conditions.strict_firewall()
    lab.begin()
    lab.move()
    lab.traffic.talk_on()
    lab.traffic.quiet()
    lab.traffic.server_says()
    lab.traffic.server_closes()
    lab.traffic.client_closes()
    lab.finish()


# As container engines install it: at an equal priority the last one loaded wins.
after_pause(
    10, "other NAT at -100/100 masquerades",
    "talk", "talk_on", "quiet", "server_says", "client_says",
    before=lambda lab: lab.conditions.masquerading_table(),
)  # fmt: skip


@situation(11, "conntrack -F at gateway and destination")
def flushed(lab: Lab) -> None:
    """Both tables are flushed in mid-flow, then in a pause before either side sends."""
    lab.begin(pause=True)
    lab.move()
    lab.traffic.talk()
    lab.traffic.talk_on()
    for role in lab.topology.sites:
        lab.conditions.flush_conntrack(role)
        lab.traffic.talk_on()
    lab.traffic.quiet()
    for says in (lab.traffic.server_says, lab.traffic.client_says):
        for role in lab.topology.sites:
            lab.conditions.flush_conntrack(role)
        says()
    lab.finish()
