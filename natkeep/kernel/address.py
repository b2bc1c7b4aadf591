"""the addresses, links and routes of a namespace, through pyroute2.

Rule: pyroute2 is imported only here, and only when a function is called: its import takes
150 ms. All functions act in the namespace that the calling thread is in.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from natkeep.errors import KernelError
from natkeep.plan.tuples import Address

_LOOPBACK = 1
"""The index of lo, which is the first device of every network namespace."""

_IFF_UP = 0x1
_IFA_F_NODAD = 0x02
_IFA_F_NOPREFIXROUTE = 0x200
_SCOPE_GLOBAL = 0
_FOREVER = 0xFFFFFFFF
_LOCAL_TIMEOUT = 2.0
_RTN_LOCAL = 2
_RTN_UNREACHABLE = frozenset({6, 7, 8})  # blackhole, unreachable, prohibit


@contextmanager
def _route_socket() -> Iterator[Any]:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with IPRoute() as ipr:
        try:
            yield ipr
        except NetlinkError as error:
            raise OSError(error.code, str(error.args[-1])) from error


def device_of(address: Address) -> str | None:
    """Name of the device that has *address*, or None."""
    return _addresses().get(address)


def global_addresses(version: int) -> tuple[Address, ...]:
    """The addresses of IP *version* that are neither loopback nor link-local, in order."""
    return tuple(
        address
        for address, device in _addresses().items()
        if address.version == version
        and device != "lo"
        and not (address.is_loopback or address.is_link_local)
    )


def all_addresses() -> frozenset[Address]:
    """Every local address."""
    return frozenset(_addresses())


def _addresses() -> dict[Address, str]:
    with _route_socket() as ipr:
        names = {link["index"]: link.get("ifname") for link in ipr.get_links()}
        found = {}
        for row in ipr.get_addr():
            text = row.get("local") or row.get("address")
            found[ipaddress.ip_address(text)] = str(names.get(row["index"], row["index"]))
        return found


def add_host_address(address: Address) -> None:
    """Put *address* on lo with a host-length prefix; OSError when the kernel refuses."""
    options: dict[str, Any] = {"index": _LOOPBACK, "address": str(address)}
    options["prefixlen"] = address.max_prefixlen
    if address.version == 6:
        # Deprecated, so that it is never chosen as a source address; nodad, because a tentative
        # address cannot be bound.
        options["flags"] = _IFA_F_NODAD | _IFA_F_NOPREFIXROUTE
        options["preferred_lft"], options["valid_lft"] = 0, _FOREVER
    with _route_socket() as ipr:
        ipr.addr("add", **options)
        if address.version == 6:
            _await_local(ipr, address)
            _forget_cached_routes(ipr, address)


def _await_local(ipr: Any, address: Address) -> None:
    """Wait until the kernel's worker has made the address's local route.

    In 65 of 200 tries under load (Linux 6.18) it was missing right after the answer, nodad or
    not, and a socket could not be bound.
    """
    deadline = time.monotonic() + _LOCAL_TIMEOUT
    while True:
        try:
            routes = ipr.route("get", dst=str(address), family=socket.AF_INET6)
            if all(route["type"] == _RTN_LOCAL for route in routes):
                return
        except Exception as error:
            if getattr(error, "code", None) not in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                raise
        if time.monotonic() > deadline:
            raise OSError(errno.EADDRNOTAVAIL, f"{address} does not become local")
        time.sleep(0.001)


def _forget_cached_routes(ipr: Any, address: Address) -> None:
    """Make IPv6 sockets of this host that talk to *address* look for it anew.

    A new local address does not concern the routes that sockets have cached (as it does with
    IPv4), since it goes into another table: a peer here would go on to send OLD out of the
    host until its third retransmission. A route in their table does, however short it is there.
    """
    route = {"dst": f"{address}/128", "family": socket.AF_INET6}
    route |= {"oif": _LOOPBACK, "priority": _LAST}
    with suppress(Exception):  # without it they are only slower
        ipr.route("add", **route)
        ipr.route("del", **route)


_LAST = 0xFFFFFFFE
"""A metric that nobody else's route to one host has."""


def remove_host_address(address: Address) -> None:
    """Take *address* from lo; done as well when it is not there."""
    _remove_from_lo(str(address), address.max_prefixlen)


def _remove_from_lo(address: str, length: int) -> None:
    try:
        with _route_socket() as ipr:
            ipr.addr("del", index=_LOOPBACK, address=address, prefixlen=length)
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise


def loopback_is_up() -> bool:
    """Whether lo is up."""
    with _route_socket() as ipr:
        return bool(ipr.get_links(_LOOPBACK)[0]["flags"] & _IFF_UP)


def set_loopback(state: str) -> None:
    """Bring lo `up` or `down`."""
    with _route_socket() as ipr:
        ipr.link("set", index=_LOOPBACK, state=state)


def count_on_lo() -> int:
    """How many addresses lo has; raising it gives it 127.0.0.1 and ::1 when it has none."""
    return sum(device == "lo" for device in _addresses().values())


def forget_loopback_address() -> None:
    """Take from lo, when it is down, the 127.0.0.1 that the kernel gave it when it was raised."""
    _remove_from_lo("127.0.0.1", 8)


def has_route_to(peer: Address) -> bool:
    """Whether a packet to *peer* would leave or be delivered at all."""
    family = socket.AF_INET if peer.version == 4 else socket.AF_INET6
    try:
        with _route_socket() as ipr:
            routes = ipr.route("get", dst=str(peer), family=family)
    except OSError as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
            return False
        raise KernelError(f"cannot look up the route to {peer}: {error.strerror}") from error
    return all(route["type"] not in _RTN_UNREACHABLE for route in routes)
