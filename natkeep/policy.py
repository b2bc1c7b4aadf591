"""the operator's word: /etc/natkeep/natkeep.toml, what may be moved, and standing orders.

    allow_old = ["10.2.0.0/24", "fd00:2::/64"]   # OLD must be in one of these
    allow_new = ["10.3.0.0/16"]                  # and NEW in one of these
    max_connections = 10000                      # so many of them in one move at most

    [hook]                                       # for natkeep-hook, without NATKEEP_ID or _MAP
    map = ["10.2.0.10=auto"]                     # or: id = "web"
    peer_map = ["10.1.0.2=10.4.0.30"]
    via = ["10.2.0.11"]
    mode = "stateless"
    unkept = "reset"
    udp = "leave"
    state_dir = "/run/natkeep"

    [agent]                                      # for natkeep agent and natkeep fleet
    node = "gw-1"
    store = "etcd"                               # or: dir:/shared/fleet
    endpoints = ["https://10.0.0.1:2379", "https://10.0.0.2:2379", "https://10.0.0.3:2379"]
    ca = "/etc/natkeep/ca.pem"
    cert = "/etc/natkeep/node.pem"
    key = "/etc/natkeep/node.key"
    user = "gw-1"
    password_file = "/etc/natkeep/etcd-password"
    groups = ["edge"]
    roles = ["gateway"]                          # what the store may order here, and nothing else
    netns = [""]                                 # in which namespaces; "" is the agent's own
    max_moves = 2000
    socket = "/run/natkeep/agent.sock"           # where natkeep-hook asks (NATKEEP_AGENT)

Where there is no file, or a key is not in it, what the command line or the environment names is
allowed. Rule: the file can be written by root only, or it is refused; a key that is not known is a
mistake, never ignored. The path is fixed: an environment that could name another file could
allow itself everything, and the environment is just what this file is to set bounds to. (Root may
name another to `natkeep agent`, on the command line: what is bounded there is the store.)
This file must never change anything, and never read an image.
"""

from __future__ import annotations

import ipaddress
import os
import stat
from collections.abc import Sequence
from typing import Any, TypeVar

from natkeep.errors import RefusedError, UsageError
from natkeep.plan.move import Datagrams, Fate, Mode, Move
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Address
from natkeep.values import dataclass

PATH = "/etc/natkeep/natkeep.toml"
_LISTS = ("map", "peer_map", "via")
"""Of the keys of [hook] those that are lists of texts."""
_SIZE_LIMIT = 1 << 20

T = TypeVar("T")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class Standing:
    """The table [hook]: what the hook does where the environment does not say; "" is not set.

    The fields are the keys.
    """

    id: str = ""
    map: tuple[str, ...] = ()
    mode: str = ""
    state_dir: str = ""
    unkept: str = ""
    udp: str = ""
    peer_map: tuple[str, ...] = ()
    via: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Agent:
    """The table [agent]: who this node is, where its store is, and what that may order.

    The fields are the keys; "" is not set, None no bound.
    """

    node: str = ""
    store: str = ""
    endpoints: tuple[str, ...] = ()
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password_file: str = ""
    groups: tuple[str, ...] = ()
    roles: tuple[str, ...] | None = None
    netns: tuple[str, ...] | None = None
    max_moves: int | None = None
    socket: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows; None is no bound. The fields are the file's keys."""

    allow_old: tuple[Network, ...] | None = None
    allow_new: tuple[Network, ...] | None = None
    max_connections: int | None = None
    hook: Standing = Standing()
    agent: Agent = Agent()


def authorise(move: Move, count: int) -> None:
    """RefusedError when the operator's file does not allow *move* with *count* connections."""
    policy = read_policy()
    for map_ in move.maps:
        _demand("OLD", map_.old, "allow_old", policy.allow_old)
        if any(site.role != Role.SOURCE for site in move.sites):  # which makes nothing NEW
            _demand("NEW", map_.new, "allow_new", policy.allow_new)
    if policy.max_connections is not None and count > policy.max_connections:
        raise RefusedError(
            f"{count} connections are more than this machine allows, {policy.max_connections}",
            hint=f"max_connections in {PATH}",
        )


