"""where the command line's words go: data to stdout, talk to stderr."""

from __future__ import annotations

import argparse
import os
import sys


def silence(stream: int) -> None:
    """What could not be written must not fail once more, when Python flushes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def talk(args: argparse.Namespace, line: str) -> None:
    if not args.quiet and sys.stderr:
        try:
            print(line, file=sys.stderr)
        except OSError:  # nobody listens (`2>&1 | head`); the work goes on
            silence(2)


def print_verb(move_id: str, **facts: object) -> None:
    from natkeep import report

    report.print_json({"schema": 1, "id": move_id, **facts})
