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
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Self

from natkeep.errors import NatkeepError, RefusedError
from natkeep.lab.engine import Engine, Frozen, Moving, Opening
from natkeep.lab.host import Host
from natkeep.lab.report import Assertion, Report
from natkeep.lab.topology import Address, Seat, Topology
from natkeep.lab.translators import Order, Translator
from natkeep.plan.tuples import FourTuple


class Journey(ABC):
    """The words, mixed into Lab; first what of a Lab they need."""

    name: str
    family: int
    home: Seat
    site: Seat
    at: Host
    new: Address
    topology: Topology
    engine: Engine
    translator: Translator
    server: Moving
    frozen: Frozen
    order: Order
    orders: list[Order]
    undone: list[Order]
    parties: list[Any]
    kept: tuple[FourTuple, ...]
    views: dict[FourTuple, FourTuple]
    restored_ns: int | None
    refused: str
    report: Report

    @abstractmethod
    def freeze(self) -> None: ...

    @abstractmethod
    def prepare(self, *, replaces: Order | None = None) -> None: ...

    @abstractmethod
    def place_order(self, replaces: Order | None = None) -> None: ...

    @abstractmethod
    def restore(self) -> None: ...

    @abstractmethod
    def should(self, name: str) -> AbstractContextManager[None]: ...

    @abstractmethod
    def must(self, name: str) -> AbstractContextManager[None]: ...

    def beside(self, home: Seat, name: str) -> Self:
        """A second process, at *home*; the report, the hosts and the end of the story are shared.

        Say `check_ends` for it, and `finish` for the first one, which judges both.
        """
        other = copy.copy(self)
        other.name, other.home = name, home
        other.kept, other.views = (), {}
        self.parties.append(other)
        return other

    def move_on(self, site: Seat) -> None:
        """The process moves on to *site*, and the gateway's translation is replaced."""
        earlier = self.order
        self.site, self.new = site, site.address(self.family)
        self.freeze()
        self.prepare(replaces=earlier)
        self.restore()
        with self.should("what is left of the earlier move is undone"):
            self.translator.retire(earlier)
        self.undone.append(earlier)

    def move_back(self) -> None:
        """The process moves to where it came from; the translation ends when it exists there."""
        self.freeze()
        self.come_home()

    def come_home(self) -> None:
        """The frozen process is restored where it came from, and the translation ends."""
        self.undone.append(self.order)
        self._restore_at_home(self.translator.withdrawal(self.order))

    def stay(self) -> None:
        """The frozen process is restored where it was, and nothing is translated."""
        self._restore_at_home(Opening(lambda: None))

    def _restore_at_home(self, opening: Opening) -> None:
        # Unsent data may leave before the restore has ended, and be all there is to say: what
        # the process sends from here on is after the move, since what is frozen sends nothing.
        beginning = time.time_ns()
        with self.must("the engine restores the server where it came from"):
            self.at = self.topology[self.home.role]
            self.engine.restore(self.at, self.server, self.frozen, opening)
        self.restored_ns = beginning

    def must_refuse(self, *reasons: str) -> bool:
        """Whether the translator refuses the move beforehand; each of *reasons* must be told.

        One that does not refuse has prepared, and the story may go on with what comes of that.
        """
        self.place_order()
        name = f"the move is refused, since {' and '.join(reasons)}"
        try:
            self.translator.prepare(self.order)
        except NatkeepError as error:
            code = getattr(error, "code", error.exit_code)
            ok = code == RefusedError.exit_code and all(reason in str(error) for reason in reasons)
            self.report.assertions.append(Assertion(name, ok, str(error)))
            self.orders.remove(self.order)
            if ok:
                self.refused = str(error)
            return True
        self.report.assertions.append(Assertion(name, False, "it is not refused"))
        return False
