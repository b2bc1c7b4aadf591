"""One ConnectionMove by the fleet's own code: a store in a directory, agents on the fake kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from fleet_nodes import Fleet
from fleet_restores import prepare_in_hook
from kubernetes_api import LISTING, make_move, make_pod
from kubernetes_schema import refuse

from natkeep.controller.reconcile import end, reconcile
from natkeep.errors import NatkeepError, RefusedError, UnreachableError
from natkeep.fleet import keys
from natkeep.fleet.directory import DirectoryStore
from natkeep.fleet.observed import Observed
from natkeep.fleet.order import Order, parse_order
from natkeep.fleet.store import Store, read
from natkeep.lifecycle.open import open_move
from natkeep.values import replace

MORE = f"{LISTING}10.2.0.10:5000 10.1.0.2:50003\n"


class Cluster:
    """The pods and nodes that the API has."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.nodes: dict[str, Mapping[str, str]] = {}
        self.error: NatkeepError | None = None

    def add_pod(self, name: str, *words: Any, **status: Any) -> dict[str, Any]:
        self.pods[name] = make_pod(name, *words, **status)
        return self.pods[name]

    def find_pod(self, namespace: str, name: str) -> dict[str, Any] | None:
        self._answer()
        assert namespace == "shop"
        return self.pods.get(name)

    def list_nodes(self, labels: Mapping[str, str]) -> list[str]:
        self._answer()
        return [name for name, its in self.nodes.items() if labels.items() <= its.items()]

    def _answer(self) -> None:
        if self.error is not None:
            raise self.error


class Rig:
    """A fleet, a cluster, and one object whose status is written back."""

    def __init__(self, path: Path) -> None:
        self.store: Store = DirectoryStore(str(path / "store"))
        self.fleet, self.cluster = Fleet(path, self.store), Cluster()
        self.body = make_move()

    def usual(self) -> None:
        """Both pods, the agents of the target's node and of a gateway."""
        self.fleet.add("node-2")
        self.fleet.add("gw-1", groups=("edge",))
        self.cluster.add_pod("web-a", "node-1", "10.2.0.10")
        self.cluster.add_pod("web-b", "node-2", "10.3.0.20")

    def change(self, **spec: Any) -> None:
        self.body["spec"] |= spec
        self.body["metadata"]["generation"] += 1

    def make_ready(self) -> None:
        """As `usual`, and the move is ordered and made ready."""
        self.usual()
        self.change(frozen=True)
        self.look()
        self.fleet.turn()

    def look(self) -> str:
        status = reconcile(self.body, self.store, self.cluster)  # type: ignore[arg-type]
        return self._keep(status)

    def end(self) -> str | None:
        status = end(self.body, self.store)
        return None if status is None else self._keep(status)

    def _keep(self, status: dict[str, Any]) -> str:
        self.body["status"] = status
        assert refuse({**make_move(), "status": status}) == []
        return str(status["phase"])

    def turn(self) -> str:
        """All agents act, and what they say is told."""
        self.fleet.turn()
        return self.look()

    def told(self, kind: str = "Ordered") -> tuple[str, str, str]:
        for each in self.body["status"]["conditions"]:
            if each["type"] == kind:
                return each["status"], each["reason"], each["message"]
        raise KeyError(kind)

    @property
    def id(self) -> str:
        return str(self.body["metadata"]["uid"]).replace("-", "")

    def order(self) -> Order:
        item = read(self.store, keys.move(self.id))
        assert item is not None
        return parse_order(item.value)

    def open(self) -> None:
        """As natkeep-hook does at post-restore."""
        open_move(self.fleet.nodes["node-2"].executor(), self.id)

    def to_open(self) -> None:
        self.usual()
        self.change(frozen=True)
        self.look()
        assert self.turn() == "Ready"
        self.open()
        assert self.turn() == "Open"


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    # The fake kernel has a namespace of any name; tests/kernel/test_pods.py has pods of /proc.
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("natkeep.policy.PATH", "/nowhere/natkeep.toml")
    monkeypatch.setattr("natkeep.fleet.site.find_netns", lambda spec: spec.replace(":", "-"))
    rig = Rig(tmp_path)
    store = rig.store
    yield rig
    store.close()


def ordered(rig: Rig) -> set[str]:
    """The moves in the store."""
    return {*rig.store.range(keys.MOVES).items}


