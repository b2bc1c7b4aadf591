"""The words and the JSON of status: how moves stand, and what is known of each connection.

Rule: as all of report. The keys are DESIGN's contract; a hundred thousand connections are written
in one form instead of encoded.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from types import MappingProxyType
from typing import Any

from natkeep.plan.connection_state import (
    SiteStatus,
    State,
    count_answered,
    find_server_state,
    find_states,
)
from natkeep.plan.drift import MoveStatus
from natkeep.plan.observation import Gate, Observation, SeenEntry
from natkeep.plan.protocols import TCP, Protocol
from natkeep.plan.resets import describe_fates
from natkeep.plan.roles import Role
from natkeep.plan.steps import InsertEntries, Plan
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.report import (
    at_first_site,
    find_wires,
    move_to_json,
    relay_to_json,
    site_to_json,
    summary,
)
from natkeep.values import dataclass

SHOWN = 20
"""How many connections of a move are listed without -v."""

_CLOSENESS = (Role.DESTINATION, Role.GATEWAY, Role.RELAY, Role.PEER, Role.SOURCE)
"""Where one looks first to see what a connection carries."""


@dataclass(frozen=True, slots=True)
class Carried:
    """The connections of a move as the site shows them that tells most.

    parts: for each translation its connections, and of each its entry and its state, in order.
    answered: of how many the peer was heard since the move was opened; None where that is not told.
    unknown: what is said of one in no state that has an entry.
    wires: for each translation the connections that look otherwise on the wire (find_wires).
    protocols: of each translation, in the same order. servers: the UDP sockets without a peer, and
    the state of each.
    """

    parts: tuple[tuple[Connections, Sequence[SeenEntry | None], Sequence[State | None]], ...]
    answered: int | None
    unknown: str = "no socket"
    wires: tuple[dict[int, FourTuple], ...] = ()
    protocols: tuple[Protocol, ...] = ()
    servers: Mapping[Endpoint, State | None] = MappingProxyType({})

    def count(self) -> int:
        """How many connections there are."""
        return sum(len(kept) for kept, _, _ in self.parts)

    def tally(self) -> Counter[State | None]:
        """How many are in each state."""
        connected = chain.from_iterable(states for _, _, states in self.parts)
        return Counter(chain(connected, self.servers.values()))

    def has_ended(self) -> bool:
        """Whether all have, of which there were some."""
        return self.tally().keys() == {State.ENDED}


def look_closely(status: MoveStatus) -> Carried:
    """What the destination shows of each connection, or else the site that is nearest to it."""
    looked = [site for site in status.sites if site.seen is not None]
    servers = dict.fromkeys(status.plan.move.kept_servers)
    if not looked:
        every = [*at_first_site(status.plan)]
        unseen = tuple((t.kept, [None] * len(t.kept), [None] * len(t.kept)) for t in every)
        return Carried(unseen, None, protocols=tuple(t.protocol for t in every), servers=servers)
    site = min(looked, key=lambda each: _CLOSENESS.index(each.site.role))
    # Each peers' own host has connections of its own, and a gateway those of the others.
    more = looked if site.site.row.passes_on else []
    close = {one.site: one for one in more if one.site.row.own} | {site.site: site}
    parts, answered, wires, protocols = [], list[int | None](), [], []
    for translation in status.plan.translations:
        here = close.get(translation.site)
        if here is not None and here.seen is not None:
            entries = _entries_of(status.plan, translation, here.seen)
            parts.append((translation.kept, entries, find_states(here, translation, entries)))
            answered.append(count_answered(here, translation, entries))
            wires.append(find_wires(translation))
            protocols.append(translation.protocol)
    known = [number for number in answered if number is not None]
    unknown = "not tracked" if site.site.row.passes_on else "no socket"
    heard = sum(known) if known else None
    servers = {end: find_server_state(site, end) for end in servers}
    return Carried(tuple(parts), heard, unknown, tuple(wires), tuple(protocols), servers)


def _entries_of(
    plan: Plan, translation: Translation, seen: Observation
) -> Sequence[SeenEntry | None]:
    """What is seen of each of the translation's connections, in their order."""
    entries = seen.entries.get(translation.number, ())
    if len(entries) == len(translation.kept):
        return entries
    # A source has none: it keeps quiet; and none have those whose peers are at the destination.
    made = [
        step.translation.kept
        for step in plan.prepare
        if isinstance(step, InsertEntries)
        and (step.site, step.translation.number) == (translation.site, translation.number)
    ]
    records = (record for kept in made for record in kept.each())
    known = dict(zip(records, entries, strict=False))
    return [known.get(record) for record in translation.kept.each()]


