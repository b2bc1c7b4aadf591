"""A ConnectionMove as a value: deploy/crd.yaml has the schema of it.

The API server holds objects to that schema; one of an older schema, or of a server that does not
look, is refused by name (UsageError). Rule: nothing is asked of a machine here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from natkeep.errors import UsageError
from natkeep.fleet.keys import parse_name
from natkeep.fleet.want import LONGEST, a_text, one_of, whole
from natkeep.plan.move import Mode, parse_id
from natkeep.values import dataclass

GROUP, VERSION, PLURAL = "natkeep.dev", "v1alpha1", "connectionmoves"
DEADLINE = 300
"""Seconds, where the object does not say: between a pod and its restore an image may be copied."""


@dataclass(frozen=True, slots=True)
class Gateways:
    """Some gateways: a group of agents, or the nodes with these labels."""

    group: str
    labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ConnectionMove:
    """See above. source_uid: "" is any; target_node: "" is where the pod turns out to be.

    end_connections: its end does not wait for connections.
    """

    id: str
    namespace: str
    generation: int
    source: str
    source_uid: str
    target: str
    target_node: str
    gateways: tuple[Gateways, ...]
    mode: Mode
    refuses_unkept: bool
    deadline: int
    frozen: bool
    connections: str
    end_connections: bool


def find_id(body: Mapping[str, Any]) -> str:
    """The id of an object's move: its uid, which no other object will ever have."""
    return parse_id(str(body["metadata"]["uid"]).replace("-", ""))


def parse(body: Mapping[str, Any]) -> ConnectionMove:
    """What an object of the API says; UsageError if it cannot be understood."""
    meta, spec = body["metadata"], body.get("spec", {})
    try:
        return ConnectionMove(
            find_id(body), a_text(meta["namespace"]), whole(meta.get("generation", 0)),
            a_text(spec["sourcePod"]["name"]), a_text(spec["sourcePod"].get("uid", "")),
            a_text(spec["targetPod"]["name"]), a_text(spec["targetPod"].get("nodeName", "")),
            tuple(map(_parse_gateways, spec["gateways"])),
            Mode(one_of(spec.get("mode", Mode.STATEFUL), *Mode)),
            one_of(spec.get("unkept", "report"), "report", "refuse") == "refuse",
            whole(spec.get("deadlineSeconds", DEADLINE), LONGEST),
            _flag(spec, "frozen"), a_text(spec["connections"]), _flag(spec, "endConnections"),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"{error} is missing" if isinstance(error, KeyError) else error
        raise UsageError(f"spec: {why}") from None


def _parse_gateways(found: Mapping[str, Any]) -> Gateways:
    if ("group" in found) == ("nodeSelector" in found):
        raise ValueError("gateways: either group or nodeSelector")
    if "group" in found:
        return Gateways(parse_name(a_text(found["group"])), {})
    labels = {a_text(key): a_text(value) for key, value in found["nodeSelector"].items()}
    if not labels:
        raise ValueError("gateways: nodeSelector without a label")
    return Gateways("", labels)


def _flag(spec: Mapping[str, Any], name: str) -> bool:
    value = spec.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is true or false")
    return value
