"""Where the command line's words go: data to stdout, talk to stderr.

With --json a verb's document is held until the verb has ended, since an error is told in it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from natkeep.errors import NatkeepError
from natkeep.terminal import say, show, show_json


def talk(args: argparse.Namespace, *lines: str) -> None:
    if not args.quiet:
        say(*lines)


def describe_error(error: NatkeepError) -> tuple[str, ...]:
    """Its message and, where there is one, its hint: a line each."""
    return (f"natkeep: {error}", *([f"  ({error.hint})"] if error.hint else []))


_held: list[str] = []
"""The document that `end_document` is to print."""


def print_json(value: dict[str, Any]) -> None:
    """One document on stdout, when the verb has ended."""
    hold_document(json.dumps(value, indent=2))


def hold_document(text: str) -> None:
    """The same, of the text of a JSON object."""
    _held[:] = [text]


def end_document(error: dict[str, Any] | None = None) -> None:
    """Print the document that is held, with *error* in it; OSError where stdout takes none."""
    document, _held[:] = "".join(_held), []
    if error is not None:
        more = json.dumps({"error": error}).removeprefix("{")
        document = f"{(document or json.dumps({'schema': 1})).removesuffix('}').rstrip()}, {more}"
    if document:
        show_json(document)


def error_to_json(error: NatkeepError, code: int) -> dict[str, Any]:
    """What `error` is in a document: its message, hint and exit code."""
    return {"message": str(error), "hint": error.hint, "exit": code}


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether the command line asks for JSON, also where it is wrong and was not understood."""
    words = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return any(len(word) > 3 and "--json".startswith(word) for word in words)


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
