"""A container of a pod goes into a pod of another node, which has another address.

    pods = Pods(lab)              nodes at source and destination; the lab's engine and translator
    lab.begin()                   a server in pod web-a, whose address is OLD
    pods.make_destination()       pod web-b: natkeep-cni prepares the destination in it, closed
    lab.freeze()                  checkpoint; at post-dump natkeep-hook closes the source
    lab.prepare()                 the gateway, open, from the archive
    lab.restore()                 from the archive; at post-restore natkeep-hook opens web-b
    pods.remove_source()          web-a goes; nobody hears of it
    lab.finish(); pods.remove_destination()

Rule: as lab.py: what fails becomes an assertion, never a traceback.
"""

from __future__ import annotations

import ipaddress
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from natkeep.lab.application import Application
from natkeep.lab.engine import EngineError, Frozen, Moving, Opening
from natkeep.lab.engines.criu import Criu
from natkeep.lab.engines.runc import find_cgroups, program, remove_cgroup, remove_cgroups, shared
from natkeep.lab.host import Host, LabError, await_true
from natkeep.lab.lab import Lab
from natkeep.lab.pods.image import BARE
from natkeep.lab.pods.node import Node
from natkeep.lab.topology import DESTINATION, SOURCE, Address, Seat, anti_spoof
from natkeep.lab.translators import Natkeep, Order, TranslatorError, natkeep_command

NETS = {"old": 12, "far": 13}
"""Of the pods of each network's node: the second number of their addresses."""
_FIRST = 10  # as node.py has it


class PodSeat(Seat):
    """The first pod of a node, which is where the process is."""

    def address(self, family: int) -> Address:
        net = NETS[self.network]
        text = f"10.{net}.0.{_FIRST}" if family == 4 else f"fd00:{net}::{_FIRST}"
        return ipaddress.ip_address(text)


