"""tests of `python -m bench`: benches that hold, that miss, that crash, and an interrupted one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import is_running

# bench/ is a program beside the package and no part of it.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.__main__ import BENCHES, ROOT, Bench, main

# A bench of one figure, which reaches so much of the 1 that is asked at most.
FAKE = """
import sys
from pathlib import Path
from bench.figures import at_most, conclude
path = Path(sys.argv[-1].removeprefix("--json="))
sys.exit(conclude("fake", [at_most("a figure", float(sys.argv[1]), 1)], {}, path))
"""
CRASH = "raise SystemExit('no such namespace')"
LIAR = FAKE.replace("sys.exit(", "print(") + "sys.exit(3)\n"


def fake(name: str, program: str = FAKE, reached: float = 0.5) -> Bench:
    """A program in the place of a bench."""
    return Bench(name, (sys.executable, "-c", program), (str(reached),), ("0.25",))


def run(capfd: pytest.CaptureFixture[str], to: Path, *benches: Bench, argv: tuple[str, ...] = ()):
    """The exit code, and the last table."""
    code = main([*argv, f"--to={to}"], benches)
    return code, capfd.readouterr().out.partition("==== all figures")[2]


def test_all_hold(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, table = run(capfd, tmp_path, fake("one"), fake("two", reached=1.0))

    assert code == 0
    assert re.search(r"^one: a figure +<= +1 +0\.500$", table, re.MULTILINE)
    assert re.search(r"^two: a figure +<= +1 +1$", table, re.MULTILINE)
    assert len(re.findall(r"^(?:one|two) +\d+ s  1 of 1 figures hold$", table, re.MULTILINE)) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.json", "two.json"]


def test_one_that_misses_keeps_no_other_from_running(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, table = run(capfd, tmp_path, fake("one", reached=1.01), fake("two"))

    assert code == 1
    assert re.search(r"^one: a figure .* MISSED$", table, re.MULTILINE)
    assert "two: a figure" in table


def test_one_that_crashes_is_told_and_keeps_no_other_from_running(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(capfd, tmp_path, fake("one"))  # what an earlier run wrote must not stand for this one

    code, table = run(capfd, tmp_path, fake("one", CRASH), fake("two"))

    assert code == 1
    assert re.search(r"^one +\d+ s  no figures were written; exit code 1$", table, re.MULTILINE)
    assert "one: a figure" not in table
    assert "two: a figure" in table


def test_a_bench_whose_figures_hold_but_that_fails_is_no_success(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _ = run(capfd, tmp_path, fake("one", LIAR))

    assert code == 1


def test_a_bench_without_figures_is_no_success(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    none = FAKE.replace('[at_most("a figure", float(sys.argv[1]), 1)]', "[]")

    assert run(capfd, tmp_path, fake("one", none))[0] == 1


def test_only_what_is_named_runs(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, table = run(
        capfd, tmp_path, fake("one", CRASH), fake("two", reached=2), argv=("two", "--quick")
    )

    assert code == 0
    assert "two: a figure" in table
    assert "0.250" in table


def test_a_name_that_there_is_not(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        run(capfd, tmp_path, fake("one"), argv=("three",))

    assert ended.value.code == 2
    assert "there is no bench three" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_ends_all_and_starts_no_other(number: int, tmp_path: Path) -> None:
    """The bench has time to tidy up; what it has forgotten ends, too."""
    bench = f"""
import subprocess, sys, time
from pathlib import Path
from bench.namespaces import end_on_sigterm
end_on_sigterm()
forgotten = subprocess.Popen(["sleep", "600"])
try:
    Path({str(tmp_path)!r}, "begun").write_text(str(forgotten.pid))
    Path({str(tmp_path)!r}, "begun").rename(Path({str(tmp_path)!r}, "ready"))
    time.sleep(600)
finally:
    Path({str(tmp_path)!r}, "tidied").touch()
"""
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
from bench.__main__ import Bench, main
one = Bench("one", (sys.executable, "-c", {bench!r}))
two = Bench("two", ("touch", {str(tmp_path / "second")!r}))
sys.exit(main([{f"--to={tmp_path}"!r}], [one, two]))
"""
    runner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert runner.poll() is None
        assert time.monotonic() < deadline
    forgotten = int((tmp_path / "ready").read_text())

    runner.send_signal(number)

    assert b"interrupted" in runner.communicate(timeout=30)[1]
    assert runner.returncode == 130
    assert (tmp_path / "tidied").exists()
    assert not (tmp_path / "second").exists()
    while is_running(forgotten):
        assert time.monotonic() < deadline


@pytest.mark.parametrize("bench", BENCHES, ids=lambda bench: bench.name)
def test_docs_and_makefile_name_each_bench(bench: Bench) -> None:
    """`make bench-NAME` runs it alone."""
    assert f"\nbench-{bench.name}: " in (ROOT / "Makefile").read_text()
    assert f"`make bench-{bench.name}`" in (ROOT / "docs/performance.md").read_text()
    assert os.access(ROOT / "bench" / f"{bench.name}.py", os.R_OK)


def test_docs_name_the_runs_of_all() -> None:
    text = (ROOT / "docs/performance.md").read_text()

    assert "`make bench`" in text
    assert "`make bench-plots`" in text
