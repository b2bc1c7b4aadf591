"""Packs and reads rtnetlink messages: the addresses of a namespace, its lo, and one route look-up.

Rule: nothing but lo is ever changed here, and of routes only the one that is there for a moment
(see refresh_cached_routes). All functions act in the namespace that the calling thread is in.

Why not pyroute2: prepare and open ask for these few messages inside the blackout, and its import
alone takes longer than both (docs/performance.md). Numbers are from linux/rtnetlink.h,
linux/if_addr.h and linux/if_link.h.
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
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Netlink,
    attribute,
    attributes,
)
from natkeep.kernel.policy_rules import copy_rules, remove_copies
from natkeep.plan.criu_lock import CRIU_MARK
from natkeep.plan.step_undo import LowerLoopback, RemoveAddress
from natkeep.plan.steps import AddAddress, Prior, RaiseLoopback
from natkeep.plan.tuples import Address

_NEWLINK, _GETLINK = 16, 18
NEWADDR, _DELADDR, _GETADDR = 20, 21, 22
NEWROUTE, DELROUTE, GETROUTE = 24, 25, 26

_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, type, index, flags, change
ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
ROUTE = struct.Struct("=BBBBBBBBI")  # rtmsg: family, lengths of dst and src, tos, table, protocol,
#                                      scope, type, flags

LOOPBACK = 1
"""The index of lo, which is the first device of every network namespace."""
_IFF_UP = 0x1

IFA_ADDRESS, IFA_LOCAL, IFA_LABEL, IFA_BROADCAST, _IFA_CACHEINFO, IFA_FLAGS = 1, 2, 3, 4, 6, 8
_IFA_PROTO = 11  # who has put the address there; Linux 5.18, before which it is passed over
_BY_NATKEEP = b"\xc1"
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200
_FOREVER = 0xFFFFFFFF
_LOCAL_TIMEOUT = 2.0

RTA_DST, _RTA_SRC, _RTA_IIF, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY = 1, 2, 3, 4, 5, 6
_RTA_MARK, _RTA_IP_PROTO, _RTA_SPORT, _RTA_DPORT = 16, 27, 28, 29
RTN_UNICAST, RTN_LOCAL = 1, 2
_TABLE_MAIN, _PROTOCOL_STATIC, _SCOPE_LINK = 254, 4, 253
_LAST = 0xFFFFFFFE
"""A metric that no other route to one host has."""

_NO_ROUTE = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES})
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}


# ---- addresses -----------------------------------------------------------------------------------


def read_addresses(netlink: Netlink) -> Iterator[tuple[tuple[int, ...], dict[int, bytes]]]:
    """The ifaddrmsg and the attributes of each address of the socket's namespace."""
    for answer in [*netlink.request(_GETADDR, NLM_F_DUMP, ADDRESS.pack(0, 0, 0, 0, 0))]:
        yield ADDRESS.unpack_from(answer), attributes(answer[ADDRESS.size :])


def local_address(found: dict[int, bytes]) -> bytes:
    """The packed local address among an address's attributes; of a tunnel that is not its peer."""
    return found.get(IFA_LOCAL) or found.get(IFA_ADDRESS) or b""


def _list_addresses() -> list[tuple[bytes, int]]:
    """Each local address, packed, and the index of the device that has it."""
    with Netlink(NETLINK_ROUTE) as netlink:
        found = [(local_address(found), header[4]) for header, found in read_addresses(netlink)]
    return [(packed, index) for packed, index in found if len(packed) in (4, 16)]


def all_addresses() -> frozenset[bytes]:
    """Every local address, packed."""
    return frozenset(packed for packed, _ in _list_addresses())


def global_addresses(version: int) -> tuple[Address, ...]:
    """The addresses of IP *version* that are neither loopback nor link-local, in order."""
    found = {ipaddress.ip_address(packed): index for packed, index in _list_addresses()}
    return tuple(
        address
        for address, index in found.items()
        if address.version == version
        and index != LOOPBACK
        and not (address.is_loopback or address.is_link_local)
    )


def marked_addresses() -> frozenset[bytes]:
    """What a natkeep has put on lo, packed.

    So whether an address was there before natkeep need not be asked of a journal, which may be in
    another state directory.
    """
    with Netlink(NETLINK_ROUTE) as netlink:
        return frozenset(
            local_address(found)
            for header, found in read_addresses(netlink)
            if header[4] == LOOPBACK and found.get(_IFA_PROTO) == _BY_NATKEEP
        )


def device_of(address: Address) -> str | None:
    """Name of the device that has *address*, or None."""
    indexes = [index for packed, index in _list_addresses() if packed == address.packed]
    return device_name(indexes[-1]) or str(indexes[-1]) if indexes else None


def device_names() -> frozenset[str]:
    """Names of all network devices."""
    return frozenset(name for _, name in socket.if_nameindex())


