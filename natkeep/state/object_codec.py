"""The form of nft objects in the journal: JSON values that say what was loaded, name by name.

    {"Chain": ["gate-web"]}
    {"Rule": ["gate-web", [{"Verdict": ["drop"]}]]}
    {"Nat": ["dnat", {"address": "10.3.0.20"}, "tcp dport"]}

A value of plan/nft.py is its class with its fields, those left out at the end that are as the class
has them by default; so one that gets a further field is read as it was written.

Rule: what this natkeep does not know is None and never guessed at: it is left as it is then.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from natkeep.plan import nft
from natkeep.plan.nft import Object
from natkeep.plan.steps import FillSet, Loads, Recorded, Step
from natkeep.plan.tuples import parse_address
from natkeep.plan.wanted import sums_of
from natkeep.state.codec import as_list, as_text

_CLASSES: dict[str, Any] = {
    name: cls
    for name, cls in vars(nft).items()
    if isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")
}


_NONE = object()


LOADED = ("objects", "shared", "sets")
"""What a record says of what its step loads: objects; of the part that all moves share the sums of
keys (plan/wanted.py); the sets that it fills."""


def loaded_to_json(step: Step) -> dict[str, Any]:
    """What there is to say of that; nothing of a step that has nothing to do with the tables."""
    if isinstance(step, FillSet):
        return {"sets": [one.name for one in step.fillings()]}
    if not isinstance(step, Loads):
        return {}
    return {"objects": objects_to_json(step.objects()), "shared": sums_of(step)}


def loaded_from_json(loaded: Mapping[str, Any]) -> Recorded | None:
    """What a step loaded; None where it does not say so, or not what this natkeep knows."""
    objects = objects_from_json(loaded.get("objects"))
    shared = loaded.get("shared")
    if objects is None or not isinstance(shared, list):
        return None
    return Recorded(objects, frozenset(one for one in shared if isinstance(one, int)))


def objects_to_json(objects: tuple[Object, ...]) -> list[Any]:
    """As they stand in the journal."""
    return [_write(one) for one in objects]


def objects_from_json(value: object) -> tuple[Object, ...] | None:
    """From the journal; None when it has what this natkeep does not know."""
    try:
        return tuple(_read(one) for one in as_list(value))
    except (KeyError, TypeError, ValueError):
        return None


def _write(value: Any) -> Any:
    if isinstance(value, str):
        return value
    if isinstance(value, IPv4Address | IPv6Address):
        return {"address": str(value)}
    if isinstance(value, bytes):
        return {"octets": value.hex()}
    if not isinstance(value, tuple):
        return value
    defaults = _defaults(type(value))
    if defaults is None:
        return [_write(one) for one in value]
    last = len(value)
    while last and value[last - 1] == defaults[last - 1]:
        last -= 1
    return {type(value).__name__: [_write(one) for one in value[:last]]}


@cache
def _defaults(cls: type[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """Of each field of a NamedTuple, _NONE where it has none; None for a plain tuple."""
    names: tuple[str, ...] | None = getattr(cls, "_fields", None)
    if names is None:
        return None
    return tuple(cls._field_defaults.get(name, _NONE) for name in names)  # type: ignore[attr-defined]


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_read, value))
    if not isinstance(value, dict):
        return value
    [(name, content)] = value.items()
    if name == "address":
        return parse_address(as_text(content))
    if name == "octets":
        return bytes.fromhex(as_text(content))
    return _CLASSES[name](*map(_read, as_list(content)))
