"""path: the looks at the way that a move's packets take (plan/path.py judges)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from natkeep.kernel import path
from natkeep.kernel.neighbours import find_owner
from natkeep.lifecycle.subject import Subject
from natkeep.plan.findings import Finding, ok
from natkeep.plan.maps import Map
from natkeep.plan.move import Site
from natkeep.plan.path import find_apart, find_uncopied, judge
from natkeep.plan.roles import Role
from natkeep.plan.steps import Plan
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections
from natkeep.values import replace


def look_at_routes(subject: Subject) -> Iterator[Finding]:
    """Whether peers and NEW reach each other, and by the gateway."""
    plan = subject.plan
    assert plan is not None
    for site, here in sites_that_translate(plan):
        if site.row.own or site.row.relays:
            yield from _look_from_here(subject, site, here)
        elif site.row.passes_on:
            yield from _look_at_gateway(subject, plan, site, here)
        else:
            own = _find_gateways_own(subject, plan)
            direct = {one.new for one in plan.move.peer_maps if own is None}
            direct |= {via.source for via in plan.move.vias}
            direct.update(*(here for _, here in plan.surroundings.at_peers))
            for map_, peers in peers_of(here):
                ports = _find_ports(subject, site, here, map_)
                ways = subject.kernel.ask(
                    site, path.read_at_destination, map_.old, map_.new, peers, own, ports
                )
                told = (replace(w, direct=w.peer in direct, alone=own is None) for w in ways)
                yield from judge(site, told)


def look_at_policy_rules(subject: Subject) -> Iterator[Finding]:
    """Whether what the sockets send as OLD is routed as what NEW sends."""
    assert subject.plan is not None
    for site, here in sites_that_translate(subject.plan):
        if not site.row.puts_old:
            continue
        for map_, _ in peers_of(here):
            rules = subject.kernel.ask(site, path.read_source_rules, map_.old.version)
            apart = find_apart(rules, map_.new, map_.old)
            for rule in apart[:1]:
                yield Finding(
                    "old-routed-apart",
                    site,
                    f"ip rule {rule.priority} routes what OLD {map_.old} sends by table "
                    f"{rule.table}, and not what NEW {map_.new} does",
                    f"have one for NEW as well: ip rule add from {map_.new} priority "
                    f"{rule.priority} lookup {rule.table}, or delete it",
                )
            copied = find_uncopied(rules, map_.new, map_.old)
            if copied and not apart:
                yield ok(site, f"`ip rule from {map_.new}` will hold for OLD {map_.old}, too")


def look_at_new(subject: Subject) -> Iterator[Finding]:
    """Whether NEW can be used as it stands at the destination."""
    assert subject.plan is not None
    for site, here in sites_that_translate(subject.plan):
        for new in dict.fromkeys(one.map.new for one in here if site.row.puts_old):
            state = subject.kernel.ask(site, path.read_address_state, new)
            if state:
                yield Finding("new-unusable", site, f"NEW {new} is {state}")
            else:
                yield ok(site, f"NEW {new} can be used")


def look_at_owners(subject: Subject) -> Iterator[Finding]:
    """Whether another host on the destination's links has NEW; it is asked for, 0.2 s each."""
    assert subject.plan is not None
    for site, here in sites_that_translate(subject.plan):
        for new in dict.fromkeys(one.map.new for one in here if site.row.puts_old):
            owner = subject.kernel.ask(site, find_owner, new, new)
            if owner:
                yield Finding("new-held", site, f"NEW {new} is that of another host, too: {owner}")
            else:
                yield ok(site, f"no other host on the link has NEW {new}")


def sites_that_translate(plan: Plan) -> Iterator[tuple[Site, list[Translation]]]:
    """Each site that changes addresses, gateways first, and its translations."""
    for site in plan.move.ordered_sites():
        here = [one for one in plan.translations if one.site == site]
        if site.row.leaves and here:
            yield site, here


def peers_of(here: list[Translation]) -> Iterator[tuple[Map, frozenset[bytes]]]:
    """Each pair of OLD and NEW, and the addresses of its peers as they are on the wire."""
    for map_ in dict.fromkeys(one.map for one in here):
        peers: frozenset[bytes] = frozenset()
        for one in here:
            peers |= one.outer.peers() if one.map == map_ else frozenset()
        yield map_, peers


