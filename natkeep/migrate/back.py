"""Where the process is by now, and the way back to the source.

    1. gateway       undone, or each peer's host: packets go to the source, which is quiet still
    2. source        the process is restored there, from the image that stays there
    3. source        its gate goes: the process there waits for no other host
    4. destination   undone; last, for it may be away

Rule: the process is restored at the source only when the destination has told that it has not been
opened there. While that cannot be asked, nothing is done, and that is said.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from enum import Enum
from typing import Any

from natkeep.errors import LeftoverError, NatkeepError, RefusedError, UnreachableError
from natkeep.migrate import way
from natkeep.migrate.engines import run
from natkeep.migrate.forward import Migration, quiet_source
from natkeep.migrate.host import Host, HostError, knows, read_move, read_start
from natkeep.migrate.record import GATEWAY, PEER, RELAY, Record

_PATIENCE = 30.0  # s for a host that cannot be reached just now
_PEER_PATIENCE = 5.0  # the same for a peer's own host: the others' peers wait for it


class Place(Enum):
    """Where the process is: it runs at one of the two, or is frozen in its image."""

    SOURCE = "source"
    FROZEN = "frozen"
    DESTINATION = "destination"


def find_place(migration: Migration) -> Place:
    """Ask the hosts; NatkeepError where they do not tell.

    A host that was asked to do something just before finishes that first, and then answers.
    """
    record = migration.record
    if not record.is_past("prepare"):  # nothing was changed anywhere
        return Place.SOURCE
    if record.is_past("restore"):
        _reach(migration.destination, f"whether it runs on {migration.destination} is not known")
        if _has_run_there(migration):
            return Place.DESTINATION
    _reach(migration.source, f"nothing can be restored on {migration.source} now")
    if record.started and read_start(migration.source, record.pid) == record.started:
        _refuse_at_work(migration, migration.source, record.pid, "TracerPid")
        return Place.SOURCE
    if not record.is_past("dump"):
        raise HostError(f"process {record.pid} on {migration.source} has ended")
    if _is_back(migration):
        return Place.SOURCE
    if not migration.engine.is_dumped(migration.source):
        raise _ended(migration)
    return Place.FROZEN


def _refuse_at_work(migration: Migration, host: Host, pid: int, field: str) -> None:
    """HostError while a CRIU that nobody waits for any more is at work on the process still.

    field: of proc(5)'s status, by which that is known: whom it dumps CRIU traces, and of what it
    restores it is the parent until the end.
    """
    status = host.run("cat", f"/proc/{pid}/status", ok=None).stdout
    found = re.search(rf"(?m)^{field}:\t([1-9][0-9]*)$", status)
    name = host.run("cat", f"/proc/{found[1]}/comm", ok=None).stdout.strip() if found else ""
    if found and "criu" in name:
        raise HostError(
            f"{name}, process {found[1]} on {host}, is at work on process {pid}",
            hint=f"when it has ended, natkeep migrate --rollback {migration.record.id}",
        )


def _ended(migration: Migration) -> HostError:
    """What is left of a process whose CRIU was killed; it cannot be restored anywhere."""
    record, source = migration.record, migration.source
    what = f"process {record.pid} on {source} has ended, and its image is not complete"
    undo = f"natkeep teardown {record.id} on each host"
    try:
        table = migration.engine.find_lock(source)
    except HostError as error:
        table, what = "", f"{what}; whether CRIU's lock is left is not known: {error}"
    if table:
        what += f"; CRIU's lock, table inet {table}, keeps its peers waiting"
        undo += f"; nft delete table inet {table} there has them reset"
    return HostError(what, hint=undo)


def _release(migration: Migration) -> str:
    """Let the process go on, whose CRIU was killed, if it was; what is left of that.

    Only where no CRIU is at work on it, and it was restored nowhere.
    """
    source = migration.source
    try:
        if table := migration.engine.release(source):
            migration.say("rollback", f"{source}: removed {table}, a killed CRIU's lock")
    except HostError as error:
        return f"CRIU's lock, if one is left: {error}"
    return ""


def _has_run_there(migration: Migration) -> bool:
    """Whether it runs at the destination; False only where it has not been opened there.

    HostError where it was opened, and may have ended since: peers may have been answered there, of
    which the image knows nothing. An open gate alone tells of no process.
    """
    record, there = migration.record, migration.destination
    move = read_move(there, record.id)
    opened = move is not None and move["gate"] == "open"
    pid = migration.engine.find_pid(there)
    if move is not None and opened and (_has_socket(move) or (pid and read_start(there, pid))):
        return True
    if opened:
        found = (
            f"{there}: the gate of {record.id} is open, but neither process "
            f"{record.container or record.pid} nor a socket of its connections is there: "
            "it has ended there, or its restore failed after the gate was opened"
        )
    elif record.is_past("source"):
        says = "does not know the move any more" if move is None else "has its gate closed by now"
        found = f"it was restored on {there}, which {says}"
    elif record.boot and record.boot != way.read_boot(there):
        found = f"{there} has booted since: whether it was opened there before is not known"
    else:
        _refuse_at_work(migration, there, pid, "PPid")
        return False
    raise HostError(
        f"{found}; its image is not restored again, since peers may have heard more",
        hint=f"natkeep teardown {record.id} on each host ends the move; the image stays on "
        f"{migration.source}, in {record.images}",
    )


def _has_socket(move: dict[str, Any]) -> bool:
    """Whether the *move* in a document of status has a socket at its destination."""
    states = {one["state"] for one in move["connections"]} | {*move.get("udp_states", {}).values()}
    return not states.isdisjoint(("live", "one-way", "silent"))


def _is_back(migration: Migration) -> bool:
    """Whether a way back that was interrupted has restored it at the source all the same.

    Its pid, or name, alone does not tell: another process may have that since. podman has removed
    its image when it has restored it.
    """
    record, source, engine = migration.record, migration.source, migration.engine
    pid = engine.find_pid(source)
    if not (pid and read_start(source, pid)):
        return False
    if record.container and not engine.is_dumped(source):
        return True
    try:
        here = way.read_sockets(source, replace(record, pid=pid))
        image = migration.read_image()
    except HostError:
        return False  # one of whose sockets is nothing told
    return not _find_kept(here).isdisjoint(_find_kept(json.loads(image)))


def _find_kept(sockets: dict[str, Any]) -> set[tuple[str, str, str | None]]:
    kept = (each for each in sockets["sockets"] if each["kept"])
    return {(each["protocol"], each["local"], each["peer"]) for each in kept}


def _reach(host: Host, otherwise: str, seconds: float = _PATIENCE) -> None:
    """Connect anew: an answer to what was asked before must not be taken for another one."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return host.connect()
        except UnreachableError as error:
            if time.monotonic() > deadline:
                raise UnreachableError(f"{error}; {otherwise}", hint=error.hint) from error
            time.sleep(1)


