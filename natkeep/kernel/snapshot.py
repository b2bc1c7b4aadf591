"""the view of a site: what it shows of a plan now, as plain values for plan/drift.py.

Rule: nothing is changed here, and nothing is judged. What an observation says is written here and
nowhere else; the questions that it is made of are answered by Eyes: one by one (closely.py), or
from one look at all that there is (panorama.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from typing import Protocol

from natkeep.kernel import nftables
from natkeep.kernel.nft_messages import pack_keys
from natkeep.plan import filters, listeners, ruleset, tables
from natkeep.plan.drift import Gate, Observation, SeenEntry
from natkeep.plan.listeners import Reception, make_receptions
from natkeep.plan.move import Role, Site
from natkeep.plan.nft import Key
from natkeep.plan.steps import GuardSite, InsertEntries, Plan
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections, Endpoint


class Eyes(Protocol):
    """Who answers what is asked about one namespace."""

    def look_up(self, translation: Translation) -> tuple[SeenEntry | None, ...]:
        """For each kept connection what the connection table shows, or None."""

    def find_things(self, wanted: frozenset[Key]) -> frozenset[Key]:
        """Those of *wanted* that are there."""

    def comments(self, chain: str) -> Collection[str]:
        """Of the rules of a chain of the inet table, in order; none when it is not there."""

    def has_key(self, name: str, key: bytes) -> bool:
        """Whether the set or map of the inet table has the key."""

    def count_missing(self, name: str, keys: frozenset[bytes]) -> int:
        """How many of *keys* the set of the inet table does not have."""

    def is_local(self, address: Address) -> bool:
        """Whether a device has it."""

    def loopback_is_up(self) -> bool:
        """Whether lo is."""

    def shortest_end(self) -> float:
        """Seconds for which the entry of a connection that has ended is kept, at least."""

    def find_kept(self, connections: Connections) -> Connections:
        """Those that have a socket."""

    def count_callers(self, ends: frozenset[Endpoint], kept: list[Connections]) -> int:
        """How many sockets have one of *ends* and a peer, and are none of the *kept* ones."""

    def count_calls(self, receiving: Reception) -> int:
        """How many callers who were let in live, as the connection table shows them."""

    def is_guarded(self, move_id: str) -> bool:
        """Whether the guard's process lives."""


def observe(site: Site, plan: Plan, eyes: Eyes) -> Observation:
    """What *site* shows of *plan*, seen by *eyes*."""
    here = [t for t in plan.translations if t.site == site]
    move_id, receiving = plan.move.id, make_receptions(plan.move, site)
    lost = [reset for reset in plan.resets if reset.site == site]
    inserted = [s.translation for s in plan.prepare if isinstance(s, InsertEntries)]
    # Here, since whoever only prepares must not wait for it.
    from natkeep.plan.wanted import split_opening

    prepared, opened = split_opening(plan, site)
    there = eyes.find_things(prepared | opened)
    entries = {t.number: eyes.look_up(t) for t in inserted if t.site == site}
    kept: Connections | None = None
    if site.role in (Role.DESTINATION, Role.SOURCE):
        some = [eyes.find_kept(t.kept) for t in here]
        kept = Connections(*(b"".join(one.records(v) for one in some) for v in (4, 6)))
        alive = len(kept)
    else:
        alive = sum([1 for seen in entries.values() for one in seen if one and one.alive])
    sets = {name: kept for t in here for name, kept in filters.sets_of(move_id, t).items()}
    sets |= {filters.reset_set(move_id, reset.number): reset.connections for reset in lost}
    called = [chain for r in receiving for chain in listeners.chains(r)]
    reset_chain = filters.reset_chain(move_id)
    gate = nftables.state_of(eyes.comments(tables.gate_chain(move_id)))
    return Observation(
        gate=gate,
        rules=_observe_rules(eyes, move_id, _chains_of(here)),
        missing={n: eyes.count_missing(n, pack_keys(some)) for n, some in sets.items()},
        addresses=frozenset(m.old for m in plan.move.maps if eyes.is_local(m.old)),
        entries=entries,
        alive=alive,
        holds=filters.block_comment(move_id) in eyes.comments("gate"),
        receiving=_observe_rules(eyes, listeners.comment(move_id), called),
        resetting=_observe_rules(
            eyes, filters.reset_comment(move_id), [reset.chain for reset in lost]
        ),
        resets=nftables.state_of(eyes.comments(reset_chain)) if lost else Gate.ABSENT,
        callers=sum(_count_callers(eyes, site, r, plan) for r in receiving),
        gone=_without_hook(prepared - there, gate),
        shut=opened - there,
        loopback=eyes.loopback_is_up(),
        sockets=kept,
        lingers=eyes.shortest_end(),
        guarded=not _has_guard(site, plan) or eyes.is_guarded(move_id),
    )


def _without_hook(gone: frozenset[Key], gate: Gate) -> frozenset[Key]:
    """The base chain of the gates is not missed by a move that is open (kernel/passing.py)."""
    chain, *rules = _hook_things()
    return gone - {chain, *rules} if gate == Gate.OPEN and chain in gone else gone


@cache
def _hook_things() -> tuple[Key, ...]:
    return tuple(one.key() for one in tables.gate_hook())


def _has_guard(site: Site, plan: Plan) -> bool:
    return any(isinstance(step, GuardSite) and step.site == site for step in plan.prepare)


def _chains_of(here: list[Translation]) -> list[tuple[str, Address]]:
    return [
        chain
        for translation in here
        for chain in (*filters.gate_chains(translation), *ruleset.translating_chains(translation))
    ]


def _count_callers(eyes: Eyes, site: Site, receiving: Reception, plan: Plan) -> int:
    if site.role != Role.DESTINATION:
        return eyes.count_calls(receiving)
    kept = [t.kept for t in plan.translations if t.site == site]
    ends = frozenset(Endpoint(receiving.map.old, port) for port in receiving.ports)
    return eyes.count_callers(ends, kept)


def _observe_rules(
    eyes: Eyes, comment: str, chains: Iterable[tuple[str, Address]]
) -> frozenset[str]:
    """Names of those of *chains* that are dispatched to and have a rule with this comment."""
    found = set()
    for dispatch, local in chains:
        chain = tables.address_chain(dispatch, local)
        dispatched = tables.dispatch_map(dispatch, local.version)
        if comment in eyes.comments(chain) and eyes.has_key(dispatched, local.packed):
            found.add(chain)
    return frozenset(found)
