"""The store in a directory that the hosts share: a database of SQLite.

For tests, and for two hosts with a directory in common. Rule: a change is one transaction, and a
revision is a number that grows with each. What was deleted stays as a revision without a value,
so that who watches learns of it.
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from natkeep.errors import RefusedError, UnreachableError
from natkeep.fleet.store import ABSENT, Changes, Item, Snapshot

_LOOK = 0.02  # s between two looks of who watches
_PATIENCE = 5.0  # s for another's transaction
_TABLES = """
    CREATE TABLE IF NOT EXISTS kv
        (key TEXT PRIMARY KEY, value TEXT, revision INTEGER NOT NULL, lease INTEGER NOT NULL);
    CREATE INDEX IF NOT EXISTS by_revision ON kv (revision);
    CREATE TABLE IF NOT EXISTS leases (id INTEGER PRIMARY KEY AUTOINCREMENT, until REAL NOT NULL);
"""
_BELOW = "key >= ? AND key < ?"


class DirectoryStore:
    """See store.py. Each thread has a connection of its own."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._own = threading.local()
        self._closed = threading.Event()

    def range(self, prefix: str, start: str = "", limit: int = 0) -> Snapshot:
        self._end_leases()
        with self._transaction("DEFERRED") as database:
            _, end = _bounds(prefix)
            rows = database.execute(
                f"SELECT key, value, revision FROM kv WHERE {_BELOW} AND value IS NOT NULL"
                " ORDER BY key LIMIT ?",
                (start or prefix, end, limit or -1),
            )
            items = {key: Item(value, revision) for key, value, revision in rows}
            return Snapshot(items, _revision(database))

    def watch(self, prefix: str, revision: int) -> Iterator[Changes]:
        seen, bounds = -1, _bounds(prefix)
        with self._errors():
            database = self._open()
        try:
            while not self._closed.wait(_LOOK):
                with self._errors():
                    version = database.execute("PRAGMA data_version").fetchone()[0]
                    if version == seen:
                        continue
                    since = f"SELECT key, value, revision FROM kv WHERE {_BELOW} AND revision > ?"
                    found = database.execute(f"{since} ORDER BY revision", (*bounds, revision))
                    rows = found.fetchall()
                    changes = {k: None if v is None else Item(v, n) for k, v, n in rows}
                    revision = rows[-1][2] if rows else revision
                seen = version
                if changes:
                    yield changes
        finally:
            database.close()

    def txn(
        self, puts: Mapping[str, str | None], compare: Mapping[str, int] | None = None,
        lease: int = 0,
    ) -> bool:  # fmt: skip
        self._end_leases()
        with self._transaction() as database:
            if any(_revision_of(database, key) != n for key, n in (compare or {}).items()):
                return False
            if lease and not _has_lease(database, lease):
                raise UnreachableError(f"{self._path}: the lease has ended")
            _put(database, puts, lease)
            return True

    def lease(self, seconds: int, lease: int = 0) -> int:
        self._end_leases()
        with self._transaction() as database:
            if lease and not _has_lease(database, lease):
                lease = 0
            row = (lease or None, time.time() + seconds)
            done = database.execute("INSERT OR REPLACE INTO leases VALUES (?, ?)", row)
            return lease or int(done.lastrowid or 0)

    def delete(self, prefix: str) -> None:
        with self._transaction() as database:
            where = f"{_BELOW} AND value IS NOT NULL"
            rows = database.execute(f"SELECT key FROM kv WHERE {where}", _bounds(prefix)).fetchall()
            _put(database, dict.fromkeys(key for (key,) in rows))

    def close(self) -> None:
        self._closed.set()
        if database := getattr(self._own, "database", None):
            database.close()
            self._own.database = None

    def _connect(self) -> sqlite3.Connection:
        database: sqlite3.Connection | None = getattr(self._own, "database", None)
        if database is None:
            database = self._own.database = self._open()
        return database

    def _open(self) -> sqlite3.Connection:
        os.makedirs(self._path, mode=0o700, exist_ok=True)
        status = os.stat(self._path)
        if status.st_uid not in (0, os.geteuid()) or stat.S_IMODE(status.st_mode) & 0o022:
            raise RefusedError(
                f"{self._path}: others can write there", hint=f"chmod 700 {self._path}"
            )
        name = os.path.join(self._path, "store")
        database = sqlite3.connect(name, timeout=_PATIENCE, isolation_level=None)
        database.executescript(_TABLES)
        return database

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise UnreachableError(f"the store {self._path}: {why}") from None

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
        with self._errors():
            database = self._connect()
            database.execute(f"BEGIN {kind}")
            try:
                yield database
                database.execute("COMMIT")
            except BaseException:
                database.execute("ROLLBACK")
                raise

    def _end_leases(self) -> None:
        """Each host looks, so that the keys of one that has died go."""
        ended = "SELECT id FROM leases WHERE until < ?"
        with self._errors():
            if not self._connect().execute(ended, (time.time(),)).fetchone():
                return
        with self._transaction() as database:
            for (lease,) in database.execute(ended, (time.time(),)).fetchall():
                keys = database.execute(
                    "SELECT key FROM kv WHERE lease = ? AND value IS NOT NULL", (lease,)
                ).fetchall()
                _put(database, dict.fromkeys(key for (key,) in keys))
                database.execute("DELETE FROM leases WHERE id = ?", (lease,))


def _bounds(prefix: str) -> tuple[str, str]:
    return prefix, prefix + chr(0x10FFFF)


def _revision(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT ifnull(max(revision), 0) FROM kv").fetchone()[0])


def _revision_of(database: sqlite3.Connection, key: str) -> int:
    found = database.execute(
        "SELECT revision FROM kv WHERE key = ? AND value IS NOT NULL", (key,)
    ).fetchone()
    return int(found[0]) if found else ABSENT


def _has_lease(database: sqlite3.Connection, lease: int) -> bool:
    return bool(database.execute("SELECT 1 FROM leases WHERE id = ?", (lease,)).fetchone())


def _put(database: sqlite3.Connection, puts: Mapping[str, str | None], lease: int = 0) -> None:
    revision = _revision(database) + 1
    rows = [(key, value, revision, lease) for key, value in puts.items()]
    database.executemany("INSERT OR REPLACE INTO kv VALUES (?, ?, ?, ?)", rows)
