"""What deploy/ has, and what an API server would say of a ConnectionMove by it.

refuse(body)          the errors of the schema and of its rules in CEL; none where it is taken
refuse(body, before)  the same of a change
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import jsonschema
import yaml

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"


def load(name: str) -> list[dict[str, Any]]:
    """The documents of a file."""
    return [*yaml.safe_load_all((DEPLOY / name).read_text())]


def load_all() -> list[dict[str, Any]]:
    """The documents of all that `kubectl apply -k` takes."""
    [kustomization] = load("kustomization.yaml")
    return [each for name in kustomization["resources"] for each in load(name)]


def find(kind: str) -> dict[str, Any]:
    """The one document of that kind."""
    [found] = [each for each in load_all() if each["kind"] == kind]
    return found


@cache
def schema() -> dict[str, Any]:
    """That of a ConnectionMove."""
    [version] = find("CustomResourceDefinition")["spec"]["versions"]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return found


def with_defaults(value: Any, of: dict[str, Any]) -> Any:
    """What the server stores of *value*."""
    if not isinstance(value, dict) or "properties" not in of:
        return value
    filled = {k: v["default"] for k, v in of["properties"].items() if "default" in v} | value
    return {k: with_defaults(v, of["properties"].get(k, {})) for k, v in filled.items()}


def refuse(body: dict[str, Any], before: dict[str, Any] | None = None) -> list[str]:
    """See above. A key that the schema does not have is an error here: a server drops it."""
    found = with_defaults(body, schema())
    said = [error.message for error in _validator().iter_errors(found)]
    return said or [*_break_rules(schema(), found, before and with_defaults(before, schema()))]


@cache
def _validator() -> Any:
    return jsonschema.Draft202012Validator(_as_json_schema(schema()))


def _as_json_schema(node: Any) -> Any:
    """OpenAPI's `nullable`; and all keys that are not named are unknown, but in metadata."""
    if isinstance(node, list):
        return [*map(_as_json_schema, node)]
    if not isinstance(node, dict):
        return node
    made = {key: _as_json_schema(value) for key, value in node.items()}
    if node.get("nullable") is True:
        made["type"] = [node["type"], "null"]
    if "properties" in node and node.get("type") == "object":
        made["additionalProperties"] = False
    return made


@cache
def _compile(rule: str) -> Any:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def _break_rules(node: dict[str, Any], value: Any, before: Any) -> Iterator[str]:
    for rule in node.get("x-kubernetes-validations", ()):
        text = rule["rule"]
        if before is None and "oldSelf" in text:
            continue  # of changes alone
        given = {"self": celpy.json_to_cel(value), "oldSelf": celpy.json_to_cel(before)}
        if not _compile(text).evaluate(given):
            yield rule["message"]
    if isinstance(value, dict):
        for name, inner in node.get("properties", {}).items():
            if name in value:
                yield from _break_rules(inner, value[name], (before or {}).get(name))
    elif isinstance(value, list):
        for each in value:
            yield from _break_rules(node["items"], each, None)
