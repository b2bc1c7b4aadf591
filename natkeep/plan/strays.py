"""the strays: what bears natkeep's names at a site and belongs to no move that a journal knows.

The tables natkeep are ours, whoever finds them; in them chains, sets and comments bear the id of
their move. So what a lost journal left can be found, and taken away, without it.

Rule: names come from the kernel and may be anything: what is no name of ours is not touched. This
file must never look at a machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

from natkeep.plan.nft import TABLE
from natkeep.plan.tables import GATE, dispatch_map, removal
from natkeep.plan.tuples import Address
from natkeep.values import dataclass

_ID = r"([a-z0-9][a-z0-9-]{0,31})"
_CHAINS = (re.compile(rf"(?:gate|callers|hold|reset)-{_ID}"),)
_SETS = (re.compile(rf"(?:kept|outer|listen|reset|again)-{_ID}-\d+"),)
_COMMENT = re.compile(rf"{_ID}(?::(?:listeners|hold|unkept))?")
_AT = re.compile(r"([a-z]+)-at-([0-9a-f._]+)")
_NO_IDS = frozenset({"open"})
"""What comments say besides; a move of this name would have its chains, too."""


@dataclass(frozen=True, slots=True)
class SeenRule:
    """A rule: its chain, the kernel's number for it, and its comment."""

    chain: str
    handle: int
    comment: str


@dataclass(frozen=True, slots=True)
class SeenTable:
    """The table inet natkeep of a site; silent: there is one of ARP besides.

    held: the OLD addresses that it keeps from leaving as a source.
    """

    chains: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    rules: tuple[SeenRule, ...] = ()
    held: tuple[Address, ...] = ()
    there: bool = False
    silent: bool = False

    def ids(self) -> frozenset[str]:
        """The ids of the moves that have a chain or a set here."""
        found = {_match(name, _CHAINS) for name in self.chains}
        found |= {_match(name, _SETS) for name in self.sets}
        return frozenset(name for name in found if name)


def _match(name: str, patterns: Iterable[re.Pattern[str]]) -> str:
    matches = (pattern.fullmatch(name) for pattern in patterns)
    return next((match.group(1) for match in matches if match), "")


def _owner(rule: SeenRule) -> str:
    match = _COMMENT.fullmatch(rule.comment)
    return match.group(1) if match and rule.comment not in _NO_IDS else ""


def render_clearing(
    table: SeenTable, known: frozenset[str], olds: frozenset[Address], *, sure: bool
) -> tuple[str, ...]:
    """The text that takes away what no *known* move owns; nothing when there is nothing.

    olds: the OLD addresses of the known moves here. sure: every journal could be read, so that
    what is unknown is nobody's.
    """
    if not known and sure:
        return removal() if table.there or table.silent else ()
    strays = table.ids() - known
    lines = [*_without_rules(table, strays)]
    own = [name for name in table.chains if _match(name, _CHAINS) in strays]
    lines += [f"flush chain inet {TABLE} {name}" for name in own]
    lines += [f"delete chain inet {TABLE} {name}" for name in own]
    lines += [f"delete set inet {TABLE} {n}" for n in table.sets if _match(n, _SETS) in strays]
    if strays and sure:
        for old in (old for old in table.held if old not in olds):
            lines.append(f"delete element inet {TABLE} held{old.version} {{ {old} }}")
            if old.version == 4 and table.silent:
                lines.append(f"delete element arp {TABLE} silent {{ {old} }}")
    return tuple(lines)


def _without_rules(table: SeenTable, strays: frozenset[str]) -> Iterator[str]:
    """Their rules out of the chains that moves share, and address chains that are empty then."""
    own = {name for name in table.chains if _match(name, _CHAINS) in strays}
    for chain in table.chains:
        if chain in own:
            continue
        here = [rule for rule in table.rules if rule.chain == chain]
        ours = [rule for rule in here if _owner(rule) in strays]
        yield from (f"delete rule inet {TABLE} {chain} handle {rule.handle}" for rule in ours)
        at = _AT.fullmatch(chain)
        if at and ours and len(ours) == len(here):
            address = ip_address(at.group(2).replace("_", ":"))
            name = dispatch_map(at.group(1), address.version)
            yield f"delete element inet {TABLE} {name} {{ {address} }}"
            yield f"delete chain inet {TABLE} {chain}"


def find_translated(table: SeenTable, strays: frozenset[str]) -> Iterator[tuple[str, Address]]:
    """Each stray set of kept connections, and the address that its peers send to."""
    for rule in table.rules:
        at = _AT.fullmatch(rule.chain)
        owner = _owner(rule)
        if at is None or at.group(1) != GATE or owner not in strays:
            continue
        for name in table.sets:
            if name.startswith(("kept-", "outer-")) and _match(name, _SETS) == owner:
                yield name, ip_address(at.group(2).replace("_", ":"))