def device_name(index: int) -> str:
    """Name of the device with that index; empty where there is none (any more)."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""


def add_host_address(address: Address) -> None:
    """Put *address* on lo with a host-length prefix; OSError when the kernel refuses."""
    extra = attribute(_IFA_PROTO, _BY_NATKEEP)
    if address.version == 6:
        # Deprecated, so that it is never chosen as a source address; nodad, because a tentative
        # address cannot be bound.
        flags = struct.pack("=I", IFA_F_NODAD | IFA_F_NOPREFIXROUTE)
        lifetimes = struct.pack("=IIII", 0, _FOREVER, 0, 0)
        extra += attribute(IFA_FLAGS, flags) + attribute(_IFA_CACHEINFO, lifetimes)
    _request(
        NEWADDR, _pack_on_lo(address, address.max_prefixlen) + extra, NLM_F_CREATE | NLM_F_EXCL
    )
    faultpoints.reach("address-added")
    if address.version == 6 and _await_local(address):
        refresh_cached_routes(address)


def remove_host_address(address: Address) -> None:
    """Take *address* from lo; done as well when it is not there."""
    if address.version == 6:
        try:
            # Of a process that was killed between its two requests in refresh_cached_routes.
            _request(DELROUTE, _pack_route_through_lo(address))
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.ENOENT):
                raise
    remove_copies(address)
    _remove_from_lo(address, address.max_prefixlen)


def _remove_from_lo(address: Address, length: int) -> None:
    try:
        _request(_DELADDR, _pack_on_lo(address, length))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise


def _pack_on_lo(address: Address, length: int) -> bytes:
    header = ADDRESS.pack(_FAMILY[address.version], length, 0, 0, LOOPBACK)
    return header + attribute(IFA_LOCAL, address.packed) + attribute(IFA_ADDRESS, address.packed)


def _await_local(address: Address) -> bool:
    """Wait until the kernel's worker has made the address's local route.

    Whether it is that of all packets to it: rules may lead others than ours past it (ip_rules.py).
    """
    # Linux 6.18: in 65 of 200 tries under load it was missing right after the answer, nodad or
    # not, and a socket could not be bound.
    deadline = time.monotonic() + _LOCAL_TIMEOUT
    with Netlink(NETLINK_ROUTE) as netlink:
        while _route_type(netlink, address, CRIU_MARK) != RTN_LOCAL:
            if time.monotonic() > deadline:
                raise OSError(errno.EADDRNOTAVAIL, f"{address} does not become local")
            time.sleep(0.001)
        return _route_type(netlink, address) == RTN_LOCAL


def is_delivered(address: Address) -> bool:
    """Whether what this host says to *address* is delivered here."""
    with Netlink(NETLINK_ROUTE) as netlink:
        return _route_type(netlink, address) == RTN_LOCAL


def refresh_cached_routes(address: Address) -> None:
    """Make IPv6 sockets of this host that talk to *address* look its route up anew."""
    # A new local address does not invalidate the routes that IPv6 sockets have cached (with IPv4
    # it does), since it goes into another table: a peer on this host would go on sending OLD's
    # packets out of the host until its third retransmission. A route in their own table does
    # invalidate them, however short it is there.
    with suppress(OSError):  # without it they are only slower
        _request(NEWROUTE, _pack_route_through_lo(address), NLM_F_CREATE | NLM_F_EXCL)
        faultpoints.reach("route-added")
        _request(DELROUTE, _pack_route_through_lo(address))


# ---- routes --------------------------------------------------------------------------------------


def look_up_route(
    netlink: Netlink, address: Address, flags: int = 0, mark: int = 0, source: Address | None = None
) -> bytes | None:
    """The kernel's answer (rtmsg) to which route a packet to *address* takes; None: it has none."""
    try:
        return demand_route(netlink, address, flags, mark, source)
    except OSError as error:
        if error.errno in _NO_ROUTE:
            return None
        raise


def demand_route(
    netlink: Netlink, address: Address, flags: int = 0, mark: int = 0,
    source: Address | None = None, device: int = 0, ports: tuple[int, int] | None = None,
) -> bytes:  # fmt: skip
    """The same; OSError says why there is none.

    source: where it comes from, an address of this host; or of another, with the index of the
    *device* by which it comes in. ports: of TCP, the source's and the destination's.
    """
    length = address.max_prefixlen
    body = ROUTE.pack(_FAMILY[address.version], length, length if source else 0, *[0] * 5, flags)
    body += attribute(RTA_DST, address.packed)
    numbers = (_RTA_IIF, device), (_RTA_MARK, mark)
    body += attribute(_RTA_SRC, source.packed) if source else b""
    body += b"".join(attribute(at, struct.pack("=I", value)) for at, value in numbers if value)
    if ports:
        body += attribute(_RTA_IP_PROTO, b"\x06") + b"".join(
            attribute(at, struct.pack("!H", port))
            for at, port in zip((_RTA_SPORT, _RTA_DPORT), ports, strict=True)
        )
    [answer] = netlink.request(GETROUTE, 0, body)
    return answer


