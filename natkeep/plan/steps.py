"""the plan: one change to one site as a value, and the order in which they happen.

Rule: a step says everything that kernel/ needs to do it and to undo it, and describes itself
as commands that a person could type. The order is written in `make_plan` and nowhere else.
This file must never do a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from natkeep.plan import quiet, reception, ruleset
from natkeep.plan.entries import describe_purge, entries, stale_tuples, stale_views
from natkeep.plan.lock import DumpLock, describe_taking
from natkeep.plan.move import (
    NOTHING_SPECIAL,
    Mode,
    Move,
    Role,
    Site,
    Surroundings,
    Translation,
    Unkept,
    make_translations,
)
from natkeep.plan.reception import Reception, make_receptions
from natkeep.plan.tuples import Address, Connections, Endpoint

if TYPE_CHECKING:
    from natkeep.plan.quoted import RawRule

Identity = tuple[int, int]
"""Device and inode of a network namespace."""


@dataclass(frozen=True, slots=True)
class Prior:
    """What a step found before it acted; JSON values only, since it is written to the journal.

    present: what the step adds was there already, so undoing must not remove it.
    """

    present: bool = False
    facts: dict[str, str | int | bool] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """As it stands in the journal."""
        return {"present": self.present, **self.facts}

    @classmethod
    def from_json(cls, value: dict[str, object]) -> Prior:
        """From the journal; TypeError for anything to_json does not write."""
        facts = dict(value)
        present = facts.pop("present", None)
        if not isinstance(present, bool):
            raise TypeError("a prior says whether it was present")
        if not all(isinstance(fact, str | int | bool) for fact in facts.values()):
            raise TypeError("a prior holds text, numbers and truth values")
        return cls(present, facts)  # type: ignore[arg-type]  # checked just above


SHOWN = 3
_LOCK_SHOWN = 8
"""How many of a step's connections `describe` spells out; `--format nft` and json show all."""


@dataclass(frozen=True, slots=True)
class InstallGate:
    """The table if there is none, the move's (still empty) sets, its drop, and ARP silence."""

    site: Site
    move_id: str
    translations: tuple[Translation, ...]

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return _nft(self.site, self.lines())

    def lines(self) -> tuple[str, ...]:
        """The nft text without the static part, which only the first move at a site adds."""
        gate = ruleset.render_gate(self.move_id, self.translations)
        if self.site.role == Role.SOURCE:
            return (*gate, *quiet.render_mute(self.move_id, self.translations))
        return gate


@dataclass(frozen=True, slots=True)
class FillSet:
    """One set of kept connections; with this the gate is closed for them."""

    site: Site
    name: str
    connections: Connections

    def elements(self) -> Iterator[str]:
        """`peer . peer port . local port` of each kept connection."""
        for tuple_ in self.connections:
            source = tuple_.source
            yield f"{source.address} . {source.port} . {tuple_.destination.port}"

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        shown = ", ".join(_first(self.elements(), len(self.connections)))
        return _nft(self.site, (f"add element inet {ruleset.TABLE} {self.name} {{ {shown} }}",))


@dataclass(frozen=True, slots=True)
class RaiseLoopback:
    """lo must be up, or an address on it is not local."""

    site: Site

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return (f"{_prefix(self.site)}ip link set lo up",)


@dataclass(frozen=True, slots=True)
class AddAddress:
    """OLD as /32 or /128 on lo, so that sockets can be bound to it and answers find a route.

    A host-length prefix on lo is never chosen as a source address for other connections; for
    IPv6 `nodad`, because a tentative address cannot be bound.
    """

    site: Site
    address: Address

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        if self.address.version == 4:
            return (f"{_prefix(self.site)}ip address add {self.address}/32 dev lo",)
        return (
            f"{_prefix(self.site)}ip address add {self.address}/128 dev lo "
            "nodad noprefixroute preferred_lft 0",
        )


@dataclass(frozen=True, slots=True)
class InstallTranslation:
    """The rules that translate."""

    site: Site
    move_id: str
    translations: tuple[Translation, ...]

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return _nft(self.site, self.lines())

    def lines(self) -> tuple[str, ...]:
        """The nft text."""
        return ruleset.render_translation(self.move_id, self.translations)


@dataclass(frozen=True, slots=True)
class InstallReception:
    """The rules by which new connections reach the listeners, callers held back."""

    site: Site
    move_id: str
    receptions: tuple[Reception, ...]

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return _nft(self.site, self.lines())

    def lines(self) -> tuple[str, ...]:
        """The nft text."""
        return reception.render(self.move_id, self.receptions)


@dataclass(frozen=True, slots=True)
class ForgetCalls:
    """Delete what conntrack believes of callers whom nobody has answered yet.

    Their SYNs come again, and would go on to where the first one was sent. Undone, the entries
    of those who were let in go: they would send them where nobody listens any more.
    """

    site: Site
    receptions: tuple[Reception, ...]

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return tuple(
            f"{_prefix(self.site)}{command}"
            for receiving in self.receptions
            for command in reception.describe_forgetting(receiving)
        )


