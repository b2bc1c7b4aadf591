"""the price of a packet: what kept connections, and other people's, cost on their way.

Usage, as root:  python bench/path.py [--rounds N] [--only WORD] [--json FILE]

    client ── gateway ── server        two such paths: one is always plain, the other has the
                                       configuration, and both are measured in turn

One connection from the client to OLD, which is an address of the server's lo. In a plain path the
gateway routes OLD to the server; in a configured one it does not: what arrives was translated.

    bulk        octets a second, with segmentation offload and with packets of the MTU
    exchange    64 octets there and back, median
    newcomer    connect, one octet, reset: a stranger's, from the client to NEW, median

Each figure is the median of the rounds' ratios, configured to plain of the same round; the first
configuration is plain as well, so what it shows is the noise. Each figure asked for is printed
beside the one reached, and the exit code is 0 only if all hold. All namespaces go with the bench.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from natkeep.journal import StateDirectory
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import inside, open_namespace
from natkeep.lifecycle.verbs import Lifecycle
from natkeep.plan.drift import Gate
from natkeep.plan.move import Map, Mode, Move, Role, Site
from natkeep.plan.tuples import Connections

OLD, NEW, CLIENT, GATEWAY = "10.2.0.10", "10.3.0.20", "10.1.0.2", "10.1.0.1"
PORT, OTHER = 5000, 9000
GSO_OCTETS, MTU_OCTETS = 1 << 30, 192 << 20
EXCHANGES, NEWCOMERS = 3000, 400
METRICS = ("bulk", "bulk, MTU packets", "exchange", "newcomer")
_ETHTOOL, _OFFLOADS = 0x8946, {"tso": 0x1F, "gso": 0x24, "gro": 0x2C}  # ETHTOOL_STSO and so on


class Path3:
    """Three namespaces in a row, and the sockets at both ends."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        self.c, self.g, self.s = (f"natkeep-bench-{os.getpid()}-{name}-{end}" for end in "cgs")
        for netns in (self.c, self.g, self.s):
            subprocess.run(["ip", "netns", "add", netns], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "delete", netns], check=True)
        subprocess.run(
            ["ip", "-n", self.g, "link", "add", "near", "type", "veth", "peer", "name", "eth0",
             "netns", self.c], check=True)  # fmt: skip
        subprocess.run(
            ["ip", "-n", self.g, "link", "add", "far", "type", "veth", "peer", "name", "eth0",
             "netns", self.s], check=True)  # fmt: skip
        self.ip(self.g, "link set lo up", "link set near up", "link set far up",
                f"address add {GATEWAY}/24 dev near", "address add 10.3.0.1/24 dev far",
        )  # fmt: skip
        self.ip(self.c, "link set lo up", "link set eth0 up", f"address add {CLIENT}/24 dev eth0",
                f"route add default via {GATEWAY}")  # fmt: skip
        self.ip(self.s, "link set lo up", "link set eth0 up", f"address add {NEW}/24 dev eth0",
                f"address add {OLD}/32 dev lo", "route add default via 10.3.0.1")  # fmt: skip
        for netns in (self.c, self.g, self.s):
            self.run(netns, "sysctl", "-qw", "net.ipv4.ip_forward=1")
            self.run(netns, "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
        self.route_old()
        self._listen()

    def _listen(self) -> None:
        with inside(open_namespace(self.s)):
            kept = socket.create_server((OLD, PORT))
            self.strangers = socket.create_server((NEW, OTHER), backlog=512)
        with inside(open_namespace(self.c)):
            self.near = socket.create_connection((OLD, PORT))
            self.near_strangers = lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM)
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
        """As a plain path has it."""
        self.ip(self.g, f"route replace {OLD}/32 via {NEW}")

    def hide_old(self) -> None:
        """What is not translated goes nowhere."""
        self.ip(self.g, f"route replace blackhole {OLD}/32")

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
            with inside(open_namespace(netns)), socket.socket() as any_socket:
                for device in devices:
                    for command in _OFFLOADS.values():
                        _set_offload(any_socket, device, command, value)


