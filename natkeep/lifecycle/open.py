"""open: the kept connections are let through, at every site, gateway first.

A move that was prepared from a live process is compared with the image before that, and the sites
that waited for the freeze are made ready.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from natkeep.errors import JournalError, RefusedError
from natkeep.lifecycle.executor import Ground, numbers_before, plan_of
from natkeep.plan.steps import Plan
from natkeep.state.journal import Journal

if TYPE_CHECKING:
    from natkeep.checkpoint import Checkpoint
    from natkeep.plan.translation import Compared


class Opening(Ground):
    """The verb open."""

    def open(
        self, move_id: str, confirm: Callable[[Journal], Checkpoint | None] | None = None
    ) -> Compared | None:
        """Let the kept connections through at every site, gateway first; again is fine.

        confirm: asked, under the lock, before anything is opened; whatever it raises is the end.
        The image that it returns is compared with what was prepared: what came is added. Returned
        is how they differ, None where there was no image.
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
            image = confirm(journal) if confirm is not None else None
            self._open_known(journal, plan)
            _refuse_unprepared(journal, plan)
            compared = None
            if image is not None or journal.change is not None:
                from natkeep.lifecycle import compare  # a move of a frozen process needs it not

                if image is not None:
                    compared = compare.compare(self, journal, plan, image)
                    plan = plan_of(journal)
                compare.widen(self, journal, plan)
            numbers = [n for n in range(len(plan.steps)) if not journal.is_done(n)]
            for number in numbers if journal.move.live else ():
                if number not in journal.records:
                    self.kernel.check(plan.steps[number])
            self._apply_or_undo(journal, plan, numbers)
            return compared

    def unhook(self, move_id: str) -> None:
        """At the sites of an open move take the gates out of all packets' way, if none is closed.

        It waits for the kernel, so it is for afterwards, when no restore waits any more. Under the
        lock: a prepare that has just seen the base chain refers to it in its next transaction.
        """
        with self.state.locked():
            journal, plan = self._load(move_id)
            self._open_known(journal, plan)
            self.kernel.unhook_gates()


def _refuse_unprepared(journal: Journal, plan: Plan) -> None:
    needed, done = numbers_before(plan), journal.is_done
    if journal.change is not None:
        from natkeep.lifecycle.compare import late_numbers

        late, done = late_numbers(journal, plan), journal.has_been_done
        needed = [number for number in needed if number not in late]
    if not all(done(number) for number in needed):
        raise JournalError(
            f"move {journal.move.id} was not prepared to the end",
            hint=f"natkeep teardown {journal.move.id}, then prepare again",
        )
