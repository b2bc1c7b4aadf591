"""the ways: the routes and the address of others that a move stands on, noted and put back.

    way to PEER       the route that a packet to it takes, and that to its next hop
    address NEW       at the destination, where the kept connections arrive

Both are there before a move and are not natkeep's; but a link that goes down and up, or a network
manager that wipes what it does not know, takes them away, and the transfer stops.

Rule: only what was noted at prepare comes back, exactly as it was, and only where there is no way
at all any more: whoever routes otherwise by now is right. Nothing here is undone by a teardown,
since it was there before. All functions act in the namespace that the calling thread is in.

A note is `KIND,ADDRESS,DEVICE,MESSAGE`, the rtnetlink message in hexadecimal; notes are separated
by blanks. Numbers are from linux/rtnetlink.h and linux/if_addr.h.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from ipaddress import ip_address

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

_NEWADDR, _GETADDR, _NEWROUTE, _GETROUTE = 20, 22, 24, 26
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, lengths, tos, table, protocol, scope, type, flags
_ADDRESS = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

_FIB_MATCH = 0x2000
_ONLINK = 0x4
_UNICAST, _FROM_RA = 1, 9
_DST, _OIF, _GATEWAY, _TABLE = 1, 4, 5, 15
_KEPT = (_DST, _OIF, _GATEWAY, 6, 7, 8, _TABLE, 20)  # and PRIORITY, PREFSRC, METRICS, PREF
_OTHER_FORMS = (9, 18, 21, 22, 30)  # MULTIPATH, VIA, ENCAP_TYPE, ENCAP, NH_ID
_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_BROADCAST, _IFA_FLAGS = 1, 2, 3, 4, 8
_NODAD = 0x02
_SETTABLE = _NODAD | 0x100 | 0x200 | 0x400  # MANAGETEMPADDR, NOPREFIXROUTE, MCAUTOJOIN

_LIMIT = 64
"""So many peers are looked up for a move; each costs some 20 us."""

_NOTE = re.compile(r"(address|route),([0-9a-f.:]+),([^\s,/]{1,15}),((?:[0-9a-f]{2})+)")


def note(own: Iterable[Address], others: Iterable[Address]) -> str:
    """The addresses *own*, and the ways to *others*; what cannot be noted is left out."""
    notes: dict[str, str] = {}
    with Netlink(NETLINK_ROUTE) as netlink:
        wanted = {address.packed: address for address in own}
        for header, found in _read_addresses(netlink) if wanted else ():
            address = wanted.get(found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS) or b"")
            if address is not None:
                message = _pack_address(header, found)
                notes[message.hex()] = f"address,{address},{_name(header[4])}"
        hops: set[Address] = set()
        for address in [*dict.fromkeys(others)][:_LIMIT]:
            for towards, device, message in _find_way(netlink, address, hops):
                notes.setdefault(message.hex(), f"route,{towards},{device}")
    return " ".join(f"{said},{message}" for message, said in notes.items())


def find_lost(notes: str) -> tuple[str, ...]:
    """Those of *notes* that do not hold any more, in their order."""
    with Ways() as ways:
        return ways.find_lost(notes)


class Ways:
    """The ways of the namespace in which this was made, each looked at once."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_ROUTE)
        self._local: set[bytes] | None = None
        self._known: dict[str, bool] = {}

    def __enter__(self) -> Ways:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the socket."""
        self._netlink.close()

    def find_lost(self, notes: str) -> tuple[str, ...]:
        """Those of *notes* that do not hold any more, in their order."""
        for text in notes.split():
            for kind, address, *_ in () if text in self._known else _parse(text):
                self._known[text] = self._holds(kind, address)
        return tuple(text for text in notes.split() if not self._known.get(text, True))

    def _holds(self, kind: str, address: Address) -> bool:
        if kind != "address":
            return _is_reached(self._netlink, address)
        if self._local is None:
            answers = (found for _, found in _read_addresses(self._netlink))
            self._local = {f.get(_IFA_LOCAL) or f.get(_IFA_ADDRESS) or b"" for f in answers}
        return address.packed in self._local


def put_back(notes: Iterable[str]) -> None:
    """Make what *notes* say; KernelError when its device is gone or down."""
    with Netlink(NETLINK_ROUTE) as netlink:
        for kind, address, device, message in _parse(" ".join(notes)):
            if _device_in(kind, message) != device:
                raise KernelError(f"{kind} {address}: the device {device} is not what it was")
            type_ = _NEWADDR if kind == "address" else _NEWROUTE
            try:
                list(netlink.request(type_, NLM_F_CREATE | NLM_F_EXCL, message))
            except FileExistsError:  # with its address a device's own route comes back, too
                continue
            except OSError as error:
                raise KernelError(
                    f"{kind} {address} on {device}: {os.strerror(error.errno or 0)}",
                    hint=f"is {device} up?",
                ) from error


def _parse(notes: str) -> Iterator[tuple[str, Address, str, bytes]]:
    for text in notes.split():
        match = _NOTE.fullmatch(text)
        if match:
            kind, address, device, message = match.groups()
            yield kind, ip_address(address), device, bytes.fromhex(message)


def _read_addresses(
    netlink: Netlink,
) -> Iterator[tuple[tuple[int, ...], dict[int, bytes]]]:
    for answer in [*netlink.request(_GETADDR, NLM_F_DUMP, _ADDRESS.pack(0, 0, 0, 0, 0))]:
        yield _ADDRESS.unpack_from(answer), attributes(answer[_ADDRESS.size :])


def _pack_address(header: tuple[int, ...], found: dict[int, bytes]) -> bytes:
    family, length, _, scope, index = header
    flags = struct.unpack("=I", found.get(_IFA_FLAGS, bytes(4)))[0] & _SETTABLE
    if family == socket.AF_INET6:
        flags |= _NODAD  # it was checked when it was given, and must be there at once
    body = _ADDRESS.pack(family, length, 0, scope, index)
    for type_ in (_IFA_ADDRESS, _IFA_LOCAL, _IFA_LABEL, _IFA_BROADCAST):
        if type_ in found:
            body += attribute(type_, found[type_])
    return body + attribute(_IFA_FLAGS, struct.pack("=I", flags))


def _find_way(
    netlink: Netlink, address: Address, hops: set[Address]
) -> Iterator[tuple[Address, str, bytes]]:
    """The route to *address*, behind the one to its next hop; none where it is not a plain one.

    hops: next hops that have been asked about already, which mostly is one for all.
    """
    answer = _look_up(netlink, address, _FIB_MATCH)
    if answer is None:
        return
    header, found = _ROUTE.unpack_from(answer), attributes(answer[_ROUTE.size :])
    if header[7] != _UNICAST or header[5] == _FROM_RA or any(t in found for t in _OTHER_FORMS):
        return
    if _OIF not in found:
        return
    if _GATEWAY in found and not header[8] & _ONLINK:
        hop = ip_address(found[_GATEWAY])
        if hop.is_link_local or hop == address:
            pass  # by the device alone
        elif hop not in hops:
            hops.add(hop)
            yield from _find_way(netlink, hop, hops)
    body = _ROUTE.pack(*header[:8], header[8] & _ONLINK)
    body += b"".join(attribute(type_, found[type_]) for type_ in _KEPT if type_ in found)
    yield address, _name(struct.unpack("=I", found[_OIF])[0]), body


def _look_up(netlink: Netlink, address: Address, flags: int = 0) -> bytes | None:
    family = _FAMILY[address.version]
    body = _ROUTE.pack(family, address.max_prefixlen, 0, 0, 0, 0, 0, 0, flags)
    try:
        answers = list(netlink.request(_GETROUTE, 0, body + attribute(_DST, address.packed)))
    except OSError as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
            return None
        raise
    return answers[0] if answers else None


def _is_reached(netlink: Netlink, address: Address) -> bool:
    answer = _look_up(netlink, address)
    return answer is not None and _ROUTE.unpack_from(answer)[7] in (_UNICAST, 2)


def _device_in(kind: str, message: bytes) -> str:
    if kind == "address":
        return _name(_ADDRESS.unpack_from(message)[4])
    return _name(struct.unpack("=I", attributes(message[_ROUTE.size :])[_OIF])[0])


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""
