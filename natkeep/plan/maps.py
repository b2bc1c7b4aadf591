"""the maps: which address becomes which, all its ports or one of them.

Rule: what two maps of one OLD mean is told here alone. A connection goes by the map of its port, or
by the one without a port where there is no such map.
This file must never look at a machine.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable
from typing import NamedTuple

from natkeep.errors import RefusedError, UsageError
from natkeep.plan.tuples import (
    Address,
    Connections,
    Endpoint,
    Local,
    address_of,
    parse_local,
    parse_port,
    refuse_zone,
)
from natkeep.values import dataclass

_ANY = ipaddress.IPv4Address(0)


@dataclass(frozen=True, slots=True)
class Map:
    """OLD becomes NEW; both of one family, both unicast and not loopback.

    old_port, new_port: it is of one port of OLD, and which one the wire to NEW shows for it. None:
    of all ports of OLD that have no map of their own; the wire shows the same.
    """

    old: Address
    new: Address
    old_port: int | None = None
    new_port: int | None = None

    def __post_init__(self) -> None:
        _refuse_half(str(self), self.old_port, self.new_port)
        if self.old.version != self.new.version:
            raise UsageError(f"{self.old} and {self.new} are of different families")
        if self.old == self.new:
            raise UsageError(f"OLD and NEW are both {self.old}: there is nothing to translate")
        for name, address in (("OLD", self.old), ("NEW", self.new)):
            refuse_zone(address)
            _refuse_special(name, address)
        for port in (self.old_port, self.new_port):
            if port is not None:
                Endpoint(self.old, port)  # looks at its range

    def __str__(self) -> str:
        return f"{self.old_end}={self.new_end}"

    def to_json(self) -> dict[str, str | int]:
        """As journals and `--json` have it: the ports only where it has some."""
        ends: dict[str, str | int] = {"old": str(self.old), "new": str(self.new)}
        ports = {"old_port": self.old_port, "new_port": self.new_port}
        return ends | {name: port for name, port in ports.items() if port is not None}

    @property
    def old_end(self) -> Local:
        """OLD, with its port if the map has one."""
        return _end(self.old, self.old_port)

    @property
    def turns_ports(self) -> bool:
        """Whether the wire to NEW shows another port than the socket has."""
        return self.old_port != self.new_port

    @property
    def new_end(self) -> Local:
        """NEW, with its port if the map has one."""
        return _end(self.new, self.new_port)

    def on_wire(self, end: Endpoint) -> Endpoint:
        """What the wire to NEW shows for *end*, which goes by this map."""
        return Endpoint(self.new, self.new_port or end.port)


def _end(address: Address, port: int | None) -> Local:
    return address if port is None else Endpoint(address, port)


def _refuse_half(text: str, *ports: int | None) -> None:
    if None in ports and set(ports) != {None}:
        raise UsageError(f"--map {text}: a port on one side only", hint="OLD:PORT=NEW:PORT")


def make_map(old: Local, new: Local) -> Map:
    """The map of these two ends."""
    ports = (end.port if isinstance(end, Endpoint) else None for end in (old, new))
    return Map(address_of(old), address_of(new), *ports)


def find_map(maps: Iterable[Map], end: Endpoint) -> Map | None:
    """The one that *end*, at an OLD, goes by: a map of its port before one of all ports."""
    by_end = {map_.old_end: map_ for map_ in maps}
    return by_end.get(end) or by_end.get(end.address)


def share(maps: Iterable[Map], connections: Connections) -> list[Connections]:
    """Those of *connections* that go by each of the *maps*, in the order of these."""
    maps = tuple(maps)
    found = [connections.at(map_.old_end) for map_ in maps]
    for place, map_ in enumerate(maps):
        if map_.old_port is None:
            pairs = zip(maps, found, strict=True)
            own = (some for one, some in pairs if one.old == map_.old and one is not map_)
            found[place] = found[place].minus(Connections.joined(own))
    return found


class Wish(NamedTuple):
    """What a `--map` says; new: None where it is `auto`, which is read at the destination."""

    old: Address
    old_port: int | None
    new: Address | None
    new_port: int | None

    def __str__(self) -> str:
        port = "" if self.new_port is None else f":{self.new_port}"
        new = f"auto{port}" if self.new is None else _end(self.new, self.new_port)
        return f"{self.old_end}={new}"

    @property
    def old_end(self) -> Local:
        """OLD, with its port if there is one."""
        return _end(self.old, self.old_port)

    def to(self, new: Address) -> Map:
        """The map, with *new* as its NEW."""
        return Map(self.old, new, self.old_port, self.new_port)


_WANTED = "OLD and NEW are addresses, no names: getent ahosts NAME tells those of a name"


def parse_map(text: str) -> Wish:
    """`OLD=NEW` or `OLD:PORT=NEW:PORT` (IPv6 with a port in brackets); NEW may be `auto`."""
    old, equals, new = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is not of the form OLD=NEW")
    try:
        here, there = parse_local(old), _parse_new(new)
    except ValueError as error:
        raise UsageError(f"--map {text}: {error}", hint=_WANTED) from None
    wish = Wish(address_of(here), here.port if isinstance(here, Endpoint) else None, *there)
    _refuse_half(text, wish.old_port, wish.new_port)
    return wish


def _parse_new(text: str) -> tuple[Address | None, int | None]:
    auto, colon, port = text.partition(":")
    if auto == "auto":
        return None, Endpoint(_ANY, parse_port(port)).port if colon else None
    new = parse_local(text)
    return address_of(new), new.port if isinstance(new, Endpoint) else None


def parse_peer_map(text: str) -> Map:
    """`P=Q` or `P:PORT=Q:PORT`: peers at P have moved and are reached at Q."""
    wish = parse_map(text)
    if wish.new is None:
        raise UsageError(f"--peer-map {text}: auto is read at no site", hint="name the address")
    try:
        return wish.to(wish.new)
    except (UsageError, RefusedError) as error:
        raise type(error)(f"--peer-map {text}: {error}", hint=error.hint) from None


def parse_olds(texts: Iterable[str]) -> tuple[Local, ...]:
    """The OLD of each `OLD=NEW`, where a move could be made of them: refused as there."""
    olds: list[Local] = []
    for wish in map(parse_map, texts):
        if wish.new is not None:
            wish.to(wish.new)
        _refuse_special("OLD", wish.old)
        refuse_twice(wish.old_end, olds)
        olds.append(wish.old_end)
    return tuple(olds)


def refuse_twice(end: Local, others: Collection[Local]) -> None:
    if end in others:
        what = end if isinstance(end, Endpoint) else "one OLD"
        raise UsageError(f"{what} is mapped twice")


def _refuse_special(name: str, address: Address) -> None:
    """Addresses that never name one host on the wire are not moved (threat T1)."""
    reasons = {
        "loopback": address.is_loopback,
        "unspecified": address.is_unspecified,
        "multicast": address.is_multicast,
        "link-local": address.is_link_local,
        "broadcast": address == ipaddress.IPv4Address("255.255.255.255"),
    }
    for reason, applies in reasons.items():
        if applies:
            raise RefusedError(f"{name} {address} is {reason}", hint="name a unicast address")
