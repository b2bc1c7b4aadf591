"""Reads the connection table: entry by entry, or all of it in one dump.

Rule: read only, in the namespace of the calling thread. A dump may miss an entry while others are
made and deleted; an entry that is asked for by its tuple is found if it is there.

What is cheaper depends on the table: a gateway may track a million connections that are none of
ours, and a dump reads them all. Entry for entry, to ask costs no more than to dump, so a dump is
for tuples most of which are not there, and for entries whose tuples are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from natkeep.kernel import sysctl
from natkeep.kernel.ctnetlink import GET, Ends, for_each
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_DUMP, Netlink
from natkeep.plan.tuples import Connections

LOOK_UP, DELETE_ONE, WALK = 3, 2, 5000
"""Microseconds: to ask for an entry by its tuple, to delete one, and for the kernel to walk through
an empty table (its 262,144 buckets), whatever it is to find."""

_ENTRY = 3
"""Microseconds: to dump one and read its tuples."""


def count_tracked() -> int | None:
    """How many entries the namespace has; None where that cannot be read."""
    value = sysctl.read("netfilter/nf_conntrack_count")
    return None if value is None else int(value)


def is_dump_cheaper(microseconds: int, tracked: int) -> bool:
    """Whether a dump of a table of so many entries takes less than this."""
    return microseconds > WALK + _ENTRY * tracked


def ask_each(
    netlink: Netlink, connections: Connections, pack: Callable[[Ends], bytes]
) -> Iterator[bytes | None]:
    """For each connection the entry of zone 0 that has the tuple in either direction, or None."""
    return netlink.send_queries(
        for_each(connections, connections, GET, 0, lambda end, _: pack(end))
    )


def dump(request: bytes) -> Iterator[bytes]:
    """The entries that *request* is for (see ctnetlink.ask_for_tcp), or more."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        yield from netlink.request(GET, NLM_F_DUMP, request)
