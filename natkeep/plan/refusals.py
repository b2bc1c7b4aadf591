"""the refusals: what cannot be translated as the move says, found before anything is planned.

Rule: each raises RefusedError with the tuple or address that it is about.
This file must never look at a machine.
"""

from __future__ import annotations

from collections.abc import Collection

from natkeep.errors import RefusedError
from natkeep.plan.move import Move, Site
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import Address, Connections, FourTuple

MAX_CONNECTIONS = 1_000_000
"""More than this in one move is refused; a conntrack table of usual size is full long before."""


def refuse_none_or_too_many(
    move: Move, others: int, found: list[Connections], late: list[Connections], inner: Connections
) -> None:
    """Those *found* have an OLD of the move; *late* ones came since; *others* are not *inner*."""
    count = sum(map(len, found)) + len(move.lost)
    # A process that talks to itself on lo, and to no host, has no address that OLD could be.
    on_lo_alone = len(inner) > 0 >= others
    datagrams = len(move.udp) or move.udp_servers
    if not (count or on_lo_alone or move.listeners or move.quiesces or datagrams):
        olds = ", ".join(str(map_.old_end) for map_ in move.maps)
        raise RefusedError(
            f"none of the {others} connections has the local address {olds}",
            hint="natkeep inspect shows what there is",
        )
    count += len(move.udp)
    if count > MAX_CONNECTIONS:
        raise RefusedError(f"{count} connections are more than {MAX_CONNECTIONS}")
    if count + sum(map(len, late)) > MAX_CONNECTIONS:
        raise RefusedError(f"with those that came they are more than {MAX_CONNECTIONS}")


def refuse_one_tuple_for_two(move: Move, kept: list[Connections]) -> None:
    """Two OLD may become one NEW, but no peer may have used one port to one port of both.

    Nor two peers of which one is now where the other was, or is.
    """
    seen: dict[Address, set[FourTuple]] = {}
    news = [map_.new for map_ in move.maps]
    for map_, some in zip(move.maps, kept, strict=True):
        new = map_.new
        if news.count(new) == 1 and not move.peer_maps:
            continue
        taken = seen.setdefault(new, set())
        for tuple_ in move.on_wire(some).toward(map_.new_end):
            if tuple_ in taken:
                raise RefusedError(
                    f"{tuple_} would stand for two connections",
                    hint=f"these two OLD cannot both become {map_.new_end}"
                    if news.count(new) > 1
                    else "these two peers cannot both be there",
                )
            taken.add(tuple_)


def refuse_peer_maps(move: Move, connections: Connections, surroundings: Surroundings) -> None:
    """Each is about a peer, and about one that the wire brings as the map says."""
    if not move.peer_maps:
        return
    every, local = (connections, move.udp), surroundings.local
    from_peers = Connections.joined(one for some in every for one in move.share(some)).turned()
    behind = Connections.joined((surroundings.carried, surroundings.udp_carried)).peers()
    for one in move.peer_maps:
        if not len(from_peers.at(one.old_end)):
            raise RefusedError(f"--peer-map {one}: no connection has a peer at {one.old_end}")
        for end in {one.old, one.new} & local:
            raise RefusedError(
                f"--peer-map {one}: {end} is an address of the destination",
                hint="a peer that has moved there too needs no --peer-map",
            )
        if one.old.packed in behind:
            raise RefusedError(
                f"--peer-map {one}: the gateway translates peers at {one.old} already",
                hint="behind it they are still there: leave --peer-map out, here and elsewhere",
            )


def refuse_idle_sites(move: Move, translating: Collection[Site]) -> None:
    """At the peers' own host there has to be a peer; one that is killed there is none any more."""
    for site in move.sites:
        called = move.listeners or move.kept_servers
        if site.row.own and site not in translating and not called:
            raise RefusedError(
                f"{site}: no connection's peer is there",
                hint="a site of role peer is a host, or pod, that has peers' addresses",
            )
