"""The situations of the correctness matrix: what a move meets on its way.

    @situation(5, "client closes first")
    def client_closes_first(lab: Lab) -> None: ...

Rule: a situation knows neither the translator nor the mode; it is the same for natkeep and for
the baselines. One that a translator refuses beforehand ends with that refusal (`lab.refused`),
which the matrix shows as "refused" and never as a failure.
matrix.py reads the registry. Numbers like H1 and T8 are those of the issue that asked for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from natkeep.lab.lab import Lab
from natkeep.lab.topology import SECOND_CLIENT, THIRD, USUAL

Moves = Callable[[Lab], None]
THREE_HOSTS = {"seats": (*USUAL, THIRD)}
TWO_CLIENTS = {"seats": (*USUAL, SECOND_CLIENT)}


@dataclass(frozen=True, slots=True)
class Situation:
    """One row of the matrix.

    engine: `criu` where only the real one shows it, else `repair`, which is quicker.
    families: 4, 6 or both. probes: whether CRIU's window probe arrives, is lost, or both.
    setup: further arguments of Lab. may_refuse: modes in which natkeep may refuse it beforehand.
    """

    number: int
    name: str
    moves: Moves
    engine: str = "repair"
    families: tuple[int, ...] = (4, 6)
    probes: tuple[bool, ...] = (True, False)
    setup: dict[str, Any] = field(default_factory=dict)
    may_refuse: tuple[str, ...] = ()

    def is_called(self, word: str) -> bool:
        """Whether *word* is its number, or is in its name."""
        if word.isdigit():
            return self.number == int(word)
        return word.lower() in self.name.lower()


SITUATIONS: list[Situation] = []


def situation(number: int, name: str, **options: Any) -> Callable[[Moves], Moves]:
    """Register the function as the situation of that number and name."""

    def register(moves: Moves) -> Moves:
        SITUATIONS.append(Situation(number, name, moves, **options))
        return moves

    return register


def after_pause(
    number: int, name: str, *words: str, before: Moves = lambda lab: None, **options: Any
) -> None:
    """Register a move in a pause of the connection, after which *words* of Traffic follow.

    before: what is done before the server starts.
    """

    def moves(lab: Lab) -> None:
        before(lab)
        lab.begin(pause=True)
        lab.move()
        for word in words:
            getattr(lab.traffic, word)()
        lab.finish()

    situation(number, name, **options)(moves)


def carry_on_after(lab: Lab, *moves: Callable[[], None]) -> None:
    """One move after the other; after each of them all connections carry on."""
    for move in moves:
        move()
        lab.traffic.talk_on()


def usual_end(lab: Lab) -> None:
    """The server moves, the connections carry on, and all is judged."""
    carry_on_after(lab, lab.move)
    lab.finish()
