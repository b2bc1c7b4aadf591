"""What dumps and restores a container: its own tool, which calls CRIU.

                 the process      dump                         restore
    runc:NAME    runc state       runc checkpoint              runc restore, with the bundle there
    podman:NAME  podman inspect   podman container checkpoint  podman container restore --import;
                                  --export                     at the source from what it kept

A container's tool has no option for an action script: each call has a HOME of its own below the
directory of images, with a .criu/default.conf, which CRIU reads besides the file that the tool
names to it. So natkeep-hook is called for this move alone, and nothing of the user's is written.
podman passes HOME on to a restore, and of the environment nothing else; to a dump it passes PATH,
in which a `criu` then stands that sets HOME.

A container may have a network namespace of its own. It has to have a path at both hosts: where it
comes into being with the container its address cannot be known before.

Rule: as engines.py has it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from natkeep.errors import RefusedError
from natkeep.migrate.engines import HERE, Command, Criu, demand_criu
from natkeep.migrate.host import Host, HostError
from natkeep.migrate.record import Record

_CONFIGURATION = """\
mkdir -p -m 700 "$1/.criu" || exit
{ cat ~/.criu/default.conf 2>/dev/null; printf '\\n%s' "$2"; } >"$1/.criu/default.conf"
"""
_HOOK = """\
printf '#!/bin/sh\\n%s\\n' "$3" >"$1/hook" && chmod 700 "$1/hook" && "$1/hook"
"""  # which has nothing to do yet: does that directory allow what is in it to run?
_PROGRAM = """\
printf '#!/bin/sh\\nHOME=%s exec %s "$@"\\n' "$1" "$(command -v criu)" >"$1/criu" &&
chmod 700 "$1/criu" && "$1/criu" --version >/dev/null
"""
_BEFORE = 'PATH=$1:$PATH; shift; exec "$@"'
# Of runc's own standard streams the restored process has those that were pipes.
_APART = 'exec "$@" </dev/null >/dev/null 2>&1'
_LEAST = 3, 19  # of CRIU: an earlier one calls no shell script where a library calls it


class _Container(Criu):
    """What the tools of containers have in common."""

    tool = ""

    def arrange(self, host: Host, verb: str, hook: Mapping[str, str]) -> None:
        home = self._home(host, verb)["HOME"]
        lock = "network-lock nftables\n" if verb == "dump" else ""
        script = f"action-script {home}/hook\n" if hook else ""  # in quotes CRIU 4.2 misreads it
        writing = _CONFIGURATION + (_HOOK if hook else "")
        line = self._wrap(host, hook) if hook else ""
        host.run("sh", "-c", writing, "sh", home, lock + script, line)

    def _wrap(self, host: Host, hook: Mapping[str, str]) -> str:
        """The shell's words for natkeep-hook, with all that it needs of an environment."""
        state = host.run("printenv", "NATKEEP_STATE_DIR", ok=None).stdout.strip()
        own = {**hook, **({"NATKEEP_STATE_DIR": state} if state else {})}
        pairs = (f"{name}={value}" for name, value in own.items() if value)
        return shlex.join(("exec", "env", *pairs, host.hook))

    def _home(self, host: Host, verb: str) -> dict[str, str]:
        return {"HOME": f"{self.record.images}/criu/{host.role}-{verb}"}

    def _ask(self, host: Host, *words: str) -> dict[str, Any] | None:
        """The document that the tool gives there of the container; None where it knows none."""
        answer = host.run(self.tool, *words, self.record.container, ok=None)
        if answer.exit == 127:
            raise HostError(f"{host} has no {self.tool}: {answer.reason()}")
        found = json.loads(answer.stdout) if not answer.exit else None
        return found[0] if isinstance(found, list) else found

    def _refuse_known(self, host: Host, *words: str) -> None:
        if self._ask(host, *words) is not None:
            raise RefusedError(f"{host} has a container {self.record.container} already")

    def _not_running(self, host: Host) -> RefusedError:
        return RefusedError(f"{host}: {self.tool} has no container {self.record.container} running")

    def _note_source(self, source: Host, pid: int, config: Mapping[str, Any]) -> None:
        """The process, and its network namespace, which must be that of the configuration."""
        path = _find_netns(source, config)
        if len(set(_identify(source, f"/proc/{pid}/ns/net", path or HERE))) > 1:
            raise RefusedError(
                f"{source}: {self.record.container} is in another network namespace than its "
                "configuration says"
            )
        self.record.pid, self.record.netns["source"] = pid, path


