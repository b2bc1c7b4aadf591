"""the reader of what `natkeep inspect --json` printed, perhaps on another machine.

It tells of a living process (`live`) or of an image; then `dump` says what CRIU noted about it.

Rule: as strict as all else: a key that is missing, that is not known or not of its kind, or a
socket that is no socket, is an ImageError that names the place. What is kept is decided here
again: `kept` and `reason` were told of another command line's --map.
"""

from __future__ import annotations

import json
import re
from typing import Any

from natkeep.checkpoint import (
    ELSEWHERE,
    SYNCHRONIZED,
    TCP_CLOSE,
    TRANSLATED,
    Checkpoint,
    Inventory,
    NetworkLock,
    Outcome,
    Socket,
    TcpState,
    shorten,
)
from natkeep.checkpoint.judging import PROTOCOLS, find_reason, judge
from natkeep.errors import ImageError
from natkeep.plan.process import File, Tree
from natkeep.plan.tuples import Endpoint
from natkeep.values import replace

SCHEMA = 1
_KEYS = {"protocol", "state", "local", "peer", "device", "unsent", "kept", "reason"}
_LATER = {"outcome", "unread"}
"""What an earlier natkeep did not print; the first is what another --map decided."""
_HINT = "as natkeep inspect --json prints it"
_PROTOCOL = re.compile("|".join(("raw", *PROTOCOLS.values(), "protocol [0-9]{1,5}")))


def parse_described(text: str, name: str) -> Checkpoint:
    """The sockets in *text*; *name* says in messages where it came from."""
    try:
        document = json.loads(text, object_pairs_hook=_refuse_twice)
    except RecursionError:
        raise ImageError(f"{name}: nested too deeply", hint=_HINT) from None
    except ValueError as error:
        raise ImageError(f"{name} is not JSON: {shorten(error)}", hint=_HINT) from None
    if type(document.get("schema")) is not int or document["schema"] != SCHEMA:
        raise ImageError(f"{name}: no document of schema {SCHEMA}", hint=_HINT)
    if isinstance(document.get("error"), dict):
        said = shorten(str(document["error"].get("message")))
        raise ImageError(f"{name}: {said}", hint="which is an error, not sockets")
    live = _demand_keys(document, name)
    try:
        dump = None if document.get("dump") is None else _read_dump(document["dump"])
    except ValueError as error:
        raise ImageError(f"{name}: dump: {shorten(error)}", hint=_HINT) from None
    sockets, seen = [], set()
    for number, value in enumerate(document["sockets"]):
        try:
            socket = _read_socket(value, closes=dump is not None and dump.tcp_close)
            if socket.is_connection():
                if (socket.local, socket.peer) in seen:
                    raise ValueError("the same connection as before")
                seen.add((socket.local, socket.peer))
        except ValueError as error:
            raise ImageError(f"{name}: socket {number}: {shorten(error)}", hint=_HINT) from None
        sockets.append(socket)
    if not any(socket.protocol in ("tcp", "udp") for socket in sockets):
        raise ImageError(f"{name} tells of no TCP or UDP socket", hint=_HINT)
    try:
        tree = None if document.get("tree") is None else _read_tree(document["tree"])
    except ValueError as error:
        raise ImageError(f"{name}: tree: {shorten(error)}", hint=_HINT) from None
    return replace(Checkpoint.of(tuple(sockets), live=live), inventory=dump, tree=tree)


def _demand_keys(document: dict[str, Any], name: str) -> bool:
    """Whether it is of a living process; ImageError where it has not the keys of either kind."""
    live = "live" in document
    keys = {"schema", "sockets", *(("live",) if live else ())}
    if not keys <= set(document) <= keys | {"sum", "tree" if live else "dump"}:
        raise ImageError(f"{name} has not the keys of a list of sockets", hint=_HINT)
    if live and document["live"] is not True:
        raise ImageError(f"{name}: live is true, or not there", hint=_HINT)
    if not isinstance(document["sockets"], list):
        raise ImageError(f"{name}: sockets is not a list", hint=_HINT)
    return live


