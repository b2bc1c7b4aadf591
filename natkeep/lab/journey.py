"""the journey: where a process goes beyond one move, and how several of them go together.

    lab.move_on(THIRD); lab.move_back()                   a second hop, and the way home
    other = lab.beside(SECOND_SOURCE, "other")            a second process, with the same words
    lab.must_refuse("is on the source host")              nothing happens, and the reason is told

Rule: these words only order; what an order does at a site is the translator's business, and
whether it was right is judged by the wires.
"""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

from natkeep.errors import NatkeepError, RefusedError
from natkeep.lab.engines import Opening
from natkeep.lab.topology import Seat
from natkeep.lab.translators import TranslatorError
from natkeep.lab.verdict import Assertion

if TYPE_CHECKING:
    from natkeep.lab.stage import Lab


class Journey:
    """The words; mixed into Lab."""

    def beside(self: Lab, home: Seat, name: str) -> Lab:
        """A second process, at *home*; the report, the hosts and the end of the story are shared.

        Say `check_ends` for it, and `finish` for the first one, which judges both.
        """
        other = copy.copy(self)
        other.name, other.home = name, home
        other.kept, other.views = (), {}
        self.parties.append(other)
        return other

    def move_on(self: Lab, site: Seat) -> None:
        """The process moves on to *site*, and the gateway's translation is replaced."""
        earlier = self.order
        self.site, self.new = site, site.address(self.family)
        self.freeze()
        self.prepare(replaces=earlier)
        self.restore()
        with self.should("what is left of the earlier move is undone"):
            self.translator.retire(earlier)
        self.undone.append(earlier)

    def move_back(self: Lab) -> None:
        """The process moves to where it came from; the translation ends when it exists there."""
        self.freeze()
        self.undone.append(self.order)
        self._restore_at_home(self.translator.withdrawal(self.order))

    def stay(self: Lab) -> None:
        """The frozen process is restored where it was, and nothing is translated."""
        self._restore_at_home(Opening(lambda: None))

    def _restore_at_home(self: Lab, opening: Opening) -> None:
        with self.must("the engine restores the server where it came from"):
            self.at = self.topology[self.home.role]
            self.engine.restore(self.at, self.server, self.frozen, opening)
        self.restored_ns = time.time_ns()

    def must_refuse(self: Lab, *reasons: str) -> bool:
        """Whether the translator refuses the move beforehand; each of *reasons* must be told.

        One that does not refuse has prepared, and the story may go on with what comes of that.
        """
        self.place_order()
        name = f"the move is refused, since {' and '.join(reasons)}"
        try:
            self.translator.prepare(self.order)
        except NatkeepError as error:
            refused = getattr(error, "code", error.exit_code) == RefusedError.exit_code
            ok = refused and all(reason in str(error) for reason in reasons)
            self.report.assertions.append(Assertion(name, ok, str(error)))
            self.orders.remove(self.order)
            if ok:
                self.refused = str(error)
            return isinstance(error, TranslatorError)
        self.report.assertions.append(Assertion(name, False, "it is not refused"))
        return False
