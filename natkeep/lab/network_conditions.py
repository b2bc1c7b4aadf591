"""What other programs and operators install on the way: firewalls, other NAT, narrow paths, loss.

    lab.conditions.gateway_tracks(); lab.conditions.strict_firewall()      before the server starts
    lab.conditions.path_mtu("near"); lab.conditions.flush_conntrack("gateway")

Rule: nothing here names natkeep's table; it is there before the lab reads its hosts' state, or is
gone by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from natkeep.lab.host import Host, await_true
from natkeep.lab.report import Report
from natkeep.lab.topology import Topology, prefix, router, transfer

_FORGOTTEN_S = 30.0
NARROW = {4: 1000, 6: 1280}  # IPv6 knows nothing smaller
_NETFILTER = "/proc/sys/net/netfilter"
_LOOSE = f"{_NETFILTER}/nf_conntrack_tcp_loose"
_RESTING = ("established", "fin_wait", "close_wait")
_BARE_SYN = "tcp flags & (fin | syn | rst | ack) == syn"


class Conditions:
    """The conditions of one lab's network."""

    def __init__(self, topology: Topology, family: int, report: Report) -> None:
        self.topology, self.family, self.report = topology, family, report

    def gateway_tracks(self) -> None:
        """Any rule that asks conntrack makes the gateway know the connection from its SYN on."""
        self.topology["gateway"].nft(
            "add table inet tracking\n"
            "add chain inet tracking c { type filter hook forward priority 0; }\n"
            "add rule inet tracking c ct state established accept\n"
        )

    def conntrack_loose(self, value: int) -> None:
        """Whether conntrack picks up connections whose SYN it has not seen; at every hop."""
        for role, host in self.topology.hosts.items():
            if role != "switch":
                host.run("sh", "-c", f"echo {value} >{_LOOSE}")

    def strict_firewall(self) -> None:
        """Gateway and destination pass nothing but what conntrack knows, in all three hooks.

        New connections are let out of the client's network, or none would ever begin; errors
        and neighbour discovery pass, or there would be no network.
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
        for role in self.topology.sites:
            self.topology[role].nft("\n".join(lines) + "\n")

    def known_ports(self, role: str, ports: Iterable[int]) -> None:
        """The host accepts and forwards what goes to *ports* or conntrack knows, nothing else.

        Errors and neighbour discovery pass, as by `strict_firewall`.
        """
        lines = ["add table inet ports"]
        listed = ", ".join(map(str, sorted(set(ports))))
        for hook in ("input", "forward"):
            chain = f"inet ports {hook}"
            lines += [
                f"add chain {chain} {{ type filter hook {hook} priority 0; policy drop; }}",
                f"add rule {chain} ct state established,related accept",
                f"add rule {chain} meta l4proto {{ icmp, icmpv6 }} accept",
                f"add rule {chain} tcp dport {{ {listed} }} accept",
            ]
        self.topology[role].nft("\n".join(lines) + "\n")

    def masquerading_table(self) -> None:
        """Another NAT table at the gateway, at exactly -100 and 100, masquerading its uplinks."""
        self.topology["gateway"].nft(
            "add table inet engine\n"
            "add chain inet engine pre { type nat hook prerouting priority -100; }\n"
            "add rule inet engine pre fib daddr type local tcp dport 8080 redirect to :80\n"
            "add chain inet engine post { type nat hook postrouting priority 100; }\n"
            'add rule inet engine post oifname { "near", "far" } masquerade\n'
        )

    def path_mtu(self, network: str) -> None:
        """The router in front of *network* finds the path narrow, and tells the sender so."""
        host, mtu = self.topology[router(network)], NARROW[self.family]
        route = f"{prefix(network, self.family)} dev downlink proto kernel mtu {mtu}"
        route += " metric 256" if self.family == 6 else ""  # the kernel's own, or it stays
        host.run("ip", f"-{self.family}", "route", "replace", *route.split())

    def path_was_narrow(self, network: str) -> None:
        """Assert that the router has met packets that were too big, or nothing was shown."""
        file = "/proc/net/snmp" if self.family == 4 else "/proc/net/snmp6"
        met = _read_frag_fails(self.topology[router(network)].run("cat", file).stdout, self.family)
        self.report.check(
            "the narrow path was too narrow for some packets", met > 0, f"{met} packets"
        )

    def conntrack_timeouts(self, seconds: int) -> None:
        """How long gateway and destination remember a connection that rests."""
        for role in self.topology.sites:
            for state in _RESTING:
                file = f"{_NETFILTER}/nf_conntrack_tcp_timeout_{state}"
                self.topology[role].run("sh", "-c", f"echo {seconds} >{file}")

    def await_forgotten(self) -> None:
        """Nothing is said until gateway and destination have forgotten all connections."""
        for role in self.topology.sites:
            forgotten = partial(_has_no_entry, self.topology[role])
            await_true(forgotten, f"{role} to forget the connections", seconds=_FORGOTTEN_S)

    def fragments(self) -> None:
        """Hosts let IPv4 be fragmented; all that comes to gateway and destination is, by routers.

        The client gets its packets whole, since captures there are judged by their lengths.
        """
        for host in self.topology.hosts.values():
            host.run("sysctl", "-qw", "net.ipv4.ip_no_pmtu_disc=1")  # of sockets made from now on
        self.path_mtu("far")
        for network in self.topology.routed:
            uplink = f"default via {transfer(network, 1, 4)} dev uplink mtu {NARROW[4]}"
            self.topology[router(network)].run("ip", "-4", "route", "replace", *uplink.split())

    def fragments_were_made(self) -> None:
        """Assert that each router has made fragments, or nothing was shown."""
        for network in self.topology.routed:
            snmp = self.topology[router(network)].run("cat", "/proc/net/snmp").stdout
            made = _read_ip_counter(snmp, "FragCreates")
            name = f"the {router(network)} has made fragments"
            self.report.check(name, made > 0, f"{made} fragments")

    def flush_conntrack(self, role: str) -> None:
        """`conntrack -F`, as others run it."""
        self.topology[role].run("conntrack", "-F")

    def delete_entries(self, role: str) -> None:
        """`conntrack -D` of each connection that *role* knows, by its tuple, as CNI plugins do."""
        host = self.topology[role]
        for entry in _read_entries(host):
            words = [word.split("=") for word in entry.split() if "=" in word]
            ends = dict(words[:4][::-1])
            host.run("conntrack", "-D", "-p", "tcp", "-s", ends["src"], "-d", ends["dst"],
                     "--sport", ends["sport"], "--dport", ends["dport"])  # fmt: skip

    def not_tracked(self, role: str) -> None:
        """Another program's rules keep TCP from conntrack, as some do for busy services."""
        lines = ["add table inet busy"]
        for hook in ("prerouting", "output"):
            lines.append(f"add chain inet busy {hook} {{ type filter hook {hook} priority -300; }}")
            lines.append(f"add rule inet busy {hook} meta l4proto tcp notrack")
        self.topology[role].nft("\n".join(lines) + "\n")

    @contextmanager
    def loses(self, port: str, match: str) -> Iterator[None]:
        """Meanwhile the switch loses what matches, of the frames from *port*."""
        switch = self.topology["switch"]
        switch.nft(
            "add table netdev losing\n"
            "add chain netdev losing c"
            f" {{ type filter hook ingress device {port} priority 20; }}\n"
            f"add rule netdev losing c {match} drop\n"
        )
        yield
        switch.nft("delete table netdev losing\n")

    def lose_first_probe(self, port: str) -> None:
        """The switch loses the first empty segment of each connection from *port*: CRIU's probe."""
        lines = ["add table netdev lossy"]
        for name, kind in (("seen4", "ipv4_addr"), ("seen6", "ipv6_addr")):
            key = f"type {kind} . inet_service . inet_service"
            lines.append(f"add set netdev lossy {name} {{ {key}; flags dynamic; size 65535; }}")
        chain = f"{{ type filter hook ingress device {port} priority 10; }}"
        lines.append(f"add chain netdev lossy c {chain}")
        for ip, longest, seen in (("ip", 60, "seen4"), ("ip6", 40, "seen6")):
            key = f"{ip} daddr . tcp sport . tcp dport"
            empty = f"{ip} length <= {longest} tcp flags & (syn | fin | rst) == 0"
            rule = "add rule netdev lossy c"
            lines.append(f"{rule} {empty} {key} != @{seen} add @{seen} {{ {key} }} drop")
        self.topology["switch"].nft("\n".join(lines) + "\n")


def _has_no_entry(host: Host) -> bool:
    return not _read_entries(host)


def _read_entries(host: Host) -> list[str]:
    """Its TCP connections but those through lo, as conntrack(8) lists them."""
    lines = [
        line
        for family in ("ipv4", "ipv6")
        for line in host.run("conntrack", "-L", "-p", "tcp", "-f", family).stdout.splitlines()
    ]
    return [line for line in lines if "src=127." not in line and "src=::1 " not in line]


def _read_frag_fails(shown: str, family: int) -> int:
    """Packets that were to be forwarded and could not be fragmented."""
    if family == 6:
        lines = (line.split() for line in shown.splitlines())
        return next(int(words[1]) for words in lines if words[0] == "Ip6FragFails")
    return _read_ip_counter(shown, "FragFails")


def _read_ip_counter(snmp: str, name: str) -> int:
    """A counter of IPv4, by its name in /proc/net/snmp."""
    names, values = [words for line in snmp.splitlines() if (words := line.split())[0] == "Ip:"]
    return int(values[names.index(name)])
