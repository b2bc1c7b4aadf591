"""the wish: what the operator wants moved where, and the translations that follow from it.

Rule: a value from this file has been validated; what is built on it does not check again.
Nothing here knows how a translation is carried out (that is ruleset.py and entries.py), and
nothing here may read a file, a clock, a socket or a namespace.

Theory of operation. The process and its peers keep their four-tuples for ever. Between the
gateway and the destination the wire shows NEW instead of OLD:

    peer ── OLD ── gateway ── NEW ── destination ── OLD ── process

So the gateway turns OLD into NEW and the destination NEW into OLD, each for packets that come
from a peer, and each the reverse for packets that go to one. The direction *peer to process*
is always the original one, whoever dialled: then it is always DNAT at prerouting.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from natkeep.errors import RefusedError, UsageError
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple, parse_address

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")

MAX_CONNECTIONS = 1_000_000
"""More than this in one move is refused; a conntrack table of usual size is full long before."""


class Role(StrEnum):
    """What a site is to a move."""

    DESTINATION = "destination"
    GATEWAY = "gateway"
    PEER = "peer"
    SOURCE = "source"


class Mode(StrEnum):
    """How a translation is carried out at a site."""

    STATEFUL = "stateful"


SUPPORTED_ROLES = (Role.GATEWAY, Role.DESTINATION)
"""In the order in which they are prepared and opened: gateway entries exist before the
destination can emit a packet, since a half-translated connection is reset, not stalled."""


def parse_id(text: str) -> str:
    """The id of a move: a letter or digit, then up to 31 of `a-z 0-9 -`."""
    if not _ID.fullmatch(text):
        raise UsageError(
            f"{text!r} is not an id",
            hint="a lower-case letter or digit, then up to 31 of a-z, 0-9 and -",
        )
    return text


@dataclass(frozen=True, slots=True)
class Site:
    """A network namespace with a role.

    netns: a name below /run/netns, a path, `pid:N`, or empty for the namespace we are in.
    """

    role: Role
    netns: str = ""

    def __str__(self) -> str:
        return f"{self.role}={self.netns}" if self.netns else str(self.role)

    @classmethod
    def parse(cls, text: str) -> Site:
        """`ROLE` or `ROLE=NETNS`."""
        role, _, netns = text.partition("=")
        try:
            site = cls(Role(role), netns)
        except ValueError:
            raise UsageError(
                f"{role!r} is not a role of a site",
                hint="one of " + ", ".join(role.value for role in Role),
            ) from None
        if site.role not in SUPPORTED_ROLES:
            raise RefusedError(f"natkeep does not translate at a site of role {site.role} yet")
        return site


@dataclass(frozen=True, slots=True)
class Map:
    """OLD becomes NEW; both of one family, both unicast and not loopback."""

    old: Address
    new: Address

    def __post_init__(self) -> None:
        if self.old.version != self.new.version:
            raise UsageError(f"{self.old} and {self.new} are of different families")
        if self.old == self.new:
            raise UsageError(f"OLD and NEW are both {self.old}: there is nothing to translate")
        for name, address in (("OLD", self.old), ("NEW", self.new)):
            _refuse_special(name, address)

    def __str__(self) -> str:
        return f"{self.old}={self.new}"


def parse_map(text: str) -> tuple[Address, Address | None]:
    """`OLD=NEW`, where NEW may be `auto` (then None: it is read at the destination)."""
    old, equals, new = text.partition("=")
    if not equals:
        raise UsageError(f"{text!r} is not of the form OLD=NEW")
    try:
        return parse_address(old), None if new == "auto" else parse_address(new)
    except ValueError as error:
        raise UsageError(f"--map {text}: {error}") from None


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


@dataclass(frozen=True, slots=True)
class Move:
    """What the user wants: OLD becomes NEW, at these sites."""

    id: str
    maps: tuple[Map, ...]
    sites: tuple[Site, ...]
    mode: Mode = Mode.STATEFUL

    def __post_init__(self) -> None:
        parse_id(self.id)
        if not self.maps:
            raise UsageError("no --map OLD=NEW: which address becomes which?")
        olds = [map_.old for map_ in self.maps]
        if len(set(olds)) != len(olds):
            raise UsageError("one OLD is mapped twice")
        if set(olds) & {map_.new for map_ in self.maps}:
            raise RefusedError("an address is both an OLD and a NEW of this move")
        if not self.sites:
            raise UsageError("no site")
        if len({site.netns for site in self.sites}) != len(self.sites):
            raise UsageError("two sites are the same namespace")
        roles = [site.role for site in self.sites]
        if roles.count(Role.DESTINATION) > 1:
            raise UsageError("a move has one destination")

    def ordered_sites(self) -> tuple[Site, ...]:
        """Sites in the order in which they are prepared and opened: gateways first."""
        return tuple(sorted(self.sites, key=lambda site: SUPPORTED_ROLES.index(site.role)))


@dataclass(frozen=True, slots=True)
class Translation:
    """At *site*, packets from peers to *before* leave for *after*; replies the other way round.

    It concerns exactly the *kept* connections (whose local address is OLD in every one of
    them, since that is what the process sees); ports are never changed.
    number: which of the move's maps this is; it is part of the name of the set of kept
    connections.
    """

    site: Site
    number: int
    map: Map
    kept: Connections

    @property
    def before(self) -> Address:
        """Where a peer's packet is addressed when it reaches the site."""
        return self.map.new if self.site.role == Role.DESTINATION else self.map.old

    @property
    def after(self) -> Address:
        """Where a peer's packet is addressed when it leaves the site."""
        return self.map.old if self.site.role == Role.DESTINATION else self.map.new

    def tuples(self) -> Iterator[tuple[FourTuple, FourTuple]]:
        """For each kept connection its tuple (peer to process) before and after the site."""
        for inbound in self.kept:
            yield _toward(inbound, self.before), _toward(inbound, self.after)


def _toward(inbound: FourTuple, local: Address) -> FourTuple:
    return FourTuple(inbound.source, Endpoint(local, inbound.destination.port))


def make_translations(move: Move, connections: Connections) -> tuple[Translation, ...]:
    """Every translation that *move* needs for *connections*, gateways first.

    RefusedError when no connection has one of the move's OLD addresses (the usual cause is a
    typing error, and an empty translation would look like success), or when there are too many.
    """
    kept = [connections.at(map_.old) for map_ in move.maps]
    count = sum(len(some) for some in kept)
    if not count:
        olds = ", ".join(str(map_.old) for map_ in move.maps)
        raise RefusedError(
            f"none of the {len(connections)} connections has the local address {olds}",
            hint="natkeep inspect shows what there is",
        )
    if count > MAX_CONNECTIONS:
        raise RefusedError(f"{count} connections are more than {MAX_CONNECTIONS}")
    return tuple(
        Translation(site, number, map_, kept[number])
        for site in move.ordered_sites()
        for number, map_ in enumerate(move.maps)
        if len(kept[number])
    )
