"""the addresses, links and routes of a namespace, by raw rtnetlink.

Rule: nothing but lo is ever changed here, and of routes only the one that is there for a moment
(see _forget_cached_routes). All functions act in the namespace that the calling thread is in.

Why not pyroute2: its import takes 125 to 150 ms, fifteen times an interpreter's start, and these
few messages are asked for inside the blackout (linux/rtnetlink.h, linux/if_addr.h).
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress

from natkeep import faultpoints
from natkeep.errors import KernelError
from natkeep.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Netlink,
    attribute,
    attributes,
)
from natkeep.plan.tuples import Address

_NEWLINK, _GETLINK = 16, 18
_NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
_NEWROUTE, _DELROUTE, _GETROUTE = 24, 25, 26

_LOOPBACK = 1
"""The index of lo, which is the first device of every network namespace."""

_IFF_UP = 0x1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_CACHEINFO, _IFA_FLAGS = 1, 2, 6, 8
_IFA_F_NODAD = 0x02
_IFA_F_NOPREFIXROUTE = 0x200
_FOREVER = 0xFFFFFFFF
_LOCAL_TIMEOUT = 2.0

_RTA_DST, _RTA_OIF, _RTA_PRIORITY = 1, 4, 6
_TABLE_MAIN, _PROTOCOL_STATIC = 254, 4
_RTN_UNICAST, _RTN_LOCAL = 1, 2
_RTN_UNREACHABLE = frozenset({6, 7, 8})  # blackhole, unreachable, prohibit

_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, lengths of dst and src, tos, table, protocol,
#                                       scope, type, flags

_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


def _ask(type_: int, body: bytes, flags: int = 0) -> list[bytes]:
    with Netlink(NETLINK_ROUTE) as netlink:
        return list(netlink.request(type_, flags, body))


def _read_addresses() -> Iterator[tuple[bytes, int]]:
    """Each local address, packed, and the index of the device that has it."""
    for answer in _ask(_GETADDR, _ADDRESS.pack(0, 0, 0, 0, 0), NLM_F_DUMP):
        found = attributes(answer[_ADDRESS.size :])
        packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
        if packed is not None and len(packed) in (4, 16):
            yield packed, _ADDRESS.unpack_from(answer)[4]


def device_of(address: Address) -> str | None:
    """Name of the device that has *address*, or None."""
    indexes = [index for packed, index in _read_addresses() if packed == address.packed]
    return _name(indexes[-1]) if indexes else None


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:  # it went in between
        return str(index)


def global_addresses(version: int) -> tuple[Address, ...]:
    """The addresses of IP *version* that are neither loopback nor link-local, in order."""
    found = {ipaddress.ip_address(packed): index for packed, index in _read_addresses()}
    return tuple(
        address
        for address, index in found.items()
        if address.version == version
        and index != _LOOPBACK
        and not (address.is_loopback or address.is_link_local)
    )


def all_addresses() -> frozenset[bytes]:
    """Every local address, packed."""
    return frozenset(packed for packed, _ in _read_addresses())


def add_host_address(address: Address) -> None:
    """Put *address* on lo with a host-length prefix; OSError when the kernel refuses."""
    extra = b""
    if address.version == 6:
        # Deprecated, so that it is never chosen as a source address; nodad, because a tentative
        # address cannot be bound.
        flags = struct.pack("=I", _IFA_F_NODAD | _IFA_F_NOPREFIXROUTE)
        lifetimes = struct.pack("=IIII", 0, _FOREVER, 0, 0)
        extra = attribute(_IFA_FLAGS, flags) + attribute(_IFA_CACHEINFO, lifetimes)
    _ask(_NEWADDR, _on_lo(address, address.max_prefixlen) + extra, NLM_F_CREATE | NLM_F_EXCL)
    faultpoints.reach("address-added")
    if address.version == 6:
        _await_local(address)
        _forget_cached_routes(address)


def _on_lo(address: Address, length: int) -> bytes:
    header = _ADDRESS.pack(_FAMILY[address.version], length, 0, 0, _LOOPBACK)
    return header + attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.packed)


def _await_local(address: Address) -> None:
    """Wait until the kernel's worker has made the address's local route.

    In 65 of 200 tries under load (Linux 6.18) it was missing right after the answer, nodad or
    not, and a socket could not be bound.
    """
    deadline = time.monotonic() + _LOCAL_TIMEOUT
    while True:
        try:
            if _route_type(address) == _RTN_LOCAL:
                return
        except OSError as error:
            if error.errno not in (errno.ENETUNREACH, errno.EHOSTUNREACH):
                raise
        if time.monotonic() > deadline:
            raise OSError(errno.EADDRNOTAVAIL, f"{address} does not become local")
        time.sleep(0.001)


def _forget_cached_routes(address: Address) -> None:
    """Make IPv6 sockets of this host that talk to *address* look for it anew.

    A new local address does not concern the routes that sockets have cached (as it does with
    IPv4), since it goes into another table: a peer here would go on to send OLD out of the
    host until its third retransmission. A route in their table does, however short it is there.
    """
    with suppress(OSError):  # without it they are only slower
        _ask(_NEWROUTE, _passing_route(address), NLM_F_CREATE | NLM_F_EXCL)
        faultpoints.reach("route-added")
        _ask(_DELROUTE, _passing_route(address))


def _passing_route(address: Address) -> bytes:
    header = _ROUTE.pack(
        socket.AF_INET6, 128, 0, 0, _TABLE_MAIN, _PROTOCOL_STATIC, 0, _RTN_UNICAST, 0
    )
    return (
        header
        + attribute(_RTA_DST, address.packed)
        + attribute(_RTA_OIF, struct.pack("=I", _LOOPBACK))
        + attribute(_RTA_PRIORITY, struct.pack("=I", _LAST))
    )


_LAST = 0xFFFFFFFE
"""A metric that nobody else's route to one host has."""


