"""What fails is tried again, later each time, and never given up."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
from fleet_nodes import READY, Fleet
from fleet_nodes import fleet as fleet
from fleet_nodes import quick as quick

from natkeep.errors import NatkeepError, RefusedError, UnreachableError
from natkeep.fleet import keys, retries
from natkeep.fleet.retries import Retries


def test_it_is_tried_later_each_time_for_days(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(retries.time, "monotonic", lambda: now)
    tries, rests = Retries(), list[float]()
    for _ in range(2000):
        tries.fail("web")
        assert tries.overdue() == set()
        [due] = tries._due.values()
        rests.append(due - now)
        now = due
        assert tries.overdue() == {"web"}
        tries.begin("web")
    assert rests[:8] == [0.5, 1, 2, 4, 8, 16, 32, 60]
    assert {*rests[8:]} == {60}
    tries.succeed("web")
    tries.fail("web")
    assert tries._due["web"] - now == 0.5
    tries.after("web", 0.1)
    tries.after("web", 9)
    assert tries._due["web"] - now == pytest.approx(0.1)


@pytest.mark.parametrize("error", [UnreachableError("no member"), RefusedError("denied")])
def test_a_store_that_takes_nothing_ends_no_agent(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, error: NatkeepError
) -> None:
    """It refuses a user whose password is made anew, say."""
    host_b, *_ = fleet.usual()
    fleet.apply()
    assert host_b.agent is not None

    def refuse(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(fleet.store, "txn", refuse)
        host_b.turn()
    assert host_b.agent._retries._due.keys() == {"web"}
    assert any(str(error) in line for line in host_b.said)
    fleet.turn()
    assert fleet.phases() == READY


def test_an_order_that_is_none_holds_no_memory(fleet: Fleet) -> None:
    host_b = fleet.add("host-b")
    fleet.store.txn({f"{keys.wants('host-b')}web": "{"})
    host_b.turn()
    agent: Any = host_b.agent
    for _ in range(5):
        agent.reconcile({"web"})
    order = agent.known.find_order("web")
    assert len(traceback.extract_tb(order.__traceback__)) <= 2
