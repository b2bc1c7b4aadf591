"""scenario gateway_comes_late in both modes and families, and by half a minute."""

from __future__ import annotations

from functools import partial

import pytest

from natkeep.lab import scenario
from natkeep.lab.lab import Lab
from natkeep.lab.scenario import find_scenario

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.mark.parametrize(
    ("family", "mode", "late_s"),
    [(6, "stateful", 0.5), (4, "stateless", 0.5), (6, "stateless", 0.5), (4, "stateful", 30.0)],
)
def test_peers_that_reset_new_until_the_gateway_is_there_go_on(
    family: int, mode: str, late_s: float
) -> None:
    late = find_scenario("gateway_comes_late")
    run, _ = late.load()
    with Lab(late.name, engine="repair", family=family, mode=mode) as lab:
        scenario.perform(lab, partial(run, late_s=late_s))

    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert lab.report.passed
