"""A host of a migration: verbs of natkeep and programs there, by a `natkeep serve` over ssh.

The user's own ssh is used, with its keys, configuration and known hosts; one connection a host is
shared by all that goes there (ControlMaster), so nothing is asked or agreed upon in a blackout.
Without ssh: the machine that this runs on.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from subprocess import DEVNULL, PIPE
from typing import IO, Any, NamedTuple

from natkeep import __version__
from natkeep.errors import NatkeepError, UnreachableError, UsageError
from natkeep.installed import find_program
from natkeep.migrate import PROTOCOL
from natkeep.plan.tuples import Address, parse_address

LOCAL = "local"
_CONNECT = 15  # s until ssh gives a host up
_ALIVE = 5  # s without an answer after which ssh asks whether it is there, three times


class Answer(NamedTuple):
    """What a verb or a program has answered."""

    exit: int
    stdout: str
    stderr: str

    def document(self) -> dict[str, Any]:
        """The JSON document on its stdout."""
        value = json.loads(self.stdout)
        if not isinstance(value, dict):
            raise NatkeepError("what a host answered is not a document")
        return value

    def reason(self) -> str:
        """Why it failed, in one line: what was said last but for hints, or first where one is."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("natkeep: ")] or lines
        hint = lines[-1] if len(lines) > 1 and lines[-1].startswith("(") else ""
        last = errors[-1].removeprefix("natkeep: ") if errors else f"exit {self.exit}"
        return f"{last} {hint}".strip()


class HostError(NatkeepError):
    """A host could not do what it was asked to."""


class Ssh(NamedTuple):
    """How hosts are reached: ssh's own words, and natkeep's name there."""

    words: tuple[str, ...] = ("ssh",)
    natkeep: tuple[str, ...] = ("natkeep",)
    controls: str = ""

    def line(self, target: str, words: Sequence[str]) -> list[str]:
        """The command that runs *words* at *target*."""
        if target == LOCAL:
            return [*words]
        return [
            *self.words, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT}",
            "-o", f"ServerAliveInterval={_ALIVE}", "-o", "ControlMaster=auto",
            "-o", f"ControlPath={self.controls}/%C", "-o", "ControlPersist=10",
            "--", target, shlex.join(words),
        ]  # fmt: skip


