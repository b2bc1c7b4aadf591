"""the price of prepare, open and teardown, beside what a careful person would do by hand.

Usage, as root:  python bench/control.py [--rounds N] [--most N] [--moves N] [--json FILE]

Whole processes, from their start to their end, at one destination: natkeep; `nft -f` of maps of all
connections and `conntrack -R` of a file, the best way by hand; `iptables-restore` of two rules a
connection; `conntrack -I`, a process each; and the floor, batches of raw netlink that were packed
beforehand, sent by a bare interpreter (it fills the set and inserts the entries, and does nothing
else). All ways take turns within each round, so that what else the machine does meets them alike; a
ratio is the median of the rounds' ratios, a time the median of the times.

Then a gateway that has a thousand moves. Each figure asked for is printed beside the one reached,
and the exit code is 0 only if all hold. Everything happens in two network namespaces and a state
directory that go with the bench.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from natkeep.journal import StateDirectory
from natkeep.kernel import elements
from natkeep.kernel.ctnetlink import NEW as NEW_ENTRY
from natkeep.kernel.ctnetlink import for_each, pack_entry
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL
from natkeep.lifecycle.verbs import Lifecycle
from natkeep.plan.move import Map, Move, Role, Site
from natkeep.plan.tuples import Connections

NATKEEP = Path(sys.executable).parent / "natkeep"
PREFIX = f"natkeep-bench-{os.getpid()}"
SITE, GATEWAY = f"{PREFIX}-d", f"{PREFIX}-g"
OLD, NEW, PORT = IPv4Address("10.2.0.10"), IPv4Address("10.3.0.20"), 5000
SIZES = (1, 100, 1000, 10_000, 100_000)
ROUNDS = {1: 15, 100: 9, 1000: 9, 10_000: 5, 100_000: 5}
ONE_BY_ONE = 1000  # entries that `conntrack -I` is started for
EACH = 100  # connections of each of a gateway's moves

SENDER = """
import socket, struct, sys
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        data = file.read()
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    s.bind((0, 0))
    for option in (32, 33):
        s.setsockopt(socket.SOL_SOCKET, option, 1 << 22)
    chunk, at = struct.unpack_from("=I", data)[0], 4
    while at < len(data):
        s.send(data[at : at + chunk])
        at += chunk
        if struct.unpack_from("=i", s.recv(65536), 16)[0]:
            sys.exit(path + ": refused")
"""


@dataclass
class Case:
    """One number of connections, and what each way to keep them took, round by round."""

    count: int
    directory: Path
    ms: dict[str, list[float]] = field(default_factory=dict)
    kib: int = 0  # the most memory that natkeep took

    def path(self, name: str) -> str:
        """A file of this case."""
        return str(self.directory / f"{name}-{self.count}")

    def time(self, name: str, *argv: str, state: Path | None = None) -> None:
        """Run the program, which must succeed, and keep how long it took."""
        taken, kib = run(*argv, state=state)
        self.ms.setdefault(name, []).append(taken)
        if name.startswith("natkeep"):
            self.kib = max(self.kib, kib)

    def median(self, name: str) -> float:
        """Milliseconds."""
        return statistics.median(self.ms[name])

    def ratio(self, ours: tuple[str, ...], theirs: tuple[str, ...]) -> float:
        """The median of what *ours* took by what *theirs* took in the same round."""
        columns = [[sum(row) for row in zip(*map(self.ms.get, names), strict=False)]
                   for names in (ours, theirs)]  # fmt: skip
        return statistics.median(a / b for a, b in zip(*columns, strict=False))


def run(*argv: str, state: Path | None = None) -> tuple[float, int]:
    """Milliseconds and KiB that the program took."""
    environment = {**os.environ, **({"NATKEEP_STATE_DIR": str(state)} if state else {})}
    began = time.perf_counter()
    process = subprocess.Popen(
        argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    taken = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(argv)} exited {process.returncode}")
    return taken * 1000, used.ru_maxrss


def inside(*argv: str) -> tuple[str, ...]:
    """The program, started in the destination's namespace."""
    return ("nsenter", f"--net=/run/netns/{SITE}", *argv)


def say(*argv: str) -> str:
    """What a program prints that is not measured."""
    return subprocess.run(inside(*argv), check=True, capture_output=True, text=True).stdout


