"""other_rules: the looks at what rules of others do to a move's packets (plan/other_rules.py).

    gateway       peer > OLD and NEW > peer, from where they come in to where they leave
    source        peer > OLD and OLD > peer, whether headers are rewritten by rules
    destination   peer > NEW as it is delivered, OLD > peer as it is sent

Of all connections some are followed: of each peer and each local port one, 32 at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import NamedTuple

from natkeep.kernel import other_rules as reading
from natkeep.kernel import path
from natkeep.kernel.rtnetlink import LOOPBACK
from natkeep.lifecycle.path import find_entrances
from natkeep.lifecycle.subject import Subject
from natkeep.plan.findings import Finding, Severity, ok
from natkeep.plan.maps import Map
from natkeep.plan.move import Mode, Site
from natkeep.plan.other_rules import (
    EVERY,
    Ruleset,
    find_virtual,
    follow,
    without_lock,
)
from natkeep.plan.packet import ANY, ESTABLISHED, INVALID, NEW, Effect, Packet
from natkeep.plan.protocols import Protocol
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple
from natkeep.values import replace

_FOLLOWED = 32
_SAMPLED = 512
FILTERS = frozenset({"filter", "route"})
TURNS = {Mode.STATEFUL: (-120, 80), Mode.STATELESS: (-300, 300)}
"""The priorities at which a packet gets its other address: as it comes in, and as it leaves."""


def look_at_other_rules(subject: Subject) -> Iterator[Finding]:
    """Whether rules of others drop what the move needs, or take it past its rules."""
    plan = subject.plan
    assert plan is not None
    for site in plan.move.ordered_sites():
        here = [one for one in plan.translations if one.site == site]
        if not here:
            continue
        found: dict[tuple[str, str], str] = {}
        entrances = _find_entrances(subject, site, here)
        effects = subject.kernel.ask(site, _follow_at, here, subject.run_id, entrances)
        for effect, tuple_ in effects:
            found.setdefault((effect.does, effect.where), str(tuple_))
        if not site.row.leaves:
            yield from _judge_source(site, found)
            continue
        findings = [*judge(site, found, plan.move.mode)]
        if subject.kernel.ask(site, reading.has_legacy_tables):
            findings.append(Finding("legacy-iptables", site, "iptables-legacy has tables"))
        yield from findings
        ends = frozenset(
            Endpoint(address, end.destination.port)
            for one in here
            for end in sample(one.kept)
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


def _judge_source(site: Site, found: dict[tuple[str, str], str]) -> Iterator[Finding]:
    """Without conntrack, so no entry tells it (lifecycle/sockets.py)."""
    for (does, where), tuple_ in found.items():
        if does == "rewrite":
            yield Finding("source-translates", site, f"{where} rewrites the headers of {tuple_}")


_CODES = {
    "rewrite": ("rewritten", "rewrites the headers of {}", "leave these packets out of that rule"),
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
_IF_SURE = frozenset({"drop", "rewrite", "notrack", "synproxy dropped"})


def _find_entrances(
    subject: Subject, site: Site, here: list[Translation]
) -> dict[Map, Mapping[Address, str]]:
    """At a gateway, by which of its addresses what each NEW sends comes in, where that is known."""
    peers: dict[Map, set[bytes]] = {}
    for one in here if site.row.passes_on else ():
        some = (tuple_.source.address.packed for tuple_ in sample(one.outer))
        peers.setdefault(one.map, set()).update(some)
    return {map_: find_entrances(subject, map_, some) for map_, some in peers.items()}


def _follow_at(
    here: list[Translation], run_id: str | None, entrances: Mapping[Map, Mapping[Address, str]]
) -> list[tuple[Effect, FourTuple]]:
    """What rules of others here do to the packets of these translations, and to which.

    run_id: of the dump; the restore locks the network as the dump did, and unlocks it at its end.
    """
    found: list[tuple[Effect, FourTuple]] = []
    with closing(path.Links()) as links:
        for version in {one.map.old.version for one in here}:
            ruleset = without_lock(reading.read_ruleset(version), run_id)
            for one in here if ruleset.chains else ():
                if one.map.old.version == version:
                    found += _follow_one(ruleset, links, one, entrances.get(one.map, {}))
    return found


def _follow_one(
    ruleset: Ruleset, links: path.Links, translation: Translation, entrances: Mapping[Address, str]
) -> Iterator[tuple[Effect, FourTuple]]:
    proxies = ruleset.has("synproxy") and translation.protocol.has_states
    protocol = translation.protocol
    for views in sample_views(translation):
        ways = _find_ways(links, translation, views, entrances)
        if not protocol.has_states:
            yield from _find_deaf(ruleset, ways, protocol)
        for way in ways:
            for effect, tuple_ in _follow_way(ruleset, way, ESTABLISHED, protocol):
                if effect.does == "synproxy":
                    effect = effect._replace(does="synproxy dropped")
                if effect.sure or effect.does not in _IF_SURE:
                    yield effect, tuple_
            for effect, tuple_ in _follow_way(ruleset, way, INVALID, protocol) if proxies else ():
                if effect.does == "synproxy":
                    yield effect, tuple_


def _find_deaf(
    ruleset: Ruleset, ways: Iterable[_Way], protocol: Protocol
) -> Iterator[tuple[Effect, FourTuple]]:
    """Where no datagram that begins a flow is let through: none of these has an entry any more."""
    firsts = []
    for way in ways:
        effects = _follow_way(ruleset, way, NEW, protocol)
        firsts.append([one for one in effects if one[0].does == "drop" and one[0].sure])
    if all(firsts):
        yield from (some[0] for some in firsts[:1])


_Device = tuple[int, str]
_Stage = tuple[str, FourTuple, _Device, _Device, range]
"""A hook, what the packet is there and between which devices, and the priorities for which."""
_NONE = 0, ""


class _Way(NamedTuple):
    """The hooks of a way; back: the device by which the host would answer what comes so.

    locked: what drops is CRIU's lock, as a rule, and what lies behind it counts.
    """

    back: _Device
    stages: list[_Stage]
    locked: bool = False


def _follow_way(
    ruleset: Ruleset, way: _Way, state: int, protocol: Protocol
) -> Iterator[tuple[Effect, FourTuple]]:
    back = None if way.back == ANY else way.back[0]
    packet = Packet(way.stages[0][1], state=state, back=back, protocol=protocol)
    for hook, tuple_, iif, oif, priorities in way.stages:
        packet = replace(packet, tuple_=tuple_, iif=iif, oif=oif)
        for effect in follow(ruleset, hook, packet, FILTERS, priorities):
            packet = packet.after([effect])
            yield effect, tuple_
            if effect.does == "drop" and effect.sure and not way.locked:
                return


def _find_ways(
    links: path.Links,
    translation: Translation,
    views: list[FourTuple],
    entrances: Mapping[Address, str],
) -> list[_Way]:
    """The hooks that a packet of this connection passes, there and back."""
    row, turns = translation.site.row, TURNS[translation.mode]
    if row.passes_on:
        return _find_ways_through(links, translation.map.new, views, entrances, turns)
    kept, outer, _, routed = views
    local = translation.map.new if row.leaves else translation.map.old
    near = _device(links, links.look_up(outer.source.address, local)[1])
    home = links.device_of(local)
    far = _device(links, home) if home else near
    if near[0] == LOOPBACK:  # the peer is here, too: nothing translates
        outer = routed = kept
        far = near
    first, second = turns
    return [
        _Way(near, [*_come(outer, routed, far, first),
                    *_turn("input", routed, kept, (far, _NONE), second)], not row.leaves),
        _Way(_NONE, [*_turn("output", kept.reply(), routed.reply(), (_NONE, near), first),
                     *_leave(routed.reply(), outer.reply(), (_NONE, near), second)],
             not row.leaves),
    ]  # fmt: skip


def _find_ways_through(
    links: path.Links,
    new: Address,
    views: list[FourTuple],
    entrances: Mapping[Address, str],
    turns: tuple[int, int],
) -> list[_Way]:
    """The same at a gateway."""
    _, outer, inner, routed = views
    first, second = turns
    peer = outer.source.address
    near = _device(links, links.look_up(peer)[1])
    far = _device(links, links.look_up(new)[1])
    entrance = links.enters_by(entrances.get(peer, ""))
    entered = links.device(entrance) if entrance else far
    back = [*_come(inner.reply(), routed.reply(), entered, first)]
    if near[0] == LOOPBACK:  # the peer is the gateway itself
        return [
            _Way(_NONE, [*_turn("output", outer, routed, (_NONE, far), first),
                         *_leave(routed, inner, (_NONE, far), second)]),
            _Way(far, [*back, *_turn("input", routed.reply(), outer.reply(), (entered, _NONE),
                                     second)]),
        ]  # fmt: skip
    return [
        _Way(near, [*_come(outer, routed, near, first), ("forward", routed, near, far, EVERY),
                    *_leave(routed, inner, (near, far), second)]),
        _Way(far, [*back, ("forward", routed.reply(), entered, near, EVERY),
                   *_leave(routed.reply(), outer.reply(), (entered, near), second)]),
    ]  # fmt: skip


def _device(links: path.Links, index: int) -> _Device:
    return links.device(index) if index else ANY


def _turn(
    hook: str, before: FourTuple, after: FourTuple, devices: tuple[_Device, _Device], at: int
) -> Iterator[_Stage]:
    """A hook in which natkeep translates, at priority *at*."""
    yield hook, before, *devices, range(EVERY.start, at)
    yield hook, after, *devices, range(at, EVERY.stop)


def _come(before: FourTuple, after: FourTuple, device: _Device, at: int) -> Iterator[_Stage]:
    yield "ingress", before, device, _NONE, EVERY
    yield from _turn("prerouting", before, after, (device, _NONE), at)


def _leave(
    before: FourTuple, after: FourTuple, devices: tuple[_Device, _Device], at: int
) -> Iterator[_Stage]:
    yield from _turn("postrouting", before, after, devices, at)
    yield "egress", after, *devices, EVERY


def sample(connections: Connections) -> list[FourTuple]:
    """Of each peer's address and local port one connection, 32 at most."""
    return [*Connections.of_records(_sample_records(connections))]


def _sample_records(connections: Connections) -> list[bytes]:
    records = [*connections.each()]
    found: dict[tuple[bytes, bytes], bytes] = {}
    for record in records[:: len(records) // _SAMPLED + 1]:
        half = len(record) // 2
        found.setdefault((record[half:-2], record[half - 2 : half]), record)
    return [*found.values()][:_FOLLOWED]


def sample_views(translation: Translation) -> Iterator[list[FourTuple]]:
    """The same as the process sees each, as it comes, as it leaves, and as it is routed."""
    if not translation.renames:
        for one in sample(translation.outer):
            inside, inner = (
                FourTuple(one.source, Endpoint(address, one.destination.port))
                for address in (translation.map.old, translation.after)
            )
            yield [inside, one, inner, inner]
        return
    views = (translation.outer, translation.inner, translation.routed)
    kept = translation.kept
    others = dict(zip(kept.each(), zip(*(view.each() for view in views), strict=True), strict=True))
    for record in _sample_records(kept):
        each = (Connections.of_records([one]) for one in (record, *others[record]))
        yield [next(iter(one)) for one in each]
