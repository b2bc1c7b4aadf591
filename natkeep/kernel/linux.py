"""the real kernel: each step done, undone and looked at in the namespace of its site.

Rule: this file decides nothing about a step; it opens namespaces, hands each step to the driver of
its kind, and turns refusals into KernelError.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from natkeep.errors import KernelError
from natkeep.kernel import (
    conntrack,
    conntrack_listeners,
    conntrack_own,
    criu_lock,
    ip_rules,
    lost_routes,
    nftables,
    old_route,
    owned_table,
    relay_host,
    rtnetlink,
    segment_holder,
    sysctl,
    undone_table,
)
from natkeep.kernel.interface import (
    Driver,
    Inverse,
    Place,
    Remember,
    RememberMany,
    Snapshot,
)
from natkeep.kernel.netns import Namespace, errors_at, find_namespace, inside, open_namespace
from natkeep.kernel.nft_drivers import NFT_DRIVERS, NFT_INVERSES
from natkeep.kernel.old_address import find_at_home
from natkeep.plan.entry_attributes import Noted
from natkeep.plan.identity import Identity
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.nft import Key
from natkeep.plan.observation import Observation
from natkeep.plan.protocols import UDP
from natkeep.plan.roles import Role
from natkeep.plan.step_undo import (
    DeleteDatagrams,
    DeleteEntries,
    EndHolder,
    ForgetListeners,
    LowerLoopback,
    Nothing,
    PutLockBack,
    RemoveAddress,
    RemoveOwnedTable,
    RemoveRoute,
    RemoveRules,
    RemoveUndone,
    RestoreEntries,
    RestoreForwarding,
    Undo,
)
from natkeep.plan.steps import (
    AddAddress,
    AddRoute,
    AddRules,
    DropUndone,
    ForgetCalls,
    GuardSite,
    HoldSegments,
    InsertEntries,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
    Step,
    SwitchForwarding,
    TakeOverLock,
)
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple

if TYPE_CHECKING:
    from natkeep.plan.repair import Patch

P = ParamSpec("P")
T = TypeVar("T")

DRIVERS: dict[type, Any] = {
    **NFT_DRIVERS,
    AddAddress: rtnetlink.AddressDriver(),
    AddRoute: old_route.RouteDriver(),
    AddRules: ip_rules.RulesDriver(),
    DropUndone: undone_table.DropUndoneDriver(),
    ForgetCalls: conntrack_listeners.ForgetDriver(),
    GuardSite: owned_table.OwnedTableDriver(),
    HoldSegments: segment_holder.HoldSegmentsDriver(),
    InsertEntries: conntrack.InsertDriver(),
    PurgeEntries: conntrack.PurgeDriver(),
    RaiseLoopback: rtnetlink.LoopbackDriver(),
    SwitchForwarding: relay_host.ForwardingDriver(),
    TakeOverLock: criu_lock.LockDriver(),
}
"""By the kind of step; a kind that is derived from another has its driver."""

_FORWARDING = ("ipv4/ip_forward", "ipv6/conf/all/forwarding")

INVERSES: dict[type, Inverse[Any]] = {
    **NFT_INVERSES,
    DeleteDatagrams: DRIVERS[PurgeEntries],
    DeleteEntries: DRIVERS[InsertEntries],
    EndHolder: DRIVERS[HoldSegments],
    ForgetListeners: DRIVERS[ForgetCalls],
    LowerLoopback: DRIVERS[RaiseLoopback],
    PutLockBack: DRIVERS[TakeOverLock],
    RestoreForwarding: DRIVERS[SwitchForwarding],
    RemoveAddress: DRIVERS[AddAddress],
    RemoveOwnedTable: DRIVERS[GuardSite],
    RemoveRoute: DRIVERS[AddRoute],
    RemoveRules: DRIVERS[AddRules],
    RemoveUndone: DRIVERS[DropUndone],
    RestoreEntries: DRIVERS[PurgeEntries],
}
"""By the kind of undo."""


class LinuxKernel:
    """See interface.py for the laws.

    directory: where a holder is found again, as a socket; without one nothing is held.
    """

    def __init__(self, directory: str = "") -> None:
        self._namespaces: dict[Site, Namespace] = {}
        self._unheard: set[Identity] = set()
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

    @contextmanager
    def staying(self, sites: Iterable[Site]) -> Iterator[None]:
        """In the block it is quicker to ask and to change these opened sites, if they are one."""
        # Where a destination's own host is looked at, too, the thread has to be at home.
        there = {self._namespaces[one].identity: one for one in sites if not one.row.puts_old}
        [site, *others] = there.values() or [None]
        with nullcontext() if site is None or others else inside(self._namespaces[site]):
            yield

    # ---- what a site shows -------------------------------------------------------------------

    def ask(self, site: Site, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What *question*, a function of kernel/ that only reads, answers about an opened site."""
        with self._at(site):
            return question(*args, **kwargs)

    def look_around(self, move: Move, connections: Connections) -> Surroundings:
        """What make_plan has to know of the opened sites of *move*."""
        local = beside = home = frozenset[Address]()
        forwards, forwarding = False, tuple[str, ...]()
        carried: list[tuple[FourTuple, FourTuple]] = []
        noted: list[Noted] = []
        at_peers: list[tuple[Site, frozenset[Address]]] = []
        for site in (one for one in move.sites if one.row.leaves):
            kept = move.share(connections)
            every = [*kept, *move.share(move.udp)]
            with self._at(site):
                rare = site.role == Role.DESTINATION
                entries = [own for one in kept for own in conntrack_own.find_own(one, rare=rare)]
                noted += conntrack_own.find_noted(site, entries)
                if site.role == Role.DESTINATION:
                    moved = map(move.on_wire, every if move.peer_maps else ())
                    local |= _find_local_peers((*every, move.lost, *moved))
                    forwards = any(sysctl.read(name) == "1" for name in _FORWARDING)
                    home |= find_at_home(frozenset(map_.old for map_ in move.maps))
                elif site.row.relays:
                    beside |= _find_local_peers(every)
                    forwarding = relay_host.find_forwarding(move, connections)
                elif move.mode == Mode.STATELESS:
                    beside |= _find_local_peers((*kept, move.lost))
                if site.row.own:
                    here = _find_local_peers(every)
                    at_peers.append((site, here))
                    found = conntrack_own.find_carried(entries)
                    carried += [pair for pair in found if pair[0].source.address in here]
                elif site.row.passes_on and not (site.row.relays or carried):
                    carried = [*conntrack_own.find_carried(entries)]
        inner, outer = _split(self._find_datagrams(move, dict(at_peers)))
        return Surroundings(
            local,
            *_split(carried),
            noted=tuple(noted),
            beside=beside,
            home=home,
            forwards=forwards,
            at_peers=tuple(at_peers),
            forwarding=forwarding,
            udp_carried=inner,
            udp_carriers=outer,
            masqueraded=self._find_masqueraded(move),
        )

    def _find_datagrams(
        self, move: Move, at_peers: Mapping[Site, frozenset[Address]]
    ) -> list[tuple[FourTuple, FourTuple]]:
        """What gateways, and peers' hosts, translate already of what is kept of UDP."""
        found: list[tuple[FourTuple, FourTuple]] = []
        for site in move.sites if len(move.udp) and not move.why_no_udp() else ():
            if site.row.relays or not site.row.passes_on or (found and site not in at_peers):
                continue
            with self._at(site):
                some = move.share(move.udp)
                entries = (own for one in some for own in conntrack_own.find_own(one, protocol=UDP))
                pairs = [*conntrack_own.find_carried(entries)]
            here = at_peers.get(site)
            found += (pair for pair in pairs if here is None or pair[0].source.address in here)
        return found

    def _find_masqueraded(self, move: Move) -> frozenset[Endpoint]:
        """Of the UDP sockets without a peer those that a gateway masquerades."""
        ends = {end.packed: end for end in move.kept_servers}
        found: set[Endpoint] = set()
        for site in move.sites if ends else ():
            if site.row.passes_on and not (site.row.relays or site.row.own):
                with self._at(site):
                    for version in {end.address.version for end in ends.values()}:
                        some = conntrack_own.find_masqueraded(frozenset(ends), version)
                        found.update(ends[one] for one in some)
        return frozenset(found)

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now."""
        with closing(self.snapshot(site)) as snapshot:
            return snapshot.observe(site, plan)

    def find_lost_routes(self, site: Site, noted: str) -> tuple[str, ...]:
        """Those of the routes and addresses that InstallTranslation *noted* which are gone."""
        with self._at(site):
            return lost_routes.find_lost(noted)

    def find_missing(self, site: Site, plan: Plan) -> frozenset[Key]:
        """The objects of *plan* that an opened site's tables lack."""
        from natkeep.kernel import snapshot

        with (
            errors_at(site),
            closing(snapshot.Snapshot(self._namespaces[site], self._directory)) as seen,
        ):
            return seen.find_missing(site, plan)

    def snapshot(self, site: Site) -> Snapshot:
        """What an opened site's namespace shows, for one move or for many."""
        from natkeep.kernel import snapshot  # a prepare need not wait for it

        with errors_at(site):
            return snapshot.Snapshot(self._namespaces[site], self._directory)

    # ---- steps -------------------------------------------------------------------------------

    def check(self, step: Step) -> None:
        """NatkeepError when *step* could not work."""
        with self._driving(step) as (driver, place):
            driver.check(place, step)

    def apply(self, step: Step, remember: Remember) -> Prior:
        """Do *step*; KernelError when the kernel says no."""
        with self._driving(step) as (driver, place):
            return driver.apply(place, step, remember)

    def apply_many(self, steps: Sequence[Step], remember: RememberMany) -> list[Prior]:
        """Do steps of one kind at one site, each of another move; KernelError as for `apply`."""
        with self._driving(steps[0]) as (driver, place):
            return driver.apply_many(place, steps, remember)

    def revert(self, site: Site, undo: Undo, prior: Prior) -> None:
        """Undo a step at an opened site, by its inverse; KernelError when the kernel says no."""
        self.revert_many(site, [(undo, prior)])

    def revert_many(self, site: Site, undos: Sequence[tuple[Undo, Prior]]) -> None:
        """Undo steps of one kind at one site, each of another move; again is fine."""
        own = [each for each in undos if not (each[1].present or isinstance(each[0], Nothing))]
        if own:
            inverse = INVERSES[type(own[0][0])]
            with self._entering(site, enters=inverse.enters) as place:
                inverse.revert_many(place, own)

    def mend(self, patch: Patch, remember: Remember) -> None:
        """Do what a repair found missing; KernelError when the kernel says no."""
        from natkeep.plan.repair import LoadObjects, RestoreRoutes, StopCounting

        if not isinstance(patch, LoadObjects | RestoreRoutes | StopCounting):
            self.apply(patch, remember)
            return
        with self._at(patch.site):
            remember(Prior())
            match patch:
                case LoadObjects():
                    nftables.load(patch.objects)
                case RestoreRoutes():
                    lost_routes.put_back(patch.notes)
                case StopCounting():
                    conntrack.stop_counting()

    def clear_strays(
        self, site: Site, known: frozenset[str], olds: frozenset[Address], *, sure: bool
    ) -> None:
        """Take away there what no *known* move owns; KernelError when the kernel says no."""
        from natkeep.kernel import nft_strays  # for gc alone

        with self._at(site):
            nft_strays.clear(nft_strays.read_table(), known, olds, sure=sure)

    # ---- the gates' base chain ---------------------------------------------------------------

    def unhook_gates(self) -> bool:
        """At each opened site where no gate is closed take them out of all packets' way.

        And what ignores resets of peers that were not heard, where all were.
        It saves time and nothing else, so it never fails.
        """
        for site in self._namespaces:
            with suppress(KernelError), self._at(site):
                nftables.remove_gate_hook()
                # Once a command: a thousand moves at a site are looked at one after the other.
                where = self._namespaces[site].identity
                if where not in self._unheard and not nftables.remove_early_hooks():
                    self._unheard.add(where)
        return not self._unheard

    # ---- where -------------------------------------------------------------------------------

    @contextmanager
    def _at(self, site: Site) -> Iterator[None]:
        with errors_at(site), inside(self._namespaces[site]):
            yield

    @contextmanager
    def _driving(self, step: Step) -> Iterator[tuple[Driver[Any], Place]]:
        """The step's driver and where it acts; in the namespace, if the driver wants that."""
        driver = next(DRIVERS[kind] for kind in type(step).__mro__ if kind in DRIVERS)
        with self._entering(step.site, enters=driver.enters) as place:
            yield driver, place

    @contextmanager
    def _entering(self, site: Site, *, enters: bool) -> Iterator[Place]:
        namespace = self._namespaces[site]
        with errors_at(site), inside(namespace) if enters else nullcontext():
            yield Place(site, namespace, self._directory)


def _close_all(namespaces: dict[Site, Namespace]) -> None:
    while namespaces:
        os.close(namespaces.popitem()[1].fd)


def _split(pairs: list[tuple[FourTuple, FourTuple]]) -> tuple[Connections, Connections]:
    return Connections.of(inner for inner, _ in pairs), Connections.of(outer for _, outer in pairs)


def _find_local_peers(kept: Iterable[Connections]) -> frozenset[Address]:
    """The peers' addresses that the namespace of this thread has."""
    peers = {peer for some in kept for peer in some.peers()}
    return frozenset(map(ip_address, peers & rtnetlink.all_addresses()))