# ---- JSON ----------------------------------------------------------------------------------------


def status_as_json(moves: Sequence[str], dropped: int = 0) -> Iterator[str]:
    """The document of `status --json`, piece by piece, of what move_as_json made of each move.

    dropped: of how many connections something is dropped still where moves were undone.
    """
    yield '{"schema": 1, "moves": ['
    for number, move in enumerate(moves):
        yield ",\n" if number else "\n"
        yield move
    yield f'], "dropped": {dropped}}}' if dropped else "]}"


def move_as_json(status: MoveStatus, host: str) -> str:
    """The object of a move in the document of `status --json`: a line a connection."""
    carried, at = look_closely(status), status.opened_at
    plan, before = status.plan, status.before
    sites = [
        site_to_json(s.site, host=host, drift=[*s.drift], **relay_to_json(plan, s.site, before))
        for s in status.sites
    ]
    move: dict[str, Any] = {
        **move_to_json(status.plan),
        "gate": str(status.gate),
        "opened_at": None if at is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)),
        "silent_ms": status.silent_ms,
        "answered": carried.answered,
        "listeners": [str(end) for end in status.plan.move.listeners],
        "sites": sites,
        **_held_to_json(status),
        **_servers_to_json(carried),
    }
    rows = ",".join(_rows(carried))
    return json.dumps({**move, "connections": []}).removesuffix("]}") + rows + "]}"


def _servers_to_json(carried: Carried) -> dict[str, Any]:
    states = {str(end): state and str(state) for end, state in carried.servers.items()}
    return {"udp_states": states} if states else {}


def _held_to_json(status: MoveStatus) -> dict[str, Any]:
    if (held := status.held) is None:
        return {}
    counts = {"segments": held.segments, "datagrams": held.datagrams}
    return {"held": {**counts, "octets": held.octets, "refused": held.refused}}


_UNSEEN = (None, None, None, None)
_NULL: dict[int | None, str] = {None: "null"}
_STATES: dict[State | None, str] = {None: "null", **{state: f'"{state}"' for state in State}}


def _rows(carried: Carried) -> Iterator[str]:
    """A line for each connection."""
    for number, (kept, entries, states) in enumerate(carried.parts):
        wires = carried.wires[number] if carried.wires else {}
        proto = carried.protocols[number].name
        rows = zip(kept.texts(), entries, states, strict=True)
        for place, ((local, peer), seen, state) in enumerate(rows):
            _, inward, outward, _ = seen or _UNSEEN
            wire = _write_wire(wires[place]) if place in wires else ""
            ends = f'"proto": "{proto}", "local": "{local}", "peer": "{peer}", {wire}'
            yield (
                f'\n{{{ends}"state": {_STATES[state]}, '
                f'"packets": {{"in": {_NULL.get(inward, inward)}, '
                f'"out": {_NULL.get(outward, outward)}}}}}'
            )


def _write_wire(there: FourTuple) -> str:
    return f'"wire": {{"local": "{there.destination}", "peer": "{there.source}"}}, '


# ---- lines for a person --------------------------------------------------------------------------


def status_lines(status: MoveStatus, host: str, *, verbose: bool) -> Iterator[str]:
    """All of one move; of its connections 20, unless it is *verbose*."""
    carried = look_closely(status)
    yield f"{summary(status.plan)}, gate {status.gate}"
    yield from (f"  {line}" for line in _tell(status, carried, host))
    for site in status.sites:
        yield f"  {site.site}: {_stand(status.plan, site)}"
        yield from (f"    {line}" for line in site.drift)
    rows = [*islice(_table(carried, status.gate), None if verbose else SHOWN + 1)]
    yield from _align(rows[: SHOWN if not verbose else None])
    yield from ("  ... (all with -v)" for _ in rows[SHOWN:] if not verbose)
    fates = describe_fates(status.plan.resets).items()
    lost = (f"  {each.destination}  {each.source}  not kept: {fate}" for each, fate in fates)
    yield from lost if verbose else islice(lost, SHOWN)
    yield from ("  ... (all with -v)" for _ in islice(lost, 1))