def go_back(migration: Migration) -> None:
    """Undo all; the process goes on at the source. NatkeepError where it cannot, and why."""
    record = migration.record
    place = find_place(migration)
    if place == Place.DESTINATION:
        raise NatkeepError(
            f"it runs on {migration.destination}: there is no way back",
            hint=f"natkeep migrate --resume {record.id} goes on from there",
        )
    left = _undo(migration, place) if record.is_past("prepare") else ""
    migration.say("rollback", f"runs on {migration.source}, as before")
    if left:
        raise HostError(f"it runs on {migration.source}, but something is left: {left}")
    record.forget()


def _undo(migration: Migration, place: Place) -> str:
    """All that was done, in the order of the top of this file; what is left."""
    record, image = migration.record, ""
    migration.fresh = False  # which move stands where is asked from here on
    left = _undo_translators(migration)
    if record.is_past("restore") and migration.engine.is_dumped(migration.source):
        migration.engine.clear(migration.destination)
        image = migration.read_image()
    if place == Place.FROZEN:
        _restore_at_source(migration)
    elif record.reached == "dump":
        left = "; ".join(filter(None, (left, _release(migration))))
    if knows(migration.source, record.id):
        migration.source.natkeep("teardown", record.id, "--yes")
    try:
        _reach(migration.destination, f"natkeep teardown {record.id} --yes there later")
        if image:
            # What a failed restore has left dropped there goes with a move that takes it over.
            migration.prepare_from(image, "destination", migration.destination)
        if not left or not record.is_past("copy"):
            # Else it stays silent for the peers that are sent there still.
            migration.destination.natkeep("teardown", record.id, "--yes", "--drop", "0")
    except NatkeepError as error:
        left = str(error)
    _remove_images(migration)
    return left


def _undo_translators(migration: Migration) -> str:
    """The first of the way back; what is left of it.

    Without a gateway there is no way back for any peer. A peer's own host that is away may never
    come back, so the other peers do not wait for it; nor do they where nothing is redirected yet.
    """
    record, left = migration.record, list[str]()
    alone = record.role == PEER or not record.is_past("copy")
    for host in migration.translators:
        why = f"{host} still sends peers to {record.destination}"
        try:
            _reach(host, why, _PEER_PATIENCE if alone else _PATIENCE)
            host.natkeep("rollback", record.translator_id(host.target), "--yes")
        except UnreachableError as error:
            if not alone:
                raise
            left.append(str(error))
    return "; ".join(left)


def _restore_at_source(migration: Migration) -> None:
    """The same process again; its gate opens when its sockets are there."""
    record, source = migration.record, migration.source
    relays = record.role == RELAY and knows(source, record.id)
    if relays:
        source.natkeep("rollback", record.id, "--yes")  # closes its gate
    else:
        quiet_source(migration)
    hook = {} if relays else record.hook
    run(migration.engine.restore(source, hook), source, migration.say)
    record.pid = migration.engine.find_pid(source)
    record.started = read_start(source, record.pid)
    record.save()
    if relays:
        source.natkeep("rollback", record.id, "--yes")


