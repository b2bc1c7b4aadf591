"""the fleet: moves ordered by three members of etcd on loopback, and followed by agents.

Usage, as root:  python -m bench.fleet [--moves N] [--agents N] [--rounds N] [--json FILE]

    one gateway    an agent has so many moves of ten connections ordered at once: until all are
                   prepared and told, its memory, and until all are undone; each a whole process
    ready          a move from its order to `ready`, by two agents that wait: a destination and a
                   gateway in namespaces of their own, and a source
    many agents    processes on the fake kernel (tests/fake_kernel.py), and as many wants as one
                   gateway has moves, shared among them: from the order until the last is told

Everything happens in network namespaces and a directory in memory that go with the bench.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import IPv4Address
from pathlib import Path
from typing import NoReturn

from bench.etcd_cluster import Cluster, die_with_us
from bench.figures import Figure, at_most, conclude
from bench.namespaces import (
    PREFIX,
    destination,
    end_children,
    end_on_sigterm,
    namespace,
    remove_left_by,
)
from natkeep.checkpoint.listing import parse_listing
from natkeep.errors import UnreachableError
from natkeep.fleet import apply as orders
from natkeep.fleet import keys, progress
from natkeep.fleet.agent import Agent
from natkeep.fleet.listing import cut
from natkeep.fleet.order import parse_file
from natkeep.fleet.store import Item, Store
from natkeep.fleet.stores import open_store
from natkeep.fleet.wake import Wake
from natkeep.fleet.want import NO_WANT, Phase, parse_maps
from natkeep.lifecycle.executor import Executor
from natkeep.policy import Agent as Bounds
from natkeep.state.directory import StateDirectory
from natkeep.values import replace

NATKEEP = Path(sys.executable).parent / "natkeep"
NAME = f"{PREFIX}{os.getpid()}"
CONNECTIONS = 10
TOGETHER = 50  # moves of one transaction, of two keys each
PATIENCE = 600.0  # s
ORDER = """{"id": "ready", "maps": ["10.2.0.10=10.3.0.20"], "connections": "list", "deadline_s": 0,
"sites": [{"node": "host-b", "role": "destination", "netns": "%s-d"},
          {"group": "edge", "role": "gateway", "netns": "%s-g"},
          {"node": "host-a", "role": "source", "netns": "%s-s"}]}"""
FORWARDS = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")


# ---- orders --------------------------------------------------------------------------------------


def write_wants(store: Store, folders: Mapping[str, range], netns: str, generation: int) -> None:
    """Order the moves of these numbers in each folder: to be ready, or by the second order gone."""
    for folder, numbers in folders.items():
        for start in range(numbers.start, numbers.stop, TOGETHER):
            puts: dict[str, str | None] = {}
            for number in range(start, min(start + TOGETHER, numbers.stop)):
                puts |= _make_want(folder, number, netns, generation)
            _write(store, puts)


def _write(store: Store, puts: Mapping[str, str | None]) -> None:
    """A member that shares two processors with a hundred agents may be late."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        with suppress(UnreachableError):
            store.txn(puts)
            return
    raise SystemExit("etcd does not answer")


def _make_want(folder: str, number: int, netns: str, generation: int) -> dict[str, str]:
    old, new = IPv4Address("10.64.0.1") + number, IPv4Address("10.96.0.1") + number
    lines = (f"{old}:5000 10.1.0.{n + 2}:{40000 + n}\n" for n in range(CONNECTIONS))
    listed, pieces = cut(f"m{number}", generation, "".join(lines), CONNECTIONS)
    want = replace(
        NO_WANT, generation=generation, wanted=generation == 1, netns=netns, force=True,
        maps=tuple(parse_maps([f"{old}={new}"])), listed=listed,
    )  # fmt: skip
    return {**pieces, f"{folder}m{number}": json.dumps(want.to_json())}


def wait_alive(store: Store, count: int) -> None:
    """Until so many agents live."""

    def do_live() -> bool:
        with suppress(UnreachableError):
            return sum(key.endswith("/alive") for key in store.range(keys.NODES).items) >= count
        return False

    wait_until(f"{count} agents live", do_live, every=0.05)


