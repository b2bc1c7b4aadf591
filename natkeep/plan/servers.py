"""the receptions of UDP sockets that any peer may speak to, by their own port.

    prerouting -350  gate      … to the port ─► callers-ID: drop, until the move is opened
    inbound BEFORE ─► AFTER, outbound the reverse, of first packets of a flow, whoever says them
    the same in the invalid chains, of what has no entry
    output -300  said-as-new   at the destination, what comes from NEW's port: from OLD

- UDP has no SYN: all of the port is held back, at the source in both directions.
- All peers go by the same rules, new ones too; either side may speak first. A reply has the entry
  of what it answers, so it comes from the address that was spoken to.
- A socket at the wildcard address names no source, and the kernel takes the route's, which is NEW:
  to conntrack that is another flow, whose tuple is taken, so it would give it another port.
- What a gateway masquerades is left to its own rules where the process speaks first: they send it
  from an address that answers come back to, from NEW as from OLD.
- These rules stand behind those of exact tuples, which may know a peer by another address.
- What the old host still says, and what no rule has translated, goes no further.
- Which entries there are of the port is not asked: all go once the rules stand.

Rule: this file must never run anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.plan.base_chains import (
    DIRECTIONS,
    FROM_WIRE,
    SAID,
    TO_WIRE,
    address_chain,
    dispatch_to,
)
from natkeep.plan.listeners import Reception, comment, port_at
from natkeep.plan.move import Mode
from natkeep.plan.nft import ACCEPT, DROP, IP, RETURN, Match, Nat, Object, Rule, Statement, Write
from natkeep.plan.protocols import UDP
from natkeep.plan.tuples import Address, Endpoint


def objects(
    move_id: str, receptions: Iterable[Reception], masqueraded: frozenset[Endpoint] = frozenset()
) -> Iterator[Object]:
    """The rules that translate; callers are held back by those of listeners.py."""
    for one in receptions:
        if one.protocol == UDP and one.site.row.leaves:
            yield from _leave_to_others(move_id, one, masqueraded)
            for dispatch, address, statements in (*_nat(move_id, one), *_stop(move_id, one)):
                yield from dispatch_to(dispatch, address)
                chain = address_chain(dispatch, address)
                yield Rule(chain, statements, comment(move_id))


def _leave_to_others(
    move_id: str, one: Reception, masqueraded: frozenset[Endpoint]
) -> Iterator[Object]:
    """What of it says first is not translated here; in front, so of this site's *masqueraded*."""
    _, outbound = DIRECTIONS[Mode.STATEFUL]
    for port, there in zip(one.ports, one.ports_at(one.after), strict=True):
        if one.site.row.passes_on and Endpoint(one.map.old, port) in masqueraded:
            yield from dispatch_to(outbound, one.after)
            leaves = Match((UDP.sport,), there), RETURN
            yield Rule(address_chain(outbound, one.after), leaves, comment(move_id))


Placed = tuple[str, Address, tuple[Statement, ...]]
"""Dispatch and address of the chain in which it stands, and what the rule says."""


def _nat(move_id: str, one: Reception) -> Iterator[Placed]:
    before, after = one.before, one.after
    (inbound, outbound), ip = DIRECTIONS[Mode.STATEFUL], IP[before.version]
    to_port, from_port = _to(move_id, one, before), _from(move_id, one, after)
    by_wire = one.site.row.puts_old
    there = (to_port, *((FROM_WIRE,) if by_wire else ()))
    back = (from_port, *((TO_WIRE,) if by_wire else ()))
    turned = one.ports_at(before) != one.ports_at(after)
    inner: int | str = one.ports_at(after)[0] if turned else UDP.dport
    outer: int | str = one.ports_at(before)[0] if turned else UDP.sport
    yield inbound, before, (*there, Nat("dnat", after, inner))
    yield outbound, after, (*back, Nat("snat", before, outer))
    inward: tuple[Statement, ...] = (Write(f"{ip} daddr", after),)
    outward: tuple[Statement, ...] = (Write(f"{ip} saddr", before),)
    if isinstance(inner, int) and isinstance(outer, int):
        inward, outward = (*inward, Write(UDP.dport, inner)), (*outward, Write(UDP.sport, outer))
    if by_wire:  # the process' own ports, which a map may change on the wire
        yield SAID, before, (from_port, Write(f"{ip} saddr", after))
    yield "invalid-in", before, (*there, *inward, ACCEPT)
    yield "invalid-out", after, (*back, *outward, ACCEPT)


def _stop(move_id: str, one: Reception) -> Iterator[Placed]:
    """What goes no further than a site that passes on."""
    row, old = one.site.row, one.map.old
    if not row.passes_on:
        return
    said, heard = _from(move_id, one, old), _to(move_id, one, one.before)
    for prefix in ("", "invalid-"):
        yield f"{prefix}out", old, (said, DROP)
        yield f"{prefix}to", one.before, (heard, DROP)
    if row.own:
        yield "new", one.after, (_from(move_id, one, one.after), DROP)


def find_untranslated(one: Reception) -> Iterator[tuple[str, tuple[Statement, ...]]]:
    """What is not translated where everything should be, and in which chain of the owned table.

    A rule for each port: their set is in the other table.
    """
    ip, row = IP[one.before.version], one.site.row
    to_wire = (TO_WIRE,) if row.puts_old else ()
    for port in one.ports_at(one.before):
        to_port = Match((UDP.dport,), port)
        arrived = Match((f"{ip} daddr",), one.before), to_port
        yield from (
            (("leaving", arrived),) if row.own else (("arriving", arrived), ("passing", arrived))
        )
    for port in one.ports_at(one.after):
        back = Match((f"{ip} saddr",), one.after), Match((UDP.sport,), port)
        yield ("arriving", back) if row.own else ("leaving", (*to_wire, *back))


def _to(move_id: str, one: Reception, address: Address) -> Match:
    return port_at(move_id, one, address, UDP.dport)


def _from(move_id: str, one: Reception, address: Address) -> Match:
    return port_at(move_id, one, address, UDP.sport)
