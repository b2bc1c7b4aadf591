"""the action script behind its shell front: opens, or prepares and opens, while CRIU restores.

CRIU starts `natkeep-hook` at each of its points without arguments, with stdin closed; what is
printed goes to CRIU's log. Three of them are ours:

    pre-restore             no process, no socket yet; a tree without a network namespace of its
                            own will be in CRIU's (or in that of `--join-ns`): prepare there
    post-setup-namespaces   the tree's own namespace exists, no socket yet: prepare there
    post-restore            all sockets exist, still in repair, and no task runs: open. It is the
                            last point at which a non-zero exit ends the restore without harm
                            (the tasks are killed silently, the image can be restored again)

and one of a dump, where NATKEEP_SOURCE is set (source.py):

    post-dump               the images are complete, the tasks frozen: keep this host quiet

With NATKEEP_ID only the last: the move has been prepared. Rule: orders come from orders.py, never
from the image; what is not ours is left with 0 before anything else is imported; each point may
come twice and is served once. CRIU calls nobody when a restore fails, so what was prepared for
one that did is cleared by the next (its gate was never opened: it harmed nobody).
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import NoReturn

    from natkeep.checkpoint import Checkpoint
    from natkeep.criu.environment import Call, Orders
    from natkeep.lifecycle.verbs import Lifecycle
    from natkeep.plan.move import Move, Site
    from natkeep.plan.tuples import Connections
    from natkeep.state.journal import Journal

_ACTIONS = ("pre-restore", "post-setup-namespaces", "post-restore")

DEADLINE = 15.0
"""Seconds that a restore is held up at most."""
_PATIENCE = 10.0  # s for the journal's lock; shorter, since its error says more
_GRACE = 5.0  # s more, to undo what was begun


def main() -> int:
    """Exit code for CRIU: 0, or that of the error that is printed."""
    environment = os.environ
    environment.pop("NATKEEP_FAULT", None)  # for tests of the verbs: no restore is to fail by it
    action = environment.get("CRTOOLS_SCRIPT_ACTION")
    only_id = environment.get("NATKEEP_ID") and not environment.get("NATKEEP_MAP")
    leaves = action == "post-dump" and environment.get("NATKEEP_SOURCE")
    if not leaves and (action not in _ACTIONS or (only_id and action != "post-restore")):
        return 0
    from natkeep.errors import NatkeepError

    try:
        _start_clock()
        return _serve_source() if leaves else _serve()
    except NatkeepError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return _fail(f"{error}{hint}", error.exit_code)
    except Exception as error:  # a traceback in CRIU's log would be all that a person finds
        return _fail(f"{type(error).__name__}: {error}", NatkeepError.exit_code)
    finally:
        _stop_clock()


def _fail(text: str, code: int) -> int:
    _say(text.replace("\n", " "))
    return code


def _say(line: str) -> None:
    if sys.stderr:
        try:
            print(f"natkeep-hook: {line}", file=sys.stderr, flush=True)
        except OSError:  # nobody listens; that shall not end a restore
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _start_clock() -> None:
    """Nothing may hang a restore: the first alarm unwinds, the second one is the end."""
    import signal

    from natkeep.errors import LeftoverError, NatkeepError

    def ring(*_: object) -> None:
        signal.signal(signal.SIGALRM, end)
        raise NatkeepError(f"took longer than {DEADLINE:g} s, and was undone")

    def end(*_: object) -> None:
        os.write(2, b"natkeep-hook: could not be undone in time (natkeep status)\n")
        os._exit(LeftoverError.exit_code)

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE, _GRACE)


def _stop_clock() -> None:
    import signal

    signal.setitimer(signal.ITIMER_REAL, 0)


def _serve() -> int:
    from natkeep.criu.environment import read_call, read_orders

    orders = read_orders(os.environ)
    if orders is None:
        return 0
    call = read_call(os.environ)
    if orders.maps:
        _serve_maps(orders, call)
    elif call.action == "post-restore":
        lifecycle = _make_lifecycle(orders)
        compared = lifecycle.open(
            orders.id, lambda journal: _confirm(journal, lifecycle, orders, call)
        )
        _unhook_afterwards(orders, orders.id)
        if compared is not None:
            from natkeep import report

            for line in report.compared_lines(compared):
                _say(f"{orders.id}: {line}")
        _say(f"{orders.id}: gate open")
    return 0


def _serve_source() -> int:
    from natkeep.criu.dump import serve_post_dump
    from natkeep.kernel.linux import LinuxKernel
    from natkeep.lifecycle.verbs import Lifecycle
    from natkeep.state.journal import StateDirectory

    lifecycle = Lifecycle(LinuxKernel(), StateDirectory(create=True, patience=_PATIENCE))
    _say(serve_post_dump(os.environ, lifecycle))
    return 0


def _make_lifecycle(orders: Orders) -> Lifecycle:
    from natkeep.kernel.linux import LinuxKernel
    from natkeep.lifecycle.verbs import Lifecycle
    from natkeep.state.journal import StateDirectory

    create = bool(orders.maps)
    state = StateDirectory(orders.state_dir or None, create=create, patience=_PATIENCE)
    return Lifecycle(LinuxKernel(state.path), state)


def _unhook_afterwards(orders: Orders, move_id: str) -> None:
    """By a lifecycle of its own, whose handles are open then."""
    from natkeep.afterwards import do_afterwards

    do_afterwards(lambda: _make_lifecycle(orders).unhook(move_id))


# ---- NATKEEP_ID --------------------------------------------------------------------------------


def _confirm(
    journal: Journal, lifecycle: Lifecycle, orders: Orders, call: Call
) -> Checkpoint | None:
    """RefusedError unless the move was prepared for this tree's namespace, and from this image.

    Returned is the image, where it is to be compared with what a living process had.
    """
    from natkeep.errors import RefusedError, UsageError

    move = journal.move
    if not _is_at(journal, lifecycle, _tree_site(call)):
        raise RefusedError(
            f"move {move.id} was prepared for another namespace than that of the restored tree",
            hint=f"natkeep status {move.id}; --site destination=NETNS when preparing",
        )
    if orders.mode and orders.mode != move.mode:
        raise UsageError(f"the mode is to be {orders.mode}, but {move.id} is {move.mode}")
    if orders.unkept and orders.unkept != move.unkept:
        told = f"what cannot be kept is to be {orders.unkept}"
        raise UsageError(f"{told}, but {move.id} was prepared with --unkept {move.unkept}")
    if move.live:
        from natkeep.checkpoint.images import read_checkpoint

        return read_checkpoint(call.demand_images())
    if journal.image is None:
        return None
    from natkeep.checkpoint.images import read_inventory

    if read_inventory(call.demand_images()).run_id != journal.image:
        raise RefusedError(
            f"move {move.id} was prepared from the image of another dump",
            hint=f"natkeep teardown {move.id}, and prepare it from this one",
        )
    return None


def _is_at(journal: Journal, lifecycle: Lifecycle, site: Site) -> bool:
    """Whether the process of the move may live at *site*."""
    lifecycle.kernel.open_sites([site])
    here = lifecycle.kernel.identity(site)
    return any(journal.identity(home) == here for home in journal.move.homes())


def _tree_site(call: Call) -> Site:
    from natkeep.plan.move import Role, Site

    return Site(Role.DESTINATION, "" if call.tree is None else f"pid:{call.tree}")


# ---- NATKEEP_MAP -------------------------------------------------------------------------------


def _serve_maps(orders: Orders, call: Call) -> None:
    from natkeep.criu.environment import own_id

    move_id = own_id(call.criu)
    site = _early_site(call) if call.action == "pre-restore" else _tree_site(call)
    if site is None:
        return  # the namespace does not exist yet
    lifecycle = _make_lifecycle(orders)
    prepared = _ensure_prepared(move_id, orders, call, lifecycle, site)
    if prepared and call.action == "post-restore":
        lifecycle.open(move_id)
        _unhook_afterwards(orders, move_id)
        _say(f"{move_id}: gate open")


def _early_site(call: Call) -> Site | None:
    """Where a tree without a network namespace of its own will be; None where it has one."""
    from natkeep.checkpoint.images import has_own_netns
    from natkeep.criu.environment import joined_netns
    from natkeep.plan.move import Role, Site

    joined = joined_netns(call.criu)
    if not joined and has_own_netns(call.demand_images()):
        return None
    return Site(Role.DESTINATION, joined)


def _ensure_prepared(
    move_id: str, orders: Orders, call: Call, lifecycle: Lifecycle, site: Site
) -> bool:
    """Prepare the move at *site* unless it is; False where there is nothing to keep."""
    if lifecycle.state.knows(move_id):
        journal = lifecycle.state.load(move_id)
        if journal.is_prepared() and _is_at(journal, lifecycle, site):
            return True
        lifecycle.teardown(move_id)  # begun and killed, or for a namespace that the tree is not in
    from natkeep import policy, report
    from natkeep.checkpoint.images import read_checkpoint
    from natkeep.plan.move import Fate, parse_map
    from natkeep.plan.tuples import NO_CONNECTIONS

    checkpoint = read_checkpoint(call.demand_images())
    olds = [parse_map(text)[0] for text in orders.maps]
    lost = checkpoint.lost_at(olds) if orders.unkept == Fate.RESET else NO_CONNECTIONS
    count = sum(len(checkpoint.connections.at(old)) for old in olds) + len(lost)
    if not count and orders.standing:
        _say("no connection of this image is to be kept")
        return False
    move = _make_move(move_id, orders, lifecycle, site, lost)
    policy.authorise(move, count)
    lifecycle.require_devices(move, report.bound_devices(checkpoint, move))
    _prepare(move, checkpoint, lifecycle, site)
    _say(f"{move_id}: {', '.join(str(map_) for map_ in move.maps)}, {count} prepared")
    return True


def _make_move(
    move_id: str, orders: Orders, lifecycle: Lifecycle, site: Site, lost: Connections
) -> Move:
    from natkeep.plan.move import Fate, Map, Mode, Move, parse_map

    maps = []
    for text in orders.maps:
        old, new = parse_map(text)
        maps.append(Map(old, lifecycle.find_new(old, (site,)) if new is None else new))
    mode, unkept = Mode(orders.mode or Mode.STATEFUL), Fate(orders.unkept or Fate.REPORT)
    return Move(move_id, tuple(maps), (site,), mode, unkept=unkept, lost=lost)


def _prepare(move: Move, checkpoint: Checkpoint, lifecycle: Lifecycle, site: Site) -> None:
    """Prepare *move*, in the place of those that were prepared for a CRIU that is no more.

    One that is at the same site is replaced, so that its gate stays closed until ours is: in
    between this host would answer a peer's segment with a reset.
    """
    from natkeep.state.journal import read_boot_id

    earlier = None
    for journal in _abandoned(lifecycle):
        whole = journal.is_prepared() and journal.boot == read_boot_id()
        if earlier is None and whole and _is_at(journal, lifecycle, site):
            earlier = journal.move.id
        else:
            lifecycle.teardown(journal.move.id)
    connections = checkpoint.connections
    lifecycle.prepare(move, connections, replaces=earlier, image=checkpoint.run_id)


def _abandoned(lifecycle: Lifecycle) -> Iterator[Journal]:
    from natkeep.criu.environment import is_abandoned
    from natkeep.errors import JournalError
    from natkeep.plan.move import Role

    for move_id in lifecycle.state.ids():
        if not is_abandoned(move_id):
            continue
        try:
            journal = lifecycle.state.load(move_id)
        except JournalError:
            continue  # torn down by another hook meanwhile, or `natkeep status` tells
        leaves = any(site.role == Role.SOURCE for site in journal.move.sites)
        if not journal.is_opened() and not leaves:
            yield journal


def _run() -> NoReturn:
    """As the program: what an interpreter does for a long life is left out (10 ms of 50)."""
    import gc

    gc.disable()
    code = main()
    if "natkeep.afterwards" in sys.modules:  # there is something to do
        from natkeep import afterwards

        afterwards.begin(beside=os.getppid())
    os._exit(code)


if __name__ == "__main__":
    _run()
