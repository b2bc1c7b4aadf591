"""The verbs of a fleet: the agent of a node, and the orders that agents follow."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from natkeep import agent_socket, policy
from natkeep.checkpoint import Checkpoint
from natkeep.cli.arguments import make_executor
from natkeep.cli.output import print_json, talk
from natkeep.errors import NatkeepError, RefusedError, UnreachableError, UsageError
from natkeep.fleet import apply as orders
from natkeep.fleet import keys, order, progress, rights
from natkeep.fleet.agent import Agent
from natkeep.fleet.etcd import EtcdStore
from natkeep.fleet.observed import Observer
from natkeep.fleet.progress import Node, Progress
from natkeep.fleet.ready import ReadyServer
from natkeep.fleet.store import Store
from natkeep.fleet.stores import open_store
from natkeep.fleet.wake import Heard, Wake
from natkeep.fleet.want import Phase
from natkeep.plan.move import parse_id
from natkeep.system_log import note
from natkeep.terminal import clear, show
from natkeep.values import replace

_SOONEST, _LATEST = 0.01, 0.05  # s between two looks of `wait`
_WATCH_S = 1.0
_WAIT_S = 60.0


def agent(args: argparse.Namespace) -> int:
    """Follow the orders of this node, until a signal ends it; with --once what there is now."""
    settings, store = _read_settings(args)
    name = keys.parse_name(settings.node or os.uname().nodename)
    settings = replace(settings, node=name, groups=tuple(map(keys.parse_name, settings.groups)))
    wake = Wake(store)
    executor = partial(make_executor, args, create=True)
    follow = partial(_hear_now, store) if args.once else lambda _, prefix: wake.follow(prefix)
    one, alive = Agent(settings, store, executor, follow, partial(_say, args)), False
    try:
        if args.once:
            return _follow_once(store, one)
        wake.demand_name(name)
        wake.follow_journals(executor().state.path, one.known.phases)
        alive = True
        wake.stay_alive(name, one.describe_alive)
        path = settings.socket or os.path.join(executor().state.path, agent_socket.NAME)
        with agent_socket.listening(path) as listening:
            Observer(executor().state.path, one.known.phases, wake.hear).start()
            ReadyServer(listening, store, one.known.find_told, wake.hear).start()
            talk(args, f"natkeep: agent of {name}")
            one.run(wake)
    except (KeyboardInterrupt, SystemExit):
        with suppress(NatkeepError):
            if alive:  # else it is another's perhaps
                store.txn({keys.alive(name): None})
        return 0
    finally:
        wake.close()
        one.close()


def _follow_once(store: Store, one: Agent) -> int:
    """What is ordered now; an error where that is not known, or one that was ready is not again."""
    ids = set[str]()
    for prefix in one.known.prefixes:
        ids |= _hear_now(store, one, prefix)
    ready = {each for each, told in one.known.told.items() if told.was_ready()}
    for error in one.reconcile(ids).values():
        raise error
    for move_id in sorted(ready & one.known.told.keys()):
        told = one.known.told[move_id]
        if told.error is not None and not told.phase.reaches(Phase.PREPARED):
            raise _as_exception(f"{move_id}: {told.error.message}", told.error.exit)
    return 0


def _hear_now(store: Store, one: Agent, prefix: str) -> set[str]:
    return one.hear(Heard(prefix, store.range(prefix).items, True))


def _say(args: argparse.Namespace, line: str, *, failed: bool = False) -> None:
    talk(args, f"natkeep: {line}")
    note("natkeep-agent", line, failed=failed)


def fleet(args: argparse.Namespace) -> int:
    """apply FILE, status [ID], wait ID, end ID; init."""
    if args.action == "init":
        return _init(args)
    if args.subject is None and args.action != "status":
        what = "FILE, or - for stdin" if args.action == "apply" else "ID"
        raise UsageError(f"fleet {args.action} needs {what}")
    work = {"apply": _apply, "status": _status, "wait": _wait, "end": _end}[args.action]
    _, store = _read_settings(args)
    try:
        return work(args, store)
    finally:
        store.close()


def _read_settings(args: argparse.Namespace, **more: str) -> tuple[policy.Agent, Store]:
    """The operator's table [agent], with what the command line and *more* say; and the store."""
    if args.config is not None:
        policy.PATH = args.config
        if not os.path.exists(args.config):
            raise UsageError(f"there is no {args.config}")
    settings = replace(policy.read_policy().agent, **more)
    if args.verb == "agent":
        settings = replace(
            settings,
            node=args.node or settings.node,
            groups=tuple(args.group) or settings.groups,
            socket=args.socket or settings.socket,
        )
    named = args.store or os.environ.get("NATKEEP_STORE") or settings.store
    if not named and not settings.endpoints:
        raise UsageError(
            "which store? --store, or NATKEEP_STORE", hint=f"agent.store in {policy.PATH}"
        )
    return settings, open_store(named, settings)


