"""What lives of a node's moves, and what of them is not as it was put there: natkeep's own status.

    {"alive": 2, "drift": ["table inet natkeep: nothing of move web is there"]}

alive: connections that the kernel knows to live, as `natkeep status` counts them; drift: the first
lines of those that it shows. It is looked at when a move has been prepared or opened a while ago,
and then every 30 s, or less often where that takes long.

Rule: a process of its own looks, with the least priority: an agent that has ten thousand moves has
to act on the next one meanwhile, and a blackout is no time to look.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from natkeep.errors import JournalError
from natkeep.fleet.want import Phase, a_text, as_object, texts, whole
from natkeep.terminal import show_json
from natkeep.values import dataclass

_EVERY, _CALM, _TICK = 30.0, 5.0, 1.0  # s; calm: nothing has changed of a move for so long
_SHARE = 10  # of the time, looking takes no more than one in so many parts
_FEW = 50  # moves that are named; of more all are looked at
_AT_ONCE = 500  # moves; what is known of each takes some 60 KiB until all of them are read
_LINES = 5  # of drift
_PATIENCE = 600  # s
_CALL = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from natkeep.fleet.observed import show; show(sys.argv[2], *sys.argv[3:])"
)
_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Observed:
    """See above."""

    alive: int
    drift: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it is in the store."""
        return {"alive": self.alive, "drift": [*self.drift]}

    @classmethod
    def parse(cls, found: Mapping[str, Any]) -> Observed:
        """What *found* says; KeyError or ValueError if it does not."""
        return cls(whole(found["alive"]), tuple(texts(found["drift"])))

    def describe(self, phase: Phase) -> list[str]:
        """For a person; nothing lives yet where no gate is open."""
        more = f" (and {len(self.drift) - 1} more)" if self.drift[1:] else ""
        drifted = [f"DRIFTED: {self.drift[0]}{more}"] if self.drift else []
        return [*([f"{self.alive} live"] if phase == Phase.OPEN else []), *drifted]


class Observer:
    """Looks in the background.

    phases: how far each move is that is there, by its id here; hand: takes what was seen.
    """

    def __init__(
        self, directory: str, phases: Callable[[], Mapping[str, Phase]],
        hand: Callable[[dict[str, Observed]], None],
    ) -> None:  # fmt: skip
        self._directory, self._phases, self._hand = directory, phases, hand
        self._since: dict[str, tuple[Phase, float]] = {}
        self._seen: dict[str, Phase] = {}
        self._again = time.monotonic() + _EVERY

    def start(self) -> None:
        """Look from now on, in a thread."""
        threading.Thread(target=self._run, daemon=True).start()

    def find_due(self, now: float) -> set[str]:
        """The ids of what is to be looked at at that time of the monotonic clock."""
        phases = {**self._phases()}
        fresh = {move_id: (phase, now) for move_id, phase in phases.items()}
        kept = {move_id: it for move_id, it in self._since.items() if phases.get(move_id) == it[0]}
        self._since = fresh | kept
        self._seen = {move_id: p for move_id, p in self._seen.items() if phases.get(move_id) == p}
        calm = {move_id for move_id, (_, since) in self._since.items() if now - since >= _CALM}
        return calm if now >= self._again else calm - {*self._seen}

    def note(self, ids: set[str], now: float, spent: float) -> None:
        """These were looked at by now, which took so many seconds."""
        self._seen |= {move_id: self._since[move_id][0] for move_id in ids}
        if now >= self._again:
            self._again = now + max(_EVERY, spent * _SHARE)

    def _run(self) -> None:
        while True:
            time.sleep(_TICK)
            began = time.monotonic()
            if ids := self.find_due(began):
                found = look(self._directory, ids)
                self.note(ids, began, time.monotonic() - began)
                self._hand({move_id: it for move_id, it in found.items() if move_id in ids})


def look(directory: str, ids: set[str]) -> dict[str, Observed]:
    """What a process of its own sees of these moves; less where it fails."""
    named = sorted(ids) if len(ids) <= _FEW else ()
    command = [sys.executable, "-I", "-c", _CALL, json.dumps(sys.path), directory, *named]
    try:
        done = subprocess.run(
            command, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    found: dict[str, Observed] = {}
    for line in done.stdout.splitlines():
        with suppress(KeyError, ValueError):  # it was killed in the middle of the last one
            row = as_object(line.decode())
            found[a_text(row["id"])] = Observed.parse(row)
    return found


def show(directory: str, *ids: str) -> None:
    """In that process: a line of JSON for each move, of all without ids."""
    from natkeep.kernel.linux import LinuxKernel
    from natkeep.lifecycle.executor import Executor
    from natkeep.lifecycle.status import read_status
    from natkeep.plan.connection_state import State
    from natkeep.report.status import look_closely
    from natkeep.state.directory import StateDirectory

    ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL)
    os.nice(19)
    state = StateDirectory(directory, create=False)
    executor, unreadable = Executor(LinuxKernel(state.path), state), list[JournalError]()
    ids = ids or executor.state.ids()
    for start in range(0, len(ids), _AT_ONCE):
        for status in read_status(executor, ids[start : start + _AT_ONCE], unreadable):
            tally = look_closely(status).tally()
            drift = [line for site in status.sites for line in site.drift][:_LINES]
            seen = Observed(tally[State.LIVE] + tally[State.ONE_WAY], tuple(drift))
            show_json(json.dumps({"id": status.plan.move.id, **seen.to_json()}))
