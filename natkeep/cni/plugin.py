"""What natkeep-cni does for a pod that has an order; CNI's verbs.

    ADD      prepare the destination in the pod's namespace, its gate closed, and tell NEW: beside
             the order, and to the agent, which answers once the gateways are ready
    CHECK    is it as it was prepared?
    DEL      undo what was prepared for this container, and for no other of the pod's name
    GC       the same for all of this network that is not attached any more
    STATUS   is there an agent, where one is named?

Each is about one interface of the pod; what was prepared for another one is left alone.

Rule: nothing of the pod runs yet. ADD gives prevResult back as it came, or fails with nothing left
of it: a pod is never begun half kept. DEL always succeeds. What a plugin that was killed has left
was never opened, and the next ADD clears it.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from natkeep.cni.call import (
    NOT_AVAILABLE,
    OWN,
    VERSIONS,
    Call,
    CniError,
    Pod,
    find_addresses,
    read_call,
)
from natkeep.cni.order import (
    FIRST,
    PodOrder,
    Told,
    find_all_told,
    find_order,
    make_told,
    read_told,
)
from natkeep.errors import DriftError, NatkeepError, RefusedError
from natkeep.terminal import show_json

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from natkeep.checkpoint import Checkpoint
    from natkeep.lifecycle.executor import Executor
    from natkeep.plan.maps import Map
    from natkeep.plan.move import Move

PATIENCE = 10.0
"""Seconds that the agent's answer is waited for."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main() -> int:
    """Serve the call that the environment and stdin are; the exit code."""
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:{_PATH}".lstrip(":")
    os.environ.pop("NATKEEP_FAULT", None)  # for tests of the verbs
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    try:
        call = read_call(os.environ, text)
        _serve(call)
    except CniError as error:
        return _fail(error.code, str(error), text)
    except NatkeepError as error:
        hint = f" ({error.hint})" if error.hint else ""
        return _fail(OWN + error.exit_code, f"{error}{hint}", text)
    except Exception as error:  # the runtime would only say that there was no answer
        return _fail(OWN + 1, f"{type(error).__name__}: {error}", text)
    if call.verb == "ADD":
        show_json(_take_result(text))
    return 0


def _fail(code: int, message: str, text: str) -> int:
    version = VERSIONS[0]
    with suppress(ValueError, AttributeError, RecursionError):
        version = json.loads(text).get("cniVersion", version)
    version = version if version in VERSIONS else VERSIONS[0]
    said = {"cniVersion": version, "code": code, "msg": f"natkeep-cni: {message}"}
    show_json(json.dumps(said))
    _note(message, failed=True)
    return 1


def _note(line: str, *, failed: bool = False) -> None:
    from natkeep.system_log import note

    note("natkeep-cni", line, failed=failed)


def _take_result(text: str) -> str:
    """prevResult, with what natkeep does not know of it."""
    return json.dumps(json.loads(text)["prevResult"])


def _serve(call: Call) -> None:
    if call.verb == "ADD":
        _add(call)
    elif call.verb == "CHECK":
        _check(call)
    elif call.verb == "DEL":
        _delete(call)
    elif call.verb == "GC":
        _collect(call)
    elif call.config.agent is not None and not Path(call.config.agent).is_socket():
        raise CniError(NOT_AVAILABLE, f"no agent listens at {call.config.agent}")


def _make_executor(call: Call) -> Executor:
    from natkeep.kernel.linux import LinuxKernel
    from natkeep.lifecycle.executor import Executor
    from natkeep.state.directory import StateDirectory

    state = StateDirectory(call.config.state_dir, create=call.verb == "ADD")
    return Executor(LinuxKernel(state.path), state)


# ---- ADD -----------------------------------------------------------------------------------------


def _add(call: Call) -> None:
    order = find_order(call)
    if order is None or call.pod is None or call.config.result is None:
        return
    if not _is_for_interface(order, call, call.pod):
        return
    maps = order.make_maps(find_addresses(call.config.result))
    told = make_told(call, call.pod, order.id, maps)
    executor = _make_executor(call)
    _clear_earlier(executor, order.id)
    count = _prepare(executor, order, maps, call)
    try:
        told.write()
        if call.config.agent is not None:
            _tell_agent(call.config.agent, told)
    except BaseException:
        _undo(executor, told)
        raise
    _note(f"{order.id}: {', '.join(told.maps)} at {call.pod.file}, {count} prepared")