def test_a_move_from_its_order_to_its_end(rig: Rig) -> None:
    rig.usual()
    assert rig.look() == "Ordered"
    assert rig.turn() == "Prepared"
    assert (rig.told("Accepted")[0], rig.told("Prepared")[0]) == ("True", "True")
    assert rig.told("Ready")[:2] == ("False", "NotFrozen")
    assert rig.fleet.done("gw-1", rig.id).phase == "gone", "the process runs yet"
    place = next(place for place in rig.order().places if not place.group)
    assert place.netns == f"pod:{rig.cluster.pods['web-b']['metadata']['uid']}"

    rig.change(frozen=True, connections=MORE)
    assert rig.look() == "Ordered"
    assert rig.turn() == "Ready"
    assert rig.told("Ready")[0] == "True"
    assert rig.told("Open")[:2] == ("False", "Waiting")
    rig.open()
    assert rig.turn() == "Open"
    assert rig.told("Open")[0] == "True"
    status = rig.body["status"]
    assert (status["old"], status["new"]) == (["10.2.0.10"], ["10.3.0.20"])
    assert (status["id"], status["connections"], status["observedGeneration"]) == (rig.id, 3, 2)
    assert {(site["node"], site["role"], site["phase"]) for site in status["sites"]} == {
        ("gw-1", "gateway", "open"), ("node-2", "destination", "open"),
    }  # fmt: skip

    rig.change(endConnections=True)
    assert rig.end() == "Ending"
    rig.fleet.turn()
    assert rig.end() is None
    assert rig.order().phase == "settled"
    assert all(node.agent and not node.executor().state.ids() for node in rig.fleet.nodes.values())


def test_to_look_again_changes_nothing(rig: Rig) -> None:
    rig.to_open()
    revision, status = rig.store.range(keys.TOP).revision, rig.body["status"]
    rig.look()
    assert rig.store.range(keys.TOP).revision == revision
    assert rig.body["status"] == status


# ---- what is not there yet, and what is wrong ----------------------------------------------------


def test_a_pod_whose_node_is_known_is_ordered_before_it_is_made(rig: Rig) -> None:
    """natkeep-cni prepares it there, and says NEW."""
    rig.usual()
    target = rig.cluster.pods.pop("web-b")
    rig.change(targetPod={"name": "web-b", "nodeName": "node-2"}, frozen=True)
    assert rig.look() == "Ordered"
    assert rig.told("Accepted")[:2] == ("False", "Waiting")
    assert rig.turn() == "Ordered"
    assert rig.told("Accepted")[0] == "True"
    assert rig.told("Prepared")[:2] == ("False", "Waiting")
    assert rig.body["status"]["new"] == ["auto"]
    node = rig.fleet.nodes["node-2"]
    assert Path(node.directory, "orders", "shop_web-b.json").exists()
    rig.cluster.pods["web-b"] = target
    prepare_in_hook(node, rig.id, dump=None)
    assert rig.turn() == "Ready"
    assert rig.told("Accepted")[0] == "True"
    assert rig.body["status"]["new"] == ["10.3.0.20"]
    rig.open()
    assert rig.turn() == "Open"
    rig.change(endConnections=True)
    rig.end()
    rig.fleet.turn()
    assert rig.end() is None


def test_a_pod_that_is_there_already_is_prepared_by_the_agent(rig: Rig) -> None:
    """natkeep-cni has been asked by then."""
    rig.usual()
    rig.change(targetPod={"name": "web-b", "nodeName": "node-2"})
    target = rig.cluster.pods["web-b"]
    rig.cluster.add_pod("web-b", "node-2")
    assert rig.look() == "Pending"
    rig.cluster.pods["web-b"] = target
    rig.look()
    assert rig.turn() == "Prepared"
    assert rig.body["status"]["new"] == ["10.3.0.20"]


def test_a_node_without_an_agent_is_refused_before_there_is_a_pod(rig: Rig) -> None:
    rig.usual()
    del rig.cluster.pods["web-b"]
    rig.change(targetPod={"name": "web-b", "nodeName": "node-9"})
    assert rig.look() == "Pending"
    assert rig.told()[2].startswith("no agent runs as node-9")


