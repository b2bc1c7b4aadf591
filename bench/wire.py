"""the wire: three namespaces in a row, the sockets at both ends, and what is measured on it.

    client ── gateway ── server

One connection from the client to OLD, which is an address of the server's lo.

    bulk        octets a second, with segmentation offload and with packets of the MTU
    exchange    64 octets there and back, median
    newcomer    connect, one octet, reset: a stranger's, from the client to NEW, median
"""

from __future__ import annotations

import array
import fcntl
import os
import signal
import socket
import statistics
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from bench.namespaces import PREFIX, namespace
from natkeep.kernel.netns import Namespace, inside, open_namespace

OLD, NEW, CLIENT, GATEWAY = "10.2.0.10", "10.3.0.20", "10.1.0.2", "10.1.0.1"
FAR = "10.3.0.1"  # the gateway's, towards the server
PORT, OTHER = 5000, 9000
# Short turns, and many: what else the machine does then meets all wires alike.
GSO_OCTETS, MTU_OCTETS = 64 << 20, 4 << 20
EXCHANGES, NEWCOMERS = 200, 30
METRICS = ("bulk", "bulk, MTU packets", "exchange", "newcomer")
_ETHTOOL, _OFFLOADS = 0x8946, {"tso": 0x1F, "gso": 0x24, "gro": 0x2C}  # ETHTOOL_STSO and so on


