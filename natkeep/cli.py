"""the command line: verbs; it parses, calls lifecycle, prints, and leaves with the exit code.

Rule: data goes to stdout, talk to stderr; with --json stdout is one document with `schema` 1.
Nothing is decided here, and what only one verb needs is imported when that verb runs.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from natkeep import __version__
from natkeep.errors import DriftError, ImageError, NatkeepError, RefusedError, UsageError

if TYPE_CHECKING:
    from natkeep.checkpoint import Checkpoint
    from natkeep.lifecycle import Lifecycle
    from natkeep.plan.move import Map, Move, Site
    from natkeep.plan.tuples import Endpoint

LAB = "practice networks: move a real server, see what its peer saw"

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run natkeep; the exit code of DESIGN's contract (see errors.py for each)."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        try:
            args = make_parser(arguments).parse_args(arguments)
            with _signals_as_exit():
                return int(args.run(args))
        finally:
            if sys.stdout:
                sys.stdout.flush()  # here, where it can still fail in one line
    except NatkeepError as error:
        return _complain(error)
    except KeyboardInterrupt:
        print("natkeep: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if not isinstance(error, BrokenPipeError):  # then our reader has seen enough
            print(f"natkeep: {error}", file=sys.stderr)
        _silence(1)
        return 1


def _silence(stream: int) -> None:
    """What could not be written must not fail once more, when Python flushes it at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _complain(error: NatkeepError) -> int:
    print(f"natkeep: {error}", file=sys.stderr)
    if error.hint:
        print(f"  ({error.hint})", file=sys.stderr)
    return error.exit_code


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


