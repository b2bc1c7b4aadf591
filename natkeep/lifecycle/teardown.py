"""teardown: the journal in reverse, best effort; a second time is fine."""

from __future__ import annotations

from natkeep.errors import NatkeepError
from natkeep.lifecycle.executor import Ground, finish, forget, is_whole, leftover, without_lock
from natkeep.state.journal import read_boot_id


class Ending(Ground):
    """The verb teardown."""

    def teardown(self, move_id: str) -> bool:
        """Undo a move, best effort; whether there was one. A second time is fine."""
        with self.state.locked():
            found = self.state.knows(move_id)
            finish(lambda: self._end(move_id))
            return found

    def _end(self, move_id: str) -> None:
        if not self.state.knows(move_id):
            self.state.remove(move_id)
            return
        journal, plan = self._load(move_id)
        left: list[NatkeepError] = []
        if journal.boot == read_boot_id():
            reachable = {site for site in plan.move.sites if self._reach(journal, site)}
            numbers = [
                number
                for number in range(len(plan.steps) - 1, -1, -1)
                if plan.steps[number].site in reachable
            ]
            if is_whole(journal, plan):
                numbers = without_lock(plan, numbers)
            # The gates close first, at every site: while the destination is taken apart
            # the gateway must not hand it packets that it would answer with a reset.
            left = self._undo(journal, plan, numbers)
        if left:
            raise leftover(journal, left)
        forget(journal)
