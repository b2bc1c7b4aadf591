"""What dumps and restores the process: CRIU itself; containers.py has the tools of containers.

Rule: what is asked of a host before the freeze is kept in the record; a command is made of that
alone, so that one who comes later makes the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from threading import Timer
from typing import NamedTuple

from natkeep.errors import RefusedError
from natkeep.migrate.criu_errors import first_error
from natkeep.migrate.host import Host, HostError
from natkeep.migrate.record import Record

LONG = 600.0
"""Seconds after which it is said that CRIU is at work still."""

_FINISHED = "Dumping finished successfully"
_RUN_ID = re.compile(r"CRIU run id = ([0-9A-Za-z-]{1,64})")  # CRIU 4.1 and later, at -v3
HERE = "/proc/self/ns/net"
"""natkeep's own network namespace."""


class Command(NamedTuple):
    """A command of an engine: for messages, its words, its environment, and where it then logs."""

    what: str
    words: tuple[str, ...]
    environment: dict[str, str]
    logs: tuple[str, ...]


def run(
    command: Command, host: Host, say: Callable[[str, str], None], otherwise: Sequence[str] = ()
) -> None:
    """Run it at *host*, however long it takes; HostError with what went wrong first.

    otherwise: as of Host.run. CRIU is never killed. With a dump's gone the network stays locked,
    and, once it was in the process, TCP sockets stay in repair: to most programs recv(2)'s EPERM is
    the end, and of the image there is a half (4.2, Linux 6.18).
    """
    told = f"{host}: {command.what} takes longer than {LONG:g} s; to kill it may end the process"
    waiting = Timer(LONG, say, ("waiting", told))
    waiting.daemon = True
    waiting.start()
    try:
        done = host.run(
            *command.words, environment=command.environment, seconds=None, ok=None,
            otherwise=otherwise,
        )  # fmt: skip
    finally:
        waiting.cancel()
    if done.exit:
        said = (host.run("cat", *command.logs, ok=None).stdout + done.stderr).splitlines()
        words = [f"{host}: {command.what}: {first_error(said)}"]
        words += [line for line in said if otherwise and line.startswith("natkeep: ")]
        raise HostError("; ".join(words))


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

    @property
    def log(self) -> str:
        """CRIU's log of the dump."""
        return f"{self.dumped}/dump.log"

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
        return _FINISHED in source.run("cat", self.log, ok=None).stdout

    def find_lock(self, source: Host) -> str:
        """The table there by which CRIU locked what was dumped; "" where it is gone, or not known.

        A CRIU that fails takes it away; one that is killed does not.
        """
        run_id = self._find_run_id(source)
        return run_id and source.find_lock(run_id, self.record.netns.get("source", ""))

    def release(self, source: Host) -> str:
        """Let a process go on whose CRIU was killed; the table that was removed, as above."""
        netns = self.record.netns.get("source", "")
        return source.release(self._find_run_id(source), netns, self.record.pid)

    def _find_run_id(self, source: Host) -> str:
        found = _RUN_ID.search(source.run("cat", self.log, ok=None).stdout)
        return found[1] if found else ""

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
