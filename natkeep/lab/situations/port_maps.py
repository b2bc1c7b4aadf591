"""The map is to another port: `--map OLD:5000=NEW:8080`, wherever the translation is.

The socket keeps its port; the wire to NEW shows the other one.
"""

from __future__ import annotations

from functools import partial

from natkeep.lab.both_ends import SETUP, BothEnds
from natkeep.lab.lab import Lab
from natkeep.lab.peer_host import PeerHost
from natkeep.lab.relay import ByRelay
from natkeep.lab.situations import THREE_HOSTS, carry_on_after, situation
from natkeep.lab.situations.two_ends import (
    FIRST_WORDS,
    at_port,
    by_gateway,
    flushed_before_fins,
    in_order,
    narrow,
    not_loose,
    under_traffic,
)
from natkeep.lab.topology import THIRD

WHERE = ("gateway", "destination")

to_port = partial(situation, may_refuse=("stateless",))
_at_gateway = partial(at_port, by_gateway)

to_port(34, "to another port")(under_traffic(_at_gateway, WHERE))
to_port(34, "to another port, tcp_loose=0")(not_loose(_at_gateway, WHERE))
for _name, _words in FIRST_WORDS.items():
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
    under_traffic(partial(at_port, PeerHost), ("client", "destination"))
)
to_port(34, "to another port, both ends move", setup=SETUP)(
    under_traffic(partial(at_port, BothEnds), ("third", "destination"))
)
