"""The routes and the address that a move stands on: checked for, noted, and put back.

    route to PEER     the route that a packet to it takes, and that to its next hop
    address NEW       at the destination, where the kept connections arrive

Both are there before a move and are not natkeep's; but a link that goes down and up, or a network
manager that wipes what it does not know, takes them away, and the transfer stops.

Rule: only what was noted at prepare comes back, exactly as it was, and only where there is no
route at all any more: another route by now is meant. A teardown undoes nothing of this, since it
was there before. All functions act in the namespace that the calling thread is in.

A note is `KIND,ADDRESS,DEVICE,MESSAGE`, the rtnetlink message in hexadecimal; notes are separated
by blanks.
"""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing
from ipaddress import ip_address

from natkeep.errors import KernelError, RefusedError
from natkeep.kernel import rtnetlink as rt
from natkeep.kernel import sock_diag
from natkeep.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Netlink,
    attribute,
    attributes,
)
from natkeep.plan.move import Site
from natkeep.plan.protocols import UDP
from natkeep.plan.steps import InstallReception, InstallTranslation
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Endpoint

_RTM_F_FIB_MATCH = 0x2000
_RTNH_F_ONLINK = 0x4
_RTPROT_RA = 9
# PREFSRC METRICS TABLE PREF
_NOTED = (rt.RTA_DST, rt.RTA_OIF, rt.RTA_GATEWAY, rt.RTA_PRIORITY, 7, 8, 15, 20)
_NOT_PLAIN = (9, 18, 21, 22, 30)  # MULTIPATH, VIA, ENCAP_TYPE, ENCAP, NH_ID
# MANAGETEMPADDR, MCAUTOJOIN
_IFA_F_SETTABLE = rt.IFA_F_NODAD | rt.IFA_F_NOPREFIXROUTE | 0x100 | 0x400

_LIMIT = 64
"""So many peers of a move are looked up; each costs some 20 us."""

_NOTE = re.compile(r"(address|route),([0-9a-f.:]+),([^\s,/]{1,15}),((?:[0-9a-f]{2})+)")


# ---- before a move -------------------------------------------------------------------------------


def check_destination(step: InstallTranslation) -> None:
    """RefusedError unless NEW is here, no socket of NEW's has a kept tuple, and peers have routes.

    Of the peers of a translation the first 64 are looked up.
    """
    for translation in step.translations:
        _demand_address(step.site, translation.map.new)
        living = sock_diag.read_sockets(translation.protocol)
        _refuse_port_in_use(translation, living)
        # The gateway could not tell the two apart, and ours would take the other's packets.
        if (theirs := sock_diag.find_alive(translation.outer, living)) is not None:
            raise RefusedError(
                f"{step.site}: {theirs} is a connection of that host's own already",
                hint="a kept connection would be the same tuple there: choose another NEW",
            )
        with Netlink(NETLINK_ROUTE) as netlink:
            # By both their addresses: the socket looks up the one, the translated packet the other.
            peers = {*translation.kept.peers(), *translation.outer.peers()}
            for packed in sorted(peers)[:_LIMIT]:
                peer = ip_address(packed)
                if not rt.is_reached(netlink, peer, translation.map.new):
                    raise RefusedError(
                        f"{step.site}: no route to the peer {peer}",
                        hint="a socket cannot be restored without one",
                    )


def _refuse_port_in_use(translation: Translation, living: sock_diag.Living) -> None:
    """A port that the wire is to show for another one has to be free at NEW."""
    end = translation.map.new_end
    if not (translation.map.turns_ports and isinstance(end, Endpoint)):
        return
    if translation.protocol.has_states:
        taken = sock_diag.is_taken(end)
    else:
        taken = bool(sock_diag.find_bound([end.packed], living))
    if taken:
        raise RefusedError(
            f"{translation.site}: a socket there has {end} already",
            hint="name a port of NEW that is free: --map OLD:PORT=NEW:PORT",
        )


def check_reception(step: InstallReception) -> None:
    """RefusedError unless NEW is here and its ports, which will be OLD's listeners, are free."""
    for receiving in step.receptions:
        new = receiving.map.new
        _demand_address(step.site, new)
        if receiving.protocol == UDP:
            ends = {Endpoint(new, port).packed: port for port in receiving.ports_at(new)}
            if bound := sock_diag.find_bound(ends, sock_diag.read_datagrams()):
                raise RefusedError(
                    f"{step.site}: a socket has {new} port {ends[min(bound)]} of UDP already",
                    hint="it would lose its datagrams to the one that is moved",
                )
            continue
        if taken := sock_diag.listening_ports(new).intersection(receiving.ports_at(new)):
            raise RefusedError(
                f"{step.site}: a socket listens at {new} port {min(taken)} already",
                hint="without --listeners their connections stay apart",
            )


def _demand_address(site: Site, new: Address) -> None:
    if rt.device_of(new) is None:
        raise RefusedError(
            f"{site}: NEW {new} is not an address of this namespace",
            hint="run it on the host that has it, or say what this one is: --site gateway, relay, "
            "peer or source; a namespace here: --site destination=NETNS",
        )


