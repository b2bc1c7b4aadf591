"""the price of natkeep-hook: what each of its calls costs, and what a whole restore costs with it.

Usage, as root:  python -m bench.hook [--rounds N] [--connections N] [--json FILE]

Wall time of programs from start to end, as CRIU waits for them: minimum and median of interleaved
rounds (the minimum is what it takes, the median what it took on a machine that does other things).
What is asked for is the median of the rounds' ratios. Exits with 1 where one is missed.

The restores are a real CRIU's: a process with one connection is dumped once, and restored from the
same image in a fresh network namespace each time. Half of such a restore is waiting for the
kernel's grace periods, 20 to 45 ms, so the two that are compared have more rounds, and each begins
when what was done before it has come to rest. All namespaces go with the bench.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from operator import truediv
from pathlib import Path

from bench.figures import Figure, at_most, conclude
from bench.namespaces import NEW, PREFIX, destination, end_on_sigterm

BIN = Path(sys.executable).parent
HOOK, NATKEEP = BIN / "natkeep-hook", BIN / "natkeep"
ROOT = Path(__file__).resolve().parents[1]
CRIU = ROOT / ".lab/criu/criu"
OLD, PEER, PORT = "10.2.0.10", "10.1.0.2", 5000
SETTLE = 0.2
"""Seconds that whatever was started or ended in the background has before the next measurement."""

MORE = 3
"""So many more rounds, for each, of the restores that are compared: how long the kernel's grace
periods take is chance, and hides all else in 25 rounds."""

SERVER = f"""
import os, socket, time
os.closerange(3, 1024)
listener = socket.create_server(("{OLD}", {PORT}))
child = os.fork()
if child == 0:  # the peer is no part of the tree
    listener.close()
    os.setsid()
    peer = socket.create_connection(("{OLD}", {PORT}), source_address=("{PEER}", 0))
    time.sleep(3600)
accepted, _ = listener.accept()
if os.fork():
    os._exit(0)
os.setsid()
with open("pid", "w") as file:
    file.write(str(os.getpid()))
