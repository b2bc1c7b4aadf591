"""Asks the kernel which way a move's packets take at a site: route look-ups, as packets would.

Rule: read only, in the namespace that the calling thread is in; what the answers mean is decided
in plan/path.py. A look-up with an incoming device is answered as a packet from there would be, by
the filter of the reverse path, too.

A look-up takes some 20 us, so of many peers the first are asked about, those of connected networks
before all others: it is a peer on the link that a move cannot keep.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from ipaddress import ip_address

from natkeep.kernel import rtnetlink as rt
from natkeep.kernel import sysctl
from natkeep.kernel.fib_rules import DPORT, MARK, SPORT
from natkeep.kernel.netlink import NETLINK_ROUTE, NLM_F_DUMP, Netlink, attribute, attributes
from natkeep.kernel.once import ask_once
from natkeep.kernel.policy_rules import asks_for, read_rules
from natkeep.plan.path import Route, SourceRule, Way, find_uncopied, network_of
from natkeep.plan.tuples import Address

LIMIT = 256
"""So many peers of a pair of OLD and NEW are looked up."""

Ports = Mapping[Address, tuple[int, int]]
"""Of some peers the port of theirs and the local one, where a policy rule asks for ports."""
Entrances = Mapping[Address, str]
"""The next router of what NEW sends to a peer: by which device it comes in there."""

_RTM_F_FIB_MATCH = 0x2000
_TABLE, _MULTIPATH, _VIA = 15, 9, 18
_GETLINK, _IFNAME, _MTU = 18, 3, 4
_LINK = struct.Struct("=BxHiII")
_ASKED = 0x8 | 0x10 | 0x80  # IFF_LOOPBACK | IFF_POINTOPOINT | IFF_NOARP: nobody is asked for there
_LINKINFO, _BRIDGE = 18, attribute(1, b"bridge\0")[:11]
_OPTIMISTIC, _DADFAILED, _TENTATIVE = 0x04, 0x08, 0x40  # IFA_F_…
_PROTOCOL_KERNEL, _PROTOCOL_RA = 2, 9
_KINDS = {1: "unicast", 2: "local", 3: "broadcast", 6: "blackhole", 7: "unreachable",
          8: "prohibit", 9: "throw"}  # fmt: skip
_REVERSE = frozenset({errno.EXDEV, errno.EINVAL})
"""Answers about a packet that comes in, whose source is no such one: EXDEV before Linux 6.14."""


class _Seen:
    """The links and the addresses of a namespace."""

    def __init__(self, netlink: Netlink) -> None:
        self.names: dict[int, str] = {}
        self.silent: set[int] = set()
        self.mtus: dict[int, int] = {}
        self.local: dict[bytes, int] = {}
        self.networks: list[tuple[int, int, int]] = []
        self.flags: dict[bytes, int] = {}
        self.bridges = False
        for answer in [*netlink.request(_GETLINK, NLM_F_DUMP, _LINK.pack(0, 0, 0, 0, 0))]:
            _, _, index, flags, _ = _LINK.unpack_from(answer)
            found = attributes(answer[_LINK.size :])
            self.names[index] = os.fsdecode(found[_IFNAME].rstrip(b"\0"))
            self.mtus[index] = int.from_bytes(found.get(_MTU, b""), sys.byteorder)
            self.bridges |= _BRIDGE in found.get(_LINKINFO, b"")
            if flags & _ASKED:
                self.silent.add(index)
        for header, found in rt.read_addresses(netlink):
            packed = rt.local_address(found)
            if len(packed) in (4, 16):
                self.local[packed] = header[4]
                flags = found.get(rt.IFA_FLAGS, b"")
                self.flags[packed] = int.from_bytes(flags, sys.byteorder) or header[2]
                self.networks.append((len(packed), *network_of(packed, header[1])))


class Links:
    """The links of the namespace in which this was made, and the routes that packets take there."""

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_ROUTE)
        self._seen = ask_once("links", lambda: _Seen(self._netlink))
        self.bridges = self._seen.bridges

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def state_of(self, address: Address) -> str:
        """`duplicate` or `tentative` (RFC 4862) of an address that cannot be used; else empty."""
        flags = self._seen.flags.get(address.packed, 0)
        if flags & _DADFAILED:
            return "duplicate"
        return "tentative" if flags & _TENTATIVE and not flags & _OPTIMISTIC else ""

    def device_of(self, address: Address) -> int:
        """Index of the device that has *address*; 0 where none, or lo, has it."""
        index = self._seen.local.get(address.packed, 0)
        return 0 if index == rt.LOOPBACK else index

    def home_of(self, address: Address) -> str:
        """Name of the device that has *address*, if hosts are asked for there."""
        index = self.device_of(address)
        return self._seen.names.get(index, "") if index not in self._seen.silent else ""

    def is_local(self, address: Address) -> bool:
        """Whether it is an address of this host."""
        return address.packed in self._seen.local

    def source_rules(self, version: int) -> tuple[SourceRule, ...]:
        """The policy rules that select a source."""
        return read_rules(self._netlink, version)

    def device(self, index: int) -> tuple[int, str]:
        """Index and name of a device."""
        return index, self._seen.names.get(index, "")

    def first(self, peers: Iterable[bytes]) -> list[Address]:
        """At most LIMIT of the packed *peers*, those of connected networks first."""
        some = sorted(peers)
        if len(some) > LIMIT:
            some = sorted(some, key=lambda one: not self._is_near(one))[:LIMIT]
        return [ip_address(one) for one in some]

    def _is_near(self, packed: bytes) -> bool:
        number = int.from_bytes(packed, "big")
        size = len(packed)
        return any(size == width and number & mask == at for width, at, mask in self._seen.networks)

    def enters_by(self, hop: str) -> int:
        """Index of the device here that has the address *hop*; 0 where none has."""
        return self.device_of(ip_address(hop)) if hop and not ip_address(hop).is_link_local else 0

    def look_up(
        self,
        to: Address,
        source: Address | None = None,
        device: int = 0,
        mark: int = 0,
        ports: tuple[int, int] | None = None,
    ) -> tuple[Route, int]:
        """The route of a packet from here, or of one that comes in by *device*; and its index.

        ports: those of its source and destination.
        """
        flags = _RTM_F_FIB_MATCH if not device else 0
        try:
            answer = rt.demand_route(self._netlink, to, flags, mark, source, device, ports)
        except OSError as error:
            return Route("reverse" if device and error.errno in _REVERSE else "none"), 0
        return self._read(answer)

    def _read(self, answer: bytes) -> tuple[Route, int]:
        header, found = rt.ROUTE.unpack_from(answer), attributes(answer[rt.ROUTE.size :])
        index = struct.unpack("=I", found.get(rt.RTA_OIF, bytes(4)))[0]
        gateway = found.get(rt.RTA_GATEWAY, b"")
        via = gateway or found.get(_VIA, b"")[2:]
        hop = str(ip_address(via)) if len(via) in (4, 16) else ""
        connected = header[5] in (_PROTOCOL_KERNEL, _PROTOCOL_RA) and header[1] > 0
        whole = 32 if header[0] == socket.AF_INET else 128
        neighbour = (
            header[7] == rt.RTN_UNICAST
            and not via
            and _MULTIPATH not in found
            and index not in self._seen.silent
            and (connected or header[1] == whole or self._has_own_in(found, header[1], index))
        )
        entry = b"".join(
            found.get(at, b"-")
            for at in (rt.RTA_DST, _TABLE, rt.RTA_OIF, rt.RTA_GATEWAY, _MULTIPATH)
        )
        kind = _KINDS.get(header[7], "none")
        mtu = self._seen.mtus.get(index, 0)
        return Route(kind, self._seen.names.get(index, ""), hop, neighbour, entry, mtu), index

    def _has_own_in(self, found: dict[int, bytes], length: int, index: int) -> bool:
        """Whether the network of a route is that of an address of its device, whoever added it."""
        packed = found.get(rt.RTA_DST, b"")
        to, mask = network_of(packed, length) if packed else (0, 0)
        return any(
            at == index and len(own) == len(packed) and int.from_bytes(own, "big") & mask == to
            for own, at in self._seen.local.items()
        )


def read_local(version: int) -> frozenset[Address]:
    """Every address of this host, of IP *version*."""
    size = 4 if version == 4 else 16
    return frozenset(ip_address(one) for one in rt.all_addresses() if len(one) == size)


def read_ways(addresses: Iterable[bytes]) -> tuple[tuple[Address, Route], ...]:
    """The routes to LIMIT of these packed *addresses* from here."""
    with closing(Links()) as links:
        return tuple((one, links.look_up(one)[0]) for one in links.first(addresses))


def read_at_destination(
    old: Address,
    new: Address,
    peers: Iterable[bytes],
    gateways: frozenset[Address] | None,
    ports: Ports | None = None,
) -> tuple[Way, ...]:
    """The ways to *peers*, without *gateways*: their addresses; None: the next router."""
    with closing(Links()) as links:
        besides = _find_routers(links, old, new) if gateways is None else gateways
        ways = _ways_here(links, old, new, peers, gateways or frozenset(), ports or {})
        return tuple(way for way in ways if way.peer not in besides)


def _find_routers(links: Links, old: Address, new: Address) -> frozenset[Address]:
    """The router by which OLD was reached: it may be the gateway, and a peer as well."""
    route, _ = links.look_up(old, new)
    return frozenset([ip_address(route.hop)]) if route.hop else frozenset()


def _ways_here(
    links: Links,
    old: Address,
    new: Address,
    peers: Iterable[bytes],
    gateways: frozenset[Address],
    ports: Ports,
) -> Iterator[Way]:
    rules = links.source_rules(6) if old.version == 6 else ()
    home = links.home_of(new)
    for peer in links.first(peers):
        coming = ports.get(peer)
        going = coming and coming[::-1]
        out, index = links.look_up(peer, new, ports=going)
        device = links.device_of(new) or index
        there = None
        if out.kind == "unicast" and device:
            there, _ = links.look_up(new, peer, device, ports=coming)
        before = None
        if old.version == 6 and not links.is_local(old) and not find_uncopied(rules, new, old):
            before, _ = links.look_up(peer, old, ports=going)  # by routes that name a source
        known = bool(out.hop) and ip_address(out.hop) in gateways
        apart = home if out.device not in (home, "") and not known else ""  # "": of several
        yield Way(peer, old, new, out, there, before=before, home=apart)


def read_at_gateway(
    old: Address,
    new: Address,
    peers: Iterable[bytes],
    entrances: Entrances | None = None,
    ports: Ports | None = None,
) -> tuple[Way, ...]:
    """The ways of what *peers* and NEW say to each other, as it comes in."""
    ways = []
    with closing(Links()) as links:
        to_old, at_old = links.look_up(old)
        to_new, at_new = links.look_up(new)
        for peer in links.first(peers):
            coming = (ports or {}).get(peer)
            going = coming and coming[::-1]
            out, at_peer = links.look_up(peer)
            there = back = before = None
            if out.kind == "unicast" and to_new.kind == "unicast" and at_peer and at_new:
                entered = links.enters_by((entrances or {}).get(peer, "")) or at_new
                there, _ = links.look_up(new, peer, at_peer, ports=coming)
                back, _ = links.look_up(peer, new, entered, ports=going)
                if to_old.kind == "unicast" and at_old:
                    before, _ = links.look_up(peer, old, at_old, ports=going)
            ways.append(Way(peer, old, new, out, there, back, before, to_old, to_new))
    return tuple(ways)


def read_entrances(new: Address, peers: Iterable[bytes], ports: Ports | None = None) -> Entrances:
    """At a destination, the next router of what NEW sends to each of *peers*; empty for none."""
    with closing(Links()) as links:
        found = {}
        for peer in links.first(peers):
            coming = (ports or {}).get(peer)
            found[peer] = links.look_up(peer, new, ports=coming and coming[::-1])[0].hop
        return found


def read_address_state(address: Address) -> str:
    """As Links.state_of."""
    with closing(Links()) as links:
        return links.state_of(address)


def has_bridge() -> bool:
    """Whether this namespace has a bridge."""
    with closing(Links()) as links:
        return links.bridges


def asks_for_marks(version: int) -> bool:
    """Whether a policy rule of others asks for a packet's mark."""
    with Netlink(NETLINK_ROUTE) as netlink:
        return asks_for(netlink, version, MARK)


def asks_for_ports(version: int) -> bool:
    """Whether one asks for its ports."""
    with Netlink(NETLINK_ROUTE) as netlink:
        return asks_for(netlink, version, SPORT, DPORT)


def read_source_rules(version: int) -> tuple[SourceRule, ...]:
    """The policy rules that select a source."""
    with Netlink(NETLINK_ROUTE) as netlink:
        return read_rules(netlink, version)


def find_not_forwarding(old: Address, new: Address, peers: Iterable[bytes]) -> tuple[str, ...]:
    """Settings that keep this host from passing on what *peers* and NEW say; none: it does."""
    if new.version == 6:
        name = "ipv6/conf/all/forwarding"
        return (f"net.{name.replace('/', '.')}",) if sysctl.read(name) == "0" else ()
    with closing(Links()) as links:
        indexes = {links.look_up(address)[1] for address in (new, *links.first(peers)[:16])}
        devices = [links.device(index)[1] for index in sorted(indexes) if index > rt.LOOPBACK]
    names = [f"ipv4/conf/{device}/forwarding" for device in devices]
    return tuple(f"net.{one.replace('/', '.')}" for one in names if sysctl.read(one) == "0")