def remove_host_address(address: Address) -> None:
    """Take *address* from lo; done as well when it is not there."""
    if address.version == 6:
        try:
            _ask(_DELROUTE, _passing_route(address))  # of whoever was killed in the middle
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT):
                raise
    _remove_from_lo(address, address.max_prefixlen)


def _remove_from_lo(address: Address, length: int) -> None:
    try:
        _ask(_DELADDR, _on_lo(address, length))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise


def loopback_is_up() -> bool:
    """Whether lo is up."""
    [answer] = _ask(_GETLINK, _LINK.pack(0, 0, _LOOPBACK, 0, 0))
    flags: int = _LINK.unpack_from(answer)[3]
    return bool(flags & _IFF_UP)


def raise_loopback() -> None:
    """Bring lo up."""
    _ask(_NEWLINK, _LINK.pack(0, 0, _LOOPBACK, _IFF_UP, _IFF_UP))


def lower_loopback() -> None:
    """Bring lo down."""
    _ask(_NEWLINK, _LINK.pack(0, 0, _LOOPBACK, 0, _IFF_UP))


def count_on_lo() -> int:
    """How many addresses lo has; raising it gives it 127.0.0.1 and ::1 when it has none."""
    return sum(index == _LOOPBACK for _, index in _read_addresses())


def forget_loopback_address() -> None:
    """Take from lo, when it is down, the 127.0.0.1 that the kernel gave it when it was raised."""
    _remove_from_lo(ipaddress.IPv4Address("127.0.0.1"), 8)


def has_route_to(peer: Address) -> bool:
    """Whether a packet to *peer* would leave or be delivered at all."""
    try:
        return _route_type(peer) not in _RTN_UNREACHABLE
    except OSError as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
            return False
        raise KernelError(f"cannot look up the route to {peer}: {error.strerror}") from error


def _route_type(address: Address) -> int:
    """The type of the route that a packet to *address* would take; OSError where it has none."""
    header = _ROUTE.pack(_FAMILY[address.version], address.max_prefixlen, 0, 0, 0, 0, 0, 0, 0)
    [answer] = _ask(_GETROUTE, header + attribute(_RTA_DST, address.packed))
    type_: int = _ROUTE.unpack_from(answer)[7]
    return type_
