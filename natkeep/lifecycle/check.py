"""What is asked before anything is changed: could this move be prepared as things stand?

Rule: nothing is changed here, at any site or on disk.
"""

from __future__ import annotations

from natkeep.checkpoint import Checkpoint
from natkeep.errors import RefusedError, UsageError
from natkeep.kernel import rtnetlink
from natkeep.lifecycle.conflicts import refuse_conflicts
from natkeep.lifecycle.examine import OF_PATH, refuse_stopped
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.owners import find_surroundings
from natkeep.lifecycle.relay import refuse_relays, refuse_stacked
from natkeep.lifecycle.sockets import NO_REMEDY, find_taken, find_unbindable, refuse_translated
from natkeep.lifecycle.subject import Subject
from natkeep.plan.move import Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.step_order import make_plan
from natkeep.plan.steps import Plan
from natkeep.plan.tuples import Address, Connections, is_at
from natkeep.state.directory import read_boot_id
from natkeep.values import replace


def check(
    executor: Executor,
    move: Move,
    connections: Connections,
    replaces: str | None = None,
    *,
    frozen: bool = False,
    looks: bool = True,
    run_id: str | None = None,
    again: bool = False,
) -> Plan:
    """The plan, if it could be carried out as things stand; nothing is changed.

    replaces, frozen: as `prepare` and `replace_move` have them. looks: the path is looked at, too;
    what is found and does not stop the move is in `executor.warned`. run_id: of the dump. again: it
    was there before the boot, so a gateway may be made ready before it forwards.
    """
    executor.open_sites(move)
    move = _with_held(executor, move)
    besides = () if replaces is None else (replaces,)
    ours = move.share(connections)
    for site in move.sites if not move.quiesces else ():
        if site.role in (Role.SOURCE, Role.RELAY):
            refuse_translated(executor.kernel, executor.state, site, ours)
    surroundings = find_surroundings(executor.kernel, executor.state, move, connections, besides)
    if replaces is not None:
        earlier = executor.state.load(replaces)
        refuse_stacked(executor, move, earlier)
        there = earlier.surroundings_there()
        surroundings = surroundings.carry_on(there, connections, move.udp)
    plan = make_plan(move, connections, surroundings)
    refuse_conflicts(executor, plan, replaces)
    refuse_relays(executor, plan, frozen=frozen)
    if not frozen:
        _refuse_living(executor, plan)
    for step in plan.steps:
        executor.kernel.check(step)
    if looks:
        subject = Subject(executor.kernel, move.sites, plan, run_id=run_id, frozen=frozen)
        passed_over = frozenset({"forwarding-off"} if again else ())
        executor.warned += refuse_stopped(OF_PATH, subject, passed_over)
    return plan


def _with_held(executor: Executor, move: Move) -> Move:
    """*move*, with the listeners that a quiesce of the same id blocks at its source."""
    if move.quiesces or not executor.state.knows(move.id):
        return move
    earlier = executor.state.read_header(move.id)
    if earlier is None or not earlier.move.quiesces or earlier.boot != read_boot_id():
        return move
    sources = [site for site in move.sites if site.role == Role.SOURCE]
    if [executor.kernel.identity(site) for site in sources] != [*earlier.namespaces]:
        return move
    return replace(move, held=earlier.move.held)


def _refuse_living(executor: Executor, plan: Plan) -> None:
    """A process that still lives at the source would own its connections twice (T7)."""
    for site in plan.move.sites:
        if site.role != Role.SOURCE or plan.move.quiesces:
            continue
        alive = executor.kernel.observe(site, plan).living
        if alive:
            raise RefusedError(
                f"{site}: {alive} of the connections still have their sockets there",
                hint="was it dumped with --leave-running? End that process first",
            )


def require_devices(executor: Executor, move: Move, checkpoint: Checkpoint) -> None:
    """RefusedError when the destination lacks a device that a kept socket is bound to."""
    devices = checkpoint.devices([map_.old_end for map_ in move.maps])
    for site in _open_destinations(executor, move):
        here = executor.kernel.ask(site, rtnetlink.device_names) if devices else frozenset()
        missing = sorted(devices - here)
        if missing:
            raise RefusedError(
                f"{site}: no device {', '.join(missing)}, which a socket is bound to",
                hint="CRIU could not restore the socket there",
            )


def require_sockets(executor: Executor, move: Move, checkpoint: Checkpoint) -> None:
    """RefusedError when a socket's address will not be there, or its host translates it."""
    olds = [map_.old_end for map_ in move.maps]
    for socket in checkpoint.sockets if checkpoint.live else ():
        # Of UDP it is only told: a socket that asks a resolver once should not stop a move.
        at_old = socket.local is not None and is_at(socket.local, olds)
        if at_old and socket.protocol == "tcp" and socket.is_translated():
            raise RefusedError(f"{socket}: {socket.unkept}", hint=NO_REMEDY)
    sockets = checkpoint.unmapped([map_.old for map_ in move.maps])
    about = move.listeners or len(move.udp) or move.udp_servers
    if not (about or any(len(checkpoint.connections.at(old)) for old in olds)):
        return  # it is about other addresses, which make_plan says
    for site in _open_destinations(executor, move) if sockets else ():
        for socket in find_unbindable(executor.kernel, site, sockets):
            address = socket.local and socket.local.address
            raise RefusedError(
                f"{site}: CRIU could not restore {socket}: its address is not there, and no --map "
                "moves it",
                hint=f"--map {address}=NEW, or there: ip addr add {address} dev lo",
            )
    if any(socket.protocol == "udp" for socket in checkpoint.sockets):
        for site in _open_destinations(executor, move):
            for end in find_taken(executor.kernel, site, checkpoint):
                raise RefusedError(
                    f"{site}: CRIU could not restore udp {end}: another socket there has it",
                    hint="end that program, or restore in another namespace",
                )


def _open_destinations(executor: Executor, move: Move) -> list[Site]:
    destinations = [site for site in move.sites if site.role == Role.DESTINATION]
    executor.kernel.open_sites(destinations)
    return destinations


def find_new(executor: Executor, old: Address, sites: tuple[Site, ...]) -> Address:
    """What NEW=auto means for *old*: the one address of its family at the destination."""
    destinations = [site for site in sites if site.role == Role.DESTINATION]
    if not destinations:
        raise UsageError("NEW can be `auto` only where there is a site destination")
    executor.kernel.open_sites(destinations)
    here = executor.kernel.ask(destinations[0], rtnetlink.global_addresses, old.version)
    found = [address for address in here if address != old]
    if len(found) != 1:
        listed = ", ".join(str(address) for address in found) or "none"
        raise RefusedError(
            f"NEW=auto for {old}: {destinations[0]} has not one IPv{old.version} address "
            f"but {listed}",
            hint="name it: --map OLD=NEW",
        )
    return found[0]
