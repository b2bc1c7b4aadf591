"""Reads the connection table: entry by entry, or all of it in one dump.

Rule: read only, in the namespace of the calling thread. A dump may miss an entry while others are
made and deleted; an entry that is asked for by its tuple is found if it is there.

What is cheaper depends on the table: a gateway may track a million connections that are none of
ours, and a dump reads them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from natkeep.kernel import sysctl
from natkeep.kernel.ctnetlink import GET, Ends, ask_for_tcp, for_each, read_tuples
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_DUMP, Netlink
from natkeep.plan.tuples import Connections

LOOK_UP, DELETE_ONE = 3, 2
"""Microseconds: to ask for an entry by its tuple, and to delete one."""

_DUMP, _ENTRY = 5000, 3
"""Microseconds: a dump of an empty table (for its 262,144 buckets), and of each entry."""


def count_tracked() -> int | None:
    """How many entries the namespace has; None where that cannot be read."""
    value = sysctl.read("netfilter/nf_conntrack_count")
    return None if value is None else int(value)


def is_dump_cheaper(microseconds: int, tracked: int) -> bool:
    """Whether a dump of a table of so many entries takes less than this."""
    return microseconds > _DUMP + _ENTRY * tracked


def ask_each(
    connections: Connections, pack: Callable[[Ends], bytes], netlink: Netlink | None = None
) -> Iterator[bytes | None]:
    """For each connection the entry of zone 0 that has the tuple in either direction, or None."""
    queries = for_each(connections, connections, GET, 0, lambda end, _: pack(end))
    if netlink is not None:
        yield from netlink.send_queries(queries)
        return
    with Netlink(NETLINK_NETFILTER) as own:
        yield from own.send_queries(queries)


def dump(request: bytes) -> Iterator[bytes]:
    """The entries that *request* is for (see ctnetlink.ask_for_tcp), or more."""
    with Netlink(NETLINK_NETFILTER) as netlink:
        yield from netlink.request(GET, NLM_F_DUMP, request)


class Dump:
    """The TCP entries of IP *version*, found by their tuples."""

    def __init__(self, version: int) -> None:
        self._by_tuple: dict[bytes, bytes] = {}
        self._by_destination: dict[bytes, list[bytes]] = {}
        for answer in dump(ask_for_tcp(version)):
            original, reply, zone = read_tuples(answer)
            if not original:
                continue  # of another protocol, with which older kernels answer
            if not zone:
                self._by_tuple[original] = self._by_tuple[reply] = answer
            self._by_destination.setdefault(original[len(original) // 2 :], []).append(answer)

    def find(self, tuple_: bytes) -> bytes | None:
        """The entry of zone 0 that has the tuple in either direction."""
        return self._by_tuple.get(tuple_)

    def find_to(self, destination: bytes) -> list[bytes]:
        """Those, of whatever zone, whose original tuple leads there: address and port."""
        return self._by_destination.get(destination, [])
