"""The verbs that drive several hosts: migrate, and finish."""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from natkeep.cli.output import print_json, talk
from natkeep.cli.progress import Bar, make_bar
from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.migrate import back
from natkeep.migrate.containers import CONTAINERS
from natkeep.migrate.forward import Migration, sum_up
from natkeep.migrate.host import Ssh, make_controls
from natkeep.migrate.page import Recording
from natkeep.migrate.record import IMAGES, PEER, Record, load, place, refuse_known
from natkeep.migrate.way import parse_via
from natkeep.page import demand_matplotlib
from natkeep.plan.maps import parse_map
from natkeep.plan.move import parse_id

_SIGNALS = (KeyboardInterrupt, SystemExit)


def migrate(args: argparse.Namespace) -> int:
    """All of a move; with --resume or --rollback the rest of one that was interrupted."""
    if args.resume is not None or args.rollback is not None:
        both = args.resume is not None and args.rollback is not None
        if args.source or args.report or both:
            raise UsageError("--resume ID and --rollback ID stand alone")
        return _carry_on(args, args.resume or args.rollback, back.resume if args.resume else None)
    record = _make_record(args)
    if args.report:
        _demand_report(args)
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
    source, engine, pid, container = _parse_process(args.source)
    if container and args.criu != "criu":
        raise UsageError(f"--criu: {engine} takes criu from its PATH")
    if container and args.images and any(each.isspace() for each in args.images):
        raise UsageError("--images: CRIU's configuration file takes no path with blanks")
    if args.bundle and engine != "runc":
        raise UsageError("--bundle is for [USER@]A:runc:NAME")
    if source == args.destination:
        raise UsageError("source and destination are the same host")
    for text in args.map:
        parse_map(text)
    role, translators = parse_via(args.via)
    for end in (source, args.destination) if role == PEER else ():
        if end in translators:
            raise UsageError(f"--via peer:{end}: that is where the process is, or goes")
    move_id = parse_id(args.id or container or f"m{pid}")
    return Record(
        move_id, source, pid, args.destination, role, translators,
        maps=[*args.map], listeners=args.listeners, no_udp=args.no_udp, pre_dumps=args.pre_dump,
        images=args.images or f"{IMAGES}/{move_id}", criu=args.criu,
        dump_options=[*args.criu_option, *args.dump_option],
        restore_options=[*args.criu_option, *args.restore_option],
        ssh=shlex.split(args.ssh), natkeep=shlex.split(args.natkeep),
        engine=engine, container=container, bundle=args.bundle or "",
    )  # fmt: skip


def _parse_process(text: str) -> tuple[str, str, int, str]:
    """Of `[USER@]A:PID` or `[USER@]A:ENGINE:NAME` the host, the engine, the pid, the name."""
    source, colon, name = text.rpartition(":")
    host, _, engine = source.rpartition(":")
    if host and name and engine in CONTAINERS:
        return host, engine, 0, name
    if not (colon and source and name.isascii() and name.isdigit()):
        ways = ", ".join(f"A:{each}:NAME" for each in CONTAINERS)
        raise UsageError(f"{text!r} is not [USER@]A:PID", hint=f"of a container: {ways}")
    return source, "criu", int(name), ""


def _with_hosts(args: argparse.Namespace, record: Record, work: Callable[[Migration], int]) -> int:
    controls = make_controls()
    ssh = Ssh(tuple(record.ssh), tuple(record.natkeep), controls)
    bar = make_bar(args)
    migration = Migration(record, ssh, _speaker(args, bar), bar)
    try:
        return work(migration)
    finally:
        args.id = record.id
        args.moved = (
            f"{','.join(record.maps)} {record.source}:{record.process} to {record.destination}"
        )
        migration.close()
        shutil.rmtree(controls, ignore_errors=True)


def _speaker(args: argparse.Namespace, bar: Bar | None) -> Callable[[str, str], None]:
    """What tells a step: a line, with the milliseconds since the beginning."""
    began = time.monotonic()

    def say(step: str, text: str) -> None:
        with bar.aside() if bar else nullcontext():
            talk(args, f"{(time.monotonic() - began) * 1000:6.0f} ms  {step:9} {text}")

    return say


def _go(args: argparse.Namespace, migration: Migration) -> int:
    migration.connect()  # nothing has been changed if that fails
    if args.dry_run:
        migration.tell()
        return 0
    recording = Recording(migration) if args.report else None
    try:
        try:
            migration.go()
        except BaseException as error:  # signals too: what was begun must not stay half done
            return _take_back(args, migration, error)
        _tell(args, migration)
        if recording:
            _write_page(args, migration.record.id, recording)
    finally:
        if recording:
            recording.close()
    return 0


def _demand_report(args: argparse.Namespace) -> None:
    """Whether a page can be made, before anything else is."""
    if args.dry_run:
        raise UsageError("--report: of a --dry-run there is nothing to report")
    demand_matplotlib()
    try:
        Path(args.report).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--report {args.report}: {error.strerror}") from None


def _write_page(args: argparse.Namespace, move_id: str, recording: Recording) -> None:
    file = Path(args.report) / f"{move_id}.html"
    try:
        file.write_text(recording.render(), encoding="utf-8")
    except OSError as error:  # the move has been made all the same
        talk(args, f"natkeep: {move_id}: no page: {error}")
    else:
        talk(args, f"natkeep: {move_id}: as a page: {file}")


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
                "translators": record.translators, "silent_ms": migration.silent_ms,
                "answered": migration.answered, "connections": migration.count,
                "lost": None if migration.lost is None else [*map(_name_lost, migration.lost)],
            }
        )  # fmt: skip
    else:
        talk(args, f"natkeep: {record.id}: {sum_up(migration)}")
        talk(args, f"natkeep: {record.id}: later, natkeep finish {record.id}")
    return 0


def _name_lost(socket: dict[str, Any]) -> dict[str, Any]:
    return {key: socket[key] for key in ("local", "peer", "reason")}


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
