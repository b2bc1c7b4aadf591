"""the real kernel: each step done, undone and looked at in the namespace of its site.

Rule: this file decides nothing about translation; it hands each step to the file that can do
it (nft.py, elements.py, conntrack.py, address.py) and turns refusals into KernelError.
"""

from __future__ import annotations

import os
import socket
import weakref
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from natkeep import faultpoints
from natkeep.errors import KernelError, RefusedError
from natkeep.kernel import (
    checks,
    conntrack,
    conntrack_listeners,
    criu_lock,
    nft,
    nftables,
    passing,
    rtnetlink,
    sock_diag,
    table,
)
from natkeep.kernel import quiet as quietness
from natkeep.kernel.conntrack_purge import delete_untracked
from natkeep.kernel.interface import Driver, Packed, Place, Remember, Snapshot
from natkeep.kernel.netns import (
    Namespace,
    errors_at,
    find_namespace,
    inside,
    open_namespace,
)
from natkeep.plan import resets, ruleset
from natkeep.plan.drift import Gate, Observation
from natkeep.plan.move import Move, Role, Site
from natkeep.plan.ruleset import TABLE
from natkeep.plan.steps import (
    AddAddress,
    FillSet,
    ForgetCalls,
    GuardSite,
    HoldListeners,
    HoldSegments,
    Identity,
    InsertEntries,
    InstallGate,
    InstallReception,
    InstallResets,
    InstallTranslation,
    OpenGate,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
    SendResets,
    Step,
    TakeOverLock,
    TranslateErrors,
)
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple

if TYPE_CHECKING:
    from natkeep.plan.diagnostics import Facts
    from natkeep.plan.mending import Patch
    from natkeep.plan.strays import SeenTable


