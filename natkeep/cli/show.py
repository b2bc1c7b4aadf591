"""The verbs that only look."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from natkeep import report
from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.listing import write_listing
from natkeep.checkpoint.live import parse_pid
from natkeep.cli.arguments import (
    make_executor,
    make_move,
    parse_sites,
    read_connections,
    read_process,
)
from natkeep.cli.output import hold_document, print_as, print_json, talk
from natkeep.colour import choose_paint
from natkeep.errors import DriftError, JournalError, NatkeepError, UsageError
from natkeep.kernel.linux import LinuxKernel
from natkeep.plan.findings import CATALOGUE, Finding, Severity
from natkeep.plan.maps import parse_olds
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Local
from natkeep.state.directory import StateDirectory
from natkeep.terminal import clear, show, show_json
from natkeep.values import replace

if TYPE_CHECKING:
    from natkeep.lifecycle.executor import Executor
    from natkeep.lifecycle.status import Watch
    from natkeep.lifecycle.subject import Subject


def status(args: argparse.Namespace) -> int:
    executor = make_executor(args, create=False)
    if not args.watch:
        if not args.id:
            import gc

            gc.disable()  # of what there may be much, all lives to the end
        text, told = _read_status(args, executor)
        if args.json:
            hold_document(text)
        _raise_first(args, told)
        return 0
    from natkeep.lifecycle.status import Watch

    watch = Watch()
    with suppress(KeyboardInterrupt):
        while True:
            text, told = _read_status(args, executor, watch)
            if args.json:
                show_json(text)
            _raise_first(args, told)
            time.sleep(_WATCH_S)
    return 0


_WATCH_S = 1.0
"""Seconds between two looks of `status --watch`."""


def _read_status(
    args: argparse.Namespace, executor: Executor, watch: Watch | None = None
) -> tuple[str, list[NatkeepError]]:
    """Show how the moves stand, or return the document; and what is wrong with them."""
    from natkeep.lifecycle.status import read_status
    from natkeep.report import status as status_report

    unreadable: list[JournalError] = []
    moves = read_status(executor, (args.id,) if args.id else (), None if args.id else unreadable)
    text, host = "", os.uname().nodename
    dropped = 0 if args.id else _count_dropped(executor)
    if watch is not None:
        moves = watch.compare(moves)
        clear()
    if args.json:
        rows = [status_report.move_as_json(move, host) for move in moves]
        text = "".join(status_report.status_as_json(rows, dropped))
    elif not moves and not unreadable:
        show(["nothing is prepared"])
    elif args.id or args.verbose:
        tell = partial(status_report.status_lines, host=host, verbose=args.verbose)
        show(chain.from_iterable(map(tell, moves)), choose_paint(no_color=args.no_color))
    elif moves:
        show(status_report.summary_lines(moves), choose_paint(no_color=args.no_color))
    if dropped:
        what = f"what a gateway still sends to {dropped} connections is dropped"
        talk(args, f"natkeep: where moves were undone here {what} (natkeep gc ends that)")
    drift = [line for move in moves for site in move.sites for line in site.drift]
    told: list[NatkeepError] = [*unreadable]
    if args.strict and drift:
        hint = f"{len(drift)} in all" if drift[1:] else None
        told.append(DriftError(f"drift: {drift[0]}", hint=hint))
    return text, told


def _count_dropped(executor: Executor) -> int:
    """Of how many connections something is dropped still, in this namespace, as no journal says."""
    from natkeep.kernel.undone_table import has_undone, read_undone

    [here] = parse_sites(())
    with suppress(NatkeepError, OSError):  # it needs more rights than reading journals does
        executor.kernel.open_sites([here])
        if executor.kernel.ask(here, has_undone):
            return len(executor.kernel.ask(here, read_undone))
    return 0


def _raise_first(args: argparse.Namespace, errors: Sequence[NatkeepError]) -> None:
    """The first is the exit code; of the others those that are about journals are told."""
    for error in errors[1:]:
        if isinstance(error, JournalError):
            talk(args, f"natkeep: {error}")
    if errors:
        raise errors[0]


def check(args: argparse.Namespace) -> int:
    from natkeep.lifecycle.examine import examine

    StateDirectory(args.state_dir, create=False)  # one that cannot be used is an error here too
    subject, findings = _read_subject(args)
    findings += examine(subject)
    about = "this move" if args.map else "a move"
    if args.json:
        print_json(report.findings_to_json(findings))
    else:
        show(report.finding_lines(findings, about), choose_paint(no_color=args.no_color))
    stopping = [finding for finding in findings if finding.severity == Severity.STOP]
    if stopping:
        code = stopping[0].code
        raise DriftError(f"{code} stops {about}", hint=f"natkeep explain {code}")
    return 0


def _read_subject(args: argparse.Namespace) -> tuple[Subject, list[Finding]]:
    """What the options ask about, the sites or a move; and what was found in making it."""
    from natkeep.lifecycle.subject import Subject

    ways = (args.image, args.connections, args.live)
    if args.map:
        from natkeep.lifecycle.examine_move import make_subject

        args.id = args.id or "check"
        executor = make_executor(args, create=False)
        checkpoint = read_connections(args)
        move = make_move(args, checkpoint)
        pid = None if args.live is None else parse_pid(args.live)
        return make_subject(executor, move, checkpoint, args.image or "", pid)
    if args.image is not None or args.live is not None:
        return _read_process(args), []
    if args.id or any(way is not None for way in ways):
        raise UsageError("which move? --map OLD=NEW", hint="without connections: the machine alone")
    kernel, sites = LinuxKernel(), parse_sites(args.site)
    kernel.open_sites(sites)
    return Subject(kernel, sites), []


def _read_process(args: argparse.Namespace) -> Subject:
    """A process or an image without a move: as far as it and CRIU go, here."""
    from natkeep.lifecycle.subject import Subject

    executor = make_executor(args, create=False)
    if args.live is None:
        pid, sites, checkpoint = None, parse_sites(args.site), read_connections(args)
    else:
        pid = parse_pid(args.live)
        sites = parse_sites(args.site or [f"source=pid:{pid}"])
        checkpoint = read_process(args, tuple(site for site in sites if site.role != Role.SOURCE))
    executor.kernel.open_sites(sites)
    image = args.image or ""
    return Subject(executor.kernel, sites, None, checkpoint, image, pid, executor.state)


def explain(args: argparse.Namespace) -> int:
    if args.code not in CATALOGUE:
        from natkeep.cli.usage import suggest

        codes = suggest(args.code, CATALOGUE) or [", ".join(CATALOGUE)]
        raise UsageError(f"no finding has the code {args.code!r}", hint=codes[0])
    print_as(args, report.explanation_to_json, report.explanation_lines, args.code)
    return 0


def _list_kept(checkpoint: Checkpoint, olds: Sequence[Local]) -> list[str]:
    """The lines of a connections file: what is kept at *olds*, or wherever it is without any."""
    tcp, udp, servers = checkpoint.connections, checkpoint.udp, checkpoint.udp_servers
    if olds:
        tcp, udp = checkpoint.connections_at(olds), checkpoint.udp_at(olds)
        servers = checkpoint.udp_servers_at(olds)
    return write_listing(tcp, udp, servers, checkpoint.run_id).splitlines()


def inspect(args: argparse.Namespace) -> int:
    if (args.image is None) == (args.live is None):
        raise UsageError("which sockets? DIR or --live PID", hint="the one or the other")
    if args.list and (args.live is not None or args.json):
        raise UsageError("--list is of an image", hint="of a process that runs: --live PID --json")
    if args.live is not None:
        from natkeep.checkpoint.live import parse_pid
        from natkeep.lifecycle.process import read_living_tree

        tree = read_living_tree(parse_pid(args.live))
        checkpoint = replace(read_process(args, ()), tree=tree)
    else:
        from natkeep.checkpoint.archive import opened_image
        from natkeep.checkpoint.images import read_checkpoint, read_checkpoint_with_queues

        with opened_image(args.image) as images:
            # Of each queue there is a file, and a migration waits for its list.
            read = read_checkpoint if args.list else read_checkpoint_with_queues
            checkpoint = read(images)
    if args.no_udp:
        checkpoint = checkpoint.without_udp()
    olds = parse_olds(args.map)
    if args.list:
        show(_list_kept(checkpoint, olds))
        return 0
    print_as(args, report.checkpoint_to_json, report.checkpoint_lines, checkpoint, olds)
    return 0