@pytest.mark.parametrize(
    ("pod", "why"),
    [
        (None, "there is no pod web-b yet"),
        (make_pod("web-b"), "the pod web-b has no address yet"),
        (make_pod("web-b", "node-2"), "the pod web-b has no address yet"),
    ],
)
def test_a_pod_that_is_to_come_is_waited_for(rig: Rig, pod: Any, why: str) -> None:
    rig.usual()
    target = rig.cluster.pods.pop("web-b")
    if pod:
        rig.cluster.pods["web-b"] = pod
    assert rig.look() == "Pending"
    assert rig.told() == ("False", "Waiting", why)
    assert ordered(rig) == set()
    rig.cluster.pods["web-b"] = target
    assert rig.look() == "Ordered"


def test_a_node_with_the_labels_is_waited_for(rig: Rig) -> None:
    rig.usual()
    rig.change(gateways=[{"nodeSelector": {"zone": "a"}}])
    rig.cluster.nodes["node-3"] = {"zone": "b"}
    assert rig.look() == "Pending"
    assert rig.told()[2] == "gateways: no node has these labels"


@pytest.mark.parametrize(
    ("name", "part", "value", "why"),
    [
        ("web-a", "spec", {"nodeName": "node-1", "hostNetwork": True}, "has its node's address"),
        ("web-a", "status", {"phase": "Failed"}, "the pod web-a has ended (Failed)"),
        ("web-b", "status", {"phase": "Succeeded"}, "the pod web-b has ended (Succeeded)"),
        ("web-b", "status", {"podIP": "fd00::2"}, "target pod has no IPv4 address"),
        ("web-b", "spec", {"nodeName": "node-9"}, "no agent runs as node-9"),
        ("web-b", "status", {"podIP": "10.2.0.10"}, "OLD and NEW are both 10.2.0.10"),
    ],
)
def test_a_pod_that_cannot_be_moved_is_refused(
    rig: Rig, name: str, part: str, value: Any, why: str
) -> None:
    rig.usual()
    rig.cluster.pods[name][part] = value
    assert rig.look() == "Pending"
    status, reason, message = rig.told()
    assert (status, reason) in (("False", "Refused"), ("False", "Invalid"))
    assert why in message
    assert ordered(rig) == set()


def test_another_pod_of_the_name_is_refused(rig: Rig) -> None:
    rig.usual()
    rig.change(sourcePod={"name": "web-a", "uid": "11111111-2222-3333-4444-555555555555"})
    rig.look()
    assert rig.told()[1] == "Refused"
    assert "the pod web-a is another one" in rig.told()[2]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ({"connections": "10.2.0.10:5000\n"}, "spec.connections"),
        ({"connections": ""}, "spec.connections"),
        ({"connections": None}, "None is not a text"),
        ({"gateways": [{}]}, "either group or nodeSelector"),
        ({"gateways": [{"nodeSelector": {}}]}, "nodeSelector without a label"),
        ({"gateways": [{"group": "a/b"}]}, "'a/b' is not a name"),
        ({"gateways": [{"group": "west"}]}, "no agent of the group west runs"),
        ({"mode": "both"}, "'both' is none of"),
        ({"unkept": "reset"}, "'reset' is none of"),
        ({"deadlineSeconds": -1}, "-1 is not a number"),
        ({"frozen": "yes"}, "frozen is true or false"),
        ({"sourcePod": {}}, "'name' is missing"),
    ],
)
def test_what_a_server_without_the_schema_lets_through_is_refused(
    rig: Rig, spec: dict[str, Any], why: str
) -> None:
    rig.usual()
    rig.change(**spec)
    assert rig.look() == "Pending"
    assert rig.told()[0] == "False"
    assert why in rig.told()[2]
    assert ordered(rig) == set()


def test_what_cannot_be_kept_is_reported_or_refused(rig: Rig) -> None:
    rig.usual()
    rig.change(connections=f"{LISTING}10.9.9.9:5000 10.1.0.2:50001\n", unkept="refuse")
    rig.look()
    assert rig.told()[:2] == ("False", "Refused")
    assert "not kept: 1 connections whose local address is not an OLD" in rig.told()[2]
    assert ordered(rig) == set()
    rig.change(unkept="report")
    assert rig.look() == "Ordered"
    assert "not kept: 1 connections" in rig.told()[2]
    rig.turn()
    assert "not kept: 1 connections" in rig.told()[2], "said as long as it stands"


