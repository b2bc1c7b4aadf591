"""What both ends have to bear, whichever host translates; the rows are in other files.

    by_relay(33, "by a relay, tcp_loose=0")(not_loose(ByRelay, WHERE))

Rule: nothing is registered here. Each function makes the moves of one row, of who carries out the
move (*make*) and of the hosts that translate (*roles*).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from natkeep.lab.lab import Lab
from natkeep.lab.situations import Moves

_MUCH = 300_000
"""Octets of a bulk, of which each segment would be as big as the MTU."""

WIRE_PORT = 8080
"""NEW's port in a map to another port."""

FIRST_WORDS = {
    "the client says first": ("client_says", "server_says"),
    "the server says first": ("server_says", "client_says"),
    "the client closes first": ("client_closes", "server_says", "server_closes"),
    "the server closes first": ("server_closes", "client_closes"),
}
"""Rows of `in_order`: what follows a pause."""


class Mover(Protocol):
    """Who carries out the move of a lab; Lab itself is one."""

    def begin(self, *, connections: int = 1, pause: bool = False) -> None:
        """As Lab.begin."""

    def move(self) -> None:
        """As Lab.move."""

    def finish(self) -> None:
        """As Lab.finish."""


M = TypeVar("M", bound=Mover)
T = TypeVar("T")


def by_gateway(lab: Lab) -> Lab:
    """The *make* of a lab whose gateway translates."""
    return lab


def at_port(make: Callable[[Lab], T], lab: Lab) -> T:
    """The same, of who carries it out or of whole moves, with a map to another port."""
    lab.wire_port = WIRE_PORT
    return make(lab)


def move_in_a_pause(make: Callable[[Lab], M], lab: Lab) -> M:
    """One connection, on which nothing is said while the server moves."""
    mover = make(lab)
    mover.begin(pause=True)
    mover.move()
    return mover


def under_traffic(make: Callable[[Lab], Mover], roles: Sequence[str]) -> Moves:
    """Three connections that talk; then no host has an entry any more, one after the other."""

    def moves(lab: Lab) -> None:
        mover = make(lab)
        mover.begin(connections=3)
        mover.move()
        lab.traffic.talk_on()
        for role in roles:
            lab.conditions.flush_conntrack(role)
            lab.traffic.talk_on()
        mover.finish()

    return moves


def not_loose(make: Callable[[Lab], Mover], roles: Sequence[str]) -> Moves:
    """Conntrack picks nothing up at any host; both sides speak, also without an entry."""

    def moves(lab: Lab) -> None:
        lab.conditions.conntrack_loose(0)
        mover = move_in_a_pause(make, lab)
        for says in (lab.traffic.server_says, lab.traffic.client_says):
            says()
            for role in roles:
                lab.conditions.flush_conntrack(role)
        lab.traffic.server_says()
        lab.traffic.client_says()
        mover.finish()

    return moves


def in_order(make: Callable[[Lab], Mover], *words: str) -> Moves:
    """After a pause each of these is done: methods of Traffic, `client_says` or `server_closes`."""

    def moves(lab: Lab) -> None:
        mover = move_in_a_pause(make, lab)
        for word in words:
            getattr(lab.traffic, word)()
        mover.finish()

    return moves


def flushed_before_fins(make: Callable[[Lab], Mover], roles: Sequence[str]) -> Moves:
    """No host has an entry when the server closes, and again none when the client does."""

    def moves(lab: Lab) -> None:
        mover = move_in_a_pause(make, lab)
        lab.traffic.client_says()
        for closes in (lab.traffic.server_closes, lab.traffic.client_closes):
            for role in roles:
                lab.conditions.flush_conntrack(role)
            closes()
        mover.finish()

    return moves


def narrow(make: Callable[[Lab], Mover], *networks: str) -> Moves:
    """What either side sends is too big for the routers of these networks."""

    def moves(lab: Lab) -> None:
        mover = move_in_a_pause(make, lab)
        lab.traffic.client_says()
        for network in networks:
            lab.conditions.path_mtu(network)
        lab.traffic.server_sends(_MUCH)
        lab.traffic.client_sends(_MUCH)
        for network in networks:
            lab.conditions.path_was_narrow(network)
        mover.finish()

    return moves
