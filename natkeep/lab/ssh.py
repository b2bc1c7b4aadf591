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
from natkeep.lab.engines.podman import Podman
from natkeep.lab.engines.runc import Runc, container
from natkeep.lab.host import NAMES, Host, LabError, await_true
from natkeep.lab.lab import Lab
from natkeep.lab.topology import Address
from natkeep.lab.translators import natkeep_command

SSHD = "/usr/sbin/sshd"
IMAGES = "natkeep-images"
_PORT = 22


class Machines:
    """sshd at the hosts of these roles, and ssh's configuration for a controller.

    options: of each `natkeep migrate`. states: where natkeep's state directories are: ROLE/state.
    """

    sshd = ""
    """More of sshd's configuration."""

    def __init__(
        self, lab: Lab, *roles: str, controller: str,
        addresses: Mapping[str, Address] | None = None, shared: bool = False,
        options: Sequence[str] = (), states: Path | None = None,
    ) -> None:  # fmt: skip
        if not os.access(SSHD, os.X_OK):
            raise LabError("there is no sshd here (Debian: openssh-server)")
        self.lab, self.directory, self.controller = lab, lab.directory / "ssh", controller
        self.shared, self.options = shared, tuple(options)
        self.directory.mkdir()
        self.states = states or self.directory
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
        address, port = self._place(role)
        own = self.directory / role
        own.mkdir()
        key = own / "hostkey"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        config = own / "sshd_config"
        config.write_text(
            f"HostKey {key}\nAuthorizedKeysFile {self.authorized}\nPidFile none\nUsePAM no\n"
            f"ListenAddress {address}\nPort {port}\nPermitRootLogin prohibit-password\n"
            f"StrictModes no\nSetEnv {' '.join(self._settings(role, own))}\n{self.sshd}\n"
        )
        if not self.shared:  # its images are no other host's
            host.run("mount", "-t", "tmpfs", "tmpfs", str(self.images))
        host.start(f"sshd-{role}", *self._enter(), SSHD, "-D", "-e", "-f", str(config))
        self._await(host, str(address), port)
        with self.client.open("a") as file:
            file.write(
                f"Host {role} {address}\n HostName {address}\n"
                f" Port {port}\n User root\n"
                f" IdentityFile {self.key}\n IdentitiesOnly yes\n"
                " StrictHostKeyChecking accept-new\n"
                f" UserKnownHostsFile {self.directory / 'known'}\n"
            )

    def _place(self, role: str) -> tuple[str, int]:
        """Where its sshd listens."""
        return str(self.addresses[role]), _PORT

    def _settings(self, role: str, own: Path) -> list[str]:
        """What is in the environment of what ssh starts there; *own*: a directory of the role's."""
        return [f"NATKEEP_STATE_DIR={self._state(role)}"]

    def _state(self, role: str) -> str:
        return str(self.states / role / "state")

    def _enter(self) -> list[str]:
        """What brings sshd to the network namespace that it is in, from the host's own."""
        return []

    def _await(self, host: Host, address: str, port: int) -> None:
        ready = ("ss", "--no-header", "--listening", "--numeric", "--tcp", "sport", "=", f":{port}")
        await_true(
            lambda: host.run(*self._enter(), *ready).stdout.strip(),
            f"sshd at {address}",
            seconds=10,
        )

    def natkeep(self, *words: str) -> subprocess.CompletedProcess[str]:
        """natkeep at the controller, to its end."""
        return self.lab.topology[self.controller].run(
            *natkeep_command(), *words, check=False, timeout=120,
            env=self.environment("controller"),
        )  # fmt: skip

    def status(self, role: str) -> str:
        """What `natkeep status --json` tells at the host *role*."""
        host, own = self.lab.topology[role], self.environment(role)
        return host.run(*natkeep_command(), "status", "--json", env=own).stdout

    def environment(self, role: str) -> dict[str, str]:
        """That of a natkeep at the host *role*; `controller`: of the one that migrates."""
        return {**os.environ, "NATKEEP_STATE_DIR": self._state(role)}

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
        self.take(lab.site.role)
        return said

    def take(self, role: str) -> None:
        """The server runs at *role* now, where natkeep has restored it."""
        self.lab.at = self.lab.topology[role]
        self.lab.note_restored()

    def is_at(self, role: str) -> bool:
        """Whether the server runs there."""
        return self.lab.topology[role].alive(self.lab.traffic.server.pid)

    def words(self) -> list[str]:
        """What names the process, the hosts, and how they are reached."""
        engine = self.lab.engine
        assert isinstance(engine, Criu)
        return [
            f"source:{self.lab.traffic.server.pid}", self.destination,
            "--criu", str(engine.binary), *self._options(),
        ]  # fmt: skip

    def _options(self) -> list[str]:
        return [
            "--id", "web", "--images", str(self.images),
            "--ssh", f"ssh -F {self.client}", "--natkeep", shlex.join(natkeep_command()),
            *self.options,
        ]  # fmt: skip

    def call(self, *words: str) -> str:
        """natkeep at the controller, and what it said; LabError where it fails."""
        done = self.natkeep(*words)
        if done.returncode:
            raise LabError(f"natkeep {words[0]} exited {done.returncode}: {done.stderr.strip()}")
        return done.stderr

    def finish(self) -> None:
        """Both ends talk on and close, the client first; then the move is undone on all hosts."""
        lab = self.lab
        lab.traffic.talk_on()
        lab.traffic.check_ends()
        lab.traffic.client_closes()
        lab.traffic.server_closes()
        with lab.report.must("natkeep finish undoes it everywhere"):
            self.call("finish", "web", "--drain", "30")


class ContainerMachines(Machines):
    """Machines whose server is a container in a network namespace of its own.

    What runs there beside it, natkeep and the container's tool, is in the gateway's network
    namespace, as on machines whose containers that gateway leads to; sshd is on its loopback.
    """

    def _place(self, role: str) -> tuple[str, int]:
        return "127.0.0.1", 2200 + [seat.role for seat in self.lab.topology.seats].index(role)

    def _enter(self) -> list[str]:
        return ["nsenter", f"--net={NAMES / self.lab.topology['gateway'].name}", "--"]

    def _settings(self, role: str, own: Path) -> list[str]:
        tools = own / "bin"
        tools.mkdir()
        self._engine.write_tools(self.lab.topology[role], tools)
        return [*super()._settings(role, own), f"PATH={tools}:{os.environ['PATH']}"]

    @property
    def _engine(self) -> Runc | Podman:
        engine = self.lab.engine
        assert isinstance(engine, Runc | Podman)
        return engine

    def words(self) -> list[str]:
        application = self.lab.traffic.server.application
        there = self.lab.topology[self.destination]
        name = container(there, application)
        own = self._engine.expect(there, application)
        return [
            f"source:{self._engine.name}:{name}", self.destination, *own, *self._options()
        ]  # fmt: skip

    def _find(self, role: str) -> int:
        return self._engine.find(self.lab.topology[role], self.lab.traffic.server.application)

    def is_at(self, role: str) -> bool:
        return self._find(role) > 0

    def take(self, role: str) -> None:
        super().take(role)
        self.lab.traffic.server.pid = self._find(role)


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
