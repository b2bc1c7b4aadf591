"""A node: containerd in a host of the lab, with a bridge of CNI's, natkeep-cni behind it.

    host                                     pods of 10.12.0.0/24, fd00:12::/64
    eth0 ── routes ── cni0 10.12.0.1 ──┬──── pod 10.12.0.10
                                       └──── …

containerd runs in all of the host's namespaces; what it keeps below /run and /var/lib is on tmpfs
of the host's own, so that all of it ends with the host. Its snapshots are copies (`native`), since
the lab's directory may be on an overlay itself.

Rule: what lies outside of the lab's namespaces and directory is cgroups that bear the lab's
prefix. This file must never write below /etc, /run or /var of the machine.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from natkeep.lab.engine import EngineError
from natkeep.lab.engines.criu import find_containerd
from natkeep.lab.engines.runc import CONFIGURATION, path_with
from natkeep.lab.host import Host, await_true, write_script
from natkeep.lab.pods import image
from natkeep.lab.pods.cri import Cri, container_config, pod_config
from natkeep.lab.pods.image import BARE, PAUSE, PORT, write_images
from natkeep.lab.translators import natkeep_command

_CRIU_FILE, _CRIU_LOG = "/run/criu.conf", "/run/criu.log"
"""The same paths at each node, as a checkpoint brings its annotations along; on its own /run."""
_PLUGINS = ("bridge", "host-local", "loopback", "tuning")
_FURNISH = """\
set -e
mkdir -p /run/netns
for own in /run /var/lib; do mount -t tmpfs none $own; done
echo 1 >/proc/sys/net/ipv4/ip_forward
echo 1 >/proc/sys/net/ipv6/conf/all/forwarding
"""
_CONFIG = """\
version = 3
root = "{own}/root"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
address = "{own}/sock"
[plugins.'io.containerd.cri.v1.images']
snapshotter = "native"
use_local_image_pull = true
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = "{pause}"
[plugins.'io.containerd.cri.v1.images'.registry]
config_path = "{own}/registries"
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
container_annotations = ["{annotation}"]
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ["{own}/cni"]
conf_dir = "{own}/net.d"
[plugins.'io.containerd.nri.v1.nri']
disable = true
"""


class Node:
    """See above; net: the second number of its pods' addresses."""

    def __init__(
        self, host: Host, net: int, criu: Path, *, shares_pids: bool = False, agent: bool = False
    ) -> None:
        fetched = find_containerd()
        if fetched is None:
            raise EngineError("there is no containerd", hint="scripts/get-containerd")
        self.host, self.net, self.shares_pids = host, net, shares_pids
        self.own = host.directory / f"node-{host.role}"
        self.state, self.agent = self.own / "state", agent
        # An agent has them in its state directory, and makes them there.
        self.orders = self.state / "orders" if agent else self.own / "orders"
        self.logs = self.own / "logs"
        for folder in (self.own, self.logs, self.own / "cni", self.own / "net.d"):
            folder.mkdir(mode=0o755)
        if not agent:
            self.orders.mkdir(mode=0o755)
        self._link_plugins(fetched)
        (self.own / "config.toml").write_text(
            _CONFIG.format(own=self.own, pause=PAUSE, annotation=CONFIGURATION)
        )
        registry = self.own / f"registries/localhost:{PORT}/hosts.toml"
        registry.parent.mkdir(parents=True)
        registry.write_text(f'server = "http://localhost:{PORT}"\n')
        (self.own / "net.d/10-pods.conflist").write_text(json.dumps(self._network()))
        host.run("sh", "-c", _FURNISH)
        path = f"{fetched / 'bin'}:{path_with(criu, host.directory)}"
        host.start(
            f"containerd-{host.role}", str(fetched / "bin/containerd"), "-c",
            str(self.own / "config.toml"), env={**os.environ, "PATH": path},
        )  # fmt: skip
        self.cri = Cri(self.own / "sock")
        self._bring_images()

    def _bring_images(self) -> None:
        """Both nodes have them of one registry, by the same digests."""
        directory, script = self.host.directory / "registry", str(image.__file__)
        if not directory.exists():
            write_images(directory)
        line = [sys.executable, "-I", "-S", script, str(directory), str(PORT)]
        self.host.start(f"registry-{self.host.role}", *line)
        await_true(self._is_served, "the registry to answer", seconds=30)
        for name in (BARE, PAUSE):
            self.cri.pull(name)

    def _is_served(self) -> bool:
        asking = ["/bin/bash", "-c", f": </dev/tcp/127.0.0.1/{PORT}"]
        return self.host.run(*asking, check=False).returncode == 0

    def _link_plugins(self, fetched: Path) -> None:
        for name in _PLUGINS:
            (self.own / "cni" / name).symlink_to(fetched / "root/usr/lib/cni" / name)
        plugin = Path(natkeep_command()[0]).with_name("natkeep-cni")
        if not os.access(plugin, os.X_OK):
            raise EngineError(f"there is no {plugin}", hint="pip install natkeep")
        (self.own / "cni/natkeep-cni").symlink_to(plugin)

    def _network(self) -> dict[str, Any]:
        ranges = [
            [{"subnet": f"10.{self.net}.0.0/24", "rangeStart": f"10.{self.net}.0.10"}],
            [{"subnet": f"fd00:{self.net}::/64", "rangeStart": f"fd00:{self.net}::10"}],
        ]
        ipam = {
            "type": "host-local", "ranges": ranges, "dataDir": str(self.own / "ipam"),
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        }  # fmt: skip
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "ipMasq": False}
        sysctl = {"net.ipv4.tcp_congestion_control": "reno"}  # as topology.py has it, and why
        natkeep = {"type": "natkeep-cni", "orders": str(self.orders), "stateDir": str(self.state)}
        natkeep |= {"agent": str(self.state / "agent.sock")} if self.agent else {}
        plugins = [{**bridge, "ipam": ipam}, {"type": "tuning", "sysctl": sysctl}, natkeep]
        return {"cniVersion": "1.0.0", "name": "pods", "plugins": plugins}

    @property
    def cgroup(self) -> str:
        """Below which all of its pods are."""
        return f"/{self.host.directory.name}-{self.host.role}"

    def config(self, name: str) -> dict[int, Any]:
        """A pod's, by its name."""
        return pod_config(name, cgroup=self.cgroup, logs=self.logs, shares_pids=self.shares_pids)

    def run_pod(self, name: str) -> str:
        """The id of a new pod."""
        return self.cri.run_pod(self.config(name))

    def make_container(
        self, pod: str, pod_name: str, command: Sequence[str],
        mounts: Mapping[str, tuple[str, bool]], image: str = BARE,
    ) -> str:  # fmt: skip
        """The id of a container that runs, or was restored if *image* is an archive."""
        annotations = {CONFIGURATION: _CRIU_FILE}
        config = container_config(
            "app", image, command, mounts, annotations, shares_pids=self.shares_pids
        )
        container = self.cri.create(pod, config, self.config(pod_name))
        try:
            self.cri.start(container)
        except EngineError as error:
            said = self.host.run("grep", "Error", _CRIU_LOG, check=False).stdout
            raise EngineError(f"{error}; {' / '.join(said.splitlines()[-5:])}") from None
        return container

    def write_criu_file(self, hook: Path | None, environment: Mapping[str, str]) -> None:
        """What CRIU reads for all containers here: with a script that becomes natkeep-hook."""
        lines = ["tcp-established", "network-lock nftables", f"log-file {_CRIU_LOG}"]
        if hook is not None:
            exports = [f"export {name}={shlex.quote(text)}" for name, text in environment.items()]
            script = write_script(
                self.own / "hook", "\n".join([*exports, f"exec {shlex.quote(str(hook))}"])
            )
            lines.append(f"action-script {script}")
        self.host.run("tee", _CRIU_FILE, text_in="".join(f"{line}\n" for line in lines))

    def log(self) -> str:
        """The end of what containerd said."""
        text = (self.host.directory / f"containerd-{self.host.role}.log").read_text()
        return "\n".join(text.splitlines()[-30:])
