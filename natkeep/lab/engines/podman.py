"""The engine `podman`: a container of podman, checkpointed into an archive and restored from it.

    host source                                               host destination
    podman run --network ns:PATH                              podman container restore --import
      podman container checkpoint --export  ── archive ──►      (the same image, the same PATH)

podman runs in the host's pid and mount namespaces, but not in its network namespace, as runc.py
has it. The archive brings the container's settings along, so that PATH, podman's directories and
CRIU's configuration file are at the same place at both hosts, and the image has the same id; in
the lab what podman keeps, and PATH, is on tmpfs of the host's own.

podman starts conmon, and so runc, CRIU and the hook, with an environment that it makes itself:
the action script is a small one that sets NATKEEP_ID and then becomes natkeep-hook. Debian 12's
crun is built without CRIU; hence runc.

Rule: what lies outside of the lab's namespaces and directory is cgroups that bear the lab's
prefix; `close` removes them. This file must never write below /etc, /run or /var.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from natkeep.lab.application import Application
from natkeep.lab.engine import EngineError, Frozen, Moving, Opening, end_silence
from natkeep.lab.engines.runc import (
    CONFIGURATION,
    LOCK,
    container,
    find_cgroups,
    inside,
    make_root,
    path_with,
    program,
    remove_cgroup,
    remove_cgroups,
    shared,
)
from natkeep.lab.host import NAMES, Host, LabError, await_true, write_script
from natkeep.lab.time_scale import scaled

_IMAGE = "localhost/bare"  # nothing but links into the machine's /usr
_PID = "{{if .State.Running}}{{.State.Pid}}{{else}}0{{end}}"  # it keeps that of one that has ended
_FURNISH = """\
set -e
mkdir -p "$2"
for own in /var/lib /dev/shm /etc/cni "$2"; do
	[ ! -d "$own" ] || mount -t tmpfs none "$own"
