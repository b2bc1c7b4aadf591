"""The parser of all verbs, and which module runs each.

Size: over 400 lines, because the table of all options is read as one.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from natkeep import __version__
from natkeep.errors import UsageError
from natkeep.plan.undone import LONGEST

Option = tuple[str, dict[str, Any]]
"""The name of an option or an argument, and what argparse is told of it."""


EVERYWHERE = "options of every verb"


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

    def format_help(self) -> str:
        from natkeep.cli.usage import describe

        # Of natkeep itself it lists all verbs, and `natkeep --help open` has made one alone.
        return describe(self if " " in self.prog else make_parser())

    def parse_args(self, args: Any = (), namespace: Any = None) -> Any:
        """As argparse's; with what was probably meant where it is wrong."""
        try:
            parsed, rest = self.parse_known_args(args, namespace)
            if not rest:
                return parsed
            from natkeep.cli.usage import find_verb, refuse_rest

            verb = find_verb(self, parsed.verb)
            refuse_rest(find_verb(verb, parsed.lab_verb) if parsed.verb == "lab" else verb, rest)
        except UsageError as error:
            if not ({"run", "restore"} <= {*args} and "--" not in args):
                raise
            put = "put -- before criu: natkeep run ID OPTIONS -- criu restore ..."
            raise UsageError(str(error), hint=put) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            from natkeep.cli.usage import refuse_verb

            refuse_verb(self.prog, value, action.choices)
        super()._check_value(action, value)


