"""The IPv6 routes to an OLD that have the source which this host has for it (plan/ip_rules.py).

Rule: a route here is what the kernel answered before OLD was an address of the host. One that goes
with its device is missed, and made anew; without one the kernel asks the rules behind. All
functions act in the namespace that the socket they are given is of.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct

from natkeep.kernel import rtnetlink as rt
from natkeep.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_DUMP,
    Netlink,
    attribute,
    attributes,
)
from natkeep.plan.ip_rules import SOURCES
from natkeep.plan.tuples import Address

_PREFSRC, _TABLE = 7, 15
_BY_NATKEEP = 0xC1
_REPLACE = 0x100  # NLM_F_REPLACE
_GONE = frozenset({errno.ESRCH, errno.ENOENT})
_NUMBER = struct.pack("=I", SOURCES)


def add(netlink: Netlink, old: Address) -> None:
    """The route that packets to *old* take, with its source; none where they take none."""
    answer = rt.look_up_route(netlink, old)
    if answer is None or rt.ROUTE.unpack_from(answer)[7] != rt.RTN_UNICAST:
        return
    found = attributes(answer[rt.ROUTE.size :])
    source = found.get(_PREFSRC, b"")
    if source == old.packed:  # OLD is there already, with a route here, unless that was lost
        if _find(netlink, old):
            return
        source = _find_source(netlink, found.get(rt.RTA_OIF, b""))
    if not source or rt.RTA_OIF not in found:
        return
    body = attribute(_PREFSRC, source) + attribute(rt.RTA_OIF, found[rt.RTA_OIF])
    if rt.RTA_GATEWAY in found:
        body += attribute(rt.RTA_GATEWAY, found[rt.RTA_GATEWAY])
    list(netlink.request(rt.NEWROUTE, NLM_F_CREATE | _REPLACE, _pack(old) + body))


def remove(netlink: Netlink, old: Address) -> None:
    """The route to *old* goes; gone is fine."""
    try:
        list(netlink.request(rt.DELROUTE, 0, _pack(old)))
    except OSError as error:
        if error.errno not in _GONE:
            raise


def is_there(netlink: Netlink, old: Address | None) -> bool:
    """Whether there is one, or no way to *old* at all that it could be."""
    return old is None or _find(netlink, old) or not rt.is_reached(netlink, old)


def _find(netlink: Netlink, old: Address) -> bool:
    request = rt.ROUTE.pack(socket.AF_INET6, *[0] * 8)
    for answer in [*netlink.request(rt.GETROUTE, NLM_F_DUMP, request)]:
        found = attributes(answer[rt.ROUTE.size :])
        if found.get(_TABLE) == _NUMBER and found.get(rt.RTA_DST) == old.packed:
            return True
    return False


def _find_source(netlink: Netlink, device: bytes) -> bytes:
    """An address of the device, one that others see as well."""
    for header, found in [*rt.read_addresses(netlink)]:
        packed = rt.local_address(found)
        here = struct.pack("=I", header[4]) == device and len(packed) == 16
        if here and not ipaddress.ip_address(packed).is_link_local:
            return packed
    return b""


def _pack(old: Address) -> bytes:
    header = rt.ROUTE.pack(socket.AF_INET6, 128, 0, 0, 0, _BY_NATKEEP, 0, rt.RTN_UNICAST, 0)
    return header + attribute(rt.RTA_DST, old.packed) + attribute(_TABLE, _NUMBER)
