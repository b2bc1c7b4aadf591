"""The chaos in short (`make chaos` is the long form): a few of its cases, each with traffic."""

from __future__ import annotations

import pytest

from bench.chaos import Case, make_cases, run

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.needs("etcd")]

CASES = {case.name: case for case in make_cases()}
SHORT = ("quorum ready", "orderer", "host")


@pytest.mark.parametrize("name", SHORT)
def test_no_connection_is_lost(name: str) -> None:
    case: Case = CASES[name]
    report = run(case, engine="repair", seconds=2)
    assert [str(each) for each in report.assertions if not each.ok] == []
    assert report.resets == 0
    assert report.segments > 0


def test_the_cases_are_of_all_phases_nodes_and_points() -> None:
    assert len(CASES) > 100
    assert "fault gateway applied-OpenGate" in CASES
    assert "agents before the order" in CASES
