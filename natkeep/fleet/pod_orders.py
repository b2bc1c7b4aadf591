"""The order of a pod that is to come, where natkeep-cni looks for it: cni/order.py has its form.

A destination at `pod:NAMESPACE/NAME` with NEW `auto` is prepared by natkeep-cni, when the pod's
network is made. Its agent puts the order and the list into STATE/orders before that, and takes them
away when the pod is open or the order ends: a pod of that name that is made later is another one.

Rule: the list is there before the order. A vanished order takes nothing away.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from natkeep.errors import RefusedError
from natkeep.fleet.listing import fetch_octets
from natkeep.fleet.store import Store
from natkeep.fleet.want import SCHEMA, Want, as_object
from natkeep.lifecycle.executor import Executor
from natkeep.state.files import replace_file

FOLDER = "orders"
_POD = re.compile(r"pod:([a-z0-9](?:[a-z0-9-]*[a-z0-9])?)/([a-z0-9](?:[a-z0-9.-]*[a-z0-9])?)")


def put(store: Store, executor: Executor, move_id: str, want: Want) -> None:
    """Have it there, if it is of a pod that is to come; RefusedError where another's is there."""
    path = _find_path(executor.state.path, want)
    if path is None:
        return
    if want.listeners:
        raise RefusedError("listeners: a list has none, and natkeep-cni reads a list")
    text = json.dumps(
        {
            "schema": SCHEMA, "id": move_id, "maps": [*map(str, want.maps)],
            "connections": _list_of(path, want).name, "mode": str(want.mode),
            **({"dump": want.image} if want.image else {}),
        }
    )  # fmt: skip
    known = _read(path)
    if known == text:
        return
    if known is not None and as_object(known).get("id") != move_id:
        raise RefusedError(f"the pod {path.stem} has the order of another move: {path}")
    path.parent.mkdir(mode=0o700, exist_ok=True)
    # Not synced: after a boot the agent puts them there again, before any pod is made.
    octets = fetch_octets(store, move_id, want)
    replace_file(_list_of(path, want), octets, durable=False)
    replace_file(path, text.encode(), durable=False)
    for old in path.parent.glob(f"{path.stem}.*.list"):
        if old != _list_of(path, want):
            old.unlink()


def take_away(executor: Executor, move_id: str, want: Want) -> None:
    """The order of that move, if it is there."""
    path = _find_path(executor.state.path, want)
    known = None if path is None else _read(path)
    if path is not None and known is not None and as_object(known).get("id") == move_id:
        path.unlink()
        for each in path.parent.glob(f"{path.stem}.*.list"):
            each.unlink()


def _find_path(state: str, want: Want) -> Path | None:
    found = _POD.fullmatch(want.netns) if want.by_restore() else None
    return found and Path(state, FOLDER, f"{found[1]}_{found[2]}.json")


def _list_of(path: Path, want: Want) -> Path:
    """Another list has another name, so that an order always has its own."""
    return path.with_name(f"{path.stem}.{want.listed.sha256[:16]}.list")


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
