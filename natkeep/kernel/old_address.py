"""Asks a namespace about OLD: whether it is at home there, and who needs it there.

Rule: the kernel is asked, never a journal, since a move of another state directory, or a program
that is no natkeep, has none here. Nothing is changed. All functions act in the namespace that the
calling thread is in.
"""

from __future__ import annotations

from ipaddress import ip_address

from natkeep.kernel import ip_rules, rtnetlink, sock_diag
from natkeep.kernel import nftables_dump as dump
from natkeep.plan.base_chains import DISPATCHES, address_chain, held_set
from natkeep.plan.nft import FAMILIES, TABLE
from natkeep.plan.strays import owner_of
from natkeep.plan.tuples import Address, Connections, Endpoint
from natkeep.values import dataclass

_NO_PEER = bytes(2)


@dataclass(frozen=True, slots=True)
class Needs:
    """What still needs an address that a move has put on lo.

    moves: ids of other moves, of whatever state directory, with rules for it; sockets: how many
    connections there are that are not of the move that asks.
    """

    moves: tuple[str, ...] = ()
    sockets: int = 0


def find_at_home(olds: frozenset[Address]) -> frozenset[Address]:
    """Those of *olds* that are addresses of this host, and not because a move keeps them here.

    A route can make them so as well: `ip route add local NETWORK dev lo`.
    """
    local = rtnetlink.all_addresses()
    found = {old for old in olds if old.packed in local or rtnetlink.is_delivered(old)}
    if found:
        held = {key for v in FAMILIES for key in dump.read_keys(TABLE, held_set(v))}
        found = {old for old in found if old.packed not in held}
    return frozenset(found)


def find_needs(
    old: Address,
    move_id: str,
    own: Connections,
    listeners: tuple[Endpoint, ...] = (),
    comments: frozenset[str] = frozenset(),
) -> Needs:
    """What needs *old* here besides the move *move_id*.

    Its own are rules with one of *comments*, the connections *own*, seen from either end, those to
    its *listeners*, and those of a process with itself. One whose handshake has not ended needs
    nothing: no octet of it is lost, and without a rule for OLD no answer would come from afar.
    """
    ports = {end.port.to_bytes(2, "big") for end in listeners if end.address == old}
    size = len(old.packed)
    here = {
        record
        for record in _find_living(old, half_open=False)
        if record[size : size + 2] not in ports and record[size + 2 : -2] != old.packed
    }
    if here:
        here -= _find_own(here, old, own)
    return Needs(tuple(sorted(_find_moves(old, comments) - {move_id})), len(here))


def find_own(old: Address, own: Connections) -> Connections:
    """Those at *old* that are one of *own*, seen from either end."""
    here = _find_living(old)
    return Connections.packed(b"".join(_find_own(here, old, own) if here else ()), old.version)


def _find_own(here: set[bytes], old: Address, own: Connections) -> set[bytes]:
    """Those of *here*. Where both ends were moved to one host, OLD of each is for both moves."""
    views = (own.at(old), own.turned().at(old))
    return {record for view in views for record in here.intersection(view.each())}


def _find_moves(old: Address, besides: frozenset[str] = frozenset()) -> set[str]:
    """Ids of the moves with rules for *old* here that have other comments than *besides*."""
    chains = (address_chain(dispatch, old) for dispatch in DISPATCHES)
    rules = (rule for chain in chains for rule in dump.rules(TABLE, chain))
    return {owner_of(rule.comment) for rule in rules if rule.comment not in besides} - {""}


def _find_living(old: Address, *, half_open: bool = True) -> set[bytes]:
    """The connections at *old*, as plan.tuples packs them."""
    return {
        record
        for end, records in sock_diag.read_living(orphans=False, half_open=half_open).items()
        if end[:-2] == old.packed
        for record in records
        if record[-2:] != _NO_PEER
    }


def find_idle() -> tuple[Address, ...]:
    """The addresses on lo that a natkeep has put there and that nothing needs any more.

    Also those that are not there and that rules of the routing policy are for.
    """
    marked, local = rtnetlink.marked_addresses(), rtnetlink.all_addresses()
    ruled = frozenset(old.packed for old in ip_rules.find_olds()) - local
    olds = map(ip_address, sorted(marked | ruled))
    return tuple(old for old in olds if not (_find_moves(old) or _find_living(old)))


def needs_loopback(besides: frozenset[Address]) -> bool:
    """Whether lo has an address of a move, not one of *besides*, so that it has to be up."""
    return not rtnetlink.marked_addresses() <= {old.packed for old in besides}
