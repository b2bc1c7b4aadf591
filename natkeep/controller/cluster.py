"""Reads single objects of the Kubernetes API: pods, and nodes by label.

kopf watches the ConnectionMoves; what they name is read when it is needed, so that the controller
needs `get` for pods and `list` for nodes, and watches neither. Rule: nothing is written here.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

from natkeep.errors import RefusedError, UnreachableError

_TIMEOUT = 5.0  # s
_PAGE = 500  # nodes of one answer


class Connection(Protocol):
    """Where the API is, and who asks: kopf.ConnectionInfo."""

    server: str

    def as_http_headers(self) -> dict[str, str]:
        """The credentials."""

    def as_ssl_context(self) -> Any:
        """How its certificate is judged, and ours."""


class Cluster:
    """See above. login: asked for each call, since tokens are renewed."""

    def __init__(self, login: Callable[[], Connection]) -> None:
        self._login = login

    def find_pod(self, namespace: str, name: str) -> dict[str, Any] | None:
        """A pod; None where there is none of that name."""
        return self._get(f"/api/v1/namespaces/{quote(namespace)}/pods/{quote(name)}")

    def list_nodes(self, labels: Mapping[str, str]) -> list[str]:
        """The names of the nodes that have all these labels."""
        selector = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
        names, more = list[str](), ""
        while True:
            asked = {"labelSelector": selector, "limit": _PAGE, "continue": more}
            found = self._get(f"/api/v1/nodes?{urlencode(asked)}") or {}
            names += [item["metadata"]["name"] for item in found.get("items", ())]
            more = found.get("metadata", {}).get("continue", "")
            if not more:
                return sorted(names)

    def _get(self, path: str) -> dict[str, Any] | None:
        login = self._login()
        headers = {"User-Agent": "natkeep-controller", **login.as_http_headers()}
        request = Request(login.server.rstrip("/") + path, headers=headers)
        tls = login.as_ssl_context() if request.type == "https" else None
        try:
            with urlopen(request, timeout=_TIMEOUT, context=tls) as answer:
                found = json.load(answer)
        except HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            what = f"the Kubernetes API answers {error.code} ({error.reason}) to GET {path}"
            if error.code in (401, 403):
                raise RefusedError(what, hint="deploy/rbac.yaml has what it needs") from None
            raise UnreachableError(what) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise UnreachableError(f"the Kubernetes API, GET {path}: {error}") from None
        if not isinstance(found, dict):
            raise UnreachableError(f"the Kubernetes API, GET {path}: not an object")
        return found