# ---- init, apply and end -------------------------------------------------------------------------


def _init(args: argparse.Namespace) -> int:
    """By root's password, where there is one by now."""
    if args.subject is not None or not args.node:
        raise UsageError("fleet init --node NAME: which nodes?")
    own = os.path.join(args.passwords, rights.ROOT)
    known = os.path.exists(own)
    user, file = (rights.ROOT, own) if known else ("", "")
    _, store = _read_settings(args, user=user, password_file=file)
    try:
        if not isinstance(store, EtcdStore):
            raise UsageError("fleet init is for etcd", hint="a directory has its mode")
        users = rights.init(store, args.node, args.passwords)
    except RefusedError as error:
        raise RefusedError(str(error), hint=f"root's password of etcd, 0600, as {own}") from None
    finally:
        store.close()
    for each in users:
        told = f"made, its password is in {each.file}" if each.made else "is there, with its rights"
        talk(args, f"natkeep: {each.name}: {told}")
    if args.json:
        rows = [{"name": each.name, "made": each.made, "file": each.file or None} for each in users]
        print_json({"schema": 1, "users": rows})
    note("natkeep", f"fleet init: {', '.join(each.name for each in users)}: done")
    return 0


def _apply(args: argparse.Namespace, store: Store) -> int:
    folder, text = Path(), ""
    try:
        if args.subject == "-":
            text = sys.stdin.read() if sys.stdin else ""
        else:
            folder, text = Path(args.subject).parent, Path(args.subject).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read {args.subject}: {why}") from None
    wish, where = order.parse_file(text)
    args.id = wish.id
    checkpoint = _read_checkpoint(folder, where)
    if where.listeners:
        olds = [map_.old_end for map_ in wish.maps]
        wish = replace(wish, listeners=checkpoint.listeners_at(olds))
        if not wish.listeners:
            raise RefusedError("listeners: there is none at an OLD")
    with _noted("apply", wish.id):
        done, plan = orders.apply(store, wish, checkpoint)
    from natkeep import report

    for line in report.unkept_lines(checkpoint, plan):
        talk(args, f"natkeep: not kept: {line}")
    talk(
        args,
        f"natkeep: {done.id}: ordered of {', '.join(n for n, _ in done.nodes())} "
        f"(order {done.generation}, {done.listed.count} connections)",
    )
    if args.json:
        print_json(_to_json(progress.look(store, done.id)))
    return 0


def _read_checkpoint(folder: Path, where: order.Where) -> Checkpoint:
    path = str(folder / where.path)
    if where.is_image:
        from natkeep.checkpoint.archive import opened_image
        from natkeep.checkpoint.images import read_checkpoint

        with opened_image(path) as images:
            return read_checkpoint(images)
    from natkeep.checkpoint.listing import read_listing

    return read_listing(path)


def _end(args: argparse.Namespace, store: Store) -> int:
    move_id = parse_id(args.subject)
    with _noted("end", move_id):
        done = orders.end(store, move_id, force=args.yes)
    if done is None:
        talk(args, f"natkeep: {move_id}: nothing to end")
    else:
        talk(args, f"natkeep: {move_id}: to be undone (order {done.generation})")
    if args.json:
        print_json({"schema": 1, "id": move_id, "found": done is not None})
    return 0


