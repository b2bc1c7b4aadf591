"""what a site tells of each kept connection: whether it lives, and whether both ends are heard.

    live       its socket is there; at a gateway, which has none, its entry is in no end
    silent     its socket is there, or may be, and no packet has passed for so long that conntrack
               remembers none: of UDP, which has no end that a packet tells
    one-way    it is live, and packets of one direction alone have passed, or what the process says
               is said again and again, for 5 s and more
    ended      the destination has no socket of it, and no entry that goes on; at a gateway its
               entry has shown the end

Of others nothing is known: before the gate was opened, where the socket has gone and the entry goes
on (not restored yet, or dumped to move on), and at a gateway that has no entry, or tracks nothing
in mode stateless.

Rule: values only. A count tells of one direction of one entry, whatever made it; an entry that a
repair has made counts from then on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum

from natkeep.plan.move import Mode, Site
from natkeep.plan.observation import Gate, Observation, SeenEntry
from natkeep.plan.roles import Role
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Endpoint
from natkeep.values import dataclass, field

ONE_WAY_S = 5.0
"""Seconds after opening from which on a silent direction says something: an answer takes less."""


class State(StrEnum):
    """What is known of a connection; the value is what `status` prints."""

    LIVE = "live"
    ONE_WAY = "one-way"
    ENDED = "ended"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class SiteStatus:
    """A site of a move; seen is None when its namespace is gone.

    opened: seconds since its gate was opened (infinite where the journal does not say when), None
    while it is closed. ended: of each translation's entries that a bit is set for, the lowest that
    of the first, it is certain that their connections have ended.
    """

    site: Site
    seen: Observation | None
    drift: tuple[str, ...]
    opened: float | None = None
    ended: Mapping[int, int] = field(default_factory=dict)


def find_states(
    site: SiteStatus, translation: Translation, entries: Sequence[SeenEntry | None]
) -> list[State | None]:
    """The state of each connection of *translation*; entries: what *site* has of it, in order."""
    seen = site.seen
    if seen is None or site.opened is None:
        return [None] * len(translation.kept)
    if not translation.protocol.has_states:
        return [*_find_udp_states(seen, translation)]
    judged = site.opened >= ONE_WAY_S
    sockets = None if seen.sockets is None else frozenset(seen.sockets.each())
    over = f"{site.ended.get(translation.number, 0):b}"[::-1]
    states: list[State | None] = []
    for place, (record, entry) in enumerate(zip(translation.kept.each(), entries, strict=True)):
        going = entry is not None and entry.alive
        if translation.mode == Mode.STATELESS and record in seen.spoken:
            states.append(None)  # its entry says what prepare has made it say
            continue
        if sockets is None:
            live, ended = going, not going and (entry is not None or over[place : place + 1] == "1")
        else:
            live, ended = record in sockets, not going
        if live:
            both = record in seen.heard | seen.spoken or not _counts_one(entry)
            both = not judged or (both and record not in seen.unanswered)
            states.append(State.LIVE if both else State.ONE_WAY)
        else:
            states.append(State.ENDED if ended else None)
    return states


def _find_udp_states(seen: Observation, translation: Translation) -> Iterator[State | None]:
    there = frozenset(seen.datagrams.each())
    for record in translation.kept.each():
        yield _state(seen.sockets is None or record in there, speaks=record in seen.silences)


def find_server_state(site: SiteStatus, end: Endpoint) -> State | None:
    """The state of the UDP socket at *end* that any peer may speak to."""
    if site.seen is None or site.opened is None:
        return None
    there = site.seen.sockets is None or end.packed in site.seen.bound
    return _state(there, speaks=end.packed in site.seen.silences)


def _state(there: bool, *, speaks: bool) -> State | None:
    if there:
        return State.LIVE if speaks else State.SILENT
    return None if speaks else State.ENDED


def _counts_one(entry: SeenEntry | None) -> bool:
    """Whether packets have passed in one direction alone."""
    return (
        entry is not None
        and entry.packets_in is not None
        and (not entry.packets_in) != (not entry.packets_out)
    )


def count_answered(
    site: SiteStatus, translation: Translation, entries: Sequence[SeenEntry | None]
) -> int | None:
    """Of how many connections the peer was heard since it was opened; None where none is counted.

    A gateway hears peers that ask before the destination answers: there both have to be heard.
    """
    seen, counted = site.seen, False
    if seen is None or site.opened is None:
        return None
    both, number = site.site.row.passes_on, 0
    for record, entry in zip(translation.kept.each(), entries, strict=True):
        if record in seen.heard:
            counted, number = True, number + 1
        elif entry is not None and entry.packets_in is not None:
            counted = True
            spoken = entry.packets_out or record in seen.spoken or not both
            number += bool(entry.packets_in and spoken)
        elif both and entry is not None:
            return None
    return number if counted else None


# ---- a whole move --------------------------------------------------------------------------------


def find_one_way(
    move_id: str, site: SiteStatus, sites: Sequence[SiteStatus], kept: Sequence[Translation]
) -> Iterator[str]:
    """That no connection of the move is heard in both directions at *site*, with a probable cause.

    sites: all of the move's, which tell more of the cause; kept: how *site* translates.
    """
    restored = [each for each in sites if each.site.role == Role.DESTINATION] or [site]
    if site.seen is None or not site.site.row.leaves:
        return
    if any(one.opened is None or one.opened < ONE_WAY_S for one in (site, *restored)):
        return
    inward = outward = 0
    sockets = None if site.seen.sockets is None else frozenset(site.seen.sockets.each())
    for translation in kept:
        entries = site.seen.entries.get(translation.number, ())
        for record, entry in zip(translation.kept.each(), entries, strict=False):
            if entry is None or not entry.alive or entry.packets_in is None:
                continue
            if sockets is not None and record not in sockets:
                continue
            deaf = record in site.seen.unanswered
            heard = (bool(entry.packets_in) or record in site.seen.heard) and not deaf
            said = bool(entry.packets_out) or record in site.seen.spoken
            if heard and said:
                return
            inward, outward = inward + heard, outward + said
    if outward:
        what = f"packets of the process pass on {outward} connections, and none of a peer"
        yield f"one-way: {what}: {_why_deaf(move_id, site, sites)}"
    elif inward:
        what = f"packets of the peers pass on {inward} connections, and none of the process"
        yield f"one-way: {what}: {_why_mute(site)}"


def find_fallen_silent(
    looks: Sequence[SiteStatus], sites: Sequence[SiteStatus], move_id: str
) -> Iterator[str]:
    """That packets of one direction have passed, and for 5 s none of the other.

    looks: the same site three times: 5 s ago or more, some time ago, and now. What has passed since
    the second one may be answered yet.
    """
    first, second, last = (_count_all(look) for look in looks)
    if first is None or second is None or last is None or looks[-1].opened is None:
        return
    if any(before > after for before, after in zip(first, second, strict=True)):
        return  # entries were made anew
    passed = [before < after for before, after in zip(first, second, strict=True)]
    still = [before == after for before, after in zip(first, last, strict=True)]
    if passed[1] and still[0]:
        what = "packets of the process pass, and none of a peer any more"
        yield f"one-way: {what}: {_why_deaf(move_id, looks[-1], sites)}"
    elif passed[0] and still[1]:
        what = "packets of the peers pass, and none of the process any more"
        yield f"one-way: {what}: {_why_mute(looks[-1])}"


def _count_all(site: SiteStatus) -> tuple[int, int] | None:
    """All packets that were counted there, in and out; None where none is counted."""
    some = site.seen.entries.values() if site.seen is not None else ()
    pairs = [(e.packets_in or 0, e.packets_out or 0) for row in some for e in row if e is not None]
    return (sum(i for i, _ in pairs), sum(o for _, o in pairs)) if pairs else None


def _why_deaf(move_id: str, site: SiteStatus, sites: Sequence[SiteStatus]) -> str:
    if site.site.row.passes_on:
        return "theirs take another way, are not tracked here (notrack), or they are gone"
    gateways = [each for each in sites if each.site.row.passes_on and each.seen is not None]
    if not gateways:
        return f"is the gateway open (natkeep open {move_id} there)? does a hop masquerade?"
    if any(each.seen is not None and each.seen.gate != Gate.OPEN for each in gateways):
        return f"the gateway's gate is closed (natkeep open {move_id})"
    if not any(_passes(each) for each in gateways):
        return "the gateway tracks none of them (notrack?), or is not on their way"
    return "a hop between masquerades or drops, or the peers are gone"


def _why_mute(site: SiteStatus) -> str:
    if site.site.row.passes_on:
        return (
            "is the destination open? do its packets come by here, or does a hop masquerade them?"
        )
    return "its packets take another way, or are not tracked here (notrack)"


def _passes(site: SiteStatus) -> bool:
    """Whether a packet of any of the connections was counted there."""
    assert site.seen is not None
    every = (entry for some in site.seen.entries.values() for entry in some if entry is not None)
    return any(entry.packets_in or entry.packets_out for entry in every)
