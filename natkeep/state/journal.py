"""what was done, on disk: the plan of each move, and how far it got.

The state directory (0700, files 0600; nothing below it is ever opened through a link):

    lock               an exclusive flock is held by whoever changes a site
    ID.connections     written before the journal: the kept connections, those that a gateway
                       carried already, and the carriers, each packed (plan/tuples.py) as IPv4
                       and IPv6, each of the six with its length (8 octets) in front
    ID.changed         before a line "changed": connections that came, that went, and that a gateway
                       carried, with their carriers, packed in the same way
    ID.seen            which entries a repair has seen alive at a gateway (plan/liveness.py)
    ID.ready           what the hook needs to open the move (lifecycle/open.py)
    ID.journal         JSON lines, appended and fsynced:
        {"schema": 2, "natkeep": VERSION, "boot": BOOT ID, "move": {...}, "mode": ...,
         "namespaces": [[DEVICE, INODE], ...], "steps": [KIND, ...], "prepare": [STEP, ...],
         "local": [ADDRESS, ...],
         "connections": SHA-256, or null of a quiesce, which has no file ID.connections,
         "image": RUN ID OF THE DUMP or null}
        {"step": 4, "state": "doing", "prior": {...}, "site": 0, "undo": {"kind": ..., ...}}
                           before the step acts; at which of the move's sites, and what undoes it
                           (undo_codec.py), if that has not been said before
        {"step": 4, "state": "done", "prior": {...}}       after it acted
        {"step": 4, "state": "undone"}
        {"changed": SHA-256, "image": RUN ID or null, "local": [ADDRESS, ...], "steps": [KIND, ...],
         "from": [STEP or null, ...], "again": [STEP, ...]}
                           the plan is another from here on (a live process has been frozen): which
                           of the steps so far each of the new ones continues, and which of the
                           new ones have to act again

"steps" and "from" are for verbs that make the plan again; a teardown needs the records alone.
Schema 1, of natkeep 0.1.0, has neither "prepare" nor "undo": both are taken from the plan (adopt).

Rule: the line "doing" is on disk before the kernel is asked, so a step that was begun is known
even when the process was killed in it; to undo one that did nothing is harmless. A last line
without its newline was never finished being written, and is as if it were not there. Anything
else that is not exactly of this form is refused, not guessed at.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import cache, lru_cache
from typing import Any

from natkeep import __version__, faultpoints
from natkeep.errors import JournalError, LeftoverError, NatkeepError, RefusedError, UsageError
from natkeep.plan.liveness import Sighting
from natkeep.plan.move import Move, Site, is_id, parse_id
from natkeep.plan.steps import Identity, OpenGate, Prior, SendResets, Step
from natkeep.plan.translation import Change, Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, parse_address
from natkeep.plan.undo import Undo, undo_of
from natkeep.state.codec import (
    SCHEMA,
    SCHEMAS,
    as_index,
    as_list,
    as_text,
    as_whole,
    make_record,
    move_from_json,
    move_to_json,
    pack_columns,
    pack_line,
    read_image,
    read_line,
    read_namespaces,
    unknown_schema,
    unpack_columns,
)
from natkeep.state.files import StateFiles, read_lock_timeout
from natkeep.state.undo_codec import Files, undo_from_json, undo_to_json
from natkeep.values import dataclass, field, replace

_ID_PATTERN = r"(?P<id>[a-z0-9][a-z0-9-]{0,31})"
_FILE = re.compile(
    rf"\.?{_ID_PATTERN}\.(connections|changed|ready|seen|asked|told|journal)(?P<new>\.new)?"
)


@cache
def read_boot_id() -> str:
    """The kernel's id of this boot; a journal of another boot describes nothing that exists."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@dataclass(frozen=True, slots=True)
