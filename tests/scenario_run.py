"""A scenario run with a family, a mode and words of its own."""

from __future__ import annotations

from functools import partial

from natkeep.lab import scenario
from natkeep.lab.lab import Lab
from natkeep.lab.scenario import find_scenario


def assert_passes(name: str, family: int, mode: str, **more: object) -> None:
    """more: what the scenario's function takes besides the lab."""
    found = find_scenario(name)
    run, setup = found.load()
    options = {**setup, "engine": "repair", "family": family, "mode": mode}
    with Lab(found.name, **options) as lab:
        scenario.perform(lab, partial(run, **more))

    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert lab.report.passed
