"""The command line: verbs; it parses, calls lifecycle, prints, and leaves with the exit code.

    parser.py      options, and which module runs each verb
    usage.py       the verbs in groups, examples, and what a typo may have meant
    arguments.py   from parsed arguments to values
    change.py      the verbs that change sites; show.py: those that only look
    output.py      where words go

Rule: data goes to stdout, talk to stderr; with --json stdout is one document with `schema` 1.
Nothing is decided here, and what only one verb needs is imported when that verb runs.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from natkeep import afterwards, faultpoints
from natkeep.cli.output import describe_error, end_document, error_to_json, wants_json
from natkeep.cli.parser import Parser, make_parser
from natkeep.errors import NatkeepError, UsageError
from natkeep.system_log import note
from natkeep.terminal import say, say_exception, silence

__all__ = ["main", "make_parser", "program"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_CONTAINERS = 50_000
"""New objects until the garbage collector looks at them, instead of 700: 5 MiB at most."""


def program() -> NoReturn:
    """natkeep as a process: `main`, and the end.

    What an interpreter does at its end, freeing one by one what the kernel takes back at once, is
    left out (6 ms of 70). A lab has threads and files to end in the usual way.
    And what refers to itself, which is little here, is looked for less often (3 ms).
    """
    gc.set_threshold(_CONTAINERS)
    sys.excepthook = say_exception
    code = main()
    if "natkeep.lab" in sys.modules:
        sys.exit(code)
    if sys.stderr:
        sys.stderr.flush()
    afterwards.begin()
    os._exit(code)


def main(arguments: Sequence[str] | None = None, parser: Parser | None = None) -> int:
    """Run natkeep; the exit code of DESIGN's contract (see errors.py for each).

    parser: that of the verb, where it has been made beforehand.

    An error is a line on stderr and, with --json, in the document on stdout too.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    error: NatkeepError | None = None
    try:
        code = _run(arguments, parser or make_parser(arguments))
    except NatkeepError as failed:
        error, code = failed, failed.exit_code
    except KeyboardInterrupt:
        error, code = NatkeepError("interrupted"), 130
    except BrokenPipeError:  # our reader has seen enough
        silence(1)
        return 1
    except OSError as failed:
        error, code = NatkeepError(str(failed)), 1
    if error is not None:
        say(*describe_error(error))
    try:
        end_document(error_to_json(error, code) if error and wants_json(arguments) else None)
        if sys.stdout:
            sys.stdout.flush()  # here, where it can still fail in one line
    except OSError as failed:
        if error is None and not isinstance(failed, BrokenPipeError):
            say(f"natkeep: {failed}")
        silence(1)
        return code or 1
    return code


def _run(arguments: Sequence[str], parser: Parser) -> int:
    try:
        faultpoints.demand_known()
        args = parser.parse_args(arguments or ["help"])
        with _signals_as_exit(), _noted(args):
            code = int(args.run(args))
        return code if arguments else 2  # a script whose variable is empty is to fail
    finally:
        if sys.stdout:
            sys.stdout.flush()


_NOTED = frozenset(
    (
        "prepare",
        "quiesce",
        "run",
        "open",
        "repair",
        "teardown",
        "rollback",
        "gc",
        "migrate",
        "finish",
    )
)
"""The verbs that change something."""


@contextmanager
def _noted(args: argparse.Namespace) -> Iterator[None]:
    """A line in the system's log on what was done, or was tried in vain; `moved` is a verb's word.

    Not on what was only asked for (--dry-run), was no command, or (`changed`) found nothing to do.
    """
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failed = error
        raise
    finally:
        told = args.verb in _NOTED and not getattr(args, "dry_run", False)
        told = told and (failed is not None or getattr(args, "changed", True))
        if told and not isinstance(failed, UsageError):
            words = [args.verb, getattr(args, "id", None) or "", getattr(args, "moved", "")]
            how = "done" if failed is None else f"failed: {failed or type(failed).__name__}"
            line = f"{' '.join(filter(None, words))}: {how}"
            note("natkeep", line, failed=failed is not None)


class _signals_as_exit:
    """A signal unwinds the stack, so that what was begun is undone; more do not interrupt that.

    What the caller ignores (nohup) stays ignored.
    """

    def __enter__(self) -> None:
        def leave(number: int, _: object) -> None:
            for each in self._before:
                signal.signal(each, signal.SIG_IGN)
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        self._before = {n: each for n, each in handlers.items() if each != signal.SIG_IGN}
        for number in self._before:
            signal.signal(number, leave)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
