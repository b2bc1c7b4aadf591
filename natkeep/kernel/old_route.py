"""Gives the peers' own host a route to OLD where it has none: by lo, for the socket to find.

A socket looks its route up before the packet is addressed to NEW. What no rule translates then goes
to lo, and no further.

Rule: only a route that this added goes, and not while another move translates that address here.
All functions act in the namespace that the calling thread is in.
"""

from __future__ import annotations

from natkeep.kernel import nftables_dump, rtnetlink
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.kernel.netlink import NETLINK_ROUTE, Netlink
from natkeep.plan.base_chains import address_chain
from natkeep.plan.nft import TABLE
from natkeep.plan.step_undo import RemoveRoute
from natkeep.plan.steps import AddRoute, Prior


class RouteDriver(Driver[AddRoute]):
    """AddRoute, and its undoing."""

    def apply(self, at: Place, step: AddRoute, remember: Remember) -> Prior:
        """Add it, unless there is a route; one by lo is another move's, and ours as well."""
        with Netlink(NETLINK_ROUTE) as netlink:
            ours = rtnetlink.is_by_lo(netlink, step.address)
            prior = Prior(present=not ours and rtnetlink.is_reached(netlink, step.address))
        remember(prior)
        if not (ours or prior.present):
            rtnetlink.add_route_through_lo(step.address)
        return prior

    def revert(self, at: Place, undo: RemoveRoute, prior: Prior) -> None:
        """Remove it; the rules of this move are gone by now."""
        if not [*nftables_dump.rules(TABLE, address_chain("in", undo.address))]:
            rtnetlink.remove_route_through_lo(undo.address)
