"""the terrain: what stands on the way beside natkeep; firewalls, other NAT, settings, narrow paths.

    lab.gateway_tracks(); lab.strict_firewall(); lab.masquerading_table()      before `serve`
    lab.conntrack_loose(0); lab.path_mtu("near"); lab.flush_conntrack("gateway")

Rule: everything here is what other programs and operators install; it never names natkeep's
table, and is there before the lab looks at its surfaces, or is gone by itself.
"""

from __future__ import annotations

from typing import Protocol

from natkeep.lab.host import Host, LabError
from natkeep.lab.report import Assertion, Report
from natkeep.lab.topology import Topology, prefix, router
from natkeep.plan.tuples import FourTuple

NARROW = {4: 1000, 6: 1280}  # IPv6 knows nothing smaller
_LOOSE = "/proc/sys/net/netfilter/nf_conntrack_tcp_loose"
_SNMP = {4: ["/proc/net/snmp"], 6: ["/proc/net/snmp6"]}
_BARE_SYN = "tcp flags & (fin | syn | rst | ack) == syn"


class Standing(Protocol):
    """What of a Lab these words need."""

    topology: Topology
    family: int
    kept: tuple[FourTuple, ...]
    report: Report

    @property
    def sites(self) -> tuple[str, ...]: ...


class Terrain:
    """The words; mixed into Lab."""

    def gateway_tracks(self: Standing) -> None:
        """Any rule that asks conntrack makes the gateway know the connection from its SYN on."""
        self.topology["gateway"].nft(
            "add table inet tracking\n"
            "add chain inet tracking c { type filter hook forward priority 0; }\n"
            "add rule inet tracking c ct state established accept\n"
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
                f"add rule {chain} ct state invalid drop",
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
        route = f"{prefix(network, self.family)} dev downlink proto kernel mtu {mtu}"
        route += " metric 256" if self.family == 6 else ""  # the kernel's own, or it stays
        host.run("ip", f"-{self.family}", "route", "replace", *route.split())

    def path_was_narrow(self: Standing, network: str) -> None:
        """Assert that the router has met packets that were too big, or nothing was shown."""
        shown = self.topology[router(network)].run("cat", *_SNMP[self.family]).stdout
        met = _read_counter(shown, self.family)
        self.report.assertions.append(
            Assertion("the narrow path was too narrow for some packets", met > 0, f"{met} packets")
        )

    def flush_conntrack(self: Standing, role: str) -> None:
        """`conntrack -F`, as others run it."""
        if not self.kept:
            raise LabError("nothing to forget yet")
        self.topology[role].run("conntrack", "-F")


def _read_counter(shown: str, family: int) -> int:
    """FragFails: packets that were to be forwarded and could not be fragmented."""
    lines = [line.split() for line in shown.splitlines()]
    if family == 6:
        return next(int(words[1]) for words in lines if words[0] == "Ip6FragFails")
    names, values = [words for words in lines if words[0] == "Ip:"]
    return int(values[names.index("FragFails")])


def lose_first_probe(switch: Host, port: str) -> None:
    """The switch loses the first empty segment of each connection from *port*: CRIU's probe."""
    lines = [
        "add table netdev lossy",
        "add set netdev lossy seen4 { type ipv4_addr . inet_service . inet_service;"
        " flags dynamic; size 65535; }",
        "add set netdev lossy seen6 { type ipv6_addr . inet_service . inet_service;"
        " flags dynamic; size 65535; }",
        f"add chain netdev lossy c {{ type filter hook ingress device {port} priority 10; }}",
    ]
    for ip, longest, seen in (("ip", 60, "seen4"), ("ip6", 40, "seen6")):
        key = f"{ip} daddr . tcp sport . tcp dport"
        empty = f"{ip} length <= {longest} tcp flags & (syn | fin | rst) == 0"
        rule = "add rule netdev lossy c"
        lines.append(f"{rule} {empty} {key} != @{seen} add @{seen} {{ {key} }} drop")
    switch.nft("\n".join(lines) + "\n")
