"""A Kubernetes API in memory (KMock), and the controller on it (kopf), over HTTP.

with Api() as api:
    api.create(PODS, make_pod(...)); api.create(MOVES, make_move())
    with api.controller(store): ...          as `python -m natkeep.controller`
    api.wait("web", lambda status: status["phase"] == "Ready")

KMock keeps objects, finalizers and watches; what else a server does and we rely on is added: the
resourceVersion, which a patch may demand, generation, the subresource status apart from the rest,
and selectors of nodes. It has no RBAC and no schema: test_manifests.py looks at these.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import kmock
import kopf

from natkeep.controller.cluster import Cluster
from natkeep.controller.operator import make_registry, make_settings
from natkeep.fleet.store import Store

MOVES = "/apis/natkeep.dev/v1alpha1/namespaces/shop/connectionmoves"
PODS = "/api/v1/namespaces/shop/pods"
NODES = "/api/v1/nodes"
PATIENCE = 60.0  # s; it fails then, and no test takes it
LISTING = "10.2.0.10:5000 10.1.0.2:50001\n10.2.0.10:5000 10.1.0.2:50002\n"


def make_pod(name: str, node: str | None = None, *ips: str, **status: Any) -> dict[str, Any]:
    """A pod; without a node it is to be scheduled, without an address its sandbox is to be made."""
    told = {"podIP": ips[0], "podIPs": [{"ip": ip} for ip in ips]} if ips else {}
    return {
        "metadata": {"name": name, "namespace": "shop", "uid": str(uuid.uuid4())},
        "spec": {"nodeName": node} if node else {},
        "status": {"phase": "Running", **told, **status},
    }


def make_move(name: str = "web", **spec: Any) -> dict[str, Any]:
    """A ConnectionMove from pod web-a to pod web-b."""
    return {
        "apiVersion": "natkeep.dev/v1alpha1",
        "kind": "ConnectionMove",
        "metadata": {
            "name": name, "namespace": "shop", "uid": str(uuid.uuid4()), "generation": 1,
        },
        "spec": {
            "sourcePod": {"name": "web-a"},
            "targetPod": {"name": "web-b"},
            "gateways": [{"group": "edge"}],
            "connections": LISTING,
            **spec,
        },
    }  # fmt: skip


VERBS = {
    kmock.action.LIST: "list", kmock.action.WATCH: "watch", kmock.action.FETCH: "get",
    kmock.action.UPDATE: "patch", kmock.action.CREATE: "create", kmock.action.DELETE: "delete",
}  # fmt: skip


class Server(kmock.KubernetesEmulator):  # type: ignore[misc]
    """KMock's, and what it leaves out."""

    versions = itertools.count(1)

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.asked: set[tuple[str, str]] = set()  # by the controller: verb, resource
        self.denied: set[tuple[str, str]] = set()  # method, path

    async def _handle(self, request: Any) -> Any:
        ours = request.headers["User-Agent"].startswith("Python")
        if not ours and request.action and request.resource and request.resource.plural:
            parts = filter(None, (request.resource.plural, request.subresource))
            self.asked.add((VERBS[request.action], "/".join(parts)))
        if (request.method, request.url.path) in self.denied:
            raise kmock.KubernetesError(status=403, reason="Forbidden", message="by the test")
        version, key = str(next(self.versions)), (request.resource, request.namespace, request.name)
        if request.method == "POST":
            request.data["metadata"]["resourceVersion"] = version
        elif request.method == "PATCH" and key in self.objects and not self.objects[key].deleted:
            self._complete(request, self.objects[key].raw, version)
        return await super()._handle(request)

    def _complete(self, request: Any, before: dict[str, Any], version: str) -> None:
        if isinstance(request.data, list):  # JSON Patch
            for step in request.data:
                known = before["metadata"]["resourceVersion"]
                if step["path"] == "/metadata/resourceVersion" and step["value"] != known:
                    raise kmock.KubernetesError(status=422, reason="Invalid", message="conflict")
            step = {"op": "add", "path": "/metadata/resourceVersion", "value": version}
            request.data.append(step)
            return
        kept = {"status"} if request.subresource == "status" else {*request.data} - {"status"}
        for name in {*request.data} - kept:
            del request.data[name]
        meta = request.data.setdefault("metadata", {})
        meta["resourceVersion"] = version
        if "spec" in request.data:
            meta["generation"] = before["metadata"]["generation"] + 1


