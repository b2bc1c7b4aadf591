"""What a node is ordered to do for one move, as a value and as JSON.

    {"schema": 1, "generation": 3, "phase": "ready", "role": "gateway", "netns": "",
     "maps": ["10.2.0.10=10.3.0.20"], "mode": "stateful", "listeners": [], "gate": "open",
     "after": {"host-b": "prepared"}, "senders": [], "deadline_s": 60, "image": null,
     "conn": {"pieces": 1, "count": 100, "sha256": "..."}, "force": false, "unopened": false}

phase: `ready`, or `gone` to undo the move; force: even if connections live; unopened: even if they
seem to, where nothing of the process was heard, since its destination was not open. generation:
which order of the move it is; a later one is greater. after: how far other nodes have to be, of the
same order, before this one acts. senders: at a destination the nodes that send it what peers say,
once they have prepared. deadline_s: seconds after which a gate that was never opened is undone; 0:
never. image: the dump's run id.

Rule: an order that is not exactly of this form is refused by name, and nothing is done.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from natkeep.errors import NatkeepError, UsageError
from natkeep.fleet.keys import parse_name
from natkeep.plan.maps import Map, Wish, parse_map, parse_olds
from natkeep.plan.move import Mode
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Endpoint
from natkeep.values import dataclass

SCHEMA = 1
ROLES = (Role.DESTINATION, Role.GATEWAY, Role.PEER, Role.SOURCE)
"""The roles that a fleet orders: a relay's ports are not agreed by way of a store."""
LONGEST = 7 * 86400


class Phase(StrEnum):
    """How far a move is at a site; the order of the words is that of time."""

    GONE = "gone"
    OPENING = "opening"
    PREPARED = "prepared"
    OPEN = "open"

    def reaches(self, other: Phase) -> bool:
        """Whether it is as far as *other*, or further."""
        phases = [*Phase]
        return phases.index(self) >= phases.index(other)


@dataclass(frozen=True, slots=True)
class Listed:
    """A list of connections that is in the store: in how many pieces, how many there are."""

    pieces: int
    count: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """As it is in the store."""
        return {"pieces": self.pieces, "count": self.count, "sha256": self.sha256}

    @classmethod
    def parse(cls, found: Mapping[str, Any]) -> Listed:
        """What *found* says; KeyError or ValueError if it does not."""
        return cls(whole(found["pieces"], 10_000), whole(found["count"]), a_text(found["sha256"]))


@dataclass(frozen=True, slots=True)
class Want:
    """See above; wanted: whether it is to be there, or else undone.

    maps: where NEW is `auto`, the destination is prepared by its restore, and its `done` has NEW.
    """

    generation: int
    wanted: bool
    role: Role
    netns: str
    maps: tuple[Wish, ...]
    mode: Mode
    listeners: tuple[Endpoint, ...]
    gate: Gate
    after: Mapping[str, Phase]
    senders: tuple[str, ...]
    deadline: int
    image: str | None
    listed: Listed
    force: bool = False
    unopened: bool = False

    def to_json(self) -> dict[str, Any]:
        """As it is in the store."""
        return {
            "schema": SCHEMA, "generation": self.generation,
            "phase": "ready" if self.wanted else "gone", **self._what(),
            "after": {node: str(phase) for node, phase in self.after.items()},
            "senders": [*self.senders], "deadline_s": self.deadline, "force": self.force,
            "unopened": self.unopened,
        }  # fmt: skip

    def _what(self) -> dict[str, Any]:
        return {
            "role": str(self.role), "netns": self.netns, "maps": [*map(str, self.maps)],
            "mode": str(self.mode), "listeners": [*map(str, self.listeners)],
            "gate": str(self.gate), "image": self.image,
            "conn": self.listed.to_json(),
        }  # fmt: skip

    def by_restore(self) -> bool:
        """Whether it is a destination that agents do not prepare, since NEW is not known before."""
        return self.role == Role.DESTINATION and not is_known(self.maps)

    def digest(self) -> str:
        """Equal for orders that have the same prepared."""
        return hashlib.sha256(json.dumps(self._what()).encode()).hexdigest()[:32]


def parse_want(text: str) -> Want:
    """The order that *text* is; UsageError if it is none, or of a later natkeep."""
    try:
        found = as_object(text)
        if found.get("schema") != SCHEMA:
            raise ValueError(f"schema {found.get('schema')!r} is not {SCHEMA}")
        return _read(found)
    except (KeyError, TypeError, ValueError, AttributeError, NatkeepError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UsageError(f"half an order: {why}") from None


def as_object(text: str) -> dict[str, Any]:
    """The JSON object that *text* is; ValueError if it is none."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _read(found: dict[str, Any]) -> Want:
    names = (*NO_WANT.to_json(),)
    for name in found:
        if name not in names:
            raise ValueError(f"unknown key {name}")
    phase = one_of(found["phase"], "ready", "gone")
    return Want(
        whole(found["generation"]), phase == "ready", parse_role(found["role"]),
        a_text(found["netns"]), parse_maps(found["maps"]), Mode(found["mode"]),
        tuple(map(Endpoint.parse, texts(found["listeners"]))),
        Gate(one_of(found["gate"], "open", "closed")),
        {parse_name(node): Phase(phase) for node, phase in found["after"].items()},
        tuple(map(parse_name, texts(found["senders"]))), whole(found["deadline_s"], LONGEST),
        None if found["image"] is None else a_text(found["image"]),
        Listed.parse(found["conn"]), found["force"] is True, found["unopened"] is True,
    )  # fmt: skip


def parse_role(text: object) -> Role:
    """A role that a fleet orders."""
    return Role(one_of(text, *ROLES))


def parse_maps(value: object) -> tuple[Wish, ...]:
    """Maps, of which each NEW is named or `auto`."""
    if not parse_olds(texts(value)):
        raise ValueError("maps: none")
    return tuple(map(parse_map, texts(value)))


def is_known(maps: Iterable[Wish]) -> bool:
    """Whether NEW is named in each."""
    return all(wish.new is not None for wish in maps)


def make_maps(maps: Iterable[Wish]) -> tuple[Map, ...]:
    """Those whose NEW is named."""
    return tuple(wish.to(wish.new) for wish in maps if wish.new is not None)


def whole(value: object, limit: float = math.inf) -> int:
    """A number from 0 on; ValueError if it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ValueError(f"{value!r} is not a number from 0 on, or too large")
    return value


def a_text(value: object) -> str:
    """A text; ValueError if it is none."""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return value


def texts(value: object) -> list[str]:
    """A list of texts; ValueError if it is none."""
    if not isinstance(value, list):
        raise ValueError(f"{value!r} is not a list of texts")
    return [a_text(each) for each in value]


def one_of(value: object, *known: str) -> str:
    """*value*, if it is one of these; ValueError if not."""
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return str(value)


NO_WANT = Want(
    0, True, Role.GATEWAY, "", (), Mode.STATEFUL, (), Gate.OPEN, {}, (), 0, None, Listed(0, 0, "")
)  # fmt: skip