def _route_type(
    netlink: Netlink, address: Address, mark: int = 0, source: Address | None = None
) -> int | None:
    answer = look_up_route(netlink, address, mark=mark, source=source)
    return None if answer is None else ROUTE.unpack_from(answer)[7]


def is_reached(netlink: Netlink, address: Address, source: Address | None = None) -> bool:
    """Whether a packet to *address*, from *source*, would leave or be delivered at all."""
    return _route_type(netlink, address, source=source) in (RTN_UNICAST, RTN_LOCAL)


def is_by_lo(netlink: Netlink, address: Address) -> bool:
    """Whether the route to *address* is one that add_route_through_lo makes."""
    answer = look_up_route(netlink, address)
    if answer is None or ROUTE.unpack_from(answer)[7] != RTN_UNICAST:
        return False
    found = attributes(answer[ROUTE.size :])
    return found.get(RTA_OIF) == struct.pack("=I", LOOPBACK)


def add_route_through_lo(address: Address) -> None:
    """A route to *address* alone that any other is preferred to; it may be there."""
    _request(NEWROUTE, _pack_route_through_lo(address), NLM_F_CREATE)


def remove_route_through_lo(address: Address) -> None:
    """Remove it; none is fine."""
    with suppress(ProcessLookupError):  # ESRCH
        _request(DELROUTE, _pack_route_through_lo(address))


def _pack_route_through_lo(address: Address) -> bytes:
    scope = _SCOPE_LINK if address.version == 4 else 0
    main = (_TABLE_MAIN, _PROTOCOL_STATIC, scope, RTN_UNICAST, 0)
    return (
        ROUTE.pack(_FAMILY[address.version], address.max_prefixlen, 0, 0, *main)
        + attribute(RTA_DST, address.packed)
        + attribute(RTA_OIF, struct.pack("=I", LOOPBACK))
        + attribute(RTA_PRIORITY, struct.pack("=I", _LAST))
    )


# ---- lo ------------------------------------------------------------------------------------------


def loopback_is_up() -> bool:
    """Whether lo is up."""
    [answer] = _request(_GETLINK, _LINK.pack(0, 0, LOOPBACK, 0, 0))
    flags: int = _LINK.unpack_from(answer)[3]
    return bool(flags & _IFF_UP)


def _set_loopback(flags: int) -> None:
    _request(_NEWLINK, _LINK.pack(0, 0, LOOPBACK, flags, _IFF_UP))


def _request(type_: int, body: bytes, flags: int = 0) -> list[bytes]:
    with Netlink(NETLINK_ROUTE) as netlink:
        return list(netlink.request(type_, flags, body))


# ---- the steps -----------------------------------------------------------------------------------


class AddressDriver(Driver[AddAddress]):
    """OLD on lo; undone only where it was nowhere before."""

    def apply(self, at: Place, step: AddAddress, remember: Remember) -> Prior:
        """Add it, unless a device has it; prior.present: and not from another move of natkeep's.

        What was at home here is routed as it was.

        The move that leaves last takes such an address away (Executor asks who needs it).
        """
        there = device_of(step.address) is not None
        prior = Prior(present=there and step.address.packed not in marked_addresses())
        remember(prior)
        if not there:
            add_host_address(step.address)
        if step.like is not None and not prior.present:
            try:
                copy_rules(step.like, step.address)
            except OSError:
                if not there:
                    remove_host_address(step.address)
                raise
        return prior

    def revert(self, at: Place, undo: RemoveAddress, prior: Prior) -> None:
        """Remove it, and the rules for it."""
        remove_host_address(undo.address)


class LoopbackDriver(Driver[RaiseLoopback]):
    """lo up; undone only where it was down before."""

    def apply(self, at: Place, step: RaiseLoopback, remember: Remember) -> Prior:
        """Raise it, unless it is up; prior.facts["addresses"] is how many it had."""
        addresses = sum(index == LOOPBACK for _, index in _list_addresses())
        prior = Prior(present=loopback_is_up(), facts={"addresses": addresses})
        remember(prior)
        if not prior.present:
            _set_loopback(_IFF_UP)
        return prior

    def revert(self, at: Place, undo: LowerLoopback, prior: Prior) -> None:
        """Lower it."""
        _set_loopback(0)
        faultpoints.reach("loopback-lowered")
        # The kernel gives lo 127.0.0.1 and ::1 when it is raised without an address; ::1 went with
        # the link, and 127.0.0.1 stays.
        if not prior.facts.get("addresses"):
            _remove_from_lo(ipaddress.IPv4Address("127.0.0.1"), 8)
