"""Colours for a person at a terminal: what is well, what is not, and headings.

Off with --no-color, with NO_COLOR set, and where stdout is no terminal. Rule: a line is painted
when it is whole and harmless (terminal.py), and only words of ours are.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable

_CODES = {"good": "32", "bad": "1;31", "warn": "33", "dim": "2", "head": "1"}
_CELL = "(?<=  )(?:{})(?=  |$)"
"""Of a table, whose columns are two spaces apart."""
_LOST = _CELL.format("no socket|no entry|not tracked")
_WORDS = re.compile(
    "|".join(
        (
            rf"(?P<bad>^ *(?:stop|FAIL)(?= )|^\d+ stops? .*|DRIFTED.*|\bfail$|{_LOST})",
            rf"(?P<warn>^warn(?= )|{_CELL.format('one-way')})",
            rf"(?P<good>^ *ok(?= )|^nothing stops .*|\bpass$|{_CELL.format('live')})",
            rf"(?P<dim>^note(?= )|{_CELL.format('ended|silent')})",
            r"(?P<head>^MOVE  .*|^  LOCAL  .*)",
        )
    )
)


def choose_paint(*, no_color: bool) -> Callable[[str], str]:
    """What `terminal.show` does to each line of a report: `paint`, or nothing."""
    at_terminal = sys.stdout is not None and sys.stdout.isatty()
    plain = no_color or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return paint if at_terminal and not plain else str


def paint(line: str) -> str:
    """*line* with its words for good and bad in colour."""
    return _WORDS.sub(lambda found: f"\x1b[{_CODES[found.lastgroup or '']}m{found[0]}\x1b[0m", line)
