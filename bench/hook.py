"""the price of natkeep-hook: what each of its calls costs a restore.

Usage, as root:  python bench/hook.py [ROUNDS] [--connections N]

Wall time of the program from start to end, as CRIU waits for it: minimum and median of interleaved
rounds (the minimum is what it takes, the median what it took on a machine that does other things),
and processor time. Everything happens in one network namespace that goes with the bench.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

BIN = Path(sys.executable).parent
HOOK, NATKEEP = BIN / "natkeep-hook", BIN / "natkeep"
NETNS = f"natkeep-bench-{os.getpid()}"
OLD, NEW, PEER = "10.2.0.10", "10.3.0.20", "10.1.0.2"

Timing = tuple[float, float]  # wall and processor time, ms


def measure(*argv: str | Path, **environment: str) -> Timing:
    """Run the program in the namespace; it must succeed."""
    began = time.perf_counter()
    process = subprocess.Popen(
        ["nsenter", f"--net=/run/netns/{NETNS}", *argv],
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{argv[0]} exited {process.returncode}")
    return wall * 1000, (used.ru_utime + used.ru_stime) * 1000


class Bench:
    """One state directory, and moves that are prepared anew for each round."""

    def __init__(self, directory: Path, connections: int) -> None:
        self.state, self.listing = directory / "state", directory / "listing"
        lines = (f"{OLD}:5000 {PEER}:{1024 + n}\n" for n in range(connections))
        self.listing.write_text("".join(lines))

    def natkeep(self, *arguments: str) -> None:
        """Run natkeep; what it did is not measured."""
        environment = {**os.environ, "NATKEEP_STATE_DIR": str(self.state)}
        subprocess.run([NATKEEP, "-q", *arguments], check=True, env=environment)

    def hook(self, action: str, **environment: str) -> Timing:
        """natkeep-hook at *action*."""
        state = {"NATKEEP_STATE_DIR": str(self.state)}
        return measure(HOOK, CRTOOLS_SCRIPT_ACTION=action, **state, **environment)

    def open(self) -> Timing:
        """Open a move that was prepared for it."""
        self.natkeep(
            "prepare", "bench", f"--map={OLD}={NEW}", f"--site=destination={NETNS}",
            f"--connections={self.listing}",
        )  # fmt: skip
        try:
            return self.hook("post-restore", NATKEEP_ID="bench")
        finally:
            self.natkeep("teardown", "bench", "--yes")


def make_namespace() -> None:
    """A destination: it has NEW, and a route to the peer."""
    subprocess.run(["ip", "netns", "add", NETNS], check=True)
    lines = [
        "link set lo up", "link add eth0 type veth peer name eth1",
        f"address add {NEW}/24 dev eth0", "link set eth0 up", "link set eth1 up",
        "route add default via 10.3.0.1",
    ]  # fmt: skip
    subprocess.run(
        ["ip", "-n", NETNS, "-batch", "-"], input="\n".join(lines), check=True, text=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rounds", nargs="?", type=int, default=15)
    parser.add_argument("--connections", type=int, default=1000)
    args = parser.parse_args()
    make_namespace()
    try:
        with tempfile.TemporaryDirectory() as directory:
            run(Path(directory), args.rounds, args.connections)
    finally:
        subprocess.run(["ip", "netns", "delete", NETNS], check=True)


def run(directory: Path, rounds: int, connections: int) -> None:
    """Measure and print."""
    one, many = Bench(directory, 1), Bench(directory, connections)
    (directory / "many").mkdir()
    many = Bench(directory / "many", connections)
    cases: dict[str, Callable[[], Timing]] = {
        "/bin/true": lambda: measure("/bin/true"),
        "python3 -I -S -c pass": lambda: measure(sys.executable, "-I", "-S", "-c", "pass"),
        "python3 -I -c pass": lambda: measure(sys.executable, "-I", "-c", "pass"),
        "hook, not ours (pre-resume)": lambda: one.hook("pre-resume", NATKEEP_ID="bench"),
        "hook, NATKEEP_ID, pre-restore": lambda: one.hook("pre-restore", NATKEEP_ID="bench"),
        "hook, no orders, post-restore": lambda: one.hook("post-restore"),
        "hook opens 1 connection": one.open,
        f"hook opens {connections} connections": many.open,
    }
    taken: dict[str, list[Timing]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            taken[name].append(case())
    print(f"{'ms, nsenter included; ' + str(rounds) + ' rounds':36}     min  median  processor")
    for name, timings in taken.items():
        wall, used = zip(*timings, strict=True)
        print(
            f"{name:36} {min(wall):7.1f} {statistics.median(wall):7.1f} "
            f"{statistics.median(used):10.1f}"
        )


if __name__ == "__main__":
    main()