def wait_until(what: str, reached: Callable[[], bool], every: float) -> None:
    """Look every so many seconds; SystemExit if it does not come to that."""
    until = time.monotonic() + PATIENCE
    while not reached():
        if time.monotonic() > until:
            raise SystemExit(f"not within {PATIENCE:.0f} s: {what}")
        time.sleep(every)


def wait_told(store: Store, nodes: Mapping[str, range], phase: Phase) -> None:
    """Until each node has said of all its moves that they are so far."""
    until = time.monotonic() + PATIENCE
    for node, numbers in nodes.items():
        while time.monotonic() < until:
            told: Iterable[Item] = ()
            with suppress(UnreachableError):
                told = store.range(keys.dones(node)).items.values()
            if sum(f'"phase": "{phase}"' in each.value for each in told) >= len(numbers):
                break
            time.sleep(0.05)
        else:
            raise SystemExit(f"{node} has not told {len(numbers)} times {phase}")


# ---- one gateway ---------------------------------------------------------------------------------


def fill_gateway(store: Store, name: str, state: Path, moves: int) -> tuple[float, float, float]:
    """Seconds until all are prepared, MiB that it took, seconds until all are undone."""
    with namespace(f"{NAME}-g") as netns:
        subprocess.run(["nsenter", f"--net=/run/netns/{netns}", "sysctl", "-qw", *FORWARDS])
        taken = []
        for generation, phase in ((1, Phase.OPEN), (2, Phase.GONE)):
            write_wants(store, {keys.wants("gw"): range(moves)}, netns, generation)
            taken.append(_run_agent(name, state))
            wait_told(store, {"gw": range(moves)}, phase)
        for prefix in (keys.node("gw"), f"{keys.TOP}conn/"):
            store.delete(prefix)
    (prepared, mib), (undone, _) = taken
    return prepared, mib, undone


def _run_agent(name: str, state: Path) -> tuple[float, float]:
    """Seconds and MiB of an agent that follows what is ordered, and ends."""
    began = time.monotonic()
    process = subprocess.Popen(
        [NATKEEP, "-q", "agent", "--once", "--node=gw", f"--store={name}", f"--state-dir={state}"],
        preexec_fn=die_with_us,
    )
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"the agent exited {process.returncode}")
    return time.monotonic() - began, used.ru_maxrss / 1024


# ---- ready ---------------------------------------------------------------------------------------


@contextmanager
def agents(name: str, directory: Path) -> Iterator[None]:
    """Those of three sites, until the block ends."""
    with ExitStack() as stack:
        stack.enter_context(destination(f"{NAME}-d"))
        for site in "gs":
            netns = stack.enter_context(namespace(f"{NAME}-{site}"))
            subprocess.run(["nsenter", f"--net=/run/netns/{netns}", "sysctl", "-qw", *FORWARDS])
        for node, *more in (("host-b",), ("gw", "--group=edge"), ("host-a",)):
            words = (f"--node={node}", f"--store={name}", f"--state-dir={directory / node}", *more)
            process = subprocess.Popen([NATKEEP, "-q", "agent", *words], preexec_fn=die_with_us)
            stack.callback(process.wait)
            stack.callback(process.kill)
        yield


def measure_ready(store: Store, rounds: int) -> list[float]:
    """Milliseconds from the order to `ready`, each time."""
    order, _ = parse_file(ORDER % (NAME, NAME, NAME))
    lines = (f"10.2.0.10:5000 10.1.0.2:{40000 + n}\n" for n in range(CONNECTIONS))
    checkpoint = parse_listing("".join(lines), "list")

    def has_come_to(goal: str) -> bool:
        return not progress.look(store, order.id).lacking(goal)

    wait_alive(store, 3)
    taken = []
    for _ in range(rounds):
        began = time.monotonic()
        orders.apply(store, order, checkpoint)
        wait_until("all is ready", lambda: has_come_to("ready"), every=0.002)
        taken.append((time.monotonic() - began) * 1000)
        orders.end(store, order.id, force=True)
        wait_until("all is undone", lambda: has_come_to("settled"), every=0.05)
        time.sleep(1)  # what only makes packets quicker is done by then
    return taken


