"""natkeep by way of a store and an agent at each site, in the place of its own command line.

    fleet = Fleet(lab)              lab.translator from now on; the agents run
    lab.freeze(); lab.prepare()     `fleet apply`, and `fleet wait` until all is ready
    lab.restore()                   natkeep-hook opens the destination, without the store
    fleet.kill("gateway")           SIGKILL; start("gateway") has it back
    fleet.lose_store()              the directory is gone; find_store() has it back

Rule: as lab.py: what fails becomes an assertion, never a traceback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from natkeep.lab.lab import Lab
from natkeep.lab.time_scale import scaled
from natkeep.lab.translators import Natkeep, Order, TranslatorError, natkeep_command

NODES = ("destination", "gateway")
_GROUP = "edge"


class Fleet(Natkeep):
    """See above. The agents are the lab's own processes, and go with it."""

    def __init__(self, lab: Lab, store: str = "", **starts: Mapping[str, str]) -> None:
        """store: as --store; default: a directory. starts: more in an agent's environment."""
        super().__init__(lab.directory, self._state("destination"))
        self._store = lab.directory / "fleet"
        self.environment["NATKEEP_STORE"] = store or f"dir:{self._store}"
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self.between: Callable[[], object] = lambda: None  # what happens behind `fleet apply`
        lab.translator = self
        lab.topology.defer(self.end_agents)
        with lab.report.must("the agents run"):
            for role in NODES:
                self.start(role, starts.get(role, {}))
            self.wait_alive()

    def _state(self, role: str) -> str:
        return f"state-{role}"

    def journal(self, role: str, move_id: str) -> Path:
        """Where the node has the move."""
        return self.directory / self._state(role) / f"{move_id}.journal"

    def start(self, role: str, more: Mapping[str, str] = MappingProxyType({})) -> None:
        """Have the agent of a node run; more: in its environment."""
        group = ["--group", _GROUP] if role == "gateway" else []
        state = str(self.directory / self._state(role))
        with (self.directory / f"agent-{role}.log").open("ab") as log:
            self._agents[role] = subprocess.Popen(
                [*natkeep_command(), "agent", "--node", role, *group, "--state-dir", state],
                env={**os.environ, **self.environment, **more},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def revive(self) -> None:
        """Have each agent run that does not."""
        for role in NODES:
            if role not in self._agents or self._agents[role].poll() is not None:
                self.start(role)

    def has_died(self, role: str, seconds: float) -> bool:
        """Whether its agent comes to an end within so long."""
        try:
            self._agents[role].wait(scaled(seconds))
        except subprocess.TimeoutExpired:
            return False
        return True

    def sites(self, move_id: str) -> dict[str, Any]:
        """What each node says of a move, as `status --json` has it."""
        [move] = json.loads(self.call("fleet", "status", move_id, "--json"))["moves"]
        return {site["node"]: site for site in move["sites"]}

    def kill(self, role: str) -> None:
        """As by SIGKILL: it has no last word."""
        agent = self._agents.pop(role)
        agent.kill()
        agent.wait()

    def stop(self, role: str) -> None:
        """Its agent does nothing until `go_on`."""
        self._agents[role].send_signal(signal.SIGSTOP)

    def go_on(self, role: str) -> None:
        self._agents[role].send_signal(signal.SIGCONT)

    def hooks(self) -> set[str]:
        """The ids that natkeep-hook has prepared by at the destination."""
        journals = (self.directory / self._state("destination")).glob("criu-*.journal")
        return {path.stem for path in journals}

    def end_agents(self) -> None:
        """No agent outlives the lab."""
        for role in [*self._agents]:
            self.kill(role)

    def wait_alive(self) -> None:
        """Until all agents are known in the store."""
        until = time.monotonic() + scaled(60)
        while {*NODES} - {*json.loads(self.call("fleet", "status", "--json"))["agents"]}:
            if time.monotonic() > until:
                raise TranslatorError("the agents do not run")
            time.sleep(0.05)

    def lose_store(self) -> None:
        """The directory is no store any more."""
        self._store.rename(self.directory / "lost")
        self._store.touch()

    def find_store(self) -> None:
        """It is back."""
        self._store.unlink()
        (self.directory / "lost").rename(self._store)

    def prepare(self, order: Order) -> None:
        self.apply(order)
        self.between()
        self.call("fleet", "wait", order.id, "--timeout", "40")  # less than a call may take

    def apply(self, order: Order, **more: object) -> None:
        """Write the order; more: what is in it besides, or instead."""
        assert order.gateway
        way, where = order.options
        file = self.directory / "order.json"
        file.write_text(
            json.dumps(
                {
                    "id": order.id, "maps": [f"{order.old_end}={order.new_end}"],
                    "mode": order.mode, way.removeprefix("--"): where,
                    "sites": [
                        {
                            "node": "destination", "role": "destination",
                            "netns": order.destination.name,
                        },
                        {"group": _GROUP, "role": "gateway", "netns": order.gateway.name},
                    ],
                    **more,
                }
            )
        )  # fmt: skip
        self.call("fleet", "apply", str(file))

    def teardown(self, order: Order) -> None:
        self.call("fleet", "end", order.id, "--yes")
        self.call("fleet", "wait", order.id, "--for", "settled")
