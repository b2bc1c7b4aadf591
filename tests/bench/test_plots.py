"""tests of the plots, drawn from small results where matplotlib is; nothing else asks for it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

# bench/ is a program beside the package and no part of it.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.__main__ import BENCHES, ROOT
from bench.plots import DRAWN, main

MOST = 150_000  # octets of a plot, which stays in the repository's history for ever
METRICS = ("bulk", "bulk, MTU packets", "exchange", "newcomer")


def make_case(
    engine: str, pattern: str, *, hold: bool, beyond: float, blackout: float, fault: str = ""
) -> dict[str, object]:
    """Two runs, as bench/stall.py writes them; a run with a fault has no stall (null)."""
    stall = None if fault else blackout + beyond
    run = {"blackout_ms": blackout, "stall_ms": stall, "fault": fault}
    return {
        "engine": engine, "pattern": pattern, "hold": hold, "connections": 1,
        "asked_ms": blackout, "runs": [run, run],
    }  # fmt: skip


RESULTS: dict[str, dict[str, object]] = {
    "control": {
        "ms": {
            "1": {"natkeep prepare": [60.0], "nft -f": [5.0], "conntrack -R": [3.0],
                  "floor": [15.0], "iptables-restore": [4.0], "conntrack -I": [2.0]},
            "100000": {"natkeep prepare": [500.0, 600.0], "nft -f": [1000.0], "floor": [300.0],
                       "conntrack -R": [1500.0]},
        },
    },
    "hook": {"ms": {"sh, does nothing": [1.5, 2.0], "hook opens 1 connection": [11.0, 12.0]}},
    "stall": {
        "cases": [
            make_case("repair", "once", hold=True, beyond=0.3, blackout=100),
            make_case("repair", "once", hold=True, beyond=0.4, blackout=6000),
            make_case("repair", "once", hold=False, beyond=700, blackout=100),
            make_case("repair", "once", hold=False, beyond=0, blackout=6000, fault="lost"),
        ],
    },
    "path": {
        "ratios": {
            "plain (the noise)": {metric: [0.97, 1.02] for metric in METRICS},
            "natkeep stateful, 1 connection": {metric: [0.9, 0.95] for metric in METRICS},
        },
    },
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A directory with the JSON of all benches."""
    directory = tmp_path / "results"
    directory.mkdir()
    for name, document in RESULTS.items():
        (directory / f"{name}.json").write_text(json.dumps({"schema": 1, **document}))
    return directory


@pytest.mark.needs("matplotlib")
def test_all_are_drawn_and_small(results: Path, tmp_path: Path) -> None:
    assert main([f"--from={results}", f"--to={tmp_path / 'plots'}"]) == 0

    drawn = {path.stem: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert drawn.keys() == RESULTS.keys()
    assert all(png.startswith(b"\x89PNG") for png in drawn.values())
    assert max(map(len, drawn.values())) < MOST


@pytest.mark.needs("matplotlib")
def test_what_is_missing_is_said_and_the_others_are_drawn(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (results / "path.json").unlink()

    assert main([f"--from={results}", f"--to={tmp_path}"]) == 1

    assert "path.json: run `make bench` first" in capsys.readouterr().err
    assert {path.stem for path in tmp_path.glob("*.png")} == RESULTS.keys() - {"path"}


def test_each_bench_has_a_plot_and_the_document_shows_it() -> None:
    document = (ROOT / "docs/performance.md").read_text()

    assert DRAWN.keys() == {bench.name for bench in BENCHES}
    for name in DRAWN:
        assert f"](performance/{name}.png)" in document
        assert 0 < (ROOT / f"docs/performance/{name}.png").stat().st_size < MOST