# ---- many agents ---------------------------------------------------------------------------------


def tell_by_many(store: Store, name: str, directory: Path, count: int, moves: int) -> float:
    """Seconds from the first order until the last of all moves is told."""
    shares = {f"n{n}": range(moves * n // count, moves * (n + 1) // count) for n in range(count)}
    children = [_fork_agent(node, name, directory / node) for node in shares]
    try:
        wait_alive(store, count)
        began = time.monotonic()
        write_wants(store, {keys.wants(node): some for node, some in shares.items()}, "gw", 1)
        wait_told(store, shares, Phase.OPEN)
        return time.monotonic() - began
    finally:
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _fork_agent(node: str, name: str, state: Path) -> int:
    pid = os.fork()
    if not pid:
        try:
            _be_agent(node, name, state)
        finally:
            os._exit(1)
    return pid


def _be_agent(node: str, name: str, state: Path) -> NoReturn:
    from fake_kernel import FakeKernel  # type: ignore[import-not-found]  # of tests/

    die_with_us()
    os.nice(10)  # the store is elsewhere, in a fleet
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    store, kernel = open_store(name, Bounds()), FakeKernel()
    wake = Wake(store)

    def executor() -> Executor:
        return Executor(kernel, StateDirectory(str(state), create=True))

    def follow(_: Agent, prefix: str) -> None:
        wake.follow(prefix)

    one = Agent(Bounds(node=node), store, executor, follow, lambda line: None)
    wake.stay_alive(node, one.describe_alive)
    one.run(wake)


# ---- all -----------------------------------------------------------------------------------------


def main() -> int:
    """Measure, print, and say whether all holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moves", type=int, default=10_000, help="at one gateway, and in all")
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15, help="of the way to ready")
    parser.add_argument("--only", choices=("agents", "ready", "gateway"), help="one of the three")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args()
    end_on_sigterm()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    # In memory, as /run usually is: a move's journal is fsynced before and after each step.
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix=NAME) as folder, ExitStack() as stack:
        directory = Path(folder)
        stack.callback(remove_left_by, os.getpid())
        stack.callback(end_children)
        cluster = Cluster(directory)
        stack.callback(cluster.close)
        cluster.wait()
        gc.freeze()  # forked agents share it
        store = open_store(cluster.store, Bounds())
        stack.callback(store.close)
        told, ready, gateway = math.nan, [math.nan], (math.nan,) * 3
        if args.only in (None, "agents"):
            told = tell_by_many(store, cluster.store, directory, args.agents, args.moves)
            for prefix in (keys.NODES, f"{keys.TOP}conn/"):
                store.delete(prefix)
        if args.only in (None, "ready"):
            with agents(cluster.store, directory):
                ready = measure_ready(store, args.rounds)
        if args.only in (None, "gateway"):
            gateway = fill_gateway(store, cluster.store, directory / "gateway", args.moves)
    figures = compare(args.moves, args.agents, gateway, ready, told)
    raw = {"ready_ms": ready, "gateway": gateway, "told_s": told}
    return conclude("fleet", figures, raw, args.json)


def compare(
    moves: int, count: int, gateway: tuple[float, float, float], ready: list[float], told: float
) -> list[Figure]:
    """Each figure asked for, beside the one reached; of what was left out there is none."""
    prepared, mib, undone = gateway
    figures = [
        at_most(f"{moves:,} moves at one gateway: prepared and told, s", prepared, 60),
        at_most(f"{moves:,} moves at one gateway: undone and told, s", undone, 60),
        at_most(f"{moves:,} moves at one gateway: memory of the agent, MiB", mib, 300),
        at_most("ordered to all ready, median, ms", statistics.median(ready), 150),
        at_most(f"{count} agents, {moves:,} wants: all told, s", told, 120),
    ]
    return [figure for figure in figures if not math.isnan(figure.reached)]


if __name__ == "__main__":
    sys.exit(main())
