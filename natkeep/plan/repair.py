"""the repair: what of a plan is to be done again where another program has undone a part.

Rule: only what is missing is made; what stands there is never taken away to be made anew. Nothing
is opened that was closed, and no connection that has ended comes back:

- before a move is opened its process is frozen, and every connection of it lives;
- afterwards one lives while it has a socket at the destination, if that is a site of the move;
- a gateway alone cannot know. An entry that stands there and does not translate, but carries
  traffic, is mended. One that is missing is made again only if it was seen alive so shortly
  before that the kernel, which keeps the entry of a connection that has ended for a while, cannot
  have removed it itself: then another program did.

Of UDP an entry that came while the rules were gone lives for as long as peers speak, and none is
needed: where anything is put back, all go once more.

This file must never look at a machine; the order of what it returns is that of the plan.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from natkeep.plan import filters
from natkeep.plan.base_chains import HEARD, ended_set, kept_set
from natkeep.plan.liveness import Life
from natkeep.plan.move import Site
from natkeep.plan.nft import Key, Object, Rule
from natkeep.plan.steps import (
    AddAddress,
    AddRules,
    FillSet,
    ForgetCalls,
    GuardSite,
    InsertEntries,
    Plan,
    PurgeEntries,
    RaiseLoopback,
    Step,
    SwitchForwarding,
    as_commands,
)
from natkeep.plan.wanted import Wanted, order_rules, place, want
from natkeep.values import dataclass

if TYPE_CHECKING:
    from natkeep.plan.observation import Observation


@dataclass(frozen=True, slots=True)
class LoadObjects:
    """What is missing of a step that loads nft objects."""

    site: Site
    objects: tuple[Object, ...]

    def describe(self) -> tuple[str, ...]:
        """One command a line; one comment a rule that nft's text cannot say."""
        raw = [one for one in self.objects if isinstance(one, Rule) and one.is_raw()]
        texts = [str(one) for one in self.objects if one not in raw]
        comments = (f"# {self.site}: raw nf_tables rule in chain {rule.chain}" for rule in raw)
        return (*as_commands(self.site, texts), *comments)


@dataclass(frozen=True, slots=True)
class RestoreRoutes:
    """Routes and addresses that the move stands on, as kernel/lost_routes.py notes them."""

    site: Site
    notes: tuple[str, ...]

    def describe(self) -> tuple[str, ...]:
        """One comment a note."""
        return tuple(f"# {self.site}: {line}" for line in describe_lost_routes(self.notes))


def describe_lost_routes(notes: Iterable[str]) -> Iterator[str]:
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
    LoadObjects
    | RestoreRoutes
    | StopCounting
    | FillSet
    | GuardSite
    | RaiseLoopback
    | AddAddress
    | AddRules
    | PurgeEntries
    | ForgetCalls
    | InsertEntries
    | SwitchForwarding
)
"""What a repair does: a step again, or the part of it that is missing."""


def find_patches(
    plan: Plan, site: Site, seen: Observation, life: Life, *, opened: bool
) -> Iterator[tuple[int, Patch]]:
    """What is to be done again at *site*, each with the number of the step that it is a part of.

    opened: the connections have been let through there, and are to be.
    """
    missing = seen.gone | seen.shut
    wanted: dict[int, list[Wanted]] = defaultdict(list)
    everything, again = [one for _, one in want(plan, site).values()], False
    for number, one in want(plan, site).values():
        if one.key in missing:
            wanted[number].append(one)
    for number, step in enumerate(plan.steps):
        if step.site != site or (number >= len(plan.prepare) and not opened):
            continue
        objects = tuple(_place(wanted[number], everything, missing))
        if objects:
            yield number, LoadObjects(site, objects)
        patch = _patch_of(step, seen, life)
        again = again or bool(objects) or isinstance(patch, FillSet)
        patch = _forget_datagrams(step) if again and patch is None else patch
        if patch is not None:
            yield number, patch
        if opened and isinstance(step, FillSet):
            yield from ((number, fill) for fill in _fill_noted(plan, step, missing))
        if isinstance(step, FillSet) and life.known:
            yield from ((number, fill) for fill in _fill_ended(plan, step, missing, life))


def _fill_ended(
    plan: Plan, step: FillSet, missing: frozenset[Key], life: Life
) -> Iterator[FillSet]:
    """Where the set is lost that says which of a set of kept tuples have ended: those that have.

    Their peers may have new connections from the same ports, which must not be translated.
    """
    for translation in plan.translations:
        if translation.site != step.site or not filters.gives_back(translation):
            continue
        kept, ended = (make(plan.move.id, translation.number) for make in (kept_set, ended_set))
        gone = translation.kept.minus(life.living)
        if step.name == kept and len(gone) and Key("inet", "set", ended) in missing:
            yield FillSet(step.site, ended, gone)


def _fill_noted(plan: Plan, step: FillSet, missing: frozenset[Key]) -> Iterator[FillSet]:
    """Where the set is lost in which packets noted what became of these connections: all of them.

    Of those that cannot be kept all ends were reset when the move was opened, so every tuple is
    taken for a new connection; and every end of a kept one for one that was heard.
    """
    # An end is heard as its packets arrive; a set holds no local address.
    here = (one for one in plan.translations if one.site == step.site)
    here = (one for one in here if kept_set(plan.move.id, one.number) == step.name)
    arriving = next((one.outer.toward(one.after) for one in here), step.connections)
    for name in filters.noted_sets(step.name):
        if Key("inet", "set", name) in missing:
            noted = arriving if name.startswith(HEARD) else step.connections
            yield FillSet(step.site, name, noted)


def _place(
    some: Iterable[Wanted], everything: list[Wanted], missing: frozenset[Key]
) -> Iterator[Object]:
    for one in some:
        if isinstance(one.object, Rule) and not one.object.is_raw():
            yield place(one.object, one.key, order_rules(everything, one.key.name), missing)
        else:
            yield one.object


def _patch_of(step: Step, seen: Observation, life: Life) -> Patch | None:
    match step:
        # All of them: to add one that is there changes nothing.
        case FillSet() if any(seen.missing.get(one.name) for one in step.fillings()):
            return step
        case GuardSite() if not seen.guarded:
            return step
        case SwitchForwarding() if step.setting.name in seen.off:
            return step
        case RaiseLoopback() if not seen.loopback:
            return step
        case AddAddress() if step.address not in seen.addresses - seen.unruled:
            return step
        case AddRules() if seen.lacking:
            return step
        case InsertEntries():
            translation = step.translation
            picked = list(life.picks(translation, seen.entries.get(translation.number, ())))
            if picked:
                return InsertEntries(step.site, translation.pick(picked))
    return None


def _forget_datagrams(step: Step) -> Patch | None:
    match step:
        case PurgeEntries() if not step.translation.protocol.has_states:
            return step
        case ForgetCalls():
            some = tuple(one for one in step.receptions if not one.protocol.has_states)
            return ForgetCalls(step.site, some) if some else None
    return None
