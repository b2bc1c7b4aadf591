"""What an image says of its sockets, and a site does not have or does otherwise.

At a destination a socket may be bound to an address that is not there. At a source an image says
what the process sees: where its host redirects a port, publishes one or masquerades, the wire shows
another tuple, which no other site is told of. A gateway would wait for packets that never come, and
the source's gate would let through those that do.

Rule: nothing is changed. What a move of natkeep's own translates there is known by its journal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from natkeep.checkpoint import ELSEWHERE, Checkpoint, Socket
from natkeep.errors import RefusedError
from natkeep.kernel import conntrack_own, sock_diag
from natkeep.kernel.interface import Kernel
from natkeep.plan.identity import Identity
from natkeep.plan.move import Site
from natkeep.plan.protocols import TCP, Protocol
from natkeep.plan.tuples import Connections, Endpoint, FourTuple
from natkeep.state.directory import StateDirectory

NO_REMEDY = "a redirect, DNAT or masquerade of that host: such connections cannot follow"


def find_unbindable(kernel: Kernel, site: Site, sockets: Sequence[Socket]) -> Iterator[Socket]:
    """Those of *sockets* whose address the opened *site* does not have; one of each address."""
    asked = set()
    for each in sockets:
        if each.local is None or (end := (each.local.address, each.bound_device)) in asked:
            continue
        asked.add(end)
        if not kernel.ask(site, sock_diag.can_bind, *end):
            yield each


def find_taken(kernel: Kernel, site: Site, checkpoint: Checkpoint) -> Iterator[Endpoint]:
    """Where CRIU will bind sockets of UDP, and another one at the opened *site* does not let it."""
    bound = (
        each.local
        for each in checkpoint.sockets
        if each.protocol == "udp" and each.local and each.unkept != ELSEWHERE
    )
    for end in dict.fromkeys(bound):
        if kernel.ask(site, sock_diag.is_taken_of_udp, end):
            yield end


def refuse_translated(
    kernel: Kernel,
    state: StateDirectory,
    site: Site,
    kept: Iterable[Connections],
) -> None:
    """RefusedError when the opened *site* translates one of *kept*."""
    found = list(find_translated(kernel, state, site, kept))
    if found:
        inner, outer = found[0]
        raise RefusedError(
            f"{site} translates by itself: {inner} there is {outer} on the wire, which the "
            f"image does not tell; {len(found)} in all",
            hint=NO_REMEDY,
        )


def find_translated(
    kernel: Kernel,
    state: StateDirectory,
    site: Site,
    kept: Iterable[Connections],
    protocol: Protocol = TCP,
) -> Iterator[tuple[FourTuple, FourTuple]]:
    """Those, as the process sees them and as the wire does, that the host itself translates.

    kept: such as have one local address each.
    """
    here = kernel.identity(site)
    for some in kept:
        for inner, outer in kernel.ask(site, conntrack_own.find_translated, some, protocol):
            if not _is_moved(state, here, inner, outer):
                yield inner, outer


def _is_moved(state: StateDirectory, here: Identity, inner: FourTuple, outer: FourTuple) -> bool:
    """Whether a move of ours at *here* makes the one of the other."""
    ends = ((inner.source, outer.source), (inner.destination, outer.destination))
    pairs = {frozenset((one.address, other.address)) for one, other in ends if one != other}
    headers = map(state.read_header, state.ids_naming(frozenset().union(*pairs)))
    moves = [one.move for one in headers if one and one.is_at(here)]
    by_relay = {via.source for move in moves for via in move.vias}
    pairs = {pair for pair in pairs if by_relay.isdisjoint(pair)}
    return pairs <= {frozenset((map_.old, map_.new)) for move in moves for map_ in move.maps}
