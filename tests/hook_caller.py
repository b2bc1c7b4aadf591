"""natkeep-hook as CRIU calls it, in this process and with a fake kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from natkeep import policy
from natkeep.criu import environment, hook
from natkeep.kernel import linux
from natkeep.plan.observation import Gate

CORPUS = Path(__file__).parent / "checkpoint/corpus"
OLD, NEW = "10.2.0.10", "10.3.0.20"
TREE, BEFORE = f"pid:{os.getpid()}", ""
"""The tree's namespace by its root, and CRIU's own."""


class Criu:
    """CRIU as the hook sees it: this very process, which has opened an image directory."""

    def __init__(self, kernel: FakeKernel, images: Path, patch: pytest.MonkeyPatch) -> None:
        self.kernel, self.patch = kernel, patch
        self.handle = os.open(images, os.O_RDONLY)
        self.id = environment.own_id(os.getpid())
        patch.setenv("CRTOOLS_IMAGE_DIR", f"/proc/{os.getpid()}/fd/{self.handle}")

    def call(self, action: str, **environment: str) -> int:
        """What the hook exits with at *action*."""
        self.patch.setenv("CRTOOLS_SCRIPT_ACTION", action)
        if action == "pre-restore":
            self.patch.delenv("CRTOOLS_INIT_PID", raising=False)
        else:
            self.patch.setenv("CRTOOLS_INIT_PID", str(os.getpid()))
        for name, value in environment.items():
            self.patch.setenv(name, value)
        return hook.main()

    def stand(self, order: str) -> None:
        """An order of the machine's configuration, in the place of any of the environment's."""
        for name in ("NATKEEP_MAP", "NATKEEP_ID"):
            self.patch.delenv(name, raising=False)
        Path(policy.PATH).write_text(f"[hook]\n{order}\n")

    def gates(self) -> dict[str, dict[str, Gate]]:
        """The gates of each namespace that has one."""
        return {name: site.gates for name, site in self.kernel.sites.items() if site.gates}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return Path(shutil.copytree(CORPUS / "plain", tmp_path / "images"))


@pytest.fixture
def criu(images: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Criu]:
    kernel = FakeKernel()
    monkeypatch.setattr(linux, "LinuxKernel", lambda *_: kernel)
    monkeypatch.setattr(policy, "PATH", str(tmp_path / "natkeep.toml"))
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("NATKEEP_MAP", f"{OLD}={NEW}")
    criu = Criu(kernel, images, monkeypatch)
    yield criu
    os.close(criu.handle)


def cable(netns: str, *more: str, within: Sequence[str] = ()) -> None:
    """Give the namespace NEW on a device, and what else a restore of the image `plain` needs.

    more: further lines for ip(8). within: what ip(8) is started by, where its name is known.
    """
    lines = [
        "link add eth0 type veth peer name eth1",
        f"address add {NEW}/24 dev eth0",
        "link set eth0 up",
        "link set eth1 up",
        "route add default via 10.3.0.1",
        "address add fd00:2::10/128 dev lo nodad",  # of the image's other connection
    ]
    command = [*within, "ip", "-n", netns, "-batch", "-"]
    subprocess.run(command, input="\n".join([*lines, *more]), text=True, check=True)


def own_netns(images: Path) -> None:
    (images / "netns-9.img").write_bytes(b"")
