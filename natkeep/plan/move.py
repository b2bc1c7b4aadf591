"""the wish: what the operator wants moved, from which address to which, and at which sites.

Rule: a value from this file has been validated; what is built on it does not check again.
Nothing here knows what follows from a move (that is kept_connections.py), and nothing here may read
a file, a clock, a socket or a namespace.
"""

from __future__ import annotations

import re
from enum import StrEnum

from natkeep.errors import RefusedError, UsageError
from natkeep.plan.criu_lock import DumpLock
from natkeep.plan.maps import Map, refuse_twice, share
from natkeep.plan.roles import ROLES, Role, RoleRow
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint
from natkeep.plan.via import Via
from natkeep.values import dataclass

ID = r"(?!at-[A-Za-z0-9-]*_)[A-Za-z0-9][A-Za-z0-9_-]{0,31}"
"""The form of a move's id; `at-` with a `_` is that of an IPv6 address in the names of chains."""
_ID = re.compile(ID)


class Mode(StrEnum):
    """How a translation is carried out at a site."""

    STATEFUL = "stateful"
    STATELESS = "stateless"


class Fate(StrEnum):
    """What becomes of connections that cannot be kept; the value is what `--unkept` takes."""

    REPORT = "report"
    RESET = "reset"


class Datagrams(StrEnum):
    """What a hook's orders say of UDP; `--no-udp` is the command line's word for the second."""

    KEEP = "keep"
    LEAVE = "leave"


def is_id(text: str) -> bool:
    """Whether *text* may be the id of a move."""
    return _ID.fullmatch(text) is not None


