"""Where the command line's words go: data to stdout, talk to stderr."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

from natkeep.errors import NatkeepError


def silence(stream: int) -> None:
    """What could not be written must not fail once more, when Python flushes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def talk(args: argparse.Namespace, line: str) -> None:
    if not args.quiet and sys.stderr:
        try:
            print(line, file=sys.stderr)
        except OSError:  # its reader has gone (`2>&1 | head`); the work goes on
            silence(2)


def describe_error(error: NatkeepError) -> str:
    """Its message and, where there is one, its hint."""
    return f"natkeep: {error}" + (f"\n  ({error.hint})" if error.hint else "")


def print_json(value: dict[str, Any]) -> None:
    """One document on stdout."""
    print(json.dumps(value, indent=2))


def print_verb(args: argparse.Namespace, line: str, **facts: object) -> None:
    """What has been done to the move: a document with --json, or else *line*, as talk."""
    if args.json:
        print_json({"schema": 1, "id": args.id, **facts})
    elif line:
        talk(args, f"natkeep: {line}")


def print_as(
    args: argparse.Namespace,
    to_json: Callable[..., dict[str, Any]],
    to_lines: Callable[..., Iterable[str]],
    *values: object,
) -> None:
    """*values* on stdout: as a document with --json, or else as lines for a person."""
    if args.json:
        print_json(to_json(*values))
    else:
        print(*to_lines(*values), sep="\n")
