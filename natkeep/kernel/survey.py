"""Reads what `natkeep check` has to know of a machine: the facts for plan/diagnostics.py.

Rule: read only, in the namespace that the calling thread is in; nothing is judged here. This is
the only file that imports pyroute2, and only when facts are gathered: its import takes 176 ms
(docs/performance.md), so what a restore waits for reads rtnetlink by rtnetlink.py.
"""

from __future__ import annotations

import os

from natkeep.errors import KernelError
from natkeep.kernel import nftables_dump, sysctl
from natkeep.plan.diagnostics import Facts
from natkeep.plan.nft import TABLE

_CAP_NET_ADMIN = 12
_SYS = "/proc/sys/net"


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
        libnftables=_has_libnftables(),
        tables_readable=chains is not None,
        forwarding4=_flag(f"{_SYS}/ipv4/ip_forward"),
        forwarding6=_flag(f"{_SYS}/ipv6/conf/all/forwarding"),
        loose=_flag(f"{_SYS}/netfilter/nf_conntrack_tcp_loose"),
        entries=_number(sysctl.read("netfilter/nf_conntrack_count")),
        limit=_number(sysctl.read("netfilter/nf_conntrack_max")),
        rp_filter=_rp_filter(),
        bridge_netfilter=bool(_flag(f"{_SYS}/bridge/bridge-nf-call-iptables")),
        legacy_tables=tuple(sorted(set(_legacy_tables()))),
        flowtables=nftables_dump.flowtable_names() if chains is not None else (),
        nat_chains=tuple(
            f"{chain.family} {chain.table} {chain.name} {chain.hook} {chain.priority}"
            for chain in chains or ()
            if chain.type == "nat" and chain.table != TABLE
        ),
        xdp=find_xdp(),
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


def _has_libnftables() -> bool:
    from natkeep.kernel import nftables

    return nftables.is_available()


def _legacy_tables() -> list[str]:
    names = ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
    return [name for path in names for name in (_read(path) or "").split()]


def _rp_filter() -> int | None:
    base = f"{_SYS}/ipv4/conf"
    try:
        devices = os.listdir(base)
    except OSError:
        return None
    values = [_number(_read(f"{base}/{device}/rp_filter")) for device in devices]
    return max((value for value in values if value is not None), default=None)


def _flag(path: str) -> bool | None:
    value = _number(_read(path))
    return None if value is None else value != 0


def _number(text: str | None) -> int | None:
    return int(text) if text is not None else None


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return None
