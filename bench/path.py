"""the price of a packet: what kept connections, and other people's, cost on their way.

Usage, as root:  python -m bench.path [--rounds N] [--only WORD,…] [--json FILE]

    client ── gateway ── server        one such wire for each configuration of a group, all beside
                                       one another; some are plain routing

In a plain one the gateway routes OLD to the server; in a configured one it does not: what arrives
was translated. What is measured, bench/wire.py says. At a relay the gateway has OLD itself; where
the client's own host translates, the gateway routes.

A round is one short turn of each wire, in an order of its own, so that what else the machine does
meets all alike. Each figure is the median of the rounds' ratios, configured to plain (or to
conntrack only) of the same round. A second plain wire shows the noise: the middle half of its
ratios.

Each figure asked for is printed beside the one reached, and the exit code is 0 only if all hold.
All namespaces go with the bench.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from bench.figures import Figure, at_least, conclude, middle_half
from bench.namespaces import PREFIX, end_on_sigterm
from bench.wire import CLIENT, FAR, METRICS, MTU_OCTETS, NEW, OLD, PORT, Wire, measure, measure_bulk
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import inside, open_namespace
from natkeep.kernel.nftables import fill_sets
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.plan.base_chains import heard_set, spoken_set
from natkeep.plan.kept_sets import Filling
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.steps import Plan
from natkeep.plan.tuples import Connections
from natkeep.plan.via import Via
from natkeep.state.directory import StateDirectory

# ---- configurations ----------------------------------------------------------------------------


def plain(wire: Wire) -> Iterator[None]:
    yield


def conntrack_only(wire: Wire) -> Iterator[None]:
    chain = "chain c {\ntype filter hook prerouting priority 0;\nct state new\n}"
    text = f"table inet bench {{\n{chain}\n}}\n"
    for netns in (wire.g, wire.s):
        wire.run(netns, "nft", "-f", "-", text=text)
    yield


def one_prefix_rule(wire: Wire) -> Iterator[None]:
    at_gateway = (f"ip daddr {OLD} dnat to {NEW}", f"tcp sport {PORT} ip saddr {NEW} snat to {OLD}")
    at_server = (f"tcp dport {PORT} ip daddr {NEW} dnat to {OLD}", f"ip saddr {OLD} snat to {NEW}")
    for netns, (inbound, outbound) in ((wire.g, at_gateway), (wire.s, at_server)):
        chains = (
            f"chain in {{\ntype nat hook prerouting priority -100;\n{inbound}\n}}\n"
            f"chain out {{\ntype nat hook postrouting priority 100;\n{outbound}\n}}\n"
        )
        wire.run(netns, "nft", "-f", "-", text=f"table ip bench {{\n{chains}}}\n")
    wire.hide_old()
    yield


def many_iptables_rules(wire: Wire) -> Iterator[None]:
    rules = [f"-A PREROUTING -s {CLIENT} -d {OLD} -p tcp --sport {1 + n} --dport {PORT} "
             f"-j DNAT --to-destination {NEW}" for n in range(10_000)]  # fmt: skip
    port = wire.near.getsockname()[1]
    rules.append(rules[0].replace("--sport 1 ", f"--sport {port} "))
    wire.run(wire.g, "iptables-restore", text="\n".join(["*nat", *rules, "COMMIT", ""]))
    back = f"-A PREROUTING -d {NEW} -p tcp --dport {PORT} -j DNAT --to-destination {OLD}"
    wire.run(wire.s, "iptables-restore", text=f"*nat\n{back}\nCOMMIT\n")
    wire.hide_old()
    yield


def executor(
    mode: Mode, connections: int, moves: int, role: Role = Role.GATEWAY
) -> Callable[[Wire], Iterator[None]]:
    """natkeep at gateway and server: the live connection is the first of so many kept ones.

    The gateway has so many moves, each of an OLD and a NEW of its own; the server is one of them.
    role: the gateway may be a relay instead, or the client's own host a site.
    """

    def configure(wire: Wire) -> Iterator[None]:
        # In memory, as /run usually is: journals are fsynced, and a thousand moves have many.
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir="/dev/shm") as directory:
            executor = Executor(LinuxKernel(), StateDirectory(directory, create=True))
            first = Site(role, wire.c if role == Role.PEER else wire.g)
            server, vias = Site(Role.DESTINATION, wire.s), _be_relay(wire, role)
            plans = []
            for number in range(moves):
                old, new = (IPv4Address(first) + number * 256 for first in (OLD, NEW))
                sites = (first,) if number else (first, server)
                move = Move(f"m{number}", (Map(old, new),), sites, mode, hold=False, vias=vias)
                plans.append(prepare(executor, move, _kept(wire, old, connections, number)))
            for number in range(moves):
                open_move(executor, f"m{number}")
            _hear_all(wire, plans)
            executor.kernel.unhook_gates()  # as the program does after open
            wire.hide_old()
            yield  # what is left goes with the namespaces

    return configure


def _be_relay(wire: Wire, role: Role) -> tuple[Via, ...]:
    """What a relay passes on by, with ports for 30,000 connections; nothing for other roles."""
    if role != Role.RELAY:
        return ()
    wire.give_old()
    return (Via(IPv4Address(FAR), low=1024),)


def _hear_all(wire: Wire, plans: Sequence[Plan]) -> None:
    """As if every end had said something by now: only one of so many really is there."""
    [at_server] = [one for one in plans[0].translations if one.site.role == Role.DESTINATION]
    with inside(open_namespace(wire.s)):
        fill_sets([Filling(heard_set("m0", at_server.number), at_server.wire)])
    with inside(open_namespace(wire.g)):
        fill_sets(
            Filling(spoken_set(plan.move.id, one.number), one.kept)
            for plan in plans[1:]
            for one in plan.translations
        )


def _kept(wire: Wire, old: IPv4Address, count: int, number: int) -> Connections:
    """As many peers as it takes, from the live connection's port on; packed, 12 octets each."""
    live = wire.near.getsockname()[1] if not number else 1 + number % 60_000
    records = bytearray()
    for n in range(count):
        peer = IPv4Address(CLIENT) + (n // 60_000) * 256
        port = live if not n else 1 + n % 60_000 + (1 + n % 60_000 >= live)
        records += old.packed + PORT.to_bytes(2, "big") + peer.packed + port.to_bytes(2, "big")
    return Connections(v4=bytes(records))


@dataclass(frozen=True, slots=True)
class Configuration:
    """A way to have the connection's packets arrive, and how a wire is made to have it."""

    name: str
    configure: Callable[[Wire], Iterator[None]]


PLAIN, NOISE, TRACKED = (
    Configuration("plain", plain),
    Configuration("plain (the noise)", plain),
    Configuration("conntrack only", conntrack_only),
)
"""In every group, so that no ratio is between measurements of different minutes."""


def groups() -> list[list[Configuration]]:
    """What is measured beside one another: few at a time, for all tables are in one hash."""
    by_hand = [
        Configuration("one prefix rule", one_prefix_rule),
        Configuration("10,000 iptables rules", many_iptables_rules),
    ]
    ours = [
        [
            *(Configuration(f"natkeep {mode}, {count:,} connection{'s' * (count > 1)}",
                            executor(mode, count, 1)) for count in (1, 10_000, 100_000)),
            Configuration(f"natkeep {mode}, 1,000 moves", executor(mode, 1, 1000)),
        ]
        for mode in (Mode.STATEFUL, Mode.STATELESS)
    ]  # fmt: skip
    two_hosts = [
        Configuration(_name(role, count), executor(Mode.STATEFUL, count, 1, role))
        for role in TWO_HOSTS
        for count in (1, 30_000)
    ]
    return [[PLAIN, NOISE, TRACKED, *some] for some in (by_hand, *ours, two_hosts)]


TWO_HOSTS = {Role.RELAY: 1.6, Role.PEER: 1.25}
"""Where no gateway translates; a round trip is to take so many times as long as plain at most."""


def _name(role: Role, count: int) -> str:
    return f"natkeep at a {role}, {count:,} connection{'s' * (count > 1)}"


# ---- the run -----------------------------------------------------------------------------------

Values = dict[str, dict[str, list[float]]]
"""Of each configuration of a group each metric, a round each."""

_TURNS = {"bulk": 1, "bulk, MTU packets": 4, "exchange": 5, "newcomer": 2}
"""How many turns a round has: the more, the nearer its figures are to what is asked."""


def compare(configurations: Sequence[Configuration], rounds: int) -> Values:
    """All metrics of these configurations, measured beside one another."""
    values: Values = {one.name: {} for one in configurations}
    with ExitStack() as stack:
        wires = {}
        for number, one in enumerate(configurations):
            wires[one.name] = Wire(str(number), stack)
            stack.enter_context(contextmanager(one.configure)(wires[one.name]))
        with in_front() as processors:
            for metric in METRICS:
                for name, taken in take_turns(wires, metric, rounds, processors).items():
                    values[name][metric] = taken
    return values


def take_turns(
    wires: dict[str, Wire], metric: str, rounds: int, processors: Sequence[int]
) -> dict[str, list[float]]:
    """The metric of each wire, some turns a round, each time in another order."""
    taken: dict[str, list[float]] = {name: [] for name in wires}
    with ExitStack() as stack:
        if metric == "bulk, MTU packets":
            for wire in wires.values():
                stack.enter_context(wire.whole_packets())
        for turn in range(rounds * _TURNS[metric] + 1):
            for name in random.sample(list(wires), len(wires)):
                value = measure(wires[name], metric, processors)
                if turn:  # the first warms up
                    taken[name].append(value)
    return taken


@contextmanager
def in_front() -> Iterator[list[int]]:
    """In front of whatever else the machine does, which is half the noise; the processors."""
    before = os.sched_getaffinity(0)
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(30))
    try:
        yield sorted(before, reverse=True)
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        os.sched_setaffinity(0, before)


