"""Writes lines to stdout and stderr; all that natkeep, its hook and its lab print passes here.

Rule: a line is one line of printable characters, whatever a name in the kernel or a file holds:
escape codes, newlines, bidirectional controls and octets that are no UTF-8 are shown as escapes,
and so is what the stream's encoding lacks. What it imports a blackout waits for.
"""

from __future__ import annotations

import os
import sys

from natkeep.errors import in_one_line

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import TextIO


def show(lines: Iterable[str], paint: Callable[[str], str] = str) -> None:
    """Data, on stdout, each line as *paint* (colour.py) makes it; OSError where it cannot be."""
    _write(sys.stdout, [f"{paint(in_one_line(line))}\n" for line in lines])


def show_json(text: str) -> None:
    """A document as `json` writes it, on stdout: ASCII, with escapes of its own for all but DEL."""
    _write(sys.stdout, [text.replace("\x7f", "\\u007f"), "\n"])


def clear() -> None:
    """Begin anew at the top, where stdout is a terminal."""
    if sys.stdout and sys.stdout.isatty():
        sys.stdout.write("\x1b[H\x1b[2J")


def say(*lines: str, end: str = "\n") -> None:
    """Talk, on stderr; where its reader has gone (`2>&1 | head`) the work goes on."""
    try:
        _write(sys.stderr, [f"{in_one_line(line)}{end}" for line in lines])
    except OSError:
        silence(2)


def say_exception(_kind: object, error: BaseException, _traceback: object) -> None:
    """The traceback of an error that is a fault of natkeep's; for sys.excepthook."""
    import traceback

    say(*"".join(traceback.format_exception(error)).splitlines())


def silence(stream: int) -> None:
    """What could not be written must not fail once more, when Python flushes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _write(stream: TextIO | None, lines: list[str]) -> None:
    if stream is None:  # it was closed when we were started
        return
    text = "".join(lines)
    if not text.isascii():
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
    stream.write(text)
    stream.flush()
