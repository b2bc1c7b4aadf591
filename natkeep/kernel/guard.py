"""the guard: a table of its own that survives `nft flush ruleset`, and the process it lives by.

Without it, whoever flushes the ruleset of a destination or a gateway ends every kept connection
that carries anything, within one round trip and before anybody could repair: peers' segments reach
NEW un-translated, where there is no socket, or the process's reach the peer so, and both are
answered with a reset. The kernel spares a table that has an owner (`flags owner`, Linux 5.12), an
open netlink socket; so this table is made by a socket that a resident process then keeps.

In it, for the exact tuples of the move and nobody else's:

    input, forward    -350   to the outer address still, behind the translation: dropped
    postrouting        350   from the inner address still, behind the translation: dropped

So after a flush the kept connections are silent until `natkeep repair`, at whatever point of the
move, and TCP then sends again what was dropped.

Rule: the table never translates, and never passes what the kernel would not; without its process
it is not there. It is packed here and not written as text, since libnftables keeps its socket to
itself. nft's numbers are from linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from time import monotonic, sleep

from natkeep.errors import KernelError
from natkeep.kernel.elements import INET, pack_batch, pack_fill
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink, attribute, nested
from natkeep.kernel.netns import Namespace, inside, path_of
from natkeep.kernel.rawrule import (
    NEWRULE,
    REGISTER,
    TRANSPORT,
    Packed,
    compare,
    integer,
    load,
    load_protocol,
    pack_rule,
)
from natkeep.kernel.resident import FIRST, spawn
from natkeep.plan.move import Role, Translation
from natkeep.plan.tuples import Connections

_NEWTABLE, _NEWCHAIN, _NEWSET = 0, 3, 9
_OWNER = 0x2
_NETWORK = 1
_META_OIF, _META_NFPROTO = 5, 15
_DROP, _VERDICT_REGISTER = 0, 0
_TCP, _LOOPBACK = 6, 1
_IN, _FORWARD, _POST = 1, 2, 4
_TYPES = {4: 7, 6: 8}  # nft's own numbers, so that `nft list` prints addresses
_PORT_TYPE, _TYPE_BITS = 13, 6
_NFPROTO = {4: 2, 6: 10}
_FIELDS = {4: (12, 16, 4), 6: (8, 24, 16)}  # offsets of source and destination, and their width

_CHAINS = {  # name: hook, priority
    "arriving": (_IN, -350),
    "passing": (_FORWARD, -350),
    "leaving": (_POST, 350),
}

_PATIENCE = 2.0
"""Seconds to wait for the guardian's first word, and for its end."""


def table_name(move_id: str) -> str:
    """Name of the guard's inet table; natkeep's own table is another."""
    return f"natkeep-guard-{move_id}"


# ---- the table -----------------------------------------------------------------------------------


def pack_table(move_id: str, translations: Iterable[Translation]) -> list[tuple[int, bytes]]:
    """All of the guard's table, as one transaction."""
    translations = tuple(translations)
    table = table_name(move_id)
    batch = [(_NEWTABLE, attribute(1, _text(table)) + integer(2, _OWNER))]
    batch += [(_NEWCHAIN, _pack_chain(table, name, *chain)) for name, chain in _CHAINS.items()]
    for translation in translations:
        for set_id, (direction, some) in enumerate(_sets(translation), 2 * translation.number + 1):
            name = f"{direction}-{translation.number}"
            batch.append((_NEWSET, _pack_set(table, name, set_id, some)))
            batch += pack_fill(table, name, some)
    batch += [
        (NEWRULE, pack_rule(table, chain, expressions, move_id))
        for translation in translations
        for chain, expressions in _drops(translation)
    ]
    return batch


def _sets(translation: Translation) -> tuple[tuple[str, Connections], ...]:
    return ("outer", translation.outer), ("inner", translation.inner)


def _pack_chain(table: str, name: str, hook: int, priority: int) -> bytes:
    where = nested(4, integer(1, hook), attribute(2, priority.to_bytes(4, "big", signed=True)))
    head = attribute(1, _text(table)) + attribute(3, _text(name))
    return head + where + attribute(7, _text("filter"))


def _pack_set(table: str, name: str, set_id: int, some: Connections) -> bytes:
    version = 4 if some.v4 else 6
    key_type = (_TYPES[version] << _TYPE_BITS | _PORT_TYPE) << _TYPE_BITS | _PORT_TYPE
    return b"".join(
        (
            attribute(1, _text(table)),
            attribute(2, _text(name)),
            integer(3, 0),
            integer(4, key_type),
            integer(5, _FIELDS[version][2] + 8),
            nested(9, integer(1, len(some))),
            integer(10, set_id),
        )
    )


