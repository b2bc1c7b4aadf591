"""the mending: what of a plan is to be done again where another program has undone a part.

Rule: only what is missing is made; what stands there is never taken away to be made anew. Nothing
is opened that was closed, and no connection that has ended comes back:

- before a move is opened its process is frozen, and every connection of it lives;
- afterwards one lives while it has a socket at the destination, if that is a site of the move;
- a gateway alone cannot know. An entry that stands there and does not translate, but carries
  traffic, is mended. One that is missing is made again only if it was seen alive so shortly
  before that the kernel, which keeps the entry of a connection that has ended for a while, cannot
  have removed it itself: then somebody else did.

This file must never look at a machine; the order of what it returns is that of the plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from natkeep.plan import quiet, resets, ruleset
from natkeep.plan.icmp_errors import RawRule
from natkeep.plan.move import Role, Site
from natkeep.plan.steps import (
    AddAddress,
    FillSet,
    GuardSite,
    HoldListeners,
    InsertEntries,
    InstallGate,
    InstallReception,
    InstallResets,
    InstallTranslation,
    OpenGate,
    Plan,
    RaiseLoopback,
    SendResets,
    Step,
    TranslateErrors,
    as_commands,
)
from natkeep.plan.things import (
    Thing,
    Wanted,
    find_made,
    find_static,
    next_alike,
    order_rules,
    parse_line,
    parse_static,
    place,
    want_rule,
)
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import NO_CONNECTIONS, Connections
from natkeep.values import dataclass, replace

if TYPE_CHECKING:
    from natkeep.plan.drift import Observation, SeenEntry


@dataclass(frozen=True, slots=True)
class LoadLines:
    """What is missing of a step that loads nft text."""

    site: Site
    lines: tuple[str, ...]

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return as_commands(self.site, self.lines)


@dataclass(frozen=True, slots=True)
class InsertRules:
    """What is missing of the rules that nft's text cannot say."""

    site: Site
    rules: tuple[RawRule, ...]

    def describe(self) -> tuple[str, ...]:
        """One comment a rule."""
        return tuple(f"# {self.site}: raw nf_tables rule in chain {r.chain}" for r in self.rules)


@dataclass(frozen=True, slots=True)
class PutWays:
    """Routes and addresses of others that the move stands on, as kernel/routes.py noted them."""

    site: Site
    notes: tuple[str, ...]

    def describe(self) -> tuple[str, ...]:
        """One comment a note."""
        return tuple(f"# {self.site}: {line}" for line in describe_ways(self.notes))


def describe_ways(notes: Iterable[str]) -> Iterator[str]:
    """What the notes are about, in words."""
    for note in notes:
        kind, address, device, _ = note.split(",")
        if kind == "address":
            yield f"address {address}: not on {device} any more"
        else:
            yield f"route to {address}: gone from {device}"


@dataclass(frozen=True, slots=True)
class StopCounting:
    """Switch off the accounting that a repair, killed while it made entries, left on."""

    site: Site

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return (f"# {self.site}: net.netfilter.nf_conntrack_acct = 0 as before",)


Patch = (
    LoadLines
    | InsertRules
    | PutWays
    | StopCounting
    | FillSet
    | GuardSite
    | RaiseLoopback
    | AddAddress
    | InsertEntries
)
"""What a repair does: a step again, or the part of it that is missing."""


@dataclass(frozen=True, slots=True)
class Life:
    """Which connections live, as the process sees them.

    known: *living* is all of them; otherwise whether one lives that is not in it is not known.
    """

    known: bool
    living: Connections = NO_CONNECTIONS

    def picks(self, translation: Translation, entries: Sequence[SeenEntry | None]) -> Iterator[int]:
        """Which of the *translation*'s connections live and have no entry that translates."""
        some = [i for i, entry in enumerate(entries) if entry is None or not entry.translated]
        if not some:
            return
        living = frozenset(self.living.each())
        both = [*zip(translation.kept.each(), entries, strict=False)]
        for index in some:
            record, entry = both[index]
            carries = not self.known and entry is not None and entry.alive
            if record in living or carries:
                yield index


def want_things(plan: Plan, site: Site) -> tuple[tuple[int, Wanted], ...]:
    """The things of *plan* in the tables of *site*, each with the number of its first step."""
    return tuple(_want(plan, site).values())


def _want(plan: Plan, site: Site) -> dict[Thing, tuple[int, Wanted]]:
    # A line that two steps have, as those of the static part, makes its thing once.
    made: set[str | RawRule] = set()
    found: dict[Thing, tuple[int, Wanted]] = {}
    for number, step in enumerate(plan.steps):
        for wanted in want_of(step) if step.site == site else ():
            if wanted.make in made:
                continue
            made.add(wanted.make)
            one = (number, wanted)
            if found.setdefault(wanted.thing, one) is not one and wanted.thing.kind == "rule":
                other = next_alike(wanted.thing, found)
                found[other] = (number, Wanted(other, wanted.make))
    return found


def want_of(step: Step) -> Iterator[Wanted]:
    """The things that *step* puts into the tables; those that are alike are not told apart."""
    if isinstance(step, TranslateErrors):
        yield from (want_rule(rule) for rule in step.rules())
        return
    for lines in _static_lines(step):
        yield from parse_static(lines)
    for line in _own_lines(step):
        yield from parse_line(line)


