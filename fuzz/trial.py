"""one mutant judged, and the sums over many.

A mutant is accepted (the reader returns a value) or refused (it raises the target's own error,
whose message is one short line that a terminal may be given). All else is a finding: another
error, a warning, more than LIMIT_SECONDS of processor time, more than LIMIT_MIB of memory, or
files that read otherwise than the same octets in memory.

Rule: time is processor time, since a busy machine is no finding; PATIENCE is for what waits.
"""

from __future__ import annotations

import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from fuzz.seeds import Case
from fuzz.targets import Target
from natkeep.errors import NatkeepError

LIMIT_SECONDS = 1.0  # processor time for one mutant
LIMIT_MIB = 128.0  # peak memory of the process
PATIENCE = 20.0  # seconds by the clock for one mutant
MESSAGE_LIMIT = 500  # characters of an error's message, and of its hint


class Hang(BaseException):
    """A mutant took too long; no reader may catch it."""


class Broken(AssertionError):
    """What the reader did is no error of Python, but against the rule; says in which way."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A mutant that broke the rule: *kind* in a few words, *detail* the traceback."""

    target: str
    kind: str
    detail: str
    case: Case
    number: int | None = None


@dataclass(slots=True)
class Tally:
    """What became of the mutants of one target and engine."""

    target: str
    engine: str
    mutants: int = 0
    on_files: int = 0
    accepted: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0
    memory: float = 0.0
    findings: dict[str, Finding] = field(default_factory=dict)
    found: int = 0

    def add(self, finding: Finding) -> None:
        """Count it; of each kind the smallest mutant is kept."""
        self.found += 1
        known = self.findings.get(finding.kind)
        if known is None or _size(finding.case) < _size(known.case):
            self.findings[finding.kind] = finding


def _size(case: Case) -> int:
    return sum(map(len, case.values()))


class Judge:
    """Reads mutants of one target and counts; to be used within `watching()`."""

    def __init__(self, target: Target, tally: Tally) -> None:
        self.target = target
        self.tally = tally
        self.limit = LIMIT_MIB
        self._began: tuple[float, float] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While it lasts a look at the time is taken four times a second; warnings are errors."""
        before = signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, 0.25, 0.25)
        began = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self.tally.seconds += time.perf_counter() - began
            self.tally.memory = peak_memory()

    def _look(self, _signal: int, _frame: FrameType | None) -> None:
        if self._began is None:
            return
        used, waited = self._began
        if time.process_time() - used > LIMIT_SECONDS or time.monotonic() - waited > PATIENCE:
            self._began = None  # once is enough
            raise Hang

    def judge(self, case: Case, number: int | None = None, *, on_files: bool = False) -> None:
        """Read one mutant from memory and, if asked, from files as well."""
        tally = self.tally
        tally.mutants += 1
        try:
            outcome, value = self._read(self.target.read, case)
            if on_files:
                tally.on_files += 1
                with tempfile.TemporaryDirectory(prefix="natkeep-fuzz-") as directory:
                    write_case(case, Path(directory))
                    again = self._read(self.target.read_files, Path(directory))
                if again != (outcome, value):
                    raise Broken("read otherwise from files than from memory")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            detail = traceback.format_exc(limit=-6)[-4000:]
            tally.add(Finding(self.target.name, _kind(error), detail, case, number))
            return
        if outcome:
            tally.refused[outcome] += 1
        else:
            tally.accepted += 1

    def _read(self, read: Callable, source: object) -> tuple[int, object]:
        """Exit code and value; an exception is a finding."""
        used = time.process_time()
        self._began = used, time.monotonic()
        try:
            value, outcome = read(source), 0
        except NatkeepError as error:
            if type(error) is not self.target.refusal:
                raise
            _check_message(error)
            value, outcome = None, error.exit_code
        finally:
            self._began = None
        took = time.process_time() - used
        self.tally.slowest = max(self.tally.slowest, took)
        if took > LIMIT_SECONDS:
            raise Hang(f"{took:.1f} s")
        # The usage is quick to ask, but remembers what the process that started this one had.
        usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if usage > self.limit and (memory := peak_memory()) > self.limit:
            self.limit = memory  # the peak stays; only what goes beyond it is another finding
            raise MemoryError(f"{memory:.1f} MiB")
        return outcome, value


def _check_message(error: NatkeepError) -> None:
    for text in (str(error), error.hint or ""):
        if len(text) > MESSAGE_LIMIT:
            raise Broken("a message that is too long") from error
        if not text.isprintable():
            raise Broken("a message that a terminal should not be given") from error


def _kind(error: BaseException) -> str:
    """What happened and where, so that the same fault counts as one."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [each for each in frames if "/natkeep/" in each.filename]
    place = f" at {Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else ""
    said = f": {error}" if isinstance(error, Broken) else ""
    return f"{type(error).__name__}{place}{said}"


def peak_memory() -> float:
    """MiB that this process has ever had in memory."""
    with open("/proc/self/status", encoding="ascii") as file:
        [peak] = (line.split()[1] for line in file if line.startswith("VmHWM:"))
    return int(peak) / 1024


def write_case(case: Case, directory: Path) -> None:
    """The files of *case*, as natkeep would find them."""
    for name, data in case.items():
        (directory / name).write_bytes(data)


def read_case(directory: Path) -> Case:
    """What `write_case` wrote; `why.txt` is the finding's own."""
    return {
        path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.name != "why.txt"
    }


def keep(finding: Finding, place: Path) -> Path:
    """The finding as files below *place*; what was there by that name is replaced."""
    name = "".join(c if c.isalnum() else "-" for c in f"{finding.target}-{finding.kind}")
    directory = place / name[:80].strip("-")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, mode=0o700)
    write_case(finding.case, directory)
    number = "" if finding.number is None else f"mutant {finding.number}\n"
    (directory / "why.txt").write_text(f"{finding.kind}\n{number}\n{finding.detail}")
    return directory
