"""the price of prepare, open and teardown, beside what a careful person would do by hand.

Usage, as root:  python -m bench.control [--rounds N] [--most N] [--moves N] [--json FILE]

Whole processes, from their start to their end, at one destination: natkeep; `nft -f` of maps of all
connections and `conntrack -R` of a file, the best way by hand; `iptables-restore` of two rules a
connection; `conntrack -I`, a process each; and the floor, batches of raw netlink that were packed
beforehand, sent by a bare interpreter (it fills the set and inserts the entries, and does nothing
else). All ways take turns within each round, so that what else the machine does meets them alike; a
ratio is the median of the rounds' ratios, a time the median of the times.

Then 30,000 connections at a gateway and at a relay, in turn, and a gateway that has a thousand
moves. Each figure asked for is printed beside the one reached, and the exit code is 0 only if all
hold. Everything happens in network namespaces and a state directory that go with the bench.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from bench.by_hand import FLOOR_TABLE, NEW, OLD, SENDER, make_connections, write_files
from bench.figures import Figure, at_most, conclude
from bench.namespaces import PREFIX, destination, end_on_sigterm, namespace
from natkeep.kernel.linux import LinuxKernel
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.prepare import prepare
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections
from natkeep.state.directory import StateDirectory

NATKEEP = Path(sys.executable).parent / "natkeep"
NAME = f"{PREFIX}{os.getpid()}"
SITE, GATEWAY, RELAY = f"{NAME}-d", f"{NAME}-g", f"{NAME}-r"
SIZES = (1, 100, 1000, 10_000, 100_000)
ROUNDS = {1: 15, 100: 9, 1000: 9, 10_000: 5, 100_000: 5}
ONE_BY_ONE = 1000  # entries that `conntrack -I` is started for
RELAYED = 30_000
BEYOND = "10.30.0.1"  # the NEW of these: the relay has that of the others as its own address
EACH = 100  # connections of each of a gateway's moves


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
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # or what was edited is compiled each time
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


def write_apart(case: Case) -> None:
    """Write what each way reads, in another process.

    A program that is started has as its greatest memory at least what its starter has had.
    """
    pid = os.fork()
    if not pid:
        try:
            write_files(make_connections(case.count), case.path)
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("the files could not be written")


def measure(case: Case, state: Path, number: int) -> None:
    """One round: each way once, and its undoing."""
    move = ("bench", f"--map={OLD}={NEW}", f"--site=destination={SITE}")
    case.time("start", sys.executable, "-I", "-S", "-c", "pass")
    executor = (str(NATKEEP), "-q")
    case.time(
        "natkeep prepare", *executor, "prepare", *move, f"--connections={case.path('list')}",
        state=state,
    )  # fmt: skip
    before = ruleset() if not number else None
    case.time("natkeep open", *executor, "open", "bench", state=state)
    if before is not None and not before < ruleset():
        raise SystemExit("open has deleted something")
    case.time("natkeep teardown", *executor, "teardown", "bench", "--yes", state=state)
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


def measure_relay(case: Case, state: Path, rounds: int) -> None:
    """The same connections at a gateway and at a relay, one after the other in one namespace.

    Before it is a relay it forwards nothing, as a source does; a gateway forwards.
    """
    move = (f"--map={OLD}={BEYOND}", f"--connections={case.path('list')}")
    write_apart(case)
    for _ in range(rounds):
        for role, forwards, *via in (("gateway", 1), ("relay", 0, f"--via={NEW}:1024-32767")):
            setting = f"net.ipv4.ip_forward={forwards}"
            run("nsenter", f"--net=/run/netns/{RELAY}", "sysctl", "-qw", setting)
            case.time(
                f"natkeep prepare, {role}", str(NATKEEP), "-q", "prepare", "bench", *move,
                f"--site={role}={RELAY}", *via, state=state,
            )  # fmt: skip
            run(str(NATKEEP), "-q", "teardown", "bench", "--yes", state=state)


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
        state, more = self.directory / "moves", 3 * rounds  # a minute lies between the two
        self.first = statistics.median(self._prepare(0, state) for _ in range(more))
        executor = Executor(LinuxKernel(), StateDirectory(str(state), create=True))
        for number in range(1, self.moves):
            move, connections = self._move(number)
            prepare(executor, move, connections)
        self.last = statistics.median(self._prepare(0, state) for _ in range(more))
        taken = [run(str(NATKEEP), "status", "--json", state=state)[0] for _ in range(rounds)]
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


def compare(
    cases: dict[int, Case], objects: tuple[int, int], relay: Case, gateway: Gateway
) -> list[Figure]:
    """Each figure asked for, beside the one reached."""
    one, some, most = cases[1], cases[1000], cases[max(cases)]
    n, m = f"{most.count:,} connections", f"{gateway.moves:,} moves"
    opened = most.median("natkeep open") / one.median("natkeep open")
    hand = ("nft -f", "conntrack -R")
    undo = ("nft delete", "conntrack -D")
    return [
        at_most(f"{n}: prepare by the hand-made way", most.ratio(("natkeep prepare",), hand), 0.25),
        at_most(f"{n}: prepare by the floor", most.ratio(("natkeep prepare",), ("floor",)), 1.75),
        at_most(
            f"{n}: teardown by the hand-made way", most.ratio(("natkeep teardown",), undo), 0.5
        ),
        at_most(f"{n}: peak memory, MiB", most.kib / 1024, 150),
        at_most(
            f"prepare, growth from 1,000 to {most.count:,}",
            most.median("natkeep prepare") / some.median("natkeep prepare"), 110,
        ),
        at_most(f"{n}: sets, chains and rules by those of 1", objects[1] / objects[0], 1),
        at_most(f"open of {n} by open of 1", opened, 1.2),
        at_most(
            "1 connection: prepare by a bare start", one.ratio(("natkeep prepare",), ("start",)), 12
        ),
        at_most(
            f"{relay.count:,} connections: prepare at a relay by that at a gateway",
            relay.ratio(("natkeep prepare, relay",), ("natkeep prepare, gateway",)), 2,
        ),
        at_most(f"{m}: the last prepare by the first", gateway.last / gateway.first, 2),
        at_most(f"{m}: status of all, s", gateway.status / 1000, 2),
    ]  # fmt: skip


def print_times(cases: dict[int, Case]) -> None:
    """A table: a row a way, a column a number of connections."""
    names = list(dict.fromkeys(name for case in cases.values() for name in case.ms))
    print(f"{'ms, whole processes, medians':32}" + "".join(f"{n:>10,}" for n in cases))
    for name in names:
        row = (f"{c.median(name):10.1f}" if name in c.ms else f"{'':10}" for c in cases.values())
        print(f"{name:32}" + "".join(row))


def main() -> int:
    """Measure, print, and say whether all holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="at most so many of each size")
    parser.add_argument("--most", type=int, default=max(SIZES), help="connections at most")
    parser.add_argument("--moves", type=int, default=1000, help="moves at one gateway")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    end_on_sigterm()
    cases: dict[int, Case] = {}
    with (
        tempfile.TemporaryDirectory(dir="/run", prefix=NAME) as name,
        destination(SITE),
        namespace(GATEWAY),
        destination(RELAY),
    ):
        directory = Path(name)
        state = directory / "state"
        for count in (size for size in SIZES if size <= args.most):
            case = cases[count] = Case(count, directory)
            print(f"{count} connections", file=sys.stderr)
            write_apart(case)
            for number in range(min(ROUNDS[count], args.rounds or ROUNDS[count])):
                measure(case, state, number)
        objects = count_objects(cases[1], state), count_objects(cases[max(cases)], state)
        relay = Case(min(RELAYED, args.most), directory)
        print(f"{relay.count} connections at a relay", file=sys.stderr)
        measure_relay(relay, state, args.rounds or 7)
        print(f"{args.moves} moves at one gateway", file=sys.stderr)
        gateway = Gateway(directory, args.moves)
        gateway.measure(args.rounds or 7)
    print_times(cases)
    figures = compare(cases, objects, relay, gateway)
    return conclude("control", figures, to_raw(cases, relay, gateway), args.json)


def to_raw(cases: dict[int, Case], relay: Case, gateway: Gateway) -> dict[str, object]:
    """By number of connections the times of each round and the memory; at a relay; at a gateway."""
    return {
        "ms": {str(count): case.ms for count, case in cases.items()},
        "natkeep_kib": {str(count): case.kib for count, case in cases.items()},
        "relay": {"connections": relay.count, "ms": relay.ms},
        "gateway": {
            "moves": gateway.moves, "first_ms": gateway.first, "last_ms": gateway.last,
            "status_ms": gateway.status,
        },
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
