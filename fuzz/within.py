"""the inside of the guided engine: a process in which atheris (libFuzzer) makes the mutants.

    python -m fuzz.within TARGET SEED SECONDS MUTANTS ANSWER      (guided.py starts it)

It starts from the same seeds and keeps each mutant that reached code of natkeep that none before
it reached. Half of its changes are our own (mutants.py), which know the structure.

Rule: libFuzzer judges nothing here, trial.py does; what atheris adds is the choice of mutants.
One octet string is one mutant: seed (its highest bit: make the digest right), file, its octets.
Nothing imports natkeep before atheris can instrument it, or there is no coverage to guide.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["natkeep"]):
    from fuzz.mutants import Mutator, sign
    from fuzz.seeds import Case
    from fuzz.targets import TARGETS
    from fuzz.trial import Judge, Tally

MAX_LENGTH = 64 << 10
FILES_EVERY = 500
_SIGN = 0x80


class Engine:
    """One run: what libFuzzer calls to change and to try octets."""

    def __init__(self, name: str, seconds: float, mutants: int, answer: Path) -> None:
        self.target = TARGETS[name]()
        self.tally = Tally(name, "atheris")
        self.judge = Judge(self.target, self.tally)
        self.mutator = Mutator(self.target.seeds)
        self.names = [sorted(case) for case in self.target.seeds]
        self.seconds, self.mutants, self.answer = seconds, mutants, answer
        self.stack = ExitStack()

    def run(self, seed: int) -> None:
        """Never returns."""
        corpus = self.answer.parent / "corpus"
        corpus.mkdir()
        for which, files in enumerate(self.names):
            for index, file in enumerate(files):
                octets = bytes((which, index)) + self.target.seeds[which][file]
                (corpus / f"{which}-{index}").write_bytes(octets)
        arguments = [f"-seed={seed & 0x7FFFFFFF}", f"-max_len={MAX_LENGTH}", "-len_control=0"]
        # By itself libFuzzer keeps the shortest input of each path, and no seed survives that.
        arguments += ["-reduce_inputs=0", "-mutate_depth=2"]
        arguments += ["-timeout=0", "-rss_limit_mb=0", str(corpus)]
        atheris.Setup([sys.argv[0], *arguments], self.read, custom_mutator=self.change)
        self.deadline = time.monotonic() + self.seconds
        self.stack.enter_context(self.judge.watching())
        atheris.Fuzz()

    def split(self, data: bytes) -> tuple[Case, str, bytes]:
        """The seed, the file that is another in it, and its octets."""
        head = data[:2].ljust(2, b"\0")
        which = (head[0] & ~_SIGN) % len(self.names)
        names = self.names[which]
        return self.target.seeds[which], names[head[1] % len(names)], data[2:]

    def change(self, data: bytes, max_size: int, number: int) -> bytes:
        """What libFuzzer does instead of its own change."""
        rng = random.Random(number)
        seed, file, octets = self.split(data)
        if rng.random() < 0.3:
            octets = seed[file]
        if rng.random() < 0.5:
            octets = self.mutator.change(rng, file, octets)
        else:
            octets = atheris.Mutate(octets, max(max_size - 2, 1))
        head = data[:2].ljust(2, b"\0")
        if rng.random() < 0.1:
            head = bytes((head[0] ^ _SIGN, head[1]))
        return (head + octets)[:max_size]

    def read(self, data: bytes) -> None:
        """What libFuzzer calls with each mutant."""
        if time.monotonic() > self.deadline or self.tally.mutants == self.mutants > 0:
            self.end()
        seed, file, octets = self.split(data)
        case = {**seed, file: octets}
        if data and data[0] & _SIGN:
            sign(case, seed)
        self.judge.judge(case, on_files=not self.tally.mutants % FILES_EVERY)

    def end(self) -> None:
        """Answer and go; libFuzzer would call that a crash, so it is not asked."""
        self.stack.close()
        part = self.answer.with_suffix(".part")
        part.write_bytes(pickle.dumps(self.tally))
        part.rename(self.answer)
        os._exit(0)


if __name__ == "__main__":
    _, name, seed, seconds, mutants, answer = sys.argv
    Engine(name, float(seconds), int(mutants), Path(answer)).run(int(seed))
