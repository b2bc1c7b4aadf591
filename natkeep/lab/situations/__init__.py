"""the situations of the correctness matrix: what a move meets, each told once.

    @situation(5, "client closes first")
    def client_closes_first(lab: Lab) -> None: ...

Rule: a situation is told with the lab's words and knows neither the translator nor the mode; it
is told alike to natkeep and to the baselines. One that a translator refuses beforehand ends with
that refusal (`lab.refused`), which the matrix shows as "refused" and never as a failure.
The numbers are the issue's; the registry is read by matrix.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from natkeep.lab.lab import Lab

Tell = Callable[["Lab"], None]


@dataclass(frozen=True, slots=True)
class Situation:
    """One row of the matrix.

    engine: `criu` where only the real one shows it, else `repair`, which is quicker.
    families: 4, 6 or both. probes: whether CRIU's window probe arrives, is lost, or both.
    setup: further arguments of Lab. may_refuse: modes in which natkeep may refuse it beforehand.
    """

    number: int
    name: str
    tell: Tell
    engine: str = "repair"
    families: tuple[int, ...] = (4, 6)
    probes: tuple[bool, ...] = (True, False)
    setup: dict[str, Any] = field(default_factory=dict)
    may_refuse: tuple[str, ...] = ()


SITUATIONS: list[Situation] = []


def situation(number: int, name: str, **options: Any) -> Callable[[Tell], Tell]:
    """Register the function as the situation of that number and name."""

    def register(tell: Tell) -> Tell:
        SITUATIONS.append(Situation(number, name, tell, **options))
        return tell

    return register
