"""the terrain: what stands on the way beside natkeep; firewalls, other NAT, settings, narrow paths.

    lab.gateway_tracks(); lab.strict_firewall(); lab.masquerading_table()      before `serve`
    lab.conntrack_loose(0); lab.path_mtu("near"); lab.flush_conntrack("gateway")

Rule: everything here is what other programs and operators install; it never names natkeep's
table, and is there before the lab looks at its surfaces, or is gone by itself.
"""

from __future__ import annotations

from typing import Protocol

from natkeep.lab.host import LabError
from natkeep.lab.topology import Topology, prefix, router
from natkeep.plan.tuples import FourTuple

NARROW = {4: 1000, 6: 1280}  # IPv6 knows nothing smaller
_LOOSE = "/proc/sys/net/netfilter/nf_conntrack_tcp_loose"
_BARE_SYN = "tcp flags & (fin | syn | rst | ack) == syn"


class Standing(Protocol):
    """What of a Lab these words need."""

    topology: Topology
    family: int
    kept: tuple[FourTuple, ...]

    @property
    def sites(self) -> tuple[str, ...]: ...


class Terrain:
    """The words; mixed into Lab."""

    def gateway_tracks(self: Standing) -> None:
        """Any rule that asks conntrack makes the gateway know the connection from its SYN on."""
        self.topology["gateway"].nft(
            "add table inet tracking\n"
            "add chain inet tracking c { type filter hook forward priority 0; }\n"
            "add rule inet tracking c ct state established counter\n"
        )

    def conntrack_loose(self: Standing, value: int) -> None:
        """Whether conntrack picks up connections whose SYN it has not seen; at every hop."""
        for role, host in self.topology.hosts.items():
            if role != "switch":
                host.run("sh", "-c", f"echo {value} >{_LOOSE}")

    def strict_firewall(self: Standing) -> None:
        """Gateway and destination pass nothing but what conntrack knows, in all three hooks.

        New connections are let out of the client's network, or none would ever begin; errors
        and neighbours are, or there would be no network.
        """
        lines = ["add table inet strict"]
        for hook in ("input", "forward", "output"):
            chain = f"inet strict {hook}"
            lines += [
                f"add chain {chain} {{ type filter hook {hook} priority 0; policy drop; }}",
                f"add rule {chain} ct state invalid counter drop",
                f"add rule {chain} ct state established accept",
                f"add rule {chain} meta l4proto {{ icmp, icmpv6 }} accept",
            ]
        lines.append(f'add rule inet strict forward iifname "near" ct state new {_BARE_SYN} accept')
        for role in self.sites:
            self.topology[role].nft("\n".join(lines) + "\n")

    def masquerading_table(self: Standing) -> None:
        """Another NAT table at the gateway, at exactly -100 and 100, masquerading its uplinks."""
        self.topology["gateway"].nft(
            "add table inet engine\n"
            "add chain inet engine pre { type nat hook prerouting priority -100; }\n"
            "add rule inet engine pre fib daddr type local tcp dport 8080 redirect to :80\n"
            "add chain inet engine post { type nat hook postrouting priority 100; }\n"
            'add rule inet engine post oifname { "near", "far" } masquerade\n'
        )

    def path_mtu(self: Standing, network: str) -> None:
        """The router in front of *network* finds the path narrow, and says so to who sends."""
        host, mtu = self.topology[router(network)], NARROW[self.family]
        route = f"{prefix(network, self.family)} dev down proto kernel mtu {mtu}"
        host.run("ip", f"-{self.family}", "route", "replace", *route.split())

    def flush_conntrack(self: Standing, role: str) -> None:
        """`conntrack -F`, as others run it."""
        if not self.kept:
            raise LabError("nothing to forget yet")
        self.topology[role].run("conntrack", "-F")
