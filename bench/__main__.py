"""the run of all benches: each figure asked for beside the one reached, and 0 only if all hold.

    python -m bench [NAME…] [--quick] [--to DIR]

The benches run one after the other, each in a session of its own; one that misses or crashes does
not keep the next from running. Their JSON is written into DIR (.lab/bench/, if nothing is said),
where bench/plots.py finds it. `--quick` is the same with few rounds: what it prints is no figure
to repeat, and shows that all of it runs.
Ctrl-C ends the bench that runs, waits until it has removed what it made, and starts no other.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from bench.figures import Figure, at_most, print_figures, read_figures
from bench.namespaces import remove_left_by

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / ".lab/bench"
MINUTES = 15
PATIENCE = 30  # s, for a bench to remove what it made


@dataclass(frozen=True, slots=True)
class Bench:
    """One program, which takes `--json FILE` behind its arguments."""

    name: str
    command: tuple[str, ...]
    usual: tuple[str, ...] = ()
    quick: tuple[str, ...] = ()


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"bench.{name}")


BENCHES = (
    Bench("control", _module("control"), (), ("--rounds=1", "--most=1000", "--moves=20")),
    Bench("hook", _module("hook"), ("--rounds=25",), ("--rounds=2",)),
    # Side by side, since nearly all of a run is waiting; the more, the less quiet for each.
    Bench("stall", _module("stall"), ("--reps=20", "--lanes=10"), ("--reps=2", "--blackouts=0.5")),
    Bench("path", _module("path"), ("--rounds=30",), ("--rounds=1", "--only=only,1 connection")),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one bench came to; *wrong* is why it has no figures, if it has none."""

    name: str
    seconds: float
    code: int
    figures: Sequence[Figure]
    wrong: str = ""

    @property
    def ok(self) -> bool:
        """Whether it came to its end and all that is asked of it holds."""
        fine = bool(self.figures) and all(figure.ok for figure in self.figures)
        return fine and not self.code and not self.wrong


def run_one(bench: Bench, directory: Path, *, quick: bool) -> Outcome:
    """Run it, and read what it wrote."""
    path = directory / f"{bench.name}.json"
    path.unlink(missing_ok=True)  # of a bench that crashes, nothing older is told
    began = time.monotonic()
    arguments = bench.quick if quick else bench.usual
    code = _run([*bench.command, *arguments, f"--json={path}"])
    seconds = time.monotonic() - began
    try:
        return Outcome(bench.name, seconds, code, read_figures(path))
    except (OSError, ValueError, KeyError) as error:
        said = "no figures were written" if isinstance(error, OSError) else f"{path}: {error!r}"
        return Outcome(bench.name, seconds, code, (), f"{said}; exit code {code}")


def _run(command: list[str]) -> int:
    """The exit code; whoever interrupts us interrupts it, and nothing of it is left."""
    # A session of its own: it hears of Ctrl-C from us, and its children do not hear of it at all.
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        return process.wait()
    except BaseException:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        remove_left_by(process.pid)
        raise


def conclude(outcomes: Sequence[Outcome]) -> int:
    """Print the one table and how long each took; the exit code."""
    print("\n==== all figures\n")
    figures = [
        replace(figure, what=f"{outcome.name}: {figure.what}")
        for outcome in outcomes
        for figure in outcome.figures
    ]
    minutes = sum(outcome.seconds for outcome in outcomes) / 60
    if {outcome.name for outcome in outcomes} >= {bench.name for bench in BENCHES}:
        figures.append(at_most("make bench: minutes", minutes, MINUTES))
    print_figures(figures)
    print()
    for outcome in outcomes:
        held = sum(figure.ok for figure in outcome.figures)
        told = outcome.wrong or f"{held} of {len(outcome.figures)} figures hold"
        print(f"{outcome.name:8} {outcome.seconds:6.0f} s  {told}")
    return 0 if all(o.ok for o in outcomes) and all(figure.ok for figure in figures) else 1


def main(argv: Sequence[str] | None = None, benches: Sequence[Bench] = BENCHES) -> int:
    """Run those that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    names = [bench.name for bench in benches]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--to", type=Path, default=RESULTS, metavar="DIR", help="for their JSON")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(names):
        parser.error(f"there is no bench {', '.join(sorted(unknown))}")
    directory = args.to.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcomes = []
    try:
        for bench in benches:
            if bench.name in (args.names or names):
                print(f"\n==== {bench.name}\n", flush=True)
                outcomes.append(run_one(bench, directory, quick=args.quick))
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    return conclude(outcomes)


if __name__ == "__main__":
    sys.exit(main())