def make_connections(count: int) -> Connections:
    """Peers from 10.1.0.1 on, 250 connections each; all to one port of OLD."""
    local = OLD.packed + PORT.to_bytes(2, "big")
    peers = (IPv4Address("10.1.0.1") + i // 250 for i in range(count))
    ports = (1024 + i % 250 for i in range(count))
    return Connections(
        b"".join(local + peer.packed + port.to_bytes(2, "big")
                 for peer, port in zip(peers, ports, strict=True))
    )  # fmt: skip


def write_files(case: Case) -> None:
    """What each way reads."""
    connections = make_connections(case.count)
    peers = [(str(c.source.address), c.source.port) for c in connections]
    write = {
        "list": (f"{c.destination} {c.source}\n" for c in connections),
        "nft": maps_text(peers),
        "entries": (
            f"-I -p tcp -s {a} --sport {p} -d {NEW} --dport {PORT} --dst-nat {OLD} "
            "--state ESTABLISHED --status SEEN_REPLY,ASSURED --timeout 432000 --mark 7\n"
            for a, p in peers
        ),
        "iptables": rules_text(peers),
    }
    for name, lines in write.items():
        Path(case.path(name)).write_text("".join(lines))
    write_floor(case, connections)


def maps_text(peers: list[tuple[str, int]]) -> Iterator[str]:
    """Two maps, as one would write them by hand."""
    key = "type ipv4_addr . inet_service . inet_service : ipv4_addr . inet_service; "
    for name, chain in (
        ("d", "prerouting priority -120; dnat to ip saddr . tcp sport . tcp dport map @d"),
        ("s", "postrouting priority 80; snat to ip daddr . tcp dport . tcp sport map @s"),
    ):
        address = OLD if name == "d" else NEW
        yield f"table ip hand {{\nmap {name} {{ {key}}}\n"
        yield f"chain {name}_chain {{ type nat hook {chain}\n}}\n}}\n"
        values = ", ".join(f"{a} . {p} . {PORT} : {address} . {PORT}" for a, p in peers)
        yield f"add element ip hand {name} {{ {values} }}\n"


def rules_text(peers: list[tuple[str, int]]) -> Iterator[str]:
    """Two rules a connection."""
    yield "*nat\n"
    for a, p in peers:
        yield f"-A PREROUTING -p tcp -s {a} --sport {p} -d {NEW} --dport {PORT} "
        yield f"-j DNAT --to-destination {OLD}:{PORT}\n"
        yield f"-A POSTROUTING -p tcp -s {OLD} --sport {PORT} -d {a} --dport {p} "
        yield f"-j SNAT --to-source {NEW}:{PORT}\n"
    yield "COMMIT\n"


def write_floor(case: Case, connections: Connections) -> None:
    """The same set and the same entries as natkeep's, packed, in chunks of one size."""
    fill = elements.pack_batch(elements.INET, elements.pack_fill("floor", "kept", connections))
    Path(case.path("set")).write_bytes(len(fill).to_bytes(4, sys.byteorder) + fill)

    def pack(outer: object, inner: object) -> bytes:
        return pack_entry(outer, inner, timeout=432_000, ports=False)

    flags = NLM_F_CREATE | NLM_F_EXCL
    batch, size = for_each(connections.toward(NEW), connections, NEW_ENTRY, flags, pack)
    chunk = (1 << 17) // size * size
    for at in (*range(chunk, len(batch), chunk), len(batch)):
        batch[at - size + 6] |= 4  # NLM_F_ACK for the last of each chunk
    Path(case.path("ct")).write_bytes(chunk.to_bytes(4, sys.byteorder) + batch)


FLOOR_TABLE = """table ip floor_nat {{
chain c {{ type nat hook prerouting priority -120; meta mark 7 dnat to 10.2.0.10
}}
}}
table inet floor {{
set kept {{ type ipv4_addr . inet_service . inet_service; size {size}; }}
}}
"""


def measure(case: Case, state: Path, number: int) -> None:
    """One round: each way once, and its undoing."""
    move = ("bench", f"--map={OLD}={NEW}", f"--site=destination={SITE}")
    case.time("start", sys.executable, "-I", "-S", "-c", "pass")
    natkeep = (str(NATKEEP), "-q")
    case.time(
        "natkeep prepare", *natkeep, "prepare", *move, f"--connections={case.path('list')}",
        state=state,
    )  # fmt: skip
    before = ruleset() if not number else None
    case.time("natkeep open", *natkeep, "open", "bench", state=state)
    if before is not None and not before < ruleset():
        raise SystemExit("open has deleted something")
    case.time("natkeep teardown", *natkeep, "teardown", "bench", "--yes", state=state)
    case.time("nft -f", *inside("nft", "-f", case.path("nft")))
    case.time("conntrack -R", *inside("conntrack", "-R", case.path("entries")))
    case.time("nft delete", *inside("nft", "delete", "table", "ip", "hand"))
    case.time("conntrack -D", *inside("conntrack", "-D", "-m", "7"))
    say("nft", "-f", write(case.path("table"), FLOOR_TABLE.format(size=case.count)))
    case.time(
        "floor",
        *inside(sys.executable, "-I", "-S", "-c", SENDER, case.path("set"), case.path("ct")),
    )
    if int(say("conntrack", "-C")) != case.count:
        raise SystemExit("the floor has not inserted its entries")
    clear()
    if not number or case.count <= ONE_BY_ONE:
        case.time("iptables-restore", *inside("iptables-restore", case.path("iptables")))
        clear()
    if case.count <= ONE_BY_ONE and number < 3:
        each = f"while read -r line; do conntrack $line || exit; done < {case.path('entries')}"
        case.time("conntrack -I", *inside("sh", "-c", each))
        clear()


def write(path: str, text: str) -> str:
    """The path of a file with *text*."""
    Path(path).write_text(text)
    return path


def clear() -> None:
    """The namespace is the bench's own: all of it may go."""
    say("nft", "flush", "ruleset")
    say("conntrack", "-F")


def ruleset() -> frozenset[str]:
    """All objects of the namespace with their handles, without the sets' elements."""
    return frozenset(say("nft", "-a", "-t", "list", "ruleset").splitlines())


def count_objects(case: Case, state: Path) -> int:
    """Sets, maps, chains and rules of one prepared move."""
    move = ("bench", f"--map={OLD}={NEW}", f"--site=destination={SITE}")
    run(str(NATKEEP), "-q", "prepare", *move, f"--connections={case.path('list')}", state=state)
    count = sum("# handle" in line for line in ruleset())
    run(str(NATKEEP), "-q", "teardown", "bench", "--yes", state=state)
    return count


@dataclass
class Gateway:
    """A gateway with many moves of a hundred connections each."""

    directory: Path
    moves: int
    first: float = 0
    last: float = 0
    status: float = 0

    def measure(self, rounds: int) -> None:
        """The first and the last prepare, and status of all; ms."""
        state = self.directory / "moves"
        self.first = statistics.median(self._prepare(0, state) for _ in range(rounds))
        lifecycle = Lifecycle(LinuxKernel(), StateDirectory(str(state), create=True))
        for number in range(1, self.moves):
            move, connections = self._move(number)
            lifecycle.prepare(move, connections)
        self.last = statistics.median(self._prepare(0, state) for _ in range(rounds))
        taken = [run(str(NATKEEP), "status", "--json", state=state)[0] for _ in range(3)]
        self.status = statistics.median(taken)

    def _move(self, number: int) -> tuple[Move, Connections]:
        old, new = (IPv4Address(base) + number for base in ("10.20.0.1", "10.30.0.1"))
        kept = make_connections(EACH).toward(old)
        return Move(f"m{number}", (Map(old, new),), (Site(Role.GATEWAY, GATEWAY),)), kept

    def _prepare(self, number: int, state: Path) -> float:
        move, connections = self._move(number)
        lines = "".join(f"{c.destination} {c.source}\n" for c in connections)
        path = write(str(self.directory / "move"), lines)
        taken, _ = run(
            str(NATKEEP), "-q", "prepare", move.id, f"--map={move.maps[0]}",
            f"--site=gateway={GATEWAY}", f"--connections={path}", state=state,
        )  # fmt: skip
        run(str(NATKEEP), "-q", "teardown", move.id, "--yes", state=state)
        return taken


Figure = tuple[str, float, float]  # what, reached, asked for at most


def compare(cases: dict[int, Case], objects: tuple[int, int], gateway: Gateway) -> list[Figure]:
    """Each figure asked for, beside the one reached."""
    one, some, most = cases[1], cases[1000], cases[max(cases)]
    n, m = f"{most.count:,} connections", f"{gateway.moves:,} moves"
    opened = most.median("natkeep open") / one.median("natkeep open")
    hand = ("nft -f", "conntrack -R")
    undo = ("nft delete", "conntrack -D")
    return [
        (f"{n}: prepare by the hand-made way", most.ratio(("natkeep prepare",), hand), 0.25),
        (f"{n}: prepare by the floor", most.ratio(("natkeep prepare",), ("floor",)), 1.75),
        (f"{n}: teardown by the hand-made way", most.ratio(("natkeep teardown",), undo), 0.5),
        (f"{n}: peak memory, MiB", most.kib / 1024, 150),
        (
            f"prepare, growth from 1,000 to {most.count:,}",
            most.median("natkeep prepare") / some.median("natkeep prepare"), 110,
        ),
        (f"{n}: sets, chains and rules by those of 1", objects[1] / objects[0], 1),
        (f"open of {n} by open of 1", opened, 1.2),
        ("1 connection: prepare by a bare start", one.ratio(("natkeep prepare",), ("start",)), 12),
        (f"{m}: the last prepare by the first", gateway.last / gateway.first, 1.5),
        (f"{m}: status of all, s", gateway.status / 1000, 1),
    ]  # fmt: skip


def print_times(cases: dict[int, Case]) -> None:
    """A table: a row a way, a column a number of connections."""
    names = list(dict.fromkeys(name for case in cases.values() for name in case.ms))
    print(f"{'ms, whole processes, medians':32}" + "".join(f"{n:>10,}" for n in cases))
    for name in names:
        row = (f"{c.median(name):10.1f}" if name in c.ms else f"{'':10}" for c in cases.values())
        print(f"{name:32}" + "".join(row))


@contextmanager
def namespaces() -> Iterator[None]:
    """A destination that has NEW and a route to the peers, and a gateway."""
    made: list[str] = []
    try:
        for name in (SITE, GATEWAY):
            subprocess.run(["ip", "netns", "add", name], check=True)
            made.append(name)
        lines = [
            "link set lo up", "link add eth0 type veth peer name eth1",
            f"address add {NEW}/24 dev eth0", "link set eth0 up", "link set eth1 up",
            "route add default via 10.3.0.1",
        ]  # fmt: skip
        text = "\n".join(lines)
        subprocess.run(["ip", "-n", SITE, "-batch", "-"], input=text, check=True, text=True)
        yield
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=True)