# ---- noted ---------------------------------------------------------------------------------------


def note(own: Iterable[Address], others: Iterable[Address]) -> str:
    """The addresses *own*, and the routes to *others*; what cannot be noted is left out."""
    notes: dict[str, str] = {}
    with Netlink(NETLINK_ROUTE) as netlink:
        wanted = {address.packed: address for address in own}
        for header, found in rt.read_addresses(netlink) if wanted else ():
            address = wanted.get(rt.local_address(found))
            if address is not None:
                message = _pack_address(header, found)
                notes[message.hex()] = f"address,{address},{rt.device_name(header[4])}"
        hops: set[Address] = set()
        for address in [*dict.fromkeys(others)][:_LIMIT]:
            for towards, device, message in _find_route(netlink, address, hops):
                notes.setdefault(message.hex(), f"route,{towards},{device}")
    return " ".join(f"{named},{message}" for message, named in notes.items())


def _pack_address(header: tuple[int, ...], found: dict[int, bytes]) -> bytes:
    family, length, _, scope, index = header
    flags = struct.unpack("=I", found.get(rt.IFA_FLAGS, bytes(4)))[0] & _IFA_F_SETTABLE
    if family == socket.AF_INET6:
        flags |= rt.IFA_F_NODAD  # it was checked when it was given, and must be there at once
    body = rt.ADDRESS.pack(family, length, 0, scope, index)
    for type_ in (rt.IFA_ADDRESS, rt.IFA_LOCAL, rt.IFA_LABEL, rt.IFA_BROADCAST):
        if type_ in found:
            body += attribute(type_, found[type_])
    return body + attribute(rt.IFA_FLAGS, struct.pack("=I", flags))


def _find_route(
    netlink: Netlink, address: Address, hops: set[Address]
) -> Iterator[tuple[Address, str, bytes]]:
    """The route to *address*, behind the one to its next hop; none where it is not a plain one.

    hops: next hops that have been looked up already, which mostly is one for all.
    """
    answer = rt.look_up_route(netlink, address, _RTM_F_FIB_MATCH)
    if answer is None:
        return
    header, found = rt.ROUTE.unpack_from(answer), attributes(answer[rt.ROUTE.size :])
    plain = header[7] == rt.RTN_UNICAST and header[5] != _RTPROT_RA and rt.RTA_OIF in found
    if not plain or any(type_ in found for type_ in _NOT_PLAIN):
        return
    if rt.RTA_GATEWAY in found and not header[8] & _RTNH_F_ONLINK:
        hop = ip_address(found[rt.RTA_GATEWAY])
        # A link-local next hop is reached by the device alone.
        if hop not in hops and hop != address and not hop.is_link_local:
            hops.add(hop)
            yield from _find_route(netlink, hop, hops)
    body = rt.ROUTE.pack(*header[:8], header[8] & _RTNH_F_ONLINK)
    body += b"".join(attribute(type_, found[type_]) for type_ in _NOTED if type_ in found)
    yield address, rt.device_name(struct.unpack("=I", found[rt.RTA_OIF])[0]), body


# ---- lost, and put back --------------------------------------------------------------------------


def find_lost(notes: str) -> tuple[str, ...]:
    """Those of *notes* that do not hold any more, in their order."""
    with closing(Routes()) as routes:
        return routes.find_lost(notes)


class Routes:
    """Addresses and routes of the namespace in which this was made, each looked up once."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_ROUTE)
        self._local: frozenset[bytes] | None = None
        self._known: dict[str, bool] = {}

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def find_lost(self, notes: str) -> tuple[str, ...]:
        """Those of *notes* that do not hold any more, in their order."""
        for text in notes.split():
            for kind, address, *_ in () if text in self._known else _parse(text):
                self._known[text] = self._holds(kind, address)
        return tuple(text for text in notes.split() if not self._known.get(text, True))

    def _holds(self, kind: str, address: Address) -> bool:
        if kind != "address":
            return rt.is_reached(self._netlink, address)
        if self._local is None:
            found = rt.read_addresses(self._netlink)
            self._local = frozenset(rt.local_address(one) for _, one in found)
        return address.packed in self._local


def put_back(notes: Iterable[str]) -> None:
    """Make what *notes* say; KernelError when its device is gone or down."""
    with Netlink(NETLINK_ROUTE) as netlink:
        for kind, address, device, message in _parse(" ".join(notes)):
            if _device_in(kind, message) != device:
                raise KernelError(f"{kind} {address}: the device {device} is not what it was")
            type_ = rt.NEWADDR if kind == "address" else rt.NEWROUTE
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


def _device_in(kind: str, message: bytes) -> str:
    if kind == "address":
        return rt.device_name(rt.ADDRESS.unpack_from(message)[4])
    index = attributes(message[rt.ROUTE.size :])[rt.RTA_OIF]
    return rt.device_name(struct.unpack("=I", index)[0])
