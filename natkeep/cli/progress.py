"""A bar of the image's copy, for a person at a terminal; otherwise there is none.

Rule: all that takes time is done when it is made, before the freeze, and a copy that is over at
once is none to show: nothing is written in a short blackout.
"""

from __future__ import annotations

import argparse
import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_DELAY = 0.2  # s after which a copy takes long enough for a bar


def make_bar(args: argparse.Namespace) -> Bar | None:
    """A bar on stderr where that is a terminal and a person reads it, else None."""
    if args.quiet or args.json or sys.stderr is None or not sys.stderr.isatty():
        return None
    return Bar()


class Bar:
    """Octets that were copied, of how many if that is known; by tqdm."""

    def __init__(self) -> None:
        from tqdm import tqdm

        tqdm.monitor_interval = 0  # no thread of its own
        tqdm.set_lock(threading.RLock())  # in the place of one between processes
        self._make = tqdm
        self._bar: Any = None

    def show(self, octets: int, total: int | None) -> None:
        """*octets* are there by now."""
        if self._bar is None:
            self._bar = self._open()
        if total:
            self._bar.total = max(total, octets)  # what tar adds may pass it
        self._bar.update(octets - self._bar.n)

    def end(self) -> None:
        """The copy is over, and the bar goes."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def aside(self) -> AbstractContextManager[None]:
        """While a line is written."""
        return nullcontext() if self._bar is None else self._make.external_write_mode(sys.stderr)

    def _open(self) -> Any:
        return self._make(
            desc="copy", unit="B", unit_scale=True, leave=False, delay=_DELAY, file=sys.stderr,
            dynamic_ncols=True,
        )  # fmt: skip
