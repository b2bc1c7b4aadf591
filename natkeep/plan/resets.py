"""the resets: how both ends of a connection that cannot be kept are told so (`--unkept reset`).

Rule: exact tuples of the image only, whose local address is an OLD; never NEW, where another
process may have the very same tuple. No reset is sent before the move is opened: until then the
process can be restored where it was, and its connections with it.
This file must never touch the kernel.

    gateway, source   prerouting -360  refusing   OLD ─► refuse-at-OLD ─► (unkept?) ─► reset-ID
    destination       output     -360  answering  OLD ─► answer-at-OLD ─► (unkept?) ─► reset-ID

An end that says nothing is asked: a bare acknowledgement that fits no window makes it state what it
expects (RFC 9293, 3.10.7.4), which is again a segment to answer. kernel/tcp_probe.py sends it, with
CRIU's mark, so that it is neither held back nor tracked. The rules are filters.py's.

Which ends are reset depends on where a segment passes: peers on a wire at the gateway, all at the
source, the process at the destination. Not reset is a connection whose other end moves along (both
are in the image), or is at the destination already: it lives on.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.plan.maps import find_map
from natkeep.plan.move import Fate, Move, Site
from natkeep.plan.translation import Surroundings, Unkept
from natkeep.plan.tuples import Address, Connections, FourTuple
from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class Reset:
    """At *site*, what one end of these connections says is answered with a reset.

    The end is the process at the destination, and the peer elsewhere. number: that of the map
    within the move; connections: from the peer to the process, all with *old*, its OLD.
    """

    site: Site
    number: int
    old: Address
    connections: Connections

    @property
    def dispatch(self) -> str:
        """Which way the segments go that are answered."""
        return self.site.row.resets

    @property
    def chain(self) -> tuple[str, Address]:
        """Dispatch and address of the chain in which its rules are."""
        return self.dispatch, self.old


def make_resets(
    move: Move, unkept: Iterable[Unkept], connections: Connections, surroundings: Surroundings
) -> tuple[Reset, ...]:
    """What of *unkept*, and of what the image has besides (`move.lost`), is told, and where."""
    if move.unkept != Fate.RESET:
        return ()
    streams = tuple(one for one in unkept if one.protocol.has_states)
    lost = find_lost(move, streams, connections, surroundings)
    resets = []
    for site in move.ordered_sites():
        for number, map_ in enumerate(move.maps):
            told = [
                inbound
                for inbound in lost
                if find_map(move.maps, inbound.destination) is map_
                and _passes(site, inbound, move, surroundings)
            ]
            if told:
                resets.append(Reset(site, number, map_.old, Connections.of(told)))
    return tuple(resets)


def find_lost(
    move: Move, unkept: Iterable[Unkept], connections: Connections, surroundings: Surroundings
) -> tuple[FourTuple, ...]:
    """The connections that both ends are to be told of, from the peer to the process."""
    olds = {map_.old for map_ in move.maps}
    wanted = [entry.inbound for entry in unkept]
    wanted += [inbound for inbound in move.lost if find_map(move.maps, inbound.destination)]
    if not wanted:
        return ()
    known, unkept_ones = frozenset(connections.each()), {entry.inbound for entry in unkept}
    found = []
    for inbound in dict.fromkeys(wanted):
        peer = inbound.source.address
        record, reverse = (b"".join(Connections.of([t]).each()) for t in (inbound, inbound.reply()))
        is_kept = record in known and inbound not in unkept_ones
        on_destination = peer in surroundings.local and not (peer in olds or peer.is_loopback)
        if not (is_kept or reverse in known or on_destination or _is_nowhere(peer)):
            found.append(inbound)
    return tuple(found)


def _is_nowhere(peer: Address) -> bool:
    """Nothing can be sent there: an answer would have no route, or no one receiver."""
    return peer.is_link_local or peer.is_unspecified or peer.is_multicast


def _passes(site: Site, inbound: FourTuple, move: Move, surroundings: Surroundings) -> bool:
    """Whether a segment of the connection is seen at *site*; at a gateway, if a wire has it so."""
    peer = inbound.source.address
    on_source_host = peer.is_loopback or any(peer == map_.old for map_ in move.maps)
    moved = find_map(move.peer_maps, inbound.source) is not None
    elsewhere = on_source_host or peer in surroundings.beside or moved or site.row.own
    return not (site.row.passes_on and elsewhere)


NOT_TOLD = "cannot be reset: no site of this move meets it, or its other end lives on"


def describe_fates(resets: Iterable[Reset]) -> dict[FourTuple, str]:
    """Who of each connection's two ends is told, for a person; NOT_TOLD of all others."""
    told: dict[FourTuple, set[bool]] = {}
    for reset in resets:
        for inbound in reset.connections:
            told.setdefault(inbound, set()).add(reset.dispatch == "answer")
    words = {
        frozenset({True, False}): "reset, both ends",
        frozenset({True}): "reset, the process; its peer is met at no site of this move",
        frozenset({False}): "reset, its peer; the process is met at no site of this move",
    }
    return {inbound: words[frozenset(ends)] for inbound, ends in told.items()}