class Host:
    """One host, while a migration is under way; `connect` first.

    target: as ssh knows it, or `local`. role: for messages.
    """

    def __init__(self, target: str, role: str, ssh: Ssh, move_id: str) -> None:
        self.target, self.role, self.ssh, self.move_id = target, role, ssh, move_id
        self.hook = ""
        self._as_root: tuple[str, ...] = ()
        self._serve: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._turn = threading.Lock()

    def __str__(self) -> str:
        return f"this host ({self.role})" if self.target == LOCAL else self.target

    def connect(self) -> None:
        """Start `natkeep serve` there, anew; UnreachableError where that cannot be.

        After an interruption this comes first: what was asked before may still be answered.
        """
        # Not by `python -m`, which would take a natkeep of the working directory.
        here = [find_program("natkeep") or "natkeep"]
        own = here if self.target == LOCAL else self.ssh.natkeep
        line = self.ssh.line(self.target, [*own, "serve", self.move_id, "--stdio"])
        self.close()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - until close
        # A session of its own: Ctrl-C is for the controller, which then asks for the way back.
        self._serve = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            start_new_session=True, env=dict(os.environ),  # ssh's agent, its user's home
        )  # fmt: skip
        hello = self._read()
        if (hello.get("natkeep"), hello.get("protocol")) != (__version__, PROTOCOL):
            raise UsageError(
                f"{self} has natkeep {hello.get('natkeep')}, this is {__version__}",
                hint="the same version on all hosts",
            )
        self.hook = str(hello.get("hook", ""))
        if hello.get("sudo") and self.target != LOCAL:
            self._as_root = (*own, "serve", self.move_id, "--exec")

    def natkeep(self, *words: str, stdin: str = "", ok: Sequence[int] = (0,)) -> Answer:
        """A verb there; HostError with its own words unless it exits with one of *ok*."""
        return self._ask({"natkeep": words, "stdin": stdin}, f"natkeep {words[0]}", ok)

    def run(
        self, *words: str, environment: Mapping[str, str] | None = None,
        seconds: float | None = 60, ok: Sequence[int] | None = (0,), otherwise: Sequence[str] = (),
    ) -> Answer:  # fmt: skip
        """A program there, *seconds* at most (None: however long); ok None: however it exits.

        otherwise: a verb of natkeep that follows at once if it fails.
        """
        request = {
            "run": words, "environment": dict(environment or {}), "seconds": seconds,
            "otherwise": otherwise,
        }  # fmt: skip
        return self._ask(request, words[0], ok)

    def find_ssh_ends(self) -> tuple[Address, Address] | None:
        """The addresses of ssh's connection, ours first, as the host sees them; None: not told.

        Not by `natkeep serve`, which sudo may have started without ssh's environment.
        """
        if self.target == LOCAL:
            return None
        words = ("printenv", "SSH_CONNECTION")
        asking = self._start(*words, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL)
        told = asking.communicate()[0].decode(errors="replace").split()
        try:
            ours, _, theirs, _ = (word.partition("%")[0] for word in told)
            return parse_address(ours), parse_address(theirs)
        except ValueError:
            return None  # as sshd says UNKNOWN of what is no socket

    def digest(self, directory: str) -> str:
        """What is in *directory* there, as one number."""
        return self._ask({"digest": directory}, "reading the image", (0,)).stdout

    def find_lock(self, run_id: str, netns: str) -> str:
        """The table by which CRIU's dump *run_id* locks at *netns* ("": natkeep's), "" for none."""
        request = {"lock": "find", "run_id": run_id, "netns": netns}
        return self._ask(request, "CRIU's lock", (0,)).stdout

    def release(self, run_id: str, netns: str, pid: int) -> str:
        """Let process *pid* go on, whose CRIU was killed; the table that was removed, as above."""
        request = {"lock": "release", "run_id": run_id, "netns": netns, "pid": pid}
        return self._ask(request, "CRIU's lock", (0,)).stdout

    def start(self, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
        """A program there whose standard streams are ours, with the rights that natkeep has."""
        return self._start(*self._as_root, *words, **streams)

    def _start(self, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
        """The same with the rights of ssh's user."""
        line = self.ssh.line(self.target, words)
        return subprocess.Popen(line, start_new_session=True, env=dict(os.environ), **streams)

    def close(self) -> None:
        """End `natkeep serve` there; what it does just now goes on to its end."""
        if self._serve is not None:
            for pipe in (self._serve.stdin, self._serve.stdout):
                assert pipe is not None
                with suppress(OSError):  # it is gone, and what was not written with it
                    pipe.close()
            if self.target != LOCAL:  # it is ssh: what runs there goes on without it
                self._serve.terminate()
                self._serve.wait()
        if self._errors is not None:
            self._errors.close()
        self._serve = self._errors = None

    def _ask(self, request: dict[str, Any], what: str, ok: Sequence[int] | None) -> Answer:
        with self._turn:
            if self._serve is None:
                raise UnreachableError(f"{self} is not connected")
            assert self._serve.stdin is not None
            try:
                self._serve.stdin.write(json.dumps(request).encode() + b"\n")
                self._serve.stdin.flush()
                got = self._read()
            except OSError as error:
                raise self._lost() from error
        answer = Answer(int(got["exit"]), str(got["stdout"]), str(got["stderr"]))
        if ok is not None and answer.exit not in ok:
            raise HostError(f"{self}: {what}: {answer.reason()}")
        return answer

    def _read(self) -> dict[str, Any]:
        assert self._serve is not None
        assert self._serve.stdout is not None
        line = self._serve.stdout.readline()
        if not line.endswith(b"\n"):
            raise self._lost()
        value = json.loads(line)
        assert isinstance(value, dict)
        return value

    def _lost(self) -> UnreachableError:
        assert self._errors is not None
        self._errors.seek(0)
        said = self._errors.read().decode(errors="backslashreplace").strip().splitlines()
        why = said[-1] if said else "the connection has ended"
        return UnreachableError(f"{self} cannot be reached: {why}", hint=_cure(why))


def read_move(host: Host, move_id: str) -> dict[str, Any] | None:
    """What `status` tells of the move at *host*; None where it knows none of that id."""
    for move in host.natkeep("status", "--json").document()["moves"]:
        if move["id"] == move_id:
            found: dict[str, Any] = move
            return found
    return None


def knows(host: Host, move_id: str) -> bool:
    """Whether *host* has a move of that id."""
    return read_move(host, move_id) is not None


def read_start(host: Host, pid: int) -> int:
    """Clock ticks after boot at which *pid* began there (proc(5)); 0 where there is none.

    One that has ended, and whose parent has not waited for it yet, is none.
    """
    answer = host.run("cat", f"/proc/{pid}/stat", ok=None)
    if answer.exit:
        return 0
    try:
        state, *others = answer.stdout.rpartition(")")[2].split()
        return 0 if state in "ZX" else int(others[18])
    except (LookupError, ValueError):
        raise NatkeepError(f"{host}: /proc/{pid}/stat is not as expected") from None


_LOOKS = ("cat", "find", "touch", "rm", "printenv")
"""Programs by which a migration only looks at a host, or leaves nothing there."""


class DryRun(Host):
    """A host of which is only said what it would be asked to do.

    sockets: what a reading of the image would tell.
    """

    def __init__(self, host: Host, say: Callable[[str, str], None], sockets: str) -> None:
        super().__init__(host.target, host.role, host.ssh, host.move_id)
        self.hook, self._say, self._sockets = host.hook, say, sockets

    def natkeep(self, *words: str, stdin: str = "", ok: Sequence[int] = (0,)) -> Answer:
        if words[0] == "status":
            return Answer(0, '{"moves": []}', "")
        self._say("would", f"{self}: {shlex.join(('natkeep', *words))}")
        return Answer(0, self._sockets, "")

    def run(
        self, *words: str, environment: Mapping[str, str] | None = None,
        seconds: float | None = 60, ok: Sequence[int] | None = (0,), otherwise: Sequence[str] = (),
    ) -> Answer:  # fmt: skip
        if words[0] == "test":
            return Answer(1, "", "")  # so the image would have to be copied
        if words[0] not in _LOOKS:
            told = [f"{name}={value}" for name, value in (environment or {}).items()]
            self._say("would", f"{self}: {shlex.join((*told, *words))}")
        return Answer(0, "", "")

    def digest(self, directory: str) -> str:
        return ""

    def start(self, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
        self._say("would", f"{self}: {shlex.join(words)}")
        return subprocess.Popen(["true"], start_new_session=True, env={}, **streams)


def _cure(why: str) -> str:
    if "not found" in why:
        return "natkeep there is to be in PATH, or --natkeep PATH"
    if "Permission denied" in why:
        return "a key that ssh offers without asking: ssh-agent, or ~/.ssh/config"
    return "does `ssh HOST true` work?"


def make_controls() -> str:
    """A directory for ssh's sockets, which only we may enter; its path is short."""
    run = "/run" if os.access("/run", os.W_OK) else None
    return tempfile.mkdtemp(prefix="natkeep-", dir=run)
