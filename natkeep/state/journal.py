"""The journal of one move: what it is, how far each step got, and what undoes it.

Rule: whatever is noted is on disk before the caller goes on. What it is not the form of is refused
(codec.py, undo_codec.py); files and their names are directory.py's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Protocol

from natkeep import __version__
from natkeep.errors import JournalError, RefusedError, UsageError
from natkeep.plan import nft
from natkeep.plan.identity import Identity
from natkeep.plan.move import Move, Site
from natkeep.plan.step_undo import RemoveGate, RemoveListeners, Undo, Unload, undo_of
from natkeep.plan.steps import OpenGate, Prior, SendResets, Step
from natkeep.plan.translation import Change, Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Connections
from natkeep.state.codec import (
    SCHEMA,
    as_index,
    as_list,
    as_text,
    as_whole,
    move_to_json,
    namespaces_to_json,
    noted_to_json,
    pack_columns,
    pack_line,
    peers_to_json,
    read_image,
    read_line,
    record_to_json,
)
from natkeep.state.object_codec import LOADED, loaded_to_json
from natkeep.state.undo_codec import Files, undo_from_json, undo_to_json
from natkeep.values import dataclass, field, replace


class Disk(Protocol):
    """Where a journal is: a StateDirectory."""

    path: str

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Append one JSON line and have it on disk."""

    def write_changed(self, move_id: str, packed: bytes) -> None:
        """Have ID.changed on disk, whole."""

    def write_ready(self, move_id: str, content: bytes) -> None:
        """Have ID.ready on disk, whole."""

    def size(self, name: str) -> int:
        """Octets of a file that is there."""

    def remove(self, move_id: str) -> None:
        """Remove a move's files."""


@dataclass(frozen=True, slots=True)
class Unread:
    """An undo as the journal has it: most verbs need none, and there may be a thousand moves."""

    value: dict[str, Any]
    files: Files

    def read(self) -> Undo:
        """The undo; an error when it is not of the form."""
        return undo_from_json(self.value, self.files)


@dataclass(frozen=True, slots=True)
class Record:
    """How far a step got: `doing`, `done` or `undone`, and what was found before.

    again: of `doing`, it had been done before: a repair was at it. site: which of the move's, and
    undo: what takes it back, as yet unread perhaps; both None in schema 1, until the plan is there.
    loaded: what the line says of the objects that it loaded, or of the sets that it filled.
    at: nanoseconds of the monotonic clock when it was done, of a step that opens the move; 0 where
    the journal does not say.
    """

    state: str
    prior: Prior
    again: bool = False
    site: Site | None = None
    undo: Undo | Unread | None = None
    loaded: Mapping[str, Any] = MappingProxyType({})
    at: int = 0


