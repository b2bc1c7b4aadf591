"""the conntrack entries: what a kept connection looks like in a site's connection table.

Rule: what conntrack must know, and what it must not know any more, is said here and only here;
kernel/conntrack.py packs it into netlink. This file must never touch the kernel.

Why entries are pre-created, since the rules would translate a first packet as well: the kernel
does not pick up a connection whose first packet is a FIN or RST, nor any with
`nf_conntrack_tcp_loose=0`, and a firewall with `ct state invalid drop` would drop it. Why
stale entries are purged first: an established entry without NAT is never asked about rules.

The original direction is always peer to process. The *reply* tuple that is handed to the
kernel is the plain inverse; the kernel derives the translated one and sets IPS_DST_NAT. With a
reply tuple that is translated already the entry looks perfect and translates nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from natkeep.plan.entry_attributes import PLAIN, Attributes
from natkeep.plan.move import Mode
from natkeep.plan.protocols import TCP, Protocol
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, FourTuple
from natkeep.values import dataclass

STATUS = 0x0E
"""IPS_SEEN_REPLY, IPS_ASSURED (or early_drop may take it), IPS_CONFIRMED."""

IPS_SRC_NAT, IPS_DST_NAT = 0x10, 0x20

NOT_TRACKED, PEER_DIALLED, PROCESS_DIALLED = "-", "<", ">"
"""Of a gateway's own entry: there is none; its original direction is to, or from, the process."""


def directions_of(facts: Mapping[str, str | int | bool]) -> str:
    """One of these characters for each connection of a purge, as its prior's *facts* have them.

    `own` was found by the purge itself; `inherited` by that of a move which was replaced, whose
    translation hid it since. Empty where nothing was found.
    """
    own, inherited = (str(facts.get(name, "")) for name in ("own", "inherited"))
    if not own or not inherited:
        return own or inherited
    pairs = zip(own, inherited, strict=True)
    return "".join(now if now != NOT_TRACKED else earlier for now, earlier in pairs)


@dataclass(frozen=True, slots=True)
class Entry:
    """A conntrack entry: *original* as it arrives at the site, *reply* as answers arrive."""

    original: FourTuple
    reply: FourTuple
    attributes: Attributes = PLAIN

    def describe(self) -> str:
        """The entry as a conntrack(8) command."""
        source, destination = self.original.source, self.original.destination
        return (
            f"conntrack -I -p {TCP.name} -s {source.address} -d {destination.address} "
            f"--sport {source.port} --dport {destination.port} "
            f"{self._describe_nat()}{self.attributes.describe()}"
            f"--state ESTABLISHED --status SEEN_REPLY,ASSURED --timeout {TCP.timeout[1]}"
        )

    def _describe_nat(self) -> str:
        plain, text = self.original.reply(), ""
        if self.reply.source != plain.source:
            text += f"--dst-nat {self.reply.source} "
        if self.reply.destination != plain.destination:
            text += f"--src-nat {self.reply.destination} "
        return text


def entries(translation: Translation) -> Iterator[Entry]:
    """The entry of each kept connection, or two, where either direction has a zone of its own.

    In stateless mode conntrack stands between the two rewritings and sees the inner tuple both
    ways: what it needs then is a plain entry.
    """
    said: dict[FourTuple, list[Attributes]] = {}
    for one in translation.noted:
        for inbound in one.connections:
            said.setdefault(inbound, []).append(one.attributes)
    for kept, (outer, inner) in zip(translation.kept, translation.tuples(), strict=True):
        original = inner if translation.mode == Mode.STATELESS else outer
        for attributes in said.get(kept, (PLAIN,)):
            yield Entry(original, inner.reply(), attributes)


def group_entries(translation: Translation) -> dict[Attributes, list[int]]:
    """Which connections get an entry that says so, by their place; some may get one in two zones.

    That is where each direction of a connection is tracked in a zone of its own: an entry of both
    directions stands in either, and each is found there by the direction that passes.
    """
    count = len(translation.kept)
    groups: dict[Attributes, dict[int, None]] = {PLAIN: {}}
    taken: set[tuple[int, int]] = set()
    places = {r: i for i, r in enumerate(translation.kept.each())} if translation.noted else {}
    for one in translation.noted:
        attributes = one.attributes.facing(process_dialled=False)
        here = groups.setdefault(attributes, {})
        for record in one.connections.each():
            place = places.get(record)
            if place is not None and (place, attributes.zone) not in taken:
                taken.add((place, attributes.zone))
                here[place] = None
    noted = {place for place, _ in taken}
    groups[PLAIN] |= dict.fromkeys(place for place in range(count) if place not in noted)
    return {attributes: sorted(some) for attributes, some in groups.items() if some}


def noted_to_text(groups: Mapping[Attributes, list[int]]) -> str:
    """As it stands in the journal beside the directions; empty where all say the usual."""
    rows = [[a.to_json(), _to_ranges(some)] for a, some in groups.items() if a != PLAIN]
    return json.dumps(rows, separators=(",", ":")) if rows else ""


def noted_from_text(text: str, count: int) -> dict[Attributes, list[int]]:
    """What `noted_to_text` wrote of *count* connections."""
    found: dict[Attributes, list[int]] = {}
    for attributes, ranges in json.loads(text) if text else ():
        pairs = [[int(end) for end in each.split("-")] for each in ranges.split(",")]
        found[Attributes.from_json(attributes)] = [
            place for pair in pairs for place in range(pair[0], min(pair[-1] + 1, count))
        ]
    return found


def _to_ranges(ascending: list[int]) -> str:
    """`0-2,5`."""
    runs: list[list[int]] = []
    for place in ascending:
        if runs and runs[-1][1] == place - 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs)


def stale_views(translation: Translation) -> tuple[Connections, ...]:
    """The views of the kept connections that no entry may have when ours is created.

    Each can be an entry's original or its reply tuple: the connection un-translated in either
    direction, and what the destination's first packets may have made of it.
    """
    views = (translation.outer, translation.inner, translation.kept)
    return tuple(dict.fromkeys(views))


def stale_tuples(translation: Translation) -> Iterator[FourTuple]:
    """Each stale tuple, in both directions, connection by connection."""
    for same in zip(*stale_views(translation), strict=True):
        for tuple_ in same:
            yield tuple_
            yield tuple_.reply()


def describe_purge(stale: FourTuple, protocol: Protocol = TCP) -> str:
    """The deletion of one stale tuple as a conntrack(8) command."""
    return (
        f"conntrack -D -p {protocol.name} -s {stale.source.address} -d {stale.destination.address} "
        f"--sport {stale.source.port} --dport {stale.destination.port}"
    )