def _drops(translation: Translation) -> Iterator[tuple[str, list[Packed]]]:
    """What is still un-translated where everything should be translated."""
    number = translation.number
    arrived = [
        *_is_from_or_to(translation.before.packed, source=False),
        *_looked_up(f"outer-{number}", translation.before.version, outbound=False),
    ]
    left = [
        *_is_from_or_to(translation.after.packed, source=True),
        *_looked_up(f"inner-{number}", translation.after.version, outbound=True),
    ]
    if translation.site.role == Role.DESTINATION:  # a peer on the same host is not translated
        left = [("meta", (integer(1, REGISTER), integer(2, _META_OIF))), _not_loopback(), *left]
    yield "arriving", arrived
    yield "passing", arrived
    yield "leaving", left


def _is_from_or_to(address: bytes, *, source: bool) -> Iterator[Packed]:
    version = 4 if len(address) == 4 else 6
    offset = _FIELDS[version][0 if source else 1]
    yield "meta", (integer(1, REGISTER), integer(2, _META_NFPROTO))
    yield compare(bytes((_NFPROTO[version],)))
    yield load(_NETWORK, offset, len(address), REGISTER)
    yield compare(address)
    yield from load_protocol(_TCP)


def _looked_up(name: str, version: int, *, outbound: bool) -> Iterator[Packed]:
    """Peer, its port and the local port are in the set: dropped."""
    source, destination, width = _FIELDS[version]
    ports = REGISTER + width // 4
    yield load(_NETWORK, destination if outbound else source, width, REGISTER)
    yield load(TRANSPORT, 2 if outbound else 0, 2, ports)
    yield load(TRANSPORT, 0 if outbound else 2, 2, ports + 1)
    yield "lookup", (attribute(1, _text(name)), integer(2, REGISTER))
    yield "immediate", (integer(1, _VERDICT_REGISTER), nested(2, nested(2, integer(1, _DROP))))


def _not_loopback() -> Packed:
    return compare(_LOOPBACK.to_bytes(4, sys.byteorder), equal=False)


def _text(name: str) -> bytes:
    return name.encode() + b"\0"


# ---- the process ---------------------------------------------------------------------------------


def start(
    directory: str, move_id: str, namespace: Namespace, netns: str,
    translations: Iterable[Translation],
) -> int:  # fmt: skip
    """Guard *translations*, those of one site, in *namespace* (named *netns*); the guardian's pid.

    One of the same move there is ended first. OSError where the kernel says no, or KernelError;
    then there is neither table nor process.
    """
    end(directory, move_id, namespace)
    name = _file_name(move_id, namespace)
    with ExitStack() as stack:
        home = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.open(name, flags, 0o600, dir_fd=home)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with inside(namespace):
                netlink = stack.enter_context(Netlink(NETLINK_NETFILTER))
            batch = pack_table(move_id, translations)
            netlink.send_transaction(pack_batch(INET, batch), len(batch))
            device, inode = namespace.identity
            arguments = [name, netns and path_of(netns), f"{device}:{inode}"]
            handed = (netlink.fileno(), lock, home)
            return spawn("guardian.py", arguments, dict(enumerate(handed, FIRST)))
        except BaseException:
            os.unlink(name, dir_fd=home)
            raise


def is_guarded(directory: str, move_id: str, namespace: Namespace) -> bool:
    """Whether the guardian of the move at this site lives."""
    with _opened(directory, move_id, namespace) as lock:
        return lock is not None and _is_locked(lock)


def end(directory: str, move_id: str, namespace: Namespace) -> None:
    """End the guard of the move at this site, if there is one; KernelError if it does not end."""
    with _opened(directory, move_id, namespace) as lock:
        if lock is None:
            return
        deadline = monotonic() + _PATIENCE
        while _is_locked(lock):
            if monotonic() > deadline:
                raise KernelError(
                    f"the guardian of {move_id} does not end",
                    hint=f"its command line has guardian.py and {_file_name(move_id, namespace)}: "
                    "kill it",
                )
            _stop(lock, deadline)
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, _file_name(move_id, namespace)))


def _file_name(move_id: str, namespace: Namespace) -> str:
    return f"{move_id}.guard-{namespace.inode}"


@contextmanager
def _opened(directory: str, move_id: str, namespace: Namespace) -> Iterator[int | None]:
    path = os.path.join(directory, _file_name(move_id, namespace))
    try:
        lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        yield lock
    finally:
        os.close(lock)


def _is_locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(lock, fcntl.LOCK_UN)
    return False


def _stop(lock: int, deadline: float) -> None:
    """Kill who has the lock, and wait for the end; none other, whose pid it may be since."""
    said = os.pread(lock, 32, 0).strip()
    if not said.isdigit():
        sleep(0.005)  # it has the lock from its start, and its first word is not out yet
        return
    try:
        process = os.pidfd_open(int(said))
    except ProcessLookupError:
        return
    try:
        if _is_locked(lock):  # so it lived when it was opened, and its number was its own
            signal.pidfd_send_signal(process, signal.SIGKILL)
            poll = select.poll()
            poll.register(process, select.POLLIN)
            poll.poll(max(deadline - monotonic(), 0) * 1000)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
