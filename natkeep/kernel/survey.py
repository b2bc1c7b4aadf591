"""Reads what `natkeep check` has to know of a machine: the facts for plan/diagnostics.py.

Rule: read only, in the namespace that the calling thread is in; nothing is judged here. This is
the only file that imports pyroute2, and only when facts are gathered: its import takes 176 ms
(docs/performance.md), so what a restore waits for reads rtnetlink by rtnetlink.py.
"""

from __future__ import annotations

import os

from natkeep.errors import KernelError
from natkeep.kernel import nftables, nftables_dump, sysctl
from natkeep.kernel.bpf import count_programs
from natkeep.kernel.conntrack_zones import read_legacy_tables
from natkeep.kernel.path import has_bridge
from natkeep.plan.diagnostics import Facts
from natkeep.plan.nft import TABLE

_CAP_NET_ADMIN = 12
_FILTERED = (0xFFFF0000, 0xFFFFFFF2, 0xFFFFFFF3)
"""Where filters hang: the qdisc `ingress`, and the two ways of `clsact`."""


def is_privileged() -> bool:
    """Whether CAP_NET_ADMIN is effective."""
    status = _read("/proc/self/status") or ""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return bool(int(fields.get("CapEff", "0"), 16) >> _CAP_NET_ADMIN & 1)


def demand_privileges() -> None:
    """KernelError when this process could not change a namespace anyway."""
    if not is_privileged():
        raise KernelError("no privileges: natkeep needs CAP_NET_ADMIN", hint="run it as root")


def gather_facts() -> Facts:
    """The facts of the namespace that the calling thread is in."""
    chains = _read_chains()
    return Facts(
        privileged=is_privileged(),
        libnftables=nftables.is_available(),
        tables_readable=chains is not None,
        forwarding4=_flag("ipv4/ip_forward"),
        forwarding6=_flag("ipv6/conf/all/forwarding"),
        loose=_flag("netfilter/nf_conntrack_tcp_loose"),
        entries=_number("netfilter/nf_conntrack_count"),
        limit=_number("netfilter/nf_conntrack_max"),
        rp_filter=_rp_filter(),
        bridge_netfilter=bool(_flag("bridge/bridge-nf-call-iptables")) and has_bridge(),
        legacy_tables=tuple(sorted(read_legacy_tables())),
        flowtables=nftables_dump.flowtable_names() if chains is not None else (),
        nat_chains=tuple(
            f"{chain.family} {chain.table} {chain.name} {chain.hook} {chain.priority}"
            for chain in chains or ()
            if chain.type == "nat" and chain.table != TABLE
        ),
        untracked=nftables_dump.untracking_chains(besides=TABLE) if chains is not None else (),
        xdp=find_xdp(),
        bpf=find_bpf(),
        virtual_servers=len((_read("/proc/net/ip_vs") or "").splitlines()) > 3,
    )


def _read_chains() -> tuple[nftables_dump.BaseChain, ...] | None:
    try:
        return nftables_dump.base_chains()
    except OSError:
        return None


def find_xdp() -> tuple[str, ...]:
    """Names of the devices that have an XDP program attached, in order; none where refused."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            return tuple(
                link.get_attr("IFLA_IFNAME")
                for link in route.get_links()
                if link.get_nested("IFLA_XDP", "IFLA_XDP_ATTACHED")
            )
    except (NetlinkError, OSError):
        return ()


def find_bpf() -> tuple[str, ...]:
    """Names of the devices with a BPF program at their traffic control; none where refused."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            filtered = {
                each["index"]
                for each in route.get_qdiscs()
                if each.get_attr("TCA_KIND") in ("clsact", "ingress")
                for parent in _FILTERED
                for filter_ in route.get_filters(index=each["index"], parent=parent)
                if filter_.get_attr("TCA_KIND") == "bpf"
            }
            return tuple(
                link.get_attr("IFLA_IFNAME")
                for link in route.get_links()
                if link["index"] in filtered or count_programs(link["index"])
            )
    except (NetlinkError, OSError):
        return ()


def _rp_filter() -> int | None:
    try:
        devices = os.listdir("/proc/sys/net/ipv4/conf")
    except OSError:
        return None
    values = [_number(f"ipv4/conf/{device}/rp_filter") for device in devices]
    return max((value for value in values if value is not None), default=None)


def _flag(setting: str) -> bool | None:
    value = _number(setting)
    return None if value is None else value != 0


def _number(setting: str) -> int | None:
    text = sysctl.read(setting)
    return None if text is None else int(text)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None
