"""marks: the look at what rules of others mark, where `ip rule` asks for marks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import islice

from natkeep.kernel import other_rules as reading
from natkeep.kernel import path
from natkeep.lifecycle.other_rules import FILTERS, TURNS, sample_views
from natkeep.lifecycle.path import sites_that_translate
from natkeep.lifecycle.subject import Subject
from natkeep.plan.findings import Finding
from natkeep.plan.other_rules import EVERY, Ruleset, follow
from natkeep.plan.packet import ESTABLISHED, NEW, Packet
from natkeep.plan.path import Route
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import FourTuple
from natkeep.values import replace


def look_at_marks(subject: Subject) -> Iterator[Finding]:
    """Whether packets go astray by the marks that rules of others set and `ip rule` asks for."""
    plan = subject.plan
    assert plan is not None
    for site, here in sites_that_translate(plan):
        for tuple_, was, now in subject.kernel.ask(site, _find_marked_apart, here):
            yield Finding(
                "marked-apart",
                site,
                f"by the marks that rules give it {tuple_} leaves {now} instead of {was}",
            )


def _find_marked_apart(here: list[Translation]) -> list[tuple[FourTuple, str, str]]:
    """Of each translation one packet that leaves by another device for its marks, and by which."""
    found: list[tuple[FourTuple, str, str]] = []
    versions = filter(path.asks_for_marks, sorted({one.map.old.version for one in here}))
    for version in versions:
        ruleset = reading.read_ruleset(version)
        with closing(path.Links()) as links:
            for one in here:
                if one.map.old.version == version:
                    found += islice(_find_apart(ruleset, links, one), 1)
    return found


def _find_apart(
    ruleset: Ruleset, links: path.Links, translation: Translation
) -> Iterator[tuple[FourTuple, str, str]]:
    look = _look_at_gateway if translation.site.row.passes_on else _look_at_destination
    for views in sample_views(translation):
        for tuple_, was, now in look(ruleset, links, translation, views):
            if was.kind == now.kind == "unicast" and was.said() != now.said():
                yield tuple_, was.said(), now.said()


_Apart = tuple[FourTuple, Route, Route]


def _look_at_gateway(
    ruleset: Ruleset, links: path.Links, translation: Translation, views: list[FourTuple]
) -> Iterator[_Apart]:
    """What NEW sends should leave as OLD's, and what the peer sends to NEW, if that is beside."""
    kept, outer, inner, routed = views
    peer, new = outer.source, translation.map.new
    first, _ = TURNS[translation.mode]
    ways = []
    for source in (kept.destination, inner.destination):
        device = links.look_up(source.address)[1]
        away = FourTuple(source, peer)
        packet = Packet(away, iif=links.device(device), protocol=translation.protocol)
        mark = packet.after(follow(ruleset, "prerouting", packet, FILTERS)).mark or 0
        ways.append(links.look_up(peer.address, source.address, device, mark)[0])
    yield away, ways[0], ways[1]

    to_new, near = links.look_up(new)[0], links.look_up(peer.address)[1]
    packet = Packet(outer, iif=links.device(near), protocol=translation.protocol)
    for tuple_, priorities in ((outer, range(EVERY.start, first)), (routed, range(first, 0))):
        packet = replace(packet, tuple_=tuple_)
        packet = packet.after(follow(ruleset, "prerouting", packet, FILTERS, priorities))
    there = links.look_up(new, peer.address, near, packet.mark or 0)[0]
    if to_new.neighbour and there.device != to_new.device:
        yield routed, to_new, there


def _look_at_destination(
    ruleset: Ruleset, links: path.Links, translation: Translation, views: list[FourTuple]
) -> Iterator[_Apart]:
    """What the socket sends as OLD should leave as NEW's, and as a new connection's to NEW.

    Such a one may get a mark of its own as it comes in; natkeep's entry has none.
    """
    kept, outer, *_ = views
    new, peer = translation.map.new, outer.source.address
    iif, protocol = links.device(links.device_of(new)), translation.protocol
    came = Packet(outer, iif=iif, state=NEW, connmark=0, protocol=protocol)
    given = came.after(follow(ruleset, "prerouting", came, FILTERS)).connmark
    usual = replace(came, state=ESTABLISHED)
    has = usual.after(follow(ruleset, "prerouting", usual, FILTERS)).connmark
    ways = []
    ends = (kept.destination, has), (outer.destination, has), (outer.destination, given)
    for source, connmark in ends:
        packet = Packet(FourTuple(source, kept.source), connmark=connmark, protocol=protocol)
        mark = packet.after(follow(ruleset, "output", packet, FILTERS)).mark or 0
        ways.append(links.look_up(peer, new, 0, mark)[0])  # OLD is not there yet
    yield FourTuple(kept.destination, kept.source), ways[1], ways[0]
    yield FourTuple(kept.destination, kept.source), ways[2], ways[0]
