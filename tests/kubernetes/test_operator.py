"""The controller as it runs: kopf, an API in memory over HTTP, agents on the fake kernel."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kopf
import pytest
from fleet_nodes import Fleet
from kubernetes_api import MOVES, NODES, PODS, Api, make_move, make_pod
from kubernetes_schema import find

from natkeep.controller.cluster import Cluster
from natkeep.controller.operator import count_rest
from natkeep.errors import NatkeepError, RefusedError, UnreachableError
from natkeep.fleet import keys
from natkeep.fleet.directory import DirectoryStore
from natkeep.lifecycle.open import open_move


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as api:
        yield api


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("natkeep.policy.PATH", "/nowhere/natkeep.toml")
    monkeypatch.setattr("natkeep.fleet.site.find_netns", lambda spec: spec.replace(":", "-"))
    store = DirectoryStore(str(tmp_path / "store"))
    fleet = Fleet(tmp_path, store)
    fleet.add("node-2")
    fleet.add("node-3.gateway")
    yield fleet
    store.close()


def begin(api: Api) -> None:
    """Both pods, a node for a gateway, and the object."""
    api.create(PODS, make_pod("web-a", "node-1", "10.2.0.10"))
    api.create(PODS, make_pod("web-b", "node-2", "10.3.0.20"))
    for name, labels in (("node-2", {}), ("node-3", {"zone": "a"})):
        api.create(NODES, {"metadata": {"name": name, "labels": labels}})
    api.create(MOVES, make_move(gateways=[{"nodeSelector": {"zone": "a"}}]))


def is_in(phase: str) -> Callable[[dict[str, Any]], bool]:
    return lambda status: status.get("phase") == phase


def test_a_move_made_and_ended_with_the_rights_of_deploy(api: Api, fleet: Fleet) -> None:
    begin(api)
    with api.controller(fleet.store):
        status = api.wait("web", is_in("Prepared"), fleet.turn)
        api.change("web", frozen=True)
        api.wait("web", is_in("Ready"), fleet.turn)
        open_move(fleet.nodes["node-2"].executor(), status["id"])
        made = api.wait("web", is_in("Open"), fleet.turn)
        assert {site["phase"] for site in made["sites"]} == {"open"}
        api.delete("web")
        api.wait("web", lambda its: "connections live" in str(its["conditions"]), fleet.turn)
        assert fleet.done("node-2", status["id"]).phase == "open"
        api.change("web", endConnections=True)
        api.wait_gone("web", fleet.turn)
    assert all(not node.executor().state.ids() for node in fleet.nodes.values())
    may = {
        (verb, resource)
        for rule in find("ClusterRole")["rules"]
        for verb in rule["verbs"]
        for resource in rule["resources"]
    }
    assert api.kmock.asked == may


def test_a_controller_that_was_restarted_goes_on(api: Api, fleet: Fleet) -> None:
    begin(api)
    with api.controller(fleet.store):
        api.wait("web", lambda status: status.get("sites"))
    fleet.turn()
    with api.controller(fleet.store):
        api.wait("web", is_in("Prepared"))
    api.change("web", frozen=True)
    with api.controller(fleet.store):
        api.wait("web", is_in("Ready"), fleet.turn)
    api.delete("web")
    with api.controller(fleet.store):
        api.wait("web", is_in("Ending"))
    fleet.turn()
    with api.controller(fleet.store):
        api.wait_gone("web", fleet.turn)


def test_the_program_runs_by_a_kubeconfig_until_a_signal_ends_it(
    api: Api, fleet: Fleet, tmp_path: Path
) -> None:
    begin(api)
    config = tmp_path / "kubeconfig"
    config.write_text(
        json.dumps(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
                "clusters": [{"name": "k", "cluster": {"server": api.url}}],
                "users": [{"name": "u", "user": {"token": "t"}}],
            }
        )
    )
    program = subprocess.Popen(
        [sys.executable, "-m", "natkeep.controller", "--namespace", "shop"],
        env={"KUBECONFIG": str(config), "NATKEEP_STORE": f"dir:{tmp_path}/store"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        api.wait("web", lambda status: status.get("sites"))
    finally:
        program.terminate()
        said, errors = program.communicate(timeout=60)
    assert (program.returncode, said) == (0, "")
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("phase", "ordered", "rests"),
    [
        ("Ready", "True", False), ("Open", "True", True), ("Open", "Unknown", False),
        ("Ended", "False", True),
    ],
)  # fmt: skip
def test_what_is_settled_is_seldom_looked_at_unless_the_store_is_away(
    phase: str, ordered: str, rests: bool
) -> None:
    status = {"phase": phase, "conditions": [{"type": "Ordered", "status": ordered}]}
    assert (count_rest(status) > 1) == rests


def test_an_object_that_vanishes_undoes_nothing(api: Api, fleet: Fleet) -> None:
    begin(api)
    with api.controller(fleet.store):
        status = api.wait("web", is_in("Prepared"), fleet.turn)
    # as by `kubectl replace --force`, or an API restored from a backup
    api.call("PATCH", f"{MOVES}/web", {"metadata": {"finalizers": []}})
    api.delete("web")
    assert api.find("web") is None
    with api.controller(fleet.store):
        api.create(MOVES, make_move("other", gateways=[{"nodeSelector": {"zone": "a"}}]))
        told = api.wait("other", lambda its: its.get("conditions"), fleet.turn)["conditions"][0]
    assert f"10.2.0.10 is moved by {status['id']} already" in told["message"]
    assert fleet.done("node-2", status["id"]).phase == "prepared"


def test_nothing_is_ordered_without_the_finalizer(api: Api, fleet: Fleet) -> None:
    begin(api)
    api.create(MOVES, make_move("later", sourcePod={"name": "none"}))
    api.kmock.denied.add(("PATCH", f"{MOVES}/web"))
    with api.controller(fleet.store):
        api.wait("later", is_in("Pending"))
        assert api.status("web") == {}
    assert not fleet.store.range(keys.MOVES).items


@pytest.mark.parametrize(
    ("answer", "kind", "why"),
    [
        (403, RefusedError, "answers 403 (Forbidden) to GET /api/v1/namespaces/shop/pods/web-a"),
        (401, RefusedError, "answers 401"),
        (500, UnreachableError, "answers 500"),
        (b"<html>", UnreachableError, "Expecting value"),
        ([1], UnreachableError, "not an object"),
    ],
)
def test_what_the_api_answers_is_said_in_words(
    api: Api, answer: Any, kind: type[NatkeepError], why: str
) -> None:
    api.kmock["get", f"{PODS}/web-a"] << answer
    with pytest.raises(kind, match="Kubernetes API") as caught:
        api.cluster().find_pod("shop", "web-a")
    assert why in str(caught.value)
    assert api.cluster().find_pod("shop", "web-b") is None


def test_an_api_that_is_not_there() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        info = kopf.ConnectionInfo(server=f"http://127.0.0.1:{bound.getsockname()[1]}")
        with pytest.raises(UnreachableError, match="refused"):
            Cluster(lambda: info).list_nodes({"zone": "a"})


def test_nodes_are_read_by_the_page(api: Api) -> None:
    both = {"zone": "a", "disk": "b"}
    for number, labels in enumerate((both, both, {"zone": "a"}, both, both, both)):
        api.create(NODES, {"metadata": {"name": f"n{number}", "labels": labels}})
    assert api.cluster().list_nodes(both) == ["n0", "n1", "n3", "n4", "n5"]


@pytest.mark.parametrize(
    ("store", "before", "code", "why"),
    [
        ("", "", 2, "'' is not a store"),
        ("ftp://x", "", 2, "'ftp://x' is not a store"),
        ("dir:/nowhere", "sys.modules['kopf'] = None", 1, "pip install 'natkeep[kubernetes]'"),
    ],
)
def test_a_program_that_cannot_begin_says_why(store: str, before: str, code: int, why: str) -> None:
    script = f"import sys\n{before}\nfrom natkeep.controller.__main__ import main\nsys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script], env={"NATKEEP_STORE": store}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert why in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_rest_of_natkeep_is_there_without_kopf() -> None:
    script = (
        "import sys; import natkeep.cli.fleet, natkeep.cli.parser; print('kopf' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_cluster_is_read_by_the_login_of_the_moment(api: Api) -> None:
    """A service account's token is renewed every hour."""
    seen = []
    api.kmock["get", f"{PODS}/web-a"] << (
        lambda request: seen.append(request.headers.get("Authorization")) or {"metadata": {}}
    )
    tokens = iter(("one", "two"))

    class Login:
        server = api.url

        def as_http_headers(self) -> dict[str, str]:
            return {"Authorization": f"Bearer {next(tokens)}"}

        def as_ssl_context(self) -> None: ...

    cluster = Cluster(Login)
    cluster.find_pod("shop", "web-a")
    cluster.find_pod("shop", "web-a")
    assert seen == ["Bearer one", "Bearer two"]
