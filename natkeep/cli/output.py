"""Where the command line's words go: data to stdout, talk to stderr."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from typing import Any

from natkeep.errors import NatkeepError
from natkeep.terminal import say, show, show_json


def talk(args: argparse.Namespace, *lines: str) -> None:
    if not args.quiet:
        say(*lines)


def describe_error(error: NatkeepError) -> tuple[str, ...]:
    """Its message and, where there is one, its hint: a line each."""
    return (f"natkeep: {error}", *([f"  ({error.hint})"] if error.hint else []))


def print_json(value: dict[str, Any]) -> None:
    """One document on stdout."""
    show_json(json.dumps(value, indent=2))


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
        show(to_lines(*values))
