"""The state directory: a journal a move, with its files beside it.

The state directory (0700, files 0600; nothing below it is ever opened through a link):

    lock               locked while a verb changes what moves share (locks.py)
    ID.connections     written before the journal: the kept connections, those that a gateway
                       carried already, and the carriers, each packed (plan/tuples.py) as IPv4
                       and IPv6, each of the six with its length (8 octets) in front
    ID.changed         before a line "changed": those that came, that went, were carried, carriers
    ID.seen            which entries a repair has seen alive at a gateway (plan/liveness.py)
    ID.ready           what the hook needs to open the move (lifecycle/open.py)
    ID.journal         locked while a verb changes the move; JSON lines, appended and fsynced:
        {"schema": 2, "natkeep": VERSION, "boot": BOOT ID, "move": {...}, "mode": ...,
         "namespaces": [[DEVICE, INODE], ...], "cookies": [COOKIE, ...] where the kernel has them,
         "steps": [KIND, ...], "prepare": [STEP, ...], "local": [ADDRESS, ...],
         "connections": SHA-256, or null of a quiesce, which has no file ID.connections,
         "image": RUN ID OF THE DUMP or null, "begun": NANOSECONDS of the monotonic clock,
         "opening": [{what a step that opens the move loads (object_codec.py)}, ...],
         "joined": [V4, V6], packed, "beside": [ADDRESS, ...], if any (in "changed" as well),
         "entries": [[SITE, {...}], ...], if any: Surroundings.noted; the connections of each are
                       behind the others in the packed file (in "changed" as well)}
        {"step": 4, "state": "doing", "prior": {...}, "site": 0, "undo": {"kind": ..., ...}, ...}
                           before the step acts; at which of the move's sites, what undoes it
                           (undo_codec.py) and what it loads, if that has not been said yet
        {"step": 4, "state": "done", "prior": {...}}       after it acted
        {"step": 4, "state": "undone"}     with "closed": true for a while: the move goes on
        {"changed": SHA-256, "image": RUN ID or null, "local": [ADDRESS, ...], "steps": [KIND, ...],
         "from": [STEP or null, ...], "again": [STEP, ...]}
                           the plan is another from here on (a live process has been frozen): which
                           step each of the new ones continues, and which have to act again

A teardown needs the records alone. Schema 1 has neither "prepare" nor "undo": both are adopted.

Rule: the line "doing" is on disk before the kernel is asked, so a step that was begun is known
even when the process was killed in it; to undo one that did nothing is harmless. A last line
without its newline is as if it were not there. What else is not exactly of this form is refused.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

from natkeep import faultpoints
from natkeep.errors import JournalError, LeftoverError, NatkeepError, RefusedError, UsageError
from natkeep.plan.identity import Identity
from natkeep.plan.liveness import Sighting
from natkeep.plan.move import Move, is_id, parse_id
from natkeep.plan.steps import Prior, Step
from natkeep.plan.translation import Change, Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections
from natkeep.state.address_index import AddressIndex
from natkeep.state.codec import (
    SCHEMAS,
    as_list,
    as_text,
    as_whole,
    count_noted,
    move_from_json,
    pack_line,
    read_image,
    read_line,
    read_namespaces,
    read_surroundings,
    unknown_schema,
    unpack_columns,
)
from natkeep.state.files import StateFiles
from natkeep.state.journal import Journal, corrupt
from natkeep.state.locks import Locks, read_lock_timeout
from natkeep.state.object_codec import loaded_to_json
from natkeep.state.stray_files import find_strays, is_marked, refuse_foreign_part
from natkeep.values import dataclass


@cache
def read_boot_id() -> str:
    """The kernel's id of this boot; a journal of another boot describes nothing that exists."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


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


