"""the real kernel: each step done, undone and looked at in the namespace of its site.

Rule: this file decides nothing about translation; it hands each step to the file that can do
it (nft.py, elements.py, conntrack.py, address.py) and turns refusals into KernelError.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from natkeep import faultpoints
from natkeep.errors import KernelError
from natkeep.kernel import (
    calls,
    checks,
    conntrack,
    criu_lock,
    nftables,
    owned,
    owned_table,
    routes,
    rtnetlink,
    segment_holder,
    snapshot,
    sock_diag,
)
from natkeep.kernel.closely import CloseEyes
from natkeep.kernel.interface import Driver, Inverse, Packed, Panorama, Place, Remember
from natkeep.kernel.netns import (
    Namespace,
    errors_at,
    find_namespace,
    inside,
    open_namespace,
)
from natkeep.kernel.nft_drivers import NFT_DRIVERS, NFT_INVERSES
from natkeep.kernel.purge import purge
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
from natkeep.plan.translation import Surroundings, Translation
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple
from natkeep.plan.undo import (
    DeleteEntries,
    EndHolder,
    ForgetListeners,
    LowerLoopback,
    PutLockBack,
    RemoveAddress,
    RemoveOwnedTable,
    RestoreEntries,
    Undo,
)

if TYPE_CHECKING:
    from natkeep.plan.diagnostics import Facts
    from natkeep.plan.repair import Patch
    from natkeep.plan.strays import SeenTable

_INSERT_ATTEMPTS = 5
"""A packet may make a stale entry between purge and insertion; five times in a row it does not."""


DRIVERS: dict[type, Any] = {
    **NFT_DRIVERS,
    AddAddress: rtnetlink.AddressDriver(),
    GuardSite: owned_table.OwnedTableDriver(),
    HoldSegments: segment_holder.HoldSegmentsDriver(),
    RaiseLoopback: rtnetlink.LoopbackDriver(),
    TakeOverLock: criu_lock.LockDriver(),
}
"""By the kind of step."""

INVERSES: dict[type, Inverse[Any]] = {
    **NFT_INVERSES,
    EndHolder: DRIVERS[HoldSegments],
    LowerLoopback: DRIVERS[RaiseLoopback],
    PutLockBack: DRIVERS[TakeOverLock],
    RemoveAddress: DRIVERS[AddAddress],
    RemoveOwnedTable: DRIVERS[GuardSite],
}
"""By the kind of undo."""


def _driver_of(step: Step) -> Driver[Any] | None:
    return next((DRIVERS[kind] for kind in type(step).__mro__ if kind in DRIVERS), None)


class LinuxKernel:
    """See natkeep/kernel/__init__.py for the laws.

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
                    carried = [pair for some in kept for pair in _find_carried(some)]
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
    def _entering(self, driver: Driver[Any] | Inverse[Any], site: Site) -> Iterator[None]:
        with errors_at(site), inside(self._namespaces[site]) if driver.enters else nullcontext():
            yield

    def check(self, step: Step) -> None:
        """NatkeepError when *step* could not work."""
        driver = _driver_of(step)
        if driver is not None:
            with self._entering(driver, step.site):
                driver.check(self._place(step.site), step)
            return
        with self._at(step.site):
            match step:
                case InsertEntries():
                    checks.check_room(step)
                case _:
                    pass

    def apply(self, step: Step, remember: Remember) -> Prior:
        """Do *step*; KernelError when the kernel says no."""
        driver = _driver_of(step)
        if driver is not None:
            with self._entering(driver, step.site):
                return driver.apply(self._place(step.site), step, remember)
        with self._at(step.site):
            match step:
                case ForgetCalls():
                    remember(Prior())
                    for receiving in step.receptions:
                        calls.forget_unanswered(receiving)
                case PurgeEntries():
                    return _purge_entries(step, remember)
                case InsertEntries():
                    return _insert_entries(step, remember)
        return Prior()

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
                    conntrack.write_setting("nf_conntrack_acct", "0")

    def find_lost_ways(self, site: Site, noted: str) -> tuple[str, ...]:
        """Those of the ways that InstallTranslation *noted* which are not there any more."""
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

    def revert(self, site: Site, undo: Undo, prior: Prior) -> None:
        """Undo a step at an opened site, by its inverse; KernelError when the kernel says no."""
        if prior.present:
            return
        inverse = INVERSES.get(type(undo))
        if inverse is not None:
            with self._entering(inverse, site):
                inverse.revert(self._place(site), undo, prior)
            return
        with self._at(site):
            match undo:
                case ForgetListeners():
                    for reception in undo.listeners:
                        calls.hang_up(reception)
                case DeleteEntries():
                    _restore_accounting(prior)
                    conntrack.delete_inbound(undo.outer)
                case RestoreEntries():
                    ways = owned.ways_of(prior)
                    owned.give_back(undo.outer, undo.kept, ways, renames=undo.renames)
                case _:
                    pass

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now."""
        with self._at(site):
            return snapshot.observe(site, plan, CloseEyes(self._namespaces[site], self._directory))

    def take_panorama(self, site: Site) -> Panorama:
        """An opened site's namespace, to be looked at for many moves."""
        from natkeep.kernel.panorama import LinuxPanorama  # for status of many moves alone

        with errors_at(site):
            return LinuxPanorama(self._namespaces[site], self._directory)


def _close_all(namespaces: dict[Site, Namespace]) -> None:
    while namespaces:
        os.close(namespaces.popitem()[1].fd)


def _find_carried(connections: Connections) -> Iterator[tuple[FourTuple, FourTuple]]:
    """Connections that this namespace translates already: inside and outside."""
    if not len(connections) or conntrack.read_setting("nf_conntrack_count") in ("0", None):
        return
    for inner, outer in zip(connections, conntrack.find_carried(connections), strict=True):
        if outer is not None:
            yield inner, outer


def _purge_entries(step: PurgeEntries, remember: Remember) -> Prior:
    at_gateway = step.site.role == Role.GATEWAY
    prior = Prior(facts={"own": owned.read(step.translation)} if at_gateway else {})
    remember(prior)
    purge(step.translation)
    return prior


def _insert_entries(step: InsertEntries, remember: Remember) -> Prior:
    # Entries count their packets only if accounting was on when they were made; it is on for
    # just this long, so that other people's connections are none the wiser.
    before = conntrack.read_setting("nf_conntrack_acct")
    remember(Prior(facts={"acct": before}) if before == "0" else Prior())
    counting = before == "0" and conntrack.write_setting("nf_conntrack_acct", "1")
    try:
        faultpoints.reach("insert-counting")
        _insert_despite_races(step.translation)
    except BaseException:
        conntrack.delete(step.translation)
        raise
    finally:
        if counting:
            conntrack.write_setting("nf_conntrack_acct", "0")
    return Prior()


def _insert_despite_races(translation: Translation) -> None:
    for attempt in range(1, _INSERT_ATTEMPTS + 1):
        try:
            conntrack.insert(translation)
        except FileExistsError:
            if attempt == _INSERT_ATTEMPTS:
                raise
        else:
            faultpoints.reach("insert-whole")
            wrong = conntrack.count_wrong(translation)
            if not wrong:
                return
            if attempt == _INSERT_ATTEMPTS:
                raise KernelError(f"conntrack: {wrong} entries do not translate as planned")
        purge(translation)


def _restore_accounting(prior: Prior) -> None:
    if "acct" in prior.facts:
        conntrack.write_setting("nf_conntrack_acct", str(prior.facts["acct"]))