done
touch "$2/network"
mount --bind "$1" "$2/network"
"""


class Podman:
    """`podman run`, `container checkpoint --export` and `container restore --import`."""

    name = "podman"

    def __init__(self, criu: Path) -> None:
        self.criu = criu
        self._furnished: dict[str, Host] = {}

    def start(self, host: Host, application: Application, line: Sequence[str]) -> int:
        """Run *line* as the first process of a container."""
        self._furnish(host)
        configuration = _configuration(host)
        configuration.write_text(LOCK)
        volumes = [f"--volume={path}:{path}:{way}" for path, way in shared(application).items()]
        self._call(
            host, "run", "--detach", "--name", container(host, application),
            "--network", f"ns:{_own(host) / 'network'}",
            "--annotation", f"{CONFIGURATION}={configuration}",
            "--cgroup-parent", f"/{_cgroup(host)}", "--ulimit", "host", *volumes,
            _IMAGE, *program(application, line),
        )  # fmt: skip
        return self._pid(host, application)

    def freeze(self, host: Host, moving: Moving, into: Path) -> Frozen:
        into.mkdir()
        archive = into / "archive.tar"
        name = container(host, moving.application)
        self._call(
            host, "container", "checkpoint", "--tcp-established", "--compress", "none",
            "--export", str(archive), name,
        )  # fmt: skip
        self._call(host, "rm", "--force", name)
        return Frozen(into, ("--image", str(archive)))

    def restore(self, host: Host, moving: Moving, frozen: Frozen, opening: Opening) -> None:
        end_silence(host)
        self._furnish(host)
        script = _wrap(opening, host.directory / "hook-of-podman") if opening.hook else None
        _configuration(host).write_text(LOCK + (f"action-script {script}\n" if script else ""))
        self._call(
            host, "container", "restore", "--tcp-established",
            "--import", str(frozen.directory / "archive.tar"),
        )  # fmt: skip
        moving.pid = self._pid(host, moving.application)
        if not opening.hook:
            opening.open()

    def write_tools(self, host: Host, directory: Path) -> None:
        """`podman` and `criu` into *directory*, for those who call them at *host*."""
        settings = f"export CONTAINERS_CONF={shlex.quote(str(_settings(host)))}"
        call = shlex.join(["exec", str(shutil.which("podman")), *self.command(host)[1:]])
        write_script(directory / "podman", f'{settings}\n{call} "$@"')
        (directory / "criu").symlink_to(self.criu.absolute())

    def expect(self, host: Host, application: Application) -> list[str]:
        """Make ready that another restores the container at *host*; how that is told where."""
        self._furnish(host)
        return []

    def find(self, host: Host, application: Application) -> int:
        """The pid of the container that runs at *host*, even if another has restored it, or 0."""
        try:
            return self._pid(host, application)
        except EngineError:
            return 0

    def close(self) -> None:
        """End the containers and remove their cgroups, and those of labs that died."""
        for host in self._furnished.values():
            with suppress(EngineError):
                self._call(host, "rm", "--force", "--all", "--time", "0")
        for name in {_cgroup(host) for host in self._furnished.values()}:
            with suppress(LabError):  # then the next lab that ends removes them
                await_true(partial(_are_removed, name), "podman's cgroups to be empty")
        self._furnished.clear()
        remove_cgroups()

    def _pid(self, host: Host, application: Application) -> int:
        name = container(host, application)
        return int(self._call(host, "inspect", "--format", _PID, name))

    def _furnish(self, host: Host) -> None:
        """What a machine with podman has: a store, the image, the network namespace's path."""
        if host.role in self._furnished:
            return
        host.run("sh", "-c", _FURNISH, "sh", str(NAMES / host.name), str(_own(host)))
        self._furnished[host.role] = host
        path = path_with(self.criu, host.directory)
        settings = f'[engine]\nconmon_env_vars = ["PATH={path}"]\n'
        _settings(host).write_text(settings)
        self._bring_image(host)

    def _bring_image(self, host: Host) -> None:
        """Make the image at the first host, and copy it to others: an archive names its id."""
        image = host.directory / "image.tar"
        if image.exists():
            self._call(host, "load", "--quiet", "--input", str(image))
            return
        tree, archive = host.directory / "bare", host.directory / "bare.tar"
        make_root(tree)
        with tarfile.open(archive, "w") as tar:
            tar.add(tree, ".")
        self._call(host, "import", "--quiet", str(archive), _IMAGE)
        self._call(host, "save", "--quiet", "--output", str(image), _IMAGE)

    def command(self, host: Host) -> list[str]:
        """podman with what sets the lab's apart from the machine's."""
        own = _own(host)
        return [
            "podman", "--runroot", str(own / "run"), "--tmpdir", str(own / "tmp"),
            "--storage-driver", "vfs", "--events-backend", "none",
            "--cgroup-manager", "cgroupfs", "--runtime", str(_runtime(host)),
        ]  # fmt: skip

    def _call(self, host: Host, *arguments: str) -> str:
        """One call of podman in *host*, and what it said; EngineError when it fails."""
        done = subprocess.run(
            inside(host, *self.command(host), *arguments),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=scaled(30),
            env={
                **os.environ,
                "PATH": path_with(self.criu, host.directory),
                "CONTAINERS_CONF": str(_settings(host)),
            },
        )  # fmt: skip
        if done.returncode:
            verb = " ".join(arguments[:2])
            raise EngineError(f"podman {verb} exited {done.returncode}: {done.stderr.strip()}")
        return done.stdout.strip()


def _settings(host: Host) -> Path:
    return host.directory / "containers.conf"


def _wrap(opening: Opening, script: Path) -> Path:
    """*script*, which gives the hook the environment that podman does not pass on."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in opening.environment.items()]
    return write_script(script, "\n".join([*exports, f"exec {shlex.quote(str(opening.hook))}"]))


def _configuration(host: Host) -> Path:
    return host.directory / "criu-of-podman.conf"


def _own(host: Host) -> Path:
    """Where each host has a tmpfs of its own: an archive names podman's paths, too."""
    return host.directory / "podman"


def _runtime(host: Host) -> Path:
    """runc with its state in the lab: not every call of podman's passes --runtime-flag on."""
    root = shlex.quote(str(_own(host) / "runc"))
    return write_script(host.directory / "runc-of-podman", f'exec runc --root {root} "$@"')


def _cgroup(host: Host) -> str:
    return f"{host.directory.name}-podman"


def _are_removed(name: str) -> bool:
    return all([remove_cgroup(path) for path in find_cgroups(name)])
