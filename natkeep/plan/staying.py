"""what a destination says itself and stays on it, and so has a rule (ip_rules.py): for make_plan.

This file must never look at a machine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from natkeep.plan.ip_rules import IpRule, stay
from natkeep.plan.kept_connections import find_inner_datagrams
from natkeep.plan.listeners import Reception
from natkeep.plan.move import Move
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.resets import Reset
from natkeep.plan.translation import Surroundings, Translation
from natkeep.plan.tuples import Connections, Endpoint, FourTuple


def find_staying(
    move: Move,
    here: Sequence[Translation],
    receptions: Sequence[Reception],
    lost: Sequence[Reset],
    inner: Connections,
    arounds: Sequence[Surroundings],
) -> tuple[IpRule, ...]:
    """The rules of a destination for its own packets, of TCP and then of UDP.

    lost: what is reset there; inner: of TCP the process' connections with itself; arounds: as seen
    at prepare, and when what came since was compared.
    """
    home = arounds[0].home
    found: tuple[IpRule, ...] = ()
    for protocol, told, own in ((TCP, lost, inner), (UDP, (), find_inner_datagrams(move))):
        kept = [one for one in here if one.protocol == protocol]
        tuples = _of_this_host(kept, told, own, [one.of(protocol) for one in arounds])
        called = (one for one in receptions if one.protocol == protocol)
        calls = (Endpoint(one.map.old, port) for one in called for port in one.ports)
        found += stay(tuples, calls, home, protocol)
    return found


def _of_this_host(
    here: Sequence[Translation],
    lost: Sequence[Reset],
    inner: Connections,
    arounds: Sequence[Surroundings],
) -> Iterator[FourTuple]:
    """What is said on this host to an OLD of its: a kept connection's peer is here as well.

    Where the peer was moved here by a move of its own, also what is said to it. And a reset of
    what cannot be kept, which is made here and goes by lo.
    """
    for reset in lost:
        yield from reset.connections
    local = {address.packed for around in arounds for address in around.local}
    for translation in here:
        if local & translation.kept.peers():
            yield from (one for one in translation.kept if one.source.address.packed in local)
    for some in (inner, *(around.joined for around in arounds)):
        for one in some:
            yield from (one, one.reply())