@contextmanager
def _noted(action: str, move_id: str) -> Iterator[None]:
    """A line in the system's log on an order."""
    try:
        yield
    except NatkeepError as error:
        note("natkeep", f"fleet {action} {move_id}: failed: {error}", failed=True)
        raise
    note("natkeep", f"fleet {action} {move_id}: done")


# ---- status and wait -----------------------------------------------------------------------------


def _status(args: argparse.Namespace, store: Store) -> int:
    with suppress(KeyboardInterrupt):
        while True:
            moves, alive, unread = _look(args, store)
            if args.watch:
                clear()
            if args.json:
                rows = [_to_json(move) for move in moves]
                print_json({"schema": 1, "moves": rows, "agents": alive, "unread": unread})
            else:
                lines = [*(line for move in moves for line in _describe(move)), *unread]
                show(lines or ["nothing is ordered"])
                if not args.subject:
                    show([f"agents: {', '.join(alive) or 'none'}"])
            if not args.watch:
                break
            time.sleep(_WATCH_S)
    return 0


def _look(args: argparse.Namespace, store: Store) -> tuple[list[Progress], list[str], list[str]]:
    if args.subject is None:
        return progress.look_at_all(store)
    move = progress.look(store, parse_id(args.subject))
    return [move], [node.name for node in move.nodes if node.alive], []


def _describe(move: Progress) -> Iterator[str]:
    """A line for a move, and one for each of its nodes."""
    it = move.order
    maps = " ".join(map(str, it.maps))
    yield f"{it.id}: {it.phase}, {maps}, {it.listed.count} connections (order {it.generation})"
    for node in move.nodes:
        yield f"  {node.name:16} {node.place.role:12} {node.describe()}"


def _to_json(move: Progress) -> dict[str, object]:
    it = move.order.to_json()
    sites = [
        {
            "node": node.name, "role": str(node.place.role), "netns": node.place.netns,
            "alive": node.alive, "heard": node.heard, **node.done.to_json(),
        }
        for node in move.nodes
    ]  # fmt: skip
    kept = ("id", "generation", "phase", "maps", "mode", "deadline_s")
    return {"schema": 1, **{k: it[k] for k in kept}, "connections": it["conn"]["count"],
            "sites": [{k: v for k, v in s.items() if k != "schema"} for s in sites]}  # fmt: skip


def _wait(args: argparse.Namespace, store: Store) -> int:
    """Until a move is as far; an error where a node says that it fails, or after --timeout."""
    move_id, goal = parse_id(args.subject), args.goal
    until = time.monotonic() + (_WAIT_S if args.timeout is None else args.timeout)
    rest = _SOONEST
    while True:
        move = progress.look(store, move_id)
        if goal != "settled" and not move.order.is_wanted():
            raise RefusedError(f"{move_id} is undone, or to be", hint="natkeep fleet apply")
        lacking = move.lacking(goal)
        if not lacking:
            break
        for node in lacking:
            if error := node.error():
                raise _as_exception(f"{move_id}: {node.name}: {error.message}", error.exit)
        if time.monotonic() > until:
            _raise_late(move, lacking, goal)
        time.sleep(rest)
        rest = min(rest * 1.5, _LATEST)
    if goal == "settled" and move.order.phase == "gone":
        orders.forget(store, move.order)
    talk(args, f"natkeep: {move_id}: {goal if move.order.is_wanted() else 'undone'}")
    if args.json:
        print_json(_to_json(move))
    return 0


def _as_exception(message: str, code: int) -> NatkeepError:
    """The error of a node, with its exit code."""
    kinds: list[type[NatkeepError]] = NatkeepError.__subclasses__()
    return next((kind for kind in kinds if kind.exit_code == code), NatkeepError)(message)


def _raise_late(move: Progress, lacking: list[Node], goal: str) -> None:
    names = [node.name for node in lacking if not node.alive]
    if names:
        raise UnreachableError(f"{move.order.id}: no agent runs as {', '.join(names)}")
    raise NatkeepError(f"{move.order.id}: not {goal} in time: {move.describe(lacking)}")
