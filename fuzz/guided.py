"""the engine that is guided by coverage: atheris, that is libFuzzer for Python, in its own process.

It runs within.py; its rule stands there. A process that was lost is a finding as well.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz.trial import PATIENCE, Finding, Tally


def fuzz(name: str, seed: int, *, seconds: float, mutants: int | None = None) -> Tally:
    """Let atheris loose on the target *name*, until the time or the number is used up."""
    with tempfile.TemporaryDirectory(prefix="natkeep-fuzz-") as place:
        answer, log = Path(place) / "answer", Path(place) / "log"
        command = [sys.executable, "-m", "fuzz.within", name, str(seed), str(seconds)]
        command += [str(mutants or 0), str(answer)]
        with log.open("wb") as talk:
            process = subprocess.Popen(
                command, cwd=place, stdin=subprocess.DEVNULL, stdout=talk, stderr=talk,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            )  # fmt: skip
            try:
                process.wait(seconds + 3 * PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if answer.exists():
            return pickle.loads(answer.read_bytes())
        lost = Tally(name, "atheris")
        said = log.read_text(errors="replace")[-4000:]
        kept = {f"input-{path.name}": path.read_bytes() for path in Path(place).glob("crash-*")}
        kind = f"stuck or dead, exit {process.returncode}"
        lost.add(Finding(name, kind, said, kept))
        return lost
