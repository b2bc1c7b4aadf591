"""other_rules: the looks at what rules of others do to a move's packets (plan/other_rules.py).

    gateway       peer > OLD and NEW > peer, from where they come in to where they leave
    destination   peer > NEW as it is delivered, OLD > peer as it is sent
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
from natkeep.kernel.rtnetlink import LOOPBACK
from natkeep.lifecycle.subject import Subject
from natkeep.plan.findings import Finding, Severity, ok
from natkeep.plan.identity import Identity
from natkeep.plan.move import Mode, Site
from natkeep.plan.other_rules import (
    EVERY,
    Ruleset,
    find_translating,
    find_virtual,
    follow,
    without_lock,
)
from natkeep.plan.packet import ESTABLISHED, INVALID, NEW, Effect, Packet
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.values import replace

_FOLLOWED = 32
_SAMPLED = 512
_FILTERS = frozenset({"filter", "route"})
_TURNS = {Mode.STATEFUL: (-120, 80), Mode.STATELESS: (-300, 300)}
"""The priorities at which a packet gets its other address: as it comes in, and as it leaves."""


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
        if subject.kernel.ask(site, reading.has_legacy_tables):
            findings.append(Finding("legacy-iptables", site, "iptables-legacy has tables"))
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
        if not any(finding.severity == Severity.STOP for finding in findings):
            yield ok(site, "no rule of others drops what is to pass")


def judge(site: Site, found: dict[tuple[str, str], str], mode: Mode) -> Iterator[Finding]:
    """What was *found* to be done, and where, to which tuple."""
    for (does, where), tuple_ in found.items():
        if does not in _CODES:
            continue
        code, what, remedy = _CODES[does]
        if does == "flow offload" and mode == Mode.STATELESS:
            code = "flowtable-past-rules"
        yield Finding(code, site, f"{where} {what.format(tuple_)}", remedy)


_CODES = {
    "drop": ("dropped", "drops {}", "accept it in front of that rule"),
    "synproxy dropped": ("dropped", "has SYNPROXY drop {}", "accept it in front of that rule"),
    "synproxy": ("synproxy", "has a SYNPROXY for {}", ""),
    "tproxy": ("tproxy", "gives {} to a socket here", ""),
    "queue": ("queued", "gives {} to a program", ""),
    "flow offload": ("flowtable", "offloads {}", ""),
    "notrack": ("not-tracked", "has {} not tracked", ""),
    "helper": ("helper", "assigns {} a conntrack helper", ""),
    "zone": ("zone", "assigns {} a conntrack zone", ""),
}
"""Code, words and remedy of what is done."""
_IF_SURE = frozenset({"drop", "notrack", "synproxy dropped"})


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
    proxies = ruleset.has("synproxy")
    for views in _sample_views(translation):
        for way in _find_ways(links, translation, *views):
            for effect, tuple_ in _follow_way(ruleset, way, ESTABLISHED):
                if effect.does == "synproxy":
                    effect = effect._replace(does="synproxy dropped")
                if effect.sure or effect.does not in _IF_SURE:
                    yield effect, tuple_
            for effect, tuple_ in _follow_way(ruleset, way, INVALID) if proxies else ():
                if effect.does == "synproxy":
                    yield effect, tuple_


_Device = tuple[int, str]
_Stage = tuple[str, FourTuple, _Device, _Device, range]
"""A hook, what the packet is there and between which devices, and the priorities for which."""
_NONE = 0, ""


def _follow_way(
    ruleset: Ruleset, way: list[_Stage], state: int
) -> Iterator[tuple[Effect, FourTuple]]:
    packet = Packet(way[0][1], state=state)
    for hook, tuple_, iif, oif, priorities in way:
        packet = replace(packet, tuple_=tuple_, iif=iif, oif=oif)
        for effect in follow(ruleset, hook, packet, _FILTERS, priorities):
            packet = packet.after([effect])
            yield effect, tuple_
            if effect.does == "drop" and effect.sure:
                return


def _find_ways(
    links: path.Links,
    translation: Translation,
    kept: FourTuple,
    outer: FourTuple,
    inner: FourTuple,
    routed: FourTuple,
) -> list[list[_Stage]]:
    """The hooks that a packet of this connection passes, there and back."""
    first, second = _TURNS[translation.mode]
    near = links.device(links.look_up(outer.source.address)[1])
    far = links.device(links.look_up(translation.map.new)[1])
    if not translation.site.row.passes_on:
        home = links.device_of(translation.map.new)
        far = links.device(home) if home else near
        if near[0] == LOOPBACK:  # the peer is here, too: nothing translates
            outer = routed = kept
            far = near
        return [
            [*_come(outer, routed, far, first),
             *_turn("input", routed, kept, (far, _NONE), second)],
            [*_turn("output", kept.reply(), routed.reply(), (_NONE, near), first),
             *_leave(routed.reply(), outer.reply(), near, second)],
        ]  # fmt: skip
    back = [*_come(inner.reply(), routed.reply(), far, first)]
    if near[0] == LOOPBACK:  # the peer is the gateway itself
        return [
            [*_turn("output", outer, routed, (_NONE, far), first),
             *_leave(routed, inner, far, second)],
            [*back, *_turn("input", routed.reply(), outer.reply(), (far, _NONE), second)],
        ]  # fmt: skip
    return [
        [*_come(outer, routed, near, first), ("forward", routed, near, far, EVERY),
         *_leave(routed, inner, far, second)],
        [*back, ("forward", routed.reply(), far, near, EVERY),
         *_leave(routed.reply(), outer.reply(), near, second)],
    ]  # fmt: skip


def _turn(
    hook: str, before: FourTuple, after: FourTuple, devices: tuple[_Device, _Device], at: int
) -> Iterator[_Stage]:
    """A hook in which natkeep translates, at priority *at*."""
    yield hook, before, *devices, range(EVERY.start, at)
    yield hook, after, *devices, range(at, EVERY.stop)


def _come(before: FourTuple, after: FourTuple, device: _Device, at: int) -> Iterator[_Stage]:
    yield "ingress", before, device, _NONE, EVERY
    yield from _turn("prerouting", before, after, (device, _NONE), at)


def _leave(before: FourTuple, after: FourTuple, device: _Device, at: int) -> Iterator[_Stage]:
    yield from _turn("postrouting", before, after, (_NONE, device), at)
    yield "egress", after, _NONE, device, EVERY


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
                mark = packet.after(follow(ruleset, hook, packet, _FILTERS)).mark or 0
                origin = source if at_gateway else map_.new  # OLD is not there yet
                ways.append(links.look_up(tuple_.source.address, origin, device, mark)[0])
            was, now = ways
            if was.kind == now.kind == "unicast" and was.said() != now.said():
                found.append((away, was.said(), now.said()))
    return found


def _sample(connections: Connections) -> list[FourTuple]:
    """Of each peer's address and local port one connection, 32 at most."""
    return [*Connections.of_records(_sample_records(connections))]


def _sample_records(connections: Connections) -> list[bytes]:
    records = [*connections.each()]
    found: dict[tuple[bytes, bytes], bytes] = {}
    for record in records[:: len(records) // _SAMPLED + 1]:
        half = len(record) // 2
        found.setdefault((record[half:-2], record[half - 2 : half]), record)
    return [*found.values()][:_FOLLOWED]


def _sample_views(translation: Translation) -> Iterator[list[FourTuple]]:
    """The same as the process sees each, as it comes, as it leaves, and as it is routed."""
    kept = translation.kept
    if not translation.renames:
        for one in _sample(kept):
            outer, inner = (
                FourTuple(one.source, Endpoint(address, one.destination.port))
                for address in (translation.before, translation.after)
            )
            yield [one, outer, inner, inner]
        return
    views = (translation.outer, translation.inner, translation.routed)
    others = dict(zip(kept.each(), zip(*(view.each() for view in views), strict=True), strict=True))
    for record in _sample_records(kept):
        each = (Connections.of_records([one]) for one in (record, *others[record]))
        yield [next(iter(one)) for one in each]


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
            map_, peers = translation.map, translation.outer.peers()
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
