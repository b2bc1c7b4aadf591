"""the holder: the process that keeps the segments of a move while its gate is closed.

    python3 -I -S segment_holderd.py FAMILIES SOCKET SECONDS NETNS DEVICE:INODE

Started by hold.py, which has opened everything beforehand, so that the kernel keeps what arrives
while this interpreter starts:

    3         a listening socket, SOCKET by name in the directory 4; whoever opens or undoes the
              move says there what it wants, in one line, and is answered in one line:
                  look       held SEGMENTS OCTETS REFUSED
                  deliver    delivered SEGMENTS OCTETS REFUSED, and it ends
                  end        no answer; the connection ends with the process
    4         the state directory
    5         a file with the connections (plan/replay.py: pack_kept)
    6 7       packet sockets, raw sockets of IPv4
    8 9       the same of IPv6; FAMILIES, as `46`, says which of the pairs there are

Rule: it loads replay.py and a few modules of the interpreter's own, and imports nothing else. What
it holds is in its memory only: no core dump, and where the kernel lets it, no swap. It ends by
itself when SECONDS have passed, when SOCKET is no longer its own (the move is undone, or the
state directory is gone), and when nobody but itself keeps the namespace any more.
"""

from __future__ import annotations

import os
import select
import sys
import time
from _socket import AF_INET, AF_INET6, SOL_SOCKET, inet_ntop, socket

if __name__ == "__main__":  # isolated: behind the interpreter's own modules, ours
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from natkeep.plan.replay import PACKET_SIZE, Store, make_packets, unpack_kept

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from collections.abc import Callable

    from natkeep.plan.replay import Piece, Stream

_LISTENING, _DIRECTORY, _KEPT = 3, 4, 5
_PAIRS = {4: (6, 7), 6: (8, 9)}
_LOOK_EVERY_S = 1.0
_AT_A_TIME = 256  # packets, before anything else has its turn
_ROOM = 1 << 18  # octets; more than any packet has
_PIECE_FOR_A_NARROW_LO = 1280
_EMSGSIZE = 90
_SO_ATTACH_FILTER = 26
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14


class Holder:
    """The sockets, what they brought, and who asks for it."""

    def __init__(self, store: Store, name: str, families: set[int]) -> None:
        self.store, self.name = store, name
        self.listening = socket(fileno=_LISTENING)
        self.listening.setblocking(False)
        self.pairs: dict[int, tuple[socket, socket]] = {}
        for version in sorted(families):
            packets, raw = (socket(fileno=fd) for fd in _PAIRS[version])
            packets.setblocking(False)
            self.pairs[version] = packets, raw
        self.own = self._look_up()
        self.asking: socket | None = None
        self.buffer = bytearray(_ROOM)
        self.poll = select.poll()
        for sock in (self.listening, *(packets for packets, _ in self.pairs.values())):
            self.poll.register(sock.fileno(), select.POLLIN)

    def run(self, deadline: float, is_needed: Callable[[], bool]) -> None:
        """Until it is told to end, or nobody needs it."""
        look = 0.0
        while True:
            now = time.monotonic()
            if now >= look:
                look = now + _LOOK_EVERY_S
                if now >= deadline or self._look_up() != self.own or not is_needed():
                    return
            ready = {fd for fd, _ in self.poll.poll(max(look - now, 0) * 1000)}
            for packets, _ in self.pairs.values():
                if packets.fileno() in ready:
                    self.take(packets, _AT_A_TIME)
            if self.listening.fileno() in ready and self.serve():
                return

    def _look_up(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.name, dir_fd=_DIRECTORY, follow_symlinks=False)
        except OSError:
            return None
        return status.st_dev, status.st_ino

    def take(self, packets: socket, most: int) -> bool:
        """Take packets from the kernel, *most* of them; whether there may be more."""
        add, buffer = self.store.add, self.buffer
        for _ in range(most):
            try:
                length = packets.recv_into(buffer)
            except OSError:  # there is no more, or the device has gone down
                return False
            add(bytes(buffer[:length]))
        return True

    def serve(self) -> bool:
        """Do what somebody asks for; whether that is the end."""
        try:
            fd, _ = self.listening._accept()  # type: ignore[attr-defined]
        except OSError:
            return False
        asking = socket(fileno=fd)
        wanted = b""
        try:
            asking.settimeout(1.0)
            wanted = asking.recv(64).strip()
            if wanted == b"look":
                asking.sendall(b"held %d %d %d\n" % self.count())
            elif wanted == b"deliver":
                asking.sendall(b"delivered %d %d %d\n" % self.deliver())
        except OSError:
            pass  # whoever asked has gone; what was to be done is done
        if wanted in (b"deliver", b"end"):
            self.asking = asking  # open until our process is no more: who asked may wait for that
            return True
        asking.close()
        return False

    def count(self) -> tuple[int, int, int]:
        """Segments and octets held, and segments refused."""
        pieces = [piece for _, piece in self.store.replay()]
        return len(pieces), sum(len(piece.payload) for piece in pieces), self.store.refused

    def deliver(self) -> tuple[int, int, int]:
        """Send all that is held to the sockets that are back; the same numbers.

        The gate is open: what comes from now on goes its own way, and is not taken any more.
        """
        for packets, _ in self.pairs.values():
            _close_filter(packets)
            while self.take(packets, _AT_A_TIME):
                pass
        segments = octets = 0
        for stream, piece in self.store.replay():
            version = 4 if len(stream.old) == 4 else 6
            self.send(self.pairs[version][1], stream, piece)
            segments += 1
            octets += len(piece.payload)
        return segments, octets, self.store.refused

    def send(self, raw: socket, stream: Stream, piece: Piece) -> None:
        """Send one piece through lo; what the kernel does not take, the peer sends again."""
        end = (_print(stream.old), 0)
        for size in (PACKET_SIZE, _PIECE_FOR_A_NARROW_LO):
            try:
                for packet in make_packets(stream, piece, size):
                    raw.sendto(packet, end)
            except OSError as error:
                if error.errno == _EMSGSIZE:
                    continue
            return


