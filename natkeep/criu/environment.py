"""Reads who gave which orders, and what CRIU says of where it is.

Orders come from the environment (NATKEEP_ID, or NATKEEP_MAP with NATKEEP_PEER_MAP, NATKEEP_VIA,
NATKEEP_MODE, NATKEEP_UNKEPT and NATKEEP_UDP), else from the table [hook] of the operator's file,
and never from the image. CRIU's own words (CRTOOLS_*) only say which image and which tree: they are
looked at before they are believed.

Rule: nothing is done here. What is contradictory is an error (exit 2), never a guess.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from natkeep.errors import UsageError
from natkeep.plan.move import Datagrams, Fate, Mode, Site
from natkeep.plan.roles import Role
from natkeep.values import dataclass, replace

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from natkeep.criu.readiness import AgentReadiness, Readiness

_WAITS = ("READY", "TELL", "WAIT", "AGENT")
ANY = "*"
"""In the place of an id."""
_INITIAL_PID_NAMESPACE = 0xEFFFFFFC  # the kernel's PROC_PID_INIT_INO, the same on each machine


@dataclass(frozen=True, slots=True)
class Orders:
    """Open the prepared move *id*, or prepare one of *maps* and open that.

    id: ANY opens what was prepared for the tree's namespace (standing_order.py).

    standing: they are for whatever is restored on this machine, not for this restore alone.
    readiness: what is waited for between the two. peer_maps, vias: as --peer-map and --via.
    """

    id: str
    maps: tuple[str, ...]
    mode: str
    state_dir: str | None
    standing: bool = False
    unkept: str = ""
    udp: str = ""
    readiness: Readiness | AgentReadiness | None = None
    peer_maps: tuple[str, ...] = ()
    vias: tuple[str, ...] = ()


def read_orders(environment: Mapping[str, str]) -> Orders | None:
    """What is to be done, None where there are no orders."""
    orders = _read_orders(environment)
    named = any(environment.get(f"NATKEEP_{name}") for name in _WAITS)
    if orders is None or not named:
        return orders
    from natkeep.criu.readiness import read_readiness  # only here: a restore seldom waits

    if not orders.maps:
        raise UsageError(
            "NATKEEP_READY, _TELL, _WAIT and _AGENT are for NATKEEP_MAP",
            hint=f"prepare the gateways of {orders.id} before the restore",
        )
    return replace(orders, readiness=read_readiness(environment))


def _read_orders(environment: Mapping[str, str]) -> Orders | None:
    move_id = environment.get("NATKEEP_ID", "")
    mode, state_dir = environment.get("NATKEEP_MODE", ""), environment.get("NATKEEP_STATE_DIR")
    if mode and mode not in tuple(Mode):
        raise UsageError(f"NATKEEP_MODE: {mode!r} is none of {', '.join(Mode)}")
    udp = read_datagrams(environment)
    unkept = environment.get("NATKEEP_UNKEPT", "")
    if unkept and unkept not in tuple(Fate):
        raise UsageError(f"NATKEEP_UNKEPT: {unkept!r} is none of {', '.join(Fate)}")
    maps, peer_maps, vias = (
        _read_list(environment, name) for name in ("NATKEEP_MAP", "NATKEEP_PEER_MAP", "NATKEEP_VIA")
    )
    if move_id or maps:
        _refuse_both(move_id, maps, "NATKEEP_ID", "NATKEEP_MAP")
        for name, more in ("NATKEEP_PEER_MAP", peer_maps), ("NATKEEP_VIA", vias):
            if more and move_id:
                raise UsageError(f"{name} is for NATKEEP_MAP", hint=f"{move_id} was prepared by it")
        return Orders(
            move_id, maps, mode, state_dir, unkept=unkept, udp=udp,
            peer_maps=peer_maps, vias=vias,
        )  # fmt: skip
    from natkeep import policy  # only here: a move that is prepared was authorised before

    hook = policy.read_policy().hook
    _refuse_both(hook.id, hook.map, f"{policy.PATH}: hook.id", "hook.map")
    if not (hook.id or hook.map):
        return None
    return Orders(
        hook.id, hook.map, mode or hook.mode, state_dir or hook.state_dir,
        standing=True, unkept=unkept or hook.unkept, udp=udp or hook.udp,
        peer_maps=peer_maps or hook.peer_map, vias=vias or hook.via,
    )  # fmt: skip


def _read_list(environment: Mapping[str, str], name: str) -> tuple[str, ...]:
    text = environment.get(name, "")
    return tuple(text.split(",")) if text else ()


def read_datagrams(environment: Mapping[str, str]) -> str:
    """What NATKEEP_UDP says, "" where it says nothing."""
    word = environment.get("NATKEEP_UDP", "")
    if word and word not in tuple(Datagrams):
        raise UsageError(f"NATKEEP_UDP: {word!r} is none of {', '.join(Datagrams)}")
    return word


def _refuse_both(move_id: object, maps: object, first: str, second: str) -> None:
    if move_id and maps:
        raise UsageError(
            f"{first} and {second} contradict each other",
            hint="the one opens a move that is prepared, the other prepares one",
        )


@dataclass(frozen=True, slots=True)
class Call:
    """A point at which CRIU calls: which of them, the restored tree's root, the open images.

    criu: pid of the CRIU that calls, where its image directory tells.
    """

    action: str
    tree: int | None
    images: int | None
    criu: int | None

    def tree_site(self) -> Site:
        """Where the restored tree is."""
        return Site(Role.DESTINATION, "" if self.tree is None else f"pid:{self.tree}")

    def demand_images(self) -> int:
        """The open image directory; UsageError where CRIU did not name one."""
        if self.images is None:
            raise UsageError(
                "CRTOOLS_IMAGE_DIR is not set", hint="natkeep-hook is for CRIU to call"
            )
        return self.images


def read_call(environment: Mapping[str, str]) -> Call:
    """What CRIU says; the image directory is open from here on, and read by its handle only."""
    action, tree = environment["CRTOOLS_SCRIPT_ACTION"], environment.get("CRTOOLS_INIT_PID", "")
    if tree and not _is_pid(tree):
        raise UsageError(f"CRTOOLS_INIT_PID: {tree!r} is not a pid")
    path = environment.get("CRTOOLS_IMAGE_DIR", "")
    if not path:
        return Call(action, int(tree) if tree else None, None, None)
    try:
        images = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"CRTOOLS_IMAGE_DIR: cannot open {path!r}: {reason}") from None
    parts = path.split("/")
    by_criu = len(parts) == 5 and (*parts[:2], parts[3]) == ("", "proc", "fd") and _is_pid(parts[2])
    return Call(action, int(tree) if tree else None, images, int(parts[2]) if by_criu else None)


def _is_pid(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < len(text) < 11


# ---- moves that the hook prepares by itself ----------------------------------------------------


def own_id(criu: int | None) -> str:
    """The id of what is prepared for one CRIU: `criu-PID-START`, where START is hexadecimal.

    In a pid namespace of its own the namespace's number follows: pids are told apart there only.
    """
    start = None if criu is None else _start_of(criu)
    if start is None:
        raise UsageError(
            "CRTOOLS_IMAGE_DIR does not name the CRIU that calls",
            hint="natkeep-hook is for CRIU to call",
        )
    return f"criu-{criu}-{start:x}{_suffix(criu)}"


def is_abandoned(move_id: str, criu: int | None = None) -> bool:
    """Whether *move_id* was prepared for a CRIU that is no more, in the pid namespace of *criu*.

    criu: the one that calls; None where we are called by none, and our own namespace is meant.
    """
    name, _, rest = move_id.partition("-")
    suffix = _suffix(criu)
    pid, _, start = rest.removesuffix(suffix).partition("-")
    if name != "criu" or not rest.endswith(suffix) or not _is_pid(pid) or "-" in start:
        return False
    try:
        return _start_of(int(pid)) != int(start, 16)
    except ValueError:
        return False


def _start_of(pid: int) -> int | None:
    """When the process started, in ticks since boot; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name, in parentheses, may hold anything: what follows the last one counts.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def _suffix(criu: int | None) -> str:
    # Where CRIU restores into a pid namespace that is there, its script is in that one already from
    # `setup-namespaces` on (4.2.1), but pids are still told by the /proc of CRIU's.
    inode = os.stat(f"/proc/{criu or 'self'}/ns/pid").st_ino
    return "" if inode == _INITIAL_PID_NAMESPACE else f"-{inode:x}"


