"""the order of work: which steps a move takes, in which order, and how the whole is shown.

Rule: the order is written here and nowhere else, each constraint with its reason beside it.
This file must never do a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from natkeep.plan import quiet, reception, ruleset
from natkeep.plan.move import (
    NOTHING_SPECIAL,
    Mode,
    Move,
    Role,
    Site,
    Surroundings,
    Translation,
    make_translations,
)
from natkeep.plan.reception import make_receptions
from natkeep.plan.steps import (
    AddAddress,
    FillSet,
    ForgetCalls,
    HoldListeners,
    InsertEntries,
    InstallGate,
    InstallReception,
    InstallTranslation,
    OpenGate,
    Plan,
    PurgeEntries,
    RaiseLoopback,
    Step,
    TakeOverLock,
    TranslateErrors,
    as_commands,
)
from natkeep.plan.tuples import Connections


def make_plan(
    move: Move, connections: Connections, surroundings: Surroundings = NOTHING_SPECIAL
) -> Plan:
    """The steps of *move* for *connections*; see make_translations for what is refused.

    The gateway comes first, whole: its entries must be there before the destination may emit
    a packet, because a half-translated connection is not stalled, it is reset.
    """
    translations, unkept = make_translations(move, connections, surroundings)
    reception.refuse_one_end_for_two(move)
    prepare: list[Step] = []
    for site in move.ordered_sites():
        here = tuple(t for t in translations if t.site == site)
        prepare += _steps_at(site, move, here, surroundings)
    for translation in translations:
        _assert_chain_ends_at_checkpoint(translation)
    opens = tuple(
        OpenGate(site, move.id, make_receptions(move, site)) for site in _sites_to_open(move)
    )
    return Plan(move, translations, unkept, surroundings, tuple(prepare), opens)


def _sites_to_open(move: Move) -> tuple[Site, ...]:
    """The source stays quiet while the process is elsewhere; alone, opening it is coming back."""
    if move.quiesces:
        return ()
    elsewhere = tuple(site for site in move.ordered_sites() if site.role != Role.SOURCE)
    return elsewhere or move.sites


def _steps_at_source(site: Site, move: Move, here: tuple[Translation, ...]) -> list[Step]:
    hold = [HoldListeners(site, move.id, move.held)] if move.held else []
    if move.quiesces:
        return [*hold]
    steps: list[Step] = [InstallGate(site, move.id, here)]
    steps += [
        FillSet(site, name, connections)
        for translation in here
        for name, connections in ruleset.sets_of(move.id, translation).items()
    ]
    steps += hold
    if move.lock is not None and move.lock.is_known():
        # The very last step: whatever fails before it, CRIU's lock still keeps the source quiet.
        kept = [translation.kept for translation in here]
        v4, v6 = (b"".join(some.records(version) for some in kept) for version in (4, 6))
        steps.append(TakeOverLock(site, move.lock, Connections(v4, v6)))
    return steps


def _steps_at(
    site: Site, move: Move, here: tuple[Translation, ...], surroundings: Surroundings
) -> list[Step]:
    if site.role == Role.SOURCE:
        return _steps_at_source(site, move, here)
    receptions = make_receptions(move, site)
    # The gate before the address: a host that has OLD but not the socket answers with RST.
    steps: list[Step] = [InstallGate(site, move.id, here)]
    steps += [
        FillSet(site, name, connections)
        for translation in here
        for name, connections in ruleset.sets_of(move.id, translation).items()
    ]
    if site.role == Role.DESTINATION:
        steps.append(RaiseLoopback(site))
        olds = [t.map.old for t in here] + [r.map.old for r in receptions]
        steps += [AddAddress(site, old) for old in dict.fromkeys(olds)]
    # The translation before the restore begins: CRIU sends unsent data before post-restore.
    steps.append(InstallTranslation(site, move.id, here))
    if receptions:
        steps.append(InstallReception(site, move.id, receptions))
    if move.mode == Mode.STATELESS:
        steps.append(TranslateErrors(site, move.id, here, receptions))
    elif receptions:
        # After the gate holds callers back, so that no entry is made anew.
        steps.append(ForgetCalls(site, receptions))
    # Purge after the rules (a nat expression starts tracking, so stale entries can appear up to
    # here) and before the insertion (an existing entry cannot be given a translation).
    for translation in here:
        crossing = _crossing(translation, surroundings)
        if crossing is not None:
            steps += [PurgeEntries(site, crossing), InsertEntries(site, crossing)]
    return steps


def _crossing(translation: Translation, surroundings: Surroundings) -> Translation | None:
    """The translation without the connections whose peer is on the destination itself.

    These go through lo, un-translated; at the gateway they are not seen any more.
    """
    if not surroundings.local:
        return translation
    version = translation.map.old.version
    crossing = [
        index
        for index, (_, inner) in enumerate(translation.tuples())
        if inner.source.address not in surroundings.local
    ]
    if len(crossing) == len(translation.kept):
        return translation
    if not crossing:
        return None
    return replace(
        translation,
        kept=translation.kept.pick(crossing, version),
        outer=translation.outer.pick(crossing, version),
        inner=translation.inner.pick(crossing, version),
    )


def _assert_chain_ends_at_checkpoint(translation: Translation) -> None:
    """What the process gets is what the checkpoint says, or the plan is wrong."""
    at_destination = translation.site.role == Role.DESTINATION
    ends = translation.inner if at_destination else translation.inner.toward(translation.map.old)
    if ends != translation.kept:  # pragma: no cover - a bug, not an input
        raise AssertionError(f"{translation.site}: the process would see other tuples")


def describe_plan(plan: Plan) -> Iterator[str]:
    """The commands of the whole plan, for a person."""
    for step in plan.prepare:
        if isinstance(step, InstallGate):
            static = [*ruleset.render_static(), *ruleset.render_mode(plan.move.mode)]
            if step.site.role == Role.DESTINATION:
                static += ruleset.render_arp_static()
            yield f"# {step.site}: the first move there makes the table too"
            yield from as_commands(step.site, static)
        yield from step.describe()
    yield "# when the sockets are there (natkeep open, or natkeep-hook at post-restore):"
    for step in plan.open:
        yield from step.describe()


def render_nft(plan: Plan) -> Iterator[tuple[Site, tuple[str, ...]]]:
    """For each site the complete nft script of prepare, static part included."""
    for site in plan.move.ordered_sites():
        mode = () if site.role == Role.SOURCE else ruleset.render_mode(plan.move.mode)
        lines = [*ruleset.render_static(), *mode]
        if site.role == Role.DESTINATION:
            lines += ruleset.render_arp_static()
        elif site.role == Role.SOURCE:
            lines += quiet.render_static()
        for step in plan.prepare:
            if step.site != site:
                continue
            if isinstance(step, FillSet):
                elements = ", ".join(step.elements())
                lines.append(f"add element inet {ruleset.TABLE} {step.name} {{ {elements} }}")
            elif isinstance(
                step, InstallGate | InstallTranslation | InstallReception | HoldListeners
            ):
                lines += step.lines()
        yield site, tuple(lines)
