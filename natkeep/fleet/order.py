"""A move as it is ordered: a file of a person's, and what becomes of it in the store.

The file, JSON:

    {"id": "web", "maps": ["10.2.0.10=10.3.0.20"], "image": "/images/web",
     "sites": [{"node": "host-b", "role": "destination"}, {"group": "edge", "role": "gateway"}],
     "deadline_s": 60}

and, if need be, `netns` of a site, `mode`, `listeners` (true), `phase`: `staged` orders the
destination alone, before the freeze, `frozen` (the default) all. In the place of `image` there may
be `connections`: the path of a list, as of `--connections`. Paths begin at the file's folder. NEW
may be `auto` (restored.py).

In the store it has `generation`, a greater one with each order, and `phase` may be `gone`, or
`settled` once it is: of such a one nothing else is left in the store.
`conn`, `listeners` and `image` (a run id) are what was read, and a site of a group has its members
of then.

Rule: half an order is refused by name (UsageError), and nothing is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from natkeep.errors import NatkeepError, UsageError
from natkeep.fleet import keys
from natkeep.fleet.keys import parse_name
from natkeep.fleet.want import (
    LONGEST,
    NO_WANT,
    SCHEMA,
    Listed,
    Phase,
    Want,
    a_text,
    as_object,
    one_of,
    parse_maps,
    parse_role,
    texts,
    whole,
)
from natkeep.plan.maps import Wish
from natkeep.plan.move import Mode, parse_id
from natkeep.plan.observation import Gate
from natkeep.plan.roles import ROLES, Role
from natkeep.plan.tuples import Endpoint
from natkeep.values import dataclass, replace

PHASES = ("staged", "frozen", "gone", "settled")
DEADLINE = 60
"""Seconds, where the order does not say."""
_UNDO = (Role.GATEWAY, Role.PEER, Role.SOURCE, Role.DESTINATION)
"""In which order a move is undone."""
_FILE = {
    "schema", "id", "maps", "sites", "image", "connections", "mode", "listeners", "deadline_s",
    "phase",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """One site of a move, or several alike: a node, or a group with its members."""

    role: Role
    netns: str
    nodes: tuple[str, ...]
    group: str = ""

    def key(self, move_id: str) -> str:
        """Where it is ordered."""
        folder = keys.group_wants(self.group) if self.group else keys.wants(self.nodes[0])
        return f"{folder}{move_id}"

    def to_json(self) -> dict[str, Any]:
        """As it is in the store."""
        who = {"group": self.group, "members": [*self.nodes]} if self.group else {}
        return {**(who or {"node": self.nodes[0]}), "role": str(self.role), "netns": self.netns}


@dataclass(frozen=True, slots=True)
class Order:
    """A move in the store; see above."""

    id: str
    maps: tuple[Wish, ...]
    places: tuple[Place, ...]
    mode: Mode = Mode.STATEFUL
    deadline: int = DEADLINE
    phase: str = "frozen"
    generation: int = 0
    image: str | None = None
    listeners: tuple[Endpoint, ...] = ()
    listed: Listed = Listed(0, 0, "")

    def __post_init__(self) -> None:
        roles = [place.role for place in self.places]
        if roles.count(Role.DESTINATION) != 1 or roles.count(Role.SOURCE) > 1:
            raise UsageError("sites: there is one destination, and one source at most")
        nodes = [node for node, _ in self.nodes()]
        for node in nodes:
            if nodes.count(node) > 1:
                raise UsageError(f"sites: {node} is two of them", hint="two agents, two names")
        if any(place.group and place.role != Role.GATEWAY for place in self.places):
            raise UsageError("sites: a group is of gateways")

    def is_wanted(self) -> bool:
        """Whether it is to be there, or else undone."""
        return self.phase in ("staged", "frozen")

    def nodes(self) -> Iterator[tuple[str, Place]]:
        """Each node that is ordered something, in the order of an undo."""
        for place in sorted(self.places, key=lambda place: _UNDO.index(place.role)):
            yield from ((node, place) for node in place.nodes)

    def to_json(self) -> dict[str, Any]:
        """As it is in the store."""
        return {
            "schema": SCHEMA, "id": self.id, "generation": self.generation, "phase": self.phase,
            "maps": [*map(str, self.maps)], "mode": str(self.mode), "deadline_s": self.deadline,
            "image": self.image, "listeners": [*map(str, self.listeners)],
            "conn": self.listed.to_json(),
            "sites": [place.to_json() for place in self.places],
        }  # fmt: skip

    def wants(self, *, force: bool = False, unopened: bool = False) -> dict[str, Want]:
        """What each node or group is ordered, by key.

        force: undo it even if connections live. unopened: none can, said the destination, which
        looks for itself; gateways then ask only whether they have heard of it, and the source's
        process has to be back first. Otherwise the source trusts the gateways, which have found by
        then that all have ended.

        The destination is closed before anything is sent to it. Undone is what sends first, then
        where the process was, and the destination last.
        """
        base = replace(
            NO_WANT, generation=self.generation, wanted=self.is_wanted(), maps=self.maps,
            mode=self.mode, listeners=self.listeners, deadline=self.deadline, image=self.image,
            listed=self.listed,
        )  # fmt: skip
        senders = tuple(n for n, place in self.nodes() if ROLES[place.role].passes_on)
        staged = self.phase == "staged"
        places = [p for p in self.places if p.role == Role.DESTINATION or not staged]
        forced = {
            Role.DESTINATION: force,
            Role.SOURCE: force or (bool(senders) and not unopened),
        }
        return {
            place.key(self.id): replace(
                self._want(base, place, senders),
                force=forced.get(place.role, force),
                unopened=unopened and place.role not in forced,
            )
            for place in places
        }

    def _want(self, base: Want, place: Place, senders: tuple[str, ...]) -> Want:
        ends = place.role in (Role.DESTINATION, Role.SOURCE)
        if base.wanted:
            here = place.role == Role.DESTINATION
            [destination] = [n for n, p in self.nodes() if p.role == Role.DESTINATION]
            after = {} if here else {destination: Phase.PREPARED}
        else:
            here = False
            before = _UNDO[: _UNDO.index(place.role)] if ends else ()
            after = {n: Phase.GONE for n, p in self.nodes() if p.role in before}
        gate = Gate.CLOSED if ends else Gate.OPEN
        return replace(
            base, role=place.role, netns=place.netns, gate=gate, after=after,
            senders=senders if here else (),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Where:
    """What a file says of the connections: where they are, and whether listeners follow."""

    path: str
    is_image: bool
    listeners: bool


def parse_file(text: str) -> tuple[Order, Where]:
    """The order that the file *text* is, and where its connections are.

    The members of its groups are not known yet. UsageError if it is half an order.
    """
    try:
        found = as_object(text)
        _refuse_unknown(found, _FILE)
        if found.get("schema", SCHEMA) != SCHEMA:
            raise ValueError(f"schema {found['schema']!r} is not {SCHEMA}")
        ways = [key for key in ("image", "connections") if key in found]
        if len(ways) != 1:
            raise ValueError("which connections? image, or connections")
        listeners = found.get("listeners", False)
        if not isinstance(listeners, bool):
            raise ValueError("listeners is true or false")
        where = Where(a_text(found[ways[0]]), ways == ["image"], listeners)
        order = _read(found, one_of(found.get("phase", "frozen"), "staged", "frozen"))
        if any(place.group and place.nodes for place in order.places):
            raise ValueError("unknown key members")
    except (KeyError, TypeError, ValueError, AttributeError, NatkeepError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UsageError(f"half an order: {why}") from None
    return order, where


def parse_order(text: str) -> Order:
    """A move as it is in the store; UsageError if it cannot be read."""
    try:
        found = as_object(text)
        if found["schema"] != SCHEMA:
            raise ValueError(f"schema {found['schema']!r} is not {SCHEMA}")
        order = _read(found, one_of(found["phase"], *PHASES))
        return replace(
            order, generation=whole(found["generation"]), listed=Listed.parse(found["conn"]),
            listeners=tuple(map(Endpoint.parse, texts(found["listeners"]))),
            image=None if found["image"] is None else a_text(found["image"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError, NatkeepError) as error:
        raise UsageError(f"a move in the store cannot be read: {error}") from None


def _read(found: dict[str, Any], phase: str) -> Order:
    if not isinstance(found["sites"], list):
        raise ValueError("sites is not a list")
    return Order(
        parse_id(a_text(found["id"])), parse_maps(found["maps"]),
        tuple(map(_read_place, found["sites"])), Mode(found.get("mode", Mode.STATEFUL)),
        whole(found.get("deadline_s", DEADLINE), LONGEST), phase,
    )  # fmt: skip


def _read_place(found: Mapping[str, Any]) -> Place:
    _refuse_unknown(found, {"node", "group", "members", "role", "netns"})
    role, netns = parse_role(found["role"]), a_text(found.get("netns", ""))
    if ("group" in found) == ("node" in found):
        raise ValueError("a site is of a node, or else of a group")
    if "group" in found:
        members = tuple(map(parse_name, texts(found.get("members", []))))
        return Place(role, netns, members, parse_name(a_text(found["group"])))
    _refuse_unknown(found, {"node", "role", "netns"})
    return Place(role, netns, (parse_name(a_text(found["node"])),))


def _refuse_unknown(found: Mapping[str, Any], known: Collection[str]) -> None:
    for key in found:
        if key not in known:
            raise ValueError(f"unknown key {key}")
