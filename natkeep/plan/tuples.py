"""the addresses: endpoints, four-tuples and packed columns of connections.

Rule: everything that says *which* packets belong to a connection is a value from this file.
Addresses are `ipaddress` objects, ports plain integers 1 to 65535, and an IPv4-mapped IPv6
address is the IPv4 address that is on the wire.
This file must never read a file, a clock, a socket or a namespace.

Theory of operation. A person works with `FourTuple`; the kernel is given 100,000 connections
at once, where an object each would cost seconds. So `Connections` holds fixed-size records
in two byte strings, and makes objects only while it is iterated over:

    IPv4: local address (4) local port (2) peer address (4)  peer port (2)   = 12 octets
    IPv6: local address (16) local port (2) peer address (16) peer port (2)  = 36 octets

All of it is in network byte order, as it stands in a packet.
"""

from __future__ import annotations

import ipaddress
import struct
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache

from natkeep.values import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

RECORD_SIZE = {4: 12, 6: 36}
_ADDRESS_SIZE = {4: 4, 6: 16}


def parse_address(text: str) -> Address:
    """The address that *text* names, IPv4-mapped ones as IPv4.

    ValueError when it is no address; a zone (`fe80::1%eth0`) is refused too, since CRIU
    restores sockets without their scope.
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id is not None:
            raise ValueError(f"{text!r} has a zone")
        return address.ipv4_mapped or address
    return address


def refuse_zone(address: Address) -> None:
    """ValueError for an address with a zone: it is a free string, and would be printed with it."""
    if address.version == 6 and address.scope_id is not None:
        raise ValueError(f"{str(address)!r} has a zone")


@dataclass(frozen=True, slots=True, order=True)
class Endpoint:
    """An address and a port; prints as `10.2.0.10:80` or `[fd00:2::10]:80`."""

    address: Address
    port: int

    def __post_init__(self) -> None:
        if not 1 <= self.port <= 65535:
            raise ValueError(f"{self.port} is not a port (1 to 65535)")
        refuse_zone(self.address)

    def __str__(self) -> str:
        if self.address.version == 6:
            return f"[{self.address}]:{self.port}"
        return f"{self.address}:{self.port}"

    @property
    def packed(self) -> bytes:
        """Both, in network byte order."""
        return self.address.packed + self.port.to_bytes(2, "big")

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """`10.2.0.10:80` or `[fd00:2::10]:80`; ValueError with a reason otherwise."""
        host, colon, port = text.rpartition(":")
        if not colon:
            raise ValueError(f"{text!r} has no port")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(f"{text!r}: write IPv6 as [address]:port")
        number = parse_port(port)
        return cls(parse_address(host), number)


Local = Address | Endpoint
"""An address with all its ports, or one port of it."""


def parse_port(text: str) -> int:
    """The number that *text* is; ValueError where it is none. An Endpoint looks at its range."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is not a port (1 to 65535)")
    return int(text)


def parse_local(text: str) -> Local:
    """`10.2.0.10`, `10.2.0.10:80`, `fd00:2::10` or `[fd00:2::10]:80`; ValueError otherwise."""
    host, colon, _ = text.rpartition(":")
    has_port = colon and (host.endswith("]") or ":" not in host)
    return Endpoint.parse(text) if has_port else parse_address(text)


def address_of(local: Local) -> Address:
    """Without its port."""
    return local.address if isinstance(local, Endpoint) else local


def is_at(end: Endpoint, locals_: Collection[Local]) -> bool:
    """Whether one of *locals_* is the end itself, or all of its address."""
    return end.address in locals_ or end in locals_


@dataclass(frozen=True, slots=True, order=True)
class FourTuple:
    """Source and destination endpoint of one direction of a TCP connection."""

    source: Endpoint
    destination: Endpoint

    def __post_init__(self) -> None:
        if self.source.address.version != self.destination.address.version:
            raise ValueError(f"{self.source} and {self.destination} are of different families")

    def __str__(self) -> str:
        return f"{self.source} > {self.destination}"

    def reply(self) -> FourTuple:
        """The same connection, seen from the other direction."""
        return FourTuple(self.destination, self.source)


