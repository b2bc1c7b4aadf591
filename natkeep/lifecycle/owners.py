"""Two moves, one connection: which of them has a tuple at a site that both translate.

Both ends of a connection may be moved one after the other, through one gateway or onto one host.
Each of the two moves sees it from its own end. The newest has the tuple there: its translation is
that of both, and what the earlier one would have there is left alone.

    the server, OLD to NEW    P  ── gateway: OLD=NEW ── server
    then the client, P to Q   Q  ── gateway: P=Q, OLD=NEW, in one entry of the second move ── server

Rule: whether moves share a connection is told from their journals, which say how each translates,
never from what conntrack happens to have just now.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from natkeep.errors import JournalError, RefusedError
from natkeep.kernel.interface import Kernel, Snapshot
from natkeep.lifecycle.progress import plan_of, plan_today
from natkeep.plan.conntrack import NOT_TRACKED
from natkeep.plan.identity import Identity
from natkeep.plan.listeners import make_receptions
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.observation import Observation, SeenEntry
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.roles import Role
from natkeep.plan.step_undo import RestoreEntries
from natkeep.plan.steps import InsertEntries, Plan, Prior
from natkeep.plan.translation import Surroundings, Translation
from natkeep.plan.tuples import Connections
from natkeep.state.directory import StateDirectory, read_boot_id
from natkeep.state.journal import Journal
from natkeep.values import dataclass, replace


@dataclass(frozen=True, slots=True)
class Partner:
    """Another move that has something at a namespace, and its site there."""

    journal: Journal
    site: Site
    protocol: Protocol = TCP

    def translations(self) -> tuple[Translation, ...]:
        """How it translates there."""
        every = plan_today(self.journal).translations
        return tuple(t for t in every if (t.site, t.protocol) == (self.site, self.protocol))

    def servers(self) -> dict[bytes, bytes]:
        """Its UDP sockets that any peer may speak to: OLD and port, and what the site makes of it.

        Packed, as an end stands in a record.
        """
        some = make_receptions(self.journal.move, self.site) if self.protocol == UDP else ()
        return {
            one.before.packed + port.to_bytes(2, "big"): one.after.packed + to.to_bytes(2, "big")
            for one in some
            if one.protocol == UDP
            for port, to in zip(one.ports_at(one.before), one.ports_at(one.after), strict=True)
        }

    def ends(self) -> frozenset[bytes]:
        """Its connections there, as their other ends see them."""
        views = (view for t in self.translations() for view in {t.kept, t.outer})
        return frozenset(record for view in views for record in view.turned().each())


def find_partners(
    state: StateDirectory, here: Identity, peers: frozenset[bytes], besides: Iterable[str]
) -> list[Partner]:
    """The moves, newest first, that move one of *peers* and have begun at *here*."""
    found = []
    for move_id in state.ids_moving(peers):
        try:
            journal = None if move_id in besides else state.load(move_id)
        except JournalError:  # `status` reports it
            continue
        if journal is None or journal.boot != read_boot_id():
            continue
        begun = {r.site for r in journal.records.values() if r.state != "undone"}
        for site, identity in zip(journal.move.sites, journal.namespaces, strict=True):
            # Of schema 1 no record says its site.
            if identity == here and site.role != Role.SOURCE and begun & {site, None}:
                found.append(Partner(journal, site))
    return sorted(found, key=lambda one: _age(one.journal), reverse=True)


def find_newer(
    state: StateDirectory, journal: Journal, site: Site, views: Iterable[Connections]
) -> list[Partner]:
    """The partners of a move at *site* that were prepared after it, newest first."""
    peers = frozenset[bytes]().union(*(view.peers() for view in views))
    found = find_partners(state, journal.identity(site), peers, {journal.move.id})
    return [one for one in found if _age(one.journal) > _age(journal)]


def _age(journal: Journal) -> tuple[int, bool]:
    """Greater of the newer one; where journals do not say it, that one took entries over."""
    return journal.begun, len(journal.surroundings_there().carried) > 0


# ---- before a move is prepared -------------------------------------------------------------------


def find_surroundings(
    kernel: Kernel,
    state: StateDirectory,
    move: Move,
    connections: Connections,
    besides: Iterable[str] = (),
) -> Surroundings:
    """What make_plan has to know of the opened sites, what earlier moves do there included.

    besides: the moves that this one replaces. RefusedError where both ends of a connection would
    have to be translated in mode stateless.
    """
    around = kernel.look_around(move, connections)
    kept = move.share(connections)
    datagrams = [] if move.why_no_udp() else move.share(move.udp)
    peers = frozenset[bytes]().union(*(some.peers() for some in (*kept, *datagrams)))
    known = {move.id, *besides}
    partners = [
        (site, partner)
        for site in (() if move.quiesces else move.sites)
        for partner in reversed(find_partners(state, kernel.identity(site), peers, known))
    ]
    around = _take_partners(move, partners, kept, around)
    if not any(map(len, datagrams)):
        return around
    partners = [(site, replace(partner, protocol=UDP)) for site, partner in partners]
    return around.with_udp(_take_partners(move, partners, datagrams, around.of(UDP)))


def _take_partners(
    move: Move,
    partners: Iterable[tuple[Site, Partner]],
    kept: Iterable[Connections],
    around: Surroundings,
) -> Surroundings:
    """What earlier moves do at each site to what is *kept* by each map."""
    for site, partner in partners:
        for some in kept:
            if site.row.own:
                _refuse_moved(site, partner, some)
            elif site.role == Role.GATEWAY:
                around = _carry(move, site, partner, some, around)
            elif site.role == Role.DESTINATION:
                around = _join(partner, some, around)
    return _without_joined(around)


def _carry(
    move: Move, site: Site, partner: Partner, kept: Connections, around: Surroundings
) -> Surroundings:
    """With what of *kept* the partner translates: on the far side of the site it looks otherwise.

    carried, with its carriers, is what the gateway's entries told of that already.
    """
    beyond: dict[bytes, bytes] = {}
    for theirs in partner.translations():
        for view in {theirs.outer, theirs.kept}:
            beyond |= zip(view.turned().each(), theirs.inner.turned().each(), strict=True)
    carriers = dict(zip(around.carried.each(), around.carriers.each(), strict=True))
    found, servers = {}, partner.servers()
    for record in kept.each():
        seen = carriers.get(record, b"")
        carrier = beyond.get(record) or beyond.get(seen)
        if carrier is None and servers:
            seen, half = seen or record, len(record) // 2
            end = servers.get(seen[half:])
            carrier = None if end is None else seen[:half] + end
        if carrier is not None:
            found[record] = carrier
    there = Connections.of_records(found)
    crossing = [one for one in there if one.source.address not in around.local]
    if crossing and Mode.STATELESS in (move.mode, partner.journal.move.mode):
        raise RefusedError(
            f"{crossing[0]}: its other end was moved through {site} by {partner.journal.move.id}, "
            "and in mode stateless only one end is translated there",
            hint=f"both moves in mode stateful keep such connections; {len(crossing)} in all",
        )
    carriers |= found
    return _with_carriers(around, carriers)


def _refuse_moved(site: Site, partner: Partner, kept: Connections) -> None:
    """A peer that a move has brought here is translated by that move, with both ends in one."""
    if not partner.ends().isdisjoint(kept.each()):
        move_id = partner.journal.move.id
        raise RefusedError(
            f"{site}: a peer was moved there by {move_id}, which translates it",
            hint=f"replace {move_id} by a move with --peer-map OLD=NEW, and leave this site out",
        )


def _join(partner: Partner, kept: Connections, around: Surroundings) -> Surroundings:
    """With what of *kept* has its other end at the destination, where the partner put it."""
    theirs, servers = partner.ends(), partner.servers()
    ends = frozenset(servers.values())  # which at a destination are OLDs
    found = [r for r in kept.each() if r in theirs or r[len(r) // 2 :] in ends]
    return replace(around, joined=Connections.of_records([*around.joined.each(), *found]))


def _with_carriers(around: Surroundings, carriers: Mapping[bytes, bytes]) -> Surroundings:
    """carriers: what each connection looks like on the far side of the gateway."""
    return replace(
        around,
        carried=Connections.of_records(carriers),
        carriers=Connections.of_records(carriers.values()),
    )


def _without_joined(around: Surroundings) -> Surroundings:
    """What lo carries a gateway does not, whatever its entries say."""
    joined = frozenset(around.joined.each())
    pairs = zip(around.carried.each(), around.carriers.each(), strict=True)
    carriers = {record: carrier for record, carrier in pairs if record not in joined}
    return _with_carriers(around, carriers)


# ---- while both live -----------------------------------------------------------------------------


def leave_to_owners(
    kernel: Kernel,
    state: StateDirectory,
    journal: Journal,
    plan: Plan,
    looks: Mapping[Site, Observation],
    readers: Mapping[Site, Kernel | Snapshot],
) -> dict[Site, Observation]:
    """The same looks, with the newer move's entry where a tuple is a newer move's."""
    found = {}
    for site, seen in looks.items():
        steps = [s for s in plan.prepare if isinstance(s, InsertEntries) and s.site == site]
        inserted = {step.translation.number: step.translation for step in steps}
        views = {view for t in inserted.values() for view in (t.kept, t.outer)}
        for partner in reversed(find_newer(state, journal, site, views)):
            shown = _look_at(kernel, partner, site, readers[site])
            seen = _exchange(seen, inserted, partner.ends(), shown)
        found[site] = seen
    return found


def is_left_to_others(
    state: StateDirectory, journal: Journal, site: Site, translation: Translation
) -> bool:
    """Whether a newer move has one of the *translation*'s tuples by now."""
    views = {translation.kept, translation.outer}
    ours = {record for view in views for record in view.each()}
    newer = find_newer(state, journal, site, views)
    return any(not ours.isdisjoint(partner.ends()) for partner in newer)


