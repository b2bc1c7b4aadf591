"""the real kernel: each step done, undone and looked at in the namespace of its site.

Rule: this file decides nothing about translation; it hands each step to the file that can do
it (nft.py, elements.py, conntrack.py, address.py) and turns refusals into KernelError.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from natkeep.errors import KernelError, RefusedError
from natkeep.kernel import (
    Remember,
    address,
    calls,
    checks,
    conntrack,
    criu_lock,
    elements,
    nft,
    rawrule,
    sockets,
    table,
    view,
)
from natkeep.kernel import quiet as quietness
from natkeep.kernel.netns import Namespace, find_namespace, inside, open_namespace
from natkeep.plan import ruleset
from natkeep.plan.drift import Gate, Observation
from natkeep.plan.move import Move, Role, Site, Surroundings, Translation
from natkeep.plan.ruleset import TABLE
from natkeep.plan.steps import (
    AddAddress,
    FillSet,
    ForgetCalls,
    HoldListeners,
    Identity,
    InsertEntries,
    InstallGate,
    InstallReception,
    InstallTranslation,
    OpenGate,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
    Step,
    TakeOverLock,
    TranslateErrors,
)
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple

if TYPE_CHECKING:
    from natkeep.plan.findings import Facts

_INSERT_ATTEMPTS = 5
"""A packet may make a stale entry between purge and insertion; five times in a row it does not."""


class LinuxKernel:
    """See natkeep/kernel/__init__.py for the laws."""

    def __init__(self) -> None:
        self._namespaces: dict[Site, Namespace] = {}

    def open_sites(self, sites: Iterable[Site], known: dict[Site, Identity] | None = None) -> None:
        """Find the namespaces of *sites*; those that *known* names by identity, and no others."""
        for site in sites:
            if known is None:
                self._namespaces[site] = open_namespace(site.netns)
            else:
                self._namespaces[site] = find_namespace(site.netns, known[site])

    def identity(self, site: Site) -> Identity:
        """Device and inode of an opened site's namespace."""
        return self._namespaces[site].identity

    def addresses(self, site: Site, version: int) -> tuple[Address, ...]:
        """The addresses of IP *version* that others can reach an opened site at."""
        with self._at(site):
            return address.global_addresses(version)

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
            return sockets.find_listeners(olds)

    def count_waiting(self, site: Site, listeners: tuple[Endpoint, ...]) -> dict[Endpoint, int]:
        """How many callers of each listener have not been accepted yet; none is left out."""
        with self._at(site):
            return sockets.count_waiting(listeners)

    def look_around(self, move: Move, connections: Connections) -> Surroundings:
        """What make_plan has to know of the opened sites of *move*."""
        local: frozenset[Address] = frozenset()
        carried: list[tuple[FourTuple, FourTuple]] = []
        for site in move.sites:
            kept = [connections.at(map_.old) for map_ in move.maps]
            with self._at(site):
                if site.role == Role.DESTINATION:
                    peers = {inbound.source.address for some in kept for inbound in some}
                    local |= peers & address.all_addresses()
                elif site.role == Role.GATEWAY and not carried:
                    carried = [pair for some in kept for pair in _find_carried(some)]
        return Surroundings(
            local,
            Connections.of(inner for inner, _ in carried),
            Connections.of(outer for _, outer in carried),
        )

    @contextmanager
    def _at(self, site: Site) -> Iterator[None]:
        try:
            with inside(self._namespaces[site]):
                yield
        except KernelError as error:
            raise KernelError(f"{site}: {error}", hint=error.hint) from error
        except OSError as error:
            hint = "natkeep needs CAP_NET_ADMIN there" if error.errno in (1, 13) else None
            raise KernelError(f"{site}: {error.strerror or error}", hint=hint) from error

    def check(self, step: Step) -> None:
        """NatkeepError when *step* could not work."""
        with self._at(step.site):
            match step:
                case InstallGate():
                    if elements.rules(TABLE, ruleset.gate_chain(step.move_id)):
                        raise RefusedError(
                            f"{step.site}: move {step.move_id} is prepared there already",
                            hint=f"natkeep teardown {step.move_id}, or another id",
                        )
                case InstallTranslation() if step.site.role == Role.DESTINATION:
                    checks.check_destination(step)
                case InsertEntries():
                    checks.check_room(step)
                case TakeOverLock():
                    criu_lock.find_lock(step.lock, step.connections)
                case InstallReception() if step.site.role == Role.DESTINATION:
                    checks.check_reception(step)
                case _:
                    pass

    def apply(self, step: Step, remember: Remember) -> Prior:
        """Do *step*; KernelError when the kernel says no."""
        with self._at(step.site):
            match step:
                case InstallGate():
                    return table.install_gate(step, remember)
                case FillSet():
                    remember(Prior())
                    elements.fill_set(TABLE, step.name, step.connections)
                case RaiseLoopback():
                    return _raise_loopback(remember)
                case AddAddress():
                    return _add_address(step, remember)
                case InstallTranslation():
                    remember(Prior())
                    nft.run_transaction(
                        [*table.missing_mode_lines(step.translations), *step.lines()]
                    )
                case InstallReception():
                    remember(Prior())
                    nft.run_transaction([*table.missing_mode_lines(step.receptions), *step.lines()])
                case ForgetCalls():
                    remember(Prior())
                    for receiving in step.receptions:
                        calls.forget_unanswered(receiving)
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
                case PurgeEntries():
                    remember(Prior())
                    return Prior(facts={"purged": conntrack.purge(step.translation)})
                case InsertEntries():
                    return _insert_entries(step, remember)
                case OpenGate():
                    prior = Prior(present=table.gate_state(step.move_id) == Gate.OPEN)
                    remember(prior)
                    if not prior.present:
                        rawrule.insert_accepts(TABLE, step.accepts(), ruleset.OPEN)
                    return prior
        return Prior()

    def revert(self, step: Step, prior: Prior) -> None:
        """Undo *step*; KernelError when the kernel says no."""
        with self._at(step.site):
            match step:
                case InstallGate():
                    table.remove_gate(step)
                case RaiseLoopback():
                    _lower_loopback(prior)
                case AddAddress() if not prior.present:
                    address.remove_host_address(step.address)
                case InstallTranslation():
                    table.withdraw_translation(step)
                case InstallReception():
                    table.withdraw_reception(step)
                case ForgetCalls():
                    for receiving in step.receptions:
                        calls.hang_up(receiving)
                case HoldListeners():
                    quietness.release(step)
                case TakeOverLock():
                    criu_lock.put_lock_back(step.lock, step.connections, prior)
                case TranslateErrors():
                    table.withdraw_error_rules(step)
                case InsertEntries():
                    _restore_accounting(prior)
                    conntrack.delete(step.translation)
                case OpenGate() if not prior.present:
                    table.close_gate(step)
                case PurgeEntries() if step.site.role == Role.GATEWAY and prior.facts.get("purged"):
                    conntrack.give_back(step.translation)
                case _:  # a set goes with its gate
                    pass

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now."""
        with self._at(site):
            return view.observe(site, plan)


def _find_carried(connections: Connections) -> Iterator[tuple[FourTuple, FourTuple]]:
    """Connections that this namespace translates already: inside and outside."""
    if not len(connections) or conntrack.read_setting("nf_conntrack_count") in ("0", None):
        return
    for inner, outer in zip(connections, conntrack.find_carried(connections), strict=True):
        if outer is not None:
            yield inner, outer


def _raise_loopback(remember: Remember) -> Prior:
    prior = Prior(present=address.loopback_is_up(), facts={"addresses": address.count_on_lo()})
    remember(prior)
    if not prior.present:
        address.set_loopback("up")
    return prior


def _lower_loopback(prior: Prior) -> None:
    if prior.present:
        return
    address.set_loopback("down")
    if not prior.facts.get("addresses"):
        address.forget_loopback_address()


def _add_address(step: AddAddress, remember: Remember) -> Prior:
    prior = Prior(present=address.device_of(step.address) is not None)
    remember(prior)
    if not prior.present:
        address.add_host_address(step.address)
    return prior


def _insert_entries(step: InsertEntries, remember: Remember) -> Prior:
    # Entries count their packets only if accounting was on when they were made; it is on for
    # just this long, so that other people's connections are none the wiser.
    before = conntrack.read_setting("nf_conntrack_acct")
    remember(Prior(facts={"acct": before}) if before == "0" else Prior())
    counting = before == "0" and conntrack.write_setting("nf_conntrack_acct", "1")
    try:
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
            # A stale entry that has only our reply tuple is no error: the kernel then gives ours
            # another port, so what it made is looked at.
            seen = conntrack.look_up(translation)
            wrong = sum(1 for entry in seen if not (entry and entry.translated))
            if not wrong:
                return
            if attempt == _INSERT_ATTEMPTS:
                raise KernelError(f"conntrack: {wrong} entries do not translate as planned")
        conntrack.purge(translation)


def _restore_accounting(prior: Prior) -> None:
    if "acct" in prior.facts:
        conntrack.write_setting("nf_conntrack_acct", str(prior.facts["acct"]))
