"""What is half undone, or made anew: by a failure, another hand or a later order."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fleet_nodes import LISTING, ORDER, READY, UNDONE, Fleet, Node, later
from fleet_nodes import fleet as fleet
from fleet_nodes import quick as quick

from natkeep.checkpoint.listing import parse_listing
from natkeep.errors import KernelError, LeftoverError
from natkeep.fleet import apply as orders
from natkeep.fleet import keys, progress, site
from natkeep.fleet.agent import Agent
from natkeep.fleet.want import NO_WANT, make_maps
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Move, Site
from natkeep.plan.roles import Role


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


@pytest.mark.parametrize("name", ["host-b", "host-a"])
def test_what_a_hand_is_undoing_is_not_prepared_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The agent wakes at the first line of the journal, while the teardown goes on."""
    fleet.usual()
    fleet.apply()
    fleet.turn()
    node = fleet.nodes[name]
    fail_in_undo(monkeypatch, node, "RemoveGate")
    with pytest.raises(LeftoverError):
        teardown(node.executor(), "web")
    before = node.journal()
    assert before
    fleet.turn()
    assert node.journal() == before
    error = fleet.error(name)
    assert (error.exit, "half undone by another hand" in error.message) == (8, True)
    monkeypatch.undo()
    teardown(node.executor(), "web")
    fleet.turn()
    assert node.journal() is None
    error = fleet.error(name)
    assert "undone by another hand" in error.message