def _demand(name: str, address: Address, key: str, networks: tuple[Network, ...] | None) -> None:
    if networks is None or any(address in network for network in networks):
        return
    raise RefusedError(f"{name} {address} is not allowed on this machine", hint=f"{key} in {PATH}")


def read_policy() -> Policy:
    """What the file says; no bounds where there is none. UsageError for a file that is wrong."""
    text = _read()
    if text is None:
        return Policy()
    import tomllib  # only here: it takes as long to import as the interpreter to start

    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{PATH}: {error}") from None
    except RecursionError:
        raise UsageError(f"{PATH}: nested too deeply") from None
    return _make_policy(document)


def _read() -> str | None:
    try:
        fd = os.open(PATH, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UsageError(f"cannot open {PATH}: {error.strerror}") from None
    try:
        _refuse_foreign(os.fstat(fd))
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(_SIZE_LIMIT).decode()
    except UnicodeDecodeError:
        raise UsageError(f"{PATH} is not UTF-8 text") from None
    finally:
        os.close(fd)


def _refuse_foreign(status: os.stat_result) -> None:
    """Only what root alone can write is the operator's word."""
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{PATH} is not a file")
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise UsageError(
            f"{PATH} can be written by others than root",
            hint=f"chown root {PATH}; chmod go-w {PATH}",
        )
    if status.st_size > _SIZE_LIMIT:
        raise UsageError(f"{PATH} is too large")


def _make_policy(document: dict[str, Any]) -> Policy:
    _refuse_unknown(document, Policy, "")
    hook = _make_table(document, "hook", Standing, _LISTS)
    words = (("mode", hook.mode, Mode), ("unkept", hook.unkept, Fate), ("udp", hook.udp, Datagrams))
    for key, value, known in words:
        if value and value not in tuple(known):
            raise UsageError(f"{PATH}: hook.{key}: {value!r} is none of {', '.join(known)}")
    return Policy(
        _networks(document, "allow_old"),
        _networks(document, "allow_new"),
        _number(document, "max_connections"),
        hook,
        _make_agent(document),
    )


def _make_agent(document: dict[str, Any]) -> Agent:
    agent = _make_table(
        document, "agent", Agent, ("endpoints", "groups", "roles", "netns"), "max_moves"
    )
    for role in agent.roles or ():
        if role not in tuple(Role):
            raise UsageError(f"{PATH}: agent.roles: {role!r} is none of {', '.join(Role)}")
    return agent


def _make_table(
    document: dict[str, Any], name: str, kind: type[T], lists: Sequence[str], number: str = ""
) -> T:
    """The table *name*: each key a text, but *lists* of texts, and a *number*."""
    table, prefix = document.get(name, {}), f"{name}."
    if not isinstance(table, dict):
        raise UsageError(f"{PATH}: {name} is not a table")
    _refuse_unknown(table, kind, prefix)
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key in lists:
            found[key] = tuple(_texts(table, key, prefix))
        elif key == number:
            found[key] = _number(table, key, prefix)
        elif isinstance(value, str):
            found[key] = value
        else:
            raise UsageError(f"{PATH}: {prefix}{key} is not a text")
    return kind(**found)


def _refuse_unknown(table: dict[str, Any], kind: type, prefix: str) -> None:
    names: tuple[str, ...] = kind.__match_args__  # type: ignore[attr-defined]  # values.py gives it
    for key in table:
        if key not in names:
            raise UsageError(
                f"{PATH}: unknown key {prefix}{key}",
                hint="known are " + ", ".join(prefix + name for name in names),
            )


def _texts(table: dict[str, Any], key: str, prefix: str = "") -> list[str]:
    values = table.get(key, [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise UsageError(f"{PATH}: {prefix}{key} is not a list of texts")
    return values


def _networks(document: dict[str, Any], key: str) -> tuple[Network, ...] | None:
    try:
        networks = tuple(ipaddress.ip_network(text) for text in _texts(document, key))
    except ValueError as error:
        raise UsageError(f"{PATH}: {key}: {error}") from None
    return networks if key in document else None


def _number(document: dict[str, Any], key: str, prefix: str = "") -> int | None:
    value = document.get(key, 0)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise UsageError(f"{PATH}: {prefix}{key} is not a number from 0 on")
    return value if key in document else None
