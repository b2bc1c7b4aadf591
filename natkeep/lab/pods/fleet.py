"""Pods that move by a fleet's order: agents at the new pod's node and at the gateway.

    pods = Pods(lab, agent=True); fleet = PodFleet(lab, pods)
    fleet.stage(); pods.run_destination()      the agent has the order where natkeep-cni looks
    lab.freeze(); lab.prepare(); lab.restore()      the rest is ordered, from the archive

Rule: as lab.py: what fails becomes an assertion, never a traceback.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import MappingProxyType

from natkeep.lab.fleet import Fleet
from natkeep.lab.host import await_true
from natkeep.lab.lab import Lab
from natkeep.lab.pods.move import Pods
from natkeep.lab.translators import Order, natkeep_command


class PodFleet(Fleet):
    """The fleet of *lab*, whose destination is a pod that is to come; NEW is `auto`."""

    def __init__(self, lab: Lab, pods: Pods) -> None:
        self._lab, self._pods, self._node = lab, pods, pods.nodes["destination"]
        super().__init__(lab)

    def _state(self, role: str) -> str:
        if role == "destination":
            return str(self._node.state.relative_to(self._lab.directory))
        return super()._state(role)

    def start(self, role: str, more: Mapping[str, str] = MappingProxyType({})) -> None:
        if role != "destination":
            return super().start(role, more)
        words = [*natkeep_command(), "agent", "--node", role, "--state-dir", str(self._node.state)]
        environment = {**os.environ, **self.environment, **more}
        program = self._node.host.start("agent", *words, env=environment)
        self._agents[role] = program.process
        return None

    def stage(self) -> None:
        """Order the destination alone; its agent puts the pod's order where natkeep-cni looks."""
        lab = self._lab
        with lab.report.must("the pod's order is put at its node"):
            listed = self._pods.list_connections()
            order = Order(
                lab.name, lab.old, lab.new, lab.topology["gateway"], self._node.host, (),
                ("--connections", str(listed)), lab.mode,
            )  # fmt: skip
            self.apply(order, phase="staged")
            await_true(self._pods.order_file.exists, "the pod's order", seconds=30)

    def apply(self, order: Order, **more: object) -> None:
        assert order.gateway
        sites = [
            {"node": "destination", "role": "destination", "netns": "pod:default/web-b"},
            {"group": "edge", "role": "gateway", "netns": order.gateway.name},
        ]
        super().apply(order, maps=[f"{order.old}=auto"], sites=sites, **more)
