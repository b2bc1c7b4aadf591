"""the panorama: one look at all of a namespace, for many moves that have it as a site.

Rule: read only. It answers what closely.py answers, and the two may differ only where something is
changed meanwhile: a dump can miss what others are just moving about. So a connection whose entry
was not seen is asked for once more, here, since that is usual (it has ended); whatever else is
missing is drift, and whoever finds drift looks closely before saying so.

Theory of operation. Tables are read whole at the first question about one, sets when they are asked
for. The connection table is walked through where that is quicker than to ask for each connection:
a gateway may track a million that are none of ours.
"""

from __future__ import annotations

import os

from natkeep.kernel import calls, conntrack, nftables_dump, rtnetlink, snapshot, sock_diag
from natkeep.kernel.closely import CloseEyes
from natkeep.kernel.ctwalk import Walk
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.netns import Namespace, errors_at, inside
from natkeep.kernel.routes import Routes
from natkeep.plan.drift import Observation, SeenEntry
from natkeep.plan.listeners import Reception
from natkeep.plan.move import Site
from natkeep.plan.nft import TABLE, Key
from natkeep.plan.repair import pick_from
from natkeep.plan.steps import Plan
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections, Endpoint
from natkeep.values import replace

_ASKED, _WALKED, _WALK = 16, 4, 40_000
"""Microseconds: to ask for one entry, to walk past one, and the walk through an empty table."""


class LinuxPanorama(CloseEyes):
    """See Panorama in natkeep/kernel/__init__.py, and view.Eyes."""

    def __init__(self, namespace: Namespace, directory: str) -> None:
        super().__init__(replace(namespace, fd=os.dup(namespace.fd)), directory)
        self._tables: dict[str, tuple[set[Key], dict[str, list[str]]]] = {}
        self._keys: dict[tuple[str, str], frozenset[bytes]] = {}
        self._walks: dict[int, Walk] = {}
        self._living: sock_diag.Living | None = None
        with inside(namespace):
            self._netlink, self._routes = Netlink(NETLINK_NETFILTER), Routes()
            self._tracked = int(conntrack.read_setting("nf_conntrack_count") or 0)
            self._local = rtnetlink.all_addresses()
            self._loopback = rtnetlink.loopback_is_up()
            self._lingers = conntrack.shortest_end()

    def expect(self, version: int, connections: int) -> None:
        """So many of IP *version* will be asked for in all; many are better read at once."""
        walked = _WALK + _WALKED * self._tracked
        if version not in self._walks and _ASKED * connections > walked:
            with inside(self._namespace):
                self._walks[version] = Walk(version)

    def observe(self, site: Site, plan: Plan) -> Observation:
        """As Kernel.observe, at a site that is the namespace."""
        with errors_at(site):
            return snapshot.observe(site, plan, self)

    def find_lost_ways(self, site: Site, noted: str) -> tuple[str, ...]:
        """As Kernel.find_lost_ways."""
        with errors_at(site):
            return self._routes.find_lost(noted)

    def close(self) -> None:
        """Let go of the namespace."""
        for walk in self._walks.values():
            walk.close()
        self._netlink.close()
        self._routes.close()
        os.close(self._namespace.fd)

    def look_up(self, translation: Translation) -> tuple[SeenEntry | None, ...]:
        """For each kept connection what the connection table shows, or None."""
        walk = self._walks.get(translation.map.old.version)
        if walk is None:
            return self._look_up_closely(translation)
        seen, missing = conntrack.look_up_in(translation, walk)
        if missing:
            again = self._look_up_closely(pick_from(translation, missing))
            for index, entry in zip(missing, again, strict=True):
                seen[index] = entry
        return tuple(seen)

    def _look_up_closely(self, translation: Translation) -> tuple[SeenEntry | None, ...]:
        with inside(self._namespace):
            return super().look_up(translation)

    def find_things(self, wanted: frozenset[Key]) -> frozenset[Key]:
        """Those of *wanted* that are there."""
        missing = wanted - self._read_table("inet")[0]
        if missing:  # of a family that is rare, or in a set that was not read yet
            for thing in missing:
                if thing.kind == "element":
                    self._read_keys(thing.family, thing.name)
            for family in {thing.family for thing in missing}:
                missing -= self._read_table(family)[0]
        return wanted - missing

    def comments(self, chain: str) -> tuple[str, ...]:
        """Of the rules of a chain of the inet table, in order; none when it is not there."""
        return tuple(self._read_table("inet")[1].get(chain, ()))

    def has_key(self, name: str, key: bytes) -> bool:
        """Whether the set or map of the inet table has the key."""
        return key in self._read_keys("inet", name)

    def count_missing(self, name: str, keys: frozenset[bytes]) -> int:
        """How many of *keys* the set of the inet table does not have."""
        return len(
            keys.difference(nftables_dump.dump_keys(self._netlink, nftables_dump.INET, TABLE, name))
        )

    def is_local(self, address_: Address) -> bool:
        """Whether a device has it."""
        return address_.packed in self._local

    def loopback_is_up(self) -> bool:
        """Whether lo is."""
        return self._loopback

    def shortest_end(self) -> float:
        """Seconds for which the entry of a connection that has ended is kept, at least."""
        return self._lingers

    def find_kept(self, connections: Connections) -> Connections:
        """Those that have a socket."""
        return sock_diag.find_kept(connections, self._read_living())

    def count_callers(self, ends: frozenset[Endpoint], kept: list[Connections]) -> int:
        """How many sockets have one of *ends* and a peer, and are none of the *kept* ones."""
        return sock_diag.count_callers(ends, kept, self._read_living())

    def count_calls(self, receiving: Reception) -> int:
        """How many callers who were let in live, as the connection table shows them."""
        version = receiving.map.old.version
        if version not in self._walks:
            with inside(self._namespace):
                return super().count_calls(receiving)
        return calls.count_in(receiving, self._walks[version])

    def _read_living(self) -> sock_diag.Living:
        if self._living is None:
            with inside(self._namespace):
                self._living = sock_diag.read_living()
        return self._living

    def _read_table(self, family: str) -> tuple[set[Key], dict[str, list[str]]]:
        """What stands there, elements only as far as their sets were read; and rules' comments."""
        if family not in self._tables:
            self._tables[family] = nftables_dump.find_standing(self._netlink, family)
        return self._tables[family]

    def _read_keys(self, family: str, name: str) -> frozenset[bytes]:
        if (family, name) not in self._keys:
            number = {"inet": nftables_dump.INET, "arp": nftables_dump.ARP}[family]
            keys = frozenset(nftables_dump.dump_keys(self._netlink, number, TABLE, name))
            self._keys[family, name] = keys
            found = (Key(family, "element", name, key.hex(), 0) for key in keys)
            self._read_table(family)[0].update(found)
        return self._keys[family, name]