@dataclass(frozen=True, slots=True)
class TranslateErrors:
    """The rules that translate what ICMP errors quote, in stateless mode."""

    site: Site
    move_id: str
    translations: tuple[Translation, ...]
    receptions: tuple[Reception, ...] = ()

    def describe(self) -> tuple[str, ...]:
        """One comment a rule: nft has no text for them (see plan/quoted.py)."""
        return tuple(
            f"# {_prefix(self.site)}raw nf_tables rule in chain {rule.chain}: translate the TCP "
            "segment that an ICMP error quotes"
            for rule in self.rules()
        )

    def rules(self) -> tuple[RawRule, ...]:
        """What is inserted, the kept connections' rules last: then they come first."""
        from natkeep.plan.quoted import make_callers_error_rules, make_error_rules

        callers = (
            rule for r in self.receptions for rule in make_callers_error_rules(self.move_id, r)
        )
        kept = (rule for t in self.translations for rule in make_error_rules(self.move_id, t))
        return (*callers, *kept)


@dataclass(frozen=True, slots=True)
class PurgeEntries:
    """Delete what conntrack believes of exactly the kept tuples."""

    site: Site
    translation: Translation

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        stale = (
            f"{_prefix(self.site)}{describe_purge(tuple_)}"
            for tuple_ in stale_tuples(self.translation)
        )
        views = len(stale_views(self.translation))
        return tuple(_first(stale, 2 * views * len(self.translation.kept)))


@dataclass(frozen=True, slots=True)
class InsertEntries:
    """Pre-create the translated entries, and verify that the kernel took them as meant."""

    site: Site
    translation: Translation

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        new = (f"{_prefix(self.site)}{e.describe()}" for e in entries(self.translation))
        return tuple(_first(new, len(self.translation.kept)))


@dataclass(frozen=True, slots=True)
class OpenGate:
    """Let the kept connections through, and callers to the listeners."""

    site: Site
    move_id: str
    listening: tuple[Reception, ...] = ()

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return _nft(self.site, self.lines())

    def lines(self) -> tuple[str, ...]:
        """The nft text."""
        kept = ruleset.render_open(self.move_id, self.site.role)
        return (kept, reception.render_open(self.move_id)) if self.listening else (kept,)

    def chains(self) -> tuple[str, ...]:
        """Where the rules are put."""
        callers = (reception.callers_chain(self.move_id),) if self.listening else ()
        return (ruleset.gate_chain(self.move_id), *callers)

    def accepts(self) -> tuple[tuple[str, bool], ...]:
        """The same as `lines`, as the chains and whether a bare SYN stays refused there."""
        gate, *callers = self.chains()
        return (gate, self.site.role == Role.DESTINATION), *((chain, False) for chain in callers)


@dataclass(frozen=True, slots=True)
class HoldListeners:
    """New connections to these listeners wait: their SYNs are dropped, and peers retry."""

    site: Site
    move_id: str
    listeners: tuple[Endpoint, ...]

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return _nft(self.site, self.lines())

    def lines(self, *, linked: bool = False) -> tuple[str, ...]:
        """The nft text; linked: the gate leads to it already."""
        return quiet.render_hold(self.move_id, self.listeners, linked=linked)


@dataclass(frozen=True, slots=True)
class TakeOverLock:
    """Remove the network lock that CRIU left for this dump, now that our gate stands.

    Undone, it is put back: whoever takes our gate away after a failure leaves CRIU's lock.
    """

    site: Site
    lock: DumpLock
    connections: Connections

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        commands = describe_taking(self.lock, self.connections)
        return tuple(f"{_prefix(self.site)}{command}" for command in islice(commands, _LOCK_SHOWN))


Step = (
    InstallGate
    | FillSet
    | RaiseLoopback
    | AddAddress
    | InstallTranslation
    | InstallReception
    | ForgetCalls
    | TranslateErrors
    | PurgeEntries
    | InsertEntries
    | HoldListeners
    | TakeOverLock
    | OpenGate
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What prepare does, in order, and what open does later; nothing has happened yet."""

    move: Move
    translations: tuple[Translation, ...]
    unkept: tuple[Unkept, ...]
    surroundings: Surroundings
    prepare: tuple[Step, ...]
    open: tuple[OpenGate, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in order; a step's index here is its number in the journal."""
        return (*self.prepare, *self.open)


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
            yield from _nft(step.site, static)
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


def _first(lines: Iterable[str], total: int) -> Iterator[str]:
    yield from islice(lines, SHOWN)
    if total > SHOWN:
        yield f"# ... and {total - SHOWN} more"


def _nft(site: Site, lines: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{_prefix(site)}nft '{line}'" for line in lines)


def _prefix(site: Site) -> str:
    if not site.netns:
        return ""
    from shlex import quote  # whoever describes nothing, as a hook, need not wait for it

    # Quoted, since a path may hold anything and the command is there to be typed.
    if site.netns.startswith("pid:"):
        return f"nsenter --target {quote(site.netns[4:])} --net "
    if "/" in site.netns:
        return f"nsenter --net={quote(site.netns)} "
    return f"ip netns exec {quote(site.netns)} "
