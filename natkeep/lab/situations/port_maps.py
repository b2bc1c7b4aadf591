"""The map is to another port: `--map OLD:5000=NEW:8080`, wherever the translation is.

The socket keeps its port; the wire to NEW shows the other one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from natkeep.lab.both_ends import SETUP, BothEnds
from natkeep.lab.lab import Lab
from natkeep.lab.peer_host import PeerHost
from natkeep.lab.relay import ByRelay
from natkeep.lab.situations import THREE_HOSTS, carry_on_after, situation
from natkeep.lab.situations.two_ends import (
    M,
    flushed_before_fins,
    in_order,
    narrow,
    not_loose,
    under_traffic,
)
from natkeep.lab.topology import THIRD

WIRE_PORT = 8080
WHERE = ("gateway", "destination")

to_port = partial(situation, may_refuse=("stateless",))


def _usual(lab: Lab) -> Lab:
    return lab


def _by_peer(lab: Lab) -> Lab:
    PeerHost(lab)
    return lab


def at_port(make: Callable[[Lab], M], lab: Lab) -> M:
    """The same with a map to another port."""
    lab.wire_port = WIRE_PORT
    return make(lab)


_at_gateway = partial(at_port, _usual)

to_port(34, "to another port")(under_traffic(_at_gateway, WHERE))
to_port(34, "to another port, tcp_loose=0")(not_loose(_at_gateway, WHERE))
for _name, _words in {
    "the client says first": ("client_says", "server_says"),
    "the server says first": ("server_says", "client_says"),
    "the client closes first": ("client_closes", "server_says", "server_closes"),
    "the server closes first": ("server_closes", "client_closes"),
}.items():
    to_port(34, f"to another port, {_name}")(in_order(_at_gateway, *_words))
to_port(34, "to another port, entries flushed before a FIN", probes=(True,))(
    flushed_before_fins(_at_gateway, WHERE)
)


@to_port(34, "to another port, moved on and back", probes=(True,), setup=THREE_HOSTS)
def moved_on_and_back(lab: Lab) -> None:
    """To a second host, at the same port there, and home; no entry is left before each."""
    _at_gateway(lab).begin(connections=3)
    for move in (lab.move, partial(lab.move_on, THIRD), lab.move_back):
        for role in ("gateway", lab.site.role):
            lab.conditions.flush_conntrack(role)
        carry_on_after(lab, move)
    lab.finish()


to_port(34, "to another port, path MTU drops", setup={"routed": ("near", "far")})(
    narrow(_at_gateway, "far", "near")
)
to_port(34, "to another port, by a relay")(
    under_traffic(partial(at_port, ByRelay), ("source", "destination"))
)
to_port(34, "to another port, the peers' own host translates")(
    under_traffic(partial(at_port, _by_peer), ("client", "destination"))
)
to_port(34, "to another port, both ends move", setup=SETUP)(
    under_traffic(partial(at_port, BothEnds), ("third", "destination"))
)
