"""the machine: what about a namespace stops a move or endangers it.

Rule: facts in, findings out; kernel/survey.py gathers the facts, and what they mean is decided
here. This file must never look at a machine.
"""

from __future__ import annotations

from collections.abc import Iterator

from natkeep.plan.findings import FULL, Finding, ok
from natkeep.plan.move import Site
from natkeep.plan.roles import Role
from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class Facts:
    """What survey.py saw in a namespace; None where it could not be read.

    rp_filter: the highest of `all` and each device. nat_chains: base chains of type nat that are
    not ours, as `FAMILY TABLE CHAIN HOOK PRIORITY`. xdp: devices that have a program attached; bpf:
    those with one at their traffic control.
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
    bpf: tuple[str, ...] = ()
    untracked: tuple[str, ...] = ()


_OF_RULES = ("flowtable", "legacy-iptables", "not-tracked", "other-nat", "virtual-servers")
ABOUT_A_MOVE = frozenset({*_OF_RULES, "reverse-path-filter"})
"""What is looked at more closely once it is known which packets have to pass."""


def find(site: Site, facts: Facts, *, of_move: bool = False) -> Iterator[Finding]:
    """What *facts* mean for a move with *site*; of_move: its path is looked at, too."""
    found = [*_judge(site, facts)]
    for code, detail in found:
        if not (of_move and code in ABOUT_A_MOVE):
            yield Finding(code, site, detail)
    codes = {code for code, _ in found}
    if not codes & {"no-privileges", "no-libnftables", "no-nf-tables"}:
        yield ok(site, "nf_tables can be read and changed")
    if facts.limit and "conntrack-full" not in codes:
        yield ok(site, f"conntrack has {facts.entries} of {facts.limit} entries")


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
    if facts.bpf:
        yield "bpf", "attached to " + ", ".join(facts.bpf)
    if facts.virtual_servers:
        yield "virtual-servers", "/proc/net/ip_vs lists them"
    if facts.nat_chains:
        yield "other-nat", "; ".join(facts.nat_chains)
    if facts.untracked:
        yield "not-tracked", "; ".join(facts.untracked)
    if facts.loose is False:
        yield "no-pick-up", "net.netfilter.nf_conntrack_tcp_loose is 0"