def _set_offload(any_socket: socket.socket, device: str, command: int, value: int) -> None:
    import array

    words = array.array("I", [command, value])
    request = struct.pack("16sP", device.encode(), words.buffer_info()[0])
    fcntl.ioctl(any_socket, _ETHTOOL, request.ljust(40, b"\0"))


@contextmanager
def child(work: Callable[[], None]) -> Iterator[None]:
    """*work* in a process beside this one, which ends with the block."""
    pid = os.fork()
    if not pid:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            work()
        finally:
            os._exit(0)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


# ---- what is measured --------------------------------------------------------------------------


def measure_bulk(path: Path3, octets: int) -> float:
    """Octets a second from the client to the server."""

    def swallow() -> None:
        buffer, left = bytearray(1 << 18), octets
        while left:
            left -= path.far.recv_into(buffer, min(len(buffer), left))
        path.far.sendall(b"!")

    block = bytes(1 << 18)
    with child(swallow):
        began = time.perf_counter()
        for _ in range(octets // len(block)):
            path.near.sendall(block)
        path.near.recv(1)
        return octets / (time.perf_counter() - began)


def measure_exchange(path: Path3) -> float:
    """Seconds for 64 octets there and back."""

    def echo() -> None:
        while True:
            path.far.sendall(path.far.recv(64))

    word, times = bytes(64), []
    with child(echo):
        for _ in range(EXCHANGES):
            began = time.perf_counter()
            path.near.sendall(word)
            path.near.recv(64)
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_newcomer(path: Path3) -> float:
    """Seconds that a stranger needs for one whole connection through the same gateway."""

    def serve() -> None:
        while True:
            stranger, _ = path.strangers.accept()
            stranger.sendall(stranger.recv(1))
            stranger.close()

    times = []
    with child(serve), inside(open_namespace(path.c)):
        for _ in range(NEWCOMERS):
            with path.near_strangers() as stranger:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                began = time.perf_counter()
                stranger.connect((NEW, OTHER))
                stranger.sendall(b"?")
                stranger.recv(1)
                times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure(path: Path3) -> dict[str, float]:
    """All of them, each as a number that is the better the larger it is."""
    found = {"bulk": measure_bulk(path, GSO_OCTETS)}
    with path.whole_packets():
        found["bulk, MTU packets"] = measure_bulk(path, MTU_OCTETS)
    found["exchange"] = 1 / measure_exchange(path)
    found["newcomer"] = 1 / measure_newcomer(path)
    return found


# ---- configurations ----------------------------------------------------------------------------


def plain(path: Path3) -> Iterator[None]:
    yield


def conntrack_only(path: Path3) -> Iterator[None]:
    chain = "chain c {\ntype filter hook prerouting priority 0;\nct state new\n}"
    text = f"table inet bench {{\n{chain}\n}}\n"
    for netns in (path.g, path.s):
        path.run(netns, "nft", "-f", "-", text=text)
    yield


def one_prefix_rule(path: Path3) -> Iterator[None]:
    at_gateway = (f"ip daddr {OLD} dnat to {NEW}", f"tcp sport {PORT} ip saddr {NEW} snat to {OLD}")
    at_server = (f"tcp dport {PORT} ip daddr {NEW} dnat to {OLD}", f"ip saddr {OLD} snat to {NEW}")
    for netns, (inbound, outbound) in ((path.g, at_gateway), (path.s, at_server)):
        path.run(
            netns,
            "nft",
            "-f",
            "-",
            text=f"""table ip bench {{
chain in {{
type nat hook prerouting priority -100;
{inbound}
}}
chain out {{
type nat hook postrouting priority 100;
{outbound}
}}
}}
""",
        )
    path.hide_old()
    yield


def many_iptables_rules(path: Path3) -> Iterator[None]:
    rules = [f"-A PREROUTING -s {CLIENT} -d {OLD} -p tcp --sport {1 + n} --dport {PORT} "
             f"-j DNAT --to-destination {NEW}" for n in range(10_000)]  # fmt: skip
    port = path.near.getsockname()[1]
    rules.append(rules[0].replace("--sport 1 ", f"--sport {port} "))
    path.run(path.g, "iptables-restore", text="\n".join(["*nat", *rules, "COMMIT", ""]))
    back = f"-A PREROUTING -d {NEW} -p tcp --dport {PORT} -j DNAT --to-destination {OLD}"
    path.run(path.s, "iptables-restore", text=f"*nat\n{back}\nCOMMIT\n")
    path.hide_old()
    yield


def natkeep(mode: Mode, connections: int, moves: int) -> Callable[[Path3], Iterator[None]]:
    """natkeep at gateway and server: the live connection is the first of so many kept ones."""

    def configure(path: Path3) -> Iterator[None]:
        with tempfile.TemporaryDirectory(prefix="natkeep-bench-") as directory:
            lifecycle = Lifecycle(LinuxKernel(), StateDirectory(directory, create=True))
            sites = (Site(Role.GATEWAY, path.g), Site(Role.DESTINATION, path.s))
            for number in reversed(range(moves)):  # the newest move's rules stand in front
                old = IPv4Address(OLD) + number * 256
                move = Move(f"m{number}", (Map(old, IPv4Address(NEW)),), sites, mode)
                kept = _kept(path, old, connections, number)
                lifecycle.prepare(move, kept, Gate.OPEN)
            path.hide_old()
            yield  # what is left goes with the namespaces

    return configure


def _kept(path: Path3, old: IPv4Address, count: int, number: int) -> Connections:
    """As many peers as it takes, from the live connection's port on; packed, 12 octets each."""
    live = path.near.getsockname()[1] if not number else 1 + number % 60_000
    records = bytearray()
    for n in range(count):
        peer = IPv4Address(CLIENT) + (n // 60_000) * 256
        port = live if not n else 1 + n % 60_000 + (1 + n % 60_000 >= live)
        records += old.packed + PORT.to_bytes(2, "big") + peer.packed + port.to_bytes(2, "big")
    return Connections(v4=bytes(records))


@dataclass(frozen=True, slots=True)
class Configuration:
    name: str
    configure: Callable[[Path3], Iterator[None]]


def configurations() -> list[Configuration]:
    ours = [
        Configuration(f"natkeep {mode}, {count:,} connection{'s' * (count > 1)}",
                      natkeep(mode, count, 1))
        for mode in (Mode.STATEFUL, Mode.STATELESS) for count in (1, 10_000, 100_000)
    ]  # fmt: skip
    ours += [Configuration(f"natkeep {mode}, 1,000 moves", natkeep(mode, 1, 1000))
             for mode in (Mode.STATEFUL, Mode.STATELESS)]  # fmt: skip
    return [
        Configuration("plain (the noise)", plain),
        Configuration("conntrack only", conntrack_only),
        Configuration("one prefix rule", one_prefix_rule),
        Configuration("10,000 iptables rules", many_iptables_rules),
        *ours,
    ]


# ---- the run -----------------------------------------------------------------------------------


def compare(configuration: Configuration, rounds: int) -> dict[str, list[float]]:
    """Ratios of the configured path to the plain one, a round each."""
    ratios: dict[str, list[float]] = {metric: [] for metric in METRICS}
    with ExitStack() as stack:
        bare, other = Path3("a", stack), Path3("b", stack)
        with contextmanager(configuration.configure)(other):
            for number in range(rounds + 1):
                pair = [measure(path) for path in ((bare, other), (other, bare))[number % 2]]
                base, ours = pair if number % 2 == 0 else reversed(pair)
                if number:  # the first round warms up
                    for metric in METRICS:
                        ratios[metric].append(ours[metric] / base[metric])
    return ratios


def count_instructions(configuration: Configuration) -> float | None:
    """Kernel instructions for each MTU packet of a bulk transfer; None where perf counts none."""
    if not (shutil.which("perf") and _count(lambda: None)):
        return None
    with ExitStack() as stack:
        path = Path3("i", stack)
        with contextmanager(configuration.configure)(path), path.whole_packets():
            counted = _count(lambda: measure_bulk(path, MTU_OCTETS))
    return counted / (MTU_OCTETS / 1448)


def _count(work: Callable[[], object]) -> int:
    """Kernel instructions of the whole machine during *work*; 0 where they cannot be had."""
    command = ["perf", "stat", "-a", "-x,", "-e", "instructions:k", "cat"]  # until its input ends
    perf = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    work()
    counted = perf.communicate()[1].strip().rpartition("\n")[2].split(",")[0]
    return int(counted) if counted.isdigit() else 0


@dataclass(frozen=True, slots=True)
class Asked:
    """*name* by *metric* is to be at least so much of *base*."""

    name: str
    metric: str
    base: str
    least: float


def asked() -> list[Asked]:
    """The figures to reach; plain is what every ratio is relative to already."""
    found = []
    for mode, least in ((Mode.STATEFUL, 0.93), (Mode.STATELESS, 0.97)):
        one, many = f"natkeep {mode}, 1 connection", f"natkeep {mode}, 100,000 connections"
        found.append(Asked(one, "bulk, MTU packets", "conntrack only", least))
        found.append(Asked(many, "bulk, MTU packets", one, 0.95))
        for name in (one, many, f"natkeep {mode}, 1,000 moves"):
            found.append(Asked(name, "exchange", "", 1 / 1.10))
            found.append(Asked(name, "newcomer", "", 1 / 1.15))
    return found


def report(taken: dict[str, dict[str, list[float]]]) -> bool:
    """Print the tables; whether all that was asked for holds."""
    medians = {name: {metric: statistics.median(values) for metric, values in ratios.items()}
               for name, ratios in taken.items()}  # fmt: skip
    for name, ratios in taken.items():
        told = "  ".join(f"{medians[name][metric]:.2f} [{min(ratios[metric]):.2f}-"
                         f"{max(ratios[metric]):.2f}]" for metric in METRICS)  # fmt: skip
        print(f"{name:40} {told}")
    noise = taken["plain (the noise)"]
    print(f"\n{'':72}   asked reached  noise")
    held = True
    for each in asked():
        if each.name not in medians or (each.base and each.base not in medians):
            continue
        base = medians[each.base][each.metric] if each.base else 1.0
        reached = medians[each.name][each.metric] / base
        spread = f"{min(noise[each.metric]):.2f}-{max(noise[each.metric]):.2f}"
        missed = "" if reached >= each.least else "  MISSED"
        held &= not missed
        what = f"{each.name}: {each.metric} / {each.base or 'plain'}"
        print(f"{what:72} >= {each.least:4.2f} {reached:7.2f}  {spread}{missed}")
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="WORD", help="configurations with WORD")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    chosen = [c for c in configurations() if args.only in c.name or c.configure is plain]
    print(f"{'ratios to plain, median [least-most]':40} {'  '.join(f'{m:>17}' for m in METRICS)}",
          file=sys.stderr)  # fmt: skip
    taken, instructions = {}, {}
    for configuration in chosen:
        taken[configuration.name] = compare(configuration, args.rounds)
        instructions[configuration.name] = count_instructions(configuration)
    if args.json:
        document = {"schema": 1, "bench": "path", "ratios": taken, "instructions": instructions}
        args.json.write_text(json.dumps(document))
    for name, counted in instructions.items():
        if counted is not None:
            print(f"{name:40} {counted:9,.0f} kernel instructions a packet, both ends included")
    if not report(taken):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