def _is_for_interface(order: PodOrder, call: Call, pod: Pod) -> bool:
    """Whether it is this interface's; RefusedError where another one may be meant, or none.

    Without a word of the order it is the first one's. What was prepared for that is no other's.
    """
    if order.interface or call.interface == FIRST:
        return call.interface == (order.interface or FIRST)
    told = read_told(call.config.orders, pod.file)
    if told is not None and (told.id, told.container) == (order.id, call.container):
        return told.interface == call.interface
    raise RefusedError(
        f"the order does not say which interface it is for, and this one is {call.interface}",
        hint=f'its key "interface"; without it {FIRST} is meant',
    )


def _clear_earlier(executor: Executor, move_id: str) -> None:
    """What an ADD that was killed, or a sandbox that has failed, has left of this move."""
    from natkeep.fleet.site import clear
    from natkeep.fleet.want import NO_WANT
    from natkeep.plan.roles import Role

    header = executor.state.read_header(move_id) if executor.state.knows(move_id) else None
    if header is None:
        return
    ours = [site.role for site in header.move.sites] == [Role.DESTINATION]
    if not ours or not clear(executor, move_id, NO_WANT):
        raise RefusedError(
            f"{move_id} is at this node already, and is in use", hint=f"natkeep status {move_id}"
        )


def _prepare(executor: Executor, order: PodOrder, maps: tuple[Map, ...], call: Call) -> int:
    """Prepare the destination; how many connections are to be kept."""
    from natkeep import policy
    from natkeep.lifecycle.prepare import prepare

    checkpoint = order.read_connections()
    move = _make_move(order, maps, checkpoint, call)
    count = sum(map(len, move.share(checkpoint.connections))) + len(move.udp)
    policy.authorise(move, count + len(move.udp_servers))
    prepare(executor, move, checkpoint.connections, image=checkpoint.run_id or order.dump or None)
    return count


def _make_move(order: PodOrder, maps: tuple[Map, ...], checkpoint: Checkpoint, call: Call) -> Move:
    from natkeep.plan.move import Move, Site
    from natkeep.plan.roles import Role

    olds = [map_.old_end for map_ in maps]
    listeners = checkpoint.listeners_at(olds) if order.listeners else ()
    if order.listeners and not listeners:
        raise RefusedError("listeners: there is none at an OLD or at the wildcard address")
    return Move(
        order.id, maps, (Site(Role.DESTINATION, call.netns),), order.mode, listeners,
        live=not (checkpoint.run_id or order.dump), udp=checkpoint.udp_at(olds),
        udp_servers=checkpoint.udp_servers_at(olds),
    )  # fmt: skip


def _tell_agent(path: str, told: Told) -> None:
    """Tell the agent NEW, and wait until all that its order asks for by now is ready.

    UnreachableError where it does not answer, else the error that it answers with.
    """
    from natkeep.agent_socket import ask_ready

    news = (text.partition("=")[2] for text in told.maps)
    if lacking := ask_ready(path, told.id, news, PATIENCE, staged=True):
        raise RefusedError(f"the agent says no: {lacking}")


# ---- CHECK, DEL and GC ---------------------------------------------------------------------------


def _check(call: Call) -> None:
    """DriftError where what was prepared for this container is not as it was put there."""
    from natkeep.lifecycle.status import read_status

    told = read_told(call.config.orders, call.pod.file) if call.pod else None
    if told is None or not told.is_of(call):
        return
    executor = _make_executor(call)
    if not executor.state.knows(told.id):
        raise DriftError(f"{told.id} was prepared, and is not any more")
    for move in read_status(executor, (told.id,)):
        for line in (line for site in move.sites for line in site.drift):
            raise DriftError(f"{told.id}: {line}")


def _delete(call: Call) -> None:
    """Whatever goes wrong is noted, and found again by GC: a pod has to be able to end."""
    try:
        told = read_told(call.config.orders, call.pod.file) if call.pod else None
        if told is not None and told.is_of(call):
            _undo(_make_executor(call), told)
    except Exception as error:
        _note(f"DEL of {call.container}: {error}", failed=True)


def _undo(executor: Executor, told: Told) -> None:
    from natkeep.lifecycle.teardown import teardown

    teardown(executor, told.id)
    told.path.unlink(missing_ok=True)
    _note(f"{told.id}: undone")


def _collect(call: Call) -> None:
    """Undo what is told of containers of this network that are not attached any more."""
    if call.config.valid is None:
        return
    left: NatkeepError | None = None
    for name in find_all_told(call.config.orders):
        try:
            told = read_told(call.config.orders, name)
            if told is None or told.network != call.config.network:
                continue
            if not told.is_attached(call.config.valid):
                _undo(_make_executor(call), told)
        except NatkeepError as error:
            left = left or error
    if left is not None:
        raise left


def program() -> int:
    """As a process: what an interpreter does at its end is left out."""
    code = main()
    sys.stdout.flush()
    os._exit(code)
