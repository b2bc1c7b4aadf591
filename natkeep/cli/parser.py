"""The parser of all verbs, and which module runs each."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from natkeep import __version__
from natkeep.errors import UsageError

LAB = "practice networks: move a real server, see what its peer saw"


class _Formatter(argparse.HelpFormatter):
    """argparse's, which makes one for each option and imports shutil (3 ms) for the width alone."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_read_width() - 2)


def _read_width() -> int:
    """Columns of the terminal, as shutil.get_terminal_size tells them."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and int(columns):
        return int(columns)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


class Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, as everything else here does."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


def make_parser(arguments: Sequence[str] = ("lab",)) -> argparse.ArgumentParser:
    """The parser of all verbs; tests and documentation read it too.

    *arguments* decide only whether the lab, which no other verb needs, is imported for its own.
    """
    common = _make_common(argparse.SUPPRESS)
    parser = Parser(
        prog="natkeep",
        description="Keep TCP connections alive when CRIU restores a process at another address.",
        parents=[_make_common(False)],
    )
    parser.add_argument("--version", action="version", version=f"natkeep {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=Parser)

    def add(name: str, text: str, module: str) -> Parser:
        verb: Parser = verbs.add_parser(name, help=text, description=text, parents=[common])
        verb.set_defaults(run=_runs(module, name))
        return verb

    plan = add("plan", "print what prepare would do; touches nothing", "change")
    _add_move_options(plan)
    plan.add_argument("--format", choices=("text", "json", "nft"), default="text")
    prepare = add("prepare", "make every site ready, with the gate closed", "change")
    _add_move_options(prepare).add_argument(
        "--live", metavar="PID", help="connections of a process that still runs, and its children"
    )
    prepare.add_argument("--gate", choices=("closed", "open"), default="closed")
    prepare.add_argument(
        "--replace", metavar="ID", help="the earlier move of the same process, moved on"
    )
    prepare.add_argument("--dry-run", action="store_true", help="check, and print the plan")
    _add_quiesce(add("quiesce", "before a dump: have new connections wait", "change"))
    running = add("run", "prepare, have CRIU restore, open; undo if it fails", "change")
    _add_move_options(running)
    running.add_argument(
        "--keep-closed-on-failure",
        action="store_true",
        help="leave the move prepared, its gate closed, for another try",
    )
    running.add_argument("criu", metavar="CRIU", nargs="+", help="criu restore ..., behind --")
    opening = add("open", "let the kept connections through", "change")
    opening.add_argument("id", metavar="ID")
    opening.add_argument(
        "--image", metavar="DIR", help="the dump of a process that was prepared for by --live"
    )
    status = add("status", "what is prepared, what it carries, what drifted", "show")
    status.add_argument("id", metavar="ID", nargs="?")
    status.add_argument("--strict", action="store_true", help="exit 6 when something drifted")
    check = add("check", "can this machine do it? each finding has a code", "show")
    check.add_argument("--site", metavar="ROLE[=NETNS]", action="append", default=[])
    explain = add("explain", "what a finding means and what to do", "show")
    explain.add_argument("code", metavar="CODE")
    _add_repair(add("repair", "put back what another program removed", "change"))
    _add_teardown(add("teardown", "undo a move; a second time is fine", "change"))
    clearing = add("gc", "clear what a crash or a reboot left", "change")
    clearing.add_argument("--site", metavar="ROLE[=NETNS]", action="append", default=[])
    clearing.add_argument("--dry-run", action="store_true", help="say what would be cleared")
    inspect = add("inspect", "the sockets in an image, kept or not and why", "show")
    inspect.add_argument("image", metavar="DIR", nargs="?")
    inspect.add_argument(
        "--live", metavar="PID", help="of a process that still runs, and its children, instead"
    )
    inspect.add_argument("--map", metavar="OLD=NEW", action="append", default=[])
    if "lab" in arguments:
        _add_lab(verbs, common)
    else:
        verbs.add_parser("lab", help=LAB)
    return parser


def _runs(module: str, verb: str) -> Callable[[argparse.Namespace], int]:
    """What runs *verb*: the function of its name, imported when it is called.

    Imports take most of the time of a verb, and a restore may wait for it.
    """

    def run(args: argparse.Namespace) -> int:
        return int(getattr(import_module(f"natkeep.cli.{module}"), verb)(args))

    return run


def _make_common(unset: object) -> Parser:
    """The options that every verb takes, before or behind its name.

    Behind it they are left out of the result when they are not given (argparse.SUPPRESS), or
    they would overwrite what was given before it.
    """
    common = Parser(add_help=False)
    directory = None if unset is False else unset
    common.add_argument(
        "--state-dir",
        metavar="DIR",
        default=directory,
        help="default: $NATKEEP_STATE_DIR, or /run/natkeep",
    )
    for flags, text in (
        (("--json",), "one JSON document on stdout"),
        (("-v", "--verbose"), "print each command as it is done"),
        (("-q", "--quiet"), "print errors only"),
        (("--no-color",), "no colours (there are none so far)"),
    ):
        common.add_argument(*flags, action="store_true", default=unset, help=text)
    return common


def _add_move_options(verb: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add them; the ways to name the connections are returned, since one may have more."""
    verb.add_argument("id", metavar="ID")
    verb.add_argument("--map", metavar="OLD=NEW", action="append", default=[])
    verb.add_argument("--site", metavar="ROLE[=NETNS]", action="append", default=[])
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--image", metavar="DIR", help="connections from CRIU's images")
    source.add_argument("--connections", metavar="FILE", help="lines of LOCAL PEER; - is stdin")
    verb.add_argument(
        "--listeners", action="store_true", help="let new connections reach the image's listeners"
    )
    verb.add_argument("--mode", choices=("stateful", "stateless"), default="stateful")
    verb.add_argument(
        "--no-hold",
        action="store_true",
        help="do not keep what peers say while the gate is closed: they say it again, later",
    )
    verb.add_argument(
        "--guard",
        action="store_true",
        help="have the kept connections outlive a flush of the ruleset: a small process a site",
    )
    verb.add_argument(
        "--unkept",
        choices=("report", "reset"),
        default="report",
        help="tell both ends of connections that cannot be kept, once the move is open",
    )
    return source


def _add_quiesce(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("id", metavar="ID")
    verb.add_argument("--map", metavar="OLD=NEW", action="append", default=[])
    verb.add_argument("--site", metavar="source[=NETNS]", action="append", default=[])
    verb.add_argument(
        "--port",
        metavar="PORT",
        type=_port,
        action="append",
        default=[],
        help="hold listeners on this port only; repeatable; default: all at OLD or the wildcard",
    )
    verb.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=10.0,
        help="wait so long for those that are not accepted yet (default: 10)",
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def _add_repair(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("id", metavar="ID", nargs="?")
    verb.add_argument("--all", action="store_true", help="every move there is, instead of one")


def _add_teardown(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("id", metavar="ID")
    verb.add_argument(
        "--drain",
        metavar="SECONDS",
        nargs="?",
        type=_seconds,
        const=float("inf"),
        help="wait until the kept connections have ended, so long at most",
    )
    verb.add_argument("--yes", action="store_true", help="even if connections live")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _add_lab(verbs: argparse._SubParsersAction[Parser], common: Parser) -> None:
    from natkeep.lab.cli import add_parser, run

    add_parser(verbs, parents=[common]).set_defaults(run=run)