class Record:
    """How far a step got: `doing`, `done` or `undone`, and what was found before.

    again: of `doing`, it had been done before: a repair was at it. site: which of the move's, and
    undo: what takes it back; both None in schema 1, until the plan is there.
    """

    state: str
    prior: Prior
    again: bool = False
    site: Site | None = None
    undo: Undo | None = None


@dataclass(frozen=True, slots=True)
class Header:
    """What a journal says of a move in its first line."""

    move: Move
    namespaces: tuple[Identity, ...]
    boot: str

    def is_at(self, here: Identity) -> bool:
        """Whether a site of the move is the namespace *here*, in this boot."""
        return self.boot == read_boot_id() and here in self.namespaces

    def olds(self) -> frozenset[Address]:
        """The OLD address of each map."""
        return frozenset(map_.old for map_ in self.move.maps)


@dataclass(slots=True)
class Journal:
    """One move on disk."""

    move: Move
    connections: Connections
    surroundings: Surroundings
    namespaces: tuple[Identity, ...]
    kinds: tuple[str, ...]
    boot: str
    _directory: StateDirectory
    records: dict[int, Record] = field(default_factory=dict)
    image: str | None = None
    change: Change | None = None
    before: tuple[int, ...] = ()
    schema: int = SCHEMA

    def note(self, number: int, state: str, prior: Prior, step: Step | None = None) -> None:
        """Append one record and have it on disk before returning.

        step: what is begun; once it has been said, it need not be said again.
        """
        line, record = self._make_record(number, state, prior, step)
        self._directory.append(f"{self.move.id}.journal", line)
        self.records[number] = record

    def lines(self, steps: Iterable[tuple[int, Step]], state: str) -> list[str]:
        """What `note` would append of each of these steps."""
        made = (self._make_record(number, state, Prior(), step)[0] for number, step in steps)
        return [pack_line(line).decode("ascii").rstrip() for line in made]

    def _make_record(
        self, number: int, state: str, prior: Prior, step: Step | None
    ) -> tuple[dict[str, Any], Record]:
        line, earlier = make_record(number, state, prior), self.records.get(number)
        site, undo = (earlier.site, earlier.undo) if earlier is not None else (None, None)
        if step is not None and state == "doing" and self.schema > 1:
            made = undo_of(step)
            if (step.site, made) != (site, undo):
                line["site"] = self.move.sites.index(step.site)
                line["undo"] = undo_to_json(made, self._files())
            site, undo = step.site, made
        again = state == "doing" and self.has_been_done(number)
        return line, Record(state, prior, again, site, undo)

    def _files(self) -> Files:
        came = NO_CONNECTIONS if self.change is None else self.change.came
        olds = tuple(map_.old for map_ in self.move.maps)
        return Files(olds, connections=self.connections, came=came)

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
        packed = pack_columns((change.came, change.went, around.carried, around.carriers))
        line = {
            "changed": hashlib.sha256(packed).hexdigest(),
            "image": image,
            "local": sorted(str(address) for address in around.local),
            "steps": list(kinds),
            "from": list(origins),
            "again": list(again),
        }
        self._directory.write_changed(self.move.id, packed)
        self._directory.append(f"{self.move.id}.journal", line)
        self._take_change(change, line)

    def _read_record(self, text: bytes, number: int) -> None:
        """The record on line *number*."""
        step, state, prior, line = _parse_record(text, len(self.kinds), number)
        earlier = self.records.get(step)
        site, undo = (earlier.site, earlier.undo) if earlier is not None else (None, None)
        if "undo" in line:
            site = self.move.sites[as_index(line["site"], len(self.move.sites))]
            undo = undo_from_json(line["undo"], self._files())
        elif self.schema > 1 and undo is None:
            raise ValueError(f"line {number}: step {step} without its undo")
        again = state == "doing" and self.has_been_done(step)
        self.records[step] = Record(state, prior, again, site, undo)

    def _take_change(self, change: Change, line: dict[str, Any]) -> None:
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