class StateDirectory:
    """The directory of journals, held by one handle."""

    def __init__(
        self, path: str | None = None, *, create: bool, patience: float | None = None
    ) -> None:
        """patience: seconds to wait for the lock at most, whatever the environment says."""
        self.patience = min(read_lock_timeout(), patience or float("inf"))
        self._files = StateFiles(path, create=create)
        self._addresses = AddressIndex(self._files)
        self._locks = Locks(self._files)
        self.path = self._files.path

    def locked(self, timeout: float | None = None) -> AbstractContextManager[None]:
        """Hold the directory's lock; JournalError when others keep it for *timeout* seconds."""
        return self._locks.shared(self.patience if timeout is None else timeout)

    @contextmanager
    def changing(self, *move_ids: str) -> Iterator[None]:
        """Hold the locks of these moves, as far as there are such, and the directory's."""
        names = frozenset(f"{move_id}.journal" for move_id in move_ids if is_id(move_id))
        self._addresses.forget()
        with self._locks.changing(names, self.patience):
            self._addresses.locked = True
            try:
                yield
            finally:
                self._addresses.locked = False

    def at_once(self) -> AbstractContextManager[None]:
        """What is begun and noted in the block is on disk, and can be read, when it ends."""
        return self._files.at_once()

    def holding(self, move_id: str, timeout: float | None = None) -> AbstractContextManager[bool]:
        """Hold the lock of one move; False where there is no such move."""
        patience = self.patience if timeout is None else timeout
        return self._locks.move(f"{parse_id(move_id)}.journal", patience)

    def ids(self) -> tuple[str, ...]:
        """The ids that have a journal, sorted."""
        names = [name[:-8] for name in self._files.names() if name.endswith(".journal")]
        return tuple(sorted(filter(is_id, names)))  # others are none that natkeep made

    def knows(self, move_id: str) -> bool:
        """Whether there is a journal of that id."""
        return is_id(move_id) and self._files.has(f"{move_id}.journal")

    def follow(self, move_id: str) -> Callable[[], bool]:
        """Answers, at any later time, whether the journal of that id is still the one of now."""
        return self._files.follow(f"{parse_id(move_id)}.journal", grows=True)

    def watch(self, move_id: str) -> Callable[[], bool]:
        """Answers whether nothing has been noted in it since, either."""
        return self._files.follow(f"{parse_id(move_id)}.journal", grows=False)

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
        opening: Iterable[Step] = (),
    ) -> Journal:
        """Write the journal of a new move; RefusedError when its id is in use.

        before: the steps that prepare does; opening: those that open. blocks: the one that takes a
        quiesce over, if one does.
        """
        earlier = self.read_header(move.id) if self.knows(move.id) else None
        journal = Journal(
            move, connections, surroundings, namespaces, kinds, read_boot_id(), self, image=image,
            before=before, begun=time.monotonic_ns(), opening=tuple(map(loaded_to_json, opening)),
        )  # fmt: skip
        packed, header = journal.pack_header()
        begun: list[dict[str, Any]] = []
        if earlier is not None and earlier.move.quiesces and blocks is not None:
            # The block passes into this journal in the moment that it takes the other one's place.
            number, step = blocks
            line, journal.records[number] = journal.make_record(number, "doing", Prior(), step)
            begun.append(line)
        elif self.knows(move.id):
            hint = f"natkeep teardown {move.id}, or another id"
            raise RefusedError(f"the id {move.id} is in use", hint=hint)
        replaced = self._files.read(f"{move.id}.journal") if begun else None
        faultpoints.reach("journal-begin")
        try:
            if packed is not None:
                self._files.write_new(f"{move.id}.connections", packed)
            lines = b"".join(map(pack_line, (header, *begun)))
            self._files.write_new(f"{move.id}.journal", lines, self._locks.begin)
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
            self._remove_rest(move_id, self._files.names())
        except Exception as error:
            raise LeftoverError(
                f"{reason}; its files in {self.path} are left: {error}",
                hint=f"natkeep teardown {move_id} removes them",
            ) from reason

    def ids_naming(self, addresses: Iterable[Address]) -> tuple[str, ...]:
        """The ids of the moves that have one of *addresses* as an OLD or NEW, sorted."""
        packed = (address.packed for address in addresses)
        return tuple(filter(is_id, self._addresses.find(packed)))

    def ids_moving(self, olds: frozenset[bytes]) -> tuple[str, ...]:
        """The ids of the moves that have one of the packed addresses *olds* as an OLD, sorted."""
        return tuple(filter(is_id, self._addresses.find(olds, olds_only=True)))

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
            namespaces = read_namespaces(header)
            return Header(move_from_json(header["move"]), namespaces, as_text(header["boot"]))
        except (OSError, KeyError, TypeError, ValueError, NatkeepError):
            return None

    def load(self, move_id: str) -> Journal:
        """Read a journal; JournalError when it is unknown, corrupt or of a newer version.

        Without its lock it may be changed or removed between two reads: then it is read again.
        """
        parse_id(move_id)
        while True:
            is_same = self.watch(move_id)
            try:
                return self._load(move_id)
            except JournalError:
                if is_same():
                    raise

    def _load(self, move_id: str) -> Journal:
        try:
            text = self._files.read(f"{move_id}.journal")
        except FileNotFoundError:
            raise JournalError(
                f"no move {move_id} in {self.path}", hint="natkeep status lists them"
            ) from None
        try:
            return self._parse(move_id, text)
        except (KeyError, TypeError, ValueError, UsageError, RefusedError) as error:
            raise corrupt(move_id, self.path, error) from error

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
        columns: tuple[Connections, ...] = (NO_CONNECTIONS,) * 3
        if not move.quiesces:
            packed = self._read_packed(f"{move_id}.connections", header["connections"])
            columns = unpack_columns(packed, 3 + count_noted(header))
        journal = Journal(
            move,
            columns[0],
            read_surroundings(move, header, columns[1:]),
            read_namespaces(header),
            tuple(as_text(kind) for kind in as_list(header["steps"])),
            as_text(header["boot"]),
            self,
            image=read_image(header.get("image")),
            schema=header["schema"],
            begun=as_whole(header.get("begun", 0)),
            opening=tuple(map(dict, as_list(header.get("opening", [])))),
        )
        if journal.schema > 1:
            journal.before = tuple(map(as_whole, as_list(header["prepare"])))
        if len(journal.namespaces) != len(move.sites):
            raise ValueError("it does not name a namespace for each site")
        for number, text_of_line in enumerate(lines[1:], 2):
            if b'"changed"' in text_of_line and "changed" in (line := read_line(text_of_line)):
                journal.take_change(self._read_change(move, line), line)
            else:
                journal.read_record(text_of_line, number)
        return journal

    def _read_change(self, move: Move, line: dict[str, Any]) -> Change:
        packed = self._read_packed(f"{move.id}.changed", as_text(line["changed"]))
        came, went, *rest = unpack_columns(packed, 4 + count_noted(line))
        return Change(came, went, read_surroundings(move, line, rest))

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

    def remove(self, *move_ids: str) -> None:
        """Remove the files of moves, the journals first; done as well when they are not there."""
        guards = [name for name in self._files.names() if ".guard-" in name]
        for move_id in map(parse_id, move_ids):
            with self._files.errors_of(f"{move_id}.journal"):
                faultpoints.reach("journal-remove")
                self._files.unlink(f"{move_id}.journal")
                faultpoints.reach("journal-removed")
                self._remove_rest(move_id, guards)
                faultpoints.reach("journal-forgotten")
        self._files.sync()

    def _remove_rest(self, move_id: str, guards: Iterable[str]) -> None:
        """What was written before the journal, and what a killed writer had not renamed yet."""
        # With its socket the holder ends.
        for kind in ("ready", "seen", "changed", "connections", "hold", "asked", "told"):
            self._files.unlink(f"{move_id}.{kind}")
        for kind in ("ready", "seen", "changed", "connections", "journal"):
            self._files.unlink(f".{move_id}.{kind}.new")
        for name in guards:
            if name.startswith(f"{move_id}.guard-"):  # whose guardian ends with it
                self._files.unlink(name)

    def write_ready(self, move_id: str, content: bytes) -> None:
        """Have ID.ready on disk, whole, in the place of an earlier one."""
        self._files.write_new(f"{move_id}.ready", content)

    def strays(self) -> dict[str, str]:
        """The files that belong to no journal, and the id that each was written for."""
        return {name: move_id for move_id, name in find_strays(self._files, self.ids())}

    def remove_stray(self, name: str) -> None:
        """Remove one of `strays`."""
        with self._files.errors_of(name):
            self._files.unlink(name)
            self._files.sync()

    def is_natkeeps(self) -> bool:
        """Whether natkeep has made the directory (or found it empty): its files are natkeep's."""
        return is_marked(self._files)

    def refuse_foreign_path(self) -> None:
        """JournalError unless only root (or we) could put the directory where it is."""
        if self._files.is_there():
            refuse_foreign_part(self.path)

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
