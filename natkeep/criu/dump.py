"""The source's part at `post-dump`: our gate instead of CRIU's lock, before the tasks are killed.

    NATKEEP_SOURCE=OLD[=NEW][,…]     what leaves, OLD or OLD:PORT; NEW where it is known already
    NATKEEP_VIA=FROM[:LOW-HIGH][,…]  as --via: the source goes on as a relay, and is prepared as one
    NATKEEP_ID=ID                    the move's id here, that of a quiesce too; else criu-PID-START

At `post-dump` the images are complete and the tasks are frozen, with all their sockets. A failure
here makes CRIU count the dump as failed and let the tasks go on: nothing is left of ours then.
When another script fails after this one, the tasks go on behind a closed gate, so natkeep-hook is
the first `--action-script` of the command line: CRIU runs the last one first.

Rule: which connections there are is the image's word, which of them leave is the operator's.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_network

from natkeep import policy, report
from natkeep.checkpoint.images import read_checkpoint
from natkeep.criu.environment import Call, own_id, read_call, read_datagrams
from natkeep.errors import RefusedError, UsageError
from natkeep.kernel.interface import Kernel
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import prepare
from natkeep.plan.maps import Map, parse_map
from natkeep.plan.move import Datagrams, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Endpoint, address_of, parse_local
from natkeep.plan.via import Via, parse_via

_UNKNOWN = {4: ip_network("192.0.2.0/24"), 6: ip_network("2001:db8::/32")}
"""Documentation's own addresses stand for a NEW that is not known yet: none is translated here."""


def serve_post_dump(environment: Mapping[str, str], executor: Executor) -> str:
    """Keep the source quiet about the dumped connections; a line that says so."""
    call = read_call(environment)
    _refuse_leave_running(call)
    checkpoint = read_checkpoint(call.demand_images())
    if read_datagrams(environment) == Datagrams.LEAVE:
        checkpoint = checkpoint.without_udp()
    maps, vias = read_maps(environment["NATKEEP_SOURCE"]), read_vias(environment)
    olds = [map_.old_end for map_ in maps]
    move = Move(
        environment.get("NATKEEP_ID") or own_id(call.criu),
        maps,
        (_source_site(call, executor.kernel, Role.RELAY if vias else Role.SOURCE),),
        vias=vias,
        lock=checkpoint.lock,
        udp=checkpoint.udp_at(olds),
        udp_servers=checkpoint.udp_servers_at(olds),
    )
    count = sum(map(len, move.share(checkpoint.connections)))
    count += sum(map(len, move.share(move.udp))) + len(move.kept_servers)
    if not count:
        return "no connection of this dump leaves"
    policy.authorise(move, count)
    plan = prepare(executor, move, checkpoint.connections, frozen=True)
    left = "; ".join(report.lock_lines(plan))
    return f"{move.id}: {count} connections kept quiet here{left and f'; {left}'}"


def read_maps(text: str) -> tuple[Map, ...]:
    """The maps of NATKEEP_SOURCE; UsageError for what is none."""
    maps = []
    for number, part in enumerate(text.split(",")):
        if "=" in part:
            wish = parse_map(part)
            if wish.new is None:
                raise UsageError(f"NATKEEP_SOURCE: {part}: the source cannot look NEW up")
            maps.append(wish.to(wish.new))
            continue
        try:
            old = parse_local(part)
        except ValueError as error:
            raise UsageError(f"NATKEEP_SOURCE: {error}") from None
        port = old.port if isinstance(old, Endpoint) else None
        address = address_of(old)
        maps.append(Map(address, _UNKNOWN[address.version][number + 1], port, port))
    return tuple(maps)


def read_vias(environment: Mapping[str, str]) -> tuple[Via, ...]:
    """What NATKEEP_VIA says; UsageError where NATKEEP_SOURCE does not say where a relay leads."""
    text = environment.get("NATKEEP_VIA", "")
    if text and any("=" not in part for part in environment["NATKEEP_SOURCE"].split(",")):
        raise UsageError("NATKEEP_VIA: a relay has to know NEW", hint="NATKEEP_SOURCE=OLD=NEW")
    return tuple(parse_via(part) for part in text.split(",")) if text else ()


def _source_site(call: Call, kernel: Kernel, role: Role) -> Site:
    """Where the dumped tree is; ours if it is the same, since the tree's pids are about to end."""
    here, there = Site(role), Site(role, f"pid:{call.tree}")
    if call.tree is None:
        return here
    kernel.open_sites((here, there))
    return here if kernel.identity(here) == kernel.identity(there) else there


def _refuse_leave_running(call: Call) -> None:
    """Two processes would own the connections (T7)."""
    try:
        with open(f"/proc/{call.criu}/cmdline", "rb") as file:
            words = file.read().split(b"\0")
    except OSError:
        return
    if b"-R" in words or b"--leave-running" in words:
        raise RefusedError(
            "the dump is with --leave-running: the process would own its connections twice",
            hint="NATKEEP_SOURCE is for a process that leaves",
        )
