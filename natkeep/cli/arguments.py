"""From parsed arguments to values: an executor, sites, maps, a move, the connections."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from natkeep import policy
from natkeep.checkpoint import Checkpoint
from natkeep.cli.output import talk
from natkeep.errors import ImageError, RefusedError, UsageError
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.survey import demand_privileges
from natkeep.lifecycle.check import find_new
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.relay import find_vias
from natkeep.plan.maps import Map, parse_map, parse_peer_map
from natkeep.plan.move import Fate, Mode, Move, Site, parse_id
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.roles import Role
from natkeep.plan.tuples import NO_CONNECTIONS, Connections, Endpoint, Local
from natkeep.plan.via import Via, parse_via
from natkeep.state.directory import StateDirectory


def make_executor(args: argparse.Namespace, *, create: bool) -> Executor:
    demand_privileges()
    state = StateDirectory(args.state_dir, create=create)
    return Executor(
        LinuxKernel(state.path),
        state,
        talk=(lambda line: talk(args, line)) if args.verbose else (lambda line: None),
    )


def parse_sites(texts: Sequence[str]) -> tuple[Site, ...]:
    return tuple(Site.parse(text) for text in texts) or (Site(Role.DESTINATION),)


def make_move(args: argparse.Namespace, checkpoint: Checkpoint) -> Move:
    parse_id(args.id)
    sites = parse_sites(args.site)
    maps = parse_maps(args, sites)
    olds = [map_.old_end for map_ in maps]
    listeners = _find_listeners(checkpoint, olds) if args.listeners else ()
    at_source = any(site.role in (Role.SOURCE, Role.RELAY) for site in sites)
    lock = checkpoint.lock if at_source else None
    unkept, lost = Fate(args.unkept), NO_CONNECTIONS
    if unkept == Fate.RESET:
        lost = checkpoint.lost_at(olds)
    mode = Mode(args.mode)
    hold = not args.no_hold and getattr(args, "gate", "closed") == "closed"
    move = Move(
        args.id, maps, sites, mode, listeners, lock,
        unkept=unkept, lost=lost, hold=hold, guard=args.guard, live=checkpoint.live,
        peer_maps=tuple(map(parse_peer_map, args.peer_map)),
        vias=_find_vias(args, sites, maps),
        udp=checkpoint.udp_at(olds), udp_servers=checkpoint.udp_servers_at(olds),
    )  # fmt: skip
    tell_moved(args, move)
    return move


def tell_moved(args: argparse.Namespace, move: Move) -> None:
    """Say what the verb is about, for the line in the system's log."""
    args.moved = f"{','.join(map(str, move.maps))} at {','.join(map(str, move.sites))}"


def _find_vias(
    args: argparse.Namespace, sites: tuple[Site, ...], maps: tuple[Map, ...]
) -> tuple[Via, ...]:
    vias = tuple(map(parse_via, args.via))
    if vias or not any(site.role == Role.RELAY for site in sites):
        return vias
    return find_vias(make_executor(args, create=False), sites, maps)


def parse_maps(args: argparse.Namespace, sites: tuple[Site, ...]) -> tuple[Map, ...]:
    maps = []
    for text in args.map:
        wish = parse_map(text)
        new = wish.new or find_new(make_executor(args, create=False), wish.old, sites)
        maps.append(wish.to(new))
    return tuple(maps)


def _find_listeners(checkpoint: Checkpoint, olds: Sequence[Local]) -> tuple[Endpoint, ...]:
    listeners = checkpoint.listeners_at(olds)
    if not listeners:
        raise RefusedError(
            "--listeners: the image has no listener at an OLD or at the wildcard address",
            hint="natkeep inspect shows what there is; a list of connections names none",
        )
    return listeners


def read_connections(args: argparse.Namespace) -> Checkpoint:
    """What `--image`, `--connections` or `--live` names; of UDP nothing with `--no-udp`."""
    checkpoint = _read_connections(args)
    return checkpoint.without_udp() if getattr(args, "no_udp", False) else checkpoint


def _read_connections(args: argparse.Namespace) -> Checkpoint:
    # Of the three readers a command needs one.
    if args.image is not None:
        from natkeep.checkpoint.archive import opened_image
        from natkeep.checkpoint.images import read_checkpoint

        with opened_image(args.image) as images:
            return read_checkpoint(images)
    if args.connections is not None:
        from natkeep.checkpoint.listing import parse_listing, read_listing

        if args.connections == "-":
            return parse_listing(_read_stdin(), "stdin")
        return read_listing(args.connections)
    if getattr(args, "live", None) is not None:
        return read_process(args, parse_sites(args.site))
    if not getattr(args, "map", True):
        raise UsageError(
            "no --map OLD=NEW: which address becomes which?",
            hint="and which connections: --image DIR, --connections FILE or --live PID",
        )
    raise UsageError(
        "which connections? --image DIR or --connections FILE",
        hint=f"{os.path.basename(sys.argv[0])} inspect DIR shows those of an image",
    )


def _read_stdin() -> str:
    try:
        return sys.stdin.read() if sys.stdin else ""
    except UnicodeDecodeError:
        raise ImageError("stdin is not UTF-8 text") from None


def read_ended(path: str | None) -> dict[Protocol, Connections]:
    """The connections that have ended elsewhere, as `--ended` names the document that says so."""
    if path is None:
        return {}
    from natkeep.checkpoint.ended import parse_ended
    from natkeep.checkpoint.listing import read_octets

    name, data = path, b""
    if path == "-":
        name, data = "stdin", _read_stdin().encode()
    else:
        data = read_octets(path)
    return {protocol: parse_ended(data, name, protocol) for protocol in (TCP, UDP)}


def read_process(args: argparse.Namespace, sites: tuple[Site, ...]) -> Checkpoint:
    """The sockets of `--live PID`, which may live at none of *sites*."""
    from natkeep.checkpoint.live import parse_pid
    from natkeep.lifecycle.live import mark_translated, read_live

    pid, executor = parse_pid(args.live), make_executor(args, create=False)
    return mark_translated(executor, pid, read_live(executor.kernel, pid, sites))


def authorise(move: Move, checkpoint: Checkpoint) -> int:
    """How many of TCP *move* is about, if the operator's policy allows it, with those of UDP."""
    count = sum(map(len, move.share(checkpoint.connections))) + len(move.lost)
    policy.authorise(move, count + len(move.udp) + len(move.udp_servers))
    return count