class Runc(_Container):
    """runc: a bundle is at both hosts; a checkpoint leaves no container at the source."""

    tool = "runc"

    def look(self, source: Host, destination: Host) -> None:
        record = self.record
        state = self._ask(source, "state")
        if state is None or state["status"] != "running":
            raise self._not_running(source)
        self._refuse_known(destination, "state")
        record.found["bundle"] = state["bundle"]
        record.bundle = record.bundle or state["bundle"]
        self._note_source(source, state["pid"], self._read_bundle(source, state["bundle"]))
        config = self._read_bundle(destination, record.bundle)
        record.netns["destination"] = _find_netns(destination, config)
        demand_criu("criu", source, destination, least=_LEAST)

    def _read_bundle(self, host: Host, bundle: str) -> dict[str, Any]:
        config = _read_config(host, f"{bundle}/config.json", "--bundle DIR")
        if config["process"].get("terminal"):
            raise RefusedError(f"{host}: {bundle}: a container with a terminal cannot be moved")
        root = config["root"]["path"]
        place = root if root.startswith("/") else f"{bundle}/{root}"
        if host.run("test", "-d", place, ok=None).exit:
            raise RefusedError(f"{host} has no {place}, the root of the container")
        return config

    def pre_dump(self, number: int) -> Command:
        before = ["--parent-path", f"../pre-{number - 1}"] if number > 1 else []
        return self._checkpoint(f"{self.record.images}/pre-{number}", "--pre-dump", *before)

    def dump(self, host: Host, hook: Mapping[str, str]) -> Command:
        rounds = self.record.pre_dumps
        before = ["--parent-path", f"../pre-{rounds}"] if rounds else []
        done = self._checkpoint(self.dumped, *before)
        return done._replace(environment=self._home(host, "dump"))

    def _checkpoint(self, directory: str, *options: str) -> Command:
        words = (
            "runc", "checkpoint", "--image-path", directory, "--work-path", directory,
            "--tcp-established", *options, *self.record.dump_options, self.record.container,
        )  # fmt: skip
        return Command("runc checkpoint", words, {}, (f"{directory}/dump.log",))

    def restore(self, host: Host, hook: Mapping[str, str]) -> Command:
        record, directory = self.record, self.dumped
        log = f"{directory}/runc.log"
        bundle = record.bundle if host.role == "destination" else record.found["bundle"]
        words = (
            "sh", "-c", _APART, "sh", "runc", "--log", log, "restore", "--detach",
            "--bundle", bundle, "--image-path", directory, "--work-path", directory,
            "--tcp-established", *record.restore_options, record.container,
        )  # fmt: skip
        home = self._home(host, "restore") if hook else {}
        return Command("runc restore", words, home, (f"{directory}/restore.log", log))

    def find_pid(self, host: Host) -> int:
        return int((self._ask(host, "state") or {"pid": 0})["pid"])

    def clear(self, destination: Host) -> None:
        destination.run("runc", "delete", "--force", self.record.container, ok=None)


