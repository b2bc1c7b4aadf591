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
from collections.abc import Iterable, Iterator
from enum import StrEnum
from functools import lru_cache

from natkeep.errors import RefusedError, UsageError
from natkeep.plan.lock import DumpLock
from natkeep.plan.tuples import (
    NO_CONNECTIONS,
    Address,
    Connections,
    Endpoint,
    FourTuple,
    parse_address,
    refuse_zone,
)
from natkeep.values import dataclass, replace

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
    STATELESS = "stateless"


class Fate(StrEnum):
    """What becomes of connections that cannot be kept; the value is what `--unkept` takes."""

    REPORT = "report"
    RESET = "reset"


SUPPORTED_ROLES = (Role.GATEWAY, Role.DESTINATION, Role.SOURCE)
"""In the order in which they are prepared and opened: gateway entries exist before the
destination can emit a packet, since a half-translated connection is reset, not stalled. The source
last: until then CRIU's lock keeps it quiet, and it must not go before all else is there."""


def is_id(text: str) -> bool:
    """Whether *text* may be the id of a move."""
    return _ID.fullmatch(text) is not None


def parse_id(text: str) -> str:
    """The id of a move: a letter or digit, then up to 31 of `a-z 0-9 -`."""
    if not is_id(text):
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
            refuse_zone(address)
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


def parse_olds(texts: Iterable[str]) -> tuple[Address, ...]:
    """The OLD of each `OLD=NEW`, where a move could be made of them: refused as there."""
    olds: list[Address] = []
    for text in texts:
        old, new = parse_map(text)
        if new is not None:
            Map(old, new)
        _refuse_special("OLD", old)
        if old in olds:
            raise UsageError("one OLD is mapped twice")
        olds.append(old)
    return tuple(olds)


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
    """What the user wants: OLD becomes NEW, at these sites.

    listeners: OLD and port of each listener that new connections shall reach (`--listeners`).
    lock: what CRIU left at the source when it dumped the process; None where nobody knows.
    held: listeners at the source whose new connections wait (`quiesce`).
    quiesces: nothing moves yet; the listeners are held, and that is all.
    unkept: what becomes of connections at an OLD that cannot be kept; where they are reset, lost
    is those of them that are not among the connections that a plan is made for.
    hold: what peers say while the destination's gate is closed is kept, and delivered at open.
    guard: a flush of the ruleset shall not end the kept connections (kernel/guard.py).
    live: the connections were read while the process ran. Until it is frozen nothing may come
    between it and its peers, so all sites but the destination wait for `open`.
    """

    id: str
    maps: tuple[Map, ...]
    sites: tuple[Site, ...]
    mode: Mode = Mode.STATEFUL
    listeners: tuple[Endpoint, ...] = ()
    lock: DumpLock | None = None
    held: tuple[Endpoint, ...] = ()
    quiesces: bool = False
    unkept: Fate = Fate.REPORT
    lost: Connections = NO_CONNECTIONS
    hold: bool = False
    guard: bool = False
    live: bool = False

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
        for role in (Role.DESTINATION, Role.SOURCE):
            if roles.count(role) > 1:
                raise UsageError(f"a move has one {role}")
        if self.live and Role.SOURCE in roles:
            raise UsageError(
                "the source of a live process cannot be kept quiet yet",
                hint="after the dump: natkeep prepare ANOTHER-ID --site source --image DIR",
            )

    def homes(self) -> tuple[Site, ...]:
        """Where the process may live: at the destination, or back at the source.

        At the source only of a move that has no other site: opening gateway and destination for a
        process that came home would have them answer its peers with resets.
        """
        if self.quiesces:
            return ()
        alone = {site.role for site in self.sites} == {Role.SOURCE}
        home = Role.SOURCE if alone else Role.DESTINATION
        return tuple(site for site in self.sites if site.role == home)

    @property
    def holds(self) -> bool:
        """Whether there is a destination that holds what peers say, and something to hold."""
        return self.hold and any(site.role == Role.DESTINATION for site in self.sites)

    def waits(self, site: Site) -> bool:
        """Whether *site* is made ready by `open` only, since the process was not frozen before."""
        return self.live and site.role != Role.DESTINATION

    def ordered_sites(self) -> tuple[Site, ...]:
        """Sites in the order in which they are opened, and as a rule prepared: gateways first."""
        return tuple(sorted(self.sites, key=lambda site: SUPPORTED_ROLES.index(site.role)))


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What make_plan has to know of the sites; observed by kernel/, kept in the journal.

    local: peers' addresses that are local to the destination: they reach OLD through its lo.
    carried: connections that a gateway translates already, as the process sees them, and
    carriers: the same ones, in the same order, as their peers see them (a published port: the
    local address is the one that was published; a masqueraded client: its own address).
    """

    local: frozenset[Address] = frozenset()
    carried: Connections = NO_CONNECTIONS
    carriers: Connections = NO_CONNECTIONS

    def carry_on(self, earlier: Surroundings, connections: Connections) -> Surroundings:
        """With those of *connections* that an *earlier* move, now replaced, took over itself.

        Its own translation hides from a look at the gateway what the gateway did before.
        """
        wanted = set(connections) if len(earlier.carried) else set()
        pairs = zip(earlier.carried, earlier.carriers, strict=True)
        taken = {inner: outer for inner, outer in pairs if inner in wanted}
        taken |= dict(zip(self.carried, self.carriers, strict=True))
        return replace(self, carried=Connections.of(taken), carriers=Connections.of(taken.values()))


NOTHING_SPECIAL = Surroundings()
"""No peer is at the destination, and no gateway translates yet."""


@dataclass(frozen=True, slots=True)
class Change:
    """How the connections of an image differ from those that a live process had at prepare.

    came: connections that the move was not prepared for; went: those that it was, and that the
    image does not have. surroundings: as seen when they were compared.
    """

    came: Connections = NO_CONNECTIONS
    went: Connections = NO_CONNECTIONS
    surroundings: Surroundings = NOTHING_SPECIAL


@dataclass(frozen=True, slots=True)
class Compared:
    """How many connections the image has that were not prepared, and the other way round.

    unkept: in words, those that came and cannot be kept.
    """

    came: int
    went: int
    unkept: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Translation:
    """At *site*, packets of *outer* leave as *inner*; replies the other way round.

    Three views of the same connections, in the same order: *kept* as the process sees them,
    *outer* as packets from the peer arrive at the site, *inner* as they leave it. All have one
    local address each; ports differ only where a gateway published another one, and peers only
    where it masquerades them. Where they do not, one of *outer* and *inner* is *kept* itself.
    number: part of the names of the sets; unique at a site.
    """

    site: Site
    number: int
    map: Map
    mode: Mode
    kept: Connections
    outer: Connections
    inner: Connections

    @property
    def before(self) -> Address:
        """Where a peer's packet is addressed when it reaches the site."""
        packed = self.outer.v4[:4] or self.outer.v6[:16]
        for known in (self.map.old, self.map.new):
            if known.packed == packed:
                return known
        return ipaddress.ip_address(packed)  # a port that a gateway publishes

    @property
    def after(self) -> Address:
        """Where a peer's packet is addressed when it leaves the site."""
        return self.map.new if self.site.role == Role.GATEWAY else self.map.old

    @property
    def renames(self) -> bool:
        """Whether peers or ports change too, not the local address alone."""
        if self.outer is self.kept or self.inner is self.kept:  # the usual case, without a look
            return False
        return _differ(self.outer, self.inner, self.after)

    def ports(self) -> tuple[int, int]:
        """The local port outside and inside, of a translation that renames."""
        outer, inner = next(iter(self.outer)), next(iter(self.inner))
        return outer.destination.port, inner.destination.port

    def tuples(self) -> Iterator[tuple[FourTuple, FourTuple]]:
        """For each kept connection its tuple (peer to process) before and after the site."""
        return zip(self.outer, self.inner, strict=True)


