"""scenario hook_waits_for_the_agent without its wait: it is what keeps NEW from the peers."""

from __future__ import annotations

from functools import partial

import pytest

from natkeep.lab import scenario
from natkeep.lab.lab import Lab
from natkeep.lab.scenario import find_scenario

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.criu]


def test_without_the_wait_every_peer_hears_new_and_resets_it() -> None:
    found = find_scenario("hook_waits_for_the_agent")
    run, setup = found.load()
    with Lab(found.name, **setup) as lab:
        scenario.perform(lab, partial(run, waits=False))
    wrong = {each.name for each in lab.report.assertions if not each.ok}
    assert {"no reset on any wire", "no port differs from the kept ones"} <= wrong
    [told] = [each for each in lab.report.assertions if each.name == "each peer has reset NEW"]
    assert told.ok, told.detail