class Podman(_Container):
    """podman: the archive of a checkpoint goes; the source keeps the container, and its own copy.

    found: of the container its `id`, `static`, where podman keeps what is of it, and `runtime`.
    """

    tool = "podman"

    @property
    def image(self) -> str:
        return f"{self.record.found['static']}/checkpoint"

    @property
    def log(self) -> str:
        return f"{self.record.found['static']}/dump.log"

    def look(self, source: Host, destination: Host) -> None:
        record = self.record
        found = self._ask(source, "container", "inspect")
        if found is None or not found["State"]["Running"]:
            raise self._not_running(source)
        self._refuse_options(found)
        self._refuse_known(destination, "container", "inspect")
        record.found = {
            "id": found["Id"], "static": found["StaticDir"], "runtime": found["OCIRuntime"],
        }  # fmt: skip
        config = _read_config(source, found["OCIConfigPath"], "")
        self._note_source(source, found["State"]["Pid"], config)
        record.netns["destination"] = _find_netns(destination, config)
        image = found["Image"]
        if destination.run("podman", "image", "exists", image, ok=None).exit:
            raise RefusedError(
                f"{destination} lacks {found['ImageName']}, {image[:12]}",
                hint="podman save there, podman load here",
            )
        demand_criu("criu", source, destination, least=_LEAST)

    def _refuse_options(self, found: Mapping[str, Any]) -> None:
        name, settings = self.record.container, found["HostConfig"]
        mode = settings["NetworkMode"]
        if mode != "host" and not mode.startswith("ns:"):
            raise RefusedError(
                f"{name} has a network of podman's own ({mode}): its address is known only when it "
                "has been restored",
                hint="--network ns:PATH or host (docs/containers.md)",
            )
        if settings.get("AutoRemove"):
            raise RefusedError(f"{name} runs with --rm: nothing of it would stay to go back to")
        if found.get("Pod"):
            raise RefusedError(f"{name} is in a pod, which podman does not restore it into")
        if self.record.pre_dumps:
            raise RefusedError("--pre-dump is not for podman's archives")

    def arrange(self, host: Host, verb: str, hook: Mapping[str, str]) -> None:
        super().arrange(host, verb, hook)
        if verb == "dump":
            host.run("sh", "-c", _PROGRAM, "sh", self._home(host, verb)["HOME"])

    def dump(self, host: Host, hook: Mapping[str, str]) -> Command:
        home = self._home(host, "dump")["HOME"]
        words = (
            "sh", "-c", _BEFORE, "sh", home, "podman", "container", "checkpoint",
            "--tcp-established", "--compress", "none", "--export", f"{self.dumped}/archive.tar",
            *self.record.dump_options, self.record.container,
        )  # fmt: skip
        return self._call(words, host, "dump")

    def restore(self, host: Host, hook: Mapping[str, str]) -> Command:
        record = self.record
        own: tuple[str, ...] = (record.container,)
        if host.role == "destination":
            own = ("--import", f"{self.dumped}/archive.tar")
        words = (
            "podman", "--runtime", record.found["runtime"], "container", "restore",
            "--tcp-established", *record.restore_options, *own,
        )  # fmt: skip
        done = self._call(words, host, "restore")
        return done if hook else done._replace(environment={})

    def _call(self, words: tuple[str, ...], host: Host, verb: str) -> Command:
        logs = (f"{self.record.found['static']}/{verb}.log",)
        return Command(f"podman {verb}", words, self._home(host, verb), logs)

    def is_dumped(self, source: Host) -> bool:
        """CRIU ends the processes only when the image is complete."""
        return not source.run("test", "-e", f"{self.image}/inventory.img", ok=None).exit

    def find_pid(self, host: Host) -> int:
        return int(
            (self._ask(host, "container", "inspect") or {"State": {"Pid": 0}})["State"]["Pid"]
        )

    def clear(self, destination: Host) -> None:
        destination.run("podman", "rm", "--force", self.record.found["id"], ok=None)

    def forget(self, source: Host) -> None:
        """Without --force, which would end one that runs again."""
        source.run("podman", "rm", self.record.found["id"], ok=None)


CONTAINERS: dict[str, type[Criu]] = {"runc": Runc, "podman": Podman}
"""By the word between the host and the name of a container."""


def make_engine(record: Record) -> Criu:
    """The one that has the process of *record*."""
    return CONTAINERS.get(record.engine, Criu)(record)


def _read_config(host: Host, path: str, hint: str) -> dict[str, Any]:
    """A container's config.json at *host*."""
    answer = host.run("cat", path, ok=None)
    if answer.exit:
        raise RefusedError(f"{host} has no {path}", hint=hint or None)
    return answer.document()


def _find_netns(host: Host, config: Mapping[str, Any]) -> str:
    """The path of a container's network namespace there; empty where it has none of its own."""
    spaces = config.get("linux", {}).get("namespaces", [])
    path = next((each.get("path", "") for each in spaces if each["type"] == "network"), HERE)
    if not path:
        raise RefusedError(
            f"{host}: the container's network namespace has no path: its address is known only "
            "when it has been restored",
            hint="config.json: a path for it, or none of type network (docs/containers.md)",
        )
    if path == HERE:
        return ""
    there, here = _identify(host, path, HERE)
    if there == here:
        raise RefusedError(
            f"{host}: the container names natkeep's own network namespace by a path, {path}",
            hint="CRIU would lock all of it, ssh too: config.json without a namespace of type "
            "network",
        )
    return path


def _identify(host: Host, *paths: str) -> list[str]:
    """What the network namespaces at *paths* are, to compare."""
    answer = host.run("stat", "-L", "-c", "%d:%i", *paths, ok=None)
    if answer.exit:
        raise RefusedError(f"{host} lacks a network namespace: {answer.reason()}")
    return answer.stdout.split()