@lru_cache(maxsize=4)  # asked for each line that is rendered, of one translation after the other
def _differ(outer: Connections, inner: Connections, after: Address) -> bool:
    return outer.toward(after) != inner


@dataclass(frozen=True, slots=True)
class Unkept:
    """A connection of the move that cannot be kept, and why."""

    inbound: FourTuple
    reason: str


def make_translations(
    move: Move,
    connections: Connections,
    surroundings: Surroundings = NOTHING_SPECIAL,
    change: Change | None = None,
) -> tuple[tuple[Translation, ...], tuple[Unkept, ...]]:
    """Every translation that *move* needs for *connections*, gateways first; and what is lost.

    With a *change*, the destination, which stands prepared, has translations of what came besides
    the others; sites that waited translate just what the image has.

    RefusedError when no connection has one of the move's OLD addresses (the usual cause is a
    typing error, and an empty translation would look like success), when none of them can be
    kept, or when there are too many.
    """
    found = [connections.at(map_.old) for map_ in move.maps]
    count = sum(len(some) for some in found) + len(move.lost)
    if not count and not (move.listeners or move.quiesces):
        olds = ", ".join(str(map_.old) for map_ in move.maps)
        raise RefusedError(
            f"none of the {len(connections)} connections has the local address {olds}",
            hint="natkeep inspect shows what there is",
        )
    if count > MAX_CONNECTIONS:
        raise RefusedError(f"{count} connections are more than {MAX_CONNECTIONS}")
    unkept = tuple(_find_unkept(move, found))
    kept = [_without(some, unkept) for some in found]
    unwanted = move.unkept == Fate.REPORT and not move.listeners
    if unkept and not any(len(some) for some in kept) and unwanted:
        raise RefusedError(f"{unkept[0].inbound}: {unkept[0].reason}", hint=f"{count} in all")
    came: list[Connections] = []
    if change is not None:
        found = [change.came.at(map_.old) for map_ in move.maps]
        if count + sum(len(some) for some in found) > MAX_CONNECTIONS:
            raise RefusedError(f"with those that came they are more than {MAX_CONNECTIONS}")
        late = tuple(_find_unkept(move, found))
        unkept, came = (*unkept, *late), [_without(some, late) for some in found]
    both = [_join(*pair) for pair in zip(kept, came, strict=True)] if came else kept
    _refuse_one_tuple_for_two(move, both)
    translations: list[Translation] = []
    for site in move.ordered_sites():
        here: list[Translation] = []
        waited = change is not None and move.waits(site)
        around = change.surroundings if change is not None and waited else surroundings
        for map_, some in zip(move.maps, both if waited else kept, strict=True):
            there = some.minus(change.went) if change is not None and waited else some
            here += _translate_at(site, len(here), map_, move.mode, there, around)
        if change is not None and not waited:
            for map_, some in zip(move.maps, came, strict=True):
                here += _translate_at(site, len(here), map_, move.mode, some, change.surroundings)
        translations += here
    _refuse_what_the_mode_cannot(move, translations)
    return tuple(translations), unkept