def _look_at(
    kernel: Kernel, partner: Partner, site: Site, reader: Kernel | Snapshot
) -> dict[bytes, SeenEntry | None]:
    """The partner's entries, by the connections as their other ends see them."""
    plan, there = plan_of(partner.journal), partner.site
    if opens := reader is kernel and there != site:
        kernel.open_sites([there], {there: partner.journal.identity(there)})
    entries = reader.observe(there, plan).entries
    if opens:
        kernel.close_sites([there])
    shown: dict[bytes, SeenEntry | None] = {}
    for step in plan.prepare:
        if isinstance(step, InsertEntries) and step.site == there:
            for view in {step.translation.kept, step.translation.outer}:
                shown |= zip(view.turned().each(), entries[step.translation.number], strict=True)
    return shown


def _exchange(
    seen: Observation,
    inserted: Mapping[int, Translation],
    ends: frozenset[bytes],
    shown: Mapping[bytes, SeenEntry | None],
) -> Observation:
    """Entries of the newer move in the place of those of the earlier, as that one sees them.

    Where it has none either its own repair makes it again, or the connection passes lo alone.
    """
    entries = dict(seen.entries)
    for number, translation in inserted.items():
        here = list(entries[number])
        views = zip(translation.kept.each(), translation.outer.each(), strict=True)
        for index, ours in enumerate(views):
            for record in ends.intersection(ours):
                theirs = shown.get(record) or SeenEntry(True, None, None, False)
                here[index] = SeenEntry(True, theirs.packets_out, theirs.packets_in, theirs.alive)
        entries[number] = tuple(here)
    alive = sum(1 for some in entries.values() for one in some if one and one.alive)
    return replace(seen, entries=entries, alive=alive if seen.sockets is None else seen.alive)