def _remove_images(migration: Migration) -> None:
    record = migration.record
    for host in (migration.source, migration.destination) if record.made else ():
        try:
            host.run("rm", "-rf", "--", *(f"{record.images}/{name}" for name in _names(record)))
            host.run("rmdir", "--ignore-fail-on-non-empty", record.images, ok=None)
        except NatkeepError:
            migration.say("rollback", f"{host}: {record.images} is left")


def _names(record: Record) -> list[str]:
    """The directories of images that a migration makes."""
    return ["criu", "dump", *(f"pre-{number}" for number in range(1, record.pre_dumps + 1))]


def resume(migration: Migration) -> None:
    """Go on where the hosts say that it is."""
    place = find_place(migration)
    if place == Place.SOURCE:
        raise HostError(
            f"nothing is frozen: it runs on {migration.source}",
            hint=f"natkeep migrate --rollback {migration.record.id}, and then anew",
        )
    if place == Place.DESTINATION:  # so what translates stands, and is not asked any more
        for host in (migration.source, migration.destination):
            _reach(host, "it is needed to go on")
        migration.go("source")
        return
    for host in migration.hosts():
        _reach(host, "it is needed to go on")
    if migration.record.is_past("restore"):
        migration.engine.clear(migration.destination)
    if not migration.record.shared:
        migration.destination.run("rm", "-rf", "--", migration.engine.dumped)
    migration.go("copy")


def finish(migration: Migration, seconds: float | None) -> int:
    """Wait for the end of the kept connections, *seconds* at most, and tear down everywhere.

    UDP sockets end when they are closed, or silent. How many live still, which then is all that is
    told: nothing is torn down. LeftoverError where all is, but at peers' own hosts that are away.
    """
    record = migration.record
    away = _reach_all(migration)
    _refuse_unmoved(migration)
    deadline = float("inf") if seconds is None else time.monotonic() + seconds
    while live := _find_live(migration):
        if time.monotonic() >= deadline:
            return live
        time.sleep(1)
    if record.role != RELAY:
        for host in (host for host in migration.translators if host not in away):
            host.natkeep("teardown", record.translator_id(host.target), "--yes")
        ended = migration.destination.natkeep("status", "--json").stdout
        migration.source.natkeep("teardown", record.id, "--ended", "-", stdin=ended)
    else:
        migration.source.natkeep("teardown", record.id, "--yes")
    drop = [] if away else ["--drop", "0"]  # what these hosts may still send there
    migration.destination.natkeep("teardown", record.id, "--yes", *drop)
    migration.engine.forget(migration.source)
    _remove_images(migration)
    if away:
        record.translators = [host.target for host in away]
        record.save()
        raise LeftoverError(
            f"{record.id} has ended, but for what is left where it translates: "
            f"{'; '.join(map(str, away.values()))}",
            hint=f"natkeep finish {record.id} once more, or there: natkeep teardown {record.id}",
        )
    record.forget()
    return 0


def _refuse_unmoved(migration: Migration) -> None:
    """RefusedError where the process is not at the destination: finish removes its image."""
    record = migration.record
    if record.is_past("source") or find_place(migration) == Place.DESTINATION:
        return
    raise RefusedError(
        f"{record.id} is not through: {record.reached} was begun last",
        hint=f"natkeep migrate --resume {record.id} or --rollback {record.id}",
    )


def _reach_all(migration: Migration) -> dict[Host, UnreachableError]:
    """Connect to all hosts; why not, of each peer's own host that is away."""
    record, away = migration.record, dict[Host, UnreachableError]()
    peers = migration.translators if record.role == PEER else ()
    for host in migration.hosts():
        try:
            _reach(host, "it is needed to finish", _PEER_PATIENCE if host in peers else _PATIENCE)
        except UnreachableError as error:
            if host not in peers:
                raise
            away[host] = error
    return away


def _find_live(migration: Migration) -> int:
    """As count_live, of what the destination tells.

    HostError where that does not know the move any more, and it was not this that ended it there:
    the destination comes last, but for peers' own hosts that were away.
    """
    record = migration.record
    move = read_move(migration.destination, record.id)
    if move is not None:
        return count_live(move)
    gateways = migration.translators if record.role == GATEWAY else ()
    before = {host: record.translator_id(host.target) for host in gateways}
    before = before or {migration.source: record.id}
    if any(knows(host, move_id) for host, move_id in before.items()):
        raise HostError(
            f"{migration.destination} does not know {record.id} any more: whether its connections "
            "live is not known",
            hint=f"natkeep teardown {record.id} on each host",
        )
    return 0


def count_live(move: dict[str, Any]) -> int:
    """How many sockets of the *move* in a document of status have not ended."""
    states = [one["state"] for one in move["connections"]]
    states += move.get("udp_states", {}).values()
    return sum(state not in ("ended", "silent") for state in states)
