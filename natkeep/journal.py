"""what was done, on disk: the plan of each move, and how far it got.

The state directory (0700, files 0600; nothing below it is ever opened through a link):

    lock               an exclusive flock is held by whoever changes a site
    ID.connections     written before the journal: the kept connections, those that a gateway
                       carried already, and the carriers, each packed (plan/tuples.py) as IPv4
                       and IPv6, each of the six with its length (8 octets) in front
    ID.journal         JSON lines, appended and fsynced:
        {"schema": 1, "natkeep": VERSION, "boot": BOOT ID, "move": {...}, "mode": ...,
         "namespaces": [[DEVICE, INODE], ...], "steps": [KIND, ...], "local": [ADDRESS, ...],
         "connections": SHA-256, or null of a quiesce, which has no file ID.connections,
         "image": RUN ID OF THE DUMP or null}
        {"step": 4, "state": "doing", "prior": {...}}      before the step acts
        {"step": 4, "state": "done", "prior": {...}}       after it acted
        {"step": 4, "state": "undone"}

Rule: the line "doing" is on disk before the kernel is asked, so a step that was begun is known
even when the process was killed in it; to undo one that did nothing is harmless. A last line
without its newline was never finished being written, and is as if it were not there. Anything
else that is not exactly of this form is refused, not guessed at.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from natkeep import __version__
from natkeep.errors import JournalError, NatkeepError, RefusedError, UsageError
from natkeep.plan.lock import DumpLock, NetworkLock
from natkeep.plan.move import Map, Mode, Move, Role, Site, Surroundings, parse_id
from natkeep.plan.steps import HoldListeners, Identity, OpenGate, Prior
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, parse_address

SCHEMA = 1
DEFAULT_DIRECTORY = "/run/natkeep"
LOCK_TIMEOUT = 10.0
"""Seconds to wait for another natkeep to finish."""

_SIZE_LIMIT = 64 << 20


def read_boot_id() -> str:
    """The kernel's id of this boot; a journal of another boot describes nothing that exists."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()


@dataclass(frozen=True, slots=True)
class Record:
    """How far a step got: `doing`, `done` or `undone`, and what was found before."""

    state: str
    prior: Prior


@dataclass
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

    def note(self, step: int, state: str, prior: Prior) -> None:
        """Append one record and have it on disk before returning."""
        line: dict[str, Any] = {"step": step, "state": state}
        if state != "undone":
            line["prior"] = prior.to_json()
        self._directory.append(f"{self.move.id}.journal", line)
        self.records[step] = Record(state, prior)

    def is_done(self, step: int) -> bool:
        """Whether the step acted and was not undone."""
        record = self.records.get(step)
        return record is not None and record.state == "done"

    def is_prepared(self) -> bool:
        """Whether every step of prepare acted."""
        steps = (n for n, kind in enumerate(self.kinds) if kind != OpenGate.__name__)
        return all(self.is_done(number) for number in steps)

    def is_opened(self) -> bool:
        """Whether a gate was opened anywhere, and not closed again."""
        steps = (n for n, kind in enumerate(self.kinds) if kind == OpenGate.__name__)
        return any(self.is_done(number) for number in steps)

    def identity(self, site: Site) -> Identity:
        """The namespace that *site* was when the move was prepared."""
        return self.namespaces[self.move.sites.index(site)]

    def remove(self) -> None:
        """The move is no more."""
        self._directory.remove(self.move.id)


