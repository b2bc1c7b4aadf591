"""NATKEEP_READY: the hook waits for the gateways, where NEW is known only at the restore.

    NATKEEP_TELL=PATH    when the destination is prepared and its gate closed, the hook puts a file
                         there, whole or not at all, in the form that `--connections` reads:

                             # natkeep ID OLD=NEW[,…]
                             LOCAL PEER
                             udp LOCAL PEER
                             …

    NATKEEP_READY=PATH   a FIFO, or a file that comes into being; what prepares the gateways writes
                         the line `ready ID` there
    NATKEEP_WAIT=SECONDS how long that is waited for, 10 if not given

    NATKEEP_AGENT=PATH   in the place of both: the socket of this node's agent, which is told NEW
                         and answers when the gateways of its order are ready (agent_socket.py)

The wait is where no socket exists yet: once CRIU has them it sends, unsent data even before
`post-restore`, and what leaves as NEW before the gateways translate is reset by the peers. The line
names the ID, which is another one for each CRIU, so that an answer to an earlier question is none.

Rule: a directory or file that others may write is refused, before anything is prepared. A time-out
changes nothing but that the file of NATKEEP_TELL goes: the destination's gate stays closed.
"""

from __future__ import annotations

import os
import re
import select
import stat
import time
from collections.abc import Mapping
from contextlib import suppress

from natkeep.checkpoint.listing import write_listing
from natkeep.errors import NatkeepError, RefusedError, UnreachableError, UsageError
from natkeep.plan.move import Move
from natkeep.plan.tuples import Connections
from natkeep.state.files import replace_file
from natkeep.values import dataclass

SECONDS = 10.0
"""How long the gateways are waited for where NATKEEP_WAIT does not say."""

_MOST_SECONDS = 3600.0
_HARMLESS = "nothing was sent, and the gate stays closed: the image can be restored again"
_LOOK_EVERY = 0.005  # s, for a file
_LINES = 4096  # octets of an answer that are looked at
_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@dataclass(frozen=True, slots=True)
class Readiness:
    """Where the gateways' readiness is told, where it is asked for ("": nowhere), and how long."""

    ready: str
    tell: str
    seconds: float

    def wait(self, move: Move, connections: Connections) -> None:
        """Ask for gateways of *move* and return when they are ready; NatkeepError if they are not.

        connections: those of the image at an OLD of the move; the move has its sockets of UDP.
        """
        wanted, deadline = f"ready {move.id}", time.monotonic() + self.seconds
        fifo = _open_fifo(self.ready)  # before the question, so that no answer is missed
        said = b""
        try:
            if self.tell:
                maps = ",".join(map(str, move.maps))
                lines = write_listing(connections, move.udp, move.udp_servers)
                _tell(self.tell, f"# natkeep {move.id} {maps}\n{lines}")
            while (left := deadline - time.monotonic()) > 0:
                if fifo is None:
                    said = _read(self.ready)
                else:
                    said = (said + _read_fifo(fifo, left))[-_LINES:]
                if wanted in said.decode("ascii", "replace").splitlines():
                    return
                if fifo is None:
                    time.sleep(min(_LOOK_EVERY, left))
        finally:
            if fifo is not None:
                os.close(fifo)
        if self.tell:
            with suppress(OSError):
                os.unlink(self.tell)
        last = said.decode("ascii", "replace").strip().rpartition("\n")[2]
        raise NatkeepError(
            f"waited {self.seconds:g} s for the line {wanted!r} in {self.ready}, which "
            f"{f'says {last!r}' if last else 'said nothing'}: the gateways are not ready",
            hint=_HARMLESS,
        )


@dataclass(frozen=True, slots=True)
class AgentReadiness:
    """The socket of the agent that knows the gateways, and how long it is waited for."""

    agent: str
    seconds: float

    def wait(self, move: Move, connections: Connections) -> None:
        """Tell NEW and return when the gateways are ready; NatkeepError if they are not.

        connections: not needed, the order has them.
        """
        from natkeep.agent_socket import ask_ready  # late: other restores wait for a file

        news = (str(map_.new_end) for map_ in move.maps)
        try:
            lacking = ask_ready(self.agent, move.id, news, self.seconds)
        except UnreachableError as error:
            raise UnreachableError(str(error), hint=_HARMLESS) from None
        if lacking:
            raise NatkeepError(
                f"the agent at {self.agent} has not got the gateways ready: {lacking}",
                hint=_HARMLESS,
            )


