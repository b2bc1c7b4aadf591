"""Starts the segment holder, has it deliver what it holds, and ends it.

Rule: everything that may be refused is opened here, before the holder is started: what arrives
from then on waits in the kernel, so a prepare does not wait for the holder. It is found by a
socket in the state directory, which only its owner can enter; where that has no answer there is no
holder, and the move does without. This file decides nothing about segments (plan/replay.py does).

Its bounds: AGE here; octets, of one connection and of all, in plan/replay.py; of datagrams their
octets and their age, in plan/datagrams.py.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from natkeep.errors import KernelError
from natkeep.kernel.daemon import spawn
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.kernel.netns import inside
from natkeep.kernel.segment_holderd import attach_filter
from natkeep.plan.criu_lock import CRIU_MARK
from natkeep.plan.observation import Held
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.replay import holder_name, pack_kept
from natkeep.plan.socket_filter import make_datagram_filter, make_filter, pack_filter
from natkeep.plan.step_undo import EndHolder
from natkeep.plan.steps import HoldSegments, Prior

AGE = 900
"""Seconds that a holder lives at most; a Linux peer has given up by then (tcp_retries2)."""

_QUEUE = 16 << 20
"""Octets that the kernel keeps for a holder that has not been given the processor yet."""
PATIENCE = 0.05
"""Seconds that an opening waits for the holder: it is inside the blackout."""
_LOOK_PATIENCE, _END_PATIENCE = 1.0, 2.0  # seconds

_SO_RCVBUFFORCE = 33
_SOL_PACKET, _PACKET_AUXDATA, _PACKET_VNET_HDR = 263, 8, 15
_NETLINK_SOCK_DIAG = 4
_PROTOCOL = {4: 0x0800, 6: 0x86DD}
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

Kept = list[tuple[int, bytes, bytes]]
"""Of each map what replay.pack_kept takes."""


class HoldSegmentsDriver(Driver[HoldSegments]):
    """The holder saves time and nothing else, so what keeps it away is noted and no failure."""

    enters = False

    def apply(self, at: Place, step: HoldSegments, remember: Remember) -> Prior:
        """Start it; prior.facts["refused"] says why there is none."""
        remember(Prior())
        if not at.directory:
            return Prior(facts={"refused": "there is no state directory"})
        try:
            start(at, step.move_id, step.kept(TCP), udp=step.kept(UDP))
        except (OSError, KernelError) as error:
            return Prior(facts={"refused": str(getattr(error, "strerror", None) or error)})
        return Prior()

    def revert(self, at: Place, undo: EndHolder, prior: Prior) -> None:
        """End it, undelivered."""
        if at.directory:
            end(at.directory, undo.move_id)


def start(
    place: Place, move_id: str, kept: Kept, age: int = AGE, *, udp: Kept | None = None
) -> int:
    """Hold from now on what arrives at *place* for *kept*, for *age* seconds; the holder's pid.

    udp: the same of UDP sockets, where a peer that is all zeros is any peer. A holder of the same
    move is ended first. OSError where a privilege is missing, or KernelError; then none runs.
    """
    udp = udp or []
    end(place.directory, move_id)
    name = holder_name(move_id)
    with ExitStack() as stack:
        home = os.open(place.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        tables = [_write_table(stack, some) for some in (kept, udp)]
        pairs: list[int] = []
        with inside(place.namespace):
            diag = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG)
            stack.enter_context(diag)
            families = _open_pairs(stack, kept, _open_packets, pairs)
            udp_families = _open_pairs(stack, udp, _open_datagrams, pairs)
        listening = stack.enter_context(_listen(home, name))
        handed = [home, listening.fileno(), *tables, diag.fileno(), *pairs]
        try:
            return spawn(
                "segment_holderd.py", name, place, handed, families, udp_families, str(age)
            )
        except BaseException:
            os.unlink(name, dir_fd=home)
            raise


def _write_table(stack: ExitStack, kept: Kept) -> int:
    """A file with *kept*."""
    table = os.memfd_create("natkeep-kept")
    stack.callback(os.close, table)
    with os.fdopen(os.dup(table), "wb") as file:
        file.write(pack_kept(kept))
    return table


def _open_pairs(
    stack: ExitStack, kept: Kept, open_: Callable[[int, Kept], socket.socket], pairs: list[int]
) -> str:
    """A packet and a raw socket for each IP version of *kept*, put to *pairs*; these versions."""
    versions = [version for version in (4, 6) if any(one[0] == version for one in kept)]
    for version in versions:
        packets = open_(version, [one for one in kept if one[0] == version])
        pairs += [stack.enter_context(packets).fileno(), _open_raw(stack, version)]
    return "".join(map(str, versions))


def _open_packets(version: int, kept: Kept) -> socket.socket:
    """A socket that sees little more of what arrives at this host than *kept*."""
    # Of one protocol (ETH_P_IP, not ETH_P_ALL): so it sees a packet once, behind bridges and bonds,
    # and none that leaves.
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(_PROTOCOL[version]))
    return _begin(sock, pack_filter(make_filter(version, kept)))


def _open_datagrams(version: int, kept: Kept) -> socket.socket:
    """The same for UDP sockets; it says of each packet what an offload has put together in it."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_PROTOCOL[version]))
    sock.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
    return _begin(sock, pack_filter(make_datagram_filter(version, kept)))