def test_a_pod_with_both_families_has_both_kept(rig: Rig) -> None:
    rig.usual()
    rig.cluster.add_pod("web-a", "node-1", "10.2.0.10", "fd00:2::10")
    rig.cluster.add_pod("web-b", "node-2", "fd00:3::20", "10.3.0.20")
    rig.change(connections=f"{LISTING}[fd00:2::10]:5000 [fd00:1::2]:50001\n")
    rig.look()
    assert rig.turn() == "Prepared"
    assert rig.body["status"]["old"] == ["10.2.0.10", "fd00:2::10"]
    assert rig.body["status"]["new"] == ["10.3.0.20", "fd00:3::20"]


# ---- more than one -------------------------------------------------------------------------------


def test_of_two_moves_of_one_old_the_second_is_refused_and_comes_when_the_first_is_gone(
    rig: Rig, tmp_path: Path
) -> None:
    rig.usual()
    rig.look()
    rig.turn()
    first, before = rig.body, rig.order()
    rig.cluster.add_pod("web-c", "node-2", "10.3.0.30")
    second = rig.body = make_move("again", targetPod={"name": "web-c"})
    assert rig.look() == "Pending"
    assert rig.told()[:2] == ("False", "Refused")
    assert f"10.2.0.10 is moved by {before.id} already" in rig.told()[2]
    assert rig.end() is None, "it has nothing to undo"
    rig.body = first
    assert (rig.turn(), rig.order()) == ("Prepared", before)
    rig.end()
    rig.fleet.turn()
    assert rig.end() is None
    rig.body = second
    assert rig.look() == "Ordered"
    assert rig.turn() == "Prepared"


def test_an_object_made_again_is_another_move_and_the_first_one_stands(rig: Rig) -> None:
    """It vanished without its finalizer."""
    rig.to_open()
    before, move_id = rig.order(), rig.id
    rig.body = make_move(frozen=True)
    assert rig.look() == "Pending"
    assert f"10.2.0.10 is moved by {move_id} already" in rig.told()[2]
    rig.fleet.turn()
    item = read(rig.store, keys.move(move_id))
    assert item is not None
    assert parse_order(item.value) == before
    assert rig.fleet.done("node-2", move_id).phase == "open"


# ---- while it stands -----------------------------------------------------------------------------


def test_the_pods_are_not_looked_for_once_it_is_ordered(rig: Rig) -> None:
    rig.usual()
    rig.look()
    rig.turn()
    rig.cluster.pods.clear()
    rig.body["status"] = {}  # of a restored backup
    assert rig.look() == "Ordered"
    rig.change(frozen=True)
    rig.look()
    assert rig.turn() == "Ready"
    assert rig.body["status"]["new"] == ["10.3.0.20"]


def test_a_node_that_gets_the_labels_is_a_gateway_until_the_move_is_made(rig: Rig) -> None:
    rig.usual()
    for name in ("node-2", "node-3", "node-4"):
        rig.fleet.add(f"{name}.gateway")
    rig.cluster.nodes |= {"node-2": {"zone": "a"}}
    rig.change(gateways=[{"nodeSelector": {"zone": "a"}}], frozen=True)
    rig.look()
    assert rig.turn() == "Ready"
    rig.cluster.nodes |= {"node-3": {"zone": "a"}}
    rig.look()
    assert rig.turn() == "Ready"
    assert rig.fleet.done("node-3.gateway", rig.id).phase == "open"
    del rig.cluster.nodes["node-3"]
    assert rig.turn() == "Ready"
    assert rig.fleet.done("node-3.gateway", rig.id).phase == "open", "only an order undoes"
    rig.open()
    assert rig.turn() == "Open"
    rig.cluster.nodes |= {"node-4": {"zone": "a"}}
    assert rig.turn() == "Open"
    assert len(rig.order().places) == 3


def test_what_a_node_refuses_is_told(rig: Rig) -> None:
    rig.usual()
    rig.fleet.add("node-2.gateway", roles=("source",))
    rig.cluster.nodes["node-2"] = {"zone": "a"}
    rig.change(gateways=[{"group": "edge"}, {"nodeSelector": {"zone": "a"}}], frozen=True)
    rig.look()
    assert rig.turn() == "Failed"
    assert rig.told("Ready")[:2] == ("False", "Failed")
    assert "node-2.gateway: gone; node-2.gateway takes no orders as gateway" in rig.told("Ready")[2]
    [error] = [site["error"] for site in rig.body["status"]["sites"] if site["error"]]
    assert (error["exit"], error["code"]) == (4, "refused")


