"""the view of a site: what it shows of a plan now, as plain values for plan/drift.py.

Rule: nothing is changed here, and nothing is judged.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.kernel import address, calls, conntrack, elements, sockets, table
from natkeep.kernel import quiet as quietness
from natkeep.plan import quiet, reception, ruleset
from natkeep.plan.drift import Observation
from natkeep.plan.move import Role, Site, Translation
from natkeep.plan.reception import Reception, make_receptions
from natkeep.plan.ruleset import TABLE
from natkeep.plan.steps import InsertEntries, Plan
from natkeep.plan.tuples import Address, Connections, Endpoint


def observe(site: Site, plan: Plan) -> Observation:
    """What *site* shows of *plan*, in whose namespace the thread is."""
    here = [t for t in plan.translations if t.site == site]
    move_id, receiving = plan.move.id, make_receptions(plan.move, site)
    inserted = [s.translation for s in plan.prepare if isinstance(s, InsertEntries)]
    entries = {t.number: tuple(conntrack.look_up(t)) for t in inserted if t.site == site}
    if site.role in (Role.DESTINATION, Role.SOURCE):
        alive = sum(sockets.count_alive(t.kept) for t in here)
    else:
        alive = sum(1 for seen in entries.values() for entry in seen if entry and entry.alive)
    return Observation(
        gate=table.gate_state(move_id),
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