def joined_netns(criu: int | None) -> str:
    """The network namespace that CRIU was told to restore into: `criu restore --join-ns net:…`.

    As a site's NETNS is written; empty where there is none. CRIU calls no script between
    `pre-restore` and `post-restore` then, and its own words tell it nowhere else.
    """
    try:
        with open(f"/proc/{criu}/cmdline", "rb") as file:
            words = [os.fsdecode(word) for word in file.read().split(b"\0")]
    except OSError:
        return ""
    for value in _values(words, "-J", "--join-ns"):
        if value.startswith("net:"):
            target = value[4:]
            return f"pid:{target}" if _is_pid(target) else target
    return ""


def find_site(call: Call) -> Site | None:
    """Where the tree will be; None while its namespace does not exist."""
    if call.action != "pre-restore":
        return call.tree_site()
    from natkeep.checkpoint.images import has_own_netns  # the other actions need no image

    joined = joined_netns(call.criu)
    if not joined and has_own_netns(call.demand_images()):
        return None
    return Site(Role.DESTINATION, joined)


def _values(words: list[str], short: str, long: str) -> Iterator[str]:
    for at, word in enumerate(words):
        if word in (short, long):
            yield from words[at + 1 : at + 2]
        elif word.startswith(f"{long}="):
            yield word.partition("=")[2]
        elif word.startswith(short):
            yield word[2:]
