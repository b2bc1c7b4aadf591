"""the tests of `make kernels`: how what a kernel's machine printed is counted, and a small run."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import pytest

# bench/ is a program beside the package and no part of it.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import kernels
from bench.kernels import (
    CHECKS,
    QUICK,
    SITUATIONS,
    Check,
    Result,
    main,
    read_result,
    render_row,
    run_kernel,
    tally_command,
    tally_matrix,
    tally_pytest,
)
from natkeep.lab.matrix import MODES, Selection

MATRIX = """\
natkeep stateful   {} of 26 runs passed; 26 of 26 cells never failed
natkeep stateless  22 of 26 runs passed, 4 refused; 26 of 26 cells never failed

14 cells, 52 runs, 2 at once, in 5.0 min; verdict: pass
"""


@pytest.mark.parametrize(
    ("code", "printed", "expected"),
    [
        (0, "..\n12 passed, 207 deselected in 8.12s\n", (12, 12)),
        (1, "F.\nFAILED x\n1 failed, 11 passed in 8.12s\n", (11, 12)),
        (1, "E.\n1 failed, 11 passed, 2 errors in 312.12s (0:05:12)\n", (11, 14)),
        (0, "12 passed, 3 skipped in 8.12s\n", (12, 12)),
        (2, "12 passed, 1 error in 0.31s\n", (12, 13)),
        (2, "!!! KeyboardInterrupt !!!\n12 passed in 0.31s\n", (12, 13)),
        (137, "...", (0, 1)),
        (5, "no tests ran in 0.02s\n", (0, 1)),
        (0, "no tests ran in 0.02s\n", (0, 0)),
    ],
)
def test_pytest_is_counted_by_its_last_line(code, printed, expected):
    assert tally_pytest(code, printed) == expected


@pytest.mark.parametrize(
    ("code", "printed", "expected"),
    [
        (0, MATRIX.format(26), (52, 52)),
        (1, MATRIX.format(25), (51, 52)),
        (1, MATRIX.format(26), (52, 53)),
        (1, "natkeep: the lab needs nft\n", (0, 1)),
    ],
)
def test_the_matrix_is_counted_by_its_totals(code, printed, expected):
    assert tally_matrix(code, printed) == expected


@pytest.mark.parametrize(
    ("code", "printed", "passed"),
    [(0, "x; verdict: pass\n", 1), (1, "x; verdict: fail\n", 0), (0, "", 0)],
)
def test_a_demo_has_passed_by_its_verdict_and_its_code(code, printed, passed):
    assert tally_command(code, printed) == (passed, 1)


def test_totals_are_read_as_the_matrix_prints_them():
    from natkeep.lab.matrix import Outcome
    from natkeep.lab.matrix_table import make_table

    cells = Selection(("16",), ("natkeep",), (), (4,)).cells()
    outcomes = [
        Outcome(each, "refused" if each.column.mode == "stateless" else "pass")
        for each in cells
        if each.applies
    ]
    table = make_table(cells, outcomes, reps=1, jobs=1, seconds=1.0)

    assert tally_matrix(0, table.as_text()) == (len(outcomes), len(outcomes))


def test_what_has_not_ended_has_no_result(tmp_path):
    (tmp_path / "0.out").write_text("verdict: pass")
    check = Check("demo", "true", tally_command)

    assert read_result("6.1", check, 0, tmp_path) is None

    (tmp_path / "0.code").write_text("0 12.5\n")

    assert read_result("6.1", check, 0, tmp_path) == Result("6.1", "demo", 1, 1, 12.5)


def test_a_row_says_what_failed_and_what_did_not_end():
    assert render_row(Result("6.1.0-57-amd64", "contract tests", 219, 219, 61.2)).split() == [
        "6.1.0-57-amd64", "contract", "tests", "219/219", "61", "s",
    ]  # fmt: skip
    assert render_row(Result("6.1", "demo", 0, 1)).endswith("0/1 did not end  FAILED")
    assert not Result("6.1", "demo", 0, 0, 1.0).ok


def test_a_dozen_situations_in_both_modes_are_tried():
    cells = Selection(tuple(map(str, SITUATIONS)), ("natkeep",), (), (4,), (True,)).cells()
    applying = [each for each in cells if each.applies]

    for mode in MODES:
        assert len({c.situation.number for c in applying if c.column.mode == mode}) >= 12
    assert f"--only={SITUATIONS[0]}" in CHECKS[-1].command
    assert CHECKS[0].name == QUICK[0].name == "make demo, repair"


def pretend(monkeypatch, tmp_path: Path, script: str) -> None:
    """A kernel that is unpacked, and in virtme-ng's place *script*, a shell's."""
    monkeypatch.setattr(kernels, "KERNELS", tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/release").write_text("6.1.0-1-amd64\n")
    vng = tmp_path / "vng"
    vng.write_text(f"#!/bin/sh\ncd {tmp_path}/own/results\n{script}\n")
    vng.chmod(vng.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(kernels, "_vng", lambda: vng)
    monkeypatch.setattr(kernels, "_TOOLS", {"sh": "dash"})


def end(number: int, printed: str = "verdict: pass", code: int = 0) -> str:
    """What scripts/kernel-guest does at the end of a check: the code appears whole, by a rename."""
    written = f"echo {code} 3 >{number}.new; mv {number}.new {number}.code"
    return f"echo '{printed}' >{number}.out; {written}"


PASSED = "\n".join((end(0), end(1, "3 passed in 1s")))


@pytest.mark.parametrize(
    ("script", "code", "rows"),
    [
        (PASSED, 0, ["1/1", "3/3"]),
        (f"{PASSED}; exit 255", 0, ["1/1", "3/3"]),  # virtme-ng's own code says nothing
        (f"{end(0)}; {end(1, '1 failed, 2 passed in 1s', 1)}", 1, ["1/1", "2/3"]),
        (end(0), 1, ["1/1", "0/1"]),  # a panic
        (f"{end(0)}; sleep 60", 1, ["1/1", "0/1"]),  # it hangs
    ],
)
def test_the_exit_code_is_0_only_if_all_has_passed(
    monkeypatch, tmp_path, capsys, script, code, rows
):
    pretend(monkeypatch, tmp_path, script)

    minutes = 0.03 if "sleep" in script else 1
    assert main(["own", "--quick", f"--minutes={minutes}"]) == code

    table = capsys.readouterr().out.splitlines()[1:]
    assert [word for line in table for word in line.split() if "/" in word] == rows


def test_a_kernel_that_is_not_there_has_failed_and_is_named(monkeypatch, tmp_path, capsys):
    pretend(monkeypatch, tmp_path, PASSED)
    (tmp_path / "newest.unavailable").write_text("linux-image-amd64 could not be unpacked: E: x\n")

    assert main(["newest", "own", "--quick"]) == 1

    assert "newest: linux-image-amd64 could not be unpacked: E: x" in capsys.readouterr().err


@pytest.mark.root
@pytest.mark.needs("kernel")
@pytest.mark.timeout(1000)  # two minutes on a processor of its own
def test_first_move_after_boot_of_debians_own_kernel(tmp_path):
    """A stock kernel has netfilter as modules, which prepare loads: they are no leftovers."""
    found = run_kernel("own", QUICK, tmp_path / "results", seconds=900, processors=1)

    told = [render_row(each) for each in found if not each.ok]
    assert not told, f"{told}\n{(tmp_path / 'results/0.out').read_text()}"
