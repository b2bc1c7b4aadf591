"""the situations of connection tracking: it picks up nothing, forgets all, or is strict.

Hazards H4, H5, H11, H12, H13 and H17, points T8 and T11.
"""

from __future__ import annotations

from natkeep.lab.lab import Lab
from natkeep.lab.situations import situation


@situation(7, "tcp_loose=0 at every hop")
def not_loose(lab: Lab) -> None:
    """conntrack takes no connection up midway, so nothing is translated that has no entry."""
    lab.conntrack_loose(0)
    lab.serve()
    lab.dial()
    lab.talk()
    lab.quiet()
    lab.move()
    lab.client_says()
    lab.server_says()
    lab.client_closes()
    lab.server_closes()
    lab.finish()


@situation(9, "strict firewalls")
def strict_firewalls(lab: Lab) -> None:
    """`ct state invalid drop`, `established accept`, `policy drop`, at gateway and destination."""
    lab.strict_firewall()
    lab.serve()
    lab.dial()
    lab.talk()
    lab.move()
    lab.talk_on()
    lab.quiet()
    lab.server_says()
    lab.server_closes()
    lab.client_closes()
    lab.finish()


@situation(10, "other NAT at -100/100 masquerades")
def masquerading(lab: Lab) -> None:
    """As container engines install it: at an equal priority the last one loaded wins."""
    lab.masquerading_table()
    lab.serve()
    lab.dial()
    lab.talk()
    lab.quiet()
    lab.move()
    lab.talk()
    lab.talk_on()
    lab.quiet()
    lab.server_says()
    lab.client_says()
    lab.finish()


@situation(11, "conntrack -F at gateway and destination")
def forgotten(lab: Lab) -> None:
    """Somebody flushes both tables in mid-flow, then in a pause before either side speaks."""
    lab.serve()
    lab.dial()
    lab.talk()
    lab.quiet()
    lab.move()
    lab.talk()
    lab.talk_on()
    lab.flush_conntrack("gateway")
    lab.talk_on()
    lab.flush_conntrack("destination")
    lab.talk_on()
    lab.quiet()
    for role in lab.sites:
        lab.flush_conntrack(role)
    lab.server_says()
    for role in lab.sites:
        lab.flush_conntrack(role)
    lab.client_says()
    lab.finish()
