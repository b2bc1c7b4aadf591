"""Hands each step to its driver, in the namespace of its site, and each question to its reader.

Rule: this file decides nothing about translation, and sends nothing itself; what the kernel says no
to becomes a KernelError that names the site.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from natkeep.errors import KernelError
from natkeep.kernel import (
    conntrack,
    conntrack_listeners,
    criu_lock,
    nftables,
    owned_table,
    routes,
    rtnetlink,
    segment_holder,
    sock_diag,
)
from natkeep.kernel.interface import Driver, Packed, Place, Remember, Snapshot
from natkeep.kernel.netns import (
    Namespace,
    errors_at,
    find_namespace,
    inside,
    open_namespace,
)
from natkeep.kernel.nft_drivers import NFT_DRIVERS
from natkeep.plan.drift import Observation
from natkeep.plan.move import Move, Role, Site
from natkeep.plan.steps import (
    AddAddress,
    ForgetCalls,
    GuardSite,
    HoldSegments,
    Identity,
    InsertEntries,
    OpenGate,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
    Step,
    TakeOverLock,
)
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple

if TYPE_CHECKING:
    from natkeep.plan.diagnostics import Facts
    from natkeep.plan.repair import Patch
    from natkeep.plan.strays import SeenTable

DRIVERS: dict[type, Driver[Any]] = {
    **NFT_DRIVERS,
    AddAddress: rtnetlink.AddressDriver(),
    ForgetCalls: conntrack_listeners.ForgetDriver(),
    GuardSite: owned_table.OwnedTableDriver(),
    HoldSegments: segment_holder.HoldSegmentsDriver(),
    InsertEntries: conntrack.InsertDriver(),
    PurgeEntries: conntrack.PurgeDriver(),
    RaiseLoopback: rtnetlink.LoopbackDriver(),
    TakeOverLock: criu_lock.LockDriver(),
}
"""By the kind of step."""


def _driver_of(step: Step) -> Driver[Any]:
    return next(DRIVERS[kind] for kind in type(step).__mro__ if kind in DRIVERS)


class LinuxKernel:
    """See natkeep/kernel/interface.py for the laws.

    directory: where a holder is found again, as a socket; without one nothing is held.
    """

    def __init__(self, directory: str = "") -> None:
        self._namespaces: dict[Site, Namespace] = {}
        weakref.finalize(self, _close_all, self._namespaces)
        self._directory = directory

    def open_sites(self, sites: Iterable[Site], known: dict[Site, Identity] | None = None) -> None:
        """Find the namespaces of *sites*; those that *known* names by identity, and no others."""
        for site in sites:
            if known is None:
                found = open_namespace(site.netns)
            else:
                found = find_namespace(site.netns, known[site])
            self.close_sites([site])  # it may have been opened before, and for another move
            self._namespaces[site] = found

    def close_sites(self, sites: Iterable[Site]) -> None:
        """Let go of the namespaces of *sites*; those that are not open are passed over."""
        for site in sites:
            earlier = self._namespaces.pop(site, None)
            if earlier is not None:
                os.close(earlier.fd)

    def identity(self, site: Site) -> Identity:
        """Device and inode of an opened site's namespace."""
        return self._namespaces[site].identity

    def addresses(self, site: Site, version: int) -> tuple[Address, ...]:
        """The addresses of IP *version* that others can reach an opened site at."""
        with self._at(site):
            return rtnetlink.global_addresses(version)

    def survey(self, site: Site) -> Facts:
        """What findings are made of, at an opened site."""
        with self._at(site):
            from natkeep.kernel import survey  # for `check` alone

            return survey.gather_facts()

    def devices(self, site: Site) -> frozenset[str]:
        """Names of the network devices at an opened site."""
        with self._at(site):
            return frozenset(name for _, name in socket.if_nameindex())

    def find_listeners(self, site: Site, olds: frozenset[Address]) -> tuple[Endpoint, ...]:
        """Where somebody listens at one of *olds*, or at a wildcard address."""
        with self._at(site):
            return sock_diag.find_listeners(olds)

    def list_sockets(self, site: Site) -> list[sock_diag.Shown]:
        """Every inet socket at an opened site that a descriptor can open."""
        with self._at(site):
            return sock_diag.list_sockets()

    def count_waiting(self, site: Site, listeners: tuple[Endpoint, ...]) -> dict[Endpoint, int]:
        """How many callers of each listener have not been accepted yet; none is left out."""
        with self._at(site):
            return sock_diag.count_waiting(listeners)

    def look_around(self, move: Move, connections: Connections) -> Surroundings:
        """What make_plan has to know of the opened sites of *move*."""
        local: frozenset[Address] = frozenset()
        carried: list[tuple[FourTuple, FourTuple]] = []
        for site in move.sites:
            kept = [connections.at(map_.old) for map_ in move.maps]
            with self._at(site):
                if site.role == Role.DESTINATION:
                    peers = {peer for some in (*kept, move.lost) for peer in some.peers()}
                    here = peers & rtnetlink.all_addresses()
                    local |= frozenset(ip_address(packed) for packed in here)
                elif site.role == Role.GATEWAY and not carried:
                    carried = [pair for some in kept for pair in conntrack.find_carried(some)]
        return Surroundings(
            local,
            Connections.of(inner for inner, _ in carried),
            Connections.of(outer for _, outer in carried),
        )

    @contextmanager
    def _at(self, site: Site) -> Iterator[None]:
        with errors_at(site), inside(self._namespaces[site]):
            yield

    def _place(self, site: Site) -> Place:
        return Place(site, self._namespaces[site], self._directory)

    @contextmanager
    def _entering(self, driver: Driver[Any], site: Site) -> Iterator[None]:
        with errors_at(site), inside(self._namespaces[site]) if driver.enters else nullcontext():
            yield

    def check(self, step: Step) -> None:
        """NatkeepError when *step* could not work."""
        driver = _driver_of(step)
        with self._entering(driver, step.site):
            driver.check(self._place(step.site), step)

    def apply(self, step: Step, remember: Remember) -> Prior:
        """Do *step*; KernelError when the kernel says no."""
        driver = _driver_of(step)
        with self._entering(driver, step.site):
            return driver.apply(self._place(step.site), step, remember)

    def revert(self, step: Step, prior: Prior) -> None:
        """Undo *step*; KernelError when the kernel says no."""
        driver = _driver_of(step)
        with self._entering(driver, step.site):
            driver.revert(self._place(step.site), step, prior)

    def mend(self, patch: Patch, remember: Remember) -> None:
        """Do what a repair found missing; KernelError when the kernel says no."""
        from natkeep.plan.repair import LoadObjects, PutWays, StopCounting

        if not isinstance(patch, LoadObjects | PutWays | StopCounting):
            self.apply(patch, remember)
            return
        with self._at(patch.site):
            remember(Prior())
            match patch:
                case LoadObjects():
                    nftables.load(patch.objects)
                case PutWays():
                    routes.put_back(patch.notes)
                case StopCounting():
                    conntrack.stop_counting()

    def find_lost_routes(self, site: Site, noted: str) -> tuple[str, ...]:
        """Those of the routes and addresses that InstallTranslation *noted* which are gone."""
        with self._at(site):
            return routes.find_lost(noted)

    def find_strays(self, site: Site) -> SeenTable:
        """What stands in the tables natkeep of an opened site, whosever it is."""
        from natkeep.kernel import nft_strays  # for gc alone

        with self._at(site):
            return nft_strays.read_table()

    def clear_strays(
        self, site: Site, known: frozenset[str], olds: frozenset[Address], *, sure: bool
    ) -> None:
        """Take away there what no *known* move owns; KernelError when the kernel says no."""
        from natkeep.kernel import nft_strays  # for gc alone

        with self._at(site):
            nft_strays.clear(nft_strays.read_table(), known, olds, sure=sure)

    def pack_open(self, step: OpenGate) -> Packed | None:
        """What `apply` would send for *step*, ready to be sent."""
        with self._at(step.site):
            return nftables.pack_open(step)

    def pack_unhooking(self, site: Site) -> bytes:
        """What takes the gates of an opened site out of all packets' way, as things stand now."""
        with self._at(site):
            return nftables.pack_gate_hook_removal()

    def unhook_gates(self) -> None:
        """At each opened site where no gate is closed take them out of all packets' way.

        It saves time and nothing else, so it never fails.
        """
        for site in self._namespaces:
            with suppress(KernelError), self._at(site):
                nftables.remove_gate_hook()

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now."""
        with closing(self.snapshot(site)) as snapshot:
            return snapshot.observe(site, plan)

    def snapshot(self, site: Site) -> Snapshot:
        """What an opened site's namespace shows, for one move or for many."""
        from natkeep.kernel import snapshot  # a prepare need not wait for it

        with errors_at(site):
            return snapshot.Snapshot(self._namespaces[site], self._directory)


def _close_all(namespaces: dict[Site, Namespace]) -> None:
    while namespaces:
        os.close(namespaces.popitem()[1].fd)
