"""The form of a journal: its lines and columns written, and read as strictly.

Rule: bytes and JSON values in, values of plan/ out, or the other way round. What natkeep does not
write is a ValueError, KeyError or TypeError, and never guessed at.
This file must never open a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from natkeep.errors import JournalError
from natkeep.plan.criu_lock import DumpLock, NetworkLock
from natkeep.plan.entry_attributes import Attributes, Noted
from natkeep.plan.identity import Identity
from natkeep.plan.maps import Map
from natkeep.plan.move import Fate, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.steps import Prior
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, Endpoint, parse_address
from natkeep.plan.via import Via

SCHEMA = 2
SCHEMAS = (1, SCHEMA)
"""Those that are read; in 1 a record does not hold its undo."""


def record_to_json(step: int, state: str, prior: Prior) -> dict[str, Any]:
    """What the journal notes of a step, but for its undo."""
    record: dict[str, Any] = {"step": step, "state": state}
    if state != "undone":
        record["prior"] = prior.to_json()
    elif "closed" in prior.facts:
        record["closed"] = True
    return record


def pack_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii") + b"\n"


def pack_columns(some: tuple[Connections, ...]) -> bytes:
    columns = [column for connections in some for column in (connections.v4, connections.v6)]
    return b"".join(len(column).to_bytes(8, "big") + column for column in columns)


def unpack_columns(packed: bytes, count: int) -> tuple[Connections, ...]:
    columns, at = [], 0
    while at < len(packed):
        length = int.from_bytes(packed[at : at + 8], "big")
        columns.append(packed[at + 8 : at + 8 + length])
        at += 8 + length
    if len(columns) != 2 * count or at != len(packed):
        raise ValueError("its connections are not of the form that this natkeep writes")
    return tuple(Connections(*columns[i : i + 2]) for i in range(0, 2 * count, 2))


def read_line(line: bytes) -> dict[str, Any]:
    """The object on one line; ValueError for all that `pack_line` does not write."""
    try:
        value = _DECODER.decode(line.decode("utf-8"))
    except RecursionError:
        raise ValueError("a line of it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("a line of it is not a JSON object")
    return value


def _refuse_number(text: str) -> int:
    raise ValueError(f"{text} is not a whole number")


_DECODER = json.JSONDecoder(parse_float=_refuse_number, parse_constant=_refuse_number)


def as_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not text")
    return value


def as_whole(value: object) -> int:
    if type(value) is not int:  # True is an int to isinstance
        raise ValueError(f"{value!r} is not a whole number")
    return value


def as_index(value: object, count: int) -> int:
    """A place in a list of *count*."""
    if not 0 <= as_whole(value) < count:
        raise ValueError(f"{value!r} is not a place in a list of {count}")
    return as_whole(value)


def as_flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r} is neither true nor false")
    return value


def as_list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list")
    return value


def namespaces_to_json(namespaces: Iterable[Identity]) -> dict[str, Any]:
    """Cookies for themselves, and only where the kernel has them: natkeep 0.1 reads the pairs."""
    found = [*namespaces]
    cookies = [each.cookie for each in found]
    pairs = [[each.device, each.inode] for each in found]
    return {"namespaces": pairs} | ({"cookies": cookies} if any(cookies) else {})


def read_namespaces(header: dict[str, Any]) -> tuple[Identity, ...]:
    pairs = [as_list(pair) for pair in as_list(header["namespaces"])]
    cookies = as_list(header.get("cookies", [0] * len(pairs)))
    if len(cookies) != len(pairs):
        raise ValueError("it does not have a cookie for each namespace")
    return tuple(
        Identity(as_whole(device), as_whole(inode), as_whole(cookie))
        for (device, inode), cookie in zip(pairs, cookies, strict=False)
    )


def unknown_schema(move_id: str, header: dict[str, Any]) -> JournalError:
    """What the journal says of itself is shown as far as it looks like a version."""
    version = str(header.get("natkeep"))
    known = len(version) <= 32 and version.isprintable()
    return JournalError(
        f"the journal of {move_id} has schema {header['schema']}, this natkeep knows {SCHEMA}",
        hint=f"it was written by natkeep {version}" if known else None,
    )


def read_image(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{value!r} is not the run id of a dump")
    return value


def move_to_json(move: Move) -> dict[str, Any]:
    return {
        "id": move.id,
        "mode": move.mode,
        "listeners": [str(end) for end in move.listeners],
        "maps": [map_.to_json() for map_ in move.maps],
        "sites": [{"role": site.role, "netns": site.netns} for site in move.sites],
        **_rest_to_json(move),
    }


def _maps_from_json(value: object) -> tuple[Map, ...]:
    return tuple(
        Map(
            parse_address(as_text(row["old"])),
            parse_address(as_text(row["new"])),
            *(as_whole(row[name]) if name in row else None for name in ("old_port", "new_port")),
        )
        for row in as_list(value)
    )


def _rest_to_json(move: Move) -> dict[str, Any]:
    """What only moves with a source have, those that reset what they cannot keep, and that hold."""
    lock = move.lock
    resets = move.unkept == Fate.RESET
    found = {
        "unkept": str(move.unkept) if resets else None,
        "lost": [move.lost.v4.hex(), move.lost.v6.hex()] if resets else None,
        "lock": lock and lock_to_json(lock),
        "held": [str(end) for end in move.held],
        "quiesces": move.quiesces,
        "hold": move.hold,
        "guard": move.guard,
        "live": move.live,
        "peer_maps": [map_.to_json() for map_ in move.peer_maps],
        "vias": [[str(via.source), via.low, via.high] for via in move.vias],
        "udp": [move.udp.v4.hex(), move.udp.v6.hex()] if len(move.udp) else None,
        "udp_servers": [str(end) for end in move.udp_servers],
    }
    return {name: value for name, value in found.items() if value}


def move_from_json(value: dict[str, Any]) -> Move:
    return Move(
        id=value["id"],
        maps=_maps_from_json(value["maps"]),
        sites=tuple(
            Site(Role(row["role"]), as_text(row["netns"])) for row in as_list(value["sites"])
        ),
        mode=Mode(value["mode"]),
        listeners=_read_endpoints(value.get("listeners", [])),
        lock=None if value.get("lock") is None else lock_from_json(value["lock"]),
        held=_read_endpoints(value.get("held", [])),
        quiesces=as_flag(value.get("quiesces", False)),
        unkept=Fate(as_text(value.get("unkept", Fate.REPORT))),
        lost=read_sides(value.get("lost")),
        hold=as_flag(value.get("hold", False)),
        guard=as_flag(value.get("guard", False)),
        live=as_flag(value.get("live", False)),
        peer_maps=_maps_from_json(value.get("peer_maps", [])),
        vias=tuple(map(_read_via, as_list(value.get("vias", [])))),
        udp=read_sides(value.get("udp")),
        udp_servers=_read_endpoints(value.get("udp_servers", [])),
    )


def _read_via(value: object) -> Via:
    source, low, high = as_list(value)
    return Via(parse_address(as_text(source)), as_whole(low), as_whole(high))


def peers_to_json(around: Surroundings) -> dict[str, Any]:
    """What there is beside *local* and what is *carried*, which seldom is anything."""
    joined, found = around.joined, dict[str, Any]()
    if len(joined):
        found["joined"] = [joined.v4.hex(), joined.v6.hex()]
    for name, some in (("beside", around.beside), ("home", around.home)):
        if some:
            found[name] = sorted(map(str, some))
    every = around.udp_carried, around.udp_carriers, around.udp_joined
    if any(map(len, every)):
        found["udp"] = [[some.v4.hex(), some.v6.hex()] for some in every]
    if around.masqueraded:
        found["masqueraded"] = sorted(map(str, around.masqueraded))
    found |= {"forwards": True} if around.forwards else {}
    found |= {"forwarding": [*around.forwarding]} if around.forwarding else {}
    if around.at_peers:
        rows = around.at_peers
        found["at_peers"] = [[str(s.role), s.netns, sorted(map(str, here))] for s, here in rows]
    return found


def read_sides(value: object) -> Connections:
    """Connections as a list of two texts; None is none."""
    if value is None:
        return NO_CONNECTIONS
    v4, v6 = (bytes.fromhex(as_text(text)) for text in as_list(value))
    return Connections(v4, v6)


def _read_endpoints(value: object) -> tuple[Endpoint, ...]:
    return tuple(Endpoint.parse(as_text(text)) for text in as_list(value))


def noted_to_json(move: Move, noted: tuple[Noted, ...]) -> dict[str, Any]:
    """What entries say, each with its site; which connections', a file beside the journal says."""
    rows = [[move.sites.index(one.site), one.attributes.to_json()] for one in noted]
    return {"entries": rows} if rows else {}


