"""Reads all that a namespace shows of moves, once: for one move, or for a thousand that share it.

Rule: nothing is changed here, and nothing judged: what is seen is plain values for plan/drift.py.
A dump can miss what others are just making or undoing, so what a shared snapshot shows as missing
is looked at again, by one of its own, before that is said.

Each part is read when it is first asked for: a table whole, a set by its name, addresses, routes,
sockets. Only the entries of kept connections are asked for one by one, each time: in a dump they
would cost as much, and an entry that is asked for is not missed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property

from natkeep.kernel import (
    conntrack,
    conntrack_listeners,
    ip_rules,
    nftables,
    nftables_dump,
    policy_rules,
    rtnetlink,
    silence,
    sock_diag,
    sysctl,
)
from natkeep.kernel.conntrack_dump import WALK, count_tracked, is_dump_cheaper
from natkeep.kernel.lost_routes import Routes
from natkeep.kernel.netlink import NETLINK_NETFILTER, NETLINK_ROUTE, Netlink
from natkeep.kernel.netns import Namespace, errors_at, inside
from natkeep.kernel.nft_messages import pack_keys
from natkeep.plan import base_chains, syn_block
from natkeep.plan.ip_rules import IpRule
from natkeep.plan.listeners import Reception, make_receptions
from natkeep.plan.move import Mode, Site
from natkeep.plan.nft import TABLE, Key
from natkeep.plan.observation import Gate, Observation, SeenEntry
from natkeep.plan.path import SourceRule, find_uncopied
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.roles import Role
from natkeep.plan.silence import server_keys
from natkeep.plan.steps import (
    AddAddress,
    AddRules,
    FillSet,
    GuardSite,
    InsertEntries,
    Plan,
    SwitchForwarding,
)
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, Endpoint
from natkeep.plan.wanted import split_opening
from natkeep.values import replace

Entries = dict[int, tuple[SeenEntry | None, ...]]
"""Of each translation, by its number, what is seen of each of its connections, in order."""


class Snapshot:
    """What a namespace shows; it keeps a handle of its own until it is closed.

    directory: the kernel's, where guards are found.
    """

    def __init__(self, namespace: Namespace, directory: str) -> None:
        self._namespace = replace(namespace, fd=os.dup(namespace.fd))
        self._directory = directory
        self._tables: dict[str, tuple[set[Key], dict[str, list[str]]]] = {}
        self._sets: dict[tuple[str, str], frozenset[bytes]] = {}
        self._walks = {4: 0, 6: 0}
        self._ip_rules: dict[int, frozenset[IpRule] | None] = {}
        self._callers: dict[int, conntrack_listeners.Table] = {}
        self._unanswered: set[bytes] = set()
        with inside(namespace):
            self._netlink, self._routes = Netlink(NETLINK_NETFILTER), Routes()

    def close(self) -> None:
        """Let go of the namespace."""
        self._netlink.close()
        self._routes.close()
        os.close(self._namespace.fd)

    def find_lost_routes(self, site: Site, noted: str) -> tuple[str, ...]:
        """Those of the routes and addresses that InstallTranslation *noted* which are gone."""
        with errors_at(site):
            return self._routes.find_lost(noted)

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site*, which is this namespace, shows of *plan*."""
        with errors_at(site), inside(self._namespace):
            return self._observe(site, plan)

    def find_missing(self, site: Site, plan: Plan) -> frozenset[Key]:
        """The objects of *plan* that the tables lack; nothing else is read."""
        with inside(self._namespace):
            prepared, opened = split_opening(plan, site)
            return (prepared | opened) - self._find_objects(prepared | opened)

    def _observe(self, site: Site, plan: Plan) -> Observation:
        here = [t for t in plan.translations if t.site == site]
        move_id, receptions = plan.move.id, make_receptions(plan.move, site)
        inserted = [*_find_inserted(plan, site)]
        prepared, opened = split_opening(plan, site)
        there = self._find_objects(prepared | opened)
        entries = {t.number: self._look_up(t) for t in inserted}
        sockets, datagrams = self._find_sockets(here) if site.role in _AT_HOME else _NOWHERE
        fills = [step for step in plan.prepare if isinstance(step, FillSet) and step.site == site]
        sets = {one.name: one.keys for step in fills for one in step.fillings()}
        gate = self._read_gate(plan.gate_at(site))
        noted = self._find_noted(site, plan, entries)
        if noted and plan.move.mode == Mode.STATELESS:
            for t in inserted:
                entries[t.number] = _without_counts(t, entries[t.number], noted)
        seen = Observation(
            gate=gate,
            missing={name: self._count_missing(name, kept) for name, kept in sets.items()},
            addresses=frozenset(old for old in plan.olds_at(site) if old.packed in self._addresses),
            entries=entries,
            alive=_count_alive(entries) if sockets is None else len(sockets) + len(datagrams),
            holds=syn_block.comment(move_id) in self._comments("gate"),
            callers=sum(self._count_callers(one, here) for one in receptions),
            inner=0 if sockets is None else self._count_inner(plan),
            gone=self._without_early_hooks(_without_hook(prepared - there, gate)),
            shut=opened - there,
            loopback=self._loopback,
            sockets=sockets,
            datagrams=datagrams,
            lingers=self._shortest_timeout,
            guarded=self._is_guarded(site, plan),
            unanswered=self._find_unanswered(sockets),
            heard=noted if gate == Gate.OPEN and not site.row.passes_on else frozenset(),
            spoken=noted if site.row.passes_on else frozenset(),
            lacking=self._find_lacking(site, plan),
            unruled=self._find_unruled(site, plan),
            back=sum(map(len, self._find_sockets(here))) if site.row.relays else 0,
            off=frozenset(
                step.setting.name
                for step in plan.prepare
                if isinstance(step, SwitchForwarding) and step.site == site
                if sysctl.read(step.setting.name) != step.setting.on
            ),
        )
        return self._add_silences(seen, here, plan)

    # ---- the table ---------------------------------------------------------------------------

    def _read_table(self, family: str) -> tuple[set[Key], dict[str, list[str]]]:
        """What stands there, elements only as far as their sets were read; and rules' comments."""
        if family not in self._tables:
            self._tables[family] = nftables_dump.find_standing(self._netlink, family)
        return self._tables[family]

    def _read_set(self, family: str, name: str) -> frozenset[bytes]:
        """The keys of a set or map; its elements are then among what stands there."""
        if (family, name) not in self._sets:
            keys = nftables_dump.dump_keys(self._netlink, family, TABLE, name)
            self._sets[family, name] = frozenset(keys)
            found = (Key(family, "element", name, key.hex()) for key in keys)
            self._read_table(family)[0].update(found)
        return self._sets[family, name]

    def _find_objects(self, wanted: frozenset[Key]) -> frozenset[Key]:
        """Those of *wanted* that are there."""
        missing = wanted - self._read_table("inet")[0]
        for key in missing:  # in a set that was not read yet, or of the family that is rare
            if key.kind == "element":
                self._read_set(key.family, key.name)
        for family in {key.family for key in missing}:
            missing -= self._read_table(family)[0]
        return wanted - missing

    def _comments(self, chain: str) -> list[str]:
        """Of the rules of a chain of the inet table, in order; none when it is not there."""
        return self._read_table("inet")[1].get(chain, [])

    def _read_gate(self, chain: str) -> Gate:
        return nftables.state_of(self._comments(chain))

    def _count_missing(self, name: str, connections: Connections) -> int:
        # Not kept: one move alone asks for it, and there may be 100,000 in it.
        there = nftables_dump.dump_keys(self._netlink, "inet", TABLE, name)
        return len(pack_keys(connections).difference(there))

    def _without_early_hooks(self, gone: frozenset[Key]) -> frozenset[Key]:
        """The base chains for resets of ends not heard are not missed where all were heard."""
        for dispatch in base_chains.EARLY:
            chain, *rules = (one.key() for one in base_chains.early_hook(dispatch))
            if chain in gone and nftables_dump.are_all_heard(self._netlink, dispatch):
                gone -= {chain, *rules}
        return gone

    # ---- the connection table ----------------------------------------------------------------

    def _look_up(self, translation: Translation) -> tuple[SeenEntry | None, ...]:
        return tuple(conntrack.look_up(self._netlink, translation, lambda _: self._zones))

    def _count_callers(self, receiving: Reception, here: list[Translation]) -> int:
        """How many new connections to a listener live: sockets tell, or conntrack entries."""
        if receiving.protocol == UDP:
            return 0  # of which no peer is told
        if receiving.site.row.puts_old:
            ends = frozenset(Endpoint(receiving.map.old, port) for port in receiving.ports)
            return sock_diag.count_callers(ends, [t.kept for t in here], self._living)
        # Each port is a walk of the table, and after some of them one that reads all is cheaper.
        version = receiving.map.old.version
        self._walks[version] += len(receiving.ports)
        many = is_dump_cheaper(WALK * self._walks[version], self._tracked)
        if many and version not in self._callers:
            self._callers[version] = conntrack_listeners.read_table(version)
        return conntrack_listeners.count(receiving, self._callers.get(version))

    # ---- the rest ----------------------------------------------------------------------------

    @cached_property
    def _tracked(self) -> int:
        return count_tracked() or 0

    @cached_property
    def _zones(self) -> list[int]:
        return conntrack.read_zones(self._netlink)

    @cached_property
    def _shortest_timeout(self) -> float:
        return conntrack.read_shortest_timeout()

    @cached_property
    def _addresses(self) -> frozenset[bytes]:
        return rtnetlink.all_addresses()

    @cached_property
    def _marked(self) -> frozenset[bytes]:
        return rtnetlink.marked_addresses()

    @cached_property
    def _source_rules(self) -> dict[int, tuple[SourceRule, ...]]:
        with Netlink(NETLINK_ROUTE) as netlink:
            return {version: policy_rules.read_rules(netlink, version) for version in (4, 6)}

    def _find_unruled(self, site: Site, plan: Plan) -> frozenset[Address]:
        """The addresses of natkeep's that a rule for NEW is not for."""
        return frozenset(
            step.address
            for step in plan.prepare
            if isinstance(step, AddAddress) and step.site == site and step.like is not None
            if find_uncopied(self._source_rules[step.like.version], step.like, step.address)
            and step.address.packed in self._marked
        )

    @cached_property
    def _loopback(self) -> bool:
        return rtnetlink.loopback_is_up()

    @cached_property
    def _living(self) -> sock_diag.Living:
        return sock_diag.read_living(unanswered=self._unanswered)

    def _add_silences(self, seen: Observation, here: list[Translation], plan: Plan) -> Observation:
        """With what is known of UDP sockets besides."""
        some, servers = [t for t in here if t.protocol == UDP], server_keys(plan.move)
        if not (some or servers):
            return seen
        bound = frozenset[bytes]()
        if servers and seen.sockets is not None:
            bound = sock_diag.find_bound(servers.values(), self._datagrams)
        return replace(
            seen,
            bound=bound,
            silences=silence.read_silences(some, servers),
            forgets=self._forgets,
        )

    @cached_property
    def _forgets(self) -> float:
        return float(silence.read_timeouts()[0])

    @cached_property
    def _datagrams(self) -> sock_diag.Living:
        return sock_diag.read_datagrams()

    def _find_unanswered(self, sockets: Connections | None) -> frozenset[bytes]:
        """Of *sockets* those that say the same again and again."""
        if sockets is None or not self._unanswered:
            return frozenset()
        return frozenset(self._unanswered.intersection(sockets.each()))

    def _count_inner(self, plan: Plan) -> int:
        ends = plan.move.share(plan.inner)
        return sum(len(sock_diag.find_kept(some, self._living)) for some in ends if len(some))

    def _find_sockets(self, here: list[Translation]) -> tuple[Connections, Connections]:
        """The kept connections that have one: those of TCP, and those of UDP."""
        some = [t.kept for t in here if t.protocol == TCP]
        others = [t.kept for t in here if t.protocol == UDP]
        return (
            Connections.joined(sock_diag.find_kept(one, self._living) for one in some),
            Connections.joined(sock_diag.find_kept(one, self._datagrams) for one in others),
        )

    def _find_noted(self, site: Site, plan: Plan, entries: Entries) -> frozenset[bytes]:
        """Of the connections whose entry counts nothing of the peer, or at a gateway of NEW, those
        of which that was heard."""
        found: set[bytes] = set()
        at_gateway = site.row.passes_on
        name_of = base_chains.spoken_set if at_gateway else base_chains.heard_set
        for t in plan.translations:
            some = entries.get(t.number, ()) if t.site == site else ()
            if not all(one and (one.packets_out if at_gateway else one.packets_in) for one in some):
                name = name_of(plan.move.id, t.number)
                unheard = frozenset(nftables_dump.find_unheard(self._netlink, name, t.wire))
                pairs = zip(t.kept.each(), t.wire.each(), strict=True)
                found |= {kept for kept, there in pairs if there not in unheard}
        return frozenset(found)

    def _find_lacking(self, site: Site, plan: Plan) -> tuple[IpRule, ...]:
        steps = (s for s in plan.prepare if isinstance(s, AddRules) and s.site == site)
        wanted = [rule for step in steps for rule in step.rules()]
        for version in {rule.version for rule in wanted} - self._ip_rules.keys():
            self._ip_rules[version] = ip_rules.find_standing(version)
        there = self._ip_rules
        return tuple(r for r in wanted if (some := there[r.version]) is not None and r not in some)

    def _is_guarded(self, site: Site, plan: Plan) -> bool:
        """Whether the guard's process lives, if the move has one here."""
        if not any(isinstance(step, GuardSite) and step.site == site for step in plan.prepare):
            return True
        from natkeep.kernel import owned_table  # only where there is a guard

        return owned_table.is_guarded(self._directory, plan.move.id, self._namespace)