class Api:
    """See above."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._serves: Any = None
        self.url = ""

    def __enter__(self) -> Api:
        self._thread.start()
        self._serves = self._serve()
        self.url = self._do(anext(self._serves))
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(StopAsyncIteration):
            self._do(anext(self._serves))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, what: Any) -> Any:
        async def run() -> Any:
            return await what

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE)

    async def _serve(self) -> Any:
        async with Server() as handler, kmock.Server(handler) as server:
            self.kmock = handler
            for name, kind, scoped, more in (
                ("natkeep.dev/v1alpha1/connectionmoves", "ConnectionMove", True, {"status"}),
                ("v1/pods", "Pod", True, {"status"}),
                ("v1/nodes", "Node", False, {"status"}),
                (
                    "v1/namespaces",
                    "Namespace",
                    False,
                    {"status"},
                ),  # kopf looks whether they are there
            ):
                handler.resources[name] = kmock.ResourceInfo(
                    kind=kind, namespaced=scoped, subresources=more,
                    verbs={"get", "list", "watch", "patch", "create", "delete"},
                )  # fmt: skip
            handler["get", NODES] << self._list_nodes
            yield str(server.url)

    def _list_nodes(self, request: Any) -> dict[str, Any]:
        wanted = dict(each.split("=") for each in request.params["labelSelector"].split(","))
        nodes = [it.raw for (kind, *_), it in self.kmock.objects.items() if kind.plural == "nodes"]
        fits = [n for n in nodes if wanted.items() <= n["metadata"].get("labels", {}).items()]
        start, page = int(request.params["continue"] or 0), min(2, int(request.params["limit"]))
        more = str(start + page) if len(fits) > start + page else ""
        return {"metadata": {"continue": more}, "items": fits[start : start + page]}

    # ---- what kubectl does ---------------------------------------------------------------------

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any] | None:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url.rstrip("/") + path, data, {"Content-Type": kind}, method=method)
        try:
            with urlopen(request, timeout=PATIENCE) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            raise

    def create(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        made = self.call("POST", path, body)
        assert made is not None
        return made

    def change(self, name: str, **spec: Any) -> None:
        assert self.call("PATCH", f"{MOVES}/{name}", {"spec": spec})

    def find(self, name: str) -> dict[str, Any] | None:
        return self.call("GET", f"{MOVES}/{name}")

    def delete(self, name: str) -> None:
        self.call("DELETE", f"{MOVES}/{name}")

    def status(self, name: str = "web") -> dict[str, Any]:
        return (self.find(name) or {}).get("status", {})

    def wait(
        self, name: str, until: Callable[[dict[str, Any]], Any],
        turn: Callable[[], object] = lambda: None,
    ) -> dict[str, Any]:  # fmt: skip
        """Until the object's status is so; *turn* is done between two looks."""
        end = time.monotonic() + PATIENCE
        while True:
            turn()
            status = self.status(name)
            if status and until(status):
                return status
            assert time.monotonic() < end, f"{name}: {status}"
            time.sleep(0.02)

    def wait_gone(self, name: str, turn: Callable[[], object] = lambda: None) -> None:
        end = time.monotonic() + PATIENCE
        while self.find(name) is not None:
            assert time.monotonic() < end, f"{name}: {self.find(name)}"
            turn()
            time.sleep(0.02)

    # ---- the controller ------------------------------------------------------------------------

    def cluster(self) -> Cluster:
        info = kopf.ConnectionInfo(server=self.url)
        return Cluster(lambda: info)

    @contextmanager
    def controller(self, store: Store) -> Iterator[None]:
        """It runs until the block ends; SIGTERM does the same."""
        info = kopf.ConnectionInfo(server=self.url)
        registry = make_registry(store, self.cluster(), lambda **_: info, interval=0.05)
        settings = make_settings()
        settings.networking.error_backoffs = settings.queueing.error_delays = (0.05,)
        settings.queueing.exit_timeout = 1
        stop, ready = threading.Event(), threading.Event()
        running = asyncio.run_coroutine_threadsafe(
            kopf.operator(
                registry=registry, settings=settings, clusterwide=True, standalone=True,
                stop_flag=stop, ready_flag=ready,
            ),
            self._loop,
        )  # fmt: skip
        try:
            assert ready.wait(PATIENCE)
            yield
        finally:
            stop.set()
            running.result(PATIENCE)
