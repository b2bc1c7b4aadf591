"""Users, roles and passwords in etcd, as `natkeep fleet init` makes them.

    root       of etcd: all; with it users are made
    orderer    `natkeep fleet`: reads all, writes moves and orders, but nothing that a node says
    NODE       its agent: reads orders and what others say, writes its own `done/` and `alive` alone

Passwords are made here, and each is in a file of its own that only its owner reads; none is on a
command line. Made again is nothing: who is there keeps the password, and gets the rights above.

Rule: a file is on disk before its user is made, and a user before passwords are demanded.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from natkeep.errors import RefusedError, UsageError
from natkeep.fleet import keys
from natkeep.fleet.etcd import EtcdStore, b64, below, read_password
from natkeep.fleet.keys import TOP

ROOT, ORDERER = "root", "orderer"


class Right(NamedTuple):
    """Of all keys from *key* up to *end*, or of one where that is empty; all as etcd has it."""

    kind: str
    key: str
    end: str


class User(NamedTuple):
    """A user that there is by now. made: not before; file: its password's, "" if it had one."""

    name: str
    made: bool
    file: str


def of_node(node: str) -> set[Right]:
    """What a node's agent may."""
    read = (_all("READ", f"{TOP}{what}/") for what in ("move", "conn", "node", "group"))
    alive = Right("READWRITE", b64(keys.alive(node)), "")
    return {*read, _all("READWRITE", keys.dones(node)), alive}


def of_orderer(nodes: Iterable[str]) -> set[Right]:
    """What `natkeep fleet` may."""
    write = (*(f"{TOP}{what}/" for what in ("move", "conn", "owner", "group")),)
    wants = map(keys.wants, nodes)
    return {_all("READ", TOP), *(_all("READWRITE", key) for key in (*write, *wants))}


def _all(kind: str, prefix: str) -> Right:
    return Right(kind, *below(prefix).values())


def init(store: EtcdStore, nodes: Sequence[str], place: str) -> list[User]:
    """Make what is missing, in the order above, and have passwords demanded; all users."""
    for node in nodes:
        if keys.parse_name(node) in (ROOT, ORDERER):
            raise UsageError(f"{node} is a user of its own, and no node")
    known = {*store.call("auth/user/list").get("users", ())}
    os.makedirs(place, mode=0o700, exist_ok=True)
    users = [_make_user(store, name, place, known) for name in (ROOT, ORDERER, *nodes)]
    _give(store, ORDERER, of_orderer(nodes), exact=False)  # other nodes are its own as well
    for node in nodes:
        _give(store, node, of_node(node), exact=True)
    store.call("auth/user/grant", user=ROOT, role=ROOT)
    store.call("auth/enable")
    return users


def _make_user(store: EtcdStore, name: str, place: str, known: set[str]) -> User:
    if name in known:
        return User(name, False, "")
    path = os.path.join(place, name)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(file, "w", encoding="ascii") as stream:
            stream.write(f"{secrets.token_urlsafe(32)}\n")
            os.fsync(file)
    except FileExistsError:
        pass  # of an `init` that was interrupted, or root's own
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    _once(store, "auth/user/add", name=name, password=read_password(path))
    return User(name, True, path)


def _give(store: EtcdStore, name: str, rights: set[Right], *, exact: bool) -> None:
    """Have the role of a user's name give these, and no others if *exact*."""
    roles = store.call("auth/role/list").get("roles", ())
    if name not in roles:
        _once(store, "auth/role/add", name=name)
    found = store.call("auth/role/get", role=name).get("perm", ())
    has = {
        Right(each.get("permType", "READ"), each.get("key", ""), each.get("range_end", ""))
        for each in found
    }
    for right in has - rights if exact else ():
        _once(store, "auth/role/revoke", role=name, key=right.key, range_end=right.end)
    for right in rights - has:
        perm = {"permType": right.kind, "key": right.key, "range_end": right.end}
        store.call("auth/role/grant", name=name, perm=perm)
    if name not in store.call("auth/user/get", name=name).get("roles", ()):
        store.call("auth/user/grant", user=name, role=name)


def _once(store: EtcdStore, path: str, **words: str) -> None:
    """A call that is refused the second time: the first may have been done, and not answered."""
    try:
        store.call(path, **words)
    except RefusedError as error:
        if "already exists" not in str(error) and "is not granted" not in str(error):
            raise
