"""tests of what a figure is, and of the form that all benches' results have."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

# bench/ is a program beside the package and no part of it.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench.figures import Figure, at_least, at_most, conclude, read_figures, to_json


@pytest.mark.parametrize(
    ("figure", "ok"),
    [
        pytest.param(at_most("x", 0.9, 1), True, id="below what is asked at most"),
        pytest.param(at_most("x", 1.0, 1), True, id="at what is asked at most"),
        pytest.param(at_most("x", 1.001, 1), False, id="above, by less than is printed"),
        pytest.param(at_least("x", 1.1, 1), True, id="above what is asked at least"),
        pytest.param(at_least("x", 1.0, 1), True, id="at what is asked at least"),
        pytest.param(at_least("x", 0.999, 1), False, id="below, by less than is printed"),
        pytest.param(at_most("x", math.nan, 1), False, id="not measured, at most"),
        pytest.param(at_least("x", math.nan, 1), False, id="not measured, at least"),
        pytest.param(at_most("x", math.inf, 1), False, id="never over"),
    ],
)
def test_a_figure_holds_up_to_its_bound(figure: Figure, ok: bool) -> None:
    assert figure.ok is ok


@pytest.mark.parametrize("asked", [math.nan, math.inf])
def test_a_bound_is_a_number(asked: float) -> None:
    with pytest.raises(ValueError, match="nothing can be asked for"):
        at_most("x", 1, asked)


def test_json_has_the_figures_the_machine_and_the_raw_data() -> None:
    text = to_json("path", [at_least("x", 0.95, 0.93, (0.9, 1.1))], {"ratios": {"plain": [1.0]}})

    document = json.loads(text)
    assert document["schema"] == 1
    assert document["bench"] == "path"
    assert document["ratios"] == {"plain": [1.0]}
    assert {"cores", "kernel", "python"} <= document["machine"].keys()
    assert document["figures"] == [
        {"what": "x", "asked": 0.93, "reached": 0.95, "sense": ">=", "noise": [0.9, 1.1],
         "ok": True}
    ]  # fmt: skip


def test_what_json_does_not_know_is_null_there_and_still_does_not_hold(tmp_path: Path) -> None:
    path = tmp_path / "stall.json"
    path.write_text(to_json("stall", [at_most("x", math.inf, 5)], {"runs": [(math.nan, 1)]}))

    document = json.loads(path.read_text())
    assert document["runs"] == [[None, 1]]
    assert document["figures"][0]["reached"] is None
    assert [figure.ok for figure in read_figures(path)] == [False]


def test_raw_data_does_not_hide_what_all_have_in_common() -> None:
    with pytest.raises(ValueError, match="machine"):
        to_json("path", [], {"machine": "another"})


def test_figures_are_read_as_they_were_written(tmp_path: Path) -> None:
    figures = [at_most("x", 1.5, 1), at_least("y", 0.95, 0.93, (0.9, 1.1))]
    path = tmp_path / "path.json"
    path.write_text(to_json("path", figures, {}))

    assert read_figures(path) == figures


@pytest.mark.parametrize(("reached", "code"), [(1.0, 0), (1.1, 1)])
def test_a_bench_ends_with_0_only_if_all_hold(
    reached: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = [at_most("held", 0.5, 1), at_most("the other", reached, 1)]

    assert conclude("hook", figures, {}, tmp_path / "new" / "hook.json") == code

    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("MISSED") for line in lines if line.startswith("the other")] == [
        bool(code)
    ]
    assert [figure.what for figure in read_figures(tmp_path / "new" / "hook.json")] == [
        "held", "the other",
    ]  # fmt: skip
