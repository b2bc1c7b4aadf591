"""Hosts of the lab that ssh reaches, as an operator's machines: an sshd in each, one key.

Each has a state directory and a directory of images of its own, though all share one file system.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from natkeep.lab.capture import Frame
from natkeep.lab.engine import Frozen
from natkeep.lab.engines.criu import Criu
from natkeep.lab.host import Host, LabError, await_true
from natkeep.lab.lab import Lab
from natkeep.lab.topology import Address
from natkeep.lab.translators import natkeep_command

SSHD = "/usr/sbin/sshd"
IMAGES = "natkeep-images"
_PORT = 22


class Machines:
    """sshd at the hosts of these roles, and ssh's configuration for a controller."""

    def __init__(
        self, lab: Lab, *roles: str, controller: str,
        addresses: Mapping[str, Address] | None = None, shared: bool = False,
    ) -> None:  # fmt: skip
        if not os.access(SSHD, os.X_OK):
            raise LabError("there is no sshd here (Debian: openssh-server)")
        self.lab, self.directory, self.controller = lab, lab.directory / "ssh", controller
        self.shared = shared
        self.directory.mkdir()
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd shuts its unprivileged part in
        self.key = self.directory / "key"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True
        )
        self.authorized = self.directory / "authorized"
        shutil.copy(self.key.with_suffix(".pub"), self.authorized)
        self.images = lab.directory / IMAGES
        self.images.mkdir()
        self.client = self.directory / "config"
        self.client.write_text("")
        self.destination = lab.site.role if lab.site.role in roles else "local"
        self.addresses = {seat.role: seat.address(lab.family) for seat in lab.topology.seats}
        self.addresses |= addresses or {}
        for role in roles:
            self._serve(role)
        select = lab.select_frames
        lab.select_frames = lambda frames: select(_without_ssh(frames))

    def _serve(self, role: str) -> None:
        host = self.lab.topology[role]
        address = self.addresses[role]
        own = self.directory / role
        own.mkdir()
        key = own / "hostkey"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        config = own / "sshd_config"
        config.write_text(
            f"HostKey {key}\nAuthorizedKeysFile {self.authorized}\nPidFile none\nUsePAM no\n"
            f"ListenAddress {address}\nPermitRootLogin prohibit-password\nStrictModes no\n"
            f"SetEnv NATKEEP_STATE_DIR={own / 'state'}\n"
        )
        if not self.shared:  # its images are no other host's
            host.run("mount", "-t", "tmpfs", "tmpfs", str(self.images))
        host.start(f"sshd-{role}", SSHD, "-D", "-e", "-f", str(config))
        self._await(host, str(address))
        with self.client.open("a") as file:
            file.write(
                f"Host {role}\n HostName {address}\n User root\n IdentityFile {self.key}\n"
                f" IdentitiesOnly yes\n StrictHostKeyChecking accept-new\n"
                f" UserKnownHostsFile {self.directory / 'known'}\n"
            )

    def _await(self, host: Host, address: str) -> None:
        ready = ("ss", "--no-header", "--listening", "--numeric", "--tcp", "sport", "=", ":22")
        await_true(lambda: host.run(*ready).stdout.strip(), f"sshd at {address}", seconds=10)

    def natkeep(self, *words: str) -> subprocess.CompletedProcess[str]:
        """natkeep at the controller, to its end."""
        state = self.directory / "controller"
        return self.lab.topology[self.controller].run(
            *natkeep_command(), *words, check=False, timeout=120,
            env={**os.environ, "NATKEEP_STATE_DIR": str(state)},
        )  # fmt: skip

    def status(self, role: str) -> str:
        """What `natkeep status --json` tells at the host *role*."""
        host, own = self.lab.topology[role], self.environment(role)
        return host.run(*natkeep_command(), "status", "--json", env=own).stdout

    def environment(self, role: str) -> dict[str, str]:
        """That of a natkeep at the host *role*."""
        return {**os.environ, "NATKEEP_STATE_DIR": str(self.directory / role / "state")}

    def migrate(self, *options: str) -> str:
        """The lab's server from the source to the destination, by `natkeep migrate`: what it said.

        The scenario is over if that fails.
        """
        lab = self.lab
        lab.begin_freeze()
        lab.frozen = Frozen(self.images, ())
        lab.undone.append(lab.place_order(move_id="web"))  # `finish` undoes it, not the lab
        with lab.report.must("natkeep migrate moves the server"):
            said = self.call("migrate", *self.words(), *options)
        lab.at = lab.topology[lab.site.role]
        lab.note_restored()
        return said

    def words(self) -> list[str]:
        """What names the process, the hosts, and how they are reached."""
        engine = self.lab.engine
        assert isinstance(engine, Criu)
        return [
            f"source:{self.lab.traffic.server.pid}", self.destination, "--id", "web",
            "--images", str(self.images), "--criu", str(engine.binary),
            "--ssh", f"ssh -F {self.client}", "--natkeep", shlex.join(natkeep_command()),
        ]  # fmt: skip

    def call(self, *words: str) -> str:
        """natkeep at the controller, and what it said; LabError where it fails."""
        done = self.natkeep(*words)
        if done.returncode:
            raise LabError(f"natkeep {words[0]} exited {done.returncode}: {done.stderr.strip()}")
        return done.stderr


def _without_ssh(frames: Mapping[str, Sequence[Frame]]) -> dict[str, list[Frame]]:
    """What the peers and the server say; the controller's ssh is beside it on the same wires."""
    return {
        point: [frame for frame in here if not _is_ssh(frame)] for point, here in frames.items()
    }


def _is_ssh(frame: Frame) -> bool:
    if frame.segment is None:
        return False
    ends = frame.segment.tuple
    return _PORT in (ends.source.port, ends.destination.port)