_AT_HOME = (Role.DESTINATION, Role.SOURCE)
_NOWHERE: tuple[Connections | None, Connections] = (None, NO_CONNECTIONS)


def _find_inserted(plan: Plan, site: Site) -> Iterator[Translation]:
    """The translations that have entries of natkeep's there."""
    steps = (step for step in plan.prepare if isinstance(step, InsertEntries))
    return (step.translation for step in steps if step.site == site)


def _without_counts(
    translation: Translation, entries: tuple[SeenEntry | None, ...], noted: frozenset[bytes]
) -> tuple[SeenEntry | None, ...]:
    """Those that have counted nothing, though the table has *noted* packets, count none."""
    return tuple(
        entry._replace(packets_in=None, packets_out=None)
        if entry and record in noted and not (entry.packets_in or entry.packets_out)
        else entry
        for record, entry in zip(translation.kept.each(), entries, strict=True)
    )


def _count_alive(entries: Entries) -> int:
    return sum(1 for seen in entries.values() for one in seen if one and one.alive)


def _without_hook(gone: frozenset[Key], gate: Gate) -> frozenset[Key]:
    """The base chain of the gates is not missed by a move that is open (kernel/nftables.py)."""
    chain, *rules = (one.key() for one in base_chains.gate_hook())
    # It may go between the dump of chains and that of rules; one that was flushed is there still.
    went = gone.issuperset(rules) and not nftables_dump.has_chain(TABLE, base_chains.GATE)
    without = chain in gone or went
    return gone - {chain, *rules} if gate == Gate.OPEN and without else gone
