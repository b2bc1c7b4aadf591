"""the comparison: what a site shows now against what the plan put there.

Rule: an observation is plain values, gathered by kernel/; what it means is decided here.
This file must never look at a machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from natkeep.plan import quiet, reception, ruleset
from natkeep.plan.move import Site
from natkeep.plan.reception import make_receptions
from natkeep.plan.steps import AddAddress, FillSet, HoldListeners, InsertEntries, Plan
from natkeep.plan.tuples import Address


class Gate(StrEnum):
    """The state of a move's gate at a site."""

    ABSENT = "absent"
    CLOSED = "closed"
    OPEN = "open"


@dataclass(frozen=True, slots=True)
class SeenEntry:
    """A kept connection in the conntrack table; packets are None without accounting.

    alive: its TCP state is not one of those in which a connection has ended.
    """

    translated: bool
    packets_in: int | None
    packets_out: int | None
    alive: bool


@dataclass(frozen=True, slots=True)
class Observation:
    """What a site shows of a move.

    rules: for each address chain that has a rule of this move and is dispatched to, its name.
    missing: for each set of kept connections, how many are not in it (all, when it is gone).
    addresses: those of the move's OLD addresses that are local here.
    entries: one for each kept connection of each translation, in order; None where the table
    has none.
    alive: how many kept connections still have a socket here (destination, source) or an entry
    that carries traffic (gateway).
    holds: new connections to the listeners of a quiesce wait here.
    receiving: for each address chain that has a rule for callers and is dispatched to, its name.
    callers: how many connections of callers live here.
    """

    gate: Gate
    rules: frozenset[str]
    missing: dict[str, int]
    addresses: frozenset[Address]
    entries: dict[int, tuple[SeenEntry | None, ...]]
    alive: int
    holds: bool = False
    receiving: frozenset[str] = frozenset()
    callers: int = 0


@dataclass(frozen=True, slots=True)
class SiteStatus:
    """A site of a move; seen is None when its namespace is gone."""

    site: Site
    seen: Observation | None
    drift: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MoveStatus:
    """A move as it stands in the journal and as its sites show it."""

    plan: Plan
    gate: Gate
    sites: tuple[SiteStatus, ...]


def find_drift(plan: Plan, site: Site, seen: Observation) -> tuple[str, ...]:
    """What is not as the plan put it, each as one line that names the object.

    An entry that is missing is drift only while the connection lives: the kernel removes
    entries of connections that have ended.
    """
    if seen.gate == Gate.ABSENT and not plan.move.quiesces:
        return (f"table inet {ruleset.TABLE}: nothing of move {plan.move.id} is there",)
    drift = [
        f"chain {chain}: no rule of this move"
        for chain in _expected_rules(plan, site)
        if chain not in seen.rules
    ]
    drift += [
        f"chain {chain}: no rule for callers"
        for receiving in make_receptions(plan.move, site)
        for chain in reception.chain_names(receiving)
        if chain not in seen.receiving
    ]
    for step in plan.prepare:
        if step.site != site:
            continue
        if isinstance(step, FillSet) and seen.missing.get(step.name):
            drift.append(
                f"set {step.name}: {seen.missing[step.name]} of "
                f"{len(step.connections)} connections are missing"
            )
        elif isinstance(step, AddAddress) and step.address not in seen.addresses:
            drift.append(f"address {step.address}: not on this host")
        elif isinstance(step, InsertEntries):
            drift += _untranslated(step, seen)
        elif isinstance(step, HoldListeners) and not seen.holds:
            drift.append("listeners: their new connections do not wait")
    return (*drift, *_lost_entries(seen))


def _expected_rules(plan: Plan, site: Site) -> list[str]:
    expected = []
    for translation in plan.translations:
        if translation.site != site:
            continue
        chains = (*quiet.gate_chains(translation), *ruleset.translating_chains(translation))
        expected += [ruleset.address_chain(dispatch, local) for dispatch, local in chains]
    return list(dict.fromkeys(expected))


def _untranslated(step: InsertEntries, seen: Observation) -> list[str]:
    entries = seen.entries.get(step.translation.number, ())
    wrong = sum(1 for entry in entries if entry is not None and not entry.translated)
    return [f"conntrack: {wrong} entries for {step.translation.map} do not translate"] * bool(wrong)


def _lost_entries(seen: Observation) -> list[str]:
    # Ended connections have neither socket nor entry. How many live is known of the whole site
    # only, so what is lost is counted over all its maps.
    entries = [entry for some in seen.entries.values() for entry in some]
    ended = max(0, len(entries) - seen.alive)
    lost = entries.count(None) - ended
    return [f"conntrack: {lost} live connections have no entry"] if lost > 0 else []
