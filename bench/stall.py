"""the stall that a peer sees in a move: with hold and replay, without, and CRIU alone on one host.

    python -m bench.stall [--reps N] [--blackouts S,S,…] [--lanes N] [--only WORD] [--json FILE]

Every run moves living connections in a practice network. The blackout lasts from the moment in
which the gateway takes its peers' segments away from the process (or CRIU begins to dump, where
it is alone) to the moment in which the process lives again; the stall lasts from the same moment
until the peer's application hears the process again (bulk: until it can send again; what is
delivered is acknowledged while the sockets are in repair yet, so that it can a little sooner). So
a stall beyond its blackout is what the peer waits for its own next retransmission.

    stream    a peer that sends 64 octets every 20 ms, whether answered or not
    once      a peer that sends 64 octets once, just after the freeze
    bulk      a peer that sends as fast as it can

Engine `repair` is TCP_REPAIR within this process, so that the blackout is what was asked for;
engine `criu` dumps and restores a real process, with natkeep-hook. Every octet is numbered, and
each run counts only if both ends have every octet once, the destination's kernel found none of
them beyond the window, and the connections go on.
With many connections both ends, in Python, need some time for so many answers at once, also where
nothing is moved: that is measured first in each run (`usual`), and allowed for.
Medians of --reps runs each, both families in turn; exit 0 only if all that is asked for holds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.figures import Figure, at_least, at_most, conclude
from bench.lane import Case, Lane, Result
from bench.namespaces import end_on_sigterm
from natkeep.lab.engines.criu import find_criu
from natkeep.lab.topology import Topology

PREFIX = "natkeep-bench-stall-"
ALLOWED_MS = 5.0
BLACKOUTS = (0.1, 0.5, 1.0, 3.0, 6.0)
MANY = 1000


def make_cases(blackouts: list[float], only: str) -> list[Case]:
    """What is run, each --reps times; those that are alike beside each other."""
    found = []
    for pattern in ("stream", "once"):
        for blackout in blackouts:
            found += [Case("repair", pattern, blackout, hold) for hold in (True, False)]
    middle = [blackout for blackout in blackouts if 0.5 <= blackout <= 3]
    for blackout in middle:
        found += [Case("repair", "bulk", blackout, hold) for hold in (True, False)]
    if find_criu() is not None:
        for blackout in [blackout for blackout in blackouts if blackout >= 0.5]:
            found += [
                Case("criu", "once", blackout, True),
                Case("criu", "once", blackout, False),
                Case("in place", "once", blackout, False),
            ]
    for blackout in middle[:1] or blackouts[:1]:
        found += [Case("repair", "once", blackout, hold, MANY) for hold in (True, False)]
    return [case for case in found if only in case.name]


def is_dear(case: Case) -> bool:
    """What is run less often by default: it takes long, or shows only that it works as well."""
    return case.engine != "repair" or case.connections > 1


def work(jobs: Any, results: Any) -> None:
    """One lane: a practice network, and what is run in it, one after the other."""
    # Who started the lanes ends them, with SIGTERM: the network goes then, and must go undisturbed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # In memory, as /run usually is: a move's journal is fsynced before and after each step.
    memory = tempfile.TemporaryDirectory(prefix=PREFIX, dir="/dev/shm")
    with Topology() as topology, memory as state:
        lane = Lane(topology, Path(state))
        for number, case, family in iter(jobs.get, None):
            try:
                result = lane.run(case, family)
            except Exception as error:  # told with the others, and the bench goes on
                result = Result(0, float("inf"), fault=f"{type(error).__name__}: {error}")
            results.put((number, family, result))


def run_all(cases: list[Case], reps: int, dear_reps: int, lanes: int) -> list[list[Result]]:
    """The results of each case; jobs that take long begin first."""
    context = multiprocessing.get_context("fork")
    jobs, results = context.Queue(), context.Queue()
    wanted = [
        (number, case, (4, 6)[rep % 2])
        for number, case in enumerate(cases)
        for rep in range(dear_reps if is_dear(case) else reps)
    ]
    for job in sorted(wanted, key=lambda job: -job[1].seconds):
        jobs.put(job)
    for _ in range(lanes):
        jobs.put(None)
    workers = [context.Process(target=work, args=(jobs, results)) for _ in range(lanes)]
    for worker in workers:
        worker.start()
    found: list[list[Result]] = [[] for _ in cases]
    try:
        for done in range(len(wanted)):
            number, _, result = results.get(timeout=180)
            found[number].append(result)
            if sys.stderr.isatty():
                print(f"\r{done + 1} of {len(wanted)} runs", end="", file=sys.stderr, flush=True)
    except BaseException:
        jobs.cancel_join_thread()  # nobody takes what is still in there
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:
            worker.join(30)
            if worker.is_alive():
                worker.kill()
    return found


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def show(cases: list[Case], found: list[list[Result]]) -> None:
    """A line a case: what the peer waited for, by the blackout and beyond it."""
    columns = f"{'asked':>7}{'blackout':>10}{'stall':>9}{'ratio':>8}{'beyond':>9}{'worst':>9}  runs"
    print(f"{'':44}{columns}")
    for case, results in zip(cases, found, strict=True):
        how = "hold" if case.hold else "no hold" if case.engine != "in place" else "CRIU alone"
        good = [r for r in results if not r.fault] or results
        beyond = [r.beyond for r in good]
        print(
            f"{case.name + ', ' + how:44}{case.blackout * 1000:7.0f}"
            f"{median([r.blackout for r in good]):10.1f}{median([r.stall for r in good]):9.1f}"
            f"{median([r.stall / r.blackout for r in good if r.blackout]):8.3f}"
            f"{median(beyond):9.1f}{max(beyond, default=float('nan')):9.1f}  {len(results)}"
        )


def compare(cases: list[Case], found: list[list[Result]]) -> list[Figure]:
    """What is asked of the moves that hold, and of all."""
    figures = []
    for case, results in zip(cases, found, strict=True):
        if case.hold:
            usual = median([result.usual for result in results])
            allowed = f", the usual {usual:.0f} ms allowed for" if usual else ""
            what = f"{case.name}, {case.blackout * 1000:.0f} ms: ms beyond the blackout{allowed}"
            beyond = median([result.beyond for result in results])
            figures.append(at_most(what, beyond, ALLOWED_MS + usual))
    everything = [result for results in found for result in results]
    said = "runs: every octet once, none beyond the window, the connections go on"
    figures.append(at_least(said, sum(not run.fault for run in everything), len(everything)))
    return figures


def show_faults(cases: list[Case], found: list[list[Result]]) -> None:
    """The first few runs that do not count, and why."""
    faults = [(c, r) for c, rs in zip(cases, found, strict=True) for r in rs if r.fault]
    for case, result in faults[:10]:
        print(f"     {case.name}, {case.blackout * 1000:.0f} ms, hold {case.hold}: {result.fault}")


def to_rows(cases: list[Case], found: list[list[Result]]) -> list[dict[str, object]]:
    """For the plots: of each case what it was, and its runs."""
    return [
        {
            "engine": case.engine, "pattern": case.pattern, "asked_ms": case.blackout * 1000,
            "hold": case.hold, "connections": case.connections,
            "runs": [{"blackout_ms": r.blackout, "stall_ms": r.stall, "held": r.held,
                      "usual_ms": r.usual, "fault": r.fault} for r in results],
        }
        for case, results in zip(cases, found, strict=True)
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reps", type=int, default=4, help="runs of each case (default: 4)")
    parser.add_argument("--blackouts", default=",".join(map(str, BLACKOUTS)), help="seconds")
    parser.add_argument("--lanes", type=int, default=3, help="networks at the same time")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    end_on_sigterm()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    cases = make_cases([float(text) for text in args.blackouts.split(",")], args.only)
    dear = args.reps if args.reps >= 20 else max(args.reps // 2, 1)
    began = time.monotonic()
    found = run_all(cases, args.reps, dear, args.lanes)
    print(f"\r{sum(map(len, found))} runs in {time.monotonic() - began:.0f} s; medians, ms\n")
    show(cases, found)
    show_faults(cases, found)
    return conclude("stall", compare(cases, found), {"cases": to_rows(cases, found)}, args.json)


if __name__ == "__main__":
    sys.exit(main())