def main() -> int:
    """Measure, print, and say whether all holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="at most so many of each size")
    parser.add_argument("--most", type=int, default=max(SIZES), help="connections at most")
    parser.add_argument("--moves", type=int, default=1000, help="moves at one gateway")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was made goes then, too
    cases: dict[int, Case] = {}
    with namespaces(), tempfile.TemporaryDirectory(dir="/run", prefix=PREFIX) as name:
        directory = Path(name)
        state = directory / "state"
        for count in (size for size in SIZES if size <= args.most):
            case = cases[count] = Case(count, directory)
            print(f"{count} connections", file=sys.stderr)
            write_files(case)
            for number in range(min(ROUNDS[count], args.rounds or ROUNDS[count])):
                measure(case, state, number)
        objects = count_objects(cases[1], state), count_objects(cases[max(cases)], state)
        print(f"{args.moves} moves at one gateway", file=sys.stderr)
        gateway = Gateway(directory, args.moves)
        gateway.measure(args.rounds or 7)
    print_times(cases)
    figures = compare(cases, objects, gateway)
    print(f"\n{'':52}   reached     asked")
    for what, reached, asked in figures:
        print(f"{what:52} {reached:9.2f}  <= {asked:<6g} {'' if reached <= asked else 'NO'}")
    if args.json:
        write(args.json, to_json(cases, figures))
    return 0 if all(reached <= asked for _, reached, asked in figures) else 1


def to_json(cases: dict[int, Case], figures: list[Figure]) -> str:
    """The times of each round in ms by number of connections, and the figures."""
    times = {str(count): case.ms for count, case in cases.items()}
    rows = [
        {"what": what, "reached": reached, "asked": asked, "ok": reached <= asked}
        for what, reached, asked in figures
    ]
    return json.dumps({"schema": 1, "bench": "control", "ms": times, "figures": rows}, indent=1)


if __name__ == "__main__":
    sys.exit(main())