def _join(one: Connections, other: Connections) -> Connections:
    return Connections(one.v4 + other.v4, one.v6 + other.v6)


def _refuse_one_tuple_for_two(move: Move, kept: list[Connections]) -> None:
    """Two OLD may become one NEW, but no peer may have used one port to one port of both."""
    seen: dict[Address, set[FourTuple]] = {}
    news = [map_.new for map_ in move.maps]
    for new, some in zip(news, kept, strict=True):
        if news.count(new) == 1:
            continue
        taken = seen.setdefault(new, set())
        for tuple_ in some.toward(new):
            if tuple_ in taken:
                raise RefusedError(
                    f"{tuple_} would stand for two connections",
                    hint=f"these two OLD cannot both become {new}",
                )
            taken.add(tuple_)


def _refuse_what_the_mode_cannot(move: Move, translations: list[Translation]) -> None:
    for translation in translations:
        if move.mode == Mode.STATELESS and translation.renames:
            outer, inner = next(translation.tuples())
            raise RefusedError(
                f"{translation.site} translates already: {outer} is {inner} inside; that is "
                "conntrack's work, which mode stateless does without",
                hint="--mode stateful takes such connections over",
            )


def _find_unkept(move: Move, found: list[Connections]) -> Iterator[Unkept]:
    olds = {map_.old for map_ in move.maps}
    suspects = {old.packed for old in olds}
    for some in found:
        # Only a peer that has an OLD address, or none that a wire carries, is looked at closer.
        if not some.may_have_peer(suspects) and not some.has_special_peer():
            continue
        for inbound in some:
            peer = inbound.source.address
            if peer in olds:
                yield Unkept(inbound, f"its peer {peer} is on the source host too")
            elif peer.is_loopback or peer.is_unspecified or peer.is_multicast:
                yield Unkept(inbound, f"its peer {peer} is not on any wire")
            elif peer.is_link_local:
                yield Unkept(inbound, f"its peer {peer} is link-local: no gateway passes it on")


def _without(some: Connections, unkept: tuple[Unkept, ...]) -> Connections:
    if not unkept:
        return some
    lost = {entry.inbound for entry in unkept}
    return Connections.of(inbound for inbound in some if inbound not in lost)


def _translate_at(
    site: Site,
    number: int,
    map_: Map,
    mode: Mode,
    kept: Connections,
    surroundings: Surroundings,
) -> Iterator[Translation]:
    """The translations of one map at one site, numbered from *number*; *kept* are at its OLD."""
    if not len(kept):
        return
    if site.role == Role.SOURCE:
        yield Translation(site, number, map_, mode, kept, kept, kept)
        return
    if site.role == Role.DESTINATION:
        yield Translation(site, number, map_, mode, kept, kept.toward(map_.new), kept)
        return
    groups = _group_carried(map_, surroundings)
    carried = {inbound for pairs in groups for inbound, _ in pairs}
    plain = Connections.of(i for i in kept if i not in carried) if carried else kept
    if len(plain):
        yield Translation(site, number, map_, mode, plain, plain, plain.toward(map_.new))
        number += 1
    for pairs in groups:
        own = Connections.of(inbound for inbound, _ in pairs)
        outer = Connections.of(outer for _, outer in pairs)
        yield Translation(site, number, map_, mode, own, outer, own.toward(map_.new))
        number += 1


def _group_carried(
    map_: Map, surroundings: Surroundings
) -> list[list[tuple[FourTuple, FourTuple]]]:
    """Carried connections of *map_*, grouped so that each group has one local end on each side."""
    groups: dict[tuple[Endpoint, Endpoint], list[tuple[FourTuple, FourTuple]]] = {}
    for inner, outer in zip(surroundings.carried, surroundings.carriers, strict=True):
        if inner.destination.address == map_.old:
            ends = (outer.destination, inner.destination)
            groups.setdefault(ends, []).append((inner, outer))
    return [groups[ends] for ends in sorted(groups)]
