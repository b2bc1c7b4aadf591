"""scenario rollback_in_any_order in both orders, modes and families."""

from __future__ import annotations

from functools import partial

import pytest

from natkeep.lab import scenario
from natkeep.lab.lab import Lab
from natkeep.lab.scenario import find_scenario

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.mark.parametrize(
    ("family", "mode", "order"),
    [
        (4, "stateless", ("destination", "gateway")),
        (6, "stateful", ("destination", "gateway")),
        (6, "stateless", ("gateway", "destination")),
    ],
)
def test_no_peer_hears_of_a_rollback_whichever_machine_comes_first(
    family: int, mode: str, order: tuple[str, ...]
) -> None:
    found = find_scenario("rollback_in_any_order")
    run, _ = found.load()
    with Lab(found.name, engine="repair", family=family, mode=mode) as lab:
        scenario.perform(lab, partial(run, order=order))

    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert lab.report.passed
