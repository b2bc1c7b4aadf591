"""the engine of our own: mutant N of seed S, one after another, in a process of its own.

Rule: number N of seed S is always the same mutant, so a finding is found again, and a process
that never came back tells by its number what it choked on.
"""

from __future__ import annotations

import mmap
import multiprocessing
import random
import struct
import time
from multiprocessing.connection import Connection

from fuzz.mutants import Mutator
from fuzz.targets import Target
from fuzz.trial import PATIENCE, Finding, Judge, Tally

FILES_EVERY = 200  # so often a mutant is read from files as well
_SPREAD = 0x9E3779B97F4A7C15  # odd, so that numbers of different seeds lie far apart


def make_mutant(mutator: Mutator, seed: int, number: int) -> dict[str, bytes]:
    """Mutant *number* of *seed*."""
    return mutator.make(random.Random(seed * _SPREAD + number))


def fuzz(target: Target, seed: int, *, seconds: float, mutants: int | None = None) -> Tally:
    """Judge mutants in a process of its own, until the time or the number is used up."""
    context = multiprocessing.get_context("fork")
    progress = mmap.mmap(-1, 8)  # shared: the number of the mutant that is being read
    mine, theirs = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(target, seed, seconds, mutants, progress, theirs))
    worker.start()
    theirs.close()
    tally = None
    try:
        if mine.poll(seconds + 3 * PATIENCE):
            tally = mine.recv()
    except EOFError:
        pass
    finally:
        worker.kill()
        worker.join()
    if tally is None:  # it died, or is stuck where no signal reaches Python
        (number,) = struct.unpack("<q", progress[:8])
        case = make_mutant(Mutator(target.seeds), seed, number)
        tally = Tally(target.name, "own", mutants=number + 1)
        kind = f"stuck or dead, exit {worker.exitcode}"
        tally.add(Finding(target.name, kind, "no traceback: the process was lost", case, number))
    return tally


def _work(
    target: Target,
    seed: int,
    seconds: float,
    mutants: int | None,
    progress: mmap.mmap,
    answer: Connection,
) -> None:
    tally = Tally(target.name, "own")
    judge, mutator = Judge(target, tally), Mutator(target.seeds)
    deadline, number, rng = time.monotonic() + seconds, 0, random.Random()
    with judge.watching():
        while number != mutants:
            if not number % 256 and time.monotonic() > deadline:
                break
            progress[:8] = struct.pack("<q", number)
            rng.seed(seed * _SPREAD + number)
            case = mutator.make(rng)
            judge.judge(case, number, on_files=not number % FILES_EVERY)
            number += 1
    answer.send(tally)
