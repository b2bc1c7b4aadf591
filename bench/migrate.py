"""how long a peer hears nothing in `natkeep migrate`, beside CRIU alone on one host.

    python -m bench.migrate [--reps N] [--counts N,N,…] [--only WORD] [--json FILE]

One connection asks and is answered every 2 ms; the others are idle. The silence is the longest gap
between two answers that its client saw. All that is compared takes turns, each run in a practice
network of its own, over real sshd:

    in place     criu dump and criu restore at the source, without natkeep and without a copy
    by hand      natkeep's own verbs, all of them in the blackout: the gateway is prepared, the
                 destination, the gateway is opened, criu restore with natkeep-hook; no copy either
    migrate      natkeep migrate, the image copied by ssh
    shared       the same with a directory of images that source and destination share

Medians of --reps runs; what is asked for is the median of the turns' ratios to `in place`.
Exits with 1 where one is missed. Steps: the milliseconds that migrate itself told, medians.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from operator import truediv
from pathlib import Path
from typing import Any

from bench.figures import Figure, at_most, conclude
from bench.namespaces import end_on_sigterm
from natkeep.lab.application import Application, start_client
from natkeep.lab.criu_restore import Machine
from natkeep.lab.engine import Opening
from natkeep.lab.engines.criu import Criu
from natkeep.lab.lab import Lab
from natkeep.lab.ssh import Machines

ASKED = {1: 1.8, 100: 1.5, 2000: 1.12}
"""Of each way to migrate, as a multiple of `in place`."""
_MIGRATES = {"migrate", "shared"}
_LINE = re.compile(r" *(\d+) ms  (\S+) ")

Run = tuple[float, dict[str, float]]
"""The silence, and the steps of a migrate: milliseconds."""


def in_place(lab: Lab, ticking: Application) -> Run:
    """CRIU alone."""
    lab.begin_freeze()
    ticking.do("mark")
    lab.frozen = lab.engine.freeze(lab.at, lab.traffic.server, lab.directory / "frozen")
    lab.engine.restore(lab.at, lab.traffic.server, lab.frozen, Opening(lambda: None))
    return read_silence(ticking), {}


def by_hand(lab: Lab, ticking: Application) -> Run:
    """The verbs one after the other, with an image that all hosts see."""
    lab.begin_freeze()
    ticking.do("mark")
    lab.frozen = lab.engine.freeze(lab.at, lab.traffic.server, lab.directory / "frozen")
    # In memory, as /run usually is: a move's journal is fsynced before and after each step.
    with tempfile.TemporaryDirectory(prefix="natkeep-bench-", dir="/dev/shm") as states:
        gateway, destination = (
            Machine(lab, role, state=f"{states}/{role}") for role in ("gateway", "destination")
        )
        for machine in (gateway, destination):
            machine.prepare("web", *lab.frozen.options)
        gateway.natkeep("open", "web")
        hook = destination.cli.open_move("web")
        lab.engine.restore(destination.host, lab.traffic.server, lab.frozen, hook)
        return read_silence(ticking), {}


def migrate(*options: str, shared: bool = False) -> Callable[[Lab, Application], Run]:
    """natkeep migrate with these options."""

    def run(lab: Lab, ticking: Application) -> Run:
        # In memory, as /run usually is: a move's journal is fsynced before and after each step.
        with tempfile.TemporaryDirectory(prefix="natkeep-bench-", dir="/dev/shm") as states:
            machines = Machines(
                lab, "source", "destination", controller="gateway", shared=shared,
                states=Path(states),
            )  # fmt: skip
            ticking.do("mark")
            lab.begin_freeze()
            said = machines.call("migrate", *machines.words(), *options)
            silence = read_silence(ticking)
        times = [(float(m[1]), m[2]) for line in said.splitlines() if (m := _LINE.match(line))]
        steps: dict[str, float] = {}
        for (before, _), (after, step) in pairwise(times):
            steps[step] = steps.get(step, 0) + after - before
        return silence, steps

    return run


WAYS = {
    "in place": in_place,
    "by hand": by_hand,
    "migrate": migrate(),
    "shared": migrate(shared=True),
}


def read_silence(ticking: Application) -> float:
    """The longest gap, once it is over: milliseconds."""
    before = ticking.fresh()["connections"][0]["answered"]
    ticking.wait(lambda r: r["connections"][0]["answered"] > before + 20, "answers", within=20)
    return float(ticking.fresh()["connections"][0]["longest_silence_ms"])


def measure(way: str, count: int) -> Run:
    """One run in a practice network of its own."""
    with Lab("bench-migrate", engine="criu") as lab:
        lab.serve()
        ticking = start_client(lab.topology["client"], "ticking", lab.server_endpoint)
        if count > 1:
            lab.dial(connections=count - 1)
        else:
            lab.traffic.client = ticking
        ticking.do({"talk": {"interval_ms": 2, "size": 8, "answer": 8}})
        time.sleep(0.5)
        assert isinstance(lab.engine, Criu)
        lab.engine.verbosity = "-v3"  # as natkeep migrate has it
        return WAYS[way](lab, ticking)


def main() -> int:
    """Exit code: 0 if all figures hold."""
    parser = argparse.ArgumentParser(prog="bench.migrate", description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--counts", default=",".join(map(str, ASKED)))
    parser.add_argument("--only", default="")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    end_on_sigterm()
    ways = [way for way in WAYS if args.only in way or way == "in place"]
    figures: list[Figure] = []
    raw: dict[str, Any] = {}
    for count in map(int, args.counts.split(",")):
        runs: dict[str, list[Run]] = {way: [] for way in ways}
        for _ in range(args.reps):
            for way in ways:
                runs[way].append(measure(way, count))
        ratios = tell(count, runs)
        raw[str(count)] = {way: [silence for silence, _ in some] for way, some in runs.items()}
        for way in sorted(_MIGRATES.intersection(ways)) if count in ASKED else ():
            what = f"{count} connections, {way}: silence / CRIU in place"
            figures.append(at_most(what, ratios[way], ASKED[count]))
    return conclude("migrate", figures, raw, args.json)


def tell(count: int, runs: dict[str, list[Run]]) -> dict[str, float]:
    """Print a table; the median of the ratios of each way."""
    base = [silence for silence, _ in runs["in place"]]
    found = {}
    for way, some in runs.items():
        silences = [silence for silence, _ in some]
        found[way] = statistics.median(map(truediv, silences, base))
        names = dict.fromkeys(step for _, steps in some for step in steps)
        steps = {n: statistics.median(s.get(n, 0) for _, s in some) for n in names}
        told = ", ".join(f"{name} {ms:.0f}" for name, ms in steps.items())
        print(
            f"{count:5} {way:9} {statistics.median(silences):6.0f} ms "
            f"({min(silences):.0f} to {max(silences):.0f})  {found[way]:5.2f}  {told}"
        )
        sys.stdout.flush()
    return found


if __name__ == "__main__":
    sys.exit(main())
