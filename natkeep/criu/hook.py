"""The action script behind its shell front: opens, or prepares and opens, while CRIU restores.

CRIU starts `natkeep-hook` at each of its points without arguments, with stdin closed; what is
printed goes to CRIU's log. Three of them are ours:

    pre-restore             no process, no socket yet; a tree without a network namespace of its
                            own will be in CRIU's (or in that of `--join-ns`): prepare there
    post-setup-namespaces   the tree's own namespace exists, no socket yet: prepare there
    post-restore            all sockets exist, still in repair, and no task runs: open. It is the
                            last point at which a non-zero exit ends the restore without harm
                            (the tasks are killed silently, the image can be restored again)

and one of a dump, where NATKEEP_SOURCE is set (dump.py):

    post-dump               the images are complete, the tasks frozen: keep this host quiet

With NATKEEP_ID only `post-restore`: the move has been prepared. NATKEEP_MAP: prepare_in_hook.py.
Orders in natkeep.toml are asked at every restore; standing_order.py says which they are about.

Rule: orders come from environment.py, never from the image; what is not ours is left with 0 before
anything else is imported; each point may come twice and is served once.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from typing import NoReturn

    from natkeep.checkpoint import Checkpoint
    from natkeep.criu.environment import Call, Orders
    from natkeep.lifecycle.executor import Executor
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
        return _serve_dump() if leaves else _serve_restore()
    except NatkeepError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return _fail(f"{error}{hint}", error.exit_code)
    except Exception as error:  # a traceback in CRIU's log would be all that a person finds
        return _fail(f"{type(error).__name__}: {error}", NatkeepError.exit_code)
    finally:
        _stop_clock()


def _fail(text: str, code: int) -> int:
    _say(text, failed=True)
    return code


def _say(line: str, *, failed: bool = False) -> None:
    """Into CRIU's log, and the system's."""
    from natkeep.system_log import note
    from natkeep.terminal import say

    say(f"natkeep-hook: {line}")
    note("natkeep-hook", line, failed=failed)


def _start_clock(waits: float = 0.0) -> None:
    """Nothing may hang a restore: the first alarm unwinds, the second one is the end.

    waits: seconds that the operator allows besides, for the gateways.
    """
    import signal

    from natkeep.errors import LeftoverError, NatkeepError

    def ring(*_: object) -> None:
        signal.signal(signal.SIGALRM, end)
        raise NatkeepError(f"took longer than {DEADLINE + waits:g} s, and was undone")

    def end(*_: object) -> None:
        os.write(2, b"natkeep-hook: could not be undone in time (natkeep status)\n")
        os._exit(LeftoverError.exit_code)

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, DEADLINE + waits, _GRACE)


def _stop_clock() -> None:
    import signal

    signal.setitimer(signal.ITIMER_REAL, 0)


def _make_executor(state_dir: str | None, *, create: bool) -> Executor:
    from natkeep.kernel.linux import LinuxKernel
    from natkeep.lifecycle.executor import Executor
    from natkeep.state.directory import StateDirectory

    state = StateDirectory(state_dir or None, create=create, patience=_PATIENCE)
    return Executor(LinuxKernel(state.path), state)


def _serve_dump() -> int:
    from natkeep.criu.dump import serve_post_dump

    _say(serve_post_dump(os.environ, _make_executor(None, create=True)))
    return 0


def _serve_restore() -> int:
    from natkeep.criu.environment import ANY, find_site, own_id, read_call, read_orders

    orders = read_orders(os.environ)
    if orders is None:
        return 0
    if orders.readiness is not None:
        _start_clock(orders.readiness.seconds)
    call = read_call(os.environ)
    if not orders.maps and call.action != "post-restore":
        return 0
    if not orders.maps:
        executor = _make_executor(orders.state_dir, create=False)
        if orders.id == ANY:
            _open_any(orders, call, executor)
            return 0
        if orders.standing:
            from natkeep.criu.standing_order import why_not_about

            if reason := why_not_about(orders.id, call, executor):
                _say(f"the standing order is not about this restore: {reason}")
                return 0
        _open(orders.id, orders, call, executor)
        return 0
    from natkeep.criu import prepare_in_hook

    move_id, site = own_id(call.criu), find_site(call)
    if site is None:
        return 0  # the namespace does not exist yet
    executor = _make_executor(orders.state_dir, create=True)
    prepared = prepare_in_hook.ensure_prepared(move_id, orders, call, executor, site, _say)
    if prepared and call.action == "post-restore":
        _open(move_id, orders, call, executor)
    return 0


def _open_any(orders: Orders, call: Call, executor: Executor) -> None:
    from natkeep.criu.standing_order import find_about

    found = find_about(call, executor)
    for move_id in found:
        _open(move_id, orders, call, executor)
    if not found:
        _say("nothing is prepared for this restore's namespace")


def _open(move_id: str, orders: Orders, call: Call, executor: Executor) -> None:
    from natkeep.afterwards import do_afterwards
    from natkeep.lifecycle.open import open_move, remove_gate_hooks

    def confirm(journal: Journal) -> Checkpoint | None:
        return None if orders.maps else _confirm(journal, orders, call, executor)

    compared = open_move(executor, move_id, confirm)
    # By an executor of its own, whose handles are open then.
    do_afterwards(
        lambda: remove_gate_hooks(_make_executor(orders.state_dir, create=False), move_id)
    )
    if compared is not None:
        from natkeep import report

        for line in report.compared_lines(compared):
            _say(f"{move_id}: {line}")
    _say(f"{move_id}: gate open")


def _confirm(journal: Journal, orders: Orders, call: Call, executor: Executor) -> Checkpoint | None:
    """RefusedError unless the move was prepared for this tree's namespace, and from this image.

    Returned is the image, where it is to be compared with what a living process had.
    """
    from natkeep.checkpoint.images import read_checkpoint, read_inventory
    from natkeep.errors import RefusedError, UsageError
    from natkeep.plan.move import Datagrams

    move = journal.move
    if not executor.is_home(journal, call.tree_site()):
        raise RefusedError(
            f"move {move.id} was prepared for another namespace than that of the restored tree",
            hint=f"natkeep status {move.id}; --site destination=NETNS when preparing",
        )
    if orders.mode and orders.mode != move.mode:
        raise UsageError(f"the mode is to be {orders.mode}, but {move.id} is {move.mode}")
    if orders.unkept and orders.unkept != move.unkept:
        told = f"what cannot be kept is to be {orders.unkept}"
        raise UsageError(f"{told}, but {move.id} was prepared with --unkept {move.unkept}")
    if orders.udp == Datagrams.LEAVE and (len(move.udp) or move.udp_servers):
        raise UsageError(f"UDP is to be left, but {move.id} was prepared without --no-udp")
    if move.live:
        return read_checkpoint(call.demand_images())
    if journal.image and read_inventory(call.demand_images()).run_id != journal.image:
        raise RefusedError(
            f"move {move.id} was prepared from the image of another dump",
            hint=f"natkeep teardown {move.id}, and prepare it from this one",
        )
    return None


def program() -> NoReturn:
    """As a process: what an interpreter does for a long life is left out (10 ms of 50)."""
    import gc

    gc.disable()
    code = main()
    if "natkeep.afterwards" in sys.modules:  # there is something to do
        from natkeep import afterwards

        afterwards.begin(beside=os.getppid())
    os._exit(code)


if __name__ == "__main__":
    program()
