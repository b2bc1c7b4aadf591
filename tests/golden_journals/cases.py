"""The moves of the golden journals; what is imported here has one name in all versions."""

from __future__ import annotations

from typing import NamedTuple

from natkeep.checkpoint import Checkpoint
from natkeep.plan.move import Fate, Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address

GATEWAY, DESTINATION = Site(Role.GATEWAY, "gateway"), Site(Role.DESTINATION, "destination")
SOURCE = Site(Role.SOURCE, "source")
BOTH = (GATEWAY, DESTINATION)


def map_of(text: str) -> Map:
    old, new = text.split("=")
    return Map(parse_address(old), parse_address(new))


def listed(*rows: str) -> Connections:
    """Connections from `LOCAL PEER`."""
    ends = [map(Endpoint.parse, row.split()) for row in rows]
    return Connections.of(FourTuple(source=peer, destination=local) for local, peer in ends)


V4, V6 = map_of("10.2.0.10=10.3.0.20"), map_of("fd00:2::10=fd00:3::20")
KEPT = listed(
    "10.2.0.10:5000 10.1.0.2:50001",
    "10.2.0.10:5001 10.1.0.2:50002",
    "[fd00:2::10]:5000 [fd00:1::2]:50001",
)
LOST = listed("10.2.0.10:5000 10.1.0.2:60001")
LATER = listed("10.2.0.10:5000 10.1.0.2:50001", "10.2.0.10:5000 10.1.0.2:50009")
LISTENERS = (Endpoint.parse("10.2.0.10:80"),)


class Case(NamedTuple):
    """A move; opened: the gates were; image: of the dump, where it is compared before."""

    move: Move
    connections: Connections = KEPT
    opened: bool = False
    image: Checkpoint | None = None


def move(*sites: Site, maps: tuple[Map, ...] = (V4, V6), **more: object) -> Move:
    return Move("web", maps, sites, **more)  # type: ignore[arg-type]  # each is as Move has it


CASES = {
    "stateful": Case(move(*BOTH)),
    "stateful-opened": Case(move(*BOTH), opened=True),
    "stateless-opened": Case(move(*BOTH, mode=Mode.STATELESS), opened=True),
    "source": Case(move(SOURCE)),
    "listeners-opened": Case(move(*BOTH, maps=(V4,), listeners=LISTENERS), opened=True),
    "unkept": Case(move(*BOTH, maps=(V4,), unkept=Fate.RESET, lost=LOST)),
    "unkept-opened": Case(move(*BOTH, maps=(V4,), unkept=Fate.RESET, lost=LOST), opened=True),
    "held": Case(move(*BOTH, hold=True, guard=True)),
    "live": Case(move(*BOTH, maps=(V4,), live=True)),
    "live-changed-opened": Case(
        move(*BOTH, maps=(V4,), live=True), opened=True, image=Checkpoint(LATER)
    ),
    "quiesced": Case(move(SOURCE, maps=(V4,), held=LISTENERS, quiesces=True), Connections()),
}
