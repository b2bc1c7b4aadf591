"""The holder: the process that keeps segments and datagrams of a move while its gate is closed.

    python3 -I -S segment_holderd.py SOCKET NETNS DEVICE:INODE FAMILIES UDP_FAMILIES SECONDS

Started by segment_holder.py, which has opened everything beforehand, so that the kernel keeps what
arrives while this interpreter starts; the first arguments, and when it ends by itself, are in
daemon.py. It ends after SECONDS, too.

    3         the state directory
    4         a listening socket, SOCKET by name in it. A request is one line, and so its answer:
                  look       held SEGMENTS OCTETS REFUSED DATAGRAMS
                  datagrams NANOSECONDS
                             the same, when the datagrams have been delivered, while the gate is
                             closed; until then, of the monotonic clock
                  deliver    the same, when the segments have been, and it ends
                  end        no answer; the connection ends with the process
    5         a file with the connections (plan/replay.py: pack_kept)
    6         the same of the UDP sockets (plan/datagrams.py)
    7         a socket of sock_diag
    8 9 ...   a packet socket and a raw socket for each of FAMILIES, which is 4, 6, 46 or empty,
              then for each of UDP_FAMILIES, whose packet socket says offloads (PACKET_VNET_HDR)

What it delivers goes through lo or nowhere: the raw sockets are bound to lo, where a packet for an
address that is not local is discarded. A stream whose socket is not there (any more) is not
delivered at all, since the kernel would answer with a reset.

Rule: it loads replay.py, daemon.py and a few modules of the interpreter's own, where there are UDP
sockets held_datagrams.py and datagrams.py as well, and imports nothing else. What it holds is in
its memory only: no core dump, and where the kernel lets it, no swap.
"""

from __future__ import annotations

import os
import select
import sys
import time
from _socket import AF_INET, AF_INET6, MSG_TRUNC, SOL_SOCKET, inet_ntop, socket
from struct import pack, unpack_from

if __name__ == "__main__":  # isolated: behind the interpreter's own modules, ours
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from natkeep.kernel.daemon import DIRECTORY, Watch, keep_only
from natkeep.plan.replay import PACKET_SIZE, Store, make_packets, unpack_kept

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from natkeep.kernel.held_datagrams import HeldDatagrams
    from natkeep.plan.replay import Piece, Stream

    Pairs = dict[int, tuple[socket, socket]]

_LISTENING, _KEPT, _KEPT_UDP, _DIAG, _PAIRS = 4, 5, 6, 7, 8
_LOOK_EVERY_S = 1.0
_AT_A_TIME = 256  # packets, before anything else has its turn
_ROOM = 1 << 19  # octets; more than any packet has (GSO_MAX_SIZE, Linux 6.18)
_ANCILLARY = 64  # octets; struct tpacket_auxdata has 20, its header 16
_CHECKSUM_KNOWN = 0x08 | 0x80  # TP_STATUS_CSUMNOTREADY: still to be computed; TP_STATUS_CSUM_VALID
_SOCK_DIAG_BY_FAMILY = 20
_TCP, _UDP = 6, 17
_OWNED = frozenset({1, 4, 5, 8, 9, 11})  # TCP states in which a restored socket can be
_PIECE_FOR_A_NARROW_LO = 1280
_EMSGSIZE = 90
_SO_ATTACH_FILTER = 26
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_IPC_LOCK = 14


