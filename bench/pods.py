"""Pods that move from node to node, again and again; and the two ways to lose their connections.

    python -m bench.pods [--reps 20] [--controls 2]

Scenario pod_moves with IPv4 and with IPv6, by turns: how often all connections were kept, and the
longest that a client has heard nothing. Then without natkeep-hook at the source, and with a gateway
that is told only when the container runs again: all of these have to lose them. Exit 1 if anything
is otherwise; the time is asked for on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from natkeep.lab import scenario
from natkeep.lab.lab import Lab
from natkeep.lab.report import Report
from natkeep.lab.scenario import find_scenario

WANTED_MS = 1100
CONTROLS = {"no hook at the source": "closes_source", "the gateway afterwards": "gateway_first"}


def move(family: int, **words: bool) -> Report:
    """One move; words: of the scenario's `run`."""
    tell, setup = find_scenario("pod_moves").load()
    with Lab("pod_moves", **{**setup, "family": family}) as lab:
        scenario.perform(lab, partial(tell, **words))
    return lab.report


def repeat(reps: int) -> bool:
    """All of them keep their connections, each heard of in time."""
    fine = True
    for family in (4, 6):
        reports = [move(family) for _ in range(reps)]
        for report in reports:
            for each in report.assertions:
                if not each.ok:
                    print(f"  {each}")
        kept = sum(report.passed for report in reports)
        gaps = sorted(report.silence_ms or 0 for report in reports)
        told = f"{gaps[len(gaps) // 2]:.0f} ms, {gaps[-1]:.0f} ms the longest"
        print(f"IPv{family}: kept {kept} of {reps}; silent for {told} (asked for: {WANTED_MS} ms)")
        fine = fine and kept == reps and gaps[-1] <= WANTED_MS
    return fine


def lose(reps: int) -> bool:
    """None of the controls keeps them."""
    fine = True
    for name, word in CONTROLS.items():
        kept = sum(move(4, **{word: False}).passed for _ in range(reps))
        print(f"{name}: kept {kept} of {reps} (asked for: 0)")
        fine = fine and not kept
    return fine


def main() -> int:
    """The figures, beside what is asked for."""
    parser = argparse.ArgumentParser(prog="python -m bench.pods")
    parser.add_argument("--reps", type=int, default=20, help="of each family")
    parser.add_argument("--controls", type=int, default=2, help="of each way to lose them")
    args = parser.parse_args()
    return 0 if all([repeat(args.reps), lose(args.controls)]) else 1


if __name__ == "__main__":
    sys.exit(main())
