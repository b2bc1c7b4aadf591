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
    conntrack,
    criu_lock,
    elements,
    nft,
    rawrule,
    sockets,
)
from natkeep.kernel import quiet as quietness
from natkeep.kernel.netns import Namespace, find_namespace, inside, open_namespace
from natkeep.plan import quiet, reception, ruleset
from natkeep.plan.drift import Gate, Observation
from natkeep.plan.move import Move, Role, Site, Surroundings, Translation
from natkeep.plan.reception import Reception, make_receptions
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
                    _check_destination(step)
                case InsertEntries():
                    _check_room(step)
                case TakeOverLock():
                    criu_lock.find_lock(step.lock, step.connections)
                case InstallReception() if step.site.role == Role.DESTINATION:
                    _check_reception(step)
                case _:
                    pass

    def apply(self, step: Step, remember: Remember) -> Prior:
        """Do *step*; KernelError when the kernel says no."""
        with self._at(step.site):
            match step:
                case InstallGate():
                    return _install_gate(step, remember)
                case FillSet():
                    remember(Prior())
                    elements.fill_set(TABLE, step.name, step.connections)
                case RaiseLoopback():
                    return _raise_loopback(remember)
                case AddAddress():
                    return _add_address(step, remember)
                case InstallTranslation():
                    remember(Prior())
                    nft.run_transaction([*_missing_mode_lines(step.translations), *step.lines()])
                case InstallReception():
                    remember(Prior())
                    nft.run_transaction([*_missing_mode_lines(step.receptions), *step.lines()])
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
                    prior = Prior(present=_gate(step.move_id) == Gate.OPEN)
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
                    _remove_gate(step)
                case RaiseLoopback():
                    _lower_loopback(prior)
                case AddAddress() if not prior.present:
                    address.remove_host_address(step.address)
                case InstallTranslation():
                    _withdraw_translation(step)
                case InstallReception():
                    _withdraw_reception(step)
                case ForgetCalls():
                    for receiving in step.receptions:
                        calls.hang_up(receiving)
                case HoldListeners():
                    quietness.release(step)
                case TakeOverLock():
                    criu_lock.put_lock_back(step.lock, step.connections, prior)
                case TranslateErrors():
                    _withdraw_error_rules(step)
                case InsertEntries():
                    _restore_accounting(prior)
                    conntrack.delete(step.translation)
                case OpenGate() if not prior.present:
                    _close_gate(step)
                case PurgeEntries() if step.site.role == Role.GATEWAY and prior.facts.get("purged"):
                    conntrack.give_back(step.translation)
                case _:  # a set goes with its gate
                    pass

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now."""
        with self._at(site):
            return _observe(site, plan)


def _find_carried(connections: Connections) -> Iterator[tuple[FourTuple, FourTuple]]:
    """Connections that this namespace translates already: inside and outside."""
    if not len(connections) or conntrack.read_setting("nf_conntrack_count") in ("0", None):
        return
    for inner, outer in zip(connections, conntrack.find_carried(connections), strict=True):
        if outer is not None:
            yield inner, outer


def _check_reception(step: InstallReception) -> None:
    """NEW's port will mean the moved listener, so it must not be somebody else's already."""
    for receiving in step.receptions:
        new = receiving.map.new
        _demand_address(step.site, new)
        taken = sockets.listening_ports(new) & set(receiving.ports)
        if taken:
            raise RefusedError(
                f"{step.site}: somebody listens at {new} port {min(taken)} already",
                hint="without --listeners their connections stay apart",
            )


def _check_room(step: InsertEntries) -> None:
    """A table that is nearly full would take neither our entries nor anybody else's."""
    from natkeep.plan.findings import FULL

    count = int(conntrack.read_setting("nf_conntrack_count") or 0)
    limit = int(conntrack.read_setting("nf_conntrack_max") or 0)
    wanted = count + len(step.translation.kept)
    if limit and wanted > limit * FULL // 100:
        raise RefusedError(
            f"{step.site}: the conntrack table would hold {wanted} of {limit} entries, "
            f"over {FULL} %",
            hint="raise net.netfilter.nf_conntrack_max",
        )


