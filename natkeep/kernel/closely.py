"""the close look: each question about a namespace is asked for itself, and costs what it asks for.

Rule: read only, in the namespace of the thread. What is answered is true as it is answered; for
many moves there is panorama.py.
"""

from __future__ import annotations

from natkeep.kernel import calls, conntrack, nftables_dump, rtnetlink, sock_diag
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.netns import Namespace
from natkeep.plan.drift import SeenEntry
from natkeep.plan.listeners import Reception
from natkeep.plan.nft import TABLE, Key
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections, Endpoint


class CloseEyes:
    """See view.Eyes; directory is the kernel's, where guards are found."""

    def __init__(self, namespace: Namespace, directory: str) -> None:
        self._namespace = namespace
        self._directory = directory

    def look_up(self, translation: Translation) -> tuple[SeenEntry | None, ...]:
        """For each kept connection what the connection table shows, or None."""
        return tuple(conntrack.look_up(translation))

    def find_things(self, wanted: frozenset[Key]) -> frozenset[Key]:
        """Those of *wanted* that are there."""
        found: set[Key] = set()
        with Netlink(NETLINK_NETFILTER) as netlink:
            for family, number in (("inet", nftables_dump.INET), ("arp", nftables_dump.ARP)):
                found |= nftables_dump.find_standing(netlink, family)[0]
                for name in {k.name for k in wanted if (k.kind, k.family) == ("element", family)}:
                    keys = nftables_dump.dump_keys(netlink, number, TABLE, name)
                    found |= {Key(family, "element", name, key.hex()) for key in keys}
        return wanted & found

    def comments(self, chain: str) -> tuple[str, ...]:
        """Of the rules of a chain of the inet table, in order; none when it is not there."""
        return tuple(rule.comment for rule in nftables_dump.rules(TABLE, chain))

    def has_key(self, name: str, key: bytes) -> bool:
        """Whether the set or map of the inet table has the key."""
        return nftables_dump.has_key(TABLE, name, key)

    def count_missing(self, name: str, keys: frozenset[bytes]) -> int:
        """How many of *keys* the set of the inet table does not have."""
        return len(keys.difference(nftables_dump.read_keys(TABLE, name)))

    def is_local(self, address_: Address) -> bool:
        """Whether a device has it."""
        return rtnetlink.device_of(address_) is not None

    def loopback_is_up(self) -> bool:
        """Whether lo is."""
        return rtnetlink.loopback_is_up()

    def shortest_end(self) -> float:
        """Seconds for which the entry of a connection that has ended is kept, at least."""
        return conntrack.shortest_end()

    def find_kept(self, connections: Connections) -> Connections:
        """Those that have a socket."""
        return sock_diag.find_kept(connections)

    def count_callers(self, ends: frozenset[Endpoint], kept: list[Connections]) -> int:
        """How many sockets have one of *ends* and a peer, and are none of the *kept* ones."""
        return sock_diag.count_callers(ends, kept)

    def count_calls(self, receiving: Reception) -> int:
        """How many callers who were let in live, as the connection table shows them."""
        return calls.count(receiving)

    def is_guarded(self, move_id: str) -> bool:
        """Whether the guard's process lives."""
        from natkeep.kernel import owned_table  # whoever guards nothing need not wait for it

        return owned_table.is_guarded(self._directory, move_id, self._namespace)
