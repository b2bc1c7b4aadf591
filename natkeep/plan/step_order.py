"""the order of work: which steps a move takes, and in which order.

Rule: the order is written here and nowhere else, each constraint with its reason beside it.
This file must never do a step.
"""

from __future__ import annotations

from natkeep.plan import filters, kept_sets
from natkeep.plan.kept_connections import find_inner, find_inner_datagrams, make_translations
from natkeep.plan.listeners import Reception, make_receptions, refuse_one_end_for_two
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.relay import Setting
from natkeep.plan.resets import Reset, make_resets
from natkeep.plan.roles import Role
from natkeep.plan.staying import find_staying
from natkeep.plan.steps import (
    AddAddress,
    AddRoute,
    AddRules,
    FillSet,
    ForgetCalls,
    GuardSite,
    HoldListeners,
    HoldSegments,
    InsertEntries,
    InstallGate,
    InstallReception,
    InstallResets,
    InstallTranslation,
    OpenEarly,
    OpenGate,
    PassKept,
    Plan,
    PurgeEntries,
    RaiseLoopback,
    SendResets,
    Step,
    SwitchForwarding,
    TakeOverLock,
    TranslateErrors,
)
from natkeep.plan.translation import NOTHING_SPECIAL, Change, Surroundings, Translation
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections
from natkeep.values import replace


def make_plan(
    move: Move,
    connections: Connections,
    surroundings: Surroundings = NOTHING_SPECIAL,
    change: Change | None = None,
) -> Plan:
    """The steps of *move* for *connections*; see make_translations for what is refused.

    The gateway's entries must be there before the destination may emit a packet, because a
    half-translated connection is not stalled, it is reset. So it comes first, whole; unless the
    destination holds what peers say. Then that closes first, which emits nothing before a
    restore, and the gateway's gate is opened as soon as all is there.
    """
    translations, unkept = make_translations(move, connections, surroundings, change)
    refuse_one_end_for_two(move)
    # A connection that came since and cannot be kept is only reported: its reset is not prepared.
    lost = unkept if change is None else make_translations(move, connections, surroundings)[1]
    told = make_resets(move, lost, connections, surroundings)
    inner = find_inner(move, connections)
    prepare: list[Step] = []
    for site in _sites_to_prepare(move):
        here = tuple(t for t in translations if t.site == site)
        resets_here = tuple(reset for reset in told if reset.site == site)
        prepare += _steps_at(site, move, here, resets_here, surroundings, change, inner)
        prepare += _steps_at_relay(site, move, here, surroundings) if site.row.relays else []
        if site.row.passes_on and move.holds:
            prepare.append(OpenEarly(site, move.id, make_receptions(move, site)))
    for translation in translations:
        _assert_chain_ends_at_checkpoint(move, translation)
    held = move.holds and bool(move.kept_servers or _of(UDP, translations))
    opening: list[OpenGate | SendResets] = [
        OpenGate(site, move.id, make_receptions(move, site), delivers=move.holds, datagrams=held)
        for site in _sites_to_open(move)
    ]
    # Last, so that no kept connection waits for it.
    opening += () if _leaves_alone(move) else _send_resets(move, told)
    steps = tuple(prepare), tuple(opening)
    return Plan(move, translations, unkept, surroundings, *steps, told, inner)


def _leaves_alone(move: Move) -> bool:
    """Whether the source is all there is: opening it is coming back, so no reset is sent then."""
    return all(site.row.mutes for site in move.sites)


def _send_resets(move: Move, told: tuple[Reset, ...]) -> tuple[SendResets, ...]:
    """The steps that send the resets, where there are any: gateways first."""
    here = {site: tuple(r for r in told if r.site == site) for site in move.ordered_sites()}
    return tuple(SendResets(site, move.id, lost) for site, lost in here.items() if lost)


def _install_resets(
    site: Site, move: Move, lost: tuple[Reset, ...], home: frozenset[Address] = frozenset()
) -> list[Step]:
    if not lost:
        return []
    return [
        InstallResets(site, move.id, lost, home=home),
        *(FillSet(site, filters.reset_set(move.id, r.number), r.connections) for r in lost),
    ]


def _sites_to_prepare(move: Move) -> tuple[Site, ...]:
    """In this order; the source is always the last."""
    # Peers' own hosts hold back no datagram, so what they let pass has to end at a gate.
    early = any(site.row.own for site in move.sites) and (len(move.udp) or move.udp_servers)
    first = Role.DESTINATION if move.holds or move.vias or early else Role.GATEWAY
    last = {first: 0, Role.SOURCE: 2}
    return tuple(sorted(move.ordered_sites(), key=lambda site: last.get(site.role, 1)))


def _sites_to_open(move: Move) -> tuple[Site, ...]:
    """The source stays quiet while the process is elsewhere; alone, opening it is coming back."""
    if move.quiesces:
        return ()
    if move.holds:  # its gateways are open already
        return tuple(site for site in move.sites if site.row.puts_old)
    elsewhere = tuple(site for site in move.ordered_sites() if not site.row.mutes)
    return elsewhere or move.sites


