"""hops: the look at a host between the destination and its gateway, which is no site of the move.

A container's packets leave by such a one, and it may masquerade or drop them. It is seen where
natkeep runs there, or where it is the first process' namespace.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, suppress

from natkeep.errors import KernelError, NatkeepError
from natkeep.kernel import other_rules as reading
from natkeep.kernel import path, sysctl
from natkeep.kernel.netns import Namespace, inside, open_namespace
from natkeep.lifecycle.other_rules import FILTERS, sample
from natkeep.lifecycle.path import peers_of
from natkeep.lifecycle.subject import Subject
from natkeep.plan.findings import Finding, ok
from natkeep.plan.identity import Identity
from natkeep.plan.other_rules import Ruleset, find_translating, follow
from natkeep.plan.packet import ESTABLISHED, INVALID, NEW, Effect, Packet
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import FourTuple

_NAT = frozenset({"nat"})


def look_at_hops(subject: Subject) -> Iterator[Finding]:
    """Whether the host by which a container's packets leave would masquerade them.

    It is no site, and seen where natkeep runs there, or where it is the first process' namespace.
    """
    plan = subject.plan
    assert plan is not None
    hosts = [*_find_hosts({subject.kernel.identity(site) for site in plan.move.sites})]
    for site in plan.move.sites if hosts else ():
        here = [one for one in plan.translations if one.site == site]
        for map_, peers in peers_of(here) if site.row.puts_old else ():
            ways = subject.kernel.ask(
                site, path.read_at_destination, map_.old, map_.new, peers, frozenset()
            )
            hops = {way.out.hop for way in ways if way.out.hop}
            if hops:
                some = [one for one in here if one.map == map_]
                yield from _look_at_hop(some, peers, hops, hosts)
    for namespace, _ in hosts:
        os.close(namespace.fd)


def _find_hosts(sites: set[Identity]) -> Iterator[tuple[Namespace, str]]:
    """The namespaces that may be a container's host, and are none of the move's *sites*."""
    for name, said in (("", "this host"), ("pid:1", "the host of process 1")):
        try:
            namespace = open_namespace(name)
        except NatkeepError:
            continue
        if namespace.identity in sites:
            os.close(namespace.fd)
            continue
        sites = {*sites, namespace.identity}
        yield namespace, said


def _look_at_hop(
    some: list[Translation],
    peers: frozenset[bytes],
    hops: set[str],
    hosts: list[tuple[Namespace, str]],
) -> Iterator[Finding]:
    """What there is to say of a hop of *some*, which are of one map and site."""
    map_, site = some[0].map, some[0].site
    for namespace, said in hosts:
        effects, off, legacy = None, tuple[str, ...](), False
        # What may not be entered is not seen.
        with suppress(KernelError, OSError), inside(namespace):
            effects = _follow_hop(some, hops)
            legacy = reading.has_legacy_tables()
            off = path.find_not_forwarding(map_.old, map_.new, peers)
        if effects is None:
            continue
        between = f"{said} is between {site} and its peers, and"
        if off:
            yield Finding("forwarding-off", None, f"{between} {off[0]} is 0 there")
        if legacy:
            yield Finding("legacy-iptables", None, f"{between} iptables-legacy has tables there")
        seen = {(effect.where, effect.does): tuple_ for effect, tuple_ in reversed(effects)}
        for (where, does), tuple_ in seen.items():
            ip = "ip" if map_.new.version == 4 else "ip6"
            accept = f"{ip} saddr {tuple_.source.address} {ip} daddr {tuple_.destination.address}"
            code, what = (
                ("dropped", "drops") if does == "drop" else ("hop-translates", f"may {does}")
            )
            yield Finding(
                code,
                None,
                f"{between} {where} {what} {tuple_}",
                f"in front of that rule: {accept} accept",
            )
        if not (effects or off or legacy):
            yield ok(None, f"{said}, by which {site} is reached, lets all pass")


def _follow_hop(some: list[Translation], hops: set[str]) -> list[tuple[Effect, FourTuple]] | None:
    """What the namespace of this thread translates or drops, if it is one of *hops*; else None."""
    version = some[0].map.new.version
    with closing(path.Links()) as links:
        if not any(str(address) in hops for address in path.read_local(version)):
            return None
        ruleset = reading.read_ruleset(version)
        return [each for one in some for each in _follow_one(ruleset, links, one)]


def _follow_one(
    ruleset: Ruleset, links: path.Links, translation: Translation
) -> Iterator[tuple[Effect, FourTuple]]:
    """The same of one translation.

    The hop has no entry of the connection: what NEW says first makes one, if it may.
    """
    new, protocol = translation.map.new, translation.protocol
    to_new = links.look_up(new)[1]
    loose = not protocol.has_states or sysctl.read("netfilter/nf_conntrack_tcp_loose") != "0"
    first, second = (NEW, ESTABLISHED) if loose else (INVALID, INVALID)
    for tuple_ in sample(translation.outer):
        out = links.look_up(tuple_.source.address, new, to_new)[1]
        near, far = links.device(out), links.device(to_new)
        away, there = (tuple_.reply(), far, near), (tuple_, near, far)
        for one in (away, there):
            effects = _follow_through(ruleset, Packet(*one, NEW, protocol=protocol), _NAT)
            yield from ((effect, one[0]) for effect in find_translating(effects))
        for one, state in ((away, first), (there, second)):
            effects = _follow_through(ruleset, Packet(*one, state, protocol=protocol), FILTERS)
            drops = (each for each in effects if each.does == "drop" and each.sure)
            yield from ((each, one[0]) for each in drops)


def _follow_through(ruleset: Ruleset, packet: Packet, types: frozenset[str]) -> list[Effect]:
    """What is done to *packet* at the hooks that it passes."""
    effects: list[Effect] = []
    for hook in ("prerouting", "forward", "postrouting"):
        effects += (here := follow(ruleset, hook, packet, types))
        packet = packet.after(here)
    return effects
