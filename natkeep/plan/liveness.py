"""which connections live: by their sockets, their entries, and what a repair saw before.

A gateway alone cannot tell an entry that another program deleted from one that the kernel removed
because its connection has ended. But the kernel keeps the entry of an ended connection for a while
(10 s after a reset, 120 s after both FINs), so one that was alive less than that ago, and is gone,
was deleted.

An end is told from the entry's TCP state, TIME_WAIT or CLOSE, and only when it is seen twice, with
no packet in between: two forged resets put an entry into CLOSE, and what the ends go on to send
passes it. An entry that is gone says nothing, neither that a connection has ended nor that it had
not; one that is alive again takes back what was seen.

Rule: values only; the clock is read and the file is written by others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from natkeep.plan.move import Site
from natkeep.plan.observation import Observation, SeenEntry
from natkeep.plan.roles import Role
from natkeep.plan.steps import InsertEntries, Plan
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import NO_CONNECTIONS, Connections
from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class Life:
    """Which connections live, as the process sees them.

    known: *living* is all of them; otherwise whether one lives that is not in it is not known.
    """

    known: bool
    living: Connections = NO_CONNECTIONS

    def picks(self, translation: Translation, entries: Sequence[SeenEntry | None]) -> Iterator[int]:
        """Which of the *translation*'s connections live and have no entry that translates."""
        some = [i for i, entry in enumerate(entries) if entry is None or not entry.translated]
        if not some:
            return
        living = frozenset(self.living.each())
        both = [*zip(translation.kept.each(), entries, strict=False)]
        for index in some:
            record, entry = both[index]
            carries = not self.known and entry is not None and entry.alive
            if record in living or carries:
                yield index


def find_life(
    plan: Plan, site: Site, looks: Mapping[Site, Observation], *, frozen: bool, recent: Connections
) -> Life:
    """Which connections live, as far as that is known at *site*.

    looks: what each site that could be looked at shows. frozen: the move has not been opened.
    recent: those whose entries were there so shortly ago that they cannot have ended since.
    """
    if frozen:
        every = (t.kept for t in plan.translations if t.site == site)
        return Life(True, Connections.joined(every))
    for other, seen in looks.items():
        if other.role == Role.DESTINATION and seen.sockets is not None:
            return Life(True, seen.sockets)
    return Life(False, recent)


Ending = tuple[int, int, int]
"""Of an entry in its end: its place, its packets (-1 uncounted), since when (ms) they are these."""

CONFIRMED = 1000
"""Milliseconds for which an entry is in its end, without a packet, before that is believed."""


@dataclass(frozen=True, slots=True)
class Sighting:
    """A bit for each entry of a step, and when the looking began.

    at: milliseconds of the monotonic clock.
    alive: for the number of each step that made entries, those that were alive, in hexadecimal,
    the first entry's bit the lowest; ended: those whose end is certain; ending: those that are in
    their end, also for so short a time that it is not certain.
    """

    at: int
    alive: tuple[tuple[int, str], ...]
    ended: tuple[tuple[int, str], ...] = ()
    ending: tuple[tuple[int, tuple[Ending, ...]], ...] = ()

    def __post_init__(self) -> None:
        for number, bits in (*self.alive, *self.ended):
            if number < 0 or int(bits, 16) < 0:
                raise ValueError(f"{bits} are not bits")

    def alive_at(self, plan: Plan, site: Site) -> Connections:
        """The connections whose entries were alive at *site*, as the process sees them."""
        bits = dict(self.alive)
        found = {4: b"", 6: b""}
        for number, step in _inserted(plan):
            if step.site == site:
                seen = f"{int(bits.get(number, '0'), 16):b}"[::-1]
                records = zip(seen, step.translation.kept.each(), strict=False)
                version = step.translation.map.old.version
                found[version] += b"".join(record for bit, record in records if bit == "1")
        return Connections(found[4], found[6])

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        alive, ended = ([list(each) for each in some] for some in (self.alive, self.ended))
        ending = [[number, [list(one) for one in some]] for number, some in self.ending]
        return {"at": self.at, "alive": alive, "ended": ended, "ending": ending}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Sighting:
        """From the file; KeyError, TypeError or ValueError for what to_json does not write."""
        alive, ended = (
            tuple((int(number), str(bits)) for number, bits in value[name])
            for name in ("alive", "ended")
        )
        ending = tuple(
            (int(number), tuple((int(i), int(packets), int(since)) for i, packets, since in some))
            for number, some in value["ending"]
        )
        return cls(int(value["at"]), alive, ended, ending)

    def count_unended(self, plan: Plan, site: Site) -> int:
        """How many connections with an entry at *site* may live: all whose end is not certain."""
        return sum(
            len(step.translation.kept) - int(dict(self.ended).get(number, "0"), 16).bit_count()
            for number, step in _inserted(plan)
            if step.site == site
        )


def _inserted(plan: Plan) -> Iterator[tuple[int, InsertEntries]]:
    for number, step in enumerate(plan.steps):
        if isinstance(step, InsertEntries):
            yield number, step


def make_sighting(
    plan: Plan,
    at: int,
    looks: Mapping[Site, Observation],
    lives: Mapping[Site, Life],
    earlier: Sighting | None,
) -> Sighting:
    """What was seen, what a repair made again because it lives, and what had ended *earlier*."""
    alive, ended, ending = [], [], []
    before = dict(earlier.ended) if earlier is not None else {}
    once = dict(earlier.ending) if earlier is not None else {}
    for number, step in _inserted(plan):
        if step.site not in looks:
            continue
        entries = looks[step.site].entries.get(step.translation.number, ())
        lives_now = [i for i, entry in enumerate(entries) if entry and entry.alive]
        bits = _bits(chain(lives_now, lives[step.site].picks(step.translation, entries)))
        still = tuple(_find_ending(entries, at, once.get(number, ())))
        certain = _bits(place for place, _, since in still if at - since >= CONFIRMED)
        unsure = _bits(place for place, *_ in still) & ~certain | bits
        alive.append((number, f"{bits:x}"))
        if over := (int(before.get(number, "0"), 16) | certain) & ~unsure:
            ended.append((number, f"{over:x}"))
        if still:
            ending.append((number, still))
    return Sighting(at, tuple(alive), tuple(ended), tuple(ending))


def _bits(places: Iterable[int]) -> int:
    """A bit for each place; of a hundred thousand by a text, since a sum of numbers takes 0.5 s."""
    some = frozenset(places)
    text = bytearray(b"0" * (max(some, default=0) + 1))
    for place in some:
        text[-1 - place] = ord("1")
    return int(text, 2)


def _find_ending(
    entries: Sequence[SeenEntry | None], at: int, once: tuple[Ending, ...]
) -> Iterator[Ending]:
    """Each entry that is in its end, and since when as it was *once*."""
    known = {place: (packets, since) for place, packets, since in once}
    for place, entry in enumerate(entries):
        if entry is None or entry.alive:
            continue
        counted = entry.packets_in is not None and entry.packets_out is not None
        packets = (entry.packets_in or 0) + (entry.packets_out or 0) if counted else -1
        earlier, since = known.get(place, (None, at))
        yield place, packets, since if packets == earlier else at
