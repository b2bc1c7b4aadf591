"""the reader of what `natkeep inspect --live PID --json` printed, perhaps on another machine.

Rule: as strict as all else: a key that is missing, that is not known or not of its kind, or a
socket that is no socket, is an ImageError that names the place. What is kept is decided here
again: `kept` and `reason` were told of another command line's --map.
"""

from __future__ import annotations

import json
from typing import Any

from natkeep.checkpoint import Checkpoint, Socket, TcpState, shorten
from natkeep.checkpoint.judging import PROTOCOLS, find_reason, judge
from natkeep.errors import ImageError
from natkeep.plan.tuples import Endpoint
from natkeep.values import replace

SCHEMA = 1
_KEYS = {"protocol", "state", "local", "peer", "device", "unsent", "kept", "reason"}
_HINT = "as natkeep inspect --live PID --json prints it"


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
    if set(document) != {"schema", "live", "sockets"} or document["live"] is not True:
        hint = "of an image: --image DIR" if set(document) == {"schema", "sockets"} else _HINT
        raise ImageError(f"{name} does not tell of a living process", hint=hint)
    if not isinstance(document["sockets"], list):
        raise ImageError(f"{name}: sockets is not a list", hint=_HINT)
    sockets, seen = [], set()
    for number, value in enumerate(document["sockets"]):
        try:
            socket = _read_socket(value)
            if socket.is_connection():
                if (socket.local, socket.peer) in seen:
                    raise ValueError("the same connection as before")
                seen.add((socket.local, socket.peer))
        except ValueError as error:
            raise ImageError(f"{name}: socket {number}: {shorten(error)}", hint=_HINT) from None
        sockets.append(socket)
    if not any(socket.protocol == "tcp" for socket in sockets):
        raise ImageError(f"{name} tells of no TCP socket", hint=_HINT)
    return Checkpoint.of(tuple(sockets), live=True)


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _read_socket(value: object) -> Socket:
    if not isinstance(value, dict) or set(value) != _KEYS:
        raise ValueError("it does not have the keys of a socket")
    protocol = value["protocol"]
    state = None if value["state"] is None else TcpState(_text(value["state"]))
    if protocol not in ("raw", *PROTOCOLS.values()) or (state is None) == (protocol == "tcp"):
        raise ValueError(f"{protocol!r} in state {state}")
    device, unsent = value["device"], value["unsent"]
    if device is not None and not _is_name(_text(device)):
        raise ValueError("the name of its device is not one")
    if type(unsent) is not int or unsent < 0:
        raise ValueError(f"unsent {unsent!r} is not a number of octets")
    if type(value["kept"]) is not bool or not isinstance(value["reason"], str | None):
        raise ValueError("kept is true or false, and reason a text or null")
    local, peer = (_read_end(value[end]) for end in ("local", "peer"))
    socket = judge(protocol, state, local, peer, device, find_reason(local, peer))
    return replace(socket, unsent=unsent)


def _read_end(value: object) -> Endpoint | None:
    return None if value is None else Endpoint.parse(_text(value))


def _is_name(device: str) -> bool:
    return 0 < len(device) < 16 and device.isprintable() and not set(device) & set(" /:")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value
