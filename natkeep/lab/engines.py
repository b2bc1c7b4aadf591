"""the engines: what freezes the moving application at one host and restores it at another.

`criu` is the real thing, run inside the hosts; `runc` and `podman` (runc.py, podman.py) move a
container with it; `repair` moves nothing but the sockets, by TCP_REPAIR in traffic.py, and works
where there is no CRIU. All leave the host that was left silent: a killing dump keeps CRIU's own
network lock there, and for `repair` the lab drops the host's TCP, since a host with the address
but without the socket answers with a reset.

Rule: an engine knows nothing of natkeep. When its sockets exist, and before they may send, it
opens the network by what it was given as an `Opening`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from natkeep.errors import NatkeepError
from natkeep.lab.application import Application
from natkeep.lab.host import Host, await_true

CHECKOUT = Path(__file__).parents[2]

SILENCE = """\
add table inet lab_silence
add chain inet lab_silence into { type filter hook prerouting priority -400; }
add chain inet lab_silence out { type filter hook output priority -400; }
add rule inet lab_silence into meta l4proto tcp drop
add rule inet lab_silence out meta l4proto tcp drop
"""


class EngineError(NatkeepError):
    """An engine could not freeze or restore."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen application: where it lies on disk, and natkeep's options that say so."""

    directory: Path
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Opening:
    """How the network is opened when the sockets exist: CRIU calls a hook, others a function."""

    open: Callable[[], None]
    hook: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """What the lab asks of an engine."""

    name: str

    def start(self, host: Host, application: Application, line: Sequence[str]) -> int:
        """Start at *host*, by *line*, the application that will move; its pid there."""

    def freeze(self, host: Host, moving: Moving, into: Path) -> Frozen:
        """Freeze *moving* at *host*; afterwards it is gone there and the host is silent."""

    def restore(self, host: Host, moving: Moving, frozen: Frozen, opening: Opening) -> None:
        """Bring *moving* back at *host*, opening the network when its sockets exist."""

    def close(self) -> None:
        """End what would outlive the hosts."""


@dataclass(slots=True)
class Moving:
    """The application that moves, as it is now: its steering, its role and its pid."""

    application: Application
    role: str
    pid: int
    connections: tuple[str, ...] = ()  # lines for natkeep's --connections


class InHost:
    """What an engine has whose application is a program of the host, and ends with it."""

    def start(self, host: Host, application: Application, line: Sequence[str]) -> int:
        return host.start(application.directory.name, *line).pid

    def close(self) -> None:
        pass


class Criu(InHost):
    """`criu dump` and `criu restore`, in the host's own namespaces."""

    name = "criu"

    def __init__(self, binary: Path) -> None:
        self.binary = binary

    def freeze(self, host: Host, moving: Moving, into: Path) -> Frozen:
        into.mkdir()
        self._run(host, into, "dump", "--tree", str(moving.pid), "--network-lock", "nftables")
        return Frozen(into, ("--image", str(into)))

    def restore(self, host: Host, moving: Moving, frozen: Frozen, opening: Opening) -> None:
        script = ["--action-script", str(opening.hook)] if opening.hook else []
        environment = {**os.environ, **opening.environment}
        self._run(host, frozen.directory, "restore", "--restore-detached", *script, env=environment)
        if not opening.hook:
            opening.open()
        end_silence(host)

    def _run(
        self, host: Host, images: Path, verb: str, *options: str,
        env: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        log = images / f"{verb}.log"
        done = host.run(
            str(self.binary), verb, "--images-dir", str(images), "--tcp-established",
            "-v4", "--log-file", log.name, *options,
            check=False, env=dict(env) if env else None,
        )  # fmt: skip
        if done.returncode:
            said = errors_in(log) or done.stderr.strip()
            raise EngineError(f"criu {verb} exited {done.returncode}: {said}")


class Repair(InHost):
    """TCP_REPAIR in the application itself: the network state only."""

    name = "repair"

    def __init__(self, *, probe: bool = True) -> None:
        self.how = "probe" if probe else "silent"

    def freeze(self, host: Host, moving: Moving, into: Path) -> Frozen:
        into.mkdir()
        host.nft(SILENCE)
        moving.application.do({"freeze": str(into / "state.json")})
        # Killed in repair, a socket vanishes without FIN or RST.
        host.kill(moving.pid)
        await_true(lambda: not host.alive(moving.pid), "the frozen process to end")
        listing = into / "connections"
        listing.write_text("".join(f"{line}\n" for line in moving.connections))
        return Frozen(into, ("--connections", str(listing)))

    def restore(self, host: Host, moving: Moving, frozen: Frozen, opening: Opening) -> None:
        application = moving.application
        line = application.resume_line(frozen.directory / "state.json", role=moving.role)
        program = host.start(f"{moving.role}-resumed", *line)
        application.wait(
            lambda report: report["phase"] == "recreated" or program.process.poll() is not None,
            "re-created",
        )
        if program.process.poll() is not None:
            said = program.log.read_text().strip().splitlines() or ["no word"]
            raise EngineError(f"repair: the application ended with: {said[-1]}")
        moving.pid = program.pid
        opening.open()
        end_silence(host)
        application.go(self.how)
        application.wait(lambda report: report["phase"] == "running", "running again")


def errors_in(log: Path) -> str:
    """The last errors of a log of CRIU's, in one line."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "; ".join([line for line in lines if "Error" in line][-5:])


def end_silence(host: Host) -> None:
    """Take away what keeps a host silent that was left once, now that a process is back there.

    That is the operator's part with CRIU, which leaves its lock behind for ever. Not before the
    network is open: a socket in repair sends, too, and the gateway still knows it elsewhere.
    """
    listed = host.run("nft", "list", "tables").stdout.split()
    for table in listed:
        if table == "lab_silence" or table.startswith("CRIU-"):
            host.run("nft", "delete", "table", "inet", table)


def find_criu() -> Path | None:
    """A CRIU that works on this kernel, if there is one.

    NATKEEP_CRIU, or the one that scripts/get-criu fetched into the checkout, or the system's.
    """
    named = os.environ.get("NATKEEP_CRIU")
    system = shutil.which("criu")
    candidates = [named] if named else [str(CHECKOUT / ".lab/criu/criu"), system or ""]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK) and _works(candidate):
            return Path(candidate)
    return None


def _works(criu: str) -> bool:
    done = subprocess.run([criu, "check"], capture_output=True, timeout=20)
    return done.returncode == 0


def choose_engine(name: str = "auto", *, probe: bool = True) -> Engine:
    """The engine called *name*; `auto` is criu where it works, else repair."""
    if name == "repair":
        return Repair(probe=probe)
    criu = find_criu()
    if criu is not None:
        return _choose_with(name, criu)
    if name == "auto":
        return Repair(probe=probe)
    raise EngineError(
        "there is no CRIU that works on this kernel",
        hint="run `make demo` or scripts/get-criu once, or use --engine repair",
    )


def _choose_with(name: str, criu: Path) -> Engine:
    if name in ("auto", "criu"):
        return Criu(criu)
    for tool in dict.fromkeys((name, "runc")):
        if not shutil.which(tool):
            raise EngineError(f"there is no {tool}", hint=f"apt-get install {tool}")
    from natkeep.lab import podman, runc  # which import this file

    return runc.Runc(criu) if name == "runc" else podman.Podman(criu)