def _tell(status: MoveStatus, carried: Carried, host: str) -> Iterator[str]:
    """When it was opened, which peers have answered, what lives, and what is to be done."""
    move, count, tally = status.plan.move, carried.count(), carried.tally()
    words = [f"on {host}"]
    if status.gate == Gate.OPEN and not move.quiesces:
        if status.opened_at is not None:
            words.append(f"opened {_clock(status.opened_at)}")
        if status.silent_ms is not None:
            words.append(f"silent for at least {status.silent_ms} ms")
        if carried.answered is not None:
            words.append(f"{carried.answered} of {count} peers have answered since")
        if carried.answered == 0 and not carried.has_ended():
            passing = any(site.site.row.passes_on for site in status.sites)
            by = "relay" if move.vias else "gateway"
            words[-1] += "" if passing else f": is the {by} open?"
    yield ", ".join(words)
    if held := status.held:
        lost = f", {held.refused} lost" if held.refused else ""
        some = f"{held.segments} segments and {held.datagrams} datagrams"
        yield f"held for the process: {some}, {held.octets} octets{lost}"
    if any(tally[state] for state in State):
        yield ", ".join(f"{tally[state]} {state}" for state in State)
    if move.listeners:
        callers = sum(site.seen.callers for site in status.sites if site.seen is not None)
        ends = ", ".join(map(str, move.listeners))
        yield f"listeners that follow: {ends}; {callers} new connections"
    if carried.has_ended():
        then = "; no new connection reaches the listeners then" if move.listeners else ""
        yield f"all have ended: natkeep teardown {move.id}{then}"


def _clock(seconds: float) -> str:
    """The time of the day, and the day where it is another."""
    at, now = time.localtime(seconds), time.localtime()
    return time.strftime("%H:%M:%S" if at[:3] == now[:3] else "%Y-%m-%d %H:%M:%S", at)


def _stand(plan: Plan, site: SiteStatus) -> str:
    if site.drift:
        return "DRIFTED"
    waits = site.seen is None and plan.move.waits(site.site)
    return "waits for open" if waits else "as prepared"


def _table(carried: Carried, gate: Gate) -> Iterator[tuple[str, ...]]:
    """A row a connection."""
    for (kept, entries, states), protocol in zip(carried.parts, carried.protocols, strict=True):
        word = "" if protocol == TCP else f"{protocol.name} "
        for (local, peer), seen, state in zip(kept.texts(), entries, states, strict=True):
            unknown = "no entry" if seen is None else carried.unknown
            said = state or (unknown if gate == Gate.OPEN else "closed")
            yield word + local, peer, str(said), *_packets(seen)
    for end, state in carried.servers.items():
        said = state or (carried.unknown if gate == Gate.OPEN else "closed")
        yield f"udp {end}", "*", str(said), *_packets(None)


def _packets(seen: SeenEntry | None) -> tuple[str, str]:
    if seen is None:
        return "-", "-"
    if seen.packets_in is None:
        return "?", "?"
    return str(seen.packets_in), str(seen.packets_out)


_HEADER = ("LOCAL", "PEER", "STATE", "PACKETS IN", "OUT")


def _align(rows: list[tuple[str, ...]], header: tuple[str, ...] = _HEADER) -> Iterator[str]:
    """A table; nothing of no rows."""
    table = [header, *rows] if rows else []
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield f"  {'  '.join(cells).rstrip()}"


# ---- many moves ----------------------------------------------------------------------------------

_SUMMARY = ("MOVE", "MAPS", "GATE", "KEPT", *(str(state).upper() for state in State))
_SUMMARY = (*_SUMMARY, "ANSWERED", "OPENED", "STANDS")


def summary_lines(moves: Sequence[MoveStatus]) -> Iterator[str]:
    """A line a move."""
    return (line[2:] for line in _align([*map(_sum_up, moves)], _SUMMARY))


def _sum_up(status: MoveStatus) -> tuple[str, ...]:
    carried, move = look_closely(status), status.plan.move
    tally, known = carried.tally(), carried.answered is not None
    drift = [line for site in status.sites for line in site.drift]
    stands = "as prepared"
    if drift:
        stands = f"DRIFTED: {drift[0]}" + (f" (and {len(drift) - 1} more)" if drift[1:] else "")
    elif carried.has_ended():
        stands = f"ended: natkeep teardown {move.id}"
    return (
        move.id,
        ",".join(map(str, move.maps)),
        str(status.gate),
        str(carried.count() + len(carried.servers)),
        *(str(tally[state]) for state in State),
        str(carried.answered) if known else "-",
        "-" if status.opened_at is None else _clock(status.opened_at),
        stands,
    )
