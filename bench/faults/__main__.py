"""the faults: natkeep is struck at every point, and killed at random, and nothing is left.

Usage, as root:  python bench/faults [--points WORD] [--sample N] [--kills N] [--seed N] [--list]

Each run is in namespaces of its own, full of other people's things. A verb is struck by SIGKILL, an
exception or an errno; then `natkeep teardown` is called, and twelve surfaces are compared with what
they were before: nft's ruleset, iptables of both kinds, addresses, links, routes of all tables,
policy rules, neighbours, sysctls, the connection table, the state directory, processes, and who
holds the namespaces. After SIGKILL all is done once more, without a fault. A verb that came to an
end is held to its exit code: after 1, 5 and 7 all is as it was, even before the teardown; after 8
it has said what is left.

The last line is the figures; the exit code is 1 where anything differed, or a point was missed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.pool import Pool

from place import import_everything
from runs import Result, kill, strike, trace
from stories import STORIES, Story

from natkeep import faultpoints

JOBS = 2
"""At most two places at once: the kernel's own work for one must not hold up another's."""


Task = tuple[object, ...]


def trace_all(pool: Pool) -> tuple[dict[str, list[Story]], list[str]]:
    """Which stories reach each point; and what went wrong already without a fault."""
    reached: dict[str, list[Story]] = {point: [] for point in faultpoints.POINTS}
    wrong = []
    for story, (points, said) in zip(STORIES, pool.imap(trace, STORIES), strict=True):
        if said:
            wrong.append(f"{story.name}: {said}")
        for point in points:
            reached.setdefault(point, []).append(story)
    wrong += [f"{point} is not listed" for point in reached if point not in faultpoints.POINTS]
    wrong += [f"no story reaches {point}" for point, stories in reached.items() if not stories]
    return reached, wrong


def choose(
    reached: dict[str, list[Story]], word: str, sample: int | None, dice: random.Random
) -> list[tuple[Story, str, str]]:
    """Each point by each kind of fault, in a story that reaches it, in another each time."""
    chosen = []
    for point in faultpoints.POINTS:
        stories = dice.sample(reached[point], len(reached[point]))
        for number, kind in enumerate(faultpoints.KINDS):
            if stories and word in point:
                chosen.append((stories[number % len(stories)], point, kind))
    return chosen if sample is None else dice.sample(chosen, min(sample, len(chosen)))


def run_all(pool: Pool, run: Callable[..., Result], tasks: list[Task], what: str) -> list[Result]:
    """The results, in the order in which they come; what differs is said at once."""
    results = []
    for result in pool.imap_unordered(partial(_run, run), tasks):
        results.append(result)
        for line in result.wrong:
            print(f"DIFFERS {result.name}: {line}", flush=True)
        if len(results) % 50 == 0:
            print(f"{what}: {len(results)} of {len(tasks)}", flush=True)
    return results


def _run(run: Callable[..., Result], task: Task) -> Result:
    try:
        return run(*task)
    except Exception as error:  # the place itself: said, and the others go on
        return Result(f"{task}", [f"{type(error).__name__}: {error}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--points", metavar="WORD", default="", help="those with WORD in the name")
    parser.add_argument("--sample", metavar="N", type=int, help="N of the faults, not all of them")
    parser.add_argument("--kills", metavar="N", type=int, default=500)
    parser.add_argument("--seed", metavar="N", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="only which story reaches which point")
    parser.add_argument("--jobs", metavar="N", type=int, default=JOBS, help="places at once")
    args = parser.parse_args()
    with get_context("fork").Pool(args.jobs, import_everything) as pool:
        return _run_all(pool, args)


def _run_all(pool: Pool, args: argparse.Namespace) -> int:
    began, dice = time.monotonic(), random.Random(args.seed)
    reached, wrong = trace_all(pool)
    for line in wrong:
        print(f"WRONG {line}", flush=True)
    if args.list:
        for point, stories in reached.items():
            print(f"{point}: {', '.join(story.name for story in stories)}")
        return bool(wrong)

    faults = choose(reached, args.points, args.sample, dice)
    struck = run_all(pool, strike, faults, "faults")
    seeds = [dice.random() for _ in range(args.kills)]
    killed = run_all(pool, kill, [*enumerate(seeds)], "kills")
    results = [*struck, *killed]
    differences = len(wrong) + sum(len(result.wrong) for result in results)
    print(
        f"{len(faultpoints.POINTS)} points, {sum(map(bool, reached.values()))} of them reached; "
        f"{len(struck)} faults; {len(killed)} kills at random, "
        f"{sum(result.half_way for result in killed)} of them half-way; "
        f"{sum(result.compared for result in results)} surfaces compared; "
        f"{differences} differences; seed {args.seed}; {time.monotonic() - began:.0f} s"
    )
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
