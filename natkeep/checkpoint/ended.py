"""the reader of what `natkeep status --json` printed elsewhere: which connections have ended there.

Rule: as described.py: what is not a document of status is an ImageError. A connection has ended
that one move says has, and none that it has not; one of UDP also where it is silent.
"""

from __future__ import annotations

import json
from typing import Any

from natkeep.checkpoint import shorten
from natkeep.errors import ImageError
from natkeep.plan.connection_state import State
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

_HINT = "as natkeep status --json prints it where they are translated"


_OVER = {TCP: {State.ENDED}, UDP: {State.ENDED, State.SILENT}}


def parse_ended(data: bytes, name: str, protocol: Protocol = TCP) -> Connections:
    """The connections that have ended; *name* says in messages where *data* came from."""
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or document.get("schema") != 1:
            raise ValueError("it is no document of schema 1")
        if "error" in document and "moves" not in document:
            raise ValueError(str(document["error"].get("message")))
        rows = (one for move in document["moves"] for one in move["connections"])
        states = [_read_one(one) for one in rows if one.get("proto", "tcp") == protocol.name]
    except RecursionError:
        raise ImageError(f"{name}: nested too deeply", hint=_HINT) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else shorten(error)
        raise ImageError(f"{name} does not tell what has ended: {reason}", hint=_HINT) from None
    others = {inbound for inbound, state in states if state not in _OVER[protocol]}
    return Connections.of({inbound for inbound, _ in states} - others)


def _read_one(value: dict[str, Any]) -> tuple[FourTuple, State | None]:
    state = None if value["state"] is None else State(value["state"])
    local, peer = (Endpoint.parse(value[end]) for end in ("local", "peer"))
    if local.address.version != peer.address.version:
        raise ValueError(f"{local} and {peer} are of different families")
    return FourTuple(source=peer, destination=local), state
