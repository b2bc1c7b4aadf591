"""Asks the links of a host whether another one has an address: by ARP, or neighbour discovery.

The kernel itself is told to resolve it (an entry of its neighbour table, NTF_USE), which takes no
privilege but CAP_NET_ADMIN, and works whatever the routes are.

Rule: an entry that was made for the question goes again; one that an operator has put there stays,
and is no answer. All functions act in the namespace that the calling thread is in. Numbers are from
linux/neighbour.h.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from contextlib import suppress

from natkeep.kernel import rtnetlink as rt
from natkeep.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    Netlink,
    attribute,
    attributes,
)
from natkeep.plan.tuples import Address

_NEWNEIGH, _DELNEIGH, _GETNEIGH = 28, 29, 30
_NDMSG = struct.Struct("=BxxxiHBx")  # family, device, state, flags
_DST, _LLADDR = 1, 2
_USE = 0x01
_REACHABLE, _STATIC = 0x02, 0xC0  # NOARP, PERMANENT

_PATIENCE = 0.07
"""Seconds that an answer may take; on a link it takes a thousandth of that."""
_TIMES = 3
"""How often is asked: one question may be lost, and the kernel itself repeats it after a second."""


def find_owner(address: Address, *others: Address) -> str:
    """Device and link-layer address of another host that has *address*; empty where none answers.

    Asked are the links of the route to *address*, and of the local addresses *others*. A router
    that answers for all that it routes to has it not.
    """
    with Netlink(NETLINK_ROUTE) as netlink:
        routers: dict[int, bytes] = {}
        answer = rt.look_up_route(netlink, address)
        if answer is not None:
            found = attributes(answer[rt.ROUTE.size :])
            router = found.get(rt.RTA_GATEWAY, b"")
            if rt.RTA_OIF in found:
                routers[int.from_bytes(found[rt.RTA_OIF], sys.byteorder)] = router
        for header, found in [*rt.read_addresses(netlink)]:
            if rt.local_address(found) in {other.packed for other in others}:
                routers.setdefault(header[4], b"")
        for device, router in routers.items():
            if device == rt.LOOPBACK:
                continue
            has_it = _resolve(netlink, device, address.packed)
            if has_it and (not router or _resolve(netlink, device, router) != has_it):
                return f"{has_it.hex(':')} on {rt.device_name(device)}"
    return ""


def _resolve(netlink: Netlink, device: int, packed: bytes) -> bytes:
    """The link-layer address of *packed*, asked for anew; empty where there is no answer."""
    named = attribute(_DST, packed)
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    if _look_up(netlink, family, device, named)[0] & _STATIC:
        return b""
    asked = (_ask_once(netlink, family, device, named) for _ in range(_TIMES))
    return next((known for known in asked if known), b"")


def _ask_once(netlink: Netlink, family: int, device: int, named: bytes) -> bytes:
    # One that is known from before would not be asked for.
    _forget(netlink, family, device, named)
    asking = _NDMSG.pack(family, device, 0, _USE) + named
    state, known = 0, b""
    try:
        list(netlink.request(_NEWNEIGH, NLM_F_CREATE, asking))
        deadline = time.monotonic() + _PATIENCE
        while not state & _REACHABLE and time.monotonic() < deadline:
            time.sleep(0.002)
            state, known = _look_up(netlink, family, device, named)
    except OSError:  # a device that has no neighbours, or is down
        return b""
    finally:
        _forget(netlink, family, device, named)
    return known if state & _REACHABLE else b""


def _look_up(netlink: Netlink, family: int, device: int, named: bytes) -> tuple[int, bytes]:
    """State and link-layer address of an entry; 0 and nothing where there is none."""
    try:
        [answer] = netlink.request(_GETNEIGH, 0, _NDMSG.pack(family, device, 0, 0) + named)
    except OSError:
        return 0, b""
    found = attributes(answer[_NDMSG.size :])
    return _NDMSG.unpack_from(answer)[2], found.get(_LLADDR, b"")


def _forget(netlink: Netlink, family: int, device: int, named: bytes) -> None:
    with suppress(OSError):
        list(netlink.request(_DELNEIGH, 0, _NDMSG.pack(family, device, 0, 0) + named))
