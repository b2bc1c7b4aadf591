"""the strays: what bears natkeep's names at a site and belongs to no move that a journal knows.

The tables natkeep are ours; in them chains, sets and comments bear the id of
their move. So what a lost journal left can be found, and taken away, without it.

Rule: names come from the kernel and may be anything: what is no name of ours is not touched. This
file must never look at a machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from natkeep.plan.base_chains import (
    GATE,
    OPEN,
    dispatch_map,
    gate_chain,
    held_set,
    is_address_chain,
)
from natkeep.plan.move import ID
from natkeep.plan.nft import Undo
from natkeep.plan.relay import SWITCHED
from natkeep.plan.tuples import Address
from natkeep.values import dataclass

_ID = f"({ID})"
_OWN_CHAINS = ("gate", "callers", "hold", "reset")
_CHAINS = (re.compile(rf"(?:{'|'.join(_OWN_CHAINS)})-{_ID}"),)
_SETS = (
    re.compile(rf"(?:kept|outer|old|ended|heard|spoken|routed|listen|reset|again)-{_ID}-\d+"),
    re.compile(rf"to-(?:outer|inner)-{_ID}-\d+"),
)
_COMMENT = re.compile(rf"{_ID}(?::(?:listeners|hold|unkept|{SWITCHED.pattern}))?")
_AT = re.compile(r"([a-z]+(?:-[a-z]+)?)-at-([0-9a-f._]+)")
_NO_IDS = frozenset({"open"})
"""What comments say besides; a move of this name would have its chains, too."""


@dataclass(frozen=True, slots=True)
class SeenTable:
    """The table inet natkeep of a site; silent: there is one of ARP besides.

    rules: of each its chain and comment; held: the OLD addresses that it keeps from leaving as a
    source.
    """

    chains: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    rules: tuple[tuple[str, str], ...] = ()
    held: tuple[Address, ...] = ()
    there: bool = False
    silent: bool = False

    def ids(self) -> frozenset[str]:
        """The ids of the moves that have a chain or a set here."""
        found = {_match(name, _CHAINS) for name in self.chains}
        found |= {_match(name, _SETS) for name in self.sets}
        return frozenset(name for name in found if name)

    def kept_sets(self, strays: frozenset[str]) -> Iterator[tuple[str, str]]:
        """The sets of kept connections of *strays*: whose, and the set."""
        for name in self.sets:
            if name.startswith(("kept-", "outer-")) and _match(name, _SETS) in strays:
                yield _match(name, _SETS), name

    def names_of(self, move_id: str) -> tuple[str, ...]:
        """What bears the id of that move: chains, sets, and rules by their chain, in words."""
        own = self.names_by_id().get(move_id, [])
        chains = (chain for chain, comment in self.rules if owner_of(comment) == move_id)
        return (*own, *(f"rules in {chain}" for chain in dict.fromkeys(chains)))

    def names_by_id(self) -> dict[str, list[str]]:
        """The chains and the sets that bear the id of each move, in words."""
        found: dict[str, list[str]] = {}
        for kind, names, patterns in (("chain", self.chains, _CHAINS), ("set", self.sets, _SETS)):
            for name in names:
                if move_id := _match(name, patterns):
                    found.setdefault(move_id, []).append(f"{kind} {name}")
        return found

    def olds_of(self, move_id: str) -> frozenset[Address]:
        """The addresses that are held for that move, and for no other."""
        gated: dict[bool, set[Address]] = {True: set(), False: set()}
        for chain, comment in self.rules:
            if (at := read_chain(chain)) is not None and at[0] == GATE:
                gated[owner_of(comment) == move_id].add(at[1])
        return frozenset(self.held) & gated[True] - gated[False]

    def is_closed(self, move_id: str) -> bool:
        """Whether the gate of that move is there and closed."""
        gate = gate_chain(move_id)
        return gate in self.chains and (gate, OPEN) not in self.rules


def _match(name: str, patterns: Iterable[re.Pattern[str]]) -> str:
    matches = (pattern.fullmatch(name) for pattern in patterns)
    return next((match.group(1) for match in matches if match), "")


def chains_of(move_id: str) -> tuple[str, ...]:
    """The chains that bear the id of a move, if they are there."""
    return tuple(f"{name}-{move_id}" for name in _OWN_CHAINS)


def owner_of(comment: str) -> str:
    """The id of the move whose rule has this comment; empty where it is none's."""
    match = _COMMENT.fullmatch(comment)
    return match.group(1) if match and comment not in _NO_IDS else ""


def find_undos(
    table: SeenTable, known: frozenset[str], olds: frozenset[Address], *, sure: bool
) -> tuple[Undo, ...]:
    """What takes away all that no *known* move owns; nothing when there is nothing.

    olds: the OLD addresses of the known moves here. sure: every journal could be read, so that
    an OLD that is unknown belongs to none.
    """
    strays = table.ids() - known
    own = [name for name in table.chains if _match(name, _CHAINS) in strays]
    undos = [Undo("inet", "chain", name) for name in own]
    sets = [name for name in table.sets if _match(name, _SETS) in strays]
    undos += [Undo("inet", "map" if name.startswith("to-") else "set", name) for name in sets]
    for chain, comment in table.rules:
        if chain in own or owner_of(comment) not in strays:
            continue
        undos.append(Undo("inet", "rule", chain, comment))
        if at := read_chain(chain):
            dispatch, address = at
            name = dispatch_map(dispatch, address.version)
            undos.append(Undo("inet", "element", name, str(address), chain))
            undos.append(Undo("inet", "chain", chain, "", chain))
    for old in table.held if strays and sure else ():
        if old not in olds:
            undos.append(Undo("inet", "element", held_set(old.version), str(old)))
            if old.version == 4 and table.silent:
                undos.append(Undo("arp", "element", "silent", str(old)))
    return tuple(dict.fromkeys(undos))


def read_chain(chain: str) -> tuple[str, Address] | None:
    """Dispatch and address of an address chain; None if it is another, as that of `at-beef`."""
    at = _AT.fullmatch(chain) if is_address_chain(chain) else None
    try:
        return (at.group(1), ip_address(at.group(2).replace("_", ":"))) if at else None
    except ValueError:
        return None


def find_translated(table: SeenTable, strays: frozenset[str]) -> Iterator[tuple[str, Address]]:
    """Each stray set of kept connections, and the addresses that conntrack may know them by.

    Those that peers send to; in mode stateless the one that they are rewritten to.
    """
    for chain, comment in table.rules:
        at, owner = read_chain(chain), owner_of(comment)
        if at is None or at[0] not in (GATE, "put") or owner not in strays:
            continue
        for _, name in table.kept_sets(frozenset({owner})):
            yield name, at[1]
