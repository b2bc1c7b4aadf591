"""other_rules: the looks at what rules of others do to a move's packets (plan/other_rules.py).

    gateway       peer > NEW and NEW > peer, as they are passed on
    destination   peer > OLD as it is delivered, OLD > peer as it is sent
    here          NEW > peer, where natkeep runs on the host by which a container's packets leave

Of all connections some are followed: of each peer and each local port one, 32 at most.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, suppress

from natkeep.errors import KernelError, NatkeepError
from natkeep.kernel import other_rules as reading
from natkeep.kernel import path
from natkeep.kernel.netns import Namespace, inside, open_namespace
from natkeep.lifecycle.subject import Subject
from natkeep.plan.findings import Finding, ok
from natkeep.plan.identity import Identity
from natkeep.plan.move import Mode, Site
from natkeep.plan.other_rules import (
    ESTABLISHED,
    NEW,
    UNTRACKED,
    Effect,
    Packet,
    Ruleset,
    find_mark,
    find_translating,
    find_virtual,
    follow,
    without_lock,
)
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

_FOLLOWED = 32
_SAMPLED = 512
_FILTERS = frozenset({"filter", "route"})
_RAW = frozenset({"filter"})


def look_at_other_rules(subject: Subject) -> Iterator[Finding]:
    """Whether rules of others drop what the move needs, or take it past its rules."""
    plan = subject.plan
    assert plan is not None
    for site in plan.move.ordered_sites():
        here = [one for one in plan.translations if one.site == site]
        if not site.row.leaves or not here:
            continue
        found: dict[tuple[str, str], str] = {}
        for effect, tuple_ in subject.kernel.ask(site, _follow_at, here, subject.run_id):
            found.setdefault((effect.does, effect.where), str(tuple_))
        findings = [*judge(site, found, plan.move.mode)]
        yield from findings
        ends = frozenset(
            Endpoint(address, end.destination.port)
            for one in here
            for end in _sample(one.kept)
            for address in (one.map.old, one.map.new)
        )
        table = subject.kernel.ask(site, reading.read_virtual_servers)
        for server in find_virtual(table, ends) if table else ():
            yield Finding("virtual-server", site, f"IPVS has a {server}")
        if not any(finding.code in ("dropped", "flowtable-past-rules") for finding in findings):
            yield ok(site, "no rule of others drops what is to pass")


def judge(site: Site, found: dict[tuple[str, str], str], mode: Mode) -> Iterator[Finding]:
    """What was *found* to be done, and where, to which tuple."""
    for (does, where), tuple_ in found.items():
        if does == "drop":
            yield Finding(
                "dropped", site, f"{where} drops {tuple_}", "accept it in front of that rule"
            )
        elif does == "flow offload" and mode == Mode.STATELESS:
            yield Finding("flowtable-past-rules", site, f"{where} offloads {tuple_}")
        elif does == "notrack":
            yield Finding("not-tracked", site, f"{where} has {tuple_} not tracked")


def _follow_at(here: list[Translation], run_id: str | None) -> list[tuple[Effect, FourTuple]]:
    """What rules of others here do to the packets of these translations, and to which.

    run_id: of the dump; the restore locks the network as the dump did, and unlocks it at its end.
    """
    found: list[tuple[Effect, FourTuple]] = []
    with closing(path.Links()) as links:
        for version in {one.map.old.version for one in here}:
            ruleset = without_lock(reading.read_ruleset(version), run_id)
            for one in here if ruleset.chains else ():
                if one.map.old.version == version:
                    found += _follow_one(ruleset, links, one)
    return found


def _follow_one(
    ruleset: Ruleset, links: path.Links, translation: Translation
) -> Iterator[tuple[Effect, FourTuple]]:
    map_, at_gateway = translation.map, translation.site.row.passes_on
    for tuple_ in _sample(translation.routed if at_gateway else translation.kept):
        peer, local = tuple_.source, tuple_.destination
        there = FourTuple(peer, Endpoint(map_.new, local.port))
        near = links.device(links.look_up(peer.address)[1])
        far = links.device(links.look_up(map_.new)[1])
        if not at_gateway:
            far = links.device(links.device_of(map_.new)) if links.device_of(map_.new) else near
        state = ESTABLISHED
        for hook, one in (("prerouting", tuple_), ("output", tuple_.reply())):
            for effect in follow(ruleset, hook, Packet(one, near, near), _RAW):
                if effect.does == "notrack" and effect.sure:
                    state = UNTRACKED
                    yield effect, one
        passes = (
            [("forward", Packet(there, near, far, state)),
             ("forward", Packet(there.reply(), far, near, state))]
            if at_gateway
            else [("input", Packet(tuple_, iif=far, state=state)),
                  ("output", Packet(tuple_.reply(), oif=near, state=state))]
        )  # fmt: skip
        for hook, packet in passes:
            for effect in follow(ruleset, hook, packet, _FILTERS):
                if effect.does == "flow offload" or (effect.does == "drop" and effect.sure):
                    yield effect, packet.tuple_


def look_at_marks(subject: Subject) -> Iterator[Finding]:
    """Whether rules of others mark NEW's packets otherwise than OLD's, and `ip rule` asks."""
    plan = subject.plan
    assert plan is not None
    for site in plan.move.ordered_sites():
        for translation in plan.translations if site.row.leaves else ():
            if translation.site != site:
                continue
            apart = subject.kernel.ask(site, _find_marked_apart, translation)
            for tuple_, was, now in apart[:1]:
                yield Finding(
                    "marked-apart",
                    site,
                    f"by the marks that rules give what {translation.map.old} and "
                    f"{translation.map.new} send, {tuple_} leaves {now} instead of {was}",
                )


def _find_marked_apart(translation: Translation) -> list[tuple[FourTuple, str, str]]:
    """Of which connections the answers leave by another device, and which, for their marks."""
    map_, at_gateway = translation.map, translation.site.row.passes_on
    if not path.asks_for_marks(map_.old.version):
        return []
    ruleset, found = reading.read_ruleset(map_.old.version), []
    with closing(path.Links()) as links:
        homes = [links.look_up(one)[1] for one in (map_.old, map_.new)] if at_gateway else [0, 0]
        for tuple_ in _sample(translation.kept):
            ways = []
            for source, device in zip((map_.old, map_.new), homes, strict=True):
                away = FourTuple(Endpoint(source, tuple_.destination.port), tuple_.source)
                packet = Packet(away, iif=links.device(device))
                hook = "prerouting" if at_gateway else "output"
                mark = find_mark(follow(ruleset, hook, packet, _FILTERS))
                origin = source if at_gateway else map_.new  # OLD is not there yet
                ways.append(links.look_up(tuple_.source.address, origin, device, mark)[0])
            was, now = ways
            if was.kind == now.kind == "unicast" and was.said() != now.said():
                found.append((away, was.said(), now.said()))
    return found


def _sample(connections: Connections) -> list[FourTuple]:
    """Of each peer's address and local port one connection, 32 at most."""
    records = [*connections.each()]
    found: dict[tuple[bytes, bytes], bytes] = {}
    for record in records[:: len(records) // _SAMPLED + 1]:
        half = len(record) // 2
        found.setdefault((record[half:-2], record[half - 2 : half]), record)
    return [*Connections.of_records([*found.values()][:_FOLLOWED])]


# ---- a hop that is no site -----------------------------------------------------------------------


def look_at_hops(subject: Subject) -> Iterator[Finding]:
    """Whether the host by which a container's packets leave would masquerade them.

    It is no site, and seen where natkeep runs there, or where it is the first process' namespace.
    """
    plan = subject.plan
    assert plan is not None
    hosts = [*_find_hosts({subject.kernel.identity(site) for site in plan.move.sites})]
    for site in plan.move.sites if hosts else ():
        here = [one for one in plan.translations if one.site == site]
        for translation in here if site.row.puts_old else ():
            map_, peers = translation.map, translation.kept.peers()
            ways = subject.kernel.ask(
                site, path.read_at_destination, map_.old, map_.new, peers, frozenset()
            )
            hops = {way.out.hop for way in ways if way.out.hop}
            if hops:
                yield from _look_at_hop(translation, hops, hosts)
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
    translation: Translation, hops: set[str], hosts: list[tuple[Namespace, str]]
) -> Iterator[Finding]:
    for namespace, said in hosts:
        effects = None
        # What may not be entered is not seen.
        with suppress(KernelError, OSError), inside(namespace):
            effects = _follow_hop(translation, hops)
        if effects is None:
            continue
        seen = dict.fromkeys((effect.where, effect.does) for effect, _ in effects)
        for where, does in seen:
            tuple_ = next(one for effect, one in effects if effect.where == where)
            ip = "ip" if translation.map.new.version == 4 else "ip6"
            yield Finding(
                "hop-translates",
                None,
                f"{said} is between {translation.site} and its peers, and {where} may {does} "
                f"{tuple_}",
                f"in front of that rule: {ip} saddr {translation.map.new} {ip} daddr "
                f"{tuple_.destination.address} accept",
            )
        if not effects:
            yield ok(None, f"{said}, by which {translation.site} is reached, translates nothing")


def _follow_hop(translation: Translation, hops: set[str]) -> list[tuple[Effect, FourTuple]] | None:
    """What the namespace of this thread translates, if it is one of *hops*; else None."""
    new, nat, found = translation.map.new, frozenset({"nat"}), []
    with closing(path.Links()) as links:
        if not any(str(address) in hops for address in path.read_local(new.version)):
            return None
        ruleset = reading.read_ruleset(new.version)
        to_new = links.look_up(new)[1]
        for tuple_ in _sample(translation.outer):
            out = links.look_up(tuple_.source.address, new, to_new)[1]
            near, far = links.device(out), links.device(to_new)
            away = Packet(tuple_.reply(), far, near, NEW)
            there = Packet(tuple_, near, far, NEW)
            for hook, packet in (("postrouting", away), ("prerouting", away),
                                 ("prerouting", there), ("postrouting", there)):  # fmt: skip
                for effect in find_translating(follow(ruleset, hook, packet, nat)):
                    found.append((effect, packet.tuple_))
    return found