class Wire:
    """Three namespaces in a row, and the sockets at both ends."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        self.c, self.g, self.s = (f"{PREFIX}{os.getpid()}-{name}-{end}" for end in "cgs")
        self.spaces: dict[str, Namespace] = {}
        for netns in (self.c, self.g, self.s):
            stack.enter_context(namespace(netns))
            self.spaces[netns] = open_namespace(netns)
            stack.callback(os.close, self.spaces[netns].fd)
        subprocess.run(
            ["ip", "-n", self.g, "link", "add", "near", "type", "veth", "peer", "name", "eth0",
             "netns", self.c], check=True)  # fmt: skip
        subprocess.run(
            ["ip", "-n", self.g, "link", "add", "far", "type", "veth", "peer", "name", "eth0",
             "netns", self.s], check=True)  # fmt: skip
        self.ip(self.g, "link set lo up", "link set near up", "link set far up",
                f"address add {GATEWAY}/24 dev near", f"address add {FAR}/24 dev far",
        )  # fmt: skip
        self.ip(self.c, "link set lo up", "link set eth0 up", f"address add {CLIENT}/24 dev eth0",
                f"route add default via {GATEWAY}")  # fmt: skip
        self.ip(self.s, "link set lo up", "link set eth0 up", f"address add {NEW}/24 dev eth0",
                f"address add {OLD}/32 dev lo", f"route add default via {FAR}")  # fmt: skip
        for netns in (self.c, self.g, self.s):
            self.run(netns, "sysctl", "-qw", "net.ipv4.ip_forward=1")
            self.run(netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
        self.route_old()
        self._listen()

    def _listen(self) -> None:
        with inside(self.spaces[self.s]):
            kept = socket.create_server((OLD, PORT))
            self.strangers = socket.create_server((NEW, OTHER), backlog=512)
        with inside(self.spaces[self.c]):
            self.near = socket.create_connection((OLD, PORT))
        self.far, _ = kept.accept()
        for end in (self.near, self.far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    @staticmethod
    def ip(netns: str, *lines: str) -> None:
        command = ["ip", "-n", netns, "-batch", "-"]
        subprocess.run(command, input="\n".join(lines), text=True, check=True)

    @staticmethod
    def run(netns: str, *argv: str, text: str = "") -> None:
        subprocess.run(["nsenter", f"--net=/run/netns/{netns}", *argv], check=True, text=True,
                       input=text, stdout=subprocess.DEVNULL)  # fmt: skip

    def route_old(self) -> None:
        """As a plain wire has it."""
        self.ip(self.g, f"route replace {OLD}/32 via {NEW}")

    def hide_old(self) -> None:
        """What is not translated goes nowhere."""
        self.ip(self.g, f"route replace blackhole {OLD}/32")

    def give_old(self) -> None:
        """OLD is the gateway's own, as it is a relay's."""
        self.ip(self.g, f"address add {OLD}/32 dev lo")

    @contextmanager
    def whole_packets(self) -> Iterator[None]:
        """Segments of the MTU, made by TCP itself, and not put together again on their way."""
        self._offload(0)
        try:
            yield
        finally:
            self._offload(1)

    def _offload(self, value: int) -> None:
        for netns, devices in ((self.c, ("eth0",)), (self.g, ("near", "far")), (self.s, ("eth0",))):
            with inside(self.spaces[netns]), socket.socket() as any_socket:
                for device in devices:
                    for command in _OFFLOADS.values():
                        _set_offload(any_socket, device, command, value)


def _set_offload(any_socket: socket.socket, device: str, command: int, value: int) -> None:
    words = array.array("I", [command, value])
    request = struct.pack("16sP", device.encode(), words.buffer_info()[0])
    fcntl.ioctl(any_socket, _ETHTOOL, request.ljust(40, b"\0"))


@contextmanager
def child(work: Callable[[], None], processor: int) -> Iterator[None]:
    """*work* in a process beside this one, on that processor; it ends with the block."""
    pid = os.fork()
    if not pid:
        try:
            os.sched_setaffinity(0, {processor})
            work()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)  # it has nothing to tidy; SIGTERM may come before it can hear
        os.waitpid(pid, 0)


# ---- what is measured --------------------------------------------------------------------------


def measure_bulk(wire: Wire, octets: int, server_on: int) -> float:
    """Octets a second from the client to the server, which runs on that processor."""

    def swallow() -> None:
        buffer, left = bytearray(1 << 18), octets
        while left:
            left -= wire.far.recv_into(buffer, min(len(buffer), left))
        wire.far.sendall(b"!")

    block = bytes(1 << 18)
    with child(swallow, server_on):
        began = time.perf_counter()
        for _ in range(octets // len(block)):
            wire.near.sendall(block)
        wire.near.recv(1)
        return octets / (time.perf_counter() - began)


def measure_exchange(wire: Wire, server_on: int) -> float:
    """Seconds for 64 octets there and back."""

    def echo() -> None:
        while True:
            wire.far.sendall(wire.far.recv(64))

    word, times = bytes(64), []
    with child(echo, server_on):
        for _ in range(EXCHANGES):
            began = time.perf_counter()
            wire.near.sendall(word)
            wire.near.recv(64)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_newcomer(wire: Wire, server_on: int) -> float:
    """Seconds that a stranger needs for one whole connection through the same gateway."""

    def serve() -> None:
        while True:
            stranger, _ = wire.strangers.accept()
            stranger.sendall(stranger.recv(1))
            stranger.close()

    times = []
    with child(serve, server_on), inside(wire.spaces[wire.c]):
        for _ in range(NEWCOMERS):
            with socket.socket() as stranger:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                began = time.perf_counter()
                stranger.connect((NEW, OTHER))
                stranger.sendall(b"?")
                stranger.recv(1)
                times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(wire: Wire, metric: str, processors: Sequence[int]) -> float:
    """One of METRICS, as a number that is the better the larger it is.

    Bulk in packets of the MTU is measured within `whole_packets`. Bulk has both ends on the first
    of the *processors*: there segments stay in order, as one flow's do on a real gateway, while
    veth lets those of two processors overtake each other; and what counts is the whole work that a
    packet makes. What is a time has each end on a processor of its own, as two hosts have.
    """
    here, there = processors[0], processors[-1]
    os.sched_setaffinity(0, {here})
    match metric:
        case "exchange":
            return 1 / measure_exchange(wire, there)
        case "newcomer":
            return 1 / measure_newcomer(wire, there)
        case "bulk":
            return measure_bulk(wire, GSO_OCTETS, here)
        case _:
            return measure_bulk(wire, MTU_OCTETS, here)
