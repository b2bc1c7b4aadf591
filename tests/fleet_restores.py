"""A fleet whose order has NEW `auto`, and a hook that prepares the destination.

fleet                         ORDER with 10.2.0.10=auto is ordered, and every agent has heard it
prepare_in_hook(node)         as natkeep-hook does
hear_hooks(fleet)             every agent hears of that, and acts
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_nodes import LISTING, ORDER, Fleet, Node

from natkeep.checkpoint import Inventory, NetworkLock
from natkeep.checkpoint.listing import parse_listing
from natkeep.fleet import apply as orders
from natkeep.fleet.directory import DirectoryStore
from natkeep.fleet.order import parse_file
from natkeep.lifecycle.prepare import prepare
from natkeep.plan.maps import make_map
from natkeep.plan.move import Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import parse_local
from natkeep.values import replace

DUMP = "2b7c6a80-0000-4000-8000-000000000001"
AUTO: dict[str, Any] = {**ORDER, "maps": ["10.2.0.10=auto"]}


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("natkeep.policy.PATH", "/nowhere/natkeep.toml")
    fleet = Fleet(tmp_path, DirectoryStore(str(tmp_path / "store")))
    fleet.usual()
    order, _ = parse_file(json.dumps(AUTO))
    dump = Inventory(NetworkLock.NFTABLES, DUMP)
    orders.apply(fleet.store, order, replace(parse_listing(LISTING, "list"), inventory=dump))
    fleet.turn()
    yield fleet
    fleet.store.close()


def prepare_in_hook(
    node: Node, move_id: str = "criu-7-1a", new: str = "10.3.0.20", dump: str | None = DUMP
) -> None:
    """As natkeep-hook does, without the agent."""
    maps = (make_map(parse_local("10.2.0.10"), parse_local(new)),)
    move = Move(move_id, maps, (Site(Role.DESTINATION, "dst"),))
    prepare(node.executor(), move, parse_listing(LISTING, "list").connections, image=dump)


def hear_hooks(fleet: Fleet) -> None:
    """By inotify the destination's agent hears of the hook's journal, and the others of that."""
    agent = fleet.nodes["host-b"].agent
    assert agent is not None
    agent.reconcile(agent.known.about({"criu-7-1a"}))
    fleet.turn()