def ratios(values: Values, name: str, base: str, metric: str) -> list[float]:
    """A ratio a turn."""
    pairs = zip(values[name][metric], values[base][metric], strict=True)
    return [ours / others for ours, others in pairs]


def count_instructions(configuration: Configuration) -> float | None:
    """Kernel instructions for each MTU packet of a bulk transfer; None where perf counts none."""
    if not (shutil.which("perf") and _count(lambda: None)):
        return None
    with ExitStack() as stack:
        wire = Wire("i", stack)
        with contextmanager(configuration.configure)(wire), wire.whole_packets():
            counted = _count(lambda: measure_bulk(wire, MTU_OCTETS, 0))
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
    """The figures to reach."""
    found = []
    for mode, least in ((Mode.STATEFUL, 0.93), (Mode.STATELESS, 0.97)):
        one, many = f"natkeep {mode}, 1 connection", f"natkeep {mode}, 100,000 connections"
        found.append(Asked(one, "bulk, MTU packets", TRACKED.name, least))
        found.append(Asked(many, "bulk, MTU packets", one, 0.95))
        for name in (one, many, f"natkeep {mode}, 1,000 moves"):
            found.append(Asked(name, "exchange", PLAIN.name, 1 / 1.10))
            found.append(Asked(name, "newcomer", PLAIN.name, 1 / 1.15))
    for role, most in TWO_HOSTS.items():
        one, many = _name(role, 1), _name(role, 30_000)
        found.append(Asked(one, "exchange", PLAIN.name, 1 / most))
        found.append(Asked(many, "exchange", one, 1 / 1.05))
    return found


