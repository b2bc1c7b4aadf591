"""the looks before a step: could it work at the site that the thread is in?

Rule: nothing is changed here; what would fail or break somebody is a RefusedError.
"""

from __future__ import annotations

from ipaddress import ip_address

from natkeep.errors import RefusedError
from natkeep.kernel import rtnetlink, sock_diag
from natkeep.plan.move import Site
from natkeep.plan.steps import InstallReception, InstallTranslation
from natkeep.plan.tuples import Address


def check_reception(step: InstallReception) -> None:
    """NEW's port will mean the moved listener, so it must not be somebody else's already."""
    for receiving in step.receptions:
        new = receiving.map.new
        _demand_address(step.site, new)
        taken = sock_diag.listening_ports(new) & set(receiving.ports)
        if taken:
            raise RefusedError(
                f"{step.site}: somebody listens at {new} port {min(taken)} already",
                hint="without --listeners their connections stay apart",
            )


def check_destination(step: InstallTranslation) -> None:
    """NEW is here, each peer has a route, and no socket of NEW's has the tuple."""
    for translation in step.translations:
        _demand_address(step.site, translation.map.new)
        # The gateway could not tell the two apart, and ours would take the other's packets.
        if (theirs := sock_diag.find_alive(translation.outer)) is not None:
            raise RefusedError(
                f"{step.site}: {theirs} is a connection of that host's own already",
                hint="a kept connection would be the same tuple there: choose another NEW",
            )
        for packed in sorted(translation.kept.peers())[:_PEERS]:
            peer = ip_address(packed)
            if not rtnetlink.has_route_to(peer):
                raise RefusedError(
                    f"{step.site}: no route to the peer {peer}",
                    hint="a socket cannot be restored without one",
                )


def _demand_address(site: Site, new: Address) -> None:
    if rtnetlink.device_of(new) is None:
        raise RefusedError(
            f"{site}: NEW {new} is not an address of this namespace",
            hint="give the namespace that has it: --site destination=NETNS",
        )


_PEERS = 64
"""So many peers are looked up before a move; each costs 20 us."""
