"""the strays of a site: what bears natkeep's names there read, and taken away.

Rule: what is taken away is decided in plan/strays.py; an entry goes only by the full tuple that a
set of ours names. All functions act in the namespace that the calling thread is in.
"""

from __future__ import annotations

from ipaddress import ip_address
from itertools import product

from natkeep.kernel import nftables, sysctl
from natkeep.kernel import nftables_dump as dump
from natkeep.kernel.conntrack_purge import delete_inbound
from natkeep.kernel.once import ask_once
from natkeep.plan.base_chains import held_set, removal
from natkeep.plan.nft import FAMILIES, TABLE, Undo
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.relay import find_left_on
from natkeep.plan.strays import SeenTable, chains_of, find_translated, find_undos
from natkeep.plan.tuples import Address, Connections


def read_table() -> SeenTable:
    """What stands in our tables; empty where there are none."""
    silent = dump.has_table("arp", TABLE)
    if not dump.has_table("inet", TABLE):
        return SeenTable(silent=silent)
    held = [key for v in FAMILIES for key in dump.read_keys(TABLE, held_set(v))]
    return SeenTable(
        tuple(sorted(dump.chain_names(TABLE))),
        tuple(sorted(dump.set_names(TABLE))),
        tuple((rule.chain, rule.comment) for rule in dump.rules_of_chains(TABLE, "")),
        tuple(ip_address(key) for key in held),
        there=True,
        silent=silent,
    )


def clear(table: SeenTable, known: frozenset[str], olds: frozenset[Address], *, sure: bool) -> None:
    """Take away what no *known* move owns, its conntrack entries too (see plan/strays.py)."""
    # First: without the rules the host would be a router for strangers.
    for setting in reversed(find_left_on((comment for _, comment in table.rules), known)):
        sysctl.write(setting.name, setting.off)
    entries = [read_set(*each) for each in find_translated(table, table.ids() - known)]
    if known or not sure:
        nftables.remove(find_undos(table, known, olds, sure=sure))
    elif table.there or table.silent:
        nftables.run_transaction(removal())
    # Behind the rules, which would make them anew.
    for some, protocol in product(entries, (TCP, UDP)):
        if len(some):
            delete_inbound(some, protocol)


def find_left(move_id: str) -> tuple[str, ...]:
    """What is here that bears the id of a move, in words; nothing when all of it is gone."""
    return read_table().names_of(move_id)


def find_undone(move_id: str, undos: tuple[Undo, ...]) -> tuple[str, ...]:
    """The same, quick beside a thousand moves, and whatever a natkeep called what *undos* undo."""
    # Chains are asked for by name: of a hundred thousand the kernel's dump takes a second.
    sets, by_id = ask_once("sets", _read_sets)
    own = [undo for undo in undos if not undo.unused]
    chains = (*chains_of(move_id), *(undo.name for undo in own if undo.kind == "chain"))
    found = {f"chain {n}": None for n in dict.fromkeys(chains) if dump.has_chain(TABLE, n)}
    found |= dict.fromkeys(by_id.get(move_id, ()))
    for undo in own:
        if undo.kind in ("set", "map") and undo.name in sets:
            found[f"{undo.kind} {undo.name}"] = None
    for undo in (undo for undo in own if undo.kind == "rule"):
        if any(rule.comment == undo.what for rule in dump.rules(TABLE, undo.name)):
            found[f"rules in {undo.name}"] = None
    return tuple(found)


def _read_sets() -> tuple[frozenset[str], dict[str, list[str]]]:
    """Their names, and in words by the ids of moves."""
    sets = dump.set_names(TABLE)
    return sets, SeenTable(sets=tuple(sorted(sets))).names_by_id()


def read_set(name: str, local: Address) -> Connections:
    """The connections of a set, as they arrive at *local*; none if it is of the other family."""
    width = len(local.packed)
    records = b"".join(
        local.packed + key[width + 4 : width + 6] + key[:width] + key[width : width + 2]
        for key in dump.read_keys(TABLE, name)
        if len(key) == width + 8
    )
    return Connections.packed(records, local.version)