os.rename("pid", "ready")
time.sleep(3600)
"""


def run(*argv: str | Path, **environment: str) -> float:
    """Run the program, which must succeed; how long it took, in ms."""
    began = time.perf_counter()
    process = subprocess.Popen(
        argv, env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    code = process.wait()
    took = time.perf_counter() - began
    if code:
        raise SystemExit(f"{' '.join(map(str, argv))} exited {code}")
    return took * 1000


def make_name() -> str:
    """A name for a namespace that there was none of before."""
    return f"{PREFIX}{os.getpid()}-{time.monotonic_ns():x}"


class Calls:
    """Single calls of the hook, beside the programs that they are compared with."""

    def __init__(self, directory: Path, netns: str, tree: int) -> None:
        self.directory, self.netns, self.tree = directory, netns, tree
        self.noop, self.nft = directory / "noop", directory / "nft"
        self.noop.write_text("#!/bin/sh\nexit 0\n")
        chain = "chain c {\n type filter hook input priority 0;\n}"
        table = f"table inet natkeep-bench {{\n{chain}\n}}"
        self.nft.write_text(f"#!/bin/sh\nnft -f - <<'E'\n{table}\nE\n")
        for script in (self.noop, self.nft):
            script.chmod(0o755)

    def enter(self, *argv: str | Path, **environment: str) -> float:
        """Run a program in the namespace."""
        return run("nsenter", f"--net=/run/netns/{self.netns}", *argv, **environment)

    def hook(self, action: str, **environment: str) -> float:
        """natkeep-hook at *action*."""
        return self.enter(
            HOOK, CRTOOLS_SCRIPT_ACTION=action, NATKEEP_STATE_DIR=str(self.directory),
            CRTOOLS_INIT_PID=str(self.tree), **environment,
        )  # fmt: skip

    def load(self) -> float:
        """A shell script that runs one `nft -f`."""
        try:
            return self.enter(self.nft)
        finally:
            self.enter("nft", "delete", "table", "inet", "natkeep-bench")

    def open(self, connections: int) -> float:
        """natkeep-hook opens a move that was prepared for it."""
        listing = self.directory / "listing"
        lines = (f"{OLD}:{PORT} {PEER}:{1024 + n}\n" for n in range(connections))
        listing.write_text("".join(lines))
        state = {"NATKEEP_STATE_DIR": str(self.directory)}
        self.enter(
            NATKEEP, "-q", "prepare", "bench", f"--map={OLD}={NEW}", f"--connections={listing}",
            **state,
        )  # fmt: skip
        try:
            return self.hook("post-restore", NATKEEP_ID="bench")
        finally:
            self.enter(NATKEEP, "-q", "teardown", "bench", "--yes", **state)


def measure_calls(directory: Path, rounds: int, connections: int) -> dict[str, list[float]]:
    """Single calls, interleaved."""
    with destination(make_name()) as netns:
        enter = ["nsenter", f"--net=/run/netns/{netns}"]
        tree = subprocess.Popen([*enter, "sleep", "3600"])
        try:
            calls = Calls(directory, netns, tree.pid)
            bare = [sys.executable, "-I", "-S", "-c", "pass"]
            return interleave(rounds, {
                "sh, does nothing": lambda: calls.enter(calls.noop),
                "hook, not ours (pre-resume)":
                    lambda: calls.hook("pre-resume", NATKEEP_ID="bench"),
                "hook, NATKEEP_ID, pre-restore":
                    lambda: calls.hook("pre-restore", NATKEEP_ID="bench"),
                "hook, no orders, post-restore": lambda: calls.hook("post-restore"),
                "python3 -I -S -c pass": lambda: calls.enter(*bare),
                "sh, one nft -f": calls.load,
                "hook opens 1 connection": lambda: calls.open(1),
                f"hook opens {connections} connections": lambda: calls.open(connections),
            })  # fmt: skip
        finally:
            tree.kill()
            tree.wait()


def await_true(ready: Callable[[], bool], what: str) -> None:
    """Return as soon as ready() is true."""
    deadline = time.monotonic() + 10
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"waited in vain for {what}")
        time.sleep(0.01)


def interleave(rounds: int, cases: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """So many rounds of all cases, there and back in turn, after one that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name in list(cases)[:: -1 if number % 2 else 1]:
            took = cases[name]()
            if number:
                taken[name].append(took)
    return taken


class Restores:
    """A process that is dumped, and restored again and again; in a pid namespace of its own."""

    def __init__(self, directory: Path, state: Path) -> None:
        self.directory, self.images, self.state = directory, directory / "images", state
        self.noop = directory / "noop"
        self.noop.write_text("#!/bin/sh\nexit 0\n")
        self.noop.chmod(0o755)
        self.images.mkdir()
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        for address in (OLD, PEER):
            subprocess.run(["ip", "address", "add", f"{address}/32", "dev", "lo"], check=True)
        (directory / "server.py").write_text(SERVER)
        program = ["setsid", "/usr/bin/python3", "-I", "-S", "server.py"]
        subprocess.run(program, cwd=directory, check=True, stdin=subprocess.DEVNULL,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        await_true((directory / "ready").exists, "the server")
        self.pid = int((directory / "ready").read_text())
        run(CRIU, "dump", "-t", str(self.pid), "-D", self.images, "--tcp-established",
            "--network-lock", "nftables", "-o", "dump.log")  # fmt: skip

    def restore(self, script: Path | None, *, prepared: bool = False, **orders: str) -> float:
        """Restore once in a fresh namespace, with an action script or without."""
        state = {"NATKEEP_STATE_DIR": str(self.state)}
        with destination(make_name()) as netns:
            enter = ["nsenter", f"--net=/run/netns/{netns}"]
            # What the kernel needs to take TCP_REPAIR for granted; natkeep adds it by itself.
            run(*enter, "ip", "address", "add", f"{OLD}/32", "dev", "lo")
            if prepared:
                run(*enter, NATKEEP, "-q", "prepare", "bench", f"--map={OLD}={NEW}",
                    f"--image={self.images}", **state)  # fmt: skip
            hook = ["--action-script", str(script)] if script else []
            time.sleep(SETTLE)
            try:
                return run(
                    *enter, CRIU, "restore", "-D", self.images, "-d", "--tcp-established",
                    "-o", "restore.log", *hook, **state, **orders,
                )  # fmt: skip
            finally:
                os.kill(self.pid, signal.SIGKILL)
                await_true(lambda: not os.path.exists(f"/proc/{self.pid}"), "its end")
                self.tear_down(state)

    def tear_down(self, state: dict[str, str]) -> None:
        """Undo what was prepared, by the bench or by the hook."""
        environment = {**os.environ, **state}
        listed = subprocess.run([NATKEEP, "status", "--json"], env=environment, check=True,
                                capture_output=True, text=True)  # fmt: skip
        for move in json.loads(listed.stdout)["moves"]:
            run(NATKEEP, "-q", "teardown", move["id"], "--yes", **state)


def measure_restores(directory: Path, rounds: int) -> dict[str, list[float]]:
    """Whole restores, interleaved; called inside the namespaces that `isolated` made."""
    # In memory, as /run usually is: the journal is fsynced, beside the log that CRIU writes.
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir="/dev/shm") as state:
        restores = Restores(directory, Path(state))
        compared = {
            "restore, sh that does nothing": lambda: restores.restore(restores.noop),
            "restore, NATKEEP_ID, prepared before":
                lambda: restores.restore(HOOK, prepared=True, NATKEEP_ID="bench"),
        }  # fmt: skip
        taken = interleave(rounds, {
            "restore, no action script": lambda: restores.restore(None),
            **compared,
            "restore, NATKEEP_MAP, prepares by itself":
                lambda: restores.restore(HOOK, NATKEEP_MAP=f"{OLD}={NEW}"),
        })  # fmt: skip
        more = interleave(rounds * MORE, compared)
        return {name: times + more.get(name, []) for name, times in taken.items()}


