"""the situations of narrow paths: a router on the way says that packets are too big.

Its error quotes the packet as it passed there; who sent it must see its own tuple in that quote,
or it never learns (hazard H19, point T15). Once narrow, the path carries 300 kB each way.
"""

from __future__ import annotations

from natkeep.lab.lab import Lab
from natkeep.lab.situations import situation

MUCH = 300_000


@situation(8, "path MTU drops beyond the gateway", setup={"routed": ("near",)})
def narrow_to_client(lab: Lab) -> None:
    """The process's packets are too big for a router at the client's side of the gateway."""
    _move_then_narrow(lab, "near")


@situation(8, "path MTU drops before the destination", setup={"routed": ("far",)})
def narrow_to_process(lab: Lab) -> None:
    """The client's packets are too big for a router between gateway and destination."""
    _move_then_narrow(lab, "far")


def _move_then_narrow(lab: Lab, network: str) -> None:
    lab.serve()
    lab.dial()
    lab.talk()
    lab.quiet()
    lab.move()
    lab.client_says()
    lab.path_mtu(network)
    lab.server_sends(MUCH)
    lab.client_sends(MUCH)
    lab.path_was_narrow(network)
    lab.finish()