def test_what_another_hand_is_at_is_looked_at_when_it_is_through(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply()
    fleet.turn()
    state = host_b.executor().state
    whole = Path(host_b.directory, "web.journal")
    text = whole.read_text()
    lines = text.splitlines(keepends=True)
    *_, last = (number for number, line in enumerate(lines) if '"done"' in line)
    whole.write_text("".join(lines[:last]))
    assert site.look(state, "web").standing == site.Standing.HALF

    @contextmanager
    def held(move_id: str) -> Iterator[bool]:
        whole.write_text(text)  # it was a repair, say
        yield True

    monkeypatch.setattr(state, "holding", held)
    assert site.look_calmly(state, "web").standing == site.Standing.PREPARED


def test_what_was_prepared_by_hand_after_an_end_is_left_alone(fleet: Fleet) -> None:
    host_b, *_ = fleet.usual()
    order = fleet.apply()
    fleet.turn()
    fleet.end()
    fleet.turn()
    assert fleet.phases() == UNDONE
    move = Move("web", make_maps(order.maps), (Site(Role.DESTINATION, "dst"),))
    prepare(host_b.executor(), move, parse_listing(LISTING, "list").connections)
    before = host_b.journal()
    for _ in range(2):
        host_b.kill()
        host_b.start()
        fleet.turn()
        assert host_b.journal() == before
        error = fleet.error("host-b")
        assert "by another hand" in error.message
        fleet.apply()


def test_an_agent_killed_while_a_deadline_undoes_does_not_prepare_it_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply({**ORDER, "phase": "staged", "deadline_s": 1})
    fleet.turn()
    later(monkeypatch, 2)
    with monkeypatch.context() as patch:
        fail_in_undo(patch, host_b, "RemoveGate")
        fleet.turn()
    assert host_b.journal()
    host_b.kill()
    host_b.start()
    fleet.turn()
    assert host_b.journal() is None
    error = fleet.error("host-b")
    assert error.code == "deadline"


def test_what_expired_before_a_boot_is_not_prepared_after_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/run is empty by then: journals, and which order was followed, are gone."""
    host_b, *_ = fleet.usual()
    fleet.apply({**ORDER, "phase": "staged", "deadline_s": 1})
    fleet.turn()
    later(monkeypatch, 2)
    fleet.turn()
    host_b.kill()
    shutil.rmtree(host_b.directory)
    host_b.start()
    fleet.turn()
    assert host_b.journal() is None
    error = fleet.error("host-b")
    assert error.code == "deadline"
    fleet.apply()
    fleet.turn()
    assert fleet.phases() == READY


def test_where_the_process_was_a_later_list_leaves_no_gap(fleet: Fleet) -> None:
    """Between the undo and the prepare its host would reset peers."""
    _, _, host_a = fleet.usual()
    fleet.apply()
    fleet.turn()
    before = host_a.journal()
    fleet.apply(listing=LISTING + "10.2.0.10:5000 10.1.0.2:50003\n")
    fleet.turn()
    assert host_a.journal() == before
    error = fleet.error("host-a")
    assert "is prepared as an earlier order had it" in error.message


def test_of_a_later_list_and_a_gateway_only_one_comes_first(fleet: Fleet) -> None:
    """The gateway opens by the first order, while the destination is about to be made anew."""
    host_b, gateway, _ = fleet.usual()
    fleet.apply()
    host_b.turn()
    assert gateway.agent is not None
    for prefix in (*gateway.agent.known.prefixes, keys.dones("host-b")):
        gateway._hear(gateway.agent, prefix)
    gateway.followed.add(keys.dones("host-b"))
    fleet.apply(listing=LISTING + "10.2.0.10:5000 10.1.0.2:50003\n")
    agent, clear = gateway.agent, site.clear

    def open_before(*words: Any) -> bool:
        agent.reconcile({"web"})
        return clear(*words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "clear", open_before)
        host_b.turn()
    assert gateway.journal() is None, "what it saw is not true any more"
    fleet.turn()
    assert fleet.phases() == READY
    assert len(gateway.executor().state.load("web").connections) == 3


def test_what_was_open_before_a_boot_is_cleared(fleet: Fleet) -> None:
    """Of a pod that is made again, say: nothing of the first is there."""
    host_b, *_ = fleet.usual()
    fleet.apply()
    fleet.turn()
    fleet.open()
    executor = host_b.executor()
    assert not site.clear(executor, "web", NO_WANT), "it is in use"
    journal = Path(host_b.directory, "web.journal")
    boot = journal.read_text().partition('"boot":')[2].split('"')[1]
    journal.write_text(journal.read_text().replace(boot, "another"))
    host_b.kernel.sites.clear()
    assert site.clear(host_b.executor(), "web", NO_WANT)
    assert host_b.journal() is None


def test_a_gateway_that_came_later_sends_too(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order does not name it, and its agent is dead by now; what it has loaded is not."""
    host_b, gateway, host_a = fleet.usual()
    gateway.kernel.fail_at = 0
    fleet.apply({**ORDER, "deadline_s": 1})
    fleet.turn()
    gateway.kill()
    fleet.store.txn({keys.done("gw-1", "web"): None, keys.alive("gw-1"): None})
    late = fleet.add("gw-2", groups=("edge",))
    fleet.turn()
    assert late.journal()
    late.kill()
    fleet.store.txn({keys.alive("gw-2"): None})
    later(monkeypatch, 2)
    fleet.turn()
    assert host_b.journal()
    error = fleet.error("host-b")
    assert "since peers are sent here by gw-2" in error.message
    fleet.end(force=True)
    fleet.turn()
    assert host_b.journal()
    assert host_a.journal()
    assert fleet.done("host-b").waits == {"gw-1": "gone", "gw-2": "gone", "host-a": "gone"}
    late.start()
    gateway.start()
    fleet.turn()
    assert {*fleet.phases().values()} == {"gone"}


def test_of_deadline_and_a_gateway_that_comes_just_then_one_comes_first(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_b, gateway, _ = fleet.usual()
    gateway.kernel.fail_at = 0
    fleet.apply({**ORDER, "deadline_s": 1})
    host_b.turn()
    gateway.kill()
    late = fleet.add("gw-2", groups=("edge",))
    later(monkeypatch, 2)
    say_if = Agent._say_if

    def open_before(*words: Any) -> bool:
        monkeypatch.setattr(Agent, "_say_if", say_if)
        late.turn()
        return say_if(*words)

    monkeypatch.setattr(Agent, "_say_if", open_before)
    host_b.turn()
    assert late.journal()
    assert host_b.journal()
