"""NEW is known at the restore only: the hook prepares the destination, and the others follow."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fleet_nodes import LISTING, OPENED, READY, UNDONE, Fleet
from fleet_restores import AUTO, DUMP, hear_hooks, prepare_in_hook
from fleet_restores import fleet as fleet

from natkeep.checkpoint import Inventory, NetworkLock
from natkeep.checkpoint.listing import parse_listing
from natkeep.fleet import apply as orders
from natkeep.fleet import keys, progress
from natkeep.fleet.order import parse_file
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.maps import make_map
from natkeep.plan.move import Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.tuples import parse_local
from natkeep.policy import Agent
from natkeep.values import replace


def gateway_maps(fleet: Fleet) -> list[str]:
    move = fleet.nodes["gw-1"].executor().state.load("web").move
    return [*map(str, move.maps)]


def test_gateways_wait_for_the_restore_and_have_new_of_it(fleet: Fleet) -> None:
    assert fleet.phases() == UNDONE
    assert fleet.done("gw-1").waits == {"host-b": "prepared"}
    prepare_in_hook(fleet.nodes["host-b"])
    hear_hooks(fleet)
    assert fleet.phases() == READY
    assert gateway_maps(fleet) == ["10.2.0.10=10.3.0.20"]
    assert fleet.nodes["gw-1"].kernel.sites["gw"].gates == {"web": Gate.OPEN}
    assert fleet.done("host-b").hooked == "criu-7-1a"
    assert not progress.look(fleet.store, "web").lacking("ready")
    open_move(fleet.nodes["host-b"].executor(), "criu-7-1a")
    hear_hooks(fleet)
    assert fleet.phases() == OPENED
    fleet.end(force=True)
    fleet.turn()
    assert fleet.phases() == UNDONE
    assert not fleet.nodes["host-b"].executor().state.ids()


def test_who_knows_new_before_prepares_under_the_orders_id(fleet: Fleet) -> None:
    prepare_in_hook(fleet.nodes["host-b"], "web", dump=None)
    fleet.turn()
    assert fleet.phases() == READY
    assert fleet.done("host-b").hooked == ""


def test_agents_that_were_killed_know_as_much(fleet: Fleet) -> None:
    prepare_in_hook(fleet.nodes["host-b"])
    hear_hooks(fleet)
    before = fleet.nodes["gw-1"].journal()
    for node in fleet.nodes.values():
        node.kill()
    open_move(fleet.nodes["host-b"].executor(), "criu-7-1a")
    for node in fleet.nodes.values():
        node.start()
    fleet.turn()
    assert fleet.phases() == OPENED
    assert fleet.nodes["gw-1"].journal() == before


def test_a_restore_of_another_dump_is_not_the_orders(fleet: Fleet) -> None:
    prepare_in_hook(fleet.nodes["host-b"], dump="another")
    hear_hooks(fleet)
    assert fleet.phases() == UNDONE


def test_a_second_restore_finds_another_new_while_nothing_was_opened(fleet: Fleet) -> None:
    host_b = fleet.nodes["host-b"]
    prepare_in_hook(host_b)
    hear_hooks(fleet)
    teardown(host_b.executor(), "criu-7-1a")
    prepare_in_hook(host_b, "criu-8-1b", "10.3.0.21")
    agent = host_b.agent
    assert agent is not None
    agent.reconcile(agent.known.about({"criu-8-1b"}))
    assert progress.look(fleet.store, "web").lacking("ready"), "NEW was another one"
    fleet.turn()
    assert fleet.phases() == READY
    assert gateway_maps(fleet) == ["10.2.0.10=10.3.0.21"]
    assert not progress.look(fleet.store, "web").lacking("ready")


def test_a_second_new_is_refused_once_the_first_was_opened(fleet: Fleet) -> None:
    host_b = fleet.nodes["host-b"]
    prepare_in_hook(host_b)
    hear_hooks(fleet)
    open_move(host_b.executor(), "criu-7-1a")
    hear_hooks(fleet)
    before = fleet.nodes["gw-1"].journal()
    told = replace(fleet.done("host-b"), maps=("10.2.0.10=10.3.0.99",))
    fleet.store.txn({keys.done("host-b", "web"): told.write(0)})
    fleet.nodes["gw-1"].turn()
    error = fleet.error("gw-1")
    assert "natkeep fleet end web first" in error.message
    assert fleet.nodes["gw-1"].journal() == before


def test_what_the_destination_says_may_name_new_and_nothing_else(fleet: Fleet) -> None:
    for maps in (["10.2.0.99=10.3.0.20"], ["10.2.0.10=127.0.0.1"], ["10.2.0.10=auto"], []):
        told = replace(fleet.done("host-b"), phase=progress.Phase.PREPARED, maps=tuple(maps))
        fleet.store.txn({keys.done("host-b", "web"): told.write(0)})
        gateway = fleet.nodes["gw-1"]
        gateway.turn()
        assert gateway.journal() is None
        assert fleet.done("gw-1").error is not None


def test_a_destination_that_says_nothing_any_more_undoes_nothing(fleet: Fleet) -> None:
    prepare_in_hook(fleet.nodes["host-b"])
    hear_hooks(fleet)
    before = fleet.nodes["gw-1"].journal()
    fleet.store.txn({keys.done("host-b", "web"): None})
    fleet.nodes["gw-1"].turn()
    assert fleet.nodes["gw-1"].journal() == before
    assert fleet.done("gw-1").error is None


def test_each_node_bounds_what_new_may_be(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "natkeep.toml"
    file.write_text('allow_new = ["10.9.0.0/16"]\n')
    monkeypatch.setattr("natkeep.policy.PATH", str(file))
    prepare_in_hook(fleet.nodes["host-b"])
    hear_hooks(fleet)
    error = fleet.error("gw-1")
    assert (error.exit, "NEW 10.3.0.20 is not allowed" in error.message) == (4, True)
    assert fleet.nodes["gw-1"].journal() is None


def test_the_operators_file_bounds_what_is_undone_of_a_restore(fleet: Fleet) -> None:
    """A store that may order no destination here may not end what a hook has made, either."""
    host_b = fleet.nodes["host-b"]
    host_b.kill()
    shutil.rmtree(host_b.directory)
    host_b.bounds = Agent(node="host-b", roles=("gateway",))
    host_b.start()
    prepare_in_hook(host_b)
    for _ in range(2):
        hear_hooks(fleet)
        error = fleet.error("host-b")
        assert (error.exit, "takes no orders as destination" in error.message) == (4, True)
        assert host_b.executor().state.ids() == ("criu-7-1a",)
        fleet.end(force=True)


def test_of_two_families_the_order_does_not_matter(fleet: Fleet) -> None:
    """NATKEEP_MAP of the hook, and maps of the order."""
    fleet.end()
    fleet.turn()
    maps = ["10.2.0.10=auto", "fd00:2::10=auto"]
    listing = f"{LISTING}[fd00:2::10]:5000 [fd00:1::2]:50001\n"
    order, _ = parse_file(json.dumps({**AUTO, "maps": maps}))
    dump = Inventory(NetworkLock.NFTABLES, DUMP)
    orders.apply(fleet.store, order, replace(parse_listing(listing, "list"), inventory=dump))
    pairs = [("fd00:2::10", "fd00:3::20"), ("10.2.0.10", "10.3.0.20")]
    hooks = tuple(make_map(parse_local(old), parse_local(new)) for old, new in pairs)
    move = Move("criu-7-1a", hooks, (Site(Role.DESTINATION, "dst"),))
    connections = parse_listing(listing, "list").connections
    prepare(fleet.nodes["host-b"].executor(), move, connections, image=DUMP)
    hear_hooks(fleet)
    assert fleet.phases() == READY
    assert gateway_maps(fleet) == ["10.2.0.10=10.3.0.20", "fd00:2::10=fd00:3::20"]
    assert not progress.look(fleet.store, "web").lacking("ready")