def _static_lines(step: Step) -> Iterator[tuple[str, ...]]:
    """The text of the part of the table that the first move makes for all."""
    match step:
        case InstallGate():
            yield ruleset.render_static()
            if step.site.role == Role.DESTINATION:
                yield ruleset.render_leaving()
                yield ruleset.render_arp_static()
            if step.site.role == Role.SOURCE:
                yield quiet.render_static()
        case HoldListeners():
            yield ruleset.render_static()
        case InstallTranslation():
            for mode in dict.fromkeys(translation.mode for translation in step.translations):
                yield ruleset.render_mode(mode)
        case InstallReception():
            for mode in dict.fromkeys(receiving.mode for receiving in step.receptions):
                yield ruleset.render_mode(mode)
        case InstallResets():
            for dispatch in dict.fromkeys(reset.dispatch for reset in step.resets):
                yield resets.render_static(dispatch)


def _own_lines(step: Step) -> tuple[str, ...]:
    match step:
        case InstallGate() | HoldListeners() | InstallTranslation() | InstallReception():
            return step.lines()
        case InstallResets() | OpenGate() | SendResets():
            return step.lines()
        case _:
            return ()


def split_opening(plan: Plan, site: Site) -> tuple[frozenset[Thing], frozenset[Thing]]:
    """What prepare puts into the tables of *site*, and what open does."""
    found = _split_quickly(plan, site)
    if found is not None:
        return found
    wanted, first = _want(plan, site), len(plan.prepare)
    opened = frozenset([thing for thing, (number, _) in wanted.items() if number >= first])
    return frozenset(wanted) - opened, opened


def _split_quickly(plan: Plan, site: Site) -> tuple[frozenset[Thing], frozenset[Thing]] | None:
    """The same without the texts, where no two of them make one thing; else None.

    The static part, more than half of all, is known already if there was a move before.
    """
    static: dict[tuple[str, ...], None] = {}
    lines: tuple[dict[str, None], dict[str, None]] = ({}, {})
    for own, steps in zip(lines, (plan.prepare, plan.open), strict=True):
        for step in steps:
            if step.site != site:
                continue
            if isinstance(step, TranslateErrors):  # its rules are no text
                return None
            static.update(dict.fromkeys(_static_lines(step)))
            own.update(dict.fromkeys(_own_lines(step)))
    known = [find_static(some) for some in static]
    prepared, opened = ([thing for line in own for thing in find_made(line)] for own in lines)
    first = frozenset().union(prepared, *known)
    later = frozenset(opened)
    count = len(prepared) + len(opened) + sum(len(parse_static(some)) for some in static)
    return (first, later) if len(first | later) == count else None


def find_life(
    plan: Plan, site: Site, looks: Mapping[Site, Observation], *, frozen: bool, recent: Connections
) -> Life:
    """Which connections live, as far as that is known at *site*.

    looks: what each site that could be looked at shows. frozen: the move has not been opened.
    recent: those whose entries were there so shortly ago that they cannot have ended since.
    """
    if frozen:
        every = [t.kept for t in plan.translations if t.site == site]
        return Life(True, Connections(*(b"".join(k.records(v) for k in every) for v in (4, 6))))
    for other, seen in looks.items():
        if other.role == Role.DESTINATION and seen.sockets is not None:
            return Life(True, seen.sockets)
    return Life(False, recent)


def find_patches(
    plan: Plan, site: Site, seen: Observation, life: Life, *, opened: bool
) -> Iterator[tuple[int, Patch]]:
    """What is to be done again at *site*, each with the number of the step that it is a part of.

    opened: the connections have been let through there, and are to be.
    """
    missing = seen.gone | seen.shut
    wanted = defaultdict(list)
    for number, one in want_things(plan, site):
        if one.thing in missing:
            wanted[number].append(one)
    everything = [one for _, one in want_things(plan, site)]
    for number, step in enumerate(plan.steps):
        if step.site != site or (number >= len(plan.prepare) and not opened):
            continue
        lines = tuple(_text_of(wanted[number], everything, missing))
        if lines:
            yield number, LoadLines(site, lines)
        rules = tuple(one.make for one in wanted[number] if isinstance(one.make, RawRule))
        if rules:
            yield number, InsertRules(site, rules)
        patch = _patch_of(step, seen, life)
        if patch is not None:
            yield number, patch
        if opened and isinstance(step, FillSet) and _has_forgotten(step, missing):
            yield number, replace(step, name=resets.again_of(step.name))


def _has_forgotten(step: FillSet, missing: frozenset[Thing]) -> bool:
    """Whether nobody knows any more which tuples of a set of resets live again.

    Everybody was told when the move was opened, so all are taken for those.
    """
    if not step.name.startswith(resets.SET_PREFIX):
        return False
    return Thing("inet", "set", resets.again_of(step.name)) in missing


def _text_of(
    some: Iterable[Wanted], everything: list[Wanted], missing: frozenset[Thing]
) -> Iterator[str]:
    for one in some:
        if isinstance(one.make, RawRule):
            continue
        if one.thing.kind == "rule":
            yield place(one.make, one.thing, order_rules(everything, one.thing.name), missing)
        else:
            yield one.make


def _patch_of(step: Step, seen: Observation, life: Life) -> Patch | None:
    match step:
        # All of them: to add one that is there changes nothing.
        case FillSet() if seen.missing.get(step.name):
            return step
        case GuardSite() if not seen.guarded:
            return step
        case RaiseLoopback() if not seen.loopback:
            return step
        case AddAddress() if step.address not in seen.addresses:
            return step
        case InsertEntries():
            translation = step.translation
            picked = list(life.picks(translation, seen.entries.get(translation.number, ())))
            if picked:
                return InsertEntries(step.site, pick_from(translation, picked))
    return None


def pick_from(translation: Translation, indices: list[int]) -> Translation:
    """The translation of these of its connections only."""
    version = translation.map.old.version
    return replace(
        translation,
        kept=translation.kept.pick(indices, version),
        outer=translation.outer.pick(indices, version),
        inner=translation.inner.pick(indices, version),
    )