# ---- when one of them ends -----------------------------------------------------------------------


def give_up_claims(
    state: StateDirectory, journal: Journal, site: Site, undo: RestoreEntries, prior: Prior
) -> Prior:
    """The *prior* of a purge that is about to be undone, without what a newer move has by now.

    And what newer moves purged of this one is not given back by them: it would translate again.
    """
    owned: set[bytes] = set()
    views = {undo.kept, undo.outer}
    newer = find_newer(state, journal, site, views)
    if not newer:
        return prior
    ours = frozenset(record for view in views for record in view.turned().each())
    for partner in newer:
        owned |= partner.ends()
        partner.journal.resolve()
        for number, record in partner.journal.records.items():
            theirs = record.undo
            if record.site == partner.site and isinstance(theirs, RestoreEntries):
                left = _without(theirs, record.prior, ours)
                if left != record.prior and record.state != "undone":
                    partner.journal.note(number, record.state, left)
    return _without(undo, prior, owned)


def _without(undo: RestoreEntries, prior: Prior, owned: Iterable[bytes]) -> Prior:
    """*prior* of a purge with nothing found of the connections *owned*."""
    views = zip(undo.kept.each(), undo.outer.each(), strict=True)
    kept = [not frozenset(ours).isdisjoint(owned) for ours in views]
    facts = dict(prior.facts)
    for name in ("own", "inherited"):
        if found := str(facts.get(name, "")):
            pairs = zip(found, kept, strict=False)
            facts[name] = "".join(NOT_TRACKED if gone else one for one, gone in pairs)
    return Prior(prior.present, facts)