def compare_with_asked(values: Values) -> list[Figure]:
    """The figures of those configurations of a group that were measured."""
    found = []
    for each in asked():
        if each.name not in values or each.base not in values:
            continue
        what = f"{each.name}: {each.metric} / {each.base}"
        reached = statistics.median(ratios(values, each.name, each.base, each.metric))
        noise = middle_half(ratios(values, NOISE.name, PLAIN.name, each.metric))
        found.append(at_least(what, reached, each.least, noise))
    return found


def collect(measured: Sequence[Values]) -> Values:
    """All ratios to plain; of what is in several groups, those of all."""
    found: Values = {}
    for values in measured:
        for name in values:
            for metric in METRICS if name != PLAIN.name else ():
                taken = ratios(values, name, PLAIN.name, metric)
                found.setdefault(name, {}).setdefault(metric, []).extend(taken)
    return found


def print_ratios(values: Values) -> None:
    """A line a configuration."""
    title = "ratios to plain, median [the middle half]"
    print(f"{title:42} {'  '.join(f'{metric:>17}' for metric in METRICS)}")
    for name in values:
        told = []
        for metric in METRICS if name != PLAIN.name else ():
            taken = ratios(values, name, PLAIN.name, metric)
            low, high = middle_half(taken)
            told.append(f"{statistics.median(taken):.2f} [{low:.2f}-{high:.2f}]")
        if told:
            print(f"{name:42} {'  '.join(f'{each:>17}' for each in told)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--only", default="", metavar="WORD,…", help="with one of these in their name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    end_on_sigterm()
    figures: list[Figure] = []
    measured: list[Values] = []
    instructions = {}
    for group in groups():
        some = [one for one in group if is_wanted(one, args.only)]
        if {one.name for one in some} <= {PLAIN.name, NOISE.name, TRACKED.name} and measured:
            continue
        print(", ".join(one.name for one in some), file=sys.stderr)
        measured.append(compare(some, args.rounds))
        print_ratios(measured[-1])
        figures += compare_with_asked(measured[-1])
        instructions.update({one.name: count_instructions(one) for one in some})
    for name, counted in instructions.items():
        if counted is not None:
            print(f"{name:40} {counted:9,.0f} kernel instructions a packet, both ends included")
    raw = {"ratios": collect(measured), "instructions": instructions}
    return conclude("path", figures, raw, args.json)


def is_wanted(one: Configuration, only: str) -> bool:
    """Plain always; without it nothing is a ratio."""
    return one.configure is plain or any(word in one.name for word in only.split(","))


if __name__ == "__main__":
    sys.exit(main())
