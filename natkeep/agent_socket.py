"""The socket of this node's agent, by which a restore asks whether its gateways are ready.

A line of JSON each way, and a connection for each:

    {"verb": "ready", "id": "criu-52-34d2c", "new": "10.3.0.20", "wait_s": 10, "staged": false}
    {"ok": true, "id": "web"}
    {"ok": false, "exit": 1, "message": "..."}

id: what was prepared here; new: its NEW, or several with commas between. The answer comes when the
gateways are ready (fleet/ready.py), or after wait_s seconds with what is lacking. staged: of an
order that has no gateways yet the destination will do; a restore may not begin by that.

Rule: both ends are root's, and look: the socket is in a directory that others cannot write to, and
the kernel says who is at the other end. A path crosses network namespaces, so no address does.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from natkeep.errors import RefusedError, UnreachableError, UsageError

NAME = "agent.sock"
LINE = 4096  # octets at most
_REST = 0.05  # s until an agent that is not there is asked again
_MARGIN = 2.0  # s that the agent has less, so that its answer says what is lacking


@contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    """A socket at *path*, in the place of one that an agent has left; RefusedError if it lives."""
    with _listen(path) as found:
        try:
            yield found
        finally:
            with suppress(OSError):
                found.shutdown(socket.SHUT_RDWR)  # what accepts ends
                os.unlink(path)


def _listen(path: str) -> socket.socket:
    name = os.path.basename(path)
    with _home(path) as (home, address), socket.socket(socket.AF_UNIX) as earlier:
        status = os.fstat(home)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
            raise RefusedError(f"{os.path.dirname(path)} can be written by others")
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(os.stat(name, dir_fd=home, follow_symlinks=False).st_mode):
                raise RefusedError(f"{path} is no socket")
            with suppress(ConnectionRefusedError):
                earlier.connect(address)
                raise RefusedError(f"another agent listens at {path}")
            os.unlink(name, dir_fd=home)
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(address)
        os.chmod(name, 0o600, dir_fd=home)
        listening.listen(64)
        return listening


def ask(path: str, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The agent's answer to *request*, which it has *seconds* for; UnreachableError without.

    An agent that is not there, or ends meanwhile, is asked again.
    """
    until, why = time.monotonic() + seconds, "no time was given"
    while (left := until - time.monotonic()) > 0:
        try:
            return _ask(path, {**request, "wait_s": max(left - _MARGIN, left / 2)}, left)
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error)
            time.sleep(max(min(_REST, until - time.monotonic()), 0))
    raise UnreachableError(f"no agent answers at {path} within {seconds:g} s: {why}")


def ask_ready(
    path: str, move_id: str, news: Iterable[str], seconds: float, *, staged: bool = False
) -> str:
    """Why the gateways of what was prepared here as *move_id* are not ready; empty when they are.

    news: its NEWs, with ports if they have some. staged: see above. UnreachableError as of `ask`.
    """
    request = {"verb": "ready", "id": move_id, "new": ",".join(news), "staged": staged}
    answer = ask(path, request, seconds)
    return "" if answer.get("ok") is True else str(answer.get("message", answer))


def is_roots(link: socket.socket) -> bool:
    """Whether the other end is root's, or ours."""
    own = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return struct.unpack("3i", own)[1] in (0, os.geteuid())


def read_line(link: socket.socket) -> dict[str, Any]:
    """The line that the other end sends; ValueError where it is none."""
    octets = b""
    while not octets.endswith(b"\n") and len(octets) < LINE:
        piece = link.recv(LINE)
        if not piece:
            break
        octets += piece
    found = json.loads(octets) if octets.endswith(b"\n") else None
    if not isinstance(found, dict):
        raise ValueError("what it says is no line of JSON")
    return found


def _ask(path: str, request: dict[str, Any], seconds: float) -> dict[str, Any]:
    with _home(path) as (_, address), socket.socket(socket.AF_UNIX) as link:
        link.settimeout(seconds)
        link.connect(address)
        if not is_roots(link):
            raise RefusedError(f"who listens at {path} is not root")
        link.sendall(json.dumps(request).encode() + b"\n")
        return read_line(link)


@contextmanager
def _home(path: str) -> Iterator[tuple[int, str]]:
    """The directory of *path*, and the socket's address: short, however long the path is."""
    if not os.path.isabs(path) or "\0" in path:
        raise UsageError(f"{path!r} is no absolute path")
    home = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield home, f"/proc/self/fd/{home}/{os.path.basename(path)}"
    finally:
        os.close(home)
