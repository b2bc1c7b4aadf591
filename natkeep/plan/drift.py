"""the comparison: what a site shows now against what the plan put there.

Rule: what an observation means is decided here.
This file must never look at a machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from natkeep.plan import listeners, syn_block
from natkeep.plan.base_chains import is_address_chain, is_later
from natkeep.plan.connection_state import SiteStatus
from natkeep.plan.liveness import Life
from natkeep.plan.move import Mode, Site
from natkeep.plan.nft import TABLE, Elements, Key
from natkeep.plan.observation import Gate, Held, Observation
from natkeep.plan.steps import (
    AddAddress,
    AddRules,
    FillSet,
    GuardSite,
    HoldListeners,
    InsertEntries,
    Plan,
    RaiseLoopback,
    SwitchForwarding,
)
from natkeep.plan.wanted import Wanted, want
from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class MoveStatus:
    """A move as it stands in the journal and as its sites show it.

    opened_at: when, in seconds of the clock; None while it is closed, or where the journal does not
    say. silent_ms: for how long at least the peers heard nothing, from the beginning of prepare
    on, when the process was frozen already; None where that is not known. held: what a holder has
    of what they said, while the gate is closed.
    before: of each setting that a relay switched on what it was, as the journal says.
    """

    plan: Plan
    gate: Gate
    sites: tuple[SiteStatus, ...]
    opened_at: float | None = None
    silent_ms: int | None = None
    held: Held | None = None
    before: Mapping[str, str] = MappingProxyType({})


def find_drift(
    plan: Plan,
    site: Site,
    seen: Observation,
    life: Life | None = None,
    *,
    opened: bool | None = None,
) -> tuple[str, ...]:
    """What is not as the plan put it, each as one line that names the object.

    opened: whether the gate is to be open; None where that is not to be judged.
    An entry that is missing is drift only while the connection lives: the kernel removes
    entries of connections that have ended. Without *life*, how many do is all that is known.
    """
    if nothing := _nothing_is_there(plan, site, seen):
        drift = [f"table inet {TABLE}: nothing of move {plan.move.id} is there"]
    else:
        drift = list(_find_table_drift(plan, site, seen))
    if opened and not nothing:
        for chain in sorted({key.name for key in seen.shut}):
            drift.append(f"chain {chain}: the rule that opens it is missing")
    for step in plan.prepare:
        if step.site != site:
            continue
        if isinstance(step, FillSet):
            drift += _find_set_drift(step, seen) if not nothing else ()
        elif isinstance(step, RaiseLoopback) and not seen.loopback:
            drift.append("device lo: it is down")
        elif isinstance(step, AddAddress) and step.address not in seen.addresses:
            drift.append(f"address {step.address}: not on this host")
        elif isinstance(step, AddRules):
            drift += [f"ip rule {rule}: gone from in front of local" for rule in seen.lacking]
        elif isinstance(step, AddAddress) and step.address in seen.unruled:
            drift.append(f"address {step.address}: an ip rule from {step.like} is not for it")
        elif isinstance(step, InsertEntries):
            drift += _find_entry_drift(step, seen, life)
        elif isinstance(step, HoldListeners) and not seen.holds:
            drift.append("listeners: their new connections do not wait")
        elif isinstance(step, SwitchForwarding) and step.setting.name in seen.off:
            drift.append(f"setting net/{step.setting.name}: it is not {step.setting.on}")
        elif isinstance(step, GuardSite) and not seen.guarded:
            drift.append("guard: its process is gone")
    return (*drift, *(_lost_entries(seen) if life is None else ()))


def _want(plan: Plan, site: Site) -> list[Wanted]:
    return [wanted for _, wanted in want(plan, site).values()]


def _was_prepared_earlier(plan: Plan, site: Site, seen: Observation) -> bool:
    """Whether a natkeep did it that had not all rules; a repair adds them, none is missed."""
    later = {key for key in want(plan, site) if is_later(key.name)}
    own = {key for key in later if key.kind == "rule" and is_address_chain(key.name)}
    own |= {key for key in later if key.kind == "set" and f"-{plan.move.id}-" in key.name}
    return bool(own) and own <= seen.gone


def _nothing_is_there(plan: Plan, site: Site, seen: Observation) -> bool:
    """One line then stands for the whole table."""
    if seen.gate != Gate.ABSENT or plan.move.quiesces:
        return False
    names = (plan.gate_at(site), listeners.callers_chain(plan.move.id))
    keys = [wanted.key for wanted in _want(plan, site)]
    own = {key for key in keys if key.kind in ("chain", "rule") and key.name in names}
    return bool(own) and own <= seen.gone | seen.shut


def _find_table_drift(plan: Plan, site: Site, seen: Observation) -> Iterator[str]:
    if not seen.gone:
        return
    wanted = _want(plan, site)
    if plan.unnoted and plan.move.mode == Mode.STATELESS:
        # Which rules there were is not known; they were others.
        wanted = [one for one in wanted if one.key.kind != "rule" and not is_later(one.key.name)]
    if _was_prepared_earlier(plan, site, seen):
        wanted = [one for one in wanted if not is_later(one.key.name)]
    gone = [one for one in wanted if one.key in seen.gone]
    if not seen.holds:  # which is said of the step
        hold = syn_block.chain_name(plan.move.id)
        gone = [one for one in gone if one.key.name != hold and f">{hold}" not in one.key.what]
    named = dict(_name_chains(plan, seen, wanted))
    yield from named.values()
    yield from _name_objects(gone, wanted, set(named))


def _name_objects(gone: list[Wanted], wanted: list[Wanted], named: set[str]) -> Iterator[str]:
    """What is gone, each once: not what was in something that is gone itself, or is *named*."""
    lost = {(one.key.family, one.key.kind, one.key.name) for one in gone}
    missing: dict[str, int] = {}
    for one in gone:
        key = one.key
        within = {"rule": "chain", "element": "set"}.get(key.kind, "")
        if key.kind == "table":
            yield f"table {key.family} {TABLE}: gone"
            continue
        inside = {(key.family, "table", ""), (key.family, within, key.name)} & lost
        element = one.object if isinstance(one.object, Elements) else None
        if inside or key.name in named or (element is not None and element.chain in named):
            continue
        if key.kind == "rule":
            missing[key.name] = missing.get(key.name, 0) + 1
        elif element is not None:
            yield f"set {key.name}: {element.said()} is missing"
        else:
            yield f"{key.kind} {key.name}: gone"
    for chain, number in missing.items():
        total = sum(1 for one in wanted if one.key.kind == "rule" and one.key.name == chain)
        yield f"chain {chain}: {number} of {total} rules are missing"


def _name_chains(plan: Plan, seen: Observation, wanted: list[Wanted]) -> Iterator[tuple[str, str]]:
    """The address chains that have no rule of this move, each with what is said of it."""
    rules = [one.key for one in wanted if one.key.kind == "rule" and is_address_chain(one.key.name)]
    kinds = {plan.move.id: "of this move", listeners.comment(plan.move.id): "for callers"}
    for comment, what in kinds.items():
        ours = [key for key in rules if key.what.startswith(f"{comment}: ")]
        there = {key.name for key in ours if key not in seen.gone}
        for chain in dict.fromkeys(key.name for key in ours):
            if chain not in there:
                yield chain, f"chain {chain}: no rule {what}"


def _find_set_drift(step: FillSet, seen: Observation) -> Iterator[str]:
    for one in step.fillings():
        missing = seen.missing.get(one.name)
        if missing and not (is_later(one.name) and Key("inet", "set", one.name) in seen.gone):
            yield f"set {one.name}: {missing} of {len(one.keys)} connections are missing"


def _find_entry_drift(step: InsertEntries, seen: Observation, life: Life | None) -> Iterator[str]:
    entries, map_ = seen.entries.get(step.translation.number, ()), step.translation.map
    if life is None:
        wrong, lost = sum(1 for one in entries if one is not None and not one.translated), 0
    else:
        picked = list(life.picks(step.translation, entries))
        lost = sum(1 for index in picked if entries[index] is None)
        wrong = len(picked) - lost
    if wrong:
        yield f"conntrack: {wrong} entries for {map_} do not translate"
    if lost:
        yield f"conntrack: {lost} live connections of {map_} have no entry"


def _lost_entries(seen: Observation) -> list[str]:
    # Ended connections have neither socket nor entry. How many live is known of the whole site
    # only, so what is lost is counted over all its maps.
    entries = [entry for some in seen.entries.values() for entry in some]
    ended = max(0, len(entries) - seen.alive)
    lost = entries.count(None) - ended
    return [f"conntrack: {lost} live connections have no entry"] if lost > 0 else []
