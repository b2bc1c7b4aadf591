"""the verbs that change sites, or say what would be changed."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

from natkeep.afterwards import do_afterwards
from natkeep.cli.arguments import (
    authorise,
    make_lifecycle,
    make_move,
    parse_maps,
    parse_sites,
    read_connections,
)
from natkeep.cli.output import print_verb, talk
from natkeep.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from natkeep.checkpoint import Checkpoint
    from natkeep.lifecycle.verbs import Lifecycle
    from natkeep.plan.move import Move
    from natkeep.state.journal import Journal


def plan(args: argparse.Namespace) -> int:
    from natkeep import report
    from natkeep.plan.plan import describe_plan, make_plan, render_nft

    checkpoint = read_connections(args)
    plan = make_plan(make_move(args, checkpoint), checkpoint.connections)
    form = "json" if args.json else args.format
    if form == "json":
        report.print_json(report.plan_to_json(plan))
    elif form == "nft":
        for site, lines in render_nft(plan):
            print(f"# {site}", *lines, sep="\n")
    else:
        print(*describe_plan(plan), sep="\n")
    return 0


def prepare(args: argparse.Namespace) -> int:
    from natkeep import report
    from natkeep.plan.drift import Gate
    from natkeep.plan.plan import describe_plan

    checkpoint = read_connections(args)
    if checkpoint.live and (args.gate == "open" or args.replace):
        option = "--replace" if args.replace else "--gate open"
        raise UsageError(f"{option} is for a process that is frozen", hint="this one is alive")
    move = make_move(args, checkpoint)
    authorise(move, checkpoint)
    lifecycle = make_lifecycle(args, create=not args.dry_run)
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
        talk(args, f"natkeep: not kept: {line}")
    for line in (*report.lock_lines(plan), *lifecycle.find_unheld(move.id), *_waiting(move)):
        talk(args, f"natkeep: {line}")
    if args.json:
        report.print_json({"schema": 1, **report.move_to_json(plan), "gate": args.gate})
    else:
        talk(args, f"natkeep: {report.summary(plan)}, gate {args.gate}")
    return 0


def run(args: argparse.Namespace) -> int:
    from natkeep.criu.run import Restore, demand_criu, find_slow_lock, read_command

    command = read_command(args.criu, args.image)
    command = command.at(demand_criu(command.words[0]))
    if args.connections is None:
        args.image = command.images
    checkpoint = read_connections(args)
    move = make_move(args, checkpoint)
    slow = find_slow_lock(checkpoint, authorise(move, checkpoint))
    if slow:
        talk(args, f"natkeep: {slow}")
    lifecycle = make_lifecycle(args, create=True)
    telling = partial(talk, args)
    keep = args.keep_closed_on_failure
    code = Restore(lifecycle, move, checkpoint, command, telling, keep, own_stdout=args.json).run()
    if args.json:
        print_verb(args.id, gate="open", criu=code)
    return code


def open(args: argparse.Namespace) -> int:
    lifecycle = make_lifecycle(args, create=False)
    blind = False

    def confirm(journal: Journal) -> Checkpoint | None:
        nonlocal blind
        if args.image is None:
            blind = journal.move.live and journal.change is None
            return None
        from natkeep.checkpoint.images import read_checkpoint

        return read_checkpoint(args.image)

    compared = lifecycle.open(args.id, confirm)
    do_afterwards(partial(unhook, args))
    if blind:
        talk(args, f"natkeep: {args.id}: opened as prepared, with no image to compare (--image)")
    if compared is not None:
        from natkeep import report  # whoever compares nothing need not wait for it

        for line in report.compared_lines(compared):
            talk(args, f"natkeep: {args.id}: {line}")
    if args.json:
        more = {} if compared is None else {"came": compared.came, "went": compared.went}
        print_verb(args.id, gate="open", **more)
    else:
        talk(args, f"natkeep: {args.id}: gate open")
    return 0


def unhook(args: argparse.Namespace) -> None:
    """What a verb that opens leaves to be done; by a kernel of its own, whose handles are open."""
    make_lifecycle(args, create=False).unhook(args.id)


def _waiting(move: Move) -> list[str]:
    """Which sites are left alone until the process is frozen."""
    return [
        f"{site}: left alone until open, since the process still talks through it"
        for site in move.ordered_sites()
        if move.waits(site)
    ]


def teardown(args: argparse.Namespace) -> int:
    from natkeep.plan.move import parse_id

    lifecycle = make_lifecycle(args, create=False)
    parse_id(args.id)
    if lifecycle.state.knows(args.id):
        if args.drain is not None:
            lifecycle.drain(args.id, args.drain)
        if not args.yes:
            _ask_if_alive(args.id, lifecycle)
            _refuse_exposure(args.id, lifecycle)
    found = lifecycle.teardown(args.id)
    if args.json:
        print_verb(args.id, found=found)
    else:
        talk(args, f"natkeep: {args.id}: " + ("undone" if found else "nothing to undo"))
    return 0


def repair(args: argparse.Namespace) -> int:
    from natkeep.cli import restore  # no restore waits for these

    return restore.repair(args)


def gc(args: argparse.Namespace) -> int:
    from natkeep.cli import restore

    return restore.gc(args)


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


def quiesce(args: argparse.Namespace) -> int:
    from natkeep import policy
    from natkeep.plan.move import Move, Role

    sites = parse_sites(args.site or ["source"])
    if [site.role for site in sites] != [Role.SOURCE]:
        raise UsageError("quiesce is for the source", hint="--site source[=NETNS]")
    move = Move(args.id, parse_maps(args, sites), sites)
    policy.authorise(move, 0)
    lifecycle = make_lifecycle(args, create=True)
    listeners = lifecycle.quiesce(move, frozenset(args.port), args.timeout)
    if args.json:
        print_verb(args.id, listeners=[str(end) for end in listeners])
    else:
        told = ", ".join(str(end) for end in listeners)
        talk(args, f"natkeep: {args.id}: new connections to {told} wait; dump now")
    return 0