def _steps_at_source(
    site: Site, move: Move, here: tuple[Translation, ...], lost: tuple[Reset, ...]
) -> list[Step]:
    hold = [HoldListeners(site, move.id, move.held)] if move.held else []
    if move.quiesces:
        return [*hold]
    steps: list[Step] = [InstallGate(site, move.id, here), *_fill_sets(site, move, here)]
    if receptions := make_receptions(move, site):
        steps.append(InstallReception(site, move.id, receptions))
    steps += [*_install_resets(site, move, lost), *hold]
    steps += _take_over_lock(site, move, [*_locked(here), *(r.connections for r in lost)])
    if _leaves_alone(move):
        # There is no later moment at this site; CRIU's lock would have dropped what is said.
        steps += _send_resets(move, lost)
    return steps


def _take_over_lock(site: Site, move: Move, ours: list[Connections]) -> list[Step]:
    """The very last step: whatever fails before it, CRIU's lock still keeps the source quiet."""
    known = (lock for lock in (move.lock,) if lock is not None and lock.is_known())
    return [TakeOverLock(site, lock, Connections.joined(ours)) for lock in known]


def _locked(here: tuple[Translation, ...]) -> list[Connections]:
    """What CRIU locks, which is TCP alone."""
    return [one.kept for one in _of(TCP, here)]


def _steps_at(
    site: Site,
    move: Move,
    here: tuple[Translation, ...],
    lost: tuple[Reset, ...],
    surroundings: Surroundings,
    change: Change | None = None,
    inner: Connections = NO_CONNECTIONS,
) -> list[Step]:
    if site.row.mutes:
        return _steps_at_source(site, move, here, lost)
    receptions = make_receptions(move, site)
    # The gate before the address: a host that has OLD but not the socket answers with RST.
    home = surroundings.home if site.row.puts_old else frozenset()
    forwards = surroundings.forwards and site.row.puts_old
    awaits = site.row.passes_on and not any(one.row.puts_old for one in move.sites)
    steps: list[Step] = [InstallGate(site, move.id, here, None, home, awaits, forwards)]
    fills = _fill_sets(site, move, here)
    # What a gateway whose gate is about to be opened drops meanwhile is not held: so as late as
    # can be. Before it has its set, nothing translates either.
    late = move.holds and site.row.passes_on and not site.row.relays
    steps += [] if late else fills
    steps += _guard(site, move, here, receptions)
    # Before the address too: CRIU's restore may send for these, and must not be answered yet.
    steps += _install_resets(site, move, lost, home)
    if site.row.puts_old:
        joined = Connections.joined((surroundings.joined, surroundings.udp_joined))
        others = _find_olds(move, here, receptions, lost, inner, joined)
        arounds = [surroundings, *([] if change is None else [change.surroundings])]
        own = find_staying(move, here, receptions, lost, inner, arounds)
        rules = AddRules(site, (), own, forwards)
        steps += _put_old(move, here, receptions, others, rules, home)
    steps += _add_routes(site, here, receptions) if site.row.own else []
    # The translation before the restore begins: CRIU sends unsent data before post-restore.
    steps.append(InstallTranslation(site, move.id, here))
    if receptions:
        masked = surroundings.masqueraded
        steps.append(InstallReception(site, move.id, receptions, None, home, masked))
    if move.mode == Mode.STATELESS:
        steps.append(TranslateErrors(site, move.id, here, receptions))
    elif receptions:
        # After the gate holds callers back, so that no entry is made anew.
        steps.append(ForgetCalls(site, receptions))
    steps += fills if late else []
    return steps + _replace_entries(site, move, here, surroundings, change)


def _guard(
    site: Site,
    move: Move,
    here: tuple[Translation, ...],
    receptions: tuple[Reception, ...],
) -> list[Step]:
    servers = tuple(one for one in receptions if one.protocol == UDP)
    guarded = move.guard and (here or servers)
    return [GuardSite(site, move.id, here, servers)] if guarded else []


def _find_olds(
    move: Move,
    here: tuple[Translation, ...],
    receptions: tuple[Reception, ...],
    lost: tuple[Reset, ...],
    inner: Connections,
    joined: Connections,
) -> list[Address]:
    """The OLDs that are needed for more than what is translated *here*."""
    others = [*(r.map.old for r in receptions), *(r.old for r in lost)]
    # Of a process that talks to itself alone, whatever else it has there.
    others += [m.old for m in move.maps if len(inner.at(m.old)) or (len(inner) and not here)]
    datagrams = find_inner_datagrams(move)
    others += [map_.old for map_ in move.maps if len(datagrams.at(map_.old))]
    # The peers' addresses too, which may otherwise go with the moves that put them there.
    return others + sorted({one.source.address for one in joined}, key=str)


