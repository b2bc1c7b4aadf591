"""open: the kept connections are let through, at every site, gateway first."""

from __future__ import annotations

from collections.abc import Callable

from natkeep.errors import JournalError, RefusedError
from natkeep.journal import Journal
from natkeep.lifecycle.ground import Ground


class Opening(Ground):
    """The verb open."""

    def open(self, move_id: str, confirm: Callable[[Journal], None] | None = None) -> None:
        """Let the kept connections through at every site, gateway first; again is fine.

        confirm: asked, under the lock, before anything is opened; whatever it raises is the end.
        KernelError when a site no longer has the move's gate, JournalError when it was not
        prepared to the end: then nothing is opened.
        """
        with self.state.locked():
            journal, plan = self._load(move_id)
            self._refuse_earlier_boot(journal)
            if journal.move.quiesces:
                raise RefusedError(
                    f"{move_id} only holds listeners so far: there is no gate to open",
                    hint=f"natkeep prepare {move_id} --site source=...; teardown lets callers in",
                )
            if confirm is not None:
                confirm(journal)
            self._open_known(journal, plan)
            prepared = range(len(plan.prepare))
            if not all(journal.is_done(number) for number in prepared):
                raise JournalError(
                    f"move {move_id} was not prepared to the end",
                    hint=f"natkeep teardown {move_id}, then prepare again",
                )
            numbers = range(len(plan.prepare), len(plan.steps))
            self._apply_or_undo(journal, plan, [n for n in numbers if not journal.is_done(n)])
