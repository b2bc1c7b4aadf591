"""From an object to a pod: controller, store, agents as processes, natkeep-cni in a real namespace.

The API is one in memory, and of the pod there is its network namespace; the rest is real.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes_api import MOVES, NODES, PODS, Api, make_move, make_pod
from kubernetes_schema import find
from pod_groups import pod_group, put
from two_hosts import demand_as_before, look, make_two_hosts

from natkeep.fleet.directory import DirectoryStore

pytestmark = pytest.mark.root

NATKEEP = [sys.executable, "-m", "natkeep.cli"]
PLUGIN = Path(sys.executable).with_name("natkeep-cni")
_CONTAINER = find("DaemonSet")["spec"]["template"]["spec"]["containers"][0]
_ADDED = _CONTAINER["securityContext"]["capabilities"]["add"]
CONFINED = [
    "setpriv", "--no-new-privs", "--inh-caps=-all",
    "--bounding-set", ",".join(["-all", *(f"+{name.lower()}" for name in _ADDED)]),
]  # fmt: skip
"""As the agents' containers are; the kernel then has nothing else for them."""
RESULT = {
    "cniVersion": "1.0.0",
    "interfaces": [{"name": "dest0", "sandbox": "/x"}],
    "ips": [{"address": "10.3.0.20/24", "interface": 0}],
}


class Cluster:
    """Two nodes with an agent each; the second one is the gateway's own namespace."""

    def __init__(self, path: Path, names: dict[str, str]) -> None:
        self.path, self.names = path, names
        self.state = path / "node-2"
        self.agents: list[subprocess.Popen[bytes]] = []
        inside = ["ip", "netns", "exec", names["gateway"]]
        for node, where in (("node-2", CONFINED), ("node-3.gateway", [*inside, *CONFINED])):
            words = ["agent", "--node", node, "--state-dir", str(path / node)]
            with (path / f"{node}.log").open("wb") as log:
                self.agents.append(
                    subprocess.Popen(
                        [*where, *NATKEEP, *words],
                        env={**os.environ, "NATKEEP_STORE": f"dir:{path}/store"},
                        stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    )
                )  # fmt: skip

    def plugin(self, verb: str) -> subprocess.CompletedProcess[str]:
        """As a container runtime calls it, at the end of the pod's chain."""
        config = {
            "cniVersion": "1.0.0", "name": "pods", "type": "natkeep-cni",
            "orders": f"{self.state}/orders", "stateDir": str(self.state),
            "agent": f"{self.state}/agent.sock", "prevResult": RESULT,
        }  # fmt: skip
        environment = {
            "CNI_COMMAND": verb, "CNI_CONTAINERID": "c1", "CNI_IFNAME": "eth0",
            "CNI_NETNS": f"/run/netns/{self.names['destination']}", "PATH": os.environ["PATH"],
            "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-b",
        }  # fmt: skip
        text = json.dumps(config, separators=(",", ":"))
        return subprocess.run(
            [PLUGIN], input=text, env=environment, capture_output=True, text=True, timeout=60
        )

    def close(self) -> None:
        for agent in self.agents:
            agent.kill()
            agent.wait()


@pytest.fixture
def cluster(tmp_path: Path, make_netns: Callable[[], str]) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, make_two_hosts(make_netns))
    yield cluster
    cluster.close()


def told(kind: str) -> Callable[[dict[str, Any]], bool]:
    return lambda status: any(
        (each["type"], each["status"]) == (kind, "True") for each in status.get("conditions", ())
    )


def test_an_object_prepares_a_pod_that_is_to_come(cluster: Cluster) -> None:
    before, store = look(cluster.names), DirectoryStore(str(cluster.path / "store"))
    wish = make_move(
        targetPod={"name": "web-b", "nodeName": "node-2"}, frozen=True,
        gateways=[{"nodeSelector": {"zone": "a"}}],
    )  # fmt: skip
    with Api() as api, api.controller(store):
        api.create(PODS, make_pod("web-a", "node-1", "10.2.0.10"))
        api.create(NODES, {"metadata": {"name": "node-3", "labels": {"zone": "a"}}})
        api.create(MOVES, wish)
        api.wait("web", told("Accepted"))
        assert look(cluster.names) == before, "there is no pod yet"

        done = cluster.plugin("ADD")
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert json.loads(done.stdout) == RESULT
        status = api.wait("web", told("Ready"))
        assert status["new"] == ["10.3.0.20"]
        assert {site["node"]: site["phase"] for site in status["sites"]} == {
            "node-2": "prepared", "node-3.gateway": "open",
        }  # fmt: skip

        state = ["--state-dir", str(cluster.state)]
        subprocess.run([*NATKEEP, "-q", "open", status["id"], *state], check=True)  # as the hook
        api.wait("web", told("Open"))
        assert cluster.plugin("CHECK").returncode == 0
        api.change("web", endConnections=True)
        api.delete("web")
        api.wait_gone("web")
    store.close()
    demand_as_before(cluster.names, before)
    assert not [*(cluster.state / "orders").glob("*.json")]
    assert cluster.plugin("DEL").returncode == 0


def test_a_pod_that_is_there_is_found_by_its_processes(cluster: Cluster) -> None:
    """Another user's, as the sandbox's is: that takes the agent CAP_SYS_PTRACE."""
    pod, store = make_pod("web-b", "node-2", "10.3.0.20"), DirectoryStore(f"{cluster.path}/store")
    before = look(cluster.names)
    sandbox = ["setpriv", "--reuid=65535", "--clear-groups", "sleep", "600"]
    inside = ["ip", "netns", "exec", cluster.names["destination"], *sandbox]
    with (
        pod_group(pod["metadata"]["uid"]) as procs, subprocess.Popen(inside) as process,
        Api() as api, api.controller(store),
    ):  # fmt: skip
        try:
            put(procs, process.pid)
            inode = Path("/run/netns", cluster.names["destination"]).stat().st_ino
            while Path(f"/proc/{process.pid}/ns/net").stat().st_ino != inode:
                time.sleep(0.01)
            api.create(PODS, make_pod("web-a", "node-1", "10.2.0.10"))
            api.create(PODS, pod)
            api.create(NODES, {"metadata": {"name": "node-3", "labels": {"zone": "a"}}})
            wish = make_move(frozen=True, gateways=[{"nodeSelector": {"zone": "a"}}])
            api.create(MOVES, wish)
            status = api.wait("web", told("Ready"))
            assert {site["node"]: site["phase"] for site in status["sites"]} == {
                "node-2": "prepared", "node-3.gateway": "open",
            }  # fmt: skip
            api.delete("web")
            api.wait_gone("web")
        finally:
            process.kill()
            process.wait()
    store.close()
    demand_as_before(cluster.names, before)