class StateDirectory:
    """The directory of journals, held by one handle."""

    def __init__(self, path: str | None = None, *, create: bool) -> None:
        self.path = path or os.environ.get("NATKEEP_STATE_DIR") or DEFAULT_DIRECTORY
        self._fd: int | None = None
        if create:
            try:
                os.makedirs(self.path, mode=0o700, exist_ok=True)
            except OSError as error:
                raise JournalError(
                    f"cannot make the state directory {self.path}: {error.strerror}"
                ) from error
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        except OSError as error:
            raise JournalError(
                f"cannot open the state directory {self.path}: {error.strerror}"
            ) from error
        weakref.finalize(self, os.close, self._fd)
        _refuse_foreign_directory(self.path, os.fstat(self._fd))

    @contextmanager
    def locked(self, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
        """Hold the lock; JournalError when another natkeep keeps it for *timeout* seconds."""
        if self._fd is None:
            yield
            return
        with self._errors_of("lock"):
            fd = self._open("lock", os.O_RDWR | os.O_CREAT)
        try:
            _lock(fd, self.path, time.monotonic() + timeout)
            yield
        finally:
            os.close(fd)

    def ids(self) -> tuple[str, ...]:
        """The ids that have a journal, sorted."""
        if self._fd is None:
            return ()
        names = os.listdir(self._fd)
        return tuple(sorted(name[:-8] for name in names if name.endswith(".journal")))

    def begin(
        self,
        move: Move,
        connections: Connections,
        surroundings: Surroundings,
        namespaces: tuple[Identity, ...],
        kinds: tuple[str, ...],
        image: str | None = None,
    ) -> Journal:
        """Write the journal of a new move; RefusedError when its id is in use."""
        packed = None
        if not move.quiesces:
            packed = _pack((connections, surroundings.carried, surroundings.carriers))
        header = {
            "schema": SCHEMA,
            "natkeep": __version__,
            "boot": read_boot_id(),
            "move": _move_to_json(move),
            "namespaces": [list(identity) for identity in namespaces],
            "steps": list(kinds),
            "local": sorted(str(address) for address in surroundings.local),
            "connections": packed and hashlib.sha256(packed).hexdigest(),
            "image": image,
        }
        earlier = self.read_move(move.id) if move.id in self.ids() else None
        begun: list[dict[str, Any]] = []
        if earlier is not None and earlier[0].quiesces and move.held and not move.quiesces:
            # The hold passes into this journal in the moment that it takes the other one's place.
            number = kinds.index(HoldListeners.__name__)
            begun.append({"step": number, "state": "doing", "prior": Prior().to_json()})
        elif move.id in self.ids():
            raise RefusedError(
                f"the id {move.id} is in use", hint=f"natkeep teardown {move.id}, or another id"
            )
        try:
            if packed is not None:
                self._write_new(f"{move.id}.connections", packed)
            self._write_new(f"{move.id}.journal", b"".join(map(_line, (header, *begun))))
        except BaseException:
            if not begun:
                self.remove(move.id)  # nothing has been done yet
            raise
        boot = str(header["boot"])
        return Journal(move, connections, surroundings, namespaces, kinds, boot, self, image=image)

    def read_move(self, move_id: str) -> tuple[Move, tuple[Identity, ...], str] | None:
        """The move of a journal, its namespaces and its boot, without its connections.

        None when it cannot be read: whoever asks looks for conflicts, and `status` reports it.
        """
        try:
            header = json.loads(self._read(f"{move_id}.journal").split(b"\n", 1)[0])
            namespaces = tuple((int(d), int(i)) for d, i in header["namespaces"])
            return _move_from_json(header["move"]), namespaces, str(header["boot"])
        except (OSError, KeyError, TypeError, ValueError, NatkeepError):
            return None

    def load(self, move_id: str) -> Journal:
        """Read a journal; JournalError when it is unknown, corrupt or of a newer version."""
        parse_id(move_id)
        try:
            text = self._read(f"{move_id}.journal")
        except FileNotFoundError:
            raise JournalError(
                f"no move {move_id} in {self.path}", hint="natkeep status lists them"
            ) from None
        try:
            return self._parse(move_id, text)
        except (KeyError, TypeError, ValueError, UsageError, RefusedError) as error:
            raise JournalError(
                f"the journal of {move_id} is corrupt: {error}",
                hint=f"{self.path}/{move_id}.journal; the tables named natkeep are ours to remove",
            ) from error

    def _parse(self, move_id: str, text: bytes) -> Journal:
        lines = text.split(b"\n")[:-1]  # what follows the last newline was never finished
        if not lines:
            raise ValueError("it is empty")
        header = json.loads(lines[0])
        if header["schema"] != SCHEMA:
            raise JournalError(
                f"the journal of {move_id} has schema {header['schema']}, this natkeep knows "
                f"{SCHEMA}",
                hint=f"it was written by natkeep {header.get('natkeep')}",
            )
        move = _move_from_json(header["move"])
        if move.id != move_id:
            raise ValueError(f"it is of move {move.id}")
        connections, carried, carriers = (NO_CONNECTIONS,) * 3
        if not move.quiesces:
            connections, carried, carriers = self._read_connections(move_id, header["connections"])
        local = frozenset(parse_address(text) for text in header["local"])
        journal = Journal(
            move,
            connections,
            Surroundings(local, carried, carriers),
            tuple((int(device), int(inode)) for device, inode in header["namespaces"]),
            tuple(str(kind) for kind in header["steps"]),
            str(header["boot"]),
            self,
            image=_read_image(header.get("image")),
        )
        if len(journal.namespaces) != len(move.sites):
            raise ValueError("it does not name a namespace for each site")
        for number, line in enumerate(lines[1:], 2):
            _read_record(journal, json.loads(line), number)
        return journal

    def _read_connections(self, move_id: str, digest: str) -> tuple[Connections, ...]:
        try:
            packed = self._read(f"{move_id}.connections")
        except FileNotFoundError:
            raise ValueError("its connections are missing") from None
        if hashlib.sha256(packed).hexdigest() != digest:
            raise ValueError("its connections are not those that were written")
        return _unpack(packed)

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Append one JSON line and have it on disk."""
        with self._errors_of(name):
            fd = self._open(name, os.O_RDWR | os.O_APPEND)
            try:
                _drop_unfinished_line(fd)
                _write_all(fd, _line(line))
                os.fsync(fd)
            finally:
                os.close(fd)

    def remove(self, move_id: str) -> None:
        """Remove a move's files, the journal first; done as well when they are not there."""
        parse_id(move_id)
        for suffix in ("journal", "connections"):
            with self._errors_of(f"{move_id}.{suffix}"):
                self._unlink(f"{move_id}.{suffix}")
        self._sync()

    def _unlink(self, name: str) -> None:
        if self._fd is not None:  # without it the name would be one of the working directory
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)

    def _open(self, name: str, flags: int) -> int:
        if self._fd is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return os.open(
            name, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=self._fd
        )

    @contextmanager
    def _errors_of(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise JournalError(f"{self.path}/{name}: {error.strerror}") from error

    def _read(self, name: str) -> bytes:
        try:
            fd = self._open(name, os.O_RDONLY)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise JournalError(f"cannot open {self.path}/{name}: {error.strerror}") from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise JournalError(f"{self.path}/{name} is not a file")
            if status.st_size > _SIZE_LIMIT:
                raise JournalError(f"{self.path}/{name} is too large")
            with os.fdopen(fd, "rb", closefd=False) as file:
                return file.read()
        finally:
            os.close(fd)

    def _write_new(self, name: str, content: bytes) -> None:
        temporary = f".{name}.new"
        with self._errors_of(name):
            self._unlink(temporary)
            fd = self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            try:
                _write_all(fd, content)
                os.fsync(fd)
                os.rename(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except BaseException:
                self._unlink(temporary)
                raise
            finally:
                os.close(fd)
            self._sync()

    def _sync(self) -> None:
        if self._fd is not None:
            os.fsync(self._fd)


def _refuse_foreign_directory(path: str, status: os.stat_result) -> None:
    """Whoever can write there decides what natkeep undoes, as root."""
    if status.st_uid != os.geteuid() and os.geteuid() == 0:
        raise JournalError(f"the state directory {path} belongs to uid {status.st_uid}")
    if status.st_mode & 0o022:
        raise JournalError(
            f"the state directory {path} can be written by others", hint=f"chmod 700 {path}"
        )


def _lock(fd: int, path: str, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise JournalError(
                    f"another natkeep holds {path}/lock", hint="wait for it, or end it"
                ) from None
            time.sleep(0.01)


def _drop_unfinished_line(fd: int) -> None:
    """Cut off what a killed writer left without its newline, or the next line would join it."""
    size = os.fstat(fd).st_size
    while size and os.pread(fd, 1, size - 1) != b"\n":
        size -= 1
    os.ftruncate(fd, size)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _pack(some: tuple[Connections, ...]) -> bytes:
    columns = [column for connections in some for column in (connections.v4, connections.v6)]
    return b"".join(len(column).to_bytes(8, "big") + column for column in columns)


def _unpack(packed: bytes) -> tuple[Connections, ...]:
    columns, at = [], 0
    while at < len(packed):
        length = int.from_bytes(packed[at : at + 8], "big")
        columns.append(packed[at + 8 : at + 8 + length])
        at += 8 + length
    if len(columns) != 6 or at != len(packed):
        raise ValueError("its connections are not of the form that this natkeep writes")
    return tuple(Connections(*columns[i : i + 2]) for i in (0, 2, 4))


def _read_image(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is not the run id of a dump")
    return value


def _read_record(journal: Journal, line: dict[str, Any], number: int) -> None:
    step, state = line["step"], line["state"]
    if not (isinstance(step, int) and 0 <= step < len(journal.kinds)):
        raise ValueError(f"line {number}: no step {step!r}")
    if state not in ("doing", "done", "undone"):
        raise ValueError(f"line {number}: no state {state!r}")
    prior = Prior() if state == "undone" else Prior.from_json(line["prior"])
    journal.records[step] = Record(state, prior)


def _move_to_json(move: Move) -> dict[str, Any]:
    return {
        "id": move.id,
        "mode": move.mode,
        "listeners": [str(end) for end in move.listeners],
        "maps": [{"old": str(map_.old), "new": str(map_.new)} for map_ in move.maps],
        "sites": [{"role": site.role, "netns": site.netns} for site in move.sites],
        **_source_to_json(move),
    }


def _source_to_json(move: Move) -> dict[str, Any]:
    """What only moves with a source have."""
    lock = move.lock
    found = {
        "lock": lock and [lock.method, lock.run_id, lock.whole, lock.connections],
        "held": [str(end) for end in move.held],
        "quiesces": move.quiesces,
    }
    return {name: value for name, value in found.items() if value}


def _move_from_json(value: dict[str, Any]) -> Move:
    return Move(
        id=value["id"],
        maps=tuple(
            Map(parse_address(row["old"]), parse_address(row["new"])) for row in value["maps"]
        ),
        sites=tuple(Site(Role(row["role"]), str(row["netns"])) for row in value["sites"]),
        mode=Mode(value["mode"]),
        listeners=tuple(Endpoint.parse(text) for text in value.get("listeners", ())),
        lock=_lock_from_json(value.get("lock")),
        held=tuple(Endpoint.parse(text) for text in value.get("held", ())),
        quiesces=bool(value.get("quiesces")),
    )


def _lock_from_json(value: list[Any] | None) -> DumpLock | None:
    if value is None:
        return None
    method, run_id, whole, count = value
    run_id = None if run_id is None else str(run_id)
    return DumpLock(NetworkLock(method), run_id, bool(whole), None if count is None else int(count))
