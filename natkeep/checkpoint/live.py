"""the reader of a living process: which sockets its tree has, before it is frozen.

    inodes = find_inodes(pid)          of all sockets that the tree's descriptors open
    make_checkpoint(found, inodes)     with what the kernel says of the sockets of its namespace

The tree is the process and all its descendants: what `criu dump --tree PID` would freeze. Until it
is frozen connections come and go, so what is read here is compared with the image later.

Rule: nothing is asked of the process itself, and nothing of it is held up. What another network
namespace than that of the process has is not found, and so not listed.
This file must never enter a namespace.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress

from natkeep.checkpoint import Checkpoint, Socket
from natkeep.checkpoint.judging import PROTOCOLS, STATES, find_reason, judge
from natkeep.errors import ImageError, UsageError
from natkeep.plan.tuples import Address, Endpoint
from natkeep.values import dataclass, replace

_SOCKET = re.compile(r"socket:\[([0-9]+)\]")
_RAW = 255
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD


@dataclass(frozen=True, slots=True)
class Found:
    """A socket as the kernel shows it: numbers of the protocol and of the TCP state, both ends.

    An end is None where there is no port. device: what it is bound to. unread: as Socket has it.
    """

    inode: int
    protocol: int
    state: int
    local: tuple[Address, int] | None
    peer: tuple[Address, int] | None
    device: str | None = None
    unread: int = 0


def parse_pid(text: str) -> int:
    """The pid in *text*; UsageError where it is none."""
    if not (text.isascii() and text.isdigit() and 0 < len(text) < 8 and int(text)):
        shown = text if len(text) < 40 else f"{text[:37]}..."
        raise UsageError(f"{shown!r} is not a pid", hint="a number, as pgrep prints it")
    return int(text)


def find_inodes(pid: int) -> frozenset[int]:
    """The inodes of the sockets of the tree below *pid*; ImageError where it cannot be read."""
    found: set[int] = set()
    for each in find_tree(pid):
        try:
            found |= _read_sockets(each)
        except (FileNotFoundError, ProcessLookupError):
            if each == pid:
                raise ImageError(f"process {pid} has ended") from None
        except OSError as error:
            raise ImageError(f"cannot read /proc/{each}/fd: {error.strerror}") from None
    return frozenset(found)


def find_tree(pid: int) -> frozenset[int]:
    """*pid* and its descendants; ImageError where there is nothing to dump."""
    stats = _read_stats()
    if pid not in stats:
        raise ImageError(f"there is no process {pid}")
    if int(stats[pid][6]) & _KERNEL_THREAD:
        raise ImageError(
            f"process {pid} is a thread of the kernel", hint="it has no descriptors to dump"
        )
    tree, more = {pid}, {pid}
    while more:
        more = {each for each, stat in stats.items() if int(stat[1]) in more} - tree
        tree |= more
    return frozenset(tree)


def _read_sockets(pid: int) -> set[int]:
    directory, found = f"/proc/{pid}/fd", set()
    for name in os.listdir(directory):
        try:
            match = _SOCKET.fullmatch(os.readlink(f"{directory}/{name}"))
        except FileNotFoundError:  # closed meanwhile
            continue
        if match:
            found.add(int(match[1]))
    return found


def _read_stats() -> dict[int, list[bytes]]:
    """The fields of /proc/PID/stat from the state on, of each process that we see."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{name}/stat", "rb") as f:
            # The name, in parentheses, may hold anything: what follows the last one counts.
            found[int(name)] = f.read().rpartition(b")")[2].split()
    return found


def make_checkpoint(found: Iterable[Found], inodes: frozenset[int], pid: int) -> Checkpoint:
    """The sockets among *found* that have one of *inodes*; ImageError if none is of TCP or UDP."""
    sockets = tuple(_make_socket(each) for each in found if each.inode in inodes)
    if not any(socket.protocol in ("tcp", "udp") for socket in sockets):
        raise ImageError(
            f"process {pid} has no TCP or UDP socket in its network namespace",
            hint="the root of the tree that will be dumped is meant, as for criu dump --tree",
        )
    return Checkpoint.of(sockets, live=True)


def _make_socket(found: Found) -> Socket:
    number = found.protocol
    protocol = "raw" if number == _RAW else PROTOCOLS.get(number, f"protocol {number}")
    local, peer = (end and Endpoint(*end) for end in (found.local, found.peer))
    state = STATES.get(found.state) if protocol == "tcp" else None
    try:
        socket = judge(protocol, state, local, peer, found.device, find_reason(local, peer))
    except ValueError as error:
        raise ImageError(f"a socket that is not understood: {error}") from None
    return replace(socket, unread=found.unread) if found.unread else socket