def test_what_a_node_has_observed_is_told(rig: Rig) -> None:
    rig.to_open()
    key = keys.done("gw-1", rig.id)
    done = replace(rig.fleet.done("gw-1", rig.id), observed=Observed(2, ("a rule is gone",)))
    rig.store.txn({key: done.write(0)})
    rig.look()
    [site] = [site for site in rig.body["status"]["sites"] if site["node"] == "gw-1"]
    assert site["observed"] == {"alive": 2, "drift": ["a rule is gone"]}


def test_an_agent_that_has_died_is_told_and_nothing_is_undone(rig: Rig) -> None:
    rig.make_ready()
    rig.fleet.nodes["gw-1"].kill()
    rig.store.txn({keys.alive("gw-1"): None})
    assert rig.look() == "Ready"
    [site] = [site for site in rig.body["status"]["sites"] if site["node"] == "gw-1"]
    assert (site["alive"], site["phase"]) == (False, "open")


@pytest.mark.parametrize(
    ("error", "word"),
    [(UnreachableError("the API is away"), "Unknown"), (RefusedError("no rights"), "False")],
)
def test_an_api_that_does_not_answer_undoes_nothing(
    rig: Rig, error: NatkeepError, word: str
) -> None:
    rig.usual()
    rig.change(gateways=[{"nodeSelector": {"zone": "a"}}, {"group": "edge"}], frozen=True)
    rig.look()
    rig.turn()
    before = rig.order()
    rig.cluster.error = error
    assert rig.look() == "Ready"
    assert rig.told()[0] == word
    assert str(error) in rig.told()[2]
    assert rig.order() == before
    rig.cluster.error = None
    rig.look()
    assert rig.told()[0] == "True"


class Away:
    """A store that does not answer."""

    def __getattr__(self, _: str) -> Any:
        raise UnreachableError("no member of etcd answers")


def test_a_store_that_is_away_leaves_what_was_known(rig: Rig) -> None:
    rig.to_open()
    known, store = rig.body["status"], rig.store
    rig.store = Away()  # type: ignore[assignment]
    assert rig.look() == "Open"
    assert rig.told() == ("Unknown", "Unreachable", "no member of etcd answers")
    assert rig.body["status"]["sites"] == known["sites"]
    assert rig.end() == "Open"
    assert rig.told()[:2] == ("Unknown", "Unreachable"), "its finalizer stays"
    rig.store = store
    rig.look()
    assert rig.body["status"]["phase"] == "Open"
    assert rig.told()[0] == "True"


def test_a_store_that_is_away_from_the_beginning(rig: Rig) -> None:
    rig.usual()
    rig.store = Away()  # type: ignore[assignment]
    assert rig.look() == "Pending"
    assert rig.told()[:2] == ("Unknown", "Unreachable")


# ---- its end -------------------------------------------------------------------------------------


def test_the_end_of_what_was_never_ordered(rig: Rig) -> None:
    assert rig.end() is None
    assert ordered(rig) == set()


def test_the_end_waits_for_connections_that_live(rig: Rig) -> None:
    rig.to_open()
    assert rig.end() == "Ending"
    rig.fleet.turn()
    assert rig.end() == "Ending"
    assert "connections live; nothing was undone" in rig.told()[2]
    generation = rig.order().generation
    rig.end()
    assert rig.order().generation == generation, "ordered once"
    rig.body["spec"]["endConnections"] = True
    rig.end()
    rig.end()
    assert rig.order().generation == generation + 1
    rig.fleet.turn()
    assert rig.end() is None


def test_the_end_waits_for_an_agent_that_is_away(rig: Rig) -> None:
    rig.make_ready()
    rig.fleet.nodes["gw-1"].kill()
    rig.store.txn({keys.alive("gw-1"): None})
    rig.end()
    rig.fleet.turn()
    assert rig.end() == "Ending"
    assert "gw-1: open; has not said anything of this order; no agent runs" in rig.told()[2]
    rig.fleet.nodes["gw-1"].start()
    rig.fleet.turn()
    assert rig.end() is None


def test_what_ended_by_another_hand_is_not_ordered_again(rig: Rig) -> None:
    rig.make_ready()
    rig.fleet.end(rig.id)
    assert rig.look() == "Ending"
    assert rig.turn() == "Ended"
    assert rig.told()[:2] == ("False", "Ended")
    assert rig.look() == "Ended"
    assert rig.order().phase == "settled"
    rig.change(deadlineSeconds=9)
    assert rig.look() == "Ended"
    assert rig.end() is None