def _find_ports(
    subject: Subject, site: Site, here: list[Translation], map_: Map
) -> dict[Address, tuple[int, int]]:
    """Of each peer the ports of one connection, if policy rules at *site* ask for ports."""
    if not subject.kernel.ask(site, path.asks_for_ports, map_.new.version):
        return {}
    return {
        tuple_.source.address: (tuple_.source.port, tuple_.destination.port)
        for one in here
        if one.map == map_
        for tuple_ in one.outer
    }


def find_entrances(subject: Subject, map_: Map, peers: Iterable[bytes]) -> dict[Address, str]:
    """By which address of a gateway, or other router, what NEW sends to each peer comes in."""
    found: dict[Address, str] = {}
    assert subject.plan is not None
    for site, here in sites_that_translate(subject.plan):
        if site.row.puts_old and any(one.map == map_ for one in here):
            ports = _find_ports(subject, site, here, map_)
            found.update(subject.kernel.ask(site, path.read_entrances, map_.new, peers, ports))
    return found


def _look_from_here(subject: Subject, site: Site, here: list[Translation]) -> Iterator[Finding]:
    """The routes of what leaves this host as its own: to NEW, and from a relay to peers."""
    for map_, peers in peers_of(here):
        ends = [("no-way-there", f"NEW {map_.new}", frozenset({map_.new.packed}))]
        ends += [("no-way-back", "each peer", peers)] if site.row.relays else []
        for code, name, addresses in ends:
            ways = subject.kernel.ask(site, path.read_ways, addresses)
            lost = [(to, way) for to, way in ways if way.kind != "unicast"]
            for to, way in lost[:1]:
                yield Finding(code, site, f"no route to {to}: {way.said()}")
            if not lost:
                by = ", ".join(sorted({way.said() for _, way in ways}))
                yield ok(site, f"{name} is reached {by}")


def _find_gateways_own(subject: Subject, plan: Plan) -> frozenset[Address] | None:
    """The addresses of the move's gateways; None where it has none."""
    gateways = [site for site in plan.move.sites if site.row.passes_on]
    own = (
        subject.kernel.ask(site, path.read_local, version)
        for site in gateways
        for version in {map_.new.version for map_ in plan.move.maps}
    )
    return frozenset().union(*own) if gateways else None


def _look_at_gateway(
    subject: Subject, plan: Plan, site: Site, here: list[Translation]
) -> Iterator[Finding]:
    tells = any(one.role == Role.DESTINATION for one in plan.move.sites)  # NEW's link, itself
    for map_, peers in peers_of(here):
        off = subject.kernel.ask(site, path.find_not_forwarding, map_.old, map_.new, peers)
        if off:
            what = f"{', '.join(off)} {'is' if len(off) == 1 else 'are'} 0"
            yield Finding("forwarding-off", site, what, f"sysctl -w {off[0]}=1")
        else:
            yield ok(site, f"forwarding is on for IPv{map_.new.version}")
        entrances = find_entrances(subject, map_, peers)
        ports = _find_ports(subject, site, here, map_)
        ways = subject.kernel.ask(
            site, path.read_at_gateway, map_.old, map_.new, peers, entrances, ports
        )
        if tells:
            ways = tuple(replace(way, by_route=True) for way in ways)
        beside = {way.peer for way in ways if way.is_beside()}
        if beside:
            seen = _find_crossing(subject, site, here, beside)
            ways = tuple(replace(way, crosses=way.peer in seen) for way in ways)
        yield from judge(site, ways, forwards=not off)


def _find_crossing(
    subject: Subject, site: Site, here: list[Translation], peers: set[Address]
) -> set[Address]:
    """Those of *peers* of whose connections the gateway has an entry: they do cross it."""
    packed, crossing = {peer.packed for peer in peers}, set[Address]()
    for one in here:
        some: dict[bytes, bytes] = {}
        for outer, kept in zip(one.outer.each(), one.kept.each(), strict=True):
            half = len(outer) // 2
            if outer[half:-2] in packed:
                some.setdefault(kept, outer[half:-2])
            if len(some) == _ASKED:
                break
        for own in subject.kernel.ask(site, _read_own, Connections.of_records(some)):
            crossing.add(ip_address(some[own]))
    return crossing


_ASKED = 256
"""So many connections are asked for to know whether their peers cross the gateway."""


def _read_own(connections: Connections) -> list[bytes]:
    """The records of those that have an entry here."""
    from natkeep.kernel.conntrack_own import find_own

    return [own.record for own in find_own(connections, rare=True)]
