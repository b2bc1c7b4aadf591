"""What every engine of the lab offers: freeze the application at one host, restore it at another.

engines/criu.py is the real thing; engines/runc.py and engines/podman.py move a container with it;
pods/move.py a container in a pod;
engines/repair.py moves nothing but the sockets, by TCP_REPAIR, and works without CRIU. Each leaves
the host that the application left silent, since a host with the address but without the socket
answers with a reset.

Rule: an engine knows nothing of natkeep. When its sockets exist, and before they may send, it
opens the network by the `Opening` that it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from natkeep.errors import NatkeepError
from natkeep.lab.application import Application
from natkeep.lab.host import Host

SILENCE_TABLE = "lab_silence"
NO_DATAGRAMS = f"""\
add table inet {SILENCE_TABLE}
add chain inet {SILENCE_TABLE} into {{ type filter hook input priority -400; }}
add rule inet {SILENCE_TABLE} into meta l4proto udp drop
"""
"""Before a freeze: a host without the socket tells peers that the port is unreachable. What the
process has said goes out."""


class EngineError(NatkeepError):
    """An engine could not freeze or restore."""


@dataclass(frozen=True, slots=True)
class Frozen:
    """A frozen application: its directory on disk, and natkeep's options that name it."""

    directory: Path
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Opening:
    """How the network is opened when the sockets exist: CRIU calls a hook, others a function."""

    open: Callable[[], object]
    hook: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Moving:
    """The application that moves, as it is now: its command files, its role and its pid."""

    application: Application
    role: str
    pid: int
    connections: tuple[str, ...] = ()  # lines for natkeep's --connections
    udp: bool = False


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


class InHost:
    """The part of an engine whose application is a program of the host, and ends with it."""

    def start(self, host: Host, application: Application, line: Sequence[str]) -> int:
        return host.start(application.directory.name, *line).pid

    def close(self) -> None:
        pass


def errors_in(log: Path) -> str:
    """The last errors of a log of CRIU's, in one line."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return "; ".join([line for line in lines if "Error" in line][-5:])


def end_silence(host: Host) -> None:
    """Delete what keeps a host silent that an application left, now that one is back there.

    With CRIU that is the operator's part: it leaves its lock behind. Not before the network is
    open: a socket in repair sends, too, and the gateway still knows it elsewhere.
    """
    for table in host.run("nft", "list", "tables").stdout.split():
        if table == SILENCE_TABLE or table.startswith("CRIU-"):
            host.run("nft", "delete", "table", "inet", table)