def isolated(directory: Path, rounds: int) -> dict[str, list[float]]:
    """measure_restores in network, pid and mount namespaces of its own, which end with it."""
    result = directory / "restores.json"
    subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc",
         # A shell as init: it reaps what the restores leave, and so frees the pid.
         "sh", "-c", '"$@"; exit $?', "sh",
         sys.executable, "-m", "bench.hook", "--rounds", str(rounds), "--restores-in",
         str(directory)],
        check=True, cwd=ROOT,
    )  # fmt: skip
    taken: dict[str, list[float]] = json.loads(result.read_text())
    return taken


ASKED = (
    # measured, compared with, at most
    ("hook, not ours (pre-resume)", "sh, does nothing", 1.5),
    ("hook opens 1 connection", "sh, one nft -f", 3.0),
    ("restore, NATKEEP_ID, prepared before", "restore, sh that does nothing", 1.25),
)


def print_times(taken: dict[str, list[float]]) -> None:
    """A line a case."""
    print(f"{'ms':44}     min  median")
    for name, times in taken.items():
        print(f"{name:44} {min(times):7.1f} {statistics.median(times):7.1f}")


def compare(taken: dict[str, list[float]]) -> list[Figure]:
    """The ratios that are asked for, each the median of its rounds'."""
    return [
        at_most(f"{name} / {base}", statistics.median(map(truediv, taken[name], taken[base])), most)
        for name, base, most in ASKED
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--restores-in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    end_on_sigterm()
    with suppress(OSError):  # in front of whatever else the machine does, which is half the noise
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(30))
    if args.restores_in:
        taken = measure_restores(args.restores_in, args.rounds)
        (args.restores_in / "restores.json").write_text(json.dumps(taken))
        return 0
    if not CRIU.exists():
        raise SystemExit("no CRIU that works here: run `make setup` first")
    directory = Path(tempfile.mkdtemp(prefix="natkeep-bench-"))
    try:
        (directory / "calls").mkdir()
        taken = measure_calls(directory / "calls", args.rounds, args.connections)
        taken |= isolated(directory, args.rounds)
    finally:
        shutil.rmtree(directory)
    print_times(taken)
    return conclude("hook", compare(taken), {"ms": taken}, args.json)


if __name__ == "__main__":
    sys.exit(main())