@dataclass(frozen=True, slots=True)
class Connections:
    """Connections of one process, packed (see the top of this file).

    Iterating yields the four-tuple *peer to process* of each, in the order in which they were
    given, IPv4 before IPv6.
    """

    v4: bytes = b""
    v6: bytes = b""

    def __post_init__(self) -> None:
        if len(self.v4) % RECORD_SIZE[4] or len(self.v6) % RECORD_SIZE[6]:
            raise ValueError("packed connections end in the middle of a record")

    def __len__(self) -> int:
        return len(self.v4) // RECORD_SIZE[4] + len(self.v6) // RECORD_SIZE[6]

    def __iter__(self) -> Iterator[FourTuple]:
        for local4, lport, peer4, pport in struct.iter_unpack("!4sH4sH", self.v4):
            yield _inbound(peer4, pport, local4, lport)
        for local6, lport, peer6, pport in struct.iter_unpack("!16sH16sH", self.v6):
            yield _inbound(peer6, pport, local6, lport)

    @classmethod
    def of(cls, inbound: Iterable[FourTuple]) -> Connections:
        """Pack four-tuples that run *from the peer to the process*."""
        packed = {4: bytearray(), 6: bytearray()}
        for tuple_ in inbound:
            local, peer = tuple_.destination, tuple_.source
            packed[local.address.version] += (
                local.address.packed
                + local.port.to_bytes(2, "big")
                + peer.address.packed
                + peer.port.to_bytes(2, "big")
            )
        return cls(bytes(packed[4]), bytes(packed[6]))

    @classmethod
    def of_records(cls, records: Iterable[bytes]) -> Connections:
        """What these packed records say, each of its own IP version, which its length tells."""
        some = [*records]
        v4, v6 = (b"".join([r for r in some if len(r) == size]) for size in RECORD_SIZE.values())
        return cls(v4, v6)

    @classmethod
    def joined(cls, some: Iterable[Connections]) -> Connections:
        """All of these, one behind the other."""
        every = [*some]
        return cls(b"".join([one.v4 for one in every]), b"".join([one.v6 for one in every]))

    def records(self, version: int) -> bytes:
        """The packed records of IP *version* 4 or 6."""
        return self.v4 if version == 4 else self.v6

    def at(self, local: Local) -> Connections:
        """Those of the connections whose local end is *local*: an address, or one port of it."""
        version, wanted = address_of(local).version, local.packed
        records, size = self.records(version), RECORD_SIZE[version]
        count = len(records) // size
        # The usual case, one local address for all, is decided by columns instead of records.
        if not all(records[i::size] == wanted[i : i + 1] * count for i in range(len(wanted))):
            records = b"".join(
                records[i : i + size]
                for i in range(0, len(records), size)
                if records[i : i + len(wanted)] == wanted
            )
        return _of_version(version, records)

    @classmethod
    def packed(cls, records: bytes, version: int) -> Connections:
        """What *records* of IP *version* say."""
        return _of_version(version, records)

    def each(self) -> Iterator[bytes]:
        """The packed record of each connection, IPv4 before IPv6."""
        for version in (4, 6):
            for (record,) in struct.iter_unpack(f"{RECORD_SIZE[version]}s", self.records(version)):
                yield record

    def texts(self) -> Iterator[tuple[str, str]]:
        """Local end and peer of each connection, as an Endpoint prints them."""
        for local, port, peer, peer_port in struct.iter_unpack("!4sH4sH", self.v4):
            yield f"{_write(local)}:{port}", f"{_write(peer)}:{peer_port}"
        for local, port, peer, peer_port in struct.iter_unpack("!16sH16sH", self.v6):
            yield f"[{_write(local)}]:{port}", f"[{_write(peer)}]:{peer_port}"

    def peers(self) -> frozenset[bytes]:
        """The addresses of all peers, packed, each once."""
        v6 = (peer for (peer,) in struct.iter_unpack("18x16s2x", self.v6))
        return frozenset([*_distinct_words(self._peer_column(4)), *v6])

    def may_have_peer(self, addresses: Iterable[bytes]) -> bool:
        """Whether one of the packed *addresses* could be a peer's; a no is certain."""
        columns = {4: self._peer_column(4), 16: self._peer_column(6)}
        return any(packed in columns[len(packed)] for packed in addresses)

    def may_be_with_themselves(self) -> bool:
        """Whether the other end of one could be another's own; a no is certain."""
        ours6 = {local for (local,) in struct.iter_unpack("16s20x", self.v6)}
        return self.may_have_peer([*_distinct_words(self._column(4, 0)), *ours6])

    def _peer_column(self, version: int) -> bytes:
        """The peers' addresses of IP *version*, one behind the other."""
        return self._column(version, _ADDRESS_SIZE[version] + 2)

    def _column(self, version: int, at: int) -> bytes:
        """Of IP *version* the addresses that stand *at* octets into each record."""
        records, size, width = self.records(version), RECORD_SIZE[version], _ADDRESS_SIZE[version]
        values = bytearray(len(records) // size * width)
        for i in range(width):
            values[i::width] = records[at + i :: size]
        return bytes(values)

    def minus(self, others: Connections) -> Connections:
        """Those that are none of *others*, in the same order."""
        if not len(others):
            return self
        known = frozenset(others.each())
        return Connections.of_records(r for r in self.each() if r not in known)

    def only(self, wanted: Collection[bytes]) -> Connections:
        """Those whose packed record is *wanted*, in the same order."""
        return Connections.of_records(r for r in self.each() if r in wanted)

    def local_ends(self) -> frozenset[bytes]:
        """Local address and port of all connections, packed, each once."""
        return frozenset(
            [end for (end,) in struct.iter_unpack("6s6x", self.v4)]
            + [end for (end,) in struct.iter_unpack("18s18x", self.v6)]
        )

    def has_special_peer(self) -> bool:
        """Whether a peer's first octet is one that no ordinary unicast address begins with.

        Loopback, unspecified, link-local and multicast are among those, of either family;
        IPv4's 169 is as well, so a yes means only that it is worth a closer look.
        """
        firsts4 = set(self.v4[6 :: RECORD_SIZE[4]])
        firsts6 = set(self.v6[18 :: RECORD_SIZE[6]])
        return bool(
            any(first in (0, 127, 169) or first >= 224 for first in firsts4)
            or any(first in (0, 0xFE, 0xFF) for first in firsts6)
        )

    def toward(self, local: Local) -> Connections:
        """The same peers, with *local* as the local address (of the same family), or end."""
        version = address_of(local).version
        records, size = bytearray(self.records(version)), RECORD_SIZE[version]
        count = len(records) // size
        for i, octet in enumerate(local.packed):
            records[i::size] = bytes((octet,)) * count
        return _of_version(version, bytes(records))

    def with_peers(self, peers: Collection[bytes], *, without: bool = False) -> Connections:
        """Those whose peers have one of these addresses, packed; or the others."""
        return Connections.of_records(
            one for one in self.each() if (one[len(one) // 2 : -2] in peers) != without
        )

    def rename_peers(self, names: Mapping[bytes, bytes]) -> Connections:
        """The same with the peers that *names* has, packed, replaced by its others.

        names: of addresses, or of ends, which go before the addresses.
        """
        addresses = {name[: _ADDRESS_SIZE[4 if len(name) < 16 else 6]] for name in names}
        if not self.may_have_peer(addresses):
            return self

        def rename(one: bytes) -> bytes:
            half = len(one) // 2
            end, address = one[half:], one[half:-2]
            return one[:half] + (names.get(end) or names.get(address, address) + end[-2:])

        return Connections.of_records(map(rename, self.each()))

    def turned(self) -> Connections:
        """The same connections as their other end sees them: local and peer exchanged."""
        sides = []
        for version in (4, 6):
            half, records = RECORD_SIZE[version] // 2, self.records(version)
            starts = range(0, len(records), 2 * half)
            ends = (records[i + half : i + 2 * half] + records[i : i + half] for i in starts)
            sides.append(b"".join(ends))
        return Connections(*sides)

    def pick(self, indexes: Iterable[int], version: int) -> Connections:
        """Those of IP *version* that stand at *indexes*."""
        records, size = self.records(version), RECORD_SIZE[version]
        return _of_version(version, b"".join(records[i * size : (i + 1) * size] for i in indexes))


NO_CONNECTIONS = Connections()


@lru_cache(maxsize=4)  # a move asks for the peers of its connections several times
def _distinct_words(column: bytes) -> frozenset[bytes]:
    """The groups of four octets in *column*, each once; as numbers it takes a quarter."""
    # The last octet shall be a number's lowest, or those of one network are all hashed alike.
    ordered = column[::-1] if sys.byteorder == "little" else column
    words = set(memoryview(ordered).cast("I").tolist())
    return frozenset(word.to_bytes(4, "big") for word in words)


@lru_cache(maxsize=1 << 16)
def _write(packed: bytes) -> str:
    return str(ipaddress.ip_address(packed))


def _of_version(version: int, records: bytes) -> Connections:
    return Connections(records, b"") if version == 4 else Connections(b"", records)


def _inbound(peer: bytes, peer_port: int, local: bytes, local_port: int) -> FourTuple:
    make = ipaddress.IPv4Address if len(peer) == 4 else ipaddress.IPv6Address
    return FourTuple(Endpoint(make(peer), peer_port), Endpoint(make(local), local_port))