class StateDirectory:
    """The directory of journals, held by one handle."""

    def __init__(
        self, path: str | None = None, *, create: bool, patience: float | None = None
    ) -> None:
        """patience: seconds to wait for the lock at most, whatever the environment says."""
        self.patience = min(read_lock_timeout(), patience or float("inf"))
        self._files = StateFiles(path, create=create)
        self.path = self._files.path

    def locked(self, timeout: float | None = None) -> AbstractContextManager[None]:
        """Hold the lock; JournalError when others keep it for *timeout* seconds (or patience)."""
        return self._files.locked(self.patience if timeout is None else timeout)

    def ids(self) -> tuple[str, ...]:
        """The ids that have a journal, sorted."""
        names = [name[:-8] for name in self._files.names() if name.endswith(".journal")]
        return tuple(sorted(filter(is_id, names)))  # others are none that natkeep made

    def knows(self, move_id: str) -> bool:
        """Whether there is a journal of that id."""
        return is_id(move_id) and self._files.has(f"{move_id}.journal")

    def begin(
        self,
        move: Move,
        connections: Connections,
        surroundings: Surroundings,
        namespaces: tuple[Identity, ...],
        kinds: tuple[str, ...],
        image: str | None = None,
        *,
        before: tuple[int, ...] = (),
        blocks: tuple[int, Step] | None = None,
    ) -> Journal:
        """Write the journal of a new move; RefusedError when its id is in use.

        before: the steps that prepare does. blocks: the one that takes a quiesce over, if one does.
        """
        packed = None
        if not move.quiesces:
            packed = pack_columns((connections, surroundings.carried, surroundings.carriers))
        header = {
            "schema": SCHEMA,
            "natkeep": __version__,
            "boot": read_boot_id(),
            "move": move_to_json(move),
            "namespaces": [list(identity) for identity in namespaces],
            "steps": list(kinds),
            "prepare": list(before),
            "local": sorted(str(address) for address in surroundings.local),
            "connections": packed and hashlib.sha256(packed).hexdigest(),
            "image": image,
        }
        earlier = self.read_header(move.id) if self.knows(move.id) else None
        boot = read_boot_id()
        journal = Journal(
            move, connections, surroundings, namespaces, kinds, boot, self, image=image,
            before=before,
        )  # fmt: skip
        begun: list[dict[str, Any]] = []
        if earlier is not None and earlier.move.quiesces and blocks is not None:
            # The block passes into this journal in the moment that it takes the other one's place.
            number, step = blocks
            line, journal.records[number] = journal._make_record(number, "doing", Prior(), step)
            begun.append(line)
        elif self.knows(move.id):
            raise RefusedError(
                f"the id {move.id} is in use", hint=f"natkeep teardown {move.id}, or another id"
            )
        replaced = self._files.read(f"{move.id}.journal") if begun else None
        faultpoints.reach("journal-begin")
        try:
            if packed is not None:
                self._files.write_new(f"{move.id}.connections", packed)
            self._files.write_new(f"{move.id}.journal", b"".join(map(pack_line, (header, *begun))))
            faultpoints.reach("journal-begun")
        except BaseException as error:
            self._take_back(move.id, replaced, error)
            raise
        return journal

    def _take_back(self, move_id: str, before: bytes | None, reason: BaseException) -> None:
        """Nothing has been done yet: the journal that there was is there again, or none."""
        try:
            if before is None:
                self.remove(move_id)
                return
            if self._files.read(f"{move_id}.journal") != before:
                self._files.write_new(f"{move_id}.journal", before)
            self._remove_rest(move_id)
        except Exception as error:
            raise LeftoverError(
                f"{reason}; its files in {self.path} are left: {error}",
                hint=f"natkeep teardown {move_id} removes them",
            ) from reason

    def ids_naming(self, addresses: Iterable[Address]) -> tuple[str, ...]:
        """The ids whose moves may have one of *addresses* as an OLD or NEW, sorted.

        A gateway may have a thousand moves, so their headers are searched for the text only.
        """
        texts = [f'"{address}"'.encode("ascii") for address in addresses]
        found = []
        for name in self._files.names():
            if not name.endswith(".journal"):
                continue
            try:
                header = self._files.read_start(name)
            except OSError:  # as read_header: the caller looks for conflicts
                continue
            if any(text in header for text in texts):
                found.append(name[:-8])
        return tuple(sorted(filter(is_id, found)))

    def others_at(self, here: Identity, move_id: str) -> Iterator[Header]:
        """The moves of this boot with a site at a namespace, besides *move_id*, as can be read."""
        for other_id in self.ids():
            header = self.read_header(other_id) if other_id != move_id else None
            if header is not None and header.is_at(here):
                yield header

    def read_header(self, move_id: str) -> Header | None:
        """A journal without its records and connections.

        None when it cannot be read: the caller looks for conflicts, and `status` reports it.
        """
        try:
            header = read_line(self._files.read(f"{move_id}.journal").split(b"\n", 1)[0])
            namespaces = read_namespaces(header["namespaces"])
            return Header(move_from_json(header["move"]), namespaces, as_text(header["boot"]))
        except (OSError, KeyError, TypeError, ValueError, NatkeepError):
            return None

    def load(self, move_id: str) -> Journal:
        """Read a journal; JournalError when it is unknown, corrupt or of a newer version."""
        parse_id(move_id)
        try:
            text = self._files.read(f"{move_id}.journal")
        except FileNotFoundError:
            raise JournalError(
                f"no move {move_id} in {self.path}", hint="natkeep status lists them"
            ) from None
        try:
            return self._parse(move_id, text)
        except (KeyError, TypeError, ValueError, UsageError, RefusedError) as error:
            reason = str(error) if len(str(error)) <= 160 else str(error)[:157] + "..."
            raise JournalError(
                f"the journal of {move_id} is corrupt: {reason}",
                hint=f"{self.path}/{move_id}.journal; the tables named natkeep are ours to remove",
            ) from error

    def _parse(self, move_id: str, text: bytes) -> Journal:
        lines = text.split(b"\n")[:-1]  # what follows the last newline was never finished
        if not lines:
            raise ValueError("it is empty")
        header = read_line(lines[0])
        if not 0 <= as_whole(header["schema"]) < 1000:
            raise ValueError("it has no schema")
        if header["schema"] not in SCHEMAS:
            raise unknown_schema(move_id, header)
        move = move_from_json(header["move"])
        if move.id != move_id:
            raise ValueError(f"it is of move {move.id}")
        connections, carried, carriers = (NO_CONNECTIONS,) * 3
        if not move.quiesces:
            connections, carried, carriers = self._read_connections(move_id, header["connections"])
        if len(carried) != len(carriers):
            raise ValueError("it does not have a carrier for each carried connection")
        local = frozenset(parse_address(as_text(text)) for text in as_list(header["local"]))
        journal = Journal(
            move,
            connections,
            Surroundings(local, carried, carriers),
            read_namespaces(header["namespaces"]),
            tuple(as_text(kind) for kind in as_list(header["steps"])),
            as_text(header["boot"]),
            self,
            image=read_image(header.get("image")),
            schema=header["schema"],
        )
        if journal.schema > 1:
            journal.before = tuple(map(as_whole, as_list(header["prepare"])))
        if len(journal.namespaces) != len(move.sites):
            raise ValueError("it does not name a namespace for each site")
        for number, text_of_line in enumerate(lines[1:], 2):
            if b'"changed"' in text_of_line and "changed" in (line := read_line(text_of_line)):
                journal._take_change(self._read_change(move_id, line), line)
            else:
                journal._read_record(text_of_line, number)
        return journal

    def _read_connections(self, move_id: str, digest: str) -> tuple[Connections, ...]:
        return unpack_columns(self._read_packed(f"{move_id}.connections", digest), 3)

    def _read_change(self, move_id: str, line: dict[str, Any]) -> Change:
        packed = self._read_packed(f"{move_id}.changed", as_text(line["changed"]))
        came, went, carried, carriers = unpack_columns(packed, 4)
        if len(carried) != len(carriers):
            raise ValueError("it does not have a carrier for each carried connection")
        local = frozenset(parse_address(as_text(text)) for text in as_list(line["local"]))
        return Change(came, went, Surroundings(local, carried, carriers))

    def _read_packed(self, name: str, digest: str) -> bytes:
        try:
            packed = self._files.read(name)
        except FileNotFoundError:
            raise ValueError("its connections are missing") from None
        if hashlib.sha256(packed).hexdigest() != digest:
            raise ValueError("its connections are not those that were written")
        return packed

    def write_changed(self, move_id: str, packed: bytes) -> None:
        """Have ID.changed on disk, whole, before the line that names it."""
        self._files.write_new(f"{move_id}.changed", packed)

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Append one JSON line and have it on disk."""
        self._files.append(name, pack_line(line), line.get("state", "changed"))

    def size(self, name: str) -> int:
        """Octets of a file that is there."""
        return self._files.size(name)

    def remove(self, move_id: str) -> None:
        """Remove a move's files, the journal first; done as well when they are not there."""
        parse_id(move_id)
        with self._files.errors_of(f"{move_id}.journal"):
            faultpoints.reach("journal-remove")
            self._files.unlink(f"{move_id}.journal")
            faultpoints.reach("journal-removed")
            self._remove_rest(move_id)
            faultpoints.reach("journal-forgotten")
            self._files.sync()

    def _remove_rest(self, move_id: str) -> None:
        """What was written before the journal, and what a killed writer had not renamed yet."""
        # With its socket the holder ends.
        for kind in ("ready", "seen", "changed", "connections", "hold", "asked", "told"):
            self._files.unlink(f"{move_id}.{kind}")
        for kind in ("ready", "seen", "changed", "connections", "journal"):
            self._files.unlink(f".{move_id}.{kind}.new")
        for name in self._files.names():
            if name.startswith(f"{move_id}.guard-"):  # whose guardian ends with it
                self._files.unlink(name)

    def write_ready(self, move_id: str, content: bytes) -> None:
        """Have ID.ready on disk, whole, in the place of an earlier one."""
        self._files.write_new(f"{move_id}.ready", content)

    def strays(self) -> tuple[str, ...]:
        """Files of moves that have no journal, and what a killed writer had not renamed yet."""
        known = self.ids()
        found = []
        for name in sorted(self._files.names()):
            match = _FILE.fullmatch(name)
            if match and (match["new"] or match["id"] not in known):
                found.append(name)
        return tuple(found)

    def remove_stray(self, name: str) -> None:
        """Remove one of `strays`."""
        with self._files.errors_of(name):
            self._files.unlink(name)
            self._files.sync()

    def write_sighting(self, move_id: str, boot: str, sighting: Sighting) -> None:
        """Have ID.seen on disk, whole, in the place of an earlier one."""
        self._files.write_new(f"{move_id}.seen", pack_line({"boot": boot, **sighting.to_json()}))

    def read_sighting(self, move_id: str, boot: str) -> Sighting | None:
        """What the last repair of this boot saw; None where there is none that can be read.

        Without it less is known, and nothing is done that would not be done otherwise.
        """
        try:
            found = read_line(self._files.read(f"{move_id}.seen").removesuffix(b"\n"))
            return Sighting.from_json(found) if found["boot"] == boot else None
        except (OSError, KeyError, TypeError, ValueError, JournalError):
            return None


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
        prior = Prior()
    elif isinstance(line["prior"], dict):
        prior = Prior.from_json(line["prior"])
    else:
        raise ValueError(f"line {number}: no prior {line['prior']!r}")
    return step, state, prior, line
