"""One lab host: a namespace triple with its own init, and the programs in it.

Init is `cat` reading a pipe from the lab: when the lab dies in any way, the pipe ends, init
with it, and so every process of the host. It ignores SIGCHLD, which makes the kernel reap
orphans by itself.

Rule: programs are entered with nsenter, and their descriptors are opened inside the host: CRIU
cannot dump one that belongs to the mount namespace outside, not even /dev/null.
This file must never signal a process other than those of the host.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from natkeep.errors import NatkeepError
from natkeep.lab.time_scale import scaled

NAMES = Path("/run/netns")
_LAST_PID = "/proc/sys/kernel/ns_last_pid"


class LabError(NatkeepError):
    """The lab itself is broken (not natkeep, not the connection): no verdict can be given."""


class Program:
    """A program that was started in a host; `pid` is its pid in the host's own namespace."""

    def __init__(self, process: subprocess.Popen[bytes], pid: int, log: Path) -> None:
        self.process, self.pid, self.log = process, pid, log


class Host:
    """One namespace triple with its init; made by Topology only."""

    def __init__(self, role: str, name: str, directory: Path) -> None:
        self.role, self.name, self.directory = role, name, directory
        self._init: subprocess.Popen[bytes] | None = None
        self.init_pid = 0

    def boot(self, script: str, *, first_pid: int = 0) -> None:
        """Start the host's init, which first runs *script*; `await_boot` waits for it.

        Programs get pids from *first_pid* on: those that move must be free at the other end.
        """
        setup = (
            "set -e; read pid rest </proc/self/stat; mount -t proc proc /proc\n"
            f"{script}\n"
            + (f"echo {first_pid - 1} >{_LAST_PID}\n" if first_pid else "")
            + "echo $pid; exec env --ignore-signal=CHLD cat"
        )
        self._init = subprocess.Popen(
            ["nsenter", f"--net={NAMES / self.name}", "unshare", "--pid", "--mount", "--fork",
             "--propagation", "private", "sh", "-c", setup],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,  # an interrupt from the keyboard is for the lab alone
        )  # fmt: skip

    def await_boot(self) -> None:
        """Wait until init runs; LabError with what its script said when it does not."""
        assert self._init is not None
        assert self._init.stdout is not None
        assert self._init.stderr is not None
        line = self._init.stdout.readline()
        if not line.strip().isdigit():
            self._init.wait(scaled(5))
            raise LabError(f"{self.role}: {self._init.stderr.read().decode().strip()}")
        self.init_pid = int(line)

    def shut(self) -> None:
        """End init, and with it every process of the host."""
        if self._init is None:
            return
        for pipe in (self._init.stdin, self._init.stdout, self._init.stderr):
            if pipe:
                pipe.close()
        try:
            self._init.wait(scaled(5))
        except subprocess.TimeoutExpired:
            # unshare forwards nothing: init itself has to be killed, by its pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init_pid or self._init.pid, 9)
            self._init.wait(scaled(5))

    def command(self, *argv: str, net_only: bool = False) -> list[str]:
        """*argv*, made to run in this host (or only in its network namespace)."""
        flags = ["--net"] if net_only else ["--net", "--pid", "--mount"]
        return ["nsenter", "--target", str(self.init_pid), *flags, "--", *argv]

    def run(
        self, *argv: str, text_in: str = "", check: bool = True, timeout: float = 20,
        net_only: bool = False, env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run *argv* in the host to its end, *timeout* s at most; LabError when it fails."""
        done = subprocess.run(
            self.command(*argv, net_only=net_only),
            input=text_in, capture_output=True, text=True, timeout=scaled(timeout), env=env,
        )  # fmt: skip
        if check and done.returncode:
            words = (done.stderr or done.stdout).strip()
            raise LabError(f"{self.role}: {' '.join(argv)} exited {done.returncode}: {words}")
        return done

    def start(self, name: str, *argv: str, env: dict[str, str] | None = None) -> Program:
        """Start *argv* as a session of its own in the host and leave it running."""
        log, pidfile = self.directory / f"{name}.log", self.directory / f"{name}.pid"
        pidfile.unlink(missing_ok=True)
        log.touch()  # there before the program, for those that read its output
        shell = (
            'echo $$ >"$1.new"; mv "$1.new" "$1"; log=$2; shift 2; '
            'exec "$@" </dev/null >"$log" 2>&1'
        )
        process = subprocess.Popen(
            self.command("setsid", "sh", "-c", shell, "sh", str(pidfile), str(log), *argv),
            stdin=subprocess.DEVNULL, env=env,
        )  # fmt: skip
        await_true(pidfile.exists, f"{self.role}: {argv[0]} to start")
        return Program(process, int(pidfile.read_text()), log)

    def proc(self, pid: int) -> Path:
        """/proc of *pid* of this host's own pid namespace, as it is seen outside."""
        return Path(f"/proc/{self.init_pid}/root/proc/{pid}")

    def alive(self, pid: int) -> bool:
        """Whether *pid* of this host's own pid namespace exists."""
        return self.proc(pid).exists()

    def kill(self, pid: int, signal: int = 9) -> None:
        """Signal *pid* of this host's own pid namespace; gone already is fine."""
        self.run("kill", f"-{signal}", str(pid), check=False)

    def nft(self, text: str) -> None:
        """Load an nft script into the host."""
        self.run("nft", "-f", "-", text_in=text)


def await_true(ready: Callable[[], object], what: str, *, seconds: float = 5) -> None:
    """Return as soon as ready() is true; LabError at the deadline."""
    deadline = time.monotonic() + scaled(seconds)
    while not ready():
        if time.monotonic() > deadline:
            raise LabError(f"waited {scaled(seconds):g} s in vain for {what}")
        time.sleep(0.002)  # a look every 2 ms, not a wait for luck: the deadline decides


def write_script(path: Path, text: str) -> Path:
    """A shell script that can be run."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path