@dataclass(slots=True)
class Journal:
    """One move on disk; begun: nanoseconds of the monotonic clock, 0 where it does not say.

    opening: of each step that opens the move what it loads, as a record has it.
    """

    move: Move
    connections: Connections
    surroundings: Surroundings
    namespaces: tuple[Identity, ...]
    kinds: tuple[str, ...]
    boot: str
    _directory: Disk
    records: dict[int, Record] = field(default_factory=dict)
    image: str | None = None
    change: Change | None = None
    before: tuple[int, ...] = ()
    schema: int = SCHEMA
    begun: int = 0
    opening: tuple[Mapping[str, Any], ...] = ()

    def pack_header(self) -> tuple[bytes | None, dict[str, Any]]:
        """The connections' file, which a quiesce has not, and the first line of a new journal."""
        around, packed = self.surroundings, None
        if not self.move.quiesces:
            said = (one.connections for one in around.noted)
            packed = pack_columns((self.connections, around.carried, around.carriers, *said))
        return packed, {
            "schema": SCHEMA,
            "natkeep": __version__,
            "boot": self.boot,
            "move": move_to_json(self.move),
            **namespaces_to_json(self.namespaces),
            "steps": list(self.kinds),
            "prepare": list(self.before),
            "local": sorted(str(address) for address in around.local),
            "connections": packed and hashlib.sha256(packed).hexdigest(),
            "image": self.image,
            "begun": self.begun,
            "opening": list(self.opening),
            **peers_to_json(around),
            **noted_to_json(self.move, around.noted),
        }

    def note(
        self, number: int, state: str, prior: Prior, step: Step | None = None, at: int = 0
    ) -> None:
        """Append one record and have it on disk before returning.

        step: what is begun; once it has been said, it need not be said again. at: when it was
        done, as a Record has it.
        """
        line, record = self.make_record(number, state, prior, step)
        if at:
            line["at"], record = at, replace(record, at=at)
        self._directory.append(f"{self.move.id}.journal", line)
        self.records[number] = record

    def lines(self, steps: Iterable[tuple[int, Step]], state: str) -> list[str]:
        """What `note` would append of each of these steps."""
        made = (self.make_record(number, state, Prior(), step)[0] for number, step in steps)
        return [pack_line(line).decode("ascii").rstrip() for line in made]

    def make_record(
        self, number: int, state: str, prior: Prior, step: Step | None
    ) -> tuple[dict[str, Any], Record]:
        line, earlier = record_to_json(number, state, prior), self.records.get(number)
        site, undo = (earlier.site, earlier.undo) if earlier is not None else (None, None)
        loaded = earlier.loaded if earlier is not None else {}
        if step is not None and state == "doing" and self.schema > 1:
            undo = undo.read() if isinstance(undo, Unread) else undo
            made, now = _join(undo_of(step), undo), loaded_to_json(step)
            if (step.site, made, now) != (site, undo, loaded):
                line["site"] = self.move.sites.index(step.site)
                line["undo"] = undo_to_json(made, self._files())
                loaded = now
                line |= loaded
            site, undo = step.site, made
        again = state == "doing" and self.has_been_done(number)
        at = earlier.at if earlier is not None else 0
        return line, Record(state, prior, again, site, undo, loaded, at)

    def _files(self) -> Files:
        came = NO_CONNECTIONS if self.change is None else self.change.came
        olds = tuple(map_.old for map_ in self.move.maps)
        return Files(olds, connections=self.connections, came=came, udp=self.move.udp)

    def resolve(self) -> None:
        """Read what undoes each record's step; JournalError when that is not of its form."""
        try:
            for number, record in self.records.items():
                if isinstance(record.undo, Unread):
                    self.records[number] = replace(record, undo=record.undo.read())
        except (KeyError, TypeError, ValueError, UsageError, RefusedError) as error:
            raise corrupt(self.move.id, self._directory.path, error) from error

    def nft_undos(self, site: Site) -> tuple[nft.Undo, ...]:
        """What undoes the nft objects of the steps that were begun at *site*; once resolved."""
        here = (record.undo for record in self.records.values() if record.site == site)
        return tuple(one for undo in here for one in getattr(undo, "objects", ()))

    def adopt(self, steps: tuple[Step, ...], before: tuple[int, ...]) -> None:
        """Of schema 1: what undoes each record's step, and which steps prepare does."""
        self.before = before
        for number, record in self.records.items():
            step = steps[number]
            self.records[number] = replace(record, site=step.site, undo=undo_of(step))

    def is_whole(self) -> bool:
        """Whether prepare came to its end: every step was done once, also where it is undone since.

        One that was killed has failed, as others do.
        """
        if self.change is not None:
            return True  # which is noted only then
        records = [self.records.get(number) for number in self.before]
        return all(
            record is not None and (record.state != "doing" or record.again) for record in records
        )

    def note_change(
        self,
        change: Change,
        kinds: tuple[str, ...],
        origins: tuple[int | None, ...],
        again: tuple[int, ...],
        image: str | None,
    ) -> None:
        """From here on the plan is that of *change*: one line, so it is there whole or not at all.

        origins: for each new step the earlier one whose record it continues. again: those of the
        new steps that were done and have more to do. image: the dump that was compared.
        """
        around = change.surroundings
        said = (one.connections for one in around.noted)
        packed = pack_columns((change.came, change.went, around.carried, around.carriers, *said))
        line = {
            "changed": hashlib.sha256(packed).hexdigest(),
            "image": image,
            "local": sorted(str(address) for address in around.local),
            **noted_to_json(self.move, around.noted),
            "steps": list(kinds),
            "from": list(origins),
            "again": list(again),
            **peers_to_json(around),
        }
        self._directory.write_changed(self.move.id, packed)
        self._directory.append(f"{self.move.id}.journal", line)
        self.take_change(change, line)

    def read_record(self, text: bytes, number: int) -> None:
        """The record on line *number*."""
        step, state, prior, line = _parse_record(text, len(self.kinds), number)
        earlier = self.records.get(step)
        site, undo = (earlier.site, earlier.undo) if earlier is not None else (None, None)
        loaded = earlier.loaded if earlier is not None else {}
        if "undo" in line:
            loaded = {name: line[name] for name in LOADED if name in line}
            site = self.move.sites[as_index(line["site"], len(self.move.sites))]
            undo = Unread(line["undo"], self._files())
        elif self.schema > 1 and undo is None:
            raise ValueError(f"line {number}: step {step} without its undo")
        again = state == "doing" and self.has_been_done(step)
        at = as_index(line.get("at", earlier.at if earlier is not None else 0), 1 << 63)
        self.records[step] = Record(state, prior, again, site, undo, loaded, at)

    def take_change(self, change: Change, line: dict[str, Any]) -> None:
        origins, again = as_list(line["from"]), as_list(line["again"])
        kinds = tuple(as_text(kind) for kind in as_list(line["steps"]))
        if self.change is not None or len(origins) != len(kinds):
            raise ValueError("its plan has changed in a way that it cannot")
        records: dict[int, Record] = {}
        for number, origin in enumerate(origins):
            if origin is None:
                continue
            if not 0 <= as_whole(origin) < len(self.kinds) or self.kinds[origin] != kinds[number]:
                raise ValueError(f"step {number} does not continue step {origin}")
            if origin in self.records:
                records[number] = self.records[origin]
        for number in again:
            if as_whole(number) not in records:
                raise ValueError(f"step {number} was never done, so not again")
            records[number] = replace(records[number], state="doing", again=True)
        self.kinds, self.records, self.change = kinds, records, change
        self.image = read_image(line["image"])

    def is_done(self, step: int) -> bool:
        """Whether the step acted and was not undone."""
        record = self.records.get(step)
        return record is not None and record.state == "done"

    def has_been_done(self, step: int) -> bool:
        """The same, also where a repair that did a part of it again was killed."""
        record = self.records.get(step)
        return record is not None and (record.state == "done" or record.again)

    def is_prepared(self) -> bool:
        """Whether every step of prepare acted."""
        later = (OpenGate.__name__, SendResets.__name__)
        steps = (n for n, kind in enumerate(self.kinds) if kind not in later)
        return all(self.is_done(number) for number in steps)

    def is_opened(self) -> bool:
        """Whether a gate was opened anywhere, and not closed again."""
        steps = (n for n, kind in enumerate(self.kinds) if kind == OpenGate.__name__)
        return any(self.has_been_done(number) for number in steps)

    def is_closed_again(self, number: int) -> bool:
        """Whether a step that opened a gate was undone for a while, since the move goes on."""
        record = self.records.get(number)
        return record is not None and record.state == "undone" and "closed" in record.prior.facts

    def surroundings_there(self) -> Surroundings:
        """The surroundings that the gateways' translations were made for."""
        return self.surroundings if self.change is None else self.change.surroundings

    def identity(self, site: Site) -> Identity:
        """The namespace that *site* was when the move was prepared."""
        return self.namespaces[self.move.sites.index(site)]

    def size(self) -> int:
        """Octets that the journal has on disk; any later verb adds to them."""
        return self._directory.size(f"{self.move.id}.journal")

    def write_ready(self, content: bytes) -> None:
        """Leave what the hook needs to open the move (lifecycle/ready.py says what)."""
        self._directory.write_ready(self.move.id, content)

    def remove(self) -> None:
        """The move is no more."""
        self._directory.remove(self.move.id)