DRIVERS: dict[type, Driver[Any]] = {
    PurgeEntries: conntrack.PurgeDriver(),
    InsertEntries: conntrack.InsertDriver(),
    ForgetCalls: conntrack_listeners.ForgetDriver(),
}
"""By the kind of step."""


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
        driver = DRIVERS.get(type(step))
        if driver is not None:
            with self._entering(driver, step.site):
                driver.check(self._place(step.site), step)
            return
        with self._at(step.site):
            match step:
                case InstallGate():
                    if nftables.rules(TABLE, ruleset.gate_chain(step.move_id)):
                        raise RefusedError(
                            f"{step.site}: move {step.move_id} is prepared there already",
                            hint=f"natkeep teardown {step.move_id}, or another id",
                        )
                case InstallTranslation() if step.site.role == Role.DESTINATION:
                    checks.check_destination(step)
                case TakeOverLock():
                    criu_lock.find_lock(step.lock, step.connections)
                case InstallReception() if step.site.role == Role.DESTINATION:
                    checks.check_reception(step)
                case _:
                    pass

    def apply(self, step: Step, remember: Remember) -> Prior:
        """Do *step*; KernelError when the kernel says no."""
        driver = DRIVERS.get(type(step))
        if driver is not None:
            with self._entering(driver, step.site):
                return driver.apply(self._place(step.site), step, remember)
        if isinstance(step, HoldSegments):
            return self._hold(step, remember)
        if isinstance(step, GuardSite):
            return self._guard(step, remember)
        with self._at(step.site):
            match step:
                case InstallGate():
                    return table.install_gate(step, remember)
                case FillSet():
                    remember(Prior())
                    nftables.fill_set(TABLE, step.name, step.connections)
                case RaiseLoopback():
                    return _raise_loopback(remember)
                case AddAddress():
                    return _add_address(step, remember)
                case InstallTranslation():
                    prior = _note_ways(step)
                    remember(prior)
                    nft.run_transaction(
                        [*table.missing_mode_lines(step.translations), *step.lines()]
                    )
                    return prior
                case InstallReception():
                    remember(Prior())
                    nft.run_transaction([*table.missing_mode_lines(step.receptions), *step.lines()])
                case HoldListeners():
                    remember(Prior())
                    quietness.hold(step)
                case TakeOverLock():
                    prior = criu_lock.find_lock(step.lock, step.connections)
                    remember(prior)
                    criu_lock.take_lock(step.lock, step.connections)
                    return prior
                case TranslateErrors():
                    remember(Prior())
                    from natkeep.kernel.expressions import insert_rules  # for stateless moves

                    insert_rules(TABLE, step.rules())
                case InstallResets():
                    remember(Prior())
                    table.install_resets(step)
                case SendResets():
                    return _send_resets(step, remember)
                case OpenGate():
                    prior = Prior(present=table.gate_state(step.move_id) == Gate.OPEN)
                    remember(prior)
                    if not prior.present:
                        passing.open_gates(step)
                    return self._deliver(step, prior)
        return Prior()

    def _hold(self, step: HoldSegments, remember: Remember) -> Prior:
        """Start the holder. It saves time and nothing else, so what keeps it away is noted only."""
        from natkeep.kernel import segment_holder  # whoever does not hold need not wait for it

        remember(Prior())
        if not self._directory:
            return Prior(facts={"refused": "there is no state directory"})
        site = step.site
        try:
            segment_holder.start(
                self._directory, step.move_id, self._namespaces[site], site.netns, step.kept()
            )
        except (OSError, KernelError) as error:
            return Prior(facts={"refused": str(getattr(error, "strerror", None) or error)})
        return Prior()

    def _guard(self, step: GuardSite, remember: Remember) -> Prior:
        """Somebody asked for it, so without it there is no move."""
        from natkeep.kernel import owned_table  # whoever guards nothing need not wait for it

        remember(Prior())
        site = step.site
        if not self._directory:
            raise KernelError(f"{site}: a guard needs a state directory")
        try:
            owned_table.start(
                self._directory, step.move_id, self._namespaces[site], site.netns,
                step.translations,
            )  # fmt: skip
        except OSError as error:
            raise KernelError(
                f"{site}: the kernel makes no guard: {error.strerror}",
                hint="it takes Linux 5.12; a move without --guard is kept as well",
            ) from error
        return Prior()

    def _deliver(self, step: OpenGate, prior: Prior) -> Prior:
        if not (step.delivers and self._directory):
            return prior
        from natkeep.kernel import segment_holder

        held = segment_holder.deliver(self._directory, step.move_id)
        facts = {} if held is None else {"segments": held.segments, "refused": held.refused}
        return Prior(prior.present, {**prior.facts, **facts})

    def mend(self, patch: Patch, remember: Remember) -> None:
        """Do what a repair found missing; KernelError when the kernel says no."""
        from natkeep.plan.mending import InsertRules, LoadLines, PutWays, StopCounting

        if not isinstance(patch, LoadLines | InsertRules | PutWays | StopCounting):
            self.apply(patch, remember)
            return
        with self._at(patch.site):
            remember(Prior())
            match patch:
                case LoadLines():
                    nft.run_transaction([*_lines_before(patch.lines), *patch.lines])
                    passing.let_pass()
                case InsertRules():
                    from natkeep.kernel.expressions import insert_rules  # for stateless moves

                    insert_rules(TABLE, patch.rules)
                case PutWays():
                    from natkeep.kernel import routes

                    routes.put_back(patch.notes)
                case StopCounting():
                    conntrack.stop_counting()

    def find_lost_routes(self, site: Site, noted: str) -> tuple[str, ...]:
        """Those of the routes and addresses that InstallTranslation *noted* which are gone."""
        with closing(self.snapshot(site)) as snapshot:
            return snapshot.find_lost_routes(site, noted)

    def find_strays(self, site: Site) -> SeenTable:
        """What stands in the tables natkeep of an opened site, whosever it is."""
        from natkeep.kernel import stray  # for gc alone

        with self._at(site):
            return stray.read_table()

    def clear_strays(
        self, site: Site, known: frozenset[str], olds: frozenset[Address], *, sure: bool
    ) -> None:
        """Take away there what no *known* move owns; KernelError when the kernel says no."""
        from natkeep.kernel import stray  # for gc alone

        with self._at(site):
            stray.clear(stray.read_table(), known, olds, sure=sure)

    def pack_open(self, step: OpenGate) -> Packed | None:
        """What `apply` would send for *step*, ready to be sent."""
        with self._at(step.site):
            return passing.pack_open(step)

    def pack_unhooking(self, site: Site) -> bytes:
        """What takes the gates of an opened site out of all packets' way, as things stand now."""
        with self._at(site):
            return passing.pack_unhooking()

    def unhook_gates(self) -> None:
        """At each opened site where no gate is closed take them out of all packets' way.

        It saves time and nothing else, so it never fails.
        """
        for site in self._namespaces:
            with suppress(KernelError), self._at(site):
                passing.unhook()

    def revert(self, step: Step, prior: Prior) -> None:
        """Undo *step*; KernelError when the kernel says no."""
        driver = DRIVERS.get(type(step))
        if driver is not None:
            with self._entering(driver, step.site):
                driver.revert(self._place(step.site), step, prior)
            return
        with self._at(step.site):
            match step:
                case InstallGate():
                    table.remove_gate(step, prior)
                    delete_untracked([t.map.old for t in step.translations])
                case RaiseLoopback():
                    _lower_loopback(prior)
                case AddAddress() if not prior.present:
                    rtnetlink.remove_host_address(step.address)
                case InstallTranslation():
                    table.withdraw_translation(step)
                case InstallReception():
                    table.withdraw_reception(step)
                    for receiving in step.receptions:  # who came in while the rules went
                        conntrack_listeners.delete_translated(receiving)
                case HoldListeners():
                    quietness.release(step)
                case HoldSegments() if self._directory:
                    from natkeep.kernel import segment_holder

                    segment_holder.end(self._directory, step.move_id)
                case GuardSite() if self._directory:
                    from natkeep.kernel import owned_table

                    owned_table.end(self._directory, step.move_id, self._namespaces[step.site])
                case TakeOverLock():
                    criu_lock.put_lock_back(step.lock, step.connections, prior)
                case TranslateErrors():
                    table.withdraw_error_rules(step)
                case InstallResets():
                    table.withdraw_resets(step)
                case OpenGate() | SendResets() if not prior.present:
                    table.close_gate(step)
                case _:  # a set goes with its gate
                    pass

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now."""
        with closing(self.snapshot(site)) as snapshot:
            return snapshot.observe(site, plan)

    def snapshot(self, site: Site) -> Snapshot:
        """What an opened site's namespace shows, for one move or for many."""
        from natkeep.kernel import snapshot  # a prepare need not wait for it

        with errors_at(site):
            return snapshot.Snapshot(self._namespaces[site], self._directory)