def make_parser(arguments: Sequence[str] = ()) -> Parser:
    """The parser of the verbs that *arguments* name, or of all where they name none.

    Help, tests and pages are made of all; the lab's is imported only then, or where it is named.
    """
    common = _make_common(argparse.SUPPRESS)
    parser = Parser(
        prog="natkeep",
        description="Keep TCP connections alive when CRIU restores a process at another address.",
        parents=[_make_common(False)],
    )
    parser.add_argument("--version", action="version", version=f"natkeep {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=Parser)
    named = {*VERBS, "lab"}.intersection(arguments)
    for name, (module, text, options) in VERBS.items():
        if named and name not in named:  # it takes half a millisecond, and a restore may wait
            continue
        verb: Parser = verbs.add_parser(name, help=text, description=text, parents=[common])
        verb.set_defaults(run=partial(_run, module, name), verb=name)
        _add_options(verb, options)
    if not named or "lab" in named:
        from natkeep.lab.cli import add_parser, run

        add_parser(verbs, parents=[common]).set_defaults(run=run, verb="lab")
    return parser


def _add_options(verb: Parser, options: Sequence[Option]) -> None:
    """Add them; the ways to name a move's connections exclude each other."""
    source = verb.add_mutually_exclusive_group() if _CONNECTIONS in options else verb
    for name, details in options:
        ways = ("--image", "--connections", "--live")
        (source if name in ways else verb).add_argument(name, **details)


def _run(module: str, verb: str, args: argparse.Namespace) -> int:
    """Run *verb*: the function of its name, whose module is imported only now.

    Imports take most of the time of a verb, and a restore may wait for it.
    """
    return int(getattr(import_module(f"natkeep.cli.{module}"), verb)(args))


def _make_common(unset: object) -> Parser:
    """The options that every verb takes, before or behind its name.

    Behind it they are left out of the result when they are not given (argparse.SUPPRESS), or
    they would overwrite what was given before it.
    """
    parser = Parser(add_help=False)
    common = parser.add_argument_group(EVERYWHERE)
    common.add_argument(
        "--state-dir", metavar="DIR", default=unset or None,
        help="default: $NATKEEP_STATE_DIR, or /run/natkeep",
    )  # fmt: skip
    for flags, text in (
        (("--json",), "one JSON document on stdout"),
        (("-v", "--verbose"), "print each command as it is done"),
        (("-q", "--quiet"), "print errors only"),
        (("--no-color",), "no colours, as without a terminal or with NO_COLOR set"),
    ):
        common.add_argument(*flags, action="store_true", default=unset, help=text)
    return parser


def _option(name: str, metavar: str | None = None, **details: Any) -> Option:
    return name, details if metavar is None else {"metavar": metavar, **details}


def _flag(name: str, text: str) -> Option:
    return name, {"action": "store_true", "help": text}


def _choice(name: str, first: str, *others: str, **details: Any) -> Option:
    """One of several words, of which the first is the default."""
    return name, {"choices": (first, *others), "default": first, **details}


def _several(name: str, metavar: str, **details: Any) -> Option:
    return name, {"metavar": metavar, "action": "append", "default": [], **details}


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _rounds(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 3):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds (0 to 99)")
    return int(text)


def _deadline(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 6 and int(text) <= LONGEST):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds (0 to {LONGEST})")
    return int(text)


_OF_ID = "of the move: letters, digits, - and _, at most 32"
_ID = _option("id", "ID", help=_OF_ID)
_ANY_ID = _option("id", "ID", nargs="?", help=f"{_OF_ID}; without it all")
_MAP = _several(
    "--map", "OLD=NEW",
    help="the address that the process had, and where it goes: IPv4 or IPv6, no names; NEW may be "
    "auto, read at the destination; OLD:PORT=NEW:PORT is of that port alone; repeatable",
)  # fmt: skip
_SITE = _several(
    "--site", "ROLE[=NETNS]",
    help="where it acts: destination, gateway, peer, relay or source, each in the network "
    "namespace of that name or path, or pid:N; repeatable; default: destination, here",
)  # fmt: skip
_PEER_MAP = _several(
    "--peer-map", "P=Q",
    help="peers at P have moved as well, and are reached at Q; ports as of --map; repeatable",
)  # fmt: skip
_VIA = _several(
    "--via", "FROM[:LOW-HIGH]",
    help="of a relay: the addresses, and their ports, from which it passes connections on; "
    "repeatable; default: its address towards NEW, ports 10000-32767",
)  # fmt: skip
_CONNECTIONS = _option(
    "--connections", "FILE",
    help="lines of [udp] LOCAL PEER, or what inspect --json printed; - is stdin",
)  # fmt: skip
_NO_UDP = _flag("--no-udp", "leave the sockets of UDP, connected or not")
_MOVE = (
    _ID, _MAP, _PEER_MAP, _VIA, _SITE,
    _option("--image", "DIR|TAR", help="connections from CRIU's images, or a container's archive"),
    _CONNECTIONS,
    _flag("--listeners", "let new connections reach the image's listeners"),
    _NO_UDP,
    _choice(
        "--mode", "stateful", "stateless",
        help="by conntrack (stateful), or by rewriting headers before and after it; "
        "default: stateful",
    ),
    _flag(
        "--no-hold", "do not keep what peers say while the gate is closed: they say it again, later"
    ),
    _flag(
        "--guard",
        "have the kept connections outlive a flush of the ruleset: a small process a site",
    ),
    _choice(
        "--unkept", "report", "reset",
        help="tell both ends of connections that cannot be kept, once the move is open",
    ),
)  # fmt: skip
_PLAN = (
    *_MOVE,
    _choice("--format", "text", "json", "nft", help="commands, a document, or a script for nft -f"),
)
_LIVE = _option("--live", "PID", help="connections of a process that still runs, and its children")
_CHECK = (_ANY_ID, *_MOVE[1:], _LIVE)
_PREPARE = (
    *_MOVE,
    _LIVE,
    _choice(
        "--gate",
        "closed",
        "open",
        help="open: let the kept connections through at once, with no open later; default: closed",
    ),
    _option("--replace", "ID", help="the earlier move of the same process, moved on"),
    _flag("--dry-run", "check, and print the plan"),
)
_QUIESCE = (
    _ID, _MAP,
    _several("--site", "source[=NETNS]", help="the process' network namespace; default: here"),
    _several(
        "--port", "PORT", type=_port,
        help="hold listeners on this port only; repeatable; default: all at OLD or the wildcard",
    ),
    _option(
        "--timeout", "SECONDS", type=_seconds, default=10.0,
        help="wait so long for those that are not accepted yet (default: 10)",
    ),
)  # fmt: skip
_RUN = (
    *_MOVE,
    _flag("--keep-closed-on-failure", "leave the move prepared, its gate closed, for another try"),
    _option("criu", "CRIU", nargs="+", help="criu restore ..., behind --"),
)
_OPEN = (
    _ID,
    _option("--image", "DIR|TAR", help="the dump of a process that was prepared for by --live"),
    _CONNECTIONS,
    _flag("--compare", "with that dump alone, and open nothing yet: natkeep-hook does at once"),
)
_DROP = _option(
    "--drop", "SECONDS", type=_deadline,
    help="at a destination: drop so long what a gateway may still send (default: 600; 0: not)",
)  # fmt: skip
_ROLLBACK = (_ID, _DROP, _flag("--yes", "even if the move was opened"))
_TEARDOWN = (
    _ID,
    _option(
        "--drain", "SECONDS", nargs="?", type=_seconds, const=float("inf"),
        help="wait until the kept connections have ended, so long at most",
    ),
    _option(
        "--idle", "SECONDS", type=_seconds,
        help="with --drain: a UDP socket has ended that is silent for so long (default: as long as "
        "conntrack remembers one, 120)",
    ),
    _option(
        "--ended", "FILE",
        help="at the source: what status --json printed elsewhere of those that have; - is stdin",
    ),
    _flag("--yes", "even if connections live"),
    _flag("--by-name", "of a move without a journal, at --site: what bears its id there"),
    _SITE,
    _DROP,
)  # fmt: skip
_INSPECT = (
    _option("image", "DIR|TAR", nargs="?", help="CRIU's images, or a container's archive"),
    _option("--live", "PID", help="of a process that still runs, and its children, instead"),
    _flag("--list", "just what is kept, as --connections takes it"),
    _MAP,
    _NO_UDP,
)
_STATUS = (
    _ANY_ID,
    _flag("--strict", "exit 6 when something drifted"),
    _flag("--watch", "look again each second, until Ctrl-C (or, with --strict, drift)"),
)
_REPAIR = (_ANY_ID, _flag("--all", "every move there is, instead of one"))
_GC = (
    _SITE,
    _flag("--dry-run", "say what would be cleared"),
    _flag("--yes", "also what no journal knows and connections live by"),
)

_MIGRATE = (
    _option("source", "[USER@]A:PID", nargs="?", help="or a container: A:runc:NAME, A:podman:NAME"),
    _option("destination", "[USER@]B", nargs="?", help="where it goes"),
    _option("--id", "ID", help="of the move; default: m and the pid, or a container's name"),
    _MAP,
    _several(
        "--via", "[USER@]HOST|local|relay|peers|peer:[USER@]HOST",
        help="the gateway that the peers cross (local: this host); relay: A goes on receiving for "
        "OLD; peers: their own hosts, or each by peer:HOST, repeatable; default: the first of this "
        "host, a relay and the peers' hosts that can",
    ),
    _flag("--listeners", "let new connections reach the process where it goes"),
    _NO_UDP,
    _option("--pre-dump", "N", type=_rounds, default=0, help="copy memory N times beforehand"),
    _option(
        "--images", "DIR",
        help="where the image lies, on A and B; nothing is copied where that is one and the same",
    ),
    _option("--bundle", "DIR", help="of A:runc:NAME: its bundle on B; default: as on A"),
    _option("--criu", "PATH", default="criu", help="CRIU on A and B (default: criu)"),
    _several("--criu-option", "WORD", help="for dump and restore: --criu-option=--shell-job"),
    _several("--dump-option", "WORD", help="for the dump alone"),
    _several("--restore-option", "WORD", help="for the restore alone"),
    _option("--ssh", "COMMAND", default="ssh", help="ssh, with options of its own"),
    _option(
        "--natkeep", "COMMAND", default="natkeep",
        help="natkeep on A and B, perhaps as 'sudo -n natkeep'",
    ),
    _flag("--dry-run", "check, and say each command that would follow"),
    _option(
        "--report", "DIR",
        help="write a page into DIR: what the peers saw, with a plot, and the steps",
    ),
    _option("--resume", "ID", help="go on with one that was interrupted"),
    _option("--rollback", "ID", help="take one back that was interrupted"),
)  # fmt: skip
_FINISH = (
    _ID,
    _option(
        "--drain", "SECONDS", type=_seconds,
        help="wait so long at most for the kept connections to end; default: until they have",
    ),
)  # fmt: skip
_STORE = (
    _option(
        "--store", "STORE",
        help="etcd:URL,URL,..., or dir:PATH, a directory that the hosts share; default: "
        "$NATKEEP_STORE, or what natkeep.toml says",
    ),
    _option("--config", "FILE", help="in the place of /etc/natkeep/natkeep.toml"),
)  # fmt: skip
_AGENT = (
    *_STORE,
    _option("--node", "NAME", help="of this node; default: the host's"),
    _several("--group", "NAME", help="that this node belongs to; repeatable"),
    _option(
        "--socket", "PATH", help="where a restore asks; default: agent.sock beside the journals"
    ),
    _flag("--once", "follow the orders that there are, and end"),
)
_FLEET = (
    _option(
        "action", choices=("apply", "status", "wait", "end", "init"),
        help="what to do with a move; init: users and rights in etcd",
    ),
    _option("subject", "FILE|ID", nargs="?", help="the file of an order, - is stdin; or a move"),
    *_STORE,
    _option(
        "--for", choices=("staged", "ready", "open", "settled"), default="ready", dest="goal",
        help="of wait: ready (default) before a restore, open after it, settled after an end",
    ),
    _option("--timeout", "SECONDS", type=_seconds, help="of wait: at most so long (default: 60)"),
    _flag("--watch", "of status: look again each second, until Ctrl-C"),
    _flag("--yes", "of end: even if connections live"),
    _several("--node", "NAME", help="of init: that gets a user in etcd; repeatable"),
    _option(
        "--passwords", "DIR", default="/etc/natkeep/passwords",
        help="of init: where the files with passwords are put; default: /etc/natkeep/passwords",
    ),
)  # fmt: skip
SHELLS = ("bash", "zsh", "fish")
"""For which there is a completion."""
_SETUP = (
    _option(
        "--completion", "SHELL", nargs="?", const="",
        help="print the completion of bash, zsh or fish; default: of $SHELL",
    ),
    _flag("--install", "write it where the shell looks, for all users if you are root"),
    _flag("--link", "natkeep and natkeep-hook in /usr/local/bin, where sudo, ssh and systemd look"),
    _flag("--units", "the units for systemd; none is enabled"),
    _flag("--remove", "take away the links and units, before natkeep itself is removed"),
)  # fmt: skip
_CODE = _option("code", "CODE", help="as check printed it")
_TOPIC = _option("topic", "VERB", nargs="*", help="of natkeep, as prepare or lab run")
_SERVE = (
    _ID,
    _flag("--stdio", "answer requests on stdin and stdout"),
    _option(
        "--exec", "WORD", nargs=argparse.REMAINDER,
        help="go on as this program, with the rights that natkeep has",
    ),
)  # fmt: skip

VERBS: dict[str, tuple[str, str, tuple[Option, ...]]] = {
    "plan": ("change", "print what prepare would do; touches nothing", _PLAN),
    "prepare": ("change", "make every site ready, with the gate closed", _PREPARE),
    "quiesce": ("change", "before a dump: have new connections, or a move's, wait", _QUIESCE),
    "run": ("change", "prepare, have CRIU restore, open; if it fails undo, or stay closed", _RUN),
    "open": ("change", "let the kept connections through", _OPEN),
    "status": ("show", "what is prepared, what it carries, what drifted", _STATUS),
    "check": ("show", "can this machine do it, and with a --map this move?", _CHECK),
    "explain": ("show", "what a finding means and what to do", (_CODE,)),
    "repair": ("change", "put back what another program removed", _REPAIR),
    "teardown": ("change", "undo a move; a second time is fine", _TEARDOWN),
    "rollback": ("change", "back to the source, in the order that resets no peer", _ROLLBACK),
    "gc": ("change", "clear what a crash or a reboot left", _GC),
    "migrate": ("migrate", "all of a move over ssh: check, dump, copy, restore, open", _MIGRATE),
    "finish": ("migrate", "after a migrate: wait for the end, and undo it everywhere", _FINISH),
    "serve": ("serve", "what migrate starts on each host over ssh", _SERVE),
    "fleet": ("fleet", "order moves in a store, look at them, wait for them, end them", _FLEET),
    "agent": ("fleet", "follow what a store orders this node", _AGENT),
    "setup": ("setup", "what an installation needs beside the package", _SETUP),
    "help": ("help", "the verbs, or one with examples", (_TOPIC,)),
    "inspect": ("show", "the sockets in an image, kept or not and why", _INSPECT),
}
"""Each verb: the module of natkeep.cli that runs it, what it does, what it takes."""