def _join(made: Undo, earlier: Undo | None) -> Undo:
    """*made*, and what *earlier* would undo besides: what was once done has to be undone."""
    match made, earlier:
        case (Unload() | RemoveGate() | RemoveListeners(), _) if type(made) is type(earlier):
            assert isinstance(earlier, Unload | RemoveGate | RemoveListeners)
            objects = tuple(dict.fromkeys((*made.objects, *earlier.objects)))
            return replace(made, objects=objects)
    return made


@lru_cache(maxsize=1 << 10)  # of a thousand moves most lines are the same
def _parse_record(text: bytes, steps: int, number: int) -> tuple[int, str, Prior, dict[str, Any]]:
    """Step, state and prior of a journal's line *number*, where there are so many *steps*."""
    line = read_line(text)
    step, state = line["step"], line["state"]
    if not (type(step) is int and 0 <= step < steps):  # True is an int, too
        raise ValueError(f"line {number}: no step {step!r}")
    if state not in ("doing", "done", "undone"):
        raise ValueError(f"line {number}: no state {state!r}")
    if state == "undone":
        prior = Prior(facts={"closed": True} if line.get("closed") is True else {})
    elif isinstance(line["prior"], dict):
        prior = Prior.from_json(line["prior"])
    else:
        raise ValueError(f"line {number}: no prior {line['prior']!r}")
    return step, state, prior, line


def corrupt(move_id: str, directory: str, error: Exception) -> JournalError:
    """What to say of a journal that is not of the form."""
    reason = str(error) if len(str(error)) <= 160 else str(error)[:157] + "..."
    return JournalError(
        f"the journal of {move_id} is corrupt: {reason}",
        hint=f"{directory}/{move_id}.journal; the tables named natkeep are ours to remove",
    )