class Holder:
    """The sockets, what arrived at them, and the listening one for requests.

    pairs: the sockets of each IP version. deadline: of the monotonic clock; behind it nothing is
    delivered. datagrams: what is held of UDP, where it has sockets.
    """

    datagrams: HeldDatagrams | None = None

    def __init__(self, store: Store, pairs: Pairs, deadline: float, watch: Watch) -> None:
        self.store, self.pairs, self.deadline, self.watch = store, pairs, deadline, watch
        self.diag = socket(fileno=_DIAG)
        self.listening = socket(fileno=_LISTENING)
        self.listening.setblocking(False)
        self.last_request: socket | None = None
        self.buffer = bytearray(_ROOM)
        self.poll = select.poll()
        for sock in (self.listening, *(packets for packets, _ in self.pairs.values())):
            self.poll.register(sock.fileno(), select.POLLIN)

    def hold_datagrams(self, kept: dict[bytes, bytes], pairs: Pairs) -> None:
        """From now on what is sent to UDP sockets as well."""
        from natkeep.kernel.held_datagrams import HeldDatagrams
        from natkeep.plan.datagrams import Datagrams

        def has_socket(key: bytes) -> bool:
            return self.has_socket(key, _UDP)

        some = HeldDatagrams(Datagrams(kept), pairs, self.buffer, has_socket, _close_filter)
        self.datagrams = some
        for packets, _ in pairs.values():
            self.poll.register(packets.fileno(), select.POLLIN)
        has_socket(bytes(12))  # the kernel loads what it needs for that, beforehand

    def run(self) -> None:
        """Until a request ends it, or it is not needed any more."""
        look = 0.0
        while True:
            now = time.monotonic()
            if now >= look:
                look = now + _LOOK_EVERY_S
                if not (self.is_wanted() and self.watch.is_inhabited()):
                    return
            ready = {fd for fd, _ in self.poll.poll(max(look - now, 0) * 1000)}
            for packets, _ in self.pairs.values():
                if packets.fileno() in ready:
                    self.take(packets, _AT_A_TIME)
            if self.datagrams is not None:
                for packets, _ in self.datagrams.pairs.values():
                    if packets.fileno() in ready:
                        self.datagrams.take(packets)
            if self.listening.fileno() in ready and self.serve():
                return

    def is_wanted(self) -> bool:
        """Whether its time is not over and its move not undone."""
        return time.monotonic() < self.deadline and self.watch.is_found()

    def take(self, packets: socket, most: int) -> bool:
        """Take packets from the kernel, *most* of them; whether there may be more."""
        store, buffers, view = self.store, [self.buffer], memoryview(self.buffer)
        for _ in range(most):
            try:
                length, ancillary, flags, _ = packets.recvmsg_into(buffers, _ANCILLARY)
            except OSError:  # there is no more, or the device has gone down
                return False
            if flags & MSG_TRUNC:  # the peer sends again what is not whole
                store.cut += 1
                continue
            status = unpack_from("=I", ancillary[0][2])[0] if ancillary else 0
            store.add(bytes(view[:length]), verify=not status & _CHECKSUM_KNOWN)
        return True

    def serve(self) -> bool:
        """Do what one request says; whether it was the last."""
        try:
            fd, _ = self.listening._accept()  # type: ignore[attr-defined]
        except OSError:
            return False
        request = socket(fileno=fd)
        verb = b""
        try:
            request.settimeout(1.0)
            verb, _, until = request.recv(64).strip().partition(b" ")
            if verb == b"datagrams" and self.datagrams is not None:
                self.datagrams.deliver(int(until) / 1e9 if self.is_wanted() else 0.0)
            elif verb == b"deliver":
                self.deliver()
            if verb != b"end":
                request.sendall(b"held %d %d %d %d\n" % self.count())
        except (OSError, ValueError):
            pass  # the other end is closed; what was to be done is done
        if verb in (b"deliver", b"end"):
            self.last_request = request  # open until the process is no more: its end is awaited
            return True
        request.close()
        return False

    def count(self) -> tuple[int, int, int, int]:
        """Segments, octets of all that is held, what was refused of it, and datagrams."""
        pieces = [piece for _, piece in self.store.replay()]
        octets, refused = sum(len(piece.payload) for piece in pieces), self.store.refused
        if self.datagrams is None:
            return len(pieces), octets, refused, 0
        datagrams, more, lost = self.datagrams.count()
        return len(pieces), octets + more, refused + lost, datagrams

    def deliver(self) -> None:
        """Send all segments that are held to the sockets that are back.

        The gate is open: what arrives from now on is not taken any more.
        """
        for packets, _ in self.pairs.values():
            _close_filter(packets)
            while self.take(packets, _AT_A_TIME):
                pass
        if not self.is_wanted():
            self.store.streams.clear()
        for key, stream in [*self.store.streams.items()]:
            if not self.has_socket(stream.known):
                del self.store.streams[key]
        for stream, piece in self.store.replay():
            _, raw = self.pairs[4 if len(stream.known) == 12 else 6]
            self.send(raw, stream, piece)

    def has_socket(self, key: bytes, protocol: int = _TCP) -> bool:
        """Whether a socket has the connection of *key* (plan/replay.py), or would get a datagram.

        What receives it need not be connected: the kernel looks as it does for what arrives.
        """
        width = (len(key) - 4) // 2
        old, peer, ports = key[:width], key[width : 2 * width], key[-2:] + key[-4:-2]
        family = AF_INET if width == 4 else AF_INET6
        if protocol == _UDP:  # as of a packet: the sender first
            old, peer, ports = peer, old, ports[2:] + ports[:2]
        request = pack(
            "=IHHIIBBBxI4s16s16sIII", 72, _SOCK_DIAG_BY_FAMILY, 1, 0, 0,
            family, protocol, 0, 0xFFFFFFFF, ports, old, peer, 0, 0xFFFFFFFF, 0xFFFFFFFF,
        )  # fmt: skip
        try:
            self.diag.send(request)
            answer = self.diag.recv(4096)
        except OSError:
            return False
        type_, state = unpack_from("=4xH11xB", answer)
        return bool(type_ == _SOCK_DIAG_BY_FAMILY and (protocol == _UDP or state in _OWNED))

    def send(self, raw: socket, stream: Stream, piece: Piece) -> None:
        """Send one piece through lo; what the kernel does not take, the peer sends again."""
        end = (_print(stream.known[: (len(stream.known) - 4) // 2]), 0)
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


def attach_filter(sock: socket, program: bytes) -> None:
    """Have the kernel show *sock* only what the packed classic BPF *program* lets through."""
    from array import array

    held = array("B", program)
    address, length = held.buffer_info()
    sock.setsockopt(SOL_SOCKET, _SO_ATTACH_FILTER, pack("HxxxxxxP", length // 8, address))


def _close_filter(sock: socket) -> None:
    attach_filter(sock, bytes((6, 0, 0, 0, 0, 0, 0, 0)))  # return 0: nothing


def _keep_in_memory() -> None:
    """Have neither a core dump nor swap write what peers have sent to a disk."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not _may_lock():
        return  # then there is a limit, and memory that is locked would run out
    import ctypes

    ctypes.CDLL(None).mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)


def _may_lock() -> bool:
    """Whether CAP_IPC_LOCK is ours, and in the initial user namespace."""
    with open("/proc/self/status", encoding="ascii") as file:
        [capabilities] = [line.split()[1] for line in file if line.startswith("CapEff:")]
    with open("/proc/self/uid_map", encoding="ascii") as file:
        initial = file.read().split() == ["0", "0", "4294967295"]
    return initial and bool(int(capabilities, 16) >> _CAP_IPC_LOCK & 1)


def _read_kept(descriptor: int) -> dict[bytes, bytes]:
    with open(descriptor, "rb") as file:
        file.seek(0)
        return unpack_kept(file.read())


def _pairs(families: str, first: int) -> Pairs:
    """The packet and the raw socket of each IP version, from descriptor *first* on."""
    found: Pairs = {}
    for place, version in enumerate(families):
        packets, raw = (socket(fileno=first + 2 * place + i) for i in range(2))
        packets.setblocking(False)
        found[int(version)] = packets, raw
    return found


def main(arguments: list[str]) -> None:
    """Hold, until a request or the watch ends it."""
    name, netns, identity, families, udp_families, seconds = arguments
    keep_only(_PAIRS - DIRECTORY + 2 * len(families + udp_families))
    deadline = time.monotonic() + float(seconds)
    watch = Watch(name, os.stat(name, dir_fd=DIRECTORY, follow_symlinks=False), netns, identity)
    kept = _read_kept(_KEPT)
    _keep_in_memory()
    holder = Holder(Store(kept), _pairs(families, _PAIRS), deadline, watch)
    if udp_families:
        pairs = _pairs(udp_families, _PAIRS + 2 * len(families))
        holder.hold_datagrams(_read_kept(_KEPT_UDP), pairs)
    holder.has_socket(bytes(12))  # the kernel loads what it needs for that, beforehand
    try:
        holder.run()
    finally:
        watch.remove_file()


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # the kernel closes in the order of the numbers, so `last_request` last