def _check_destination(step: InstallTranslation) -> None:
    for translation in step.translations:
        _demand_address(step.site, translation.map.new)
        # The gateway could not tell the two apart, and ours would take the other's packets.
        if (theirs := sockets.find_alive(translation.outer)) is not None:
            raise RefusedError(
                f"{step.site}: {theirs} is a connection of that host's own already",
                hint="a kept connection would be the same tuple there: choose another NEW",
            )
        for peer in sorted({tuple_.source.address for tuple_ in translation.kept})[:_PEERS]:
            if not address.has_route_to(peer):
                raise RefusedError(
                    f"{step.site}: no route to the peer {peer}",
                    hint="a socket cannot be restored without one",
                )


def _demand_address(site: Site, new: Address) -> None:
    if address.device_of(new) is None:
        raise RefusedError(
            f"{site}: NEW {new} is not an address of this namespace",
            hint="give the namespace that has it: --site destination=NETNS",
        )


_PEERS = 64
"""So many peers are looked up before a move; each costs a third of a millisecond."""


def _install_gate(step: InstallGate, remember: Remember) -> Prior:
    lines = list(step.lines())
    if step.site.role == Role.DESTINATION and not elements.has_table(elements.ARP, TABLE):
        lines = [*ruleset.render_arp_static(), *lines]
    if step.site.role == Role.SOURCE:
        lines = [*quietness.missing_static_lines(), *lines]
    if not elements.has_table(elements.INET, TABLE):
        lines = [*ruleset.render_static(), *lines]
    remember(Prior())
    nft.run_transaction(lines)
    return Prior()


def _remove_gate(step: InstallGate) -> None:
    own = {name for t in step.translations for name in ruleset.sets_of(step.move_id, t)}
    if not quietness.is_shared(own):
        # The last move takes the tables with it; others may come only under the same lock.
        if elements.has_table(elements.INET, TABLE) or elements.has_table(elements.ARP, TABLE):
            nft.run_transaction(ruleset.render_removal())
        return
    _withdraw(step.move_id, _gate_chains(step))
    olds = [translation.map.old for translation in step.translations]
    lines = _end_silence(step.site, olds)
    lines += ruleset.render_gate_removal(step.move_id, step.translations)
    _run_what_is_there(lines)


def _end_silence(site: Site, olds: Iterable[Address]) -> list[str]:
    """What lets each OLD be heard again that no move has a gate for any more."""
    if site.role != Role.DESTINATION:
        return []
    return [
        line
        for old in olds
        if not elements.rules(TABLE, ruleset.address_chain(ruleset.GATE, old))
        for line in ruleset.render_speech(old)
    ]


def _missing_mode_lines(some: Iterable[Translation | Reception]) -> list[str]:
    present = elements.chain_names(TABLE)
    modes = dict.fromkeys(one.mode for one in some)
    return [
        line
        for mode in modes
        if ruleset.base_chain_of(mode) not in present
        for line in ruleset.render_mode(mode)
    ]


def _gate_chains(step: InstallGate) -> list[tuple[str, Address]]:
    return [chain for t in step.translations for chain in quiet.gate_chains(t)]


def _withdraw_translation(step: InstallTranslation) -> None:
    chains = [chain for t in step.translations for chain in ruleset.translating_chains(t)]
    _withdraw(step.move_id, chains)
    present = elements.chain_names(TABLE)
    lines = ruleset.render_rewriting_removal(step.move_id, step.translations)
    _run_what_is_there([line for line in lines if line.rpartition(" ")[2] in present])


def _withdraw_reception(step: InstallReception) -> None:
    chains = [chain for receiving in step.receptions for chain in reception.chains(receiving)]
    _withdraw(reception.comment(step.move_id), chains)
    if reception.callers_chain(step.move_id) in elements.chain_names(TABLE):
        lines = _end_silence(step.site, [receiving.map.old for receiving in step.receptions])
        lines += reception.render_removal(step.move_id, step.receptions)
        _run_what_is_there(lines)


def _withdraw_error_rules(step: TranslateErrors) -> None:
    """Those in the chain that all moves share; in an address chain they go with its others."""
    _run_what_is_there(
        [
            f"delete rule inet {TABLE} {ruleset.ERRORS} handle {rule.handle}"
            for rule in elements.rules(TABLE, ruleset.ERRORS)
            if rule.comment in (step.move_id, reception.comment(step.move_id))
        ]
    )


