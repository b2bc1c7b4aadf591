"""The controller on three members of etcd that demand certificates and passwords.

The controller is the user `orderer`, each agent its node's own user; the API is one in memory, and
the agents have the fake kernel.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_nodes import Fleet
from guarded_etcd import Guarded
from kubernetes_api import MOVES, NODES, PODS, Api, make_move, make_pod

from bench.etcd_cluster import NUMBERS
from natkeep.errors import NatkeepError
from natkeep.fleet import etcd, keys
from natkeep.fleet.order import Order, parse_order
from natkeep.fleet.store import read
from natkeep.lifecycle.open import open_move

pytestmark = pytest.mark.needs("etcd", "openssl")

AGENTS = ("node-2", "node-3.gateway")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path_factory.mktemp("guarded"))
    try:
        done = guarded.init(*AGENTS)
        assert done.returncode == 0, done.stderr
        yield guarded
    finally:
        guarded.cluster.close()


@pytest.fixture
def api() -> Iterator[Api]:
    """Both pods, and nodes of which one is a gateway."""
    with Api() as api:
        api.create(PODS, make_pod("web-a", "node-1", "10.2.0.10"))
        api.create(PODS, make_pod("web-b", "node-2", "10.3.0.20"))
        for name, labels in (("node-2", {}), ("node-3", {"zone": "a"})):
            api.create(NODES, {"metadata": {"name": name, "labels": labels}})
        yield api


@pytest.fixture
def fleet(tmp_path: Path, guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("natkeep.policy.PATH", "/nowhere/natkeep.toml")
    monkeypatch.setattr("natkeep.fleet.site.find_netns", lambda spec: spec.replace(":", "-"))
    stores = {user: guarded.open("node", user) for user in ("orderer", *AGENTS)}
    fleet = Fleet(tmp_path, stores["orderer"])
    for name in AGENTS:
        fleet.add(name, stores[name])
    yield fleet
    for store in stores.values():
        store.close()


def begin(api: Api, **spec: Any) -> str:
    """The id of a move, whose object is made."""
    body = make_move(gateways=[{"nodeSelector": {"zone": "a"}}], **spec)
    return str(api.create(MOVES, body)["metadata"]["uid"]).replace("-", "")


def order(fleet: Fleet, move_id: str) -> Order:
    item = read(fleet.store, keys.move(move_id))
    assert item is not None
    return parse_order(item.value)


def is_in(phase: str) -> Callable[[dict[str, Any]], bool]:
    return lambda status: status.get("phase") == phase


def says(word: str) -> Callable[[dict[str, Any]], bool]:
    """Whether the condition Ordered has this reason."""
    return lambda status: any(
        (each["type"], each["reason"]) == ("Ordered", word) for each in status["conditions"]
    )


def surfaces(fleet: Fleet) -> dict[str, Any]:
    """All that the kernels hold."""
    return {name: copy.deepcopy(node.kernel.sites) for name, node in fleet.nodes.items()}


def test_a_move_by_these_rights_from_its_object_to_its_end(api: Api, fleet: Fleet) -> None:
    with api.controller(fleet.store):
        move_id = begin(api)
        api.wait("web", says("Ordered"))
        wanted = fleet.store.range(keys.wants("node-2")).items
        assert [*wanted] == [f"{keys.wants('node-2')}{move_id}"]
        status = api.wait("web", is_in("Prepared"), fleet.turn)
        assert (status["old"], status["new"]) == (["10.2.0.10"], ["10.3.0.20"])
        api.change("web", frozen=True)
        api.wait("web", is_in("Ready"), fleet.turn)
        assert fleet.done("node-3.gateway", move_id).phase == "open"
        open_move(fleet.nodes["node-2"].executor(), move_id)
        api.wait("web", is_in("Open"), fleet.turn)
        api.delete("web")
        api.wait("web", lambda its: "connections live" in str(its["conditions"]), fleet.turn)
        api.change("web", endConnections=True)
        api.wait_gone("web", fleet.turn)
    assert not any(node.executor().state.ids() for node in fleet.nodes.values())
    assert order(fleet, move_id).phase == "settled"
    fleet.turn()
    left = {key for key in fleet.store.range(keys.TOP).items if move_id in key}
    assert left == {keys.move(move_id)}


class Outage:
    """All members are away: they hang, or they die and are started anew."""

    def __init__(self, guarded: Guarded, how: str) -> None:
        cluster = guarded.cluster
        self._guarded = guarded
        self._begin, self._end = {
            "hang": (cluster.stop, cluster.go_on), "die": (cluster.kill, cluster.start),
        }[how]  # fmt: skip

    def __enter__(self) -> None:
        for number in NUMBERS:
            self._begin(number)

    def __exit__(self, *_: object) -> None:
        for number in NUMBERS:
            self._end(number)
        until = time.monotonic() + 60
        while True:
            store = self._guarded.open("node", "orderer")
            try:
                store.range(keys.TOP)
                return
            except NatkeepError:
                assert time.monotonic() < until
            finally:
                store.close()


@pytest.fixture(params=["hang", "die"])
def outage(request: pytest.FixtureRequest, guarded: Guarded) -> Outage:
    return Outage(guarded, request.param)


def test_while_etcd_is_away_it_is_said_and_nothing_is_undone(
    api: Api, fleet: Fleet, outage: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with api.controller(fleet.store):
        move_id = begin(api, frozen=True)
        known = api.wait("web", is_in("Ready"), fleet.turn)
        before, ordered = surfaces(fleet), order(fleet, move_id)
        with monkeypatch.context() as impatient, outage:
            impatient.setattr(etcd, "_PATIENCE", 0.3)
            told = api.wait("web", says("Unreachable"))
            [why] = [each for each in told["conditions"] if each["type"] == "Ordered"]
            assert why["status"] == "Unknown"
            assert "etcd cannot be reached" in why["message"]
            assert (told["phase"], told["sites"]) == ("Ready", known["sites"])
        api.wait("web", says("Ordered"))
        assert order(fleet, move_id) == ordered
        assert api.wait("web", is_in("Ready"), fleet.turn)["sites"] == known["sites"]
        assert surfaces(fleet) == before
        api.delete("web")
        api.wait_gone("web", fleet.turn)
    assert not any(node.executor().state.ids() for node in fleet.nodes.values())


def test_an_object_that_is_deleted_while_etcd_is_away_is_held_until_its_move_is_undone(
    api: Api, fleet: Fleet, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with api.controller(fleet.store):
        move_id = begin(api, frozen=True)
        api.wait("web", is_in("Ready"), fleet.turn)
        before, ordered = surfaces(fleet), order(fleet, move_id)
        with monkeypatch.context() as impatient, Outage(guarded, "hang"):
            impatient.setattr(etcd, "_PATIENCE", 0.3)
            api.delete("web")
            api.wait("web", lambda _: tries_to_end(api))
            assert is_in("Ready")(api.status())
        assert surfaces(fleet) == before
        api.wait("web", is_in("Ending"))
        assert order(fleet, move_id).generation == ordered.generation + 1
        assert surfaces(fleet) == before, "its agents have not heard of it"
        api.wait_gone("web", fleet.turn)
    assert not any(node.executor().state.ids() for node in fleet.nodes.values())


def tries_to_end(api: Api) -> bool:
    """Whether kopf has noted that the object's end has failed before."""
    meta = (api.find("web") or {})["metadata"]
    return json.loads(meta["annotations"].get("natkeep.dev/end", "{}")).get("retries", 0) > 1


def test_what_is_made_while_etcd_is_away_is_ordered_when_it_is_back(
    api: Api, fleet: Fleet, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as impatient, Outage(guarded, "die"):
        impatient.setattr(etcd, "_PATIENCE", 0.3)
        with api.controller(fleet.store):
            begin(api)
            told = api.wait("web", says("Unreachable"))
            assert told["phase"] == "Pending"
    with api.controller(fleet.store):
        api.wait("web", is_in("Prepared"), fleet.turn)
        api.delete("web")
        api.wait_gone("web", fleet.turn)
