"""Asks a namespace about OLD: whether it is at home there.

Rule: the kernel is asked, never a journal, since a move of another state directory, or a program
that is no natkeep, has none here. Nothing is changed. All functions act in the namespace that the
calling thread is in.
"""

from __future__ import annotations

from natkeep.kernel import nftables_dump as dump
from natkeep.kernel import rtnetlink
from natkeep.plan.base_chains import held_set
from natkeep.plan.nft import FAMILIES, TABLE
from natkeep.plan.tuples import Address


def find_at_home(olds: frozenset[Address]) -> frozenset[Address]:
    """Those of *olds* that are addresses of this host, and not because a move keeps them here."""
    local = rtnetlink.all_addresses()
    found = {old for old in olds if old.packed in local}
    if found:
        held = {key for v in FAMILIES for key in dump.read_keys(TABLE, held_set(v))}
        found = {old for old in found if old.packed not in held}
    return frozenset(found)
