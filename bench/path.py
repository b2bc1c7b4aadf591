"""the price of a packet: what kept connections, and other people's, cost on their way.

Usage, as root:  python -m bench.path [--rounds N] [--only WORD,…] [--json FILE]

    client ── gateway ── server        two such wires: one is always plain, the other has the
                                       configuration, and both are measured in turn

In a plain one the gateway routes OLD to the server; in a configured one it does not: what arrives
was translated. What is measured, bench/wire.py says.

Each figure is the median of the rounds' ratios, configured to plain of the same round; the first
configuration is plain as well, so what it shows is the noise. Each figure asked for is printed
beside the one reached, and the exit code is 0 only if all hold. All namespaces go with the bench.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from bench.figures import Figure, at_least, conclude
from bench.namespaces import PREFIX, end_on_sigterm
from bench.wire import CLIENT, METRICS, MTU_OCTETS, NEW, OLD, PORT, Wire, measure, measure_bulk
from natkeep.journal import StateDirectory
from natkeep.kernel.linux import LinuxKernel
from natkeep.lifecycle.verbs import Lifecycle
from natkeep.plan.drift import Gate
from natkeep.plan.move import Map, Mode, Move, Role, Site
from natkeep.plan.tuples import Connections

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


def natkeep(mode: Mode, connections: int, moves: int) -> Callable[[Wire], Iterator[None]]:
    """natkeep at gateway and server: the live connection is the first of so many kept ones.

    The gateway has so many moves, each of an OLD and a NEW of its own; the server is one of them.
    """

    def configure(wire: Wire) -> Iterator[None]:
        # In memory, as /run usually is: journals are fsynced, and a thousand moves have many.
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir="/dev/shm") as directory:
            lifecycle = Lifecycle(LinuxKernel(), StateDirectory(directory, create=True))
            gateway, server = Site(Role.GATEWAY, wire.g), Site(Role.DESTINATION, wire.s)
            for number in range(moves):
                old, new = (IPv4Address(first) + number * 256 for first in (OLD, NEW))
                sites = (gateway,) if number else (gateway, server)
                move = Move(f"m{number}", (Map(old, new),), sites, mode)
                lifecycle.prepare(move, _kept(wire, old, connections, number), Gate.OPEN)
            wire.hide_old()
            yield  # what is left goes with the namespaces

    return configure


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
        bare, other = Wire("a", stack), Wire("b", stack)
        with contextmanager(configuration.configure)(other):
            for number in range(rounds + 1):
                pair = [measure(wire) for wire in ((bare, other), (other, bare))[number % 2]]
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
        wire = Wire("i", stack)
        with contextmanager(configuration.configure)(wire), wire.whole_packets():
            counted = _count(lambda: measure_bulk(wire, MTU_OCTETS))
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


def compare_with_asked(taken: dict[str, dict[str, list[float]]]) -> list[Figure]:
    """The figures of the configurations that were measured."""
    medians = {name: {metric: statistics.median(values) for metric, values in ratios.items()}
               for name, ratios in taken.items()}  # fmt: skip
    noise = taken["plain (the noise)"]
    found = []
    for each in asked():
        if each.name not in medians or (each.base and each.base not in medians):
            continue
        base = medians[each.base][each.metric] if each.base else 1.0
        what = f"{each.name}: {each.metric} / {each.base or 'plain'}"
        band = min(noise[each.metric]), max(noise[each.metric])
        found.append(at_least(what, medians[each.name][each.metric] / base, each.least, band))
    return found


def print_ratios(taken: dict[str, dict[str, list[float]]]) -> None:
    """A line a configuration."""
    title = "ratios to plain, median [least-most]"
    print(f"{title:40} {'  '.join(f'{metric:>17}' for metric in METRICS)}")
    for name, ratios in taken.items():
        told = (
            f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"
            for values in (ratios[metric] for metric in METRICS)
        )
        print(f"{name:40} {'  '.join(f'{each:>17}' for each in told)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--only", default="", metavar="WORD,…", help="with one of these in their name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    end_on_sigterm()
    with suppress(OSError):  # in front of whatever else the machine does, which is half the noise
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(30))
    taken, instructions = {}, {}
    for configuration in configurations():
        wanted = any(word in configuration.name for word in args.only.split(","))
        if not wanted and configuration.configure is not plain:
            continue
        print(configuration.name, file=sys.stderr)
        taken[configuration.name] = compare(configuration, args.rounds)
        instructions[configuration.name] = count_instructions(configuration)
    print_ratios(taken)
    for name, counted in instructions.items():
        if counted is not None:
            print(f"{name:40} {counted:9,.0f} kernel instructions a packet, both ends included")
    raw = {"ratios": taken, "instructions": instructions}
    return conclude("path", compare_with_asked(taken), raw, args.json)


if __name__ == "__main__":
    sys.exit(main())
