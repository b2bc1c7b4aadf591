"""A container goes into a pod of another node; the rest of it is `make bench-pods`."""

from __future__ import annotations

import pytest

from natkeep.lab import scenario
from natkeep.lab.engines.runc import find_left_cgroups
from natkeep.lab.scenario import find_scenario


@pytest.mark.root
@pytest.mark.criu
@pytest.mark.lab
@pytest.mark.needs("runc", "containerd")
def test_a_pods_connections_are_kept() -> None:
    cgroups = set(find_left_cgroups())

    report = scenario.run(find_scenario("pod_moves"), family=6)

    assert [str(each) for each in report.assertions if not each.ok] == []
    assert report.engine == "containerd"
    assert report.before == report.after
    assert len(report.before) == 3
    assert report.resets == 0
    assert set(find_left_cgroups()) <= cgroups  # other runs have their own, while they live
