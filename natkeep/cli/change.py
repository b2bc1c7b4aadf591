"""The verbs that change sites, or say what would be changed.

Rule: what all of them need is imported here, once a verb of this file runs; what one verb alone
needs, and a restore would wait for, is imported where that verb begins.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

from natkeep import policy
from natkeep.afterwards import do_afterwards
from natkeep.checkpoint import Checkpoint
from natkeep.cli.arguments import (
    authorise,
    make_executor,
    make_move,
    parse_maps,
    parse_sites,
    read_connections,
    read_ended,
    tell_moved,
)
from natkeep.cli.output import describe_error, print_json, print_verb, talk
from natkeep.errors import DriftError, NatkeepError, RefusedError, UsageError
from natkeep.lifecycle.check import check, require_devices, require_sockets
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move, remove_gate_hooks
from natkeep.plan.move import Move, parse_id
from natkeep.plan.observation import Gate
from natkeep.plan.plan_text import describe_plan, render_nft
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan
from natkeep.plan.undone import SECONDS
from natkeep.state.journal import Journal
from natkeep.terminal import say, show

_LOOK_AGAIN = 0.5  # s, whether destinations have spoken


def plan(args: argparse.Namespace) -> int:
    checkpoint = read_connections(args)
    plan = make_plan(make_move(args, checkpoint), checkpoint.connections)
    form = "json" if args.json else args.format
    if form == "nft":
        for site, lines in render_nft(plan):
            show([f"# {site}", *lines])
    else:
        _print_plan(plan, as_json=form == "json")
    return 0


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        from natkeep import report

        print_json(report.plan_to_json(plan))
    else:
        show(describe_plan(plan))


def prepare(args: argparse.Namespace) -> int:
    from natkeep import report
    from natkeep.lifecycle.prepare import find_unheld, prepare
    from natkeep.lifecycle.replace import replace_move

    checkpoint = read_connections(args)
    if checkpoint.live and (args.gate == "open" or args.replace):
        option = "--replace" if args.replace else "--gate open"
        raise UsageError(f"{option} is for a process that is frozen", hint="this one is alive")
    move = make_move(args, checkpoint)
    authorise(move, checkpoint)
    executor = make_executor(args, create=not args.dry_run)
    require_devices(executor, move, checkpoint)
    require_sockets(executor, move, checkpoint)
    if args.dry_run:
        run_id = checkpoint.run_id
        plan = check(executor, move, checkpoint.connections, args.replace, run_id=run_id)
        _print_plan(plan, as_json=args.json)
        return 0
    work = partial(prepare, executor)
    if args.replace is not None:
        work = partial(replace_move, executor, args.replace)
    plan = work(move, checkpoint.connections, Gate(args.gate), checkpoint.run_id)
    if args.gate == Gate.OPEN:
        do_afterwards(partial(remove_hooks, args))
    for line in report.warning_lines(executor.warned):
        talk(args, f"natkeep: {line}")
    for line in report.unkept_lines(checkpoint, plan):
        talk(args, f"natkeep: not kept: {line}")
    for line in (*report.lock_lines(plan), *find_unheld(executor, move.id), *_waiting(move)):
        talk(args, f"natkeep: {line}")
    for line in _find_missing(args, executor, plan, checkpoint):
        talk(args, f"natkeep: {line}")
    done = {**report.move_to_json(plan), "gate": args.gate}
    print_verb(args, f"{report.summary(plan)}, gate {args.gate}", **done)
    return 0


def _find_missing(
    args: argparse.Namespace, executor: Executor, plan: Plan, checkpoint: Checkpoint
) -> list[str]:
    """What CRIU will not find at the destination; of an image it is too late to ask."""
    if not checkpoint.live:
        return []
    from natkeep.lifecycle.process import look_at_tree
    from natkeep.lifecycle.subject import Subject
    from natkeep.plan.findings import Severity

    pid = None if args.live is None else int(args.live)
    subject = Subject(executor.kernel, plan.move.sites, plan, checkpoint, pid=pid)
    return [
        f"{each.severity} {each.code}: {each.what()}"
        for each in look_at_tree(subject)
        if each.severity in (Severity.STOP, Severity.WARN)
    ]


def _waiting(move: Move) -> list[str]:
    """Which sites change nothing for the peers until the process is frozen."""
    return [
        f"{site}: changes nothing until open, since the process still talks through it"
        for site in move.ordered_sites()
        if move.waits(site)
    ]


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
    executor = make_executor(args, create=True)
    telling = partial(talk, args)
    keep = args.keep_closed_on_failure
    code = Restore(executor, move, checkpoint, command, telling, keep, own_stdout=args.json).run()
    print_verb(args, "", gate="open", criu=code)
    return code


def open(args: argparse.Namespace) -> int:
    executor = make_executor(args, create=False)
    blind, image, gate = False, None, Gate.OPEN
    if args.image is not None or args.connections is not None:
        image = read_connections(args)
        if image.live:
            raise UsageError("open compares with a dump", hint="this is of a process that runs")

    def confirm(journal: Journal) -> Checkpoint | None:
        nonlocal blind, gate
        tell_moved(args, journal.move)
        if args.compare:
            args.moved += ", compared alone"
            gate = Gate.OPEN if journal.is_opened() else Gate.CLOSED
        if image is None:
            blind = journal.move.live and journal.change is None
        return image

    if args.compare and image is None:
        raise UsageError("--compare with what?", hint="--image DIR, or --connections FILE")
    compared = open_move(executor, args.id, confirm, opens=not args.compare)
    if not args.compare:
        do_afterwards(partial(remove_hooks, args))
    if blind:
        talk(args, f"natkeep: {args.id}: opened as prepared, with no image to compare (--image)")
    if compared is not None:
        from natkeep import report

        for line in report.compared_lines(compared):
            talk(args, f"natkeep: {args.id}: {line}")
    more = {} if compared is None else {"came": compared.came, "went": compared.went}
    print_verb(args, f"{args.id}: gate {gate}", gate=gate, **more)
    return 0


def remove_hooks(args: argparse.Namespace) -> None:
    """What open leaves to be done; by a kernel of its own, whose handles are open.

    A gateway may have to be looked at again, for as long as afterwards.py lets it; then by repair.
    """
    while not remove_gate_hooks(make_executor(args, create=False), args.id):
        time.sleep(_LOOK_AGAIN)


def teardown(args: argparse.Namespace) -> int:
    from natkeep.lifecycle import drain
    from natkeep.lifecycle.teardown import teardown

    executor = make_executor(args, create=False)
    parse_id(args.id)
    ended = read_ended(args.ended)
    if args.site and not args.by_name:
        raise UsageError("--site is for --by-name", hint="the journal names the sites")
    if args.idle is not None and args.drain is None:
        raise UsageError("--idle is for --drain", hint="natkeep teardown ID --drain --idle SECONDS")
    executor.drops = SECONDS if args.drop is None else args.drop
    if args.by_name:
        if args.drain is not None:
            raise UsageError("--drain needs a journal, and --by-name is for a move without one")
        return _teardown_by_name(args, executor)
    if executor.state.knows(args.id):
        alive = 0
        if args.drain is not None:
            alive = drain.drain(executor, args.id, args.drain, args.idle)
        elif not args.yes:
            alive = drain.count_alive(executor, args.id)
        if not args.yes:
            _ask_if_alive(args.id, alive, silent=alive > 0 and drain.is_silent(executor, args.id))
            for line in drain.find_exposed(executor, args.id, ended):
                raise RefusedError(
                    line,
                    hint="take OLD from that host, or restore the process there; once they have "
                    "ended elsewhere --ended; or --yes",
                )
    journal = executor.state.load(args.id) if executor.state.knows(args.id) else None
    opened = journal is not None and journal.is_opened()
    if journal is not None:
        tell_moved(args, journal.move)
    executor.breaks = args.yes and opened and args.drop is None
    args.changed = found = teardown(executor, args.id)
    line = f"{args.id}: {'undone' if found else 'nothing to undo'}{_describe_dropped(executor)}"
    print_verb(args, line, found=found, **_dropped(executor))
    if executor.dropped and not opened:
        talk(
            args,
            f"natkeep: {args.id}: it was never opened: a rollback? The gateway comes first, then "
            f"the process at the source: natkeep rollback {args.id}",
        )
    return 0


def _dropped(executor: Executor) -> dict[str, int]:
    """Of how many connections something is dropped still, for a document."""
    number = sum(executor.dropped.values())
    return {"dropped": number} if number else {}


def _describe_dropped(executor: Executor) -> str:
    """What an undo has left at a destination, for the end of a line."""
    number = sum(executor.dropped.values())
    if not number:
        return ""
    what = f"what a gateway still sends to {number} connections here is dropped"
    return f"; {what} for {executor.drops} s (natkeep gc ends that)"


def rollback(args: argparse.Namespace) -> int:
    from natkeep.lifecycle.rollback import rollback

    parse_id(args.id)
    executor = make_executor(args, create=False)
    executor.drops = SECONDS if args.drop is None else args.drop
    done = rollback(executor, args.id, yes=args.yes)
    args.changed, args.moved = bool(done.undone), f"at {','.join(map(str, done.undone))}"
    sites = [str(site) for site in done.undone]
    undone = f"undone at {', '.join(sites)}" if sites else "nothing to undo here"
    talk(args, f"natkeep: {args.id}: {undone}{_describe_dropped(executor)}")
    for number, (role, command) in enumerate(done.next, 1):
        talk(args, f"natkeep: {number}. {role}, unless it is done: {command}")
    steps = [{"role": str(role), "command": command} for role, command in done.next]
    print_verb(args, "", undone=sites, next=steps, **_dropped(executor))
    return 0


def _teardown_by_name(args: argparse.Namespace, executor: Executor) -> int:
    from natkeep.lifecycle.teardown import teardown_by_name

    args.changed = found = teardown_by_name(executor, args.id, parse_sites(args.site), yes=args.yes)
    print_verb(args, f"{args.id}: {'undone by name' if found else 'nothing to undo'}", found=found)
    return 0


def _ask_if_alive(move_id: str, alive: int, *, silent: bool) -> None:
    if not alive:
        return
    question = f"{alive} connections of {move_id} live and will break"
    hint = "--yes breaks them, --drain waits for their end"
    if silent:
        question = f"{alive} connections of {move_id}, and nothing has come from NEW: a rollback?"
        hint = f"natkeep rollback {move_id}: they go on once the process is back at the source"
    if not sys.stdin or not sys.stdin.isatty():
        raise RefusedError(question, hint=hint)
    say(f"natkeep: {question}. Go on? [y/N] ", end="")
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise RefusedError("nothing was changed")


def quiesce(args: argparse.Namespace) -> int:
    from natkeep.lifecycle.quiesce import quiesce

    if not (args.map or args.site or args.port):
        executor = make_executor(args, create=False)
        if executor.state.knows(parse_id(args.id)):
            return _close(args, executor)
    sites = parse_sites(args.site or ["source"])
    if [site.role for site in sites] != [Role.SOURCE]:
        raise UsageError("quiesce is for the source", hint="--site source[=NETNS]")
    move = Move(args.id, parse_maps(args, sites), sites)
    tell_moved(args, move)
    policy.authorise(move, 0)
    executor = make_executor(args, create=True)
    listeners = quiesce(executor, move, frozenset(args.port), args.timeout)
    told = [str(end) for end in listeners]
    line = f"{args.id}: new connections to {', '.join(told)} wait; dump now"
    print_verb(args, line, listeners=told)
    return 0


def _close(args: argparse.Namespace, executor: Executor) -> int:
    """Of a move that is open already: what its peers say waits."""
    from natkeep.lifecycle.open import close_move

    tell_moved(args, executor.state.load(args.id).move)
    close_move(executor, args.id, dumps=True)
    print_verb(args, f"{args.id}: the gate is closed; dump now, or open it again", gate="closed")
    return 0


def repair(args: argparse.Namespace) -> int:
    if (args.id is None) != args.all:
        raise UsageError("repair which move? ID, or --all", hint="natkeep status lists them")
    executor = make_executor(args, create=False)
    if not args.all:
        repaired = _repair(args, executor, args.id)
        args.changed = bool(repaired)
        print_verb(args, "", repaired=repaired)
        return 0
    moves, first = [], None
    for move_id in executor.state.ids():
        try:
            moves.append({"id": move_id, "repaired": _repair(args, executor, move_id)})
        except NatkeepError as error:
            if not executor.state.knows(move_id):
                continue  # it was torn down meanwhile
            # One move that cannot be repaired must not keep the others as they are.
            first = first or error
            talk(args, f"natkeep: {move_id}: {error}")
    back = [str(each["id"]) for each in moves if each["repaired"]]
    args.changed, args.moved = bool(back), f"--all, put back {','.join(back) or 'nothing'}"
    if args.json:
        print_json({"schema": 1, "moves": moves})
    if first is not None:
        raise first
    return 0


def _repair(args: argparse.Namespace, executor: Executor, move_id: str) -> list[dict[str, object]]:
    """Repair one move and say so, unless it is to be said as JSON."""
    from natkeep.lifecycle.repair import repair
    from natkeep.report import site_to_json

    repaired = repair(executor, move_id)
    lines = [f"{one.site}: put back: {line}" for one in repaired for line in one.drift]
    lines = lines if lines or repaired else ["nothing to repair"]
    for line in [] if args.json else lines:
        talk(args, f"natkeep: {move_id}: {line}")
    left = [f"{one.site}: {line}" for one in repaired for line in one.left]
    if left:
        raise DriftError(
            f"{move_id}: not put back: {'; '.join(left)}",
            hint="take it from that host, or natkeep teardown",
        )
    return [site_to_json(one.site, drift=[*one.drift]) for one in repaired]


def gc(args: argparse.Namespace) -> int:
    from natkeep.criu.environment import is_abandoned
    from natkeep.lifecycle.gc import demand_nothing_left, gc

    executor = make_executor(args, create=False)
    collected = gc(
        executor, parse_sites(args.site), is_abandoned, dry_run=args.dry_run, yes=args.yes
    )
    args.changed = bool(collected.cleared)
    args.moved = ", ".join(f"{one.kind} {one.name}" for one in collected.cleared) or "nothing"
    if args.json:
        rows = [{"kind": c.kind, "name": c.name, "reason": c.reason} for c in collected.cleared]
        left = [str(error) for error in collected.left]
        print_json({"schema": 1, "cleared": rows, "left": left})
    else:
        verb = "would clear" if args.dry_run else "cleared"
        for one in collected.cleared:
            talk(args, f"natkeep: {verb} {one.kind} {one.name}: {one.reason}")
        if not collected.cleared:
            talk(args, "natkeep: nothing to clear")
    for error in collected.left[1:]:
        talk(args, *describe_error(error))
    demand_nothing_left(collected)
    return 0
