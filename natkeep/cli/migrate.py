"""The verbs that drive several hosts: migrate, and finish."""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from natkeep.cli.output import print_json, talk
from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.migrate import back
from natkeep.migrate.forward import Migration
from natkeep.migrate.host import Ssh, make_controls
from natkeep.migrate.record import Record, load, place, refuse_known
from natkeep.plan.maps import parse_map
from natkeep.plan.move import parse_id

_IMAGES = "/var/tmp/natkeep"
_SIGNALS = (KeyboardInterrupt, SystemExit)


def migrate(args: argparse.Namespace) -> int:
    """All of a move; with --resume or --rollback the rest of one that was interrupted."""
    if args.resume is not None or args.rollback is not None:
        if args.source or (args.resume is not None and args.rollback is not None):
            raise UsageError("--resume ID and --rollback ID stand alone")
        return _carry_on(args, args.resume or args.rollback, back.resume if args.resume else None)
    record = _make_record(args)
    refuse_known(args.state_dir, record.id)
    record.path = place(args.state_dir, record.id)
    return _with_hosts(args, record, lambda migration: _go(args, migration))


def finish(args: argparse.Namespace) -> int:
    """End a migration: when its connections have ended everything is undone everywhere."""
    record = load(args.state_dir, args.id)

    def work(migration: Migration) -> int:
        alive = back.finish(migration, args.drain)
        if alive:
            raise RefusedError(
                f"{alive} connections of {args.id} live", hint="without --drain it waits for them"
            )
        talk(args, f"natkeep: {args.id}: ended, nothing is left")
        print_json({"schema": 1, "id": args.id}) if args.json else None
        return 0

    return _with_hosts(args, record, work)


def _make_record(args: argparse.Namespace) -> Record:
    if not (args.source and args.destination):
        raise UsageError(
            "which process, and where to?", hint="natkeep migrate [USER@]A:PID [USER@]B"
        )
    source, colon, pid = args.source.rpartition(":")
    if not (colon and source and pid.isascii() and pid.isdigit()):
        raise UsageError(f"{args.source!r} is not [USER@]A:PID")
    if source == args.destination:
        raise UsageError("source and destination are the same host")
    for text in args.map:
        parse_map(text)
    move_id = parse_id(args.id or f"m{pid}")
    return Record(
        move_id, source, int(pid), args.destination,
        maps=[*args.map], listeners=args.listeners, pre_dumps=args.pre_dump,
        images=args.images or f"{_IMAGES}/{move_id}", criu=args.criu,
        dump_options=[*args.criu_option, *args.dump_option],
        restore_options=[*args.criu_option, *args.restore_option],
        ssh=shlex.split(args.ssh), natkeep=shlex.split(args.natkeep),
    )  # fmt: skip


def _with_hosts(args: argparse.Namespace, record: Record, work: Callable[[Migration], int]) -> int:
    controls = make_controls()
    ssh = Ssh(tuple(record.ssh), tuple(record.natkeep), controls)
    asked = getattr(args, "via", "") or ""
    migration = Migration(record, ssh, _speaker(args), asked)
    try:
        return work(migration)
    finally:
        args.id = record.id
        args.moved = f"{','.join(record.maps)} {record.source}:{record.pid} to {record.destination}"
        migration.close()
        shutil.rmtree(controls, ignore_errors=True)


def _speaker(args: argparse.Namespace) -> Callable[[str, str], None]:
    """What tells a step: a line, with the milliseconds since the beginning."""
    began = time.monotonic()

    def say(step: str, text: str) -> None:
        talk(args, f"{(time.monotonic() - began) * 1000:6.0f} ms  {step:9} {text}")

    return say


def _go(args: argparse.Namespace, migration: Migration) -> int:
    migration.connect()  # nothing has been changed if that fails
    if args.dry_run:
        migration.tell()
        return 0
    try:
        migration.go()
    except BaseException as error:  # signals too: what was begun must not stay half done
        return _take_back(args, migration, error)
    return _tell(args, migration)


def _take_back(args: argparse.Namespace, migration: Migration, error: BaseException) -> int:
    """What failed is undone; unless the process runs at the destination, which then is told."""
    record = migration.record
    why = "interrupted" if isinstance(error, _SIGNALS) else str(error) or type(error).__name__
    migration.say("FAILED", f"{record.reached}: {why}")
    try:
        with _uninterrupted():
            back.go_back(migration)
    except NatkeepError as other:
        hint = other.hint or f"natkeep migrate --rollback {record.id} tries again"
        raise type(other)(str(other), hint=hint) from error
    if isinstance(error, _SIGNALS):
        raise NatkeepError("interrupted; everything was undone") from error
    raise error


def _carry_on(
    args: argparse.Namespace, move_id: str, resume: Callable[[Migration], None] | None
) -> int:
    record = load(args.state_dir, move_id)

    def work(migration: Migration) -> int:
        if resume is None:
            back.go_back(migration)
            return 0
        resume(migration)
        return _tell(args, migration)

    return _with_hosts(args, record, work)


def _tell(args: argparse.Namespace, migration: Migration) -> int:
    record = migration.record
    if args.json:
        print_json(
            {
                "schema": 1, "id": record.id, "maps": record.maps, "role": record.role,
                "silent_ms": migration.silent_ms, "answered": migration.answered,
                "connections": migration.count,
            }
        )  # fmt: skip
    else:
        talk(args, f"natkeep: {record.id}: later, natkeep finish {record.id}")
    return 0


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """On the way back no signal ends us: half a way back is what must not be."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
