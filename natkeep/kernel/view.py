"""the view of a site: what it shows of a plan now, as plain values for plan/drift.py.

Rule: nothing is changed here, and nothing is judged.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.kernel import address, calls, conntrack, elements, sockets, table
from natkeep.kernel import quiet as quietness
from natkeep.plan import quiet, reception, resets, ruleset
from natkeep.plan.drift import Gate, Observation
from natkeep.plan.move import Role, Site, Translation
from natkeep.plan.reception import Reception, make_receptions
from natkeep.plan.ruleset import TABLE
from natkeep.plan.steps import InsertEntries, Plan
from natkeep.plan.tuples import Address, Connections, Endpoint


def observe(site: Site, plan: Plan) -> Observation:
    """What *site* shows of *plan*, in whose namespace the thread is."""
    here = [t for t in plan.translations if t.site == site]
    move_id, receiving = plan.move.id, make_receptions(plan.move, site)
    lost = [reset for reset in plan.resets if reset.site == site]
    inserted = [s.translation for s in plan.prepare if isinstance(s, InsertEntries)]
    entries = {t.number: tuple(conntrack.look_up(t)) for t in inserted if t.site == site}
    # Here, since whoever only prepares must not wait for them.
    from natkeep.kernel import inventory
    from natkeep.plan.mending import split_opening

    prepared, opened = split_opening(plan, site)
    there = inventory.find_things(prepared | opened)
    kept: Connections | None = None
    if site.role in (Role.DESTINATION, Role.SOURCE):
        some = [sockets.find_kept(t.kept) for t in here]
        kept = Connections(*(b"".join(one.records(v) for one in some) for v in (4, 6)))
        alive = len(kept)
    else:
        alive = sum(1 for seen in entries.values() for entry in seen if entry and entry.alive)
    return Observation(
        gate=table.gate_state(move_id),
        rules=_observe_rules(move_id, _chains_of(here)),
        missing={
            name: _count_missing(name, connections)
            for t in here
            for name, connections in ruleset.sets_of(move_id, t).items()
        }
        | {
            name: _count_missing(name, reset.connections)
            for reset in lost
            for name in (resets.reset_set(move_id, reset.number),)
        },
        addresses=frozenset(m.old for m in plan.move.maps if address.device_of(m.old)),
        entries=entries,
        alive=alive,
        holds=quietness.is_held(move_id),
        receiving=_observe_rules(
            reception.comment(move_id), [chain for r in receiving for chain in reception.chains(r)]
        ),
        resetting=_observe_rules(resets.comment(move_id), [reset.chain for reset in lost]),
        resets=table.chain_state(resets.reset_chain(move_id)) if lost else Gate.ABSENT,
        callers=sum(_count_callers(site, r, plan) for r in receiving),
        gone=prepared - there,
        shut=opened - there,
        loopback=address.loopback_is_up(),
        sockets=kept,
        lingers=conntrack.shortest_end(),
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
        if ours and elements.has_key(TABLE, dispatched, local.packed):
            found.add(chain)
    return frozenset(found)


def _count_missing(name: str, connections: Connections) -> int:
    return len(elements.pack_keys(connections) - set(elements.read_keys(TABLE, name)))
