"""the price of a million kept connections at one gateway: time, natkeep's memory, the kernel's.

Usage, as root:  python -m bench.million [--connections N] [--moves N] [--json FILE]

Prepared, opened, asked about and torn down: first in one move; where the connection table is too
small for that (nf_conntrack_max holds for each namespace, and only the host's first may raise it),
in several moves, each at a gateway namespace of its own. No part of `make bench`, which has no
figure to reach here. What the kernel took is the growth of all slabs and of vmalloc meanwhile, so
nobody else should do much.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path

from bench.by_hand import NEW, OLD, PORT
from bench.figures import to_json
from bench.namespaces import PREFIX, end_on_sigterm, namespace

NATKEEP = Path(sys.executable).with_name("natkeep")
EACH = 60_000  # connections of one peer


@dataclass
class Verb:
    """What one verb took, of all moves together; the memory of natkeep is the most of any."""

    name: str
    seconds: float = 0
    processor: float = 0
    natkeep_mib: float = 0
    kernel_mib: dict[str, float] = field(default_factory=dict)


class RefusedError(Exception):
    """natkeep, or the kernel, would not."""


def write_list(path: Path, count: int) -> None:
    """The connections, as `--connections` reads them; never all of them in this process's memory.

    A program that is started has as its greatest memory at least the starter's.
    """
    with path.open("w") as file:
        for n in range(count):
            peer = IPv4Address("10.1.0.1") + n // EACH
            file.write(f"{OLD}:{PORT} {peer}:{1024 + n % EACH}\n")


def read_kernel_memory() -> dict[str, float]:
    """MiB in slabs, each kind's, and in vmalloc."""
    found = {}
    for line in Path("/proc/slabinfo").read_text().splitlines()[2:]:
        name, _, objects, size = line.split()[:4]
        found[name] = int(objects) * int(size) / (1 << 20)
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value = line.split()[:2]
        if name in ("Slab:", "VmallocUsed:"):
            found[name.rstrip(":")] = int(value) / 1024
    return found


def measure(name: str, commands: list[list[str]], state: Path) -> Verb:
    """*commands*, one after the other; RefusedError with what the first one said that failed."""
    verb, before = Verb(name), read_kernel_memory()
    environment = {**os.environ, "NATKEEP_STATE_DIR": str(state)}
    for command in commands:
        began = time.monotonic()
        process = subprocess.Popen(
            [NATKEEP, "-q", *command], env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr
        said = process.stderr.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RefusedError(f"exit {process.returncode}: {said.strip()}")
        verb.seconds += time.monotonic() - began
        verb.processor += used.ru_utime + used.ru_stime
        verb.natkeep_mib = max(verb.natkeep_mib, used.ru_maxrss / 1024)
    after = read_kernel_memory()
    grown = {key: after[key] - before.get(key, 0) for key in after}
    verb.kernel_mib = {key: value for key, value in grown.items() if abs(value) >= 2}
    return verb


def run(connections: int, moves: int) -> list[Verb]:
    """All verbs of so many moves, each at a gateway of its own; RefusedError if one cannot be."""
    with ExitStack() as stack:
        # In memory, as /run usually is: journals are fsynced.
        memory = tempfile.TemporaryDirectory(prefix=PREFIX, dir="/dev/shm")
        directory = Path(stack.enter_context(memory))
        sites = [
            stack.enter_context(namespace(f"{PREFIX}{os.getpid()}-{number}"))
            for number in range(moves)
        ]
        write_list(directory / "list", connections // moves)
        prepares = [
            ["prepare", f"m{number}", f"--map={OLD}={NEW}", f"--site=gateway={site}",
             f"--connections={directory / 'list'}"]
            for number, site in enumerate(sites)
        ]  # fmt: skip
        ids = [f"m{number}" for number in range(moves)]
        state = directory / "state"
        return [
            measure("prepare", prepares, state),
            measure("open", [["open", id_] for id_ in ids], state),
            measure("status", [["status", id_] for id_ in ids], state),
            measure("teardown", [["teardown", id_, "--yes"] for id_ in ids], state),
        ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--connections", type=int, default=1_000_000)
    parser.add_argument("--moves", type=int, default=10, help="so many, where one is refused")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    end_on_sigterm()
    refused = ""
    for moves in (1, args.moves):
        print(f"{args.connections:,} connections in {moves} move{'s' * (moves > 1)}")
        try:
            verbs = run(args.connections, moves)
            break
        except RefusedError as error:
            refused = str(error)
            print(refused)
    else:
        return 1
    print(f"\n{'':10} {'s':>7} {'processor':>9} {'natkeep, MiB':>13}  the kernel, MiB")
    for verb in verbs:
        grown = ", ".join(f"{key} {value:+.0f}" for key, value in verb.kernel_mib.items())
        print(f"{verb.name:10} {verb.seconds:7.2f} {verb.processor:9.2f} {verb.natkeep_mib:13.0f}  "
              f"{grown}")  # fmt: skip
    if args.json:
        raw = {
            "connections": args.connections, "moves": moves, "refused": refused,
            "verbs": [{"name": v.name, "s": v.seconds, "processor_s": v.processor,
                       "natkeep_mib": v.natkeep_mib, "kernel_mib": v.kernel_mib} for v in verbs],
        }  # fmt: skip
        args.json.write_text(to_json("million", [], raw))
    return 0


if __name__ == "__main__":
    sys.exit(main())
