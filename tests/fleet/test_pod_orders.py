"""What an agent puts where natkeep-cni looks, and when it takes it away."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_nodes import LISTING, ORDER, Fleet
from fleet_restores import DUMP, prepare_in_hook

from natkeep.checkpoint import Inventory, NetworkLock
from natkeep.checkpoint.listing import parse_listing
from natkeep.cni.call import Call, Config, Pod
from natkeep.cni.order import find_order
from natkeep.fleet import apply as orders
from natkeep.fleet.directory import DirectoryStore
from natkeep.fleet.order import parse_file
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.teardown import teardown
from natkeep.values import replace

MORE = f"{LISTING}10.2.0.10:5000 10.1.0.2:50003\n"


def order(**keys: Any) -> dict[str, Any]:
    sites = [
        {"node": "host-b", "role": "destination", "netns": "pod:shop/web-b"},
        {"group": "edge", "role": "gateway", "netns": "gw"},
    ]
    return {**ORDER, "maps": ["10.2.0.10=auto"], "sites": sites, **keys}


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("natkeep.policy.PATH", "/nowhere/natkeep.toml")
    fleet = Fleet(tmp_path, DirectoryStore(str(tmp_path / "store")))
    yield fleet
    fleet.store.close()


def files(fleet: Fleet) -> list[str]:
    folder = Path(fleet.nodes["host-b"].directory, "orders")
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def read(fleet: Fleet, name: str = "web-b") -> Any:
    """The order as natkeep-cni reads it."""
    folder = str(Path(fleet.nodes["host-b"].directory, "orders"))
    config = Config("pods", folder, None, None, None, None)
    return find_order(Call("ADD", "c1", "eth0", "/run/netns/x", Pod("shop", name, "u-1"), config))


def prepare_in_plugin(fleet: Fleet) -> None:
    prepare_in_hook(fleet.nodes["host-b"], "web", dump=None)
    fleet.turn()


def begin(fleet: Fleet, **keys: Any) -> None:
    fleet.add("host-b")
    fleet.add("gw-1", groups=("edge",))
    fleet.apply(order(**keys))
    fleet.turn()


def test_the_plugin_finds_the_order_and_its_list(fleet: Fleet) -> None:
    begin(fleet)
    found = read(fleet)
    assert (found.id, [*map(str, found.wishes)]) == ("web", ["10.2.0.10=auto"])
    assert len(found.read_connections().connections) == 2
    assert found.dump == "", "the list is of no dump"
    assert read(fleet, "web-c") is None
    folder = Path(fleet.nodes["host-b"].directory, "orders")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_the_order_names_the_dump_that_its_list_is_of(fleet: Fleet) -> None:
    fleet.add("host-b")
    fleet.add("gw-1", groups=("edge",))
    told, _ = parse_file(json.dumps(order()))
    dump = Inventory(NetworkLock.NFTABLES, DUMP)
    orders.apply(fleet.store, told, replace(parse_listing(LISTING, "list"), inventory=dump))
    fleet.turn()
    assert read(fleet).dump == DUMP


def test_it_is_there_until_the_pod_is_open(fleet: Fleet) -> None:
    begin(fleet)
    assert fleet.phases() == {"host-b": "gone", "gw-1": "gone"}
    prepare_in_plugin(fleet)
    assert fleet.phases() == {"host-b": "prepared", "gw-1": "open"}
    assert read(fleet), "its sandbox may be made again"
    open_move(fleet.nodes["host-b"].executor(), "web")
    fleet.turn()
    assert fleet.phases() == {"host-b": "open", "gw-1": "open"}
    assert files(fleet) == []


def test_an_order_that_ends_takes_it_away_at_once(fleet: Fleet) -> None:
    begin(fleet)
    prepare_in_plugin(fleet)
    fleet.end()
    fleet.nodes["host-b"].turn()
    assert files(fleet) == []
    assert fleet.nodes["host-b"].journal(), "the gateway still sends there"
    fleet.turn()
    assert fleet.phases() == {"host-b": "gone", "gw-1": "gone"}


def test_a_later_list_takes_the_place_of_the_first(fleet: Fleet) -> None:
    begin(fleet, phase="staged")
    first = files(fleet)
    fleet.apply(order(), MORE)
    fleet.turn()
    assert len(read(fleet).read_connections().connections) == 3
    assert (len(first), len(files(fleet))) == (2, 2)


def test_an_agent_that_was_killed_writes_nothing_again(fleet: Fleet) -> None:
    begin(fleet)
    node = fleet.nodes["host-b"]
    before = [path.stat().st_mtime_ns for path in Path(node.directory, "orders").iterdir()]
    node.kill()
    node.start()
    fleet.turn()
    assert [path.stat().st_mtime_ns for path in Path(node.directory, "orders").iterdir()] == before


def test_an_order_that_vanishes_takes_nothing_away(fleet: Fleet) -> None:
    begin(fleet)
    before = files(fleet)
    fleet.store.delete("/natkeep/v1/node/host-b/want/")
    fleet.turn()
    assert files(fleet) == before


def test_a_pod_has_one_order(fleet: Fleet) -> None:
    begin(fleet)
    fleet.apply(order(id="other", maps=["10.2.0.99=auto"]), "10.2.0.99:1 10.1.0.2:2\n")
    fleet.turn()
    error = fleet.error("host-b", "other")
    assert (error.exit, "has the order of another move" in error.message) == (4, True)
    assert read(fleet).id == "web"
    fleet.end("other")
    fleet.turn()
    assert read(fleet).id == "web", "the end of the other one leaves it"


def test_what_the_operator_does_not_allow_is_not_put_there(fleet: Fleet) -> None:
    fleet.add("host-b", roles=("gateway",))
    fleet.add("gw-1", groups=("edge",))
    fleet.apply(order())
    fleet.turn()
    error = fleet.error("host-b")
    assert "takes no orders as destination" in error.message
    assert files(fleet) == []


@pytest.mark.parametrize("netns", ["", "pod:../x", "pod:a/b/c", "pod:shop/", "pod:A/b", "pod:a/.."])
def test_a_name_that_is_no_pods_is_no_file(fleet: Fleet, netns: str) -> None:
    sites = [{"node": "host-b", "role": "destination", "netns": netns}, order()["sites"][1]]
    begin(fleet, sites=sites)
    assert files(fleet) == []


def test_a_file_that_was_written_by_hand_is_left(fleet: Fleet) -> None:
    fleet.add("host-b")
    fleet.add("gw-1", groups=("edge",))
    path = Path(fleet.nodes["host-b"].directory, "orders", "shop_web-b.json")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"schema": 1, "id": "mine"}))
    before = path.read_text()
    fleet.apply(order())
    fleet.turn()
    error = fleet.error("host-b")
    assert "another move" in error.message
    assert path.read_text() == before


def test_a_later_pod_of_that_name_has_no_order(fleet: Fleet) -> None:
    """The pod was open, and is deleted; one of a StatefulSet comes again by its name."""
    begin(fleet)
    prepare_in_plugin(fleet)
    node = fleet.nodes["host-b"]
    open_move(node.executor(), "web")
    fleet.turn()
    teardown(node.executor(), "web")  # by DEL
    assert node.agent is not None
    node.agent.reconcile({"web"})
    assert files(fleet) == []
    node.kill()
    node.start()
    fleet.turn()
    assert files(fleet) == []
    fleet.apply(order())
    fleet.turn()
    assert read(fleet).id == "web", "it was ordered anew"