def _read_dump(value: object) -> Inventory:
    """What CRIU noted about the dump as a whole."""
    keys = {"network_lock", "run_id", "tcp_close", "own_netns"}
    if not isinstance(value, dict) or set(value) != keys:
        raise ValueError("it does not have the keys of a dump")
    run_id, flags = value["run_id"], (value["tcp_close"], value["own_netns"])
    if run_id is not None and not re.fullmatch(r"[0-9A-Za-z-]{1,64}", _text(run_id)):
        raise ValueError("the run id is not of letters, digits and hyphens")
    if not all(isinstance(flag, bool) for flag in flags):
        raise ValueError("tcp_close and own_netns are true or false")
    return Inventory(NetworkLock(_text(value["network_lock"])), run_id, *flags)


def _read_tree(value: object) -> Tree:
    """What a living tree needs besides its sockets."""
    keys = {"home", "ids", "files", "directories", "own_mounts", "shared_memory"}
    if not isinstance(value, dict) or set(value) != keys:
        raise ValueError("it does not have the keys of a tree")
    if type(value["own_mounts"]) is not bool:
        raise ValueError("own_mounts is true or false")
    return Tree(
        frozenset(_number(each) for each in _list(value["ids"])),
        tuple(_read_file(each) for each in _list(value["files"])),
        tuple(_path(each) for each in _list(value["directories"])),
        value["own_mounts"],
        tuple(_number(each) for each in _list(value["shared_memory"])),
        _text(value["home"]),
    )


def _read_file(value: object) -> File:
    if not isinstance(value, dict) or set(value) != {"name", "size", "mode"}:
        raise ValueError("it does not have the keys of a file")
    size, mode = (None if value[key] is None else _number(value[key]) for key in ("size", "mode"))
    return File(_path(value["name"]), size, mode)


def _path(value: object) -> str:
    if not _text(value).startswith("/") or "\0" in str(value):
        raise ValueError(f"{value!r} is not a path")
    return str(value)


def _number(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a number")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return value


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _read_socket(value: object, *, closes: bool) -> Socket:
    """closes: CRIU restores the connections of this dump closed."""
    if not isinstance(value, dict) or set(value) - _LATER != _KEYS:
        raise ValueError("it does not have the keys of a socket")
    protocol = value["protocol"]
    state = None if value["state"] is None else TcpState(_text(value["state"]))
    if not _PROTOCOL.fullmatch(_text(protocol)) or (state is None) == (protocol == "tcp"):
        raise ValueError(f"{protocol!r} in state {state}")
    device, unsent = value["device"], value["unsent"]
    if device is not None and not _is_name(_text(device)):
        raise ValueError("the name of its device is not one")
    unread = value.get("unread", 0)
    for key, octets in (("unsent", unsent), ("unread", unread)):
        if type(octets) is not int or octets < 0:
            raise ValueError(f"{key} {octets!r} is not a number of octets")
    if type(value["kept"]) is not bool or not isinstance(value["reason"], str | None):
        raise ValueError("kept is true or false, and reason a text or null")
    local, peer = (_read_end(value[end]) for end in ("local", "peer"))
    if "outcome" in value:
        Outcome(_text(value["outcome"]))
    said = value["reason"] or ""
    told_there_alone = said == ELSEWHERE or said.startswith(TRANSLATED)
    reason = said if told_there_alone else find_reason(local, peer)
    if closes and state in SYNCHRONIZED:
        reason = TCP_CLOSE
    socket = judge(protocol, state, local, peer, device, reason)
    return replace(socket, unsent=unsent, unread=unread)


def _read_end(value: object) -> Endpoint | None:
    return None if value is None else Endpoint.parse(_text(value))


def _is_name(device: str) -> bool:
    return 0 < len(device) < 16 and device.isprintable() and not set(device) & set(" /:")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value