def parse_id(text: str) -> str:
    """The id of a move: a letter or digit, then up to 31 of `a-z A-Z 0-9 - _`."""
    if not is_id(text):
        raise UsageError(
            f"{text!r} is not an id",
            hint="a letter or digit, then up to 31 of a-z, A-Z, 0-9, - and _; not at- with a _",
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

    @property
    def row(self) -> RoleRow:
        """What follows from its role."""
        return ROLES[self.role]

    @classmethod
    def parse(cls, text: str) -> Site:
        """`ROLE` or `ROLE=NETNS`."""
        role, _, netns = text.partition("=")
        try:
            return cls(Role(role), netns)
        except ValueError:
            raise UsageError(
                f"{role!r} is not a role of a site",
                hint="one of " + ", ".join(role.value for role in Role),
            ) from None


@dataclass(frozen=True, slots=True)
class Move:
    """What the user wants: OLD becomes NEW, at these sites.

    listeners: OLD and port of each listener that new connections shall reach (`--listeners`).
    lock: what CRIU left at the source when it dumped the process; None where that is not known.
    held: listeners at the source whose new connections wait (`quiesce`).
    quiesces: nothing moves yet; the listeners are held, and that is all.
    unkept: what becomes of connections at an OLD that cannot be kept; where they are reset, lost
    is those of them that are not among the connections that a plan is made for.
    hold: what peers say while the destination's gate is closed is kept, and delivered at open.
    guard: a flush of the ruleset shall not end the kept connections (kernel/owned_table.py).
    live: the connections were read while the process ran. Until it is frozen nothing may come
    between it and its peers, so all sites but the destination wait for `open`.
    peer_maps: peers at its `old` have moved themselves, and are at its `new` on all wires.
    vias: of a move with a relay its addresses and ports, by which the destination knows all peers.
    udp: the UDP sockets at an OLD that are connected; the move's other connections are TCP's.
    udp_servers: OLD and port of each UDP socket that is not: any peer may speak to it.
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
    peer_maps: tuple[Map, ...] = ()
    vias: tuple[Via, ...] = ()
    udp: Connections = NO_CONNECTIONS
    udp_servers: tuple[Endpoint, ...] = ()

    def __post_init__(self) -> None:
        parse_id(self.id)
        if not self.maps:
            raise UsageError("no --map OLD=NEW: which address becomes which?")
        for place, map_ in enumerate(self.maps):
            refuse_twice(map_.old_end, [one.old_end for one in self.maps[:place]])
        if {map_.old for map_ in self.maps} & {map_.new for map_ in self.maps}:
            raise RefusedError("an address is both an OLD and a NEW of this move")
        if not self.sites:
            raise UsageError("no site")
        if len({site.netns for site in self.sites}) != len(self.sites):
            raise UsageError("two sites are the same namespace")
        self._refuse_peer_maps()
        if self.mode == Mode.STATELESS and any(site.row.own for site in self.sites):
            raise RefusedError(
                "mode stateless translates nothing at the peers' own host",
                hint="--site peer needs --mode stateful",
            )
        if self.mode == Mode.STATELESS and any(one.turns_ports for one in self.maps):
            raise RefusedError(
                "mode stateless translates no ports",
                hint="a map to another port needs --mode stateful",
            )
        self._refuse_vias()
        roles = [site.role for site in self.sites]
        for role in (Role.DESTINATION, Role.SOURCE, Role.RELAY):
            if roles.count(role) > 1:
                raise UsageError(f"a move has one {role}")
        if self.live and Role.SOURCE in roles:
            raise UsageError(
                "the source of a live process cannot be kept quiet yet",
                hint="after the dump: natkeep prepare ANOTHER-ID --site source --image DIR",
            )

    def _refuse_peer_maps(self) -> None:
        ends = {end for map_ in self.maps for end in (map_.old, map_.new)}
        peers = [one.old_end for one in self.peer_maps]
        for one in self.peer_maps:
            if peers.count(one.old_end) > 1:
                raise UsageError(f"--peer-map maps {one.old_end} twice")
            for end in {one.old, one.new} & ends:
                raise RefusedError(f"--peer-map {one}: {end} is an OLD or a NEW of this move")
        if self.peer_maps and self.mode == Mode.STATELESS:
            raise RefusedError(
                "mode stateless translates no peers", hint="--peer-map needs --mode stateful"
            )

    def _refuse_vias(self) -> None:
        roles = {site.role for site in self.sites}
        if not (self.vias or Role.RELAY in roles):
            return
        if Role.SOURCE in roles:
            raise UsageError("a relay is the source site, too", hint="leave --site source out")
        for role in roles - {Role.RELAY, Role.DESTINATION}:
            raise RefusedError(
                f"a move by a relay has no {role}: what passes on to the relay is left alone",
                hint="leave --via out" if self.vias else f"leave --site {role} out",
            )
        self._refuse_what_a_relay_cannot()
        for map_ in self.maps:
            if not any(via.source.version == map_.old.version for via in self.vias):
                raise RefusedError(
                    f"no --via of IPv{map_.old.version}: which address of the relay is for {map_}?"
                )
        ends = {end for map_ in self.maps for end in (map_.old, map_.new)}
        for via in self.vias:
            if via.source in ends:
                raise RefusedError(
                    f"--via {via}: {via.source} is an OLD or a NEW of this move",
                    hint="the relay needs an address beside OLD: ip addr add",
                )

    def _refuse_what_a_relay_cannot(self) -> None:
        no = "is not for a move by a relay"
        if self.mode == Mode.STATELESS:
            raise RefusedError(f"--mode stateless {no}", hint="--mode stateful is")
        if self.listeners:
            raise RefusedError(
                f"--listeners {no}: callers would show the relay's address",
                hint="that takes a tunnel from the relay, which is not built",
            )
        if self.live:
            raise RefusedError(f"--live {no}", hint="after the dump: --image DIR")
        if self.unkept == Fate.RESET:
            raise RefusedError(f"--unkept reset {no}", hint="leave it out: they are reported")

    def on_wire(self, connections: Connections) -> Connections:
        """*connections* with their peers as they are on the wires of this move."""
        names = {one.old_end.packed: one.new_end.packed for one in self.peer_maps}
        return connections.rename_peers(names) if names else connections

    def share(self, connections: Connections) -> list[Connections]:
        """Those of *connections* that go by each map, in the order of the maps."""
        return share(self.maps, connections)

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

    def why_no_udp(self, *, server: bool = False) -> str:
        """Why it keeps none of UDP, or no socket there that any peer may speak to; or nothing."""
        if self.mode == Mode.STATELESS:
            return "mode stateless keeps no UDP"
        if server and (self.vias or any(site.row.relays for site in self.sites)):
            return "behind a relay its new peers would have the relay's address"
        return ""

    @property
    def kept_servers(self) -> tuple[Endpoint, ...]:
        """OLD and port of its UDP sockets without a peer, where it keeps them."""
        return () if self.why_no_udp(server=True) else self.udp_servers

    @property
    def holds(self) -> bool:
        """Whether there is a destination that holds what peers say, and something to hold."""
        return self.hold and any(site.row.puts_old for site in self.sites)

    def waits(self, site: Site) -> bool:
        """Whether *site* is made ready by `open` only, since the process was not frozen before."""
        return self.live and not site.row.puts_old

    def ordered_sites(self) -> tuple[Site, ...]:
        """Sites in the order in which they are opened, and as a rule prepared: gateways first."""
        return tuple(sorted(self.sites, key=lambda site: site.row.order))
