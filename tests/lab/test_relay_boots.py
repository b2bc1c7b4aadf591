"""What the two rules of scenario `relay_boots` are for: a relay that boots without them."""

from __future__ import annotations

from functools import partial

import pytest
from pages import blocks_of

from natkeep.lab.lab import Lab
from natkeep.lab.scenario import find_scenario, perform

pytestmark = [pytest.mark.root, pytest.mark.lab]


[RULES] = blocks_of("test_a_relay_that_boots_with_old_and_without_the_rules_resets_its_peers")


@pytest.mark.parametrize(("family", "silent"), [(6, True), (4, False), (6, False)])
def test_a_relay_that_boots_with_old_and_without_the_rules_resets_its_peers(
    family: int, silent: bool
) -> None:
    """The page's rules are the scenario's, but for the addresses."""
    run, setup = find_scenario("relay_boots").load()
    ends = {"old": "10.2.0.10", "source": "10.2.0.11", "port": 5000}
    assert RULES.text == run.__globals__["SILENT"].format(ip="ip", **ends)
    with Lab("lab", engine="repair", family=family, **setup) as lab:
        perform(lab, partial(run, silent=silent))

    failed = {each.name for each in lab.report.assertions if not each.ok}
    # The destination may have repeated itself meanwhile, to a port that is the relay's own.
    assert failed - (set() if silent else {TO_THE_RELAY}) == (set() if silent else RESET)
    assert bool(lab.report.resets) != silent


TO_THE_RELAY = "no port differs from the kept ones"
RESET = {
    "the connections carry on after the move",
    "every octet arrived once and in order",
    "no reset on any wire",
}
