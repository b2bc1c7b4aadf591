"""The engine `runc`: the application is a container, checkpointed and restored by runc.

    host source                                           host destination
    bundle: config.json, rootfs   ── runc checkpoint ──►  bundle: the same, but for the paths of
    network: /run/netns/…-source      image, by CRIU      the network namespace and of CRIU's
                                  ── runc restore ─────►  configuration file

runc runs in the host's pid and mount namespaces, so that a container ends with its host, but in
the machine's own network namespace, as container engines do; CRIU and natkeep-hook with it. The
container is in the host's network namespace by its path. runc has no option for an action script:
it stands in a configuration file of CRIU's that the annotation `org.criu.config` names, and so is
for this container alone. (Without the annotation runc names /etc/criu/runc.conf.) CRIU and its
hook inherit runc's environment, and so NATKEEP_ID.

Rule: what lies outside of the lab's namespaces and directory is the container's cgroup, which
bears the lab's prefix; `close` removes it. This file must never write below /etc.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from natkeep.lab.application import SCRIPT, Application
from natkeep.lab.engine import EngineError, Frozen, Moving, Opening, end_silence, errors_in
from natkeep.lab.host import NAMES, Host, write_script
from natkeep.lab.time_scale import scaled
from natkeep.lab.topology import LOCKS, PREFIX, hex_of

CGROUPS = Path("/sys/fs/cgroup")
CONFIGURATION = "org.criu.config"  # the annotation
LOCK = "network-lock nftables\n"  # for the dump, which by default takes iptables
_LOGS = {"checkpoint": "dump.log", "restore": "restore.log"}  # CRIU's, by runc's verb
# Its own descriptors: CRIU dumps none that belongs to a mount namespace outside.
_OWN_FILES = 'exec "$@" </dev/null >"$0" 2>&1'


class Runc:
    """`runc run`, `checkpoint` and `restore`, in a host's namespaces but for the network's."""

    name = "runc"

    def __init__(self, criu: Path) -> None:
        self.criu = criu
        self._specs: dict[str, dict[str, Any]] = {}  # by container: its config.json
        self._running: dict[str, Host] = {}

    def start(self, host: Host, application: Application, line: Sequence[str]) -> int:
        """Run *line* as the first process of a container."""
        name = container(host, application)
        self._specs[name] = make_spec(self._plain_spec(host), application, line, cgroup=name)
        self._bundle(host, name, LOCK)
        return self._bring_up(host, name, host.directory, "run")

    def freeze(self, host: Host, moving: Moving, into: Path) -> Frozen:
        into.mkdir()
        name = container(host, moving.application)
        self._call(host, into, "checkpoint", *_images(into), name)
        del self._running[name]
        return Frozen(into, ("--image", str(into)))

    def restore(self, host: Host, moving: Moving, frozen: Frozen, opening: Opening) -> None:
        end_silence(host)
        name = container(host, moving.application)
        script = f"action-script {opening.hook}\n" if opening.hook else ""
        self._bundle(host, name, LOCK + script)  # the lock is for the next dump
        images = frozen.directory
        moving.pid = self._bring_up(
            host, name, images, "restore", *_images(images), env=opening.environment
        )
        if not opening.hook:
            opening.open()

    def write_tools(self, host: Host, directory: Path) -> None:
        """`runc` and `criu` into *directory*, for those who call them at *host*."""
        call = f"exec {shutil.which('runc')} --root {shlex.quote(str(_root(host)))}"
        write_script(directory / "runc", f'{call} "$@"')
        (directory / "criu").symlink_to(self.criu.absolute())

    def expect(self, host: Host, application: Application) -> list[str]:
        """Make ready that another restores the container at *host*; how that is told where."""
        name = container(host, application)
        self._bundle(host, name, "")
        return ["--bundle", str(_bundle_of(host, name))]

    def find(self, host: Host, application: Application) -> int:
        """The pid of the container that runs at *host*, even if another has restored it, or 0."""
        name = container(host, application)
        asking = inside(host, "runc", "--root", str(_root(host)), "state", name)
        done = subprocess.run(asking, capture_output=True)
        if done.returncode:
            return 0
        self._running[name] = host
        return int(json.loads(done.stdout)["pid"])

    def close(self) -> None:
        """End the containers and remove their cgroups, and those of labs that died."""
        for name, host in self._running.items():
            with suppress(EngineError):
                self._call(host, host.directory, "delete", "--force", name)
        self._running.clear()
        remove_cgroups()

    def _bring_up(
        self, host: Host, name: str, work: Path, verb: str, *options: str,
        env: Mapping[str, str] | None = None,
    ) -> int:  # fmt: skip
        """`runc run` or `runc restore`; the first process's pid in the host."""
        self._running[name] = host
        pidfile = host.directory / f"{name}.pid"
        self._call(
            host, work, verb, "--detach", "--pid-file", str(pidfile),
            "--bundle", str(_bundle_of(host, name)), *options, name, env=env,
        )  # fmt: skip
        return int(pidfile.read_text())

    def _plain_spec(self, host: Host) -> dict[str, Any]:
        """What `runc spec` gives."""
        self._call(host, host.directory, "spec", "--bundle", str(host.directory))
        path = host.directory / "config.json"
        spec: dict[str, Any] = json.loads(path.read_text())
        path.unlink()
        return spec

    def _bundle(self, host: Host, name: str, configuration: str) -> None:
        """The container's bundle at *host*: its own namespace, its own configuration of CRIU."""
        bundle = _bundle_of(host, name)
        make_root(bundle / "rootfs")
        spec = self._specs[name]
        kinds = [each for each in spec["linux"]["namespaces"] if each["type"] != "network"]
        network = {"type": "network", "path": str(NAMES / host.name)}
        linux = {**spec["linux"], "namespaces": [*kinds, network]}
        annotations = self.configure(host, bundle, configuration)
        own = {**spec, "linux": linux, "annotations": annotations}
        (bundle / "config.json").write_text(json.dumps(own, indent=1))

    def configure(self, host: Host, bundle: Path, configuration: str) -> dict[str, str]:
        """Write CRIU's *configuration*; the annotations by which runc finds it."""
        file = bundle / "criu.conf"
        file.write_text(configuration)
        return {CONFIGURATION: str(file)}

    def _call(
        self, host: Host, work: Path, verb: str, *options: str,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        """One call of runc in *host*; EngineError with CRIU's words when it fails."""
        log = host.directory / "runc.log"
        done = subprocess.run(
            inside(host, "runc", "--root", str(_root(host)), "--log", str(log), verb, *options),
            # not pipes: the first process has them, too, until it opens its own
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            timeout=scaled(20),
            env={**os.environ, **(env or {}), "PATH": path_with(self.criu, host.directory)},
        )  # fmt: skip
        if done.returncode:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            said = errors_in(work / _LOGS[verb]) if verb in _LOGS else ""
            raise EngineError(
                f"runc {verb} exited {done.returncode}: {said or ' '.join(lines[-1:])}"
            )


def _images(directory: Path) -> list[str]:
    where = str(directory)
    return ["--image-path", where, "--work-path", where, "--tcp-established"]


def _root(host: Host) -> Path:
    """Where runc keeps what runs at *host*."""
    return host.directory / f"runc-{host.role}"


def _bundle_of(host: Host, name: str) -> Path:
    return host.directory / f"bundle-{host.role}" / name


def container(host: Host, application: Application) -> str:
    """The container of *application*: the same name at every host of one lab."""
    return f"{host.directory.name}-{application.directory.name}"


def inside(host: Host, *argv: str) -> list[str]:
    """*argv*, made to run in all of *host* but its network namespace."""
    return ["nsenter", "--target", str(host.init_pid), "--pid", "--mount", "--", *argv]


def path_with(criu: Path, directory: Path) -> str:
    """A PATH in which `criu` is *criu*: runc finds it by name."""
    link = directory / "bin" / "criu"
    link.parent.mkdir(exist_ok=True)
    if not link.exists():
        link.symlink_to(criu.absolute())
    return f"{link.parent}:{os.environ.get('PATH', os.defpath)}"


def make_spec(
    plain: Mapping[str, Any], application: Application, line: Sequence[str], *, cgroup: str
) -> dict[str, Any]:
    """`runc spec`'s container, made to run *line* on the machine's own /usr, read-only."""
    binds = [
        {"destination": path, "source": path, "type": "bind", "options": ["rbind", access]}
        for path, access in shared(application).items()
    ]
    process = {**plain["process"], "terminal": False, "args": program(application, line)}
    linux = {**plain["linux"], "cgroupsPath": f"/{cgroup}"}
    return {**plain, "process": process, "mounts": [*plain["mounts"], *binds], "linux": linux}


def shared(application: Application) -> dict[str, str]:
    """What a container has of the machine's files, at the same paths, and how."""
    read_only = sorted({"/usr", sys.base_prefix, str(SCRIPT.parent)})
    return {**dict.fromkeys(read_only, "ro"), str(application.directory): "rw"}


def program(application: Application, line: Sequence[str]) -> list[str]:
    """*line* as a container runs it."""
    python = str(Path(line[0]).resolve())  # a virtual environment's is a link
    return ["/bin/sh", "-c", _OWN_FILES, str(application.directory / "log"), python, *line[1:]]


def make_root(root: Path) -> None:
    """The links of a merged /usr; what is mounted upon runc makes itself."""
    root.mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        target = Path("/", name)
        if target.is_symlink() and not (root / name).is_symlink():
            (root / name).symlink_to(os.readlink(target))


def find_cgroups(prefix: str) -> Iterable[Path]:
    """The cgroups whose names begin with *prefix*, in the one tree of v2 or in each of v1."""
    return [path for depth in ("", "*/") for path in CGROUPS.glob(f"{depth}{prefix}*")]


def find_left_cgroups() -> list[Path]:
    """Those of labs that are over; a lab has its lock's file as long as it lives."""
    return [path for path in find_cgroups(PREFIX) if not (LOCKS / hex_of(path.name)).exists()]


def remove_cgroups() -> None:
    """Remove what labs that are over left."""
    for path in find_left_cgroups():
        remove_cgroup(path)


def remove_cgroup(path: Path) -> bool:
    """Remove the cgroup *path* with those below it; False while a process is in one."""
    for directory, _, _ in os.walk(path, topdown=False):
        with suppress(OSError):  # in use, or another one was quicker
            os.rmdir(directory)
    return not path.exists()