def _withdraw(comment: str, chains: Iterable[tuple[str, Address]]) -> None:
    """Take the rules with this comment out of address chains, and empty chains with them."""
    lines: list[str] = []
    for dispatch, local in dict.fromkeys(chains):
        rules = elements.rules(TABLE, ruleset.address_chain(dispatch, local))
        ours = [rule.handle for rule in rules if rule.comment == comment]
        if ours:
            last = len(ours) == len(rules)
            lines += ruleset.render_withdrawal(dispatch, local, ours, last=last)
    _run_what_is_there(lines)


def _run_what_is_there(lines: list[str]) -> None:
    """Run deletions in one transaction, or, when something is gone already, one by one."""
    if not lines:
        return
    try:
        nft.run_transaction(lines)
    except nft.NftError:
        for line in lines:
            try:
                nft.run_transaction([line])
            except nft.NftError as error:
                if "No such file" not in str(error):
                    raise


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


def _gate(move_id: str) -> Gate:
    rules = elements.rules(TABLE, ruleset.gate_chain(move_id))
    if not rules:
        return Gate.ABSENT
    return Gate.OPEN if any(rule.comment == ruleset.OPEN for rule in rules) else Gate.CLOSED


def _close_gate(step: OpenGate) -> None:
    _run_what_is_there(
        [
            f"delete rule inet {TABLE} {chain} handle {rule.handle}"
            for chain in step.chains()
            for rule in elements.rules(TABLE, chain)
            if rule.comment == ruleset.OPEN
        ]
    )


def _observe(site: Site, plan: Plan) -> Observation:
    here = [t for t in plan.translations if t.site == site]
    move_id, receiving = plan.move.id, make_receptions(plan.move, site)
    inserted = [s.translation for s in plan.prepare if isinstance(s, InsertEntries)]
    entries = {t.number: tuple(conntrack.look_up(t)) for t in inserted if t.site == site}
    if site.role in (Role.DESTINATION, Role.SOURCE):
        alive = sum(sockets.count_alive(t.kept) for t in here)
    else:
        alive = sum(1 for seen in entries.values() for entry in seen if entry and entry.alive)
    return Observation(
        gate=_gate(move_id),
        rules=_observe_rules(move_id, _chains_of(here)),
        missing={
            name: _count_missing(name, connections)
            for t in here
            for name, connections in ruleset.sets_of(move_id, t).items()
        },
        addresses=frozenset(m.old for m in plan.move.maps if address.device_of(m.old)),
        entries=entries,
        alive=alive,
        holds=quietness.is_held(move_id),
        receiving=_observe_rules(
            reception.comment(move_id), [chain for r in receiving for chain in reception.chains(r)]
        ),
        callers=sum(_count_callers(site, r, plan) for r in receiving),
    )


def _chains_of(here: Iterable[Translation]) -> list[tuple[str, Address]]:
    return [
        chain
        for translation in here
        for chain in (*quiet.gate_chains(translation), *ruleset.translating_chains(translation))
    ]


def _count_callers(site: Site, receiving: Reception, plan: Plan) -> int:
    if site.role != Role.DESTINATION:
        return calls.count(receiving)
    kept = [t.kept for t in plan.translations if t.site == site]
    ends = frozenset(Endpoint(receiving.map.old, port) for port in receiving.ports)
    return sockets.count_callers(ends, kept)


def _observe_rules(comment: str, chains: Iterable[tuple[str, Address]]) -> frozenset[str]:
    """Names of those of *chains* that are dispatched to and have a rule with this comment."""
    found = set()
    for dispatch, local in chains:
        chain = ruleset.address_chain(dispatch, local)
        dispatched = ruleset.dispatch_map(dispatch, local.version)
        ours = any(rule.comment == comment for rule in elements.rules(TABLE, chain))
        if ours and local.packed in elements.read_keys(TABLE, dispatched):
            found.add(chain)
    return frozenset(found)


def _count_missing(name: str, connections: Connections) -> int:
    return len(elements.pack_keys(connections) - set(elements.read_keys(TABLE, name)))