def _print(address: bytes) -> str:
    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


def _close_others(families: set[int]) -> None:
    """Whatever else we have inherited, somebody may wait for its end."""
    ours = {0, 1, 2, _LISTENING, _DIRECTORY, _KEPT}
    ours |= {fd for version in families for fd in _PAIRS[version]}
    for fd in [int(name) for name in os.listdir("/proc/self/fd")]:
        if fd not in ours:
            try:  # noqa: SIM105 (contextlib is not worth its time here)
                os.close(fd)
            except OSError:
                pass  # the one by which the directory was read


def attach_filter(sock: socket, program: bytes) -> None:
    """Have the kernel show *sock* only what the packed classic BPF *program* lets through."""
    from array import array
    from struct import pack

    held = array("B", program)
    address, length = held.buffer_info()
    sock.setsockopt(SOL_SOCKET, _SO_ATTACH_FILTER, pack("HxxxxxxP", length // 8, address))


def _close_filter(sock: socket) -> None:
    attach_filter(sock, bytes((6, 0, 0, 0, 0, 0, 0, 0)))  # return 0: nothing


def _keep_in_memory() -> None:
    """Neither a core dump nor swap shall write what peers have sent to a disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not _may_lock():
        return  # then there is a limit, and memory that is locked would run out
    import ctypes

    ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def _may_lock() -> bool:
    """Whether CAP_IPC_LOCK is ours, and that of the machine and not of a container's own users."""
    with open("/proc/self/status", encoding="ascii") as file:
        [capabilities] = [line.split()[1] for line in file if line.startswith("CapEff:")]
    with open("/proc/self/uid_map", encoding="ascii") as file:
        everybody = file.read().split() == ["0", "0", "4294967295"]
    return everybody and bool(int(capabilities, 16) >> _CAP_IPC_LOCK & 1)


def make_watch(netns: str, identity: tuple[int, int]) -> Callable[[], bool]:
    """Whether the namespace still is: it has its name, or somebody else is in it.

    Our sockets keep it from ending, so nobody tells us. Where it never had a name, whoever may not
    be looked at may be in it.
    """
    own = str(os.getpid())

    def is_it(path: str) -> bool:
        try:
            status = os.stat(path)
        except PermissionError:
            return not netns
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == identity

    def is_there() -> bool:
        if netns and is_it(netns):
            return True
        pids = (pid for pid in os.listdir("/proc") if pid.isdigit() and pid != own)
        return any(is_it(f"/proc/{pid}/ns/net") for pid in pids)

    return is_there


def main(arguments: list[str]) -> None:
    """Hold, until it is told to end."""
    versions, name, seconds, netns, identity = arguments
    families = {int(version) for version in versions}
    _close_others(families)
    device, _, inode = identity.partition(":")
    deadline = time.monotonic() + float(seconds)
    with open(_KEPT, "rb") as file:
        file.seek(0)
        kept = unpack_kept(file.read())
    os.chdir("/")
    _keep_in_memory()
    holder = Holder(Store(kept), name, families)
    try:
        holder.run(deadline, make_watch(netns, (int(device), int(inode))))
    finally:
        if holder.own is not None and holder.own == holder._look_up():
            os.unlink(name, dir_fd=_DIRECTORY)


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # the kernel closes in the order of the numbers, so `asking` last
