"""A scenario run with a family, a mode and words of its own."""

from __future__ import annotations

from functools import partial

from natkeep.lab import scenario
from natkeep.lab.lab import Lab
from natkeep.lab.scenario import find_scenario


def assert_passes(name: str, family: int, mode: str, **more: object) -> None:
    """more: what the scenario's function takes besides the lab."""
    found = find_scenario(name)
    run, _ = found.load()
    with Lab(found.name, engine="repair", family=family, mode=mode) as lab:
        scenario.perform(lab, partial(run, **more))

    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert lab.report.passed