def make_parser(arguments: Sequence[str] = ("lab",)) -> argparse.ArgumentParser:
    """The parser of all verbs; tests and documentation read it too.

    *arguments* decide only whether the lab, which no other verb needs, is imported for its own.
    """
    common = _make_common(argparse.SUPPRESS)
    parser = _Parser(
        prog="natkeep",
        description="Keep TCP connections alive when CRIU restores a process at another address.",
        parents=[_make_common(False)],
    )
    parser.add_argument("--version", action="version", version=f"natkeep {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)

    def add(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> _Parser:
        verb: _Parser = verbs.add_parser(name, help=text, description=text, parents=[common])
        verb.set_defaults(run=run)
        return verb

    plan = add("plan", "print what prepare would do; touches nothing", _plan)
    _add_move_options(plan)
    plan.add_argument("--format", choices=("text", "json", "nft"), default="text")
    prepare = add("prepare", "make every site ready, with the gate closed", _prepare)
    _add_move_options(prepare)
    prepare.add_argument("--gate", choices=("closed", "open"), default="closed")
    prepare.add_argument(
        "--replace", metavar="ID", help="the earlier move of the same process, moved on"
    )
    prepare.add_argument("--dry-run", action="store_true", help="check, and print the plan")
    _add_quiesce(add("quiesce", "before a dump: have new connections wait", _quiesce))
    running = add("run", "prepare, have CRIU restore, open; undo if it fails", _run)
    _add_move_options(running)
    running.add_argument(
        "--keep-closed-on-failure",
        action="store_true",
        help="leave the move prepared, its gate closed, for another try",
    )
    running.add_argument("criu", metavar="CRIU", nargs="+", help="criu restore ..., behind --")
    opening = add("open", "let the kept connections through", _open)
    opening.add_argument("id", metavar="ID")
    status = add("status", "what is prepared, what it carries, what drifted", _status)
    status.add_argument("id", metavar="ID", nargs="?")
    status.add_argument("--strict", action="store_true", help="exit 6 when something drifted")
    check = add("check", "can this machine do it? each finding has a code", _check)
    check.add_argument("--site", metavar="ROLE[=NETNS]", action="append", default=[])
    explain = add("explain", "what a finding means and what to do", _explain)
    explain.add_argument("code", metavar="CODE")
    _add_teardown(add("teardown", "undo a move; a second time is fine", _teardown))
    inspect = add("inspect", "the sockets in an image, kept or not and why", _inspect)
    inspect.add_argument("image", metavar="DIR")
    inspect.add_argument("--map", metavar="OLD=NEW", action="append", default=[])
    if "lab" in arguments:
        _add_lab(verbs, common)
    else:
        verbs.add_parser("lab", help=LAB)
    return parser


def _make_common(unset: object) -> _Parser:
    """The options that every verb takes, before or behind its name.

    Behind it they are left out of the result when they are not given (argparse.SUPPRESS), or
    they would overwrite what was given before it.
    """
    common = _Parser(add_help=False)
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


def _add_move_options(verb: argparse.ArgumentParser) -> None:
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
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


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


def _add_lab(verbs: argparse._SubParsersAction[_Parser], common: _Parser) -> None:
    from natkeep.lab.cli import add_parser, run

    add_parser(verbs, parents=[common]).set_defaults(run=run)


def _plan(args: argparse.Namespace) -> int:
    from natkeep import report
    from natkeep.plan.order import describe_plan, make_plan, render_nft

    checkpoint = _read_connections(args)
    plan = make_plan(_make_move(args, checkpoint), checkpoint.connections)
    form = "json" if args.json else args.format
    if form == "json":
        report.print_json(report.plan_to_json(plan))
    elif form == "nft":
        for site, lines in render_nft(plan):
            print(f"# {site}", *lines, sep="\n")
    else:
        print(*describe_plan(plan), sep="\n")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from natkeep import report
    from natkeep.plan.drift import Gate
    from natkeep.plan.order import describe_plan

    checkpoint = _read_connections(args)
    move = _make_move(args, checkpoint)
    _authorise(move, checkpoint)
    lifecycle = _make_lifecycle(args, create=not args.dry_run)
    if args.dry_run:
        plan = lifecycle.check(move, checkpoint.connections, args.replace)
        if args.json:
            report.print_json(report.plan_to_json(plan))
        else:
            print(*describe_plan(plan), sep="\n")
        return 0
    lifecycle.require_devices(move, report.bound_devices(checkpoint, move))
    plan = lifecycle.prepare(
        move, checkpoint.connections, Gate(args.gate), args.replace, checkpoint.run_id
    )
    for line in report.unkept_lines(checkpoint, plan):
        _talk(args, f"natkeep: not kept: {line}")
    for line in report.lock_lines(plan):
        _talk(args, f"natkeep: {line}")
    if args.json:
        report.print_json({"schema": 1, **report.move_to_json(plan), "gate": args.gate})
    else:
        _talk(args, f"natkeep: {report.summary(plan)}, gate {args.gate}")
    return 0


def _run(args: argparse.Namespace) -> int:
    from natkeep.criu.run import Restore, demand_criu, find_slow_lock, read_command

    command = read_command(args.criu, args.image)
    demand_criu(command.words[0])
    if args.connections is None:
        args.image = command.images
    checkpoint = _read_connections(args)
    move = _make_move(args, checkpoint)
    slow = find_slow_lock(checkpoint, _authorise(move, checkpoint))
    if slow:
        _talk(args, f"natkeep: {slow}")
    lifecycle = _make_lifecycle(args, create=True)
    talk = functools.partial(_talk, args)
    keep = args.keep_closed_on_failure
    code = Restore(lifecycle, move, checkpoint, command, talk, keep, own_stdout=args.json).run()
    if args.json:
        _print_verb(args.id, gate="open", criu=code)
    return code


def _authorise(move: Move, checkpoint: Checkpoint) -> int:
    """How many connections *move* is about, if the operator's policy allows them."""
    from natkeep import policy

    count = sum(len(checkpoint.connections.at(map_.old)) for map_ in move.maps)
    policy.authorise(move, count)
    return count


def _open(args: argparse.Namespace) -> int:
    _make_lifecycle(args, create=False).open(args.id)
    if args.json:
        _print_verb(args.id, gate="open")
    else:
        _talk(args, f"natkeep: {args.id}: gate open")
    return 0


def _status(args: argparse.Namespace) -> int:
    from natkeep import report

    lifecycle = _make_lifecycle(args, create=False)
    moves = lifecycle.status((args.id,) if args.id else ())
    if args.json:
        report.print_json(report.status_to_json(moves))
    else:
        print(*report.status_lines(moves, verbose=args.verbose), sep="\n")
    drift = [line for move in moves for site in move.sites for line in site.drift]
    if args.strict and drift:
        raise DriftError(f"drift: {drift[0]}", hint=f"{len(drift)} in all" if drift[1:] else None)
    return 0


def _teardown(args: argparse.Namespace) -> int:
    from natkeep.plan.move import parse_id

    lifecycle = _make_lifecycle(args, create=False)
    parse_id(args.id)
    if args.id in lifecycle.state.ids():
        if args.drain is not None:
            lifecycle.drain(args.id, args.drain)
        if not args.yes:
            _ask_if_alive(args.id, lifecycle)
            _refuse_exposure(args.id, lifecycle)
    found = lifecycle.teardown(args.id)
    if args.json:
        _print_verb(args.id, found=found)
    else:
        _talk(args, f"natkeep: {args.id}: " + ("undone" if found else "nothing to undo"))
    return 0


def _ask_if_alive(move_id: str, lifecycle: Lifecycle) -> None:
    alive = lifecycle.count_alive(move_id)
    if not alive:
        return
    question = f"{alive} connections of {move_id} live and will break"
    if not sys.stdin or not sys.stdin.isatty():
        raise RefusedError(question, hint="--yes breaks them, --drain waits for their end")
    print(f"natkeep: {question}. Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RefusedError("nothing was changed")


def _refuse_exposure(move_id: str, lifecycle: Lifecycle) -> None:
    for line in lifecycle.find_exposed(move_id):
        raise RefusedError(
            line, hint="take OLD from that host, or restore the process there; or --yes"
        )


def _quiesce(args: argparse.Namespace) -> int:
    from natkeep.plan.move import Move, Role

    sites = _parse_sites(args.site or ["source"])
    if [site.role for site in sites] != [Role.SOURCE]:
        raise UsageError("quiesce is for the source", hint="--site source[=NETNS]")
    move = Move(args.id, _parse_maps(args, sites), sites)
    lifecycle = _make_lifecycle(args, create=True)
    listeners = lifecycle.quiesce(move, frozenset(args.port), args.timeout)
    if args.json:
        _print_verb(args.id, listeners=[str(end) for end in listeners])
    else:
        told = ", ".join(str(end) for end in listeners)
        _talk(args, f"natkeep: {args.id}: new connections to {told} wait; dump now")
    return 0


def _check(args: argparse.Namespace) -> int:
    from natkeep import report
    from natkeep.journal import StateDirectory
    from natkeep.kernel.linux import LinuxKernel
    from natkeep.lifecycle import Lifecycle
    from natkeep.plan.findings import Severity

    lifecycle = Lifecycle(LinuxKernel(), StateDirectory(args.state_dir, create=False))
    findings = lifecycle.examine(_parse_sites(args.site))
    if args.json:
        report.print_json(report.findings_to_json(findings))
    else:
        print(*report.finding_lines(findings), sep="\n")
    stopping = [finding for finding in findings if finding.severity == Severity.STOP]
    if stopping:
        code = stopping[0].code
        raise DriftError(f"{code} stops a move", hint=f"natkeep explain {code}")
    return 0


def _explain(args: argparse.Namespace) -> int:
    from natkeep import report
    from natkeep.plan.findings import CATALOGUE

    if args.code not in CATALOGUE:
        raise UsageError(f"no finding has the code {args.code!r}", hint=", ".join(CATALOGUE))
    if args.json:
        report.print_json(report.explanation_to_json(args.code))
    else:
        print(*report.explanation_lines(args.code), sep="\n")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from natkeep import report
    from natkeep.checkpoint.images import read_checkpoint_with_queues
    from natkeep.plan.move import parse_map

    checkpoint = read_checkpoint_with_queues(args.image)
    olds = [parse_map(text)[0] for text in args.map]
    if args.json:
        report.print_json(report.checkpoint_to_json(checkpoint, olds))
    else:
        print(*report.checkpoint_lines(checkpoint, olds), sep="\n")
    return 0


def _print_verb(move_id: str, **facts: object) -> None:
    from natkeep import report

    report.print_json({"schema": 1, "id": move_id, **facts})


def _talk(args: argparse.Namespace, line: str) -> None:
    if not args.quiet and sys.stderr:
        try:
            print(line, file=sys.stderr)
        except OSError:  # nobody listens (`2>&1 | head`); the work goes on
            _silence(2)


def _make_lifecycle(args: argparse.Namespace, *, create: bool) -> Lifecycle:
    from natkeep.journal import StateDirectory
    from natkeep.kernel.linux import LinuxKernel
    from natkeep.kernel.survey import demand_privileges
    from natkeep.lifecycle import Lifecycle

    demand_privileges()
    return Lifecycle(
        LinuxKernel(),
        StateDirectory(args.state_dir, create=create),
        talk=(lambda line: _talk(args, line)) if args.verbose else (lambda line: None),
    )


def _parse_sites(texts: Sequence[str]) -> tuple[Site, ...]:
    from natkeep.plan.move import Role, Site

    return tuple(Site.parse(text) for text in texts) or (Site(Role.DESTINATION),)


def _make_move(args: argparse.Namespace, checkpoint: Checkpoint) -> Move:
    from natkeep.plan.move import Mode, Move, Role, parse_id

    parse_id(args.id)
    sites = _parse_sites(args.site)
    maps = _parse_maps(args, sites)
    listeners = _find_listeners(checkpoint, maps) if args.listeners else ()
    at_source = any(site.role == Role.SOURCE for site in sites)
    lock = checkpoint.lock if at_source else None
    return Move(args.id, maps, sites, Mode(args.mode), listeners, lock)


def _parse_maps(args: argparse.Namespace, sites: tuple[Site, ...]) -> tuple[Map, ...]:
    from natkeep.plan.move import Map, parse_map

    maps = []
    for text in args.map:
        old, new = parse_map(text)
        if new is None:
            new = _make_lifecycle(args, create=False).find_new(old, sites)
        maps.append(Map(old, new))
    return tuple(maps)


def _find_listeners(checkpoint: Checkpoint, maps: Sequence[Map]) -> tuple[Endpoint, ...]:
    listeners = checkpoint.listeners_at([map_.old for map_ in maps])
    if not listeners:
        raise RefusedError(
            "--listeners: the image has no listener at an OLD or at the wildcard address",
            hint="natkeep inspect shows what there is; a list of connections names none",
        )
    return listeners


def _read_connections(args: argparse.Namespace) -> Checkpoint:
    if args.image is not None:
        from natkeep.checkpoint.images import read_checkpoint

        return read_checkpoint(args.image)
    if args.connections is not None:
        from natkeep.checkpoint.listing import parse_listing, read_listing

        if args.connections == "-":
            try:
                text = sys.stdin.read() if sys.stdin else ""
            except UnicodeDecodeError:
                raise ImageError("stdin is not UTF-8 text") from None
            return parse_listing(text, "stdin")
        return read_listing(args.connections)
    raise UsageError(
        "which connections? --image DIR or --connections FILE",
        hint=f"{os.path.basename(sys.argv[0])} inspect DIR shows those of an image",
    )


if __name__ == "__main__":
    sys.exit(main())
