"""What a container runtime says as it calls a CNI plugin, specification 1.0 and 1.1; and errors.

Rule: what the specification demands and is not there is refused with its code, before anything is
looked at. What it does not know is left alone: runtimes add keys of their own.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from typing import Any

from natkeep.plan.tuples import Address
from natkeep.values import dataclass

VERSIONS = ("1.0.0", "1.1.0")
INCOMPATIBLE, ENVIRONMENT, UNDECODABLE, BAD_CONFIG, NOT_AVAILABLE = 1, 4, 6, 7, 50
"""Codes of the specification's."""
OWN = 100
"""The codes from here on are a plugin's own: so much more than natkeep's exit code."""
ORDERS = "/run/natkeep/orders"

_CONTAINER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_POD = re.compile(r"[a-z0-9]([a-z0-9.\-]*[a-z0-9])?")  # of DNS: it becomes the name of a file
_NEEDED = {
    "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
    "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    "GC": (),
    "STATUS": (),
}


class CniError(Exception):
    """What is told to the runtime, with a code of the specification's."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Config:
    """The plugin's configuration: `name` of the network, and natkeep's own keys.

    valid: what is attached to the network, where GC names it: containers, and their interfaces.
    """

    network: str
    orders: str
    state_dir: str | None
    agent: str | None
    result: Mapping[str, Any] | None
    valid: frozenset[tuple[str, str]] | None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that is attached: by its names, with its uid if the runtime tells it."""

    namespace: str
    name: str
    uid: str

    @property
    def file(self) -> str:
        """How the files of its order begin."""
        return f"{self.namespace}_{self.name}"


@dataclass(frozen=True, slots=True)
class Call:
    """One call: which verb, for which container's interface, and its network namespace.

    netns: "" if it is gone. A pod in several networks is added to each by a call of its own.
    """

    verb: str
    container: str
    interface: str
    netns: str
    pod: Pod | None
    config: Config


def read_call(environment: Mapping[str, str], text: str) -> Call:
    """The call that the *environment* and *text*, on stdin, are; CniError if they are none."""
    verb = environment.get("CNI_COMMAND", "")
    if verb not in _NEEDED:
        raise CniError(ENVIRONMENT, f"CNI_COMMAND: {verb!r} is none of {', '.join(_NEEDED)}")
    for name in _NEEDED[verb]:
        if not environment.get(name):
            raise CniError(ENVIRONMENT, f"{name} is not set")
    container = environment.get("CNI_CONTAINERID", "")
    if container and not _CONTAINER.fullmatch(container):
        raise CniError(ENVIRONMENT, f"CNI_CONTAINERID: {container!r} is no id")
    config = _read_config(text)
    if verb in ("ADD", "CHECK") and config.result is None:
        raise CniError(BAD_CONFIG, "no prevResult: natkeep-cni stands at the end of a chain")
    pod = _read_pod(environment.get("CNI_ARGS", ""))
    interface, netns = environment.get("CNI_IFNAME", ""), environment.get("CNI_NETNS", "")
    return Call(verb, container, interface, netns, pod, config)


def _read_pod(text: str) -> Pod | None:
    words = dict(word.partition("=")[::2] for word in text.split(";"))
    namespace, name = words.get("K8S_POD_NAMESPACE", ""), words.get("K8S_POD_NAME", "")
    if not namespace or not name:
        return None
    for key, value in ("K8S_POD_NAMESPACE", namespace), ("K8S_POD_NAME", name):
        if len(value) > 253 or not _POD.fullmatch(value):
            raise CniError(ENVIRONMENT, f"CNI_ARGS: {key}: {value!r} is no name of Kubernetes'")
    return Pod(namespace, name, words.get("K8S_POD_UID", ""))


def _read_config(text: str) -> Config:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CniError(UNDECODABLE, f"the configuration is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise CniError(UNDECODABLE, "the configuration is no JSON object")
    if found.get("cniVersion") not in VERSIONS:
        told = f"cniVersion {found.get('cniVersion')!r} is none of {', '.join(VERSIONS)}"
        raise CniError(INCOMPATIBLE, told)
    result = found.get("prevResult")
    if result is not None and not isinstance(result, dict):
        raise CniError(BAD_CONFIG, "prevResult is no object")
    orders = _text(found, "orders") or ORDERS
    for key, path in ("orders", orders), ("stateDir", _text(found, "stateDir")):
        if path and not path.startswith("/"):
            raise CniError(BAD_CONFIG, f"{key}: {path!r} is no absolute path")
    return Config(
        _text(found, "name"), orders, _text(found, "stateDir") or None,
        _text(found, "agent") or None, result, _read_valid(found),
    )  # fmt: skip


def _text(found: Mapping[str, Any], key: str) -> str:
    value = found.get(key, "")
    if not isinstance(value, str) or "\0" in value:
        raise CniError(BAD_CONFIG, f"{key}: {value!r} is not a text")
    return value


def _read_valid(found: Mapping[str, Any]) -> frozenset[tuple[str, str]] | None:
    key = "cni.dev/valid-attachments"
    value = found.get(key)
    if value is None:
        return None
    try:
        return frozenset((str(each["containerID"]), str(each["ifname"])) for each in value)
    except (TypeError, KeyError):
        raise CniError(BAD_CONFIG, f"{key} is no list of attachments") from None


def find_addresses(result: Mapping[str, Any]) -> tuple[Address, ...]:
    """The addresses of *result* that are the container's own, in their order."""
    try:
        interfaces = result.get("interfaces") or []
        return tuple(
            ipaddress.ip_interface(each["address"]).ip
            for each in result.get("ips") or []
            if each.get("interface") is None or interfaces[each["interface"]].get("sandbox")
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CniError(BAD_CONFIG, f"prevResult: {error!r}") from None
