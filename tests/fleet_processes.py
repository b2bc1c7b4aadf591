"""A fleet of two hosts, its agents as processes, and natkeep's own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

NATKEEP = [sys.executable, "-m", "natkeep.cli"]
LIST = "10.2.0.10:5000 10.1.0.2:50001\n10.2.0.10:5000 10.1.0.2:50002\n"


class Processes:
    """A fleet of two hosts: its agents, and natkeep's own command line."""

    def __init__(self, path: Path, names: dict[str, str], store: str) -> None:
        self.path, self.names, self.store = path, names, store
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        (path / "list").write_text(LIST)
        self.sites = [
            {"node": "host-b", "role": "destination", "netns": names["destination"]},
            {"group": "edge", "role": "gateway", "netns": names["gateway"]},
        ]

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        everywhere = {**os.environ, "NATKEEP_STORE": self.store, **environment}
        return subprocess.run(
            [*NATKEEP, *words], env=everywhere, capture_output=True, text=True, timeout=60
        )

    def call(self, *words: str) -> str:
        done = self.run(*words)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def state(self, node: str) -> str:
        return str(self.path / f"state-{node}")

    def start(self, node: str, *words: str, fault: str = "") -> None:
        more = {"NATKEEP_FAULT": fault} if fault else {}
        with (self.path / f"{node}.log").open("ab") as log:
            self.agents[node] = subprocess.Popen(
                [*NATKEEP, "agent", "--node", node, "--state-dir", self.state(node), *words],
                env={**os.environ, "NATKEEP_STORE": self.store, **more},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def start_both(self) -> None:
        self.start("host-b")
        self.start("gw-1", "--group", "edge")
        self.wait_alive("gw-1", "host-b")

    def wait_alive(self, *nodes: str) -> None:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if {*nodes} <= {*json.loads(self.call("fleet", "status", "--json"))["agents"]}:
                return
        pytest.fail(f"not alive: {nodes}")

    def apply(self, **more: Any) -> subprocess.CompletedProcess[str]:
        order = {
            "id": "web", "maps": ["10.2.0.10=10.3.0.20"], "connections": "list",
            "sites": self.sites, **more,
        }  # fmt: skip
        (self.path / "web.json").write_text(json.dumps(order))
        return self.run("fleet", "apply", str(self.path / "web.json"))

    def kill(self, node: str) -> None:
        agent = self.agents.pop(node)
        agent.kill()
        agent.wait()

    def journals(self) -> list[Path]:
        return [Path(self.state(node), "web.journal") for node in ("host-b", "gw-1")]

    def wait_said(self, node: str, words: str) -> None:
        until = time.monotonic() + 30
        while words not in (self.path / f"{node}.log").read_text():
            assert time.monotonic() < until, f"{node} did not say: {words}"
            time.sleep(0.05)

    def wait_settled(self, move_id: str) -> None:
        """An agent that has failed tries again by itself."""
        until = time.monotonic() + 30
        while self.run("fleet", "wait", move_id, "--for", "settled").returncode:
            assert time.monotonic() < until

    def close(self) -> None:
        for node in [*self.agents]:
            self.kill(node)