def read_readiness(environment: Mapping[str, str]) -> Readiness | AgentReadiness | None:
    """What is to be waited for, None where nothing is; UsageError, RefusedError for bad orders."""
    ready, tell, wait, agent = (
        environment.get(f"NATKEEP_{name}", "") for name in ("READY", "TELL", "WAIT", "AGENT")
    )
    if agent:
        if ready or tell:
            raise UsageError("NATKEEP_AGENT and NATKEEP_READY or _TELL contradict each other")
        _demand_place("NATKEEP_AGENT", agent, {stat.S_IFSOCK}, "no socket")
        return AgentReadiness(agent, _parse_seconds(wait) if wait else SECONDS)
    if not ready:
        for name, value in (("NATKEEP_TELL", tell), ("NATKEEP_WAIT", wait)):
            if value:
                raise UsageError(
                    f"{name} without NATKEEP_READY: there is nothing to wait for",
                    hint="NATKEEP_READY=PATH, a file or FIFO that will say `ready ID`",
                )
        return None
    seconds = _parse_seconds(wait) if wait else SECONDS
    if tell and os.path.realpath(tell) == os.path.realpath(ready):
        raise UsageError("NATKEEP_READY and NATKEEP_TELL name the same file")
    _demand_place("NATKEEP_READY", ready, {stat.S_IFREG, stat.S_IFIFO}, "neither a file nor a FIFO")
    if tell:
        _demand_place("NATKEEP_TELL", tell, {stat.S_IFREG}, "no file")
    return Readiness(ready, tell, seconds)


def _parse_seconds(text: str) -> float:
    seconds = float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text, re.ASCII) else 0.0
    if not 0 < seconds <= _MOST_SECONDS:
        raise UsageError(
            f"NATKEEP_WAIT: {text!r} is no number of seconds up to {_MOST_SECONDS:g}",
            hint=f"without it {SECONDS:g}",
        )
    return seconds


def _demand_place(name: str, path: str, kinds: set[int], wrong: str) -> None:
    """UsageError or RefusedError unless *path* is, or can come into being, where only we write."""
    if not os.path.isabs(path) or "\0" in path:
        raise UsageError(f"{name}: {path!r} is no absolute path")
    directory = os.path.dirname(path)
    try:
        _demand_own(f"{name}: {directory}", os.stat(directory))
    except OSError as error:
        raise UsageError(f"{name}: {directory}: {error.strerror}") from None
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{name}: {path}: {error.strerror}") from None
    if stat.S_IFMT(status.st_mode) not in kinds:
        raise UsageError(f"{name}: {path} is {wrong}")
    _demand_own(f"{name}: {path}", status)


def _demand_own(name: str, status: os.stat_result) -> None:
    """A program that can write there would say when the gateways are ready, or which they are."""
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise RefusedError(f"{name} can be written by others", hint="chown it to root; chmod go-w")


def _open_fifo(path: str) -> int | None:
    """A handle of the FIFO at *path*; None where there is none, but perhaps a file."""
    with suppress(FileNotFoundError):
        if stat.S_ISFIFO(os.lstat(path).st_mode):
            # For writing, too: it has no end then when the one that writes has left.
            return os.open(path, os.O_RDWR | _SAFE)
    return None


def _read_fifo(fifo: int, seconds: float) -> bytes:
    poller = select.poll()
    poller.register(fifo, select.POLLIN)
    return os.read(fifo, _LINES) if poller.poll(seconds * 1000) else b""


def _read(path: str) -> bytes:
    """What the file says so far, nothing where there is none."""
    try:
        file = os.open(path, os.O_RDONLY | _SAFE)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RefusedError(f"NATKEEP_READY: {path}: {error.strerror}") from None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise RefusedError(f"NATKEEP_READY: {path} was no FIFO, and is no file")
        _demand_own(f"NATKEEP_READY: {path}", status)
        return os.read(file, _LINES)
    finally:
        os.close(file)


def _tell(path: str, text: str) -> None:
    try:
        replace_file(path, text.encode("ascii"), durable=False)
    except OSError as error:
        raise RefusedError(f"NATKEEP_TELL: {path}: {error.strerror}") from None
