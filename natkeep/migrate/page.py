"""The report of a migration as one HTML page: what the peers saw, the hosts, the steps.

Rule: what is not needed for the move is done before the freeze or after its end.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, zip_longest

from natkeep import page
from natkeep.migrate import way
from natkeep.migrate.capture import LATE, Capture, Wires, demand_tcpdump
from natkeep.migrate.forward import Migration, sum_up
from natkeep.migrate.host import Host
from natkeep.migrate.record import PEER, RELAY, Record
from natkeep.page import Seen, Step
from natkeep.plan.maps import find_map, parse_map
from natkeep.plan.tuples import Endpoint, FourTuple

_CAPTURED = 20  # connections
_DRAWN = 3
_AROUND = 0.5  # s that are captured before the freeze and after the end


class Recording:
    """What is noted of a migration while it goes on: when its steps began, and a capture."""

    def __init__(self, migration: Migration) -> None:
        self._migration = migration
        self._steps: list[tuple[str, float]] = []
        self._capture: Capture | None = None
        self._kept: list[FourTuple] = []
        migration.noted = self.note

    def note(self, step: str) -> None:
        """*step* begins, or `done`."""
        if step == "prepare":
            demand_tcpdump(self._host())
        elif step == "dump":
            self._begin_capture()
        self._steps.append((step, time.monotonic()))

    def _host(self) -> Host:
        """Where it is captured."""
        migration = self._migration
        return migration.translators[0] if migration.translators else migration.source

    def _begin_capture(self) -> None:
        record, host = self._migration.record, self._host()
        kept = find_kept(json.loads(self._migration.sockets))
        if record.role == PEER:
            own = way.read_addresses(host)
            kept = [each for each in kept if each.source.address in own]
        self._kept = kept[:_CAPTURED]
        if self._kept:
            self._capture = Capture(host, [each.source for each in self._kept])
            time.sleep(_AROUND)

    def close(self) -> None:
        """End what captures, if it does still."""
        if self._capture:
            self._capture.close()

    def render(self) -> str:
        """The page, once all has ended well."""
        migration = self._migration
        seen: list[Seen] = []
        if self._capture:
            time.sleep(_AROUND + LATE)  # what is not handed on yet would be lost
            seen = self._capture.read(find_wires(migration.record, self._kept))
        # What the monotonic clock was by the other one, which captures have.
        since = time.time() - time.monotonic()
        frozen, running = (int((at + since) * 1e9) for at in (migration.frozen, migration.running))
        plots = [
            page.draw(page.read_trace(seen, inbound, frozen, running))
            for inbound in find_busiest(seen, self._kept)
        ]
        none = "<p>No segment of a kept TCP connection was seen.</p>"
        steps = [
            Step(name, (begin - migration.frozen) * 1e3, (end - migration.frozen) * 1e3)
            for (name, begin), (_, end) in pairwise(self._steps)
        ]
        sections = (
            ("What came of it", page.render_table(list_facts(migration))),
            (f"What the peers saw, captured at {self._host()}", "".join(plots) or none),
            ("Where it is translated", page.render_text(draw_network(migration))),
            ("Steps", page.draw_steps(steps, (migration.running - migration.frozen) * 1e3)),
        )
        heard = (migration.answered or 0) >= migration.count
        return page.render_page(
            f"natkeep migrate {migration.record.id}",
            "moved" if heard else "moved, but not all peers were heard",
            sum_up(migration), sections, passed=heard,
        )  # fmt: skip


def find_kept(sockets: dict[str, object]) -> list[FourTuple]:
    """The kept TCP connections of the document of the process' sockets, from the peer."""
    rows = sockets["sockets"]
    assert isinstance(rows, list)
    return [
        FourTuple(peer, Endpoint.parse(each["local"]))
        for each in rows
        if each["kept"] and each["protocol"] == "tcp" and each["peer"]
        and not (peer := Endpoint.parse(each["peer"])).address.is_loopback
    ]  # fmt: skip


def find_wires(record: Record, kept: Sequence[FourTuple]) -> Wires:
    """What passes the host that captures, at its side of the peers.

    At a peer's own host that is OLD or NEW, and what it sends leaves it.
    """
    wishes = map(parse_map, record.maps)
    maps = [wish.to(wish.new) for wish in wishes if wish.new]
    own = record.role == PEER
    found: dict[tuple[FourTuple, bool], FourTuple] = {}
    for inbound in kept:
        ends = [inbound.destination]
        if own and (map_ := find_map(maps, inbound.destination)):
            ends.append(map_.on_wire(inbound.destination))
        for end in ends:
            wire = FourTuple(inbound.source, end)
            found[wire, own] = inbound
            found[wire.reply(), not own] = inbound.reply()
    return found


def find_busiest(seen: Sequence[Seen], kept: Sequence[FourTuple]) -> list[FourTuple]:
    """Those of *kept* by which the peers said most."""
    counts = Counter(each.tuple for each in seen if each.length)
    said = [tuple_ for tuple_ in kept if counts[tuple_]]
    return sorted(said, key=lambda each: -counts[each])[:_DRAWN]


def list_facts(migration: Migration) -> Iterator[tuple[str, str]]:
    """What came of it: a name and words each."""
    record = migration.record
    yield "process", f"{record.process}, of {migration.source} to {migration.destination}"
    yield "OLD=NEW", ", ".join(record.maps)
    yield "silent", f"{migration.silent_ms} ms at most"
    yield "answered", f"{migration.answered or 0} of {migration.count} peers"
    if copy := migration.copying:
        yield "image", f"{copy.octets / 1e6:.1f} MB, copied"
    for line in way.describe_lost(migration.lost or []):
        yield "not kept", line


# ---- the hosts -----------------------------------------------------------------------------------


def draw_network(migration: Migration) -> list[str]:
    """The hosts, and the addresses that the wires between them show."""
    record = migration.record
    old, new = record.maps[0].split("=")
    runs = _box(f"{migration.destination}", f"NEW⇄OLD  process {record.process}")
    if record.role == RELAY:
        relay = _box(f"{migration.source}", "relay: OLD⇄NEW")
        lines = _beside(_box("peers", ""), _wire(old), relay, _wire(new), runs)
    else:
        left = _box("peers' hosts", "OLD⇄NEW")
        if record.role != PEER:
            gateway = _box(f"{migration.translators[0]}", "OLD⇄NEW")
            left = _beside(_box("peers", ""), _wire(old), gateway)
        ends = [*runs, *_box(f"{migration.source}", "quiet")]
        lines = _beside(left, _fork(new, old), ends)
    return [*(line.rstrip() for line in lines), "", f"OLD=NEW: {', '.join(record.maps)}"]


def _box(*lines: str) -> list[str]:
    width = max(map(len, lines)) + 2
    inside = [f"│{line.center(width)}│" for line in lines]
    return [f"┌{'─' * width}┐", *inside, f"└{'─' * width}┘"]


def _wire(address: str) -> list[str]:
    return ["", f" {address} ", "─" * (len(address) + 2)]


def _fork(first: str, second: str) -> list[str]:
    wire = "─" * (max(len(first), len(second)) + 2)
    return ["", f"   {first} ", f"─┬{wire}", " │", " │", f" │ {second} ", f" └{wire}"]


def _beside(*blocks: Sequence[str]) -> list[str]:
    widths = [max(map(len, block)) for block in blocks]
    rows = zip_longest(*blocks, fillvalue="")
    return [
        "".join(part.ljust(width) for part, width in zip(row, widths, strict=True)) for row in rows
    ]
