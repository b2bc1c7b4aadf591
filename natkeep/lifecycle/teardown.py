"""teardown: the journal in reverse, best effort; a second time is fine.

The journal is all that it needs: each record holds its undo, so no plan is made.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.errors import LeftoverError, NatkeepError, RefusedError
from natkeep.kernel.nft_strays import find_left, find_undone, read_table
from natkeep.kernel.old_address import find_at_home, find_idle
from natkeep.kernel.stray_connections import count_living
from natkeep.kernel.undone_table import find_arriving
from natkeep.lifecycle.executor import Executor, finish, forget, leftover
from natkeep.lifecycle.progress import without_lock
from natkeep.plan.base_chains import gate_chain
from natkeep.plan.listeners import callers_chain
from natkeep.plan.move import Site
from natkeep.plan.step_undo import (
    CloseGates,
    DeleteDatagrams,
    RemoveAddress,
    RemoveRules,
    RemoveUndone,
    RestoreEntries,
)
from natkeep.plan.steps import Prior
from natkeep.plan.tuples import Connections
from natkeep.state.directory import read_boot_id
from natkeep.state.journal import Journal


def teardown(executor: Executor, move_id: str) -> bool:
    """Undo a move, best effort; whether there was one. A second time is fine."""
    with executor.state.changing(move_id):
        found = executor.state.knows(move_id)
        finish(lambda: end(executor, move_id))
        return found


def end(executor: Executor, move_id: str) -> None:
    """The same under a lock that is held."""
    if not executor.state.knows(move_id):
        executor.state.remove(move_id)
        return
    journal = executor.load_undo(move_id)
    left: list[NatkeepError] = []
    staying = ""
    if journal.boot == read_boot_id():
        reachable = {site for site in journal.move.sites if executor.reach(journal, site)}
        backwards = sorted(journal.records, reverse=True)
        numbers = [number for number in backwards if journal.records[number].site in reachable]
        if journal.is_whole():
            numbers = without_lock(journal, numbers)
        # The gates close first, at every site: while the destination is taken apart
        # the gateway must not hand it packets that it would answer with a reset.
        left = executor.undo_move(journal, numbers)
        left += find_remains(executor, journal, reachable)
        staying = "; ".join(executor.staying)
        if not left and not executor.dropped:
            _end_drops(executor, journal, reachable)
    if left:
        raise leftover(journal, left)
    forget(journal)
    if staying:
        raise LeftoverError(staying, hint="natkeep gc takes it away once they have ended")


def _end_drops(executor: Executor, journal: Journal, sites: set[Site]) -> None:
    """What an undo before this one left dropped: its gateway could not be undone, and is by now."""
    if not any(site.row.passes_on for site in journal.move.sites):
        return
    for record in journal.records.values():
        for site in sites & {record.site}:
            if site.row.puts_old and isinstance(record.undo, RestoreEntries | DeleteDatagrams):
                executor.kernel.revert(site, RemoveUndone(record.undo.outer), Prior())


def find_remains(executor: Executor, journal: Journal, sites: Iterable[Site]) -> list[NatkeepError]:
    """What bears the id of a move that has been undone: it is looked for before that is said."""
    move_id, left = journal.move.id, list[NatkeepError]()
    for site in sites:
        for what in executor.kernel.ask(site, find_undone, move_id, journal.nft_undos(site)):
            words = f"natkeep teardown {move_id} --by-name --site {site}"
            left.append(LeftoverError(f"{site}: {what}: still there ({words})"))
    return left


# ---- where the journal is lost -------------------------------------------------------------------


def teardown_by_name(
    executor: Executor, move_id: str, sites: tuple[Site, ...], *, yes: bool = False
) -> bool:
    """Undo at *sites* what bears the id of a move that has no journal here; whether there was any.

    RefusedError when it has one. LeftoverError, and nothing is changed, when connections live by it
    and not *yes*; also when something is left. Whether OLD was at home there only a journal knows:
    what is not marked as natkeep's stays and is named.
    """
    kernel = executor.kernel
    with executor.state.changing(move_id):
        if executor.state.knows(move_id) and not _is_undone(executor, move_id):
            raise RefusedError(
                f"move {move_id} has a journal in {executor.state.path}",
                hint=f"natkeep teardown {move_id}",
            )
        kernel.open_sites(sites)
        here = [site for site in sites if kernel.ask(site, find_left, move_id)]
        for site in here if not yes else ():
            table = kernel.ask(site, read_table)
            olds = frozenset(table.held) - table.olds_of(move_id)
            living = kernel.ask(site, count_living, table, frozenset({move_id}), olds)
            for number, peer in living.values():
                raise LeftoverError(
                    f"{site}: {number} connections of {move_id} live (as that of {peer})",
                    hint="nothing was changed; --yes ends them",
                )
        left: list[str] = []
        gateways = [site for site in here if site.row.passes_on]
        ends = [site for site in here if site.row.puts_old and not gateways]
        arriving = {site: _find_arriving(executor, site, move_id) for site in ends}
        # Each gate first, so that no site answers what another still lets through.
        gates = CloseGates((gate_chain(move_id), callers_chain(move_id)))
        for site in here:
            kernel.revert(site, gates, Prior())
        executor.drop(arriving)
        for site in here:
            left += _clear_by_name(executor, site, move_id)
        if left:
            raise LeftoverError(f"move {move_id}: {'; '.join(left)}")
        executor.state.remove(move_id)
        return bool(here)


def _find_arriving(executor: Executor, site: Site, move_id: str) -> Connections:
    olds = executor.kernel.ask(site, read_table).olds_of(move_id)
    return executor.kernel.ask(site, find_arriving, move_id, olds)


def _clear_by_name(executor: Executor, site: Site, move_id: str) -> list[str]:
    """What of it is left at *site*, in words."""
    kernel = executor.kernel
    table = kernel.ask(site, read_table)
    olds = table.olds_of(move_id)
    known = table.ids() - {move_id}
    kernel.clear_strays(site, known, frozenset(table.held) - olds, sure=True)
    left = [f"{site}: {what} is still there" for what in kernel.ask(site, find_left, move_id)]
    idle = kernel.ask(site, find_idle)
    for old in sorted(olds, key=str):
        if old in idle:
            for undo in (RemoveAddress(old), RemoveRules((), (old,))):
                kernel.revert(site, undo, Prior())
        elif kernel.ask(site, find_at_home, frozenset({old})):
            prefix = f"{old}/{old.max_prefixlen}"
            left.append(f"{site}: OLD {old} is on lo still (ip address del {prefix} dev lo)")
    return left


def _is_undone(executor: Executor, move_id: str) -> bool:
    records = executor.load_undo(move_id).records.values()
    return all(record.state == "undone" for record in records)