class Pods:
    """See above; it is the engine, and its `translator` the lab's.

    closes_source: whether natkeep-hook is called at the checkpoint. shares_pids: whether a pod's
    containers are in one pid namespace (shareProcessNamespace). agent: whether the new pod's
    node has one.
    """

    name = "containerd"

    def __init__(
        self, lab: Lab, *, closes_source: bool = True, shares_pids: bool = False,
        agent: bool = False,
    ) -> None:  # fmt: skip
        if not isinstance(lab.engine, Criu):
            raise EngineError("this scenario needs the engine containerd")
        self.lab, self.closes_source = lab, closes_source
        self.criu = lab.engine.binary
        self.nodes: dict[str, Node] = {}
        self.pods: dict[str, str] = {}  # by the node's role
        self.containers: dict[str, str] = {}
        self._command: list[str] = []
        lab.engine, lab.translator = self, PeersSide(lab)
        lab.report.engine = self.name
        lab.home, lab.site = (PodSeat(s.role, s.network, _FIRST) for s in (SOURCE, DESTINATION))
        lab.topology.defer(self.close)
        with lab.report.must("the nodes run"):
            for seat in (SOURCE, DESTINATION):
                host = lab.topology[seat.role]
                self.nodes[seat.role] = Node(
                    host, NETS[seat.network], self.criu, shares_pids=shares_pids,
                    agent=agent and seat == DESTINATION,
                )  # fmt: skip
                self._route(seat)
            self._filter()

    def _route(self, seat: Seat) -> None:
        net, gateway = NETS[seat.network], self.lab.topology["gateway"]
        for family, prefix in (4, f"10.{net}.0.0/24"), (6, f"fd00:{net}::/64"):
            gateway.run(
                "ip", f"-{family}", "route", "add", prefix, "via", str(seat.address(family))
            )

    def _filter(self) -> None:
        """The anti-spoof filter has OLD of the pods, too."""
        rules = anti_spoof([DESTINATION], [self.lab.home]).splitlines()
        added = [line for line in rules if line.startswith("add rule ")]
        self.lab.topology["switch"].nft("\n".join(added))

    # ---- what the kubelet and an agent do -------------------------------------------------------

    def make_destination(self) -> None:
        """Order the pod that the container will be in, and make it."""
        lab = self.lab
        order = {
            "schema": 1, "id": lab.name, "maps": [f"{lab.old}=auto"],
            "connections": str(self.list_connections()), "mode": lab.mode,
        }  # fmt: skip
        self.order_file.write_text(json.dumps(order))
        self.run_destination()

    @property
    def order_file(self) -> Path:
        """Where natkeep-cni looks for the order of the pod that is to come."""
        return self.nodes["destination"].orders / "default_web-b.json"

    def list_connections(self) -> Path:
        """What the server has, while it runs."""
        told = self.lab.directory / "web.json"
        with self.lab.report.must("natkeep lists the connections of the server"):
            pid = str(self.lab.traffic.server.pid)
            inspect = [*natkeep_command(), "inspect", "--live", pid, "--json"]
            told.write_text(self.lab.topology["source"].run(*inspect).stdout)
        return told

    def run_destination(self) -> None:
        """Make the pod that has an order."""
        lab, node = self.lab, self.nodes["destination"]
        with lab.report.must("natkeep-cni prepares the destination in the new pod"):
            self._run_pod("destination", "web-b")
            hook = {"NATKEEP_ID": "*", "NATKEEP_STATE_DIR": str(node.state)}
            node.write_criu_file(self._hook(), hook)
            told = json.loads((node.orders / "default_web-b.new").read_text())
            if told["new"] != [str(lab.new)]:
                raise EngineError(f"NEW is told as {told['new']}, not as {lab.new}")

    def _run_pod(self, role: str, name: str) -> None:
        node = self.nodes[role]
        self.pods[role] = pod = node.run_pod(name)
        seat = self.lab.home if role == "source" else self.lab.site
        found = node.cri.addresses(pod)
        if str(seat.address(self.lab.family)) not in found:
            raise EngineError(f"pod {name} has {', '.join(found)}")

    def _hook(self) -> Path:
        return Natkeep(self.lab.directory).hook()

    def remove_source(self) -> None:
        """The pod that was left is removed."""
        with self.lab.report.must("the old pod is removed"):
            self.nodes["source"].cri.remove_pod(self.pods.pop("source"))

    def open_source(self) -> None:
        """The move is given up: the container, which a checkpoint leaves running, is heard."""
        with self.lab.report.must("natkeep teardown at the source's node"):
            node = self.nodes["source"]
            teardown = ["teardown", self.lab.name, "--yes", "--state-dir", str(node.state)]
            node.host.run(*natkeep_command(), *teardown)
        self.lab.note_restored()

    def remove_destination(self) -> None:
        """The pod that the process is in ends, and nothing of the move is left at either node."""
        with self.lab.report.should("the new pod is removed"):
            self.nodes["destination"].cri.remove_pod(self.pods.pop("destination"))
        for role, node in self.nodes.items():
            state = ["--state-dir", str(node.state)]
            node.host.run(*natkeep_command(), "gc", *state, check=False)
            said = node.host.run(*natkeep_command(), "status", *state, check=False)
            left = said.stdout.strip() or said.stderr.strip()
            name = f"nothing of the move is left at the {role}'s node"
            self.lab.report.check(name, left == "nothing is prepared", left)

    # ---- the engine ------------------------------------------------------------------------------

    def start(self, host: Host, application: Application, line: Sequence[str]) -> int:
        """Run *line* in a container of a new pod."""
        self._command = program(application, line)
        self.nodes[host.role].write_criu_file(None, {})
        self._run_pod(host.role, "web-a")
        return self._bring_up(host, "web-a", application, application.directory, BARE)

    def _bring_up(
        self, host: Host, pod: str, application: Application, directory: Path, image: str
    ) -> int:
        """A container that has *directory* where the application's is; its pid at the node."""
        node = self.nodes[host.role]
        mounts = {path: (path, way == "ro") for path, way in shared(application).items()}
        mounts[self._command[3].rpartition("/")[0]] = (str(directory), False)
        container = node.make_container(self.pods[host.role], pod, self._command, mounts, image)
        self.containers[host.role] = container
        return node.cri.pid(container)

    def freeze(self, host: Host, moving: Moving, into: Path) -> Frozen:
        """Checkpoint it. It goes on running, behind a gate that its hook has closed."""
        lab, node, archive = self.lab, self.nodes[host.role], into / "archive.tar"
        into.mkdir()
        environment = {
            "NATKEEP_ID": lab.name, "NATKEEP_SOURCE": f"{lab.old}={lab.new}",
            "NATKEEP_STATE_DIR": str(node.state),
        }  # fmt: skip
        node.write_criu_file(self._hook() if self.closes_source else None, environment)
        node.cri.checkpoint(self.containers[host.role], archive)
        # The two go on side by side, each with files of its own.
        shutil.copytree(moving.application.directory, into / "application")
        return Frozen(into, ("--image", str(archive)))

    def restore(self, host: Host, moving: Moving, frozen: Frozen, opening: Opening) -> None:
        own = frozen.directory / "application"
        archive = str(frozen.directory / "archive.tar")
        moving.pid = self._bring_up(host, "web-b", moving.application, own, archive)
        moving.application.directory = own

    def close(self) -> None:
        """End all pods, and remove their cgroups and those of labs that died."""
        for node in self.nodes.values():
            with suppress(EngineError):
                for pod in node.cri.pods():
                    node.cri.remove_pod(pod)
            node.cri.close()
            prefix = node.cgroup.strip("/")
            with suppress(LabError):  # then the next lab that ends removes them
                await_true(partial(_are_removed, prefix), "the pods' cgroups to be empty")
        remove_cgroups()


class PeersSide(Natkeep):
    """natkeep where peers' packets pass, opened before the restore; CNI has the destination.

    It waits for the order, as an agent does: no interpreter starts in the blackout.
    """

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab.directory)
        self._agent = subprocess.Popen(
            [*natkeep_command(), "serve", "pods", "--stdio"], text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **self.environment},
        )  # fmt: skip
        lab.topology.defer(self._end)
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self._agent.stdout
        answer: dict[str, Any] = json.loads(self._agent.stdout.readline())
        return answer

    def _end(self) -> None:
        self._agent.communicate()

    def prepare(self, order: Order) -> None:
        assert self._agent.stdin
        sites = [f"--site=gateway={order.gateway.name}"] if order.gateway else []
        sites += [f"--site=peer={host.name}" for host in order.peer_sites]
        words = [
            "prepare", order.id, "--map", f"{order.old}={order.new}", *sites, "--gate", "open",
            "--mode", order.mode, *order.options,
        ]  # fmt: skip
        self._agent.stdin.write(json.dumps({"natkeep": words}) + "\n")
        answer = self._read()
        if answer["exit"]:
            raise TranslatorError(f"natkeep prepare: {answer['stderr']}", code=answer["exit"])


def _are_removed(prefix: str) -> bool:
    return all([remove_cgroup(path) for path in find_cgroups(prefix)])