def read_noted(move: Move, rows: list[Any], said: list[Connections]) -> tuple[Noted, ...]:
    found = []
    for (site, attributes), connections in zip(map(as_list, rows), said, strict=True):
        where = move.sites[as_index(site, len(move.sites))]
        found.append(Noted(where, Attributes.from_json(attributes), connections))
    return tuple(found)


def lock_to_json(lock: DumpLock) -> list[Any]:
    return [lock.method, lock.run_id, lock.whole, lock.connections]


def lock_from_json(value: object) -> DumpLock:
    method, run_id, whole, count = as_list(value)
    return DumpLock(
        NetworkLock(method),
        None if run_id is None else as_text(run_id),
        as_flag(whole),
        None if count is None else as_whole(count),
    )


def count_noted(line: dict[str, Any]) -> int:
    """Into how many groups what entries said is divided, in a journal's line."""
    return len(as_list(line.get("entries", [])))


def read_surroundings(
    move: Move, line: dict[str, Any], columns: Sequence[Connections]
) -> Surroundings:
    """From the journal's first line, or that of a change, and the columns that are theirs."""
    carried, carriers, *said = columns
    if len(carried) != len(carriers):
        raise ValueError("it does not have a carrier for each carried connection")
    local, beside, home = (
        frozenset(parse_address(as_text(text)) for text in as_list(texts))
        for texts in (line["local"], line.get("beside", []), line.get("home", []))
    )
    noted = read_noted(move, as_list(line.get("entries", [])), said)
    joined, forwards = read_sides(line.get("joined")), as_flag(line.get("forwards", False))
    at_peers = tuple(_read_at_peers(as_list(row)) for row in as_list(line.get("at_peers", [])))
    names = tuple(map(as_text, as_list(line.get("forwarding", []))))
    seldom = (joined, noted, beside, home, forwards, at_peers, names)
    inside, outside, alongside = map(read_sides, as_list(line.get("udp", [None, None, None])))
    if len(inside) != len(outside):
        raise ValueError("it does not have a carrier for each carried socket of UDP")
    masked = frozenset(_read_endpoints(line.get("masqueraded", [])))
    udp = inside, outside, alongside, masked
    return Surroundings(local, carried, carriers, *seldom, *udp)


def _read_at_peers(row: list[Any]) -> tuple[Site, frozenset[Address]]:
    role, netns, here = row
    site = Site(Role(as_text(role)), as_text(netns))
    return site, frozenset(parse_address(as_text(text)) for text in as_list(here))