def _add_routes(
    site: Site, here: tuple[Translation, ...], receptions: tuple[Reception, ...]
) -> list[Step]:
    """Where peers are: their sockets look up OLD before a packet of theirs is addressed to NEW."""
    olds = [*(t.before for t in here), *(r.before for r in receptions if r.protocol == UDP)]
    return [RaiseLoopback(site), *(AddRoute(site, old) for old in dict.fromkeys(olds))]


def _steps_at_relay(
    site: Site, move: Move, here: tuple[Translation, ...], surroundings: Surroundings
) -> list[Step]:
    """What makes it a relay, once all that translates is there."""
    settings = tuple(map(Setting, surroundings.forwarding))
    steps: list[Step] = [PassKept(site, move.id, here, settings)] if settings else []
    # Forwarding only once strangers are dropped.
    steps += [SwitchForwarding(site, move.id, setting) for setting in settings]
    return steps + _take_over_lock(site, move, _locked(here))


def _fill_sets(site: Site, move: Move, here: tuple[Translation, ...]) -> list[Step]:
    steps: list[Step] = []
    for translation in here:
        (name, kept), *others = kept_sets.sets_of(move.id, translation).items()
        steps.append(FillSet(site, name, kept, kept_sets.more_of(move.id, translation)))
        steps += [FillSet(site, *other) for other in others]
    return steps


def _put_old(
    move: Move,
    here: tuple[Translation, ...],
    receptions: tuple[Reception, ...],
    others: list[Address],
    rules: AddRules,
    home: frozenset[Address],
) -> list[Step]:
    """What gives the namespace the addresses that its sockets will say."""
    site = rules.site
    servers = tuple(one for one in receptions if one.protocol == UDP)
    holds = move.holds and (here or servers)
    steps: list[Step] = [HoldSegments(site, move.id, here, servers)] if holds else []
    steps.append(RaiseLoopback(site))
    olds = dict.fromkeys([*(t.map.old for t in here), *others])
    strange = tuple(old for old in olds if old not in home)
    # Before the address: what this host says to OLD, on an ssh to the source, goes on without gap.
    steps += [replace(rules, olds=strange)] if strange else []
    new_of = {map_.old: map_.new for map_ in move.maps}
    return steps + [AddAddress(site, old, new_of.get(old)) for old in olds]


def _of(protocol: Protocol, here: tuple[Translation, ...]) -> tuple[Translation, ...]:
    return tuple(one for one in here if one.protocol == protocol)


def _replace_entries(
    site: Site,
    move: Move,
    here: tuple[Translation, ...],
    surroundings: Surroundings,
    change: Change | None,
) -> list[Step]:
    """Conntrack's entries of these connections go, and translated ones come.

    Purge after the rules (a nat expression starts tracking, so stale entries can appear up to
    there) and before the insertion (an existing entry cannot be given a translation).
    """
    steps: list[Step] = []
    came = frozenset() if change is None else frozenset(change.came.each())
    for translation in here:
        around = surroundings
        if change is not None and (move.waits(site) or next(translation.kept.each()) in came):
            around = change.surroundings
        around = around.of(translation.protocol)
        crossing = _crossing(translation, around)
        joined = around.joined if site.row.puts_old else NO_CONNECTIONS
        stale = crossing
        if len(joined):
            stale = _crossing(translation, around, frozenset(joined.each()))
        if stale is not None:
            steps.append(PurgeEntries(site, stale))
        if crossing is not None and translation.protocol.has_states:  # the rules make the others
            steps.append(InsertEntries(site, crossing))
    return steps


def _crossing(
    translation: Translation, surroundings: Surroundings, joined: frozenset[bytes] = frozenset()
) -> Translation | None:
    """The translation without the connections whose peer is on the destination itself.

    These go through lo, un-translated; at the gateway they are not seen any more. But where the
    peer was moved there, the entry of its move has to go: it would translate what lo carries. So
    those that have *joined* are among the stale ones.
    """
    if not surroundings.local:
        return translation
    pairs = enumerate(zip(translation.kept.each(), translation.inner, strict=True))
    crossing = [
        index
        for index, (record, inner) in pairs
        if record in joined or inner.source.address not in surroundings.local
    ]
    if len(crossing) == len(translation.kept):
        return translation
    if not crossing:
        return None
    return translation.pick(crossing)


def _assert_chain_ends_at_checkpoint(move: Move, translation: Translation) -> None:
    """What the process gets is what the checkpoint says, or the plan is wrong."""
    ends, meant = translation.inner, translation.kept
    if translation.site.row.relays:
        ends, meant = translation.outer, move.on_wire(meant)
    elif not translation.site.row.puts_old:
        ends, meant = ends.toward(translation.map.old_end), move.on_wire(meant)
    if ends != meant:  # pragma: no cover - a bug, not an input
        raise AssertionError(f"{translation.site}: the process would see other tuples")
