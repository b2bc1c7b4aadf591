"""natkeep is upgraded while a move that the earlier one prepared keeps its connections."""

from __future__ import annotations

import pytest
from earlier_natkeep import remove_later, write_older

from natkeep.lab.lab import Lab
from natkeep.lab.scenario import perform

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.mark.parametrize(("schema", "family"), [(1, 4), (2, 6)])
def test_the_connections_live_through_it_and_lack_nothing_afterwards(schema, family):
    def story(lab: Lab) -> None:
        lab.begin(connections=3)
        lab.move()
        write_older(lab.directory / "natkeep-state/lab.journal", schema)
        for role in lab.topology.sites:
            remove_later(lab.topology[role].name)
        lab.traffic.talk_on()
        lab.translator.call("status", "lab", "--strict")  # nothing that it had is missing
        assert "did not have" in lab.translator.run("repair", "--all").stderr
        assert "nothing to repair" in lab.translator.run("repair", "--all").stderr
        lab.translator.call("status", "lab", "--strict")
        lab.traffic.talk_on()
        lab.traffic.quiet()
        lab.conditions.conntrack_loose(0)
        for role in lab.topology.sites:  # which the earlier one did not outlive
            lab.conditions.flush_conntrack(role)
            lab.traffic.server_says()
            lab.traffic.client_says()
        lab.conditions.conntrack_loose(1)
        lab.traffic.server_closes()
        lab.traffic.client_closes()
        lab.finish()

    with Lab("upgrade", engine="repair", family=family) as lab:
        perform(lab, story)

    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert lab.report.passed
