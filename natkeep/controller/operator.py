"""The controller on kopf: which watches ConnectionMoves, and holds them by a finalizer.

kopf calls for each object every second, and once it is deleted until it is undone. This is the one
file that imports kopf. Rule: what kopf remembers of an object is in annotations of it, and without
its list of connections, which can be larger than annotations may be.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import kopf

from natkeep.controller.cluster import Cluster, Connection
from natkeep.controller.connection_move import GROUP, PLURAL, VERSION
from natkeep.controller.reconcile import end, reconcile
from natkeep.fleet.store import Store

FINALIZER = f"{GROUP}/connections"
INTERVAL = 1.0  # s
_SETTLED = 30  # times as long for a move that is made, or ended by another hand


def log_in(settings: kopf.OperatorSettings, **_: Any) -> Connection:
    """By the pod's service account, or outside of a cluster by the user's kubeconfig."""
    ways = (kopf.login_with_service_account, kopf.login_with_kubeconfig)
    login = next(filter(None, (way(settings=settings) for way in ways)), None)
    if login is None:
        raise kopf.LoginError("neither a service account nor a kubeconfig")
    return login  # type: ignore[no-any-return]  # kopf's types are not looked at


def make_settings() -> kopf.OperatorSettings:
    """What kopf is to do, and to leave."""
    settings = kopf.OperatorSettings()
    storage = settings.persistence
    storage.finalizer = FINALIZER
    storage.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
    storage.diffbase_storage = kopf.AnnotationsDiffBaseStorage(
        prefix=GROUP, ignored_fields=["spec.connections"]
    )
    settings.posting.enabled = False  # conditions say it, and events would be one right more
    settings.scanning.disabled = True  # no definitions or namespaces are watched
    return settings


def make_registry(
    store: Store, cluster: Cluster, login: Any = log_in, interval: float = INTERVAL
) -> kopf.OperatorRegistry:
    """What kopf calls."""
    registry, kind = kopf.OperatorRegistry(), (GROUP, VERSION, PLURAL)

    def look(body: Any, patch: Any, memo: Any, **_: Any) -> None:
        if FINALIZER not in body["metadata"].get("finalizers", ()):
            return  # deleted now, it would leave its move behind
        memo.rest = memo.get("rest", 0) - 1
        if memo.rest > 0 and memo.generation == body["metadata"].get("generation"):
            return
        status = reconcile(body, store, cluster)
        memo.generation = body["metadata"].get("generation")
        memo.rest = count_rest(status)
        _tell(body, patch, status)

    def finish(body: Any, patch: Any, retry: int, **_: Any) -> None:
        status = end(body, store)
        if status is not None:
            _tell(body, patch, status)
            # Connections that live may be waited for a day, and each time is a line of the log.
            delay = interval * min(1 + retry, _SETTLED)
            raise kopf.TemporaryError(_last_word(status), delay=delay)

    kopf.on.login(registry=registry)(login)
    kopf.timer(*kind, registry=registry, interval=interval, id="reconcile")(look)
    kopf.on.delete(*kind, registry=registry, id="end")(finish)
    return registry


def count_rest(status: Mapping[str, Any]) -> int:
    """How many looks may be left out: none while something is to come, be it the store."""
    unknown = any(each["status"] == "Unknown" for each in status["conditions"])
    return _SETTLED if status["phase"] in ("Open", "Ended") and not unknown else 0


def _tell(body: Any, patch: Any, status: dict[str, Any]) -> None:
    """Patch what is another."""
    known = body.get("status") or {}
    patch.status.update({k: v for k, v in status.items() if known.get(k) != v})


def _last_word(status: dict[str, Any]) -> str:
    [told] = [each for each in status["conditions"] if each["type"] == "Ordered"]
    return str(told["message"])


def run(store: Store, namespaces: tuple[str, ...] = ()) -> None:
    """Until a signal ends it. namespaces: none is all."""
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # each look would be a line
    settings = make_settings()
    registry = make_registry(store, Cluster(partial(log_in, settings)))
    kopf.run(
        registry=registry, settings=settings, standalone=True,
        clusterwide=not namespaces, namespaces=namespaces,
    )  # fmt: skip
