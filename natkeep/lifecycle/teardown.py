"""teardown: the journal in reverse, best effort; a second time is fine.

The journal is all that it needs: each record holds its undo, so no plan is made.
"""

from __future__ import annotations

from natkeep.errors import NatkeepError
from natkeep.lifecycle.executor import Executor, finish, forget, leftover
from natkeep.lifecycle.progress import without_lock
from natkeep.state.directory import read_boot_id


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
    executor.staying.clear()
    journal = executor.load_undo(move_id)
    left: list[NatkeepError] = []
    if journal.boot == read_boot_id():
        reachable = {site for site in journal.move.sites if executor.reach(journal, site)}
        backwards = sorted(journal.records, reverse=True)
        numbers = [number for number in backwards if journal.records[number].site in reachable]
        if journal.is_whole():
            numbers = without_lock(journal, numbers)
        # The gates close first, at every site: while the destination is taken apart
        # the gateway must not hand it packets that it would answer with a reset.
        left = executor.undo(journal, numbers)
    if left:
        raise leftover(journal, left)
    forget(journal)
    if executor.staying:
        raise executor.staying.pop()
