"""When the moves of a node are looked at again, and what failed later each time.

Rule: nothing is given up.
"""

from __future__ import annotations

import time

_SOON, _LATEST = 0.5, 60.0  # s until what failed is tried again, the first time and at last
_DOUBLED = 7  # times; by then it is the latest


class Retries:
    """By the monotonic clock."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}
        self._failed: dict[str, int] = {}

    def overdue(self) -> set[str]:
        """The moves that are to be looked at by now."""
        now = time.monotonic()
        return {move_id for move_id, at in self._due.items() if at <= now}

    def begin(self, move_id: str) -> None:
        """It is looked at now."""
        self._due.pop(move_id, None)

    def after(self, move_id: str, seconds: float = _SOON) -> None:
        """Have it looked at again, in so many seconds at most."""
        at = time.monotonic() + seconds
        self._due[move_id] = min(at, self._due.get(move_id, at))

    def fail(self, move_id: str) -> None:
        """It failed, perhaps not for the first time."""
        times = self._failed.get(move_id, 0)
        self._failed[move_id] = times + 1
        self.after(move_id, min(_SOON * 2 ** min(times, _DOUBLED), _LATEST))

    def succeed(self, move_id: str) -> None:
        """It did not, or is another by now."""
        self._failed.pop(move_id, None)
