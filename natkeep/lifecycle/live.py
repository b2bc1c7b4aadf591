"""the reading of a living process: its tree, and what the kernel says of the sockets there."""

from __future__ import annotations

from ipaddress import ip_address

from natkeep.checkpoint import TRANSLATED, Checkpoint
from natkeep.checkpoint.live import Found, find_inodes, make_checkpoint
from natkeep.errors import ImageError, RefusedError
from natkeep.kernel import sock_diag
from natkeep.kernel.interface import Kernel
from natkeep.kernel.netns import held
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.sockets import find_translated
from natkeep.plan.move import Site
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.roles import Role
from natkeep.plan.tuples import FourTuple
from natkeep.values import replace


def mark_translated(executor: Executor, pid: int, checkpoint: Checkpoint) -> Checkpoint:
    """*checkpoint*, which read_live has just read, where what the host translates is not kept."""
    home = Site(Role.SOURCE, f"pid:{pid}")
    found: dict[tuple[str, FourTuple | None], FourTuple] = {}
    for protocol, some in ((TCP, checkpoint.connections), (UDP, checkpoint.udp)):
        kept = [some.at(old) for old in {ip_address(end[:-2]) for end in some.local_ends()}]
        around = executor.kernel, executor.state, home
        for inner, outer in find_translated(*around, kept, protocol):
            found[protocol.name, inner] = outer
    if not found:
        return checkpoint
    return Checkpoint.of(
        tuple(
            replace(each, unkept=f"{TRANSLATED}{outer_} on the wire")
            if (outer_ := found.get((each.protocol, each.inbound())))
            else each
            for each in checkpoint.sockets
        ),
        live=True,
    )


def read_live(kernel: Kernel, pid: int, sites: tuple[Site, ...] = ()) -> Checkpoint:
    """The sockets of *pid* and its descendants, in its own network namespace.

    The process is held by a handle, so that it is the same from beginning to end; ImageError when
    it is not there, or ends meanwhile. RefusedError when it lives at one of *sites*: what is
    prepared there would cut it off.
    """
    home = Site(Role.SOURCE, f"pid:{pid}")
    try:
        with held(home.netns):
            inodes = find_inodes(pid)
            kernel.open_sites([home, *sites])
            for site in sites:
                if kernel.identity(site) == kernel.identity(home):
                    raise RefusedError(
                        f"{site}: process {pid} lives there, and would be cut off from its peers",
                        hint="--site destination=NETNS names where it will be restored",
                    )
            # Once more, since a socket may have been made while these were looked at.
            found = [Found(*shown) for shown in kernel.ask(home, sock_diag.list_sockets)]
            return make_checkpoint(found, inodes | find_inodes(pid), pid)
    except ProcessLookupError:
        raise ImageError(f"there is no process {pid}, or not any more") from None
    except OSError as error:
        raise ImageError(f"cannot look at process {pid}: {error.strerror}") from None
