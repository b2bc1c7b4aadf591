"""A fleet on the fake kernel: nodes with an agent each, one store, no threads.

fleet.add("host-b"); fleet.add("gw-1", groups=("edge",))
fleet                        the fixture: a fleet without nodes
fleet.apply(ORDER)           as `natkeep fleet apply`
fleet.turn()                 every agent hears everything and acts, until nothing changes
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_kernel import FakeKernel

from natkeep import policy
from natkeep.checkpoint.listing import parse_listing
from natkeep.fleet import apply as orders
from natkeep.fleet import keys, site
from natkeep.fleet.agent import Agent
from natkeep.fleet.directory import DirectoryStore
from natkeep.fleet.done import Done, Error, parse_done
from natkeep.fleet.order import Order, parse_file
from natkeep.fleet.store import Store, read
from natkeep.fleet.wake import Heard
from natkeep.fleet.want import Phase
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.state.directory import StateDirectory

LISTING = "10.2.0.10:5000 10.1.0.2:50001\n10.2.0.10:5000 10.1.0.2:50002\n"
ORDER: dict[str, Any] = {
    "id": "web",
    "maps": ["10.2.0.10=10.3.0.20"],
    "connections": "list",
    "sites": [
        {"node": "host-b", "role": "destination", "netns": "dst"},
        {"group": "edge", "role": "gateway", "netns": "gw"},
        {"node": "host-a", "role": "source", "netns": "src"},
    ],
    "deadline_s": 60,
}


class Node:
    """A node: its kernel and its state directory outlive its agent."""

    def __init__(self, fleet: Fleet, name: str, store: Store | None, **bounds: Any) -> None:
        self.fleet, self.name, self.kernel = fleet, name, FakeKernel()
        self.store = store or fleet.store
        self.directory = str(fleet.path / name)
        self.bounds = policy.Agent(node=name, **bounds)
        self.said: list[str] = []
        self.agent: Agent | None = None
        self.start()

    def executor(self) -> Executor:
        return Executor(self.kernel, StateDirectory(self.directory, create=True))

    def start(self) -> None:
        self.followed: set[str] = set()
        self.agent = Agent(self.bounds, self.store, self.executor, self._follow, self.said.append)
        self.store.txn({keys.alive(self.name): self.agent.describe_alive()})

    def kill(self) -> None:
        """As by SIGKILL: it has no last word; the file's lock goes with it."""
        assert self.agent is not None
        self.agent.close()
        self.agent = None

    def _follow(self, agent: Agent, prefix: str) -> None:
        self.followed.add(prefix)
        self._hear(agent, prefix)

    def _hear(self, agent: Agent, prefix: str) -> set[str]:
        return agent.hear(Heard(prefix, self.store.range(prefix).items, True))

    def turn(self) -> None:
        """Hear all that concerns it, and act."""
        if agent := self.agent:
            ids = set[str]()
            for prefix in (*agent.known.prefixes, *self.followed):
                ids |= self._hear(agent, prefix)
            agent.reconcile(ids)

    def journal(self) -> bytes | None:
        path = Path(self.directory, "web.journal")
        return path.read_bytes() if path.exists() else None


class Fleet:
    """The nodes, and who orders."""

    def __init__(self, path: Path, store: Store) -> None:
        self.path, self.store = path, store
        self.nodes: dict[str, Node] = {}

    def add(self, name: str, store: Store | None = None, **bounds: Any) -> Node:
        """store: as that node sees it, with its own rights."""
        node = self.nodes[name] = Node(self, name, store, **bounds)
        return node

    def usual(self) -> tuple[Node, Node, Node]:
        """The nodes of ORDER: destination, gateway, source."""
        return self.add("host-b"), self.add("gw-1", groups=("edge",)), self.add("host-a")

    def apply(self, order: dict[str, Any] = ORDER, listing: str = LISTING) -> Order:
        parsed, _ = parse_file(json.dumps(order))
        return orders.apply(self.store, parsed, parse_listing(listing, "list"))[0]

    def end(self, move_id: str = "web", *, force: bool = False) -> Order | None:
        return orders.end(self.store, move_id, force=force)

    def turn(self, until: Callable[[], bool] = lambda: False) -> None:
        """Until nothing changes any more, or *until* says so between two nodes' turns."""
        before = -1
        while before != (before := self.store.range(keys.TOP).revision):
            for node in self.nodes.values():
                if until():
                    return
                node.turn()

    def done(self, name: str, move_id: str = "web") -> Done:
        item = read(self.store, keys.done(name, move_id))
        return parse_done(item and item.value)

    def error(self, name: str, move_id: str = "web") -> Error:
        """What is wrong there, as it says."""
        error = self.done(name, move_id).error
        assert error is not None
        return error

    def phases(self) -> dict[str, str]:
        return {name: str(self.done(name).phase) for name in self.nodes}

    def open(self, name: str = "host-b") -> None:
        """As the hook does at post-restore, without the agent."""
        open_move(self.nodes[name].executor(), "web")


def later(monkeypatch: pytest.MonkeyPatch, seconds: int) -> None:
    """The node's own clock goes on."""
    now = site.time.monotonic_ns()
    monkeypatch.setattr(site.time, "monotonic_ns", lambda: now + seconds * 10**9)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about a power cut, nor about this machine's operator."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    monkeypatch.setattr("natkeep.policy.PATH", "/nowhere/natkeep.toml")


@pytest.fixture
def fleet(tmp_path: Path, quick: None) -> Iterator[Fleet]:
    """Without nodes yet."""
    store = DirectoryStore(str(tmp_path / "store"))
    yield Fleet(tmp_path, store)
    store.close()


PREPARED, OPEN, GONE = Phase.PREPARED, Phase.OPEN, Phase.GONE
READY = {"host-b": "prepared", "gw-1": "open", "host-a": "prepared"}
OPENED = {**READY, "host-b": "open"}
UNDONE = dict.fromkeys(READY, "gone")