def _begin(sock: socket.socket, program: bytes) -> socket.socket:
    attach_filter(sock, program)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE)
    sock.setsockopt(_SOL_PACKET, _PACKET_AUXDATA, 1)  # whether the checksum is right
    return sock


def _open_raw(stack: ExitStack, version: int) -> int:
    """A socket that sends packets with their headers; the mark passes the gate, untracked.

    By lo alone: where OLD is not local (any more), what it sends is discarded there.
    """
    raw = socket.socket(_FAMILY[version], socket.SOCK_RAW, socket.IPPROTO_RAW)
    sock = stack.enter_context(raw)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, CRIU_MARK)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
    return sock.fileno()


@contextmanager
def _listen(home: int, name: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=home)
        sock.bind(_path(home, name))
        os.chmod(name, 0o600, dir_fd=home)
        sock.listen(8)
        yield sock


def _path(home: int, name: str) -> str:
    """Short enough for a socket's address, however long the directory's name is."""
    return f"/proc/self/fd/{home}/{name}"


# ---- a holder that runs --------------------------------------------------------------------------


def look(directory: str, move_id: str) -> Held | None:
    """What the move's holder has by now; None where there is none."""
    with _request(directory, move_id, "look", _LOOK_PATIENCE) as (held, _):
        return held


def deliver_datagrams(directory: str, move_id: str) -> None:
    """Have the datagrams that are held sent to their sockets, while the gate is still closed.

    After PATIENCE seconds the gate is opened without, and none is delivered any more.
    """
    until = time.monotonic_ns() + int(PATIENCE * 0.8e9)
    with _request(directory, move_id, f"datagrams {until}", PATIENCE):
        pass


def deliver(directory: str, move_id: str) -> Held | None:
    """Have all that is held sent to the sockets that are back; the holder ends with that.

    None where there is none (any more), or where it has not done so in PATIENCE seconds; then it
    goes on by itself.
    """
    with _request(directory, move_id, "deliver", PATIENCE) as (held, _):
        return held


def end(directory: str, move_id: str) -> None:
    """End the move's holder, if there is one, and forget what it has.

    KernelError when it is there and does not end.
    """
    with _request(directory, move_id, "end", _END_PATIENCE) as (_, connection):
        # It keeps the connection until its process is no more, and its sockets with it.
        if connection is not None and not _has_ended(connection):
            raise KernelError(
                f"the holder of {move_id} does not end",
                hint=f"its command line has segment_holderd.py and {holder_name(move_id)}: kill it",
            )
    with suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, holder_name(move_id)))


@contextmanager
def _request(
    directory: str, move_id: str, verb: str, patience: float
) -> Iterator[tuple[Held | None, socket.socket | None]]:
    """The holder's answer and the connection it is on; None where there is no holder."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(patience)
        try:
            home = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sock.connect(_path(home, holder_name(move_id)))
            finally:
                os.close(home)
        except OSError:
            yield None, None
            return
        try:
            sock.sendall(f"{verb}\n".encode())
            answer = sock.recv(128).split()
        except OSError:
            answer = []
        yield Held(*map(int, answer[1:])) if len(answer) == 5 else None, sock


def _has_ended(connection: socket.socket) -> bool:
    try:
        while connection.recv(128):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass  # reset: it ended without having read the request
    return True
