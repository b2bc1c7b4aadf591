"""Pods that move from node to node, again and again; and the two ways to lose their connections.

    python -m bench.pods [--reps 20] [--others 1] [--controls 2]

Scenario pod_moves with IPv4 and with IPv6: how often all connections were kept, and the longest
that a client has heard nothing. The other scenarios of pods, and containers that share their pod's
pid namespace. Then without natkeep-hook at the source, and with a gateway that is told only when
the container runs again: all of these have to lose them. Exit 1 if anything is otherwise; the time
is asked for on a machine that does nothing else.
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
OTHERS = (
    "", "pod_behind_service_moves", "pod_behind_policy_moves", "pod_moves_beside_its_peer",
    "pod_stays_when_it_cannot_move", "pod_moves_by_a_fleet",
)  # fmt: skip
CONTROLS = {"no hook at the source": "closes_source", "the gateway afterwards": "gateway_first"}


def move(family: int, name: str = "pod_moves", **words: bool) -> Report:
    """One move; words: of the scenario's `run`."""
    tell, setup = find_scenario(name).load()
    with Lab(name, **{**setup, "family": family}) as lab:
        scenario.perform(lab, partial(tell, **words))
    return lab.report


def repeat(reps: int) -> bool:
    """All of them keep their connections, each heard of in time."""
    fine = True
    for family in (4, 6):
        reports = [move(family) for _ in range(reps)]
        kept = sum(map(is_kept, reports))
        gaps = sorted(report.silence_ms or 0 for report in reports)
        told = f"{gaps[len(gaps) // 2]:.0f} ms, {gaps[-1]:.0f} ms the longest"
        print(f"IPv{family}: kept {kept} of {reps}; silent for {told} (asked for: {WANTED_MS} ms)")
        fine = fine and kept == reps and gaps[-1] <= WANTED_MS
    return fine


def is_kept(report: Report) -> bool:
    """Whether it passed; else it is said why not."""
    for each in report.assertions:
        if not each.ok:
            print(f"  {each}")
    return report.passed


def pass_others(reps: int) -> bool:
    """The other scenarios pass."""
    fine = True
    for name in OTHERS:
        words = {} if name else {"shares_pids": True}
        reports = [move(family, name or "pod_moves", **words) for family in (4, 6) * reps]
        passed = sum(map(is_kept, reports))
        print(f"{name or 'a shared pid namespace'}: passed {passed} of {2 * reps}")
        fine = fine and passed == 2 * reps
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
    parser.add_argument("--others", type=int, default=1, help="of each other scenario and family")
    parser.add_argument("--controls", type=int, default=2, help="of each way to lose them")
    args = parser.parse_args()
    done = repeat(args.reps), pass_others(args.others), lose(args.controls)
    return 0 if all(done) else 1


if __name__ == "__main__":
    sys.exit(main())
