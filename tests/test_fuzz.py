"""tests of the readers against mutants, and of the fuzzer against readers that are faulty.

`make fuzz` goes on for as long as one likes; here each part of it runs for a moment, bounded by
the number of mutants and not by time. What hypothesis finds it shrinks, so its properties stand
here beside the program.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

# fuzz/ is a program beside the package and no part of it.
sys.path.append(str(Path(__file__).resolve().parent.parent))

from fuzz import __main__ as program
from fuzz import lengths, own, trial
from fuzz.mutants import Mutator, sign
from fuzz.seeds import ID, LISTING, Case
from fuzz.structure import Length, read_structure, splice, varint
from fuzz.targets import Images, Journals, Listings, Target, Trees
from fuzz.trial import Finding, Tally, keep, read_case, write_case
from natkeep.errors import ImageError, JournalError, KernelError

ROOT = Path(__file__).resolve().parent.parent
IMAGES, JOURNALS, LISTINGS = Images(), Journals(), Listings()
TARGETS = [IMAGES, JOURNALS, LISTINGS, Trees()]
MUTATORS = {target.name: Mutator(target.seeds) for target in TARGETS}
NAMES = [target.name for target in TARGETS]
HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
ENGINES = ["own", *([pytest.param("atheris", marks=pytest.mark.whole)] if HAS_ATHERIS else [])]


def outcome(target: Target, case: Case) -> object:
    """What *target* reads, or None where it refuses; any other error fails the test."""
    refusal = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            return target.read(case)
        except target.refusal as error:
            refusal = str(error)
    assert refusal.isprintable()
    assert len(refusal) <= trial.MESSAGE_LIMIT
    return None


# ---- the readers --------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
def test_each_seed_is_good_from_memory_and_from_files(target: Target, tmp_path: Path) -> None:
    for number, seed in enumerate(target.seeds):
        directory = tmp_path / str(number)
        directory.mkdir(mode=0o700)
        write_case(seed, directory)

        found = target.read(seed)

        assert found is not None
        assert found == target.read_files(directory)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_short_run_finds_nothing(engine: str, tmp_path: Path) -> None:
    """As `make fuzz`: a line for each target, and the exit code."""
    command = [
        *(sys.executable, "-m", "fuzz", "--engine", engine, "--mutants", "1500", "--seed", "1"),
        *("--seconds", "120", "--no-lengths", "--findings", str(tmp_path)),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"seed 1; engines: {engine}")
    assert done.stdout.endswith("\n6,000 mutants, 0 findings\n")
    for name in NAMES:
        (line,) = re.findall(rf"^{name} .*", done.stdout, re.MULTILINE)
        assert re.search(rf" {engine} +1,500 .* ms +[\d.]+ MiB 0$", line), line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.whole
@pytest.mark.parametrize("target", [IMAGES, JOURNALS], ids=NAMES[:2])
def test_every_damaged_length_is_refused(target: Target) -> None:
    """All lengths of all seeds, each with what is near it and what is known for evil.

    `make fuzz SECONDS=300` also tries every number up to the right one.
    """
    proof = lengths.prove((target,), far=0)

    assert proof.tolerated == ()
    assert proof.lengths >= {"images": 600, "journal": 24}[target.name]
    assert proof.mutants >= 15 * proof.lengths


@settings(max_examples=300)
@pytest.mark.parametrize("target", TARGETS, ids=NAMES)
@given(rng=st.randoms(use_true_random=False))
def test_a_mutant_is_read_or_refused(target: Target, rng) -> None:
    outcome(target, MUTATORS[target.name].make(rng))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
HEADER = json.loads(JOURNALS.seeds[0][f"{ID}.journal"].split(b"\n")[0])
PLACES = [(key,) for key in HEADER] + [("move", key) for key in HEADER["move"]]


@pytest.mark.whole
@settings(max_examples=400)
@given(place=st.sampled_from(PLACES), value=JSON)
def test_a_journal_with_another_value_somewhere(place: tuple[str, ...], value: object) -> None:
    """It is refused, or is of the kind that is written there: nothing is taken for another."""
    header = json.loads(json.dumps(HEADER))
    inner = header
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    seed = JOURNALS.seeds[0]
    line = json.dumps(header).encode() + b"\n"

    found = outcome(JOURNALS, {**seed, f"{ID}.journal": line})

    if found is not None and place not in [("natkeep",), ("image",)]:
        written = HEADER[place[0]] if len(place) == 1 else HEADER["move"][place[1]]
        assert value is None or type(value) is type(written)


@settings(max_examples=300)
@given(packed=st.binary(max_size=200))
def test_any_packed_connections_that_are_signed(packed: bytes) -> None:
    seed = JOURNALS.seeds[0]
    case = {**seed, f"{ID}.connections": packed}
    sign(case, seed)

    outcome(JOURNALS, case)


@settings(max_examples=300)
@given(data=st.binary(max_size=120) | st.text(max_size=80).map(str.encode))
def test_any_octets_as_a_connections_file(data: bytes) -> None:
    outcome(LISTINGS, {LISTING: data})


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(IMAGES.seeds[0])),
    keep_head=st.booleans(),
    data=st.binary(max_size=120),
)
def test_any_octets_as_an_image(name: str, keep_head: bool, data: bytes) -> None:
    seed = IMAGES.seeds[0]
    head = seed[name][:8] if keep_head else b""

    outcome(IMAGES, {**seed, name: head + data})


# ---- the fuzzer ---------------------------------------------------------------------------


def varint_of(data: bytes, length: Length) -> bool:
    return data[length.at : length.end] == length.encode(length.value)


def test_the_map_of_an_image_is_right() -> None:
    """Each length stands where the map says, and what is put in grows all that is around it."""
    found = 0
    for seed in IMAGES.seeds:
        for name, data in seed.items():
            structure = read_structure(name, data)
            assert all(varint_of(data, length) for length in structure.lengths)
            for field in structure.fields[::7]:
                grown = splice(data, field.end, field.end, b"\xa0\x7d\x01", field.enclosing)
                if not name.startswith("tcp-stream"):
                    assert len(read_structure(name, grown).fields) == len(structure.fields) + 1
                found += 1
    assert found > 300
    assert varint(300) == b"\xac\x02"


def test_a_mutant_is_the_same_for_seed_and_number() -> None:
    for target in TARGETS:
        again = Mutator(target.seeds)
        made = [own.make_mutant(MUTATORS[target.name], 7, number) for number in range(50)]

        assert made == [own.make_mutant(again, 7, number) for number in range(50)]
        assert len({str(case) for case in made}) > 40


class Faulty(Listings):
    """A reader that does *fault* with each list; `name` says where findings are kept."""

    def __init__(self, fault: Callable[[], object]) -> None:
        super().__init__()
        self.fault = fault

    def read(self, case: Case) -> object:
        return self.fault()

    def read_files(self, directory: Path) -> object:
        return "another value"


def fail(error: BaseException) -> Callable[[], object]:
    def read() -> object:
        raise error

    return read


def fail_raw(message: str, hint: str | None = None) -> Callable[[], object]:
    """Fail with a message as it is, past what an error does to what it is given."""
    error = ImageError("")
    error.args, error.hint = (message,), hint
    return fail(error)


def burn() -> object:
    while True:
        pass


def die() -> object:
    os.kill(os.getpid(), signal.SIGKILL)


def warn() -> object:
    warnings.warn("overflow encountered", RuntimeWarning, stacklevel=1)
    return None


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (fail(KeyError("x")), "KeyError"),
        (fail(RecursionError()), "RecursionError"),
        (fail(KernelError("x")), "KernelError"),
        (fail(JournalError("x")), "JournalError"),
        (fail_raw("\x1b[2J"), "Broken: a message that a terminal should not be given"),
        (fail_raw("x" * 501), "Broken: a message that is too long"),
        (fail_raw("x", "a\nb"), "Broken: a message that a terminal should not be"),
        (lambda: "a value", "Broken: read otherwise from files than from memory"),
        (lambda: len(b"x" * (96 << 20)) and None, "MemoryError"),
        (burn, "Hang"),
        (warn, "RuntimeWarning"),
        (die, "stuck or dead, exit -9"),
    ],
)
def test_a_faulty_reader_is_found(
    fault: Callable[[], object], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, which begins with what this one has in memory."""
    monkeypatch.setattr(trial, "LIMIT_SECONDS", 0.2)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    monkeypatch.setattr(trial, "LIMIT_MIB", pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20) + 64)

    tally = own.fuzz(Faulty(fault), 1, seconds=60, mutants=1)

    assert tally.found == 1
    (finding,) = tally.findings.values()
    assert finding.kind.startswith(kind)
    assert finding.case == own.make_mutant(MUTATORS["listing"], 1, 0)


