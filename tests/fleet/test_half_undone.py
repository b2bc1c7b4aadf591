"""What is half undone, since an undo failed or another hand is at it: it is not gone."""

from __future__ import annotations

from typing import Any

import pytest
from fleet_nodes import UNDONE, Fleet, Node
from fleet_nodes import fleet as fleet
from fleet_nodes import quick as quick

from natkeep.errors import KernelError
from natkeep.fleet import apply as orders
from natkeep.fleet import progress


def fail_in_undo(monkeypatch: pytest.MonkeyPatch, node: Node, kind: str) -> None:
    """That node's kernel refuses to undo steps of that kind."""
    kernel, revert, revert_many = node.kernel, node.kernel.revert, node.kernel.revert_many

    def refuse(undo: object) -> None:
        if type(undo).__name__ == kind:
            raise KernelError("no")

    def one(site: Any, undo: Any, prior: Any) -> None:
        refuse(undo)
        revert(site, undo, prior)

    def many(site: Any, undos: Any) -> None:
        for undo, _ in undos:
            refuse(undo)
        revert_many(site, undos)

    monkeypatch.setattr(kernel, "revert", one)
    monkeypatch.setattr(kernel, "revert_many", many)


def test_a_gateway_that_is_half_undone_is_not_gone(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may send to the destination still, which would reset what comes once it is undone."""
    host_b, gateway, host_a = fleet.usual()
    fleet.apply()
    fleet.turn()
    with monkeypatch.context() as patch:
        fail_in_undo(patch, gateway, "Unload")
        order = fleet.end(force=True)
        fleet.turn()
    done = fleet.done("gw-1")
    assert done.error is not None
    assert (done.error.exit, str(done.phase)) == (8, "opening")
    assert host_b.journal()
    assert host_a.journal()
    assert fleet.done("host-b").waits == {"gw-1": "gone", "host-a": "gone"}
    assert order is not None
    assert not orders.is_undone(fleet.store, order)
    assert progress.look(fleet.store, "web").lacking("settled")
    fleet.turn()
    assert fleet.phases() == UNDONE
