"""What a node says of a move: how far it is, of which order, and what went wrong.

    {"schema": 1, "phase": "prepared", "generation": 3, "since": 1764500000.5,
     "maps": ["10.2.0.10=10.3.0.20"], "as": "criu-52-34d2c", "waits": {"host-b": "prepared"},
     "lost": false, "observed": {"alive": 2, "drift": []},
     "error": {"exit": 4, "code": "refused", "message": "..."}}

since: seconds since 1970, by the node's own clock. waits: for which nodes it waits. maps: as they
are there, none if nothing is. as: the id that natkeep-hook has it by (restored.py), or "".
observed: what was seen there last (observed.py), null before. lost: it was ready before the host
booted, and could not be made so again yet.

Rule: it is written by the agent of that node alone; what cannot be read, of a later natkeep say,
is taken neither for gone nor for ready.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from natkeep import policy
from natkeep.errors import NatkeepError
from natkeep.fleet.observed import Observed
from natkeep.fleet.want import SCHEMA, Phase, a_text, as_object, texts, whole
from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class Error:
    """What went wrong: the exit code of DESIGN's contract, a word for programs, a line for us."""

    exit: int
    code: str
    message: str

    @classmethod
    def of(cls, error: Exception) -> Error:
        """The code is the name of its class; of a fault of natkeep's that of NatkeepError."""
        if not isinstance(error, NatkeepError):
            error = NatkeepError(f"{type(error).__name__}: {error}")
        hint = f" ({error.hint})" if error.hint else ""
        code = type(error).__name__.removesuffix("Error").lower()
        return cls(error.exit_code, code, f"{error}{hint}")


@dataclass(frozen=True, slots=True)
class Done:
    """See above."""

    phase: Phase
    generation: int
    error: Error | None = None
    waits: Mapping[str, Phase] = {}
    maps: tuple[str, ...] = ()
    hooked: str = ""
    observed: Observed | None = None
    lost: bool = False

    def to_json(self) -> dict[str, Any]:
        """As it is in the store, but for the time."""
        return {
            "schema": SCHEMA, "phase": str(self.phase), "generation": self.generation,
            "maps": [*self.maps], "as": self.hooked, "lost": self.lost,
            "observed": self.observed and self.observed.to_json(),
            "waits": {node: str(phase) for node, phase in self.waits.items()},
            "error": self.error
            and {
                "exit": self.error.exit, "code": self.error.code, "message": self.error.message
            },
        }  # fmt: skip

    def write(self, now: float) -> str:
        """The text that is in the store."""
        return json.dumps({**self.to_json(), "since": round(now, 3)})

    def was_ready(self) -> bool:
        """Whether it is, or was before a boot."""
        return self.lost or self.phase.reaches(Phase.PREPARED)

    def is_there(self) -> bool:
        """Whether something of it is there that can be looked at."""
        return self.phase in (Phase.PREPARED, Phase.OPEN)

    def reaches(self, phase: Phase, generation: int) -> bool:
        """Whether it is as far, of that very order; gone is as far as an undo comes."""
        if self.generation != generation:
            return False
        return self.phase == phase if phase == Phase.GONE else self.phase.reaches(phase)


NOTHING = Done(Phase.GONE, 0)
UNREADABLE = Done(Phase.OPENING, 0)


def parse_done(text: str | None) -> Done:
    """What a node said; NOTHING where it said nothing."""
    if text is None:
        return NOTHING
    try:
        found = as_object(text)
        if found["schema"] != SCHEMA:
            return UNREADABLE
        told, error = found["error"], None
        if told is not None:
            error = Error(whole(told["exit"]), a_text(told["code"]), a_text(told["message"]))
        waits = {node: Phase(phase) for node, phase in found.get("waits", {}).items()}
        seen = found.get("observed")
        maps = tuple(texts(found.get("maps", [])))
        return Done(
            Phase(found["phase"]), whole(found["generation"]), error, waits, maps,
            a_text(found.get("as", "")), seen and Observed.parse(seen), found.get("lost") is True,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError):
        return UNREADABLE


def describe_alive(bounds: policy.Agent, told: Iterable[Done]) -> str:
    """What a node says of itself while it lives, but for its pid and version."""
    opened = sum(each.phase == Phase.OPEN for each in told)
    roles = None if bounds.roles is None else [*bounds.roles]
    return json.dumps(
        {"schema": SCHEMA, "groups": [*bounds.groups], "open": opened, "roles": roles}
    )
