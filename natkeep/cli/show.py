"""The verbs that only look."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from natkeep import report
from natkeep.cli.arguments import make_executor, parse_sites, read_process
from natkeep.cli.output import hold_document, print_as, print_json, talk
from natkeep.errors import DriftError, JournalError, UsageError
from natkeep.kernel.linux import LinuxKernel
from natkeep.plan.findings import CATALOGUE, Severity
from natkeep.plan.move import parse_olds
from natkeep.state.directory import StateDirectory
from natkeep.terminal import show

if TYPE_CHECKING:
    from natkeep.lifecycle.subject import Subject


def status(args: argparse.Namespace) -> int:
    from natkeep.lifecycle.status import read_status

    executor = make_executor(args, create=False)
    unreadable: list[JournalError] = []
    if args.id:
        moves = read_status(executor, (args.id,))
    else:
        import gc

        gc.disable()  # of what there may be much, all lives to the end: there is nothing to find
        moves = read_status(executor, (), unreadable)
    if args.json:
        rows = [report.move_as_json(move) for move in moves]
        hold_document("".join(report.status_as_json(rows)))
    elif moves or not unreadable:
        lines = (line for m in moves for line in report.status_lines(m, verbose=args.verbose))
        show([*lines] or ["nothing is prepared"])
    for error in unreadable[1:]:
        talk(args, f"natkeep: {error}")
    if unreadable:
        raise unreadable[0]
    drift = [line for move in moves for site in move.sites for line in site.drift]
    if args.strict and drift:
        raise DriftError(f"drift: {drift[0]}", hint=f"{len(drift)} in all" if drift[1:] else None)
    return 0


def check(args: argparse.Namespace) -> int:
    from natkeep.lifecycle.examine import examine

    StateDirectory(args.state_dir, create=False)  # one that cannot be used is an error here too
    findings = [*examine(_read_subject(args))]
    if args.json:
        print_json(report.findings_to_json(findings))
    else:
        show(report.finding_lines(findings, "a move"))
    stopping = [finding for finding in findings if finding.severity == Severity.STOP]
    if stopping:
        code = stopping[0].code
        raise DriftError(f"{code} stops a move", hint=f"natkeep explain {code}")
    return 0


def _read_subject(args: argparse.Namespace) -> Subject:
    """What the options ask about: the sites, or a move."""
    from natkeep.lifecycle.subject import Subject

    kernel, sites = LinuxKernel(), parse_sites(args.site)
    kernel.open_sites(sites)
    return Subject(kernel, sites)


def explain(args: argparse.Namespace) -> int:
    if args.code not in CATALOGUE:
        raise UsageError(f"no finding has the code {args.code!r}", hint=", ".join(CATALOGUE))
    print_as(args, report.explanation_to_json, report.explanation_lines, args.code)
    return 0


def inspect(args: argparse.Namespace) -> int:
    if (args.image is None) == (args.live is None):
        raise UsageError("which sockets? DIR or --live PID", hint="the one or the other")
    if args.live is not None:
        checkpoint = read_process(args, ())
    else:
        from natkeep.checkpoint.images import read_checkpoint_with_queues

        checkpoint = read_checkpoint_with_queues(args.image)
    olds = parse_olds(args.map)
    print_as(args, report.checkpoint_to_json, report.checkpoint_lines, checkpoint, olds)
    return 0
