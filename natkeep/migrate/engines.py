"""What dumps and restores the process: CRIU itself; containers.py has the tools of containers.

Rule: what is asked of a host before the freeze is kept in the record; a command is made of that
alone, so that one who comes later makes the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from natkeep.errors import RefusedError
from natkeep.migrate.host import Host, HostError
from natkeep.migrate.record import Record

_FINISHED = "Dumping finished successfully"
HERE = "/proc/self/ns/net"
"""natkeep's own network namespace."""


class Command(NamedTuple):
    """A command of an engine: for messages, its words, its environment, and where it then logs."""

    what: str
    words: tuple[str, ...]
    environment: dict[str, str]
    logs: tuple[str, ...]


class Criu:
    """CRIU itself: the process has a pid, the same on both hosts."""

    def __init__(self, record: Record) -> None:
        self.record = record

    @property
    def dumped(self) -> str:
        """The directory that goes to the destination."""
        return f"{self.record.images}/dump"

    @property
    def image(self) -> str:
        """The directory of CRIU's images at the source."""
        return self.dumped

    def look(self, source: Host, destination: Host) -> None:
        """Find the process, and what is missing on a host; RefusedError, HostError."""
        demand_criu(self.record.criu, source, destination)
        pid = self.record.pid
        found = source.run("stat", "-L", "-c", "%d:%i", f"/proc/{pid}/ns/net", HERE, ok=None)
        if not found.exit and len(set(found.stdout.split())) > 1:
            raise RefusedError(
                f"{source}: process {pid} is in another network namespace than natkeep there",
                hint="of a container: A:runc:NAME, A:podman:NAME",
            )
        if not destination.run("test", "-e", f"/proc/{self.record.pid}", ok=None).exit:
            raise RefusedError(f"{destination} has a process {self.record.pid} already")

    def arrange(self, host: Host, verb: str, hook: Mapping[str, str]) -> None:
        """Before the freeze: what *verb*, `dump` or `restore`, will read at *host*."""

    def pre_dump(self, number: int) -> Command:
        """The memory's round *number*, from 1; its directory is there."""
        before = ["--prev-images-dir", f"../pre-{number - 1}"] if number > 1 else []
        options = ["--tree", str(self.record.pid), "--track-mem", *before]
        directory = f"{self.record.images}/pre-{number}"
        return self._criu("pre-dump", directory, *options, *self.record.dump_options)

    def dump(self, host: Host, hook: Mapping[str, str]) -> Command:
        """The dump; with natkeep-hook, and that in its environment, where *hook* has something."""
        options = ["--tree", str(self.record.pid), "--network-lock", "nftables"]
        if rounds := self.record.pre_dumps:
            options += ["--prev-images-dir", f"../pre-{rounds}", "--track-mem"]
        options += ["--action-script", host.hook] if hook else []
        return self._criu("dump", self.dumped, *options, *self.record.dump_options, hook=hook)

    def restore(self, host: Host, hook: Mapping[str, str]) -> Command:
        """The restore, at the destination or back at the source; *hook* as in `dump`."""
        options = ["--restore-detached", *(["--action-script", host.hook] if hook else [])]
        return self._criu("restore", self.dumped, *options, *self.record.restore_options, hook=hook)

    def _criu(
        self, verb: str, directory: str, *options: str, hook: Mapping[str, str] | None = None
    ) -> Command:
        log = f"{verb}.log"
        words = (
            self.record.criu, verb, "--images-dir", directory, "-v3", "--log-file", log,
            "--tcp-established", *options,
        )  # fmt: skip
        return Command(f"criu {verb}", words, dict(hook or {}), (f"{directory}/{log}",))

    def is_dumped(self, source: Host) -> bool:
        """Whether the image there is complete, of a process that has ended."""
        log = source.run("cat", f"{self.dumped}/dump.log", ok=None).stdout
        return _FINISHED in log

    def find_pid(self, host: Host) -> int:
        """The pid of the process that was restored at *host*."""
        return self.record.pid

    def clear(self, destination: Host) -> None:
        """Remove what a restore that failed may have left."""

    def forget(self, source: Host) -> None:
        """Remove what the tool has kept of the process where it was."""


def demand_criu(criu: str, *hosts: Host, least: tuple[int, int] = (0, 0)) -> None:
    """HostError where a host has no *criu*, RefusedError where an earlier one than *least*."""
    for host in hosts:
        there = host.run(criu, "--version", ok=None)
        if there.exit:
            raise HostError(f"{host} has no {criu}: {there.reason()}")
        found = re.search(r"Version: (\d+)\.(\d+)", there.stdout)
        if found and (int(found[1]), int(found[2])) < least:
            raise RefusedError(
                f"{host} has CRIU {found[1]}.{found[2]}, which calls no script for a container",
                hint=f"{least[0]}.{least[1]} or later (docs/containers.md)",
            )
