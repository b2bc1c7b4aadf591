"""Where the command line's words go: data to stdout, talk to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any


def silence(stream: int) -> None:
    """What could not be written must not fail once more, when Python flushes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def talk(args: argparse.Namespace, line: str) -> None:
    if not args.quiet and sys.stderr:
        try:
            print(line, file=sys.stderr)
        except OSError:  # its reader has gone (`2>&1 | head`); the work goes on
            silence(2)


def print_json(value: dict[str, Any]) -> None:
    """One document on stdout."""
    print(json.dumps(value, indent=2))


def print_verb(move_id: str, **facts: object) -> None:
    print_json({"schema": 1, "id": move_id, **facts})
