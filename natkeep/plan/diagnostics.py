"""the findings: what about a machine stops a move or endangers it, each with a code.

Rule: facts in, findings out; kernel/survey.py gathers the facts, and what they mean is decided
here. The catalogue is what `natkeep explain` prints. This file must never look at a machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from natkeep.plan.move import Site
from natkeep.plan.roles import Role
from natkeep.values import dataclass

FULL = 90
"""Per cent of nf_conntrack_max up to which natkeep adds entries."""


class Severity(StrEnum):
    """STOP: a move would be refused or fail. WARN: it may lose connections. NOTE: good to know."""

    STOP = "stop"
    WARN = "warn"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a code means, and what to do."""

    severity: Severity
    meaning: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something found at a site; detail is one clause with the figures."""

    code: str
    site: Site
    detail: str

    @property
    def severity(self) -> Severity:
        """That of its code."""
        return CATALOGUE[self.code].severity


@dataclass(frozen=True, slots=True)
class Facts:
    """What survey.py saw in a namespace; None where it could not be read.

    rp_filter: the highest of `all` and each device. nat_chains: base chains of type nat that are
    not ours, as `FAMILY TABLE CHAIN HOOK PRIORITY`. xdp: devices that have a program attached.
    untracked: chains with rules that may keep packets from being tracked, `FAMILY TABLE CHAIN`.
    """

    privileged: bool
    libnftables: bool
    tables_readable: bool
    forwarding4: bool | None
    forwarding6: bool | None
    loose: bool | None
    entries: int | None
    limit: int | None
    rp_filter: int | None
    bridge_netfilter: bool
    legacy_tables: tuple[str, ...]
    flowtables: tuple[str, ...]
    nat_chains: tuple[str, ...]
    virtual_servers: bool
    xdp: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()


CATALOGUE = {
    "no-privileges": Explanation(
        Severity.STOP,
        "This process lacks CAP_NET_ADMIN, without which no rule, address or conntrack entry can "
        "be changed.",
        "Run natkeep as root, or give it CAP_NET_ADMIN, and CAP_SYS_ADMIN to enter other "
        "namespaces.",
    ),
    "no-libnftables": Explanation(
        Severity.STOP,
        "libnftables or its Python binding cannot be loaded.",
        "Install the package libnftables1, and pip-nftables or python3-nftables.",
    ),
    "no-nf-tables": Explanation(
        Severity.STOP,
        "The kernel did not answer a question about nf_tables.",
        "Load the module nf_tables, or use a kernel that has it.",
    ),
    "forwarding-off": Explanation(
        Severity.STOP,
        "A gateway passes packets on, and forwarding is off here for both IP versions.",
        "sysctl -w net.ipv4.ip_forward=1 (net.ipv6.conf.all.forwarding=1 for IPv6), or name the "
        "namespace that is the gateway.",
    ),
    "conntrack-full": Explanation(
        Severity.STOP,
        f"The connection table is over {FULL} % full; it would take neither natkeep's entries nor "
        "anybody else's new connections.",
        "Raise net.netfilter.nf_conntrack_max, or find out what fills it.",
    ),
    "flowtable": Explanation(
        Severity.WARN,
        "A flowtable takes established connections past all rules; one that is in it is not "
        "translated before it has left it. `prepare` refuses a kept connection that is.",
        "Leave the kept connections out of the flowtable's rule.",
    ),
    "legacy-iptables": Explanation(
        Severity.WARN,
        "iptables-legacy has tables here beside nf_tables. Its NAT competes at priorities -100 and "
        "100; natkeep's, at -120 and 80, comes first.",
        "Nothing, unless rules there drop what they do not know; iptables-nft is easier to see.",
    ),
    "bridge-netfilter": Explanation(
        Severity.WARN,
        "bridge-nf-call-iptables is on: bridged frames pass the IP hooks too, so a packet may be "
        "translated on the bridge and again on its route.",
        "sysctl -w net.bridge.bridge-nf-call-iptables=0, unless a container engine needs it.",
    ),
    "reverse-path-filter": Explanation(
        Severity.WARN,
        "rp_filter is strict on a device here: packets whose way back is another device are "
        "dropped without a word.",
        "Set rp_filter to 2 (loose) where routes are asymmetric.",
    ),
    "xdp": Explanation(
        Severity.WARN,
        "An XDP program is attached to a device here. It sees packets before any rule, and may "
        "answer or redirect them untranslated, as some load balancers and firewalls do.",
        "See that it passes the kept connections on: `ip link show` names it, `bpftool net` too.",
    ),
    "virtual-servers": Explanation(
        Severity.WARN,
        "IPVS has virtual servers here; it keeps its own table of connections and may take "
        "packets before they are translated.",
        "Do not move connections that IPVS balances at this gateway.",
    ),
    "other-nat": Explanation(
        Severity.NOTE,
        "Other NAT chains are here. natkeep's come first (20 before the usual priorities), and its "
        "entries exist before the first packet, so they do not touch kept connections. One that "
        "translates them already is taken over in mode stateful, and refused in mode stateless.",
        "Nothing.",
    ),
    "not-tracked": Explanation(
        Severity.NOTE,
        "Rules here keep packets from being tracked (`notrack`). Kept connections that they hit "
        "are translated all the same, without conntrack; but their packets are not counted, and a "
        "gateway alone does not see their end, so that `teardown` there asks for --yes.",
        "Nothing.",
    ),
    "no-pick-up": Explanation(
        Severity.NOTE,
        "nf_conntrack_tcp_loose is 0: the kernel picks up no connection in the middle. natkeep's "
        "entries are created beforehand, and its rules carry on kept connections whose entries "
        "are gone; but until a repair makes these again, ICMP errors do not get through.",
        "Nothing, or --mode stateless, which does not need the entries.",
    ),
}


def find(site: Site, facts: Facts) -> Iterator[Finding]:
    """What *facts* mean for a move with *site*."""
    yield from (Finding(code, site, detail) for code, detail in _judge(site, facts))


def _judge(site: Site, facts: Facts) -> Iterator[tuple[str, str]]:
    if not facts.privileged:
        yield "no-privileges", "CAP_NET_ADMIN is not effective"
    if not facts.libnftables:
        yield "no-libnftables", "it cannot be loaded"
    if not facts.tables_readable:
        yield "no-nf-tables", "tables cannot be listed"
    if site.role == Role.GATEWAY and facts.forwarding4 is False and facts.forwarding6 is False:
        yield "forwarding-off", "net.ipv4.ip_forward and net.ipv6.conf.all.forwarding are 0"
    if facts.entries is not None and facts.limit and facts.entries * 100 > facts.limit * FULL:
        yield "conntrack-full", f"{facts.entries} of {facts.limit} entries"
    if facts.flowtables:
        yield "flowtable", ", ".join(facts.flowtables)
    if facts.legacy_tables:
        yield "legacy-iptables", "tables " + ", ".join(facts.legacy_tables)
    if facts.bridge_netfilter:
        yield "bridge-netfilter", "net.bridge.bridge-nf-call-iptables is 1"
    if facts.rp_filter == 1:
        yield "reverse-path-filter", "net.ipv4.conf.*.rp_filter is 1"
    if facts.xdp:
        yield "xdp", "attached to " + ", ".join(facts.xdp)
    if facts.virtual_servers:
        yield "virtual-servers", "/proc/net/ip_vs lists them"
    if facts.nat_chains:
        yield "other-nat", "; ".join(facts.nat_chains)
    if facts.untracked:
        yield "not-tracked", "; ".join(facts.untracked)
    if facts.loose is False:
        yield "no-pick-up", "net.netfilter.nf_conntrack_tcp_loose is 0"