def _lines_before(lines: tuple[str, ...]) -> list[str]:
    """What has to stand in front of what a repair loads."""
    if ruleset.render_hook()[0] in lines or not any(map(ruleset.closes_gate, lines)):
        return []
    return passing.closing_lines()


def _close_all(namespaces: dict[Site, Namespace]) -> None:
    while namespaces:
        os.close(namespaces.popitem()[1].fd)


def _note_ways(step: InstallTranslation) -> Prior:
    """The routes and the address that the translation stands on, for a repair."""
    from natkeep.kernel import routes

    news = [t.map.new for t in step.translations]
    peers = sorted({peer for t in step.translations for peer in t.outer.peers()})
    others = [ip_address(peer) for peer in peers]
    at_destination = step.site.role == Role.DESTINATION
    own, others = (news, others) if at_destination else ([], [*news, *others])
    noted = routes.note(own, others)
    return Prior(facts={"ways": noted} if noted else {})


def _raise_loopback(remember: Remember) -> Prior:
    prior = Prior(present=rtnetlink.loopback_is_up(), facts={"addresses": rtnetlink.count_on_lo()})
    remember(prior)
    if not prior.present:
        rtnetlink.raise_loopback()
    return prior


def _lower_loopback(prior: Prior) -> None:
    if prior.present:
        return
    rtnetlink.lower_loopback()
    faultpoints.reach("loopback-lowered")
    if not prior.facts.get("addresses"):
        rtnetlink.forget_loopback_address()


def _add_address(step: AddAddress, remember: Remember) -> Prior:
    prior = Prior(present=rtnetlink.device_of(step.address) is not None)
    remember(prior)
    if not prior.present:
        rtnetlink.add_host_address(step.address)
    return prior


def _send_resets(step: SendResets, remember: Remember) -> Prior:
    chain = resets.reset_chain(step.move_id)
    prior = Prior(present=table.chain_state(chain) == Gate.OPEN)
    remember(prior)
    if prior.present:
        return prior
    nft.run_transaction(step.lines())
    from natkeep.kernel.tcp_probe import ask  # where there is anybody to ask

    return Prior(facts={"asked": ask(step.questions())})