def test_a_finding_is_kept_and_can_be_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = {f"{ID}.journal": b'{"schema": 2}\n', f"{ID}.connections": b"\0"}
    tally = Tally("journal", "own", mutants=1)
    tally.add(Finding("journal", "KeyError at x.py:1", "Traceback", case, 12))

    program.report(tally, tmp_path)

    directory = tmp_path / "journal-KeyError-at-x-py-1"
    assert f"FINDING KeyError at x.py:1: {directory}" in capsys.readouterr().out
    assert "mutant 12" in (directory / "why.txt").read_text()
    assert read_case(directory) == case
    directory.chmod(0o700)
    command = [sys.executable, "-m", "fuzz", "--target", "journal", "--replay", str(directory)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split("\n")[0]) == (0, "refused, exit 7")


def test_of_one_kind_the_smallest_is_kept(tmp_path: Path) -> None:
    tally = Tally("listing", "own")
    for size in (5, 2, 9):
        tally.add(Finding("listing", "Hang", "", {LISTING: b"x" * size}))

    (finding,) = tally.findings.values()

    assert tally.found == 3
    assert read_case(keep(finding, tmp_path)) == {LISTING: b"xx"}


def test_a_finding_ends_the_run_in_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(program.TARGETS, "listing", lambda: Faulty(fail(KeyError("x"))))
    arguments = ["--target", "listing", "--engine", "own", "--no-lengths", "--mutants", "3"]
    monkeypatch.setattr(sys, "argv", ["fuzz", *arguments, "--findings", str(tmp_path)])

    assert program.main() == 1
    assert capsys.readouterr().out.endswith("\n3 mutants, 3 findings\n")
    assert len(list(tmp_path.iterdir())) == 1
