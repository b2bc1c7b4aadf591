"""Reads the sockets of a namespace: those of kept connections, of listeners, and all.

Rule: read only, from the kernel's own tables of the thread's namespace: /proc/net/tcp and tcp6, and
sock_diag (linux/inet_diag.h) for the list of all, since it shows MPTCP and devices too.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterable, Iterator

from natkeep.kernel.netlink import NLM_F_DUMP, Netlink, attribute
from natkeep.plan.protocols import Protocol
from natkeep.plan.tuples import (
    RECORD_SIZE,
    Address,
    Connections,
    Endpoint,
    FourTuple,
    parse_address,
)

_SYN_RECEIVED, _LISTEN = b"03", b"0A"
_TABLES = (("/proc/thread-self/net/tcp", 4), ("/proc/thread-self/net/tcp6", 6))
_DATAGRAMS = (("/proc/thread-self/net/udp", 4), ("/proc/thread-self/net/udp6", 6))
_ENDED = frozenset({b"06", b"07"})  # TIME-WAIT, CLOSED: no process owns it any more
_CLOSED = frozenset({b"04", b"05", b"09", b"0B"})  # FIN-WAIT-1 and -2, LAST-ACK, CLOSING
_HALF_OPEN = frozenset({b"02", _SYN_RECEIVED})  # SYN-SENT is the other
_NO_INODE = b"0"
_BIND_ADDRESS_NO_PORT = 24  # IP_BIND_ADDRESS_NO_PORT: no port is taken, not even for a moment
_FREEBIND = 15  # IP_FREEBIND
_TIMER, _RETRANSMITS = slice(21, 29), slice(30, 38)
"""Behind the queues, of fixed width: ticks of 10 ms until the retransmission timer's end, and how
often it has ended in a row since an answer."""

Living = dict[bytes, set[bytes]]
"""The sockets' records as plan.tuples packs them, by their local end."""


def find_kept(connections: Connections, living: Living | None = None) -> Connections:
    """Those of *connections* that have a socket in the namespace that the thread is in.

    living: what read_living returned there.
    """
    living = read_living() if living is None else living
    return Connections.joined(_find_alive(connections, living))


def find_alive(connections: Connections, living: Living) -> FourTuple | None:
    """The first of *connections* that has a socket in the namespace that *living* is of."""
    found = _find_alive(connections, living)
    return next((inbound for some in found for inbound in some), None)


def _find_alive(connections: Connections, living: Living) -> Iterator[Connections]:
    # Connections whose local end no socket has are passed over, which often is all of them.
    ends = connections.local_ends() if living else ()
    live: set[bytes] = set().union(*(living.get(end, ()) for end in ends))
    for version in (4, 6) if live else ():
        records, size = connections.records(version), RECORD_SIZE[version]
        starts = range(0, len(records), size)
        yield connections.pick(
            (at // size for at in starts if records[at : at + size] in live), version
        )


def read_living(
    *, orphans: bool = True, half_open: bool = True, unanswered: set[bytes] | None = None
) -> Living:
    """Every TCP socket of the namespace that the thread is in, which a process may own.

    orphans: also those that were closed and have not been acknowledged to the end, which no process
    owns any more. half_open: also those whose handshake has not ended.
    unanswered: takes the records of those that have said the same again for 5 s and more.
    """
    living: Living = {}
    besides = _ENDED if half_open else _ENDED | _HALF_OPEN
    for path, version in _TABLES:
        for record in _records(path, version, besides, unanswered, orphans=orphans):
            living.setdefault(record[: len(record) // 2], set()).add(record)
    return living


def read_datagrams() -> Living:
    """The same of UDP; the peer of a socket without one is all zeros."""
    living: Living = {}
    for path, version in _DATAGRAMS:
        for record in _records(path, version, frozenset(), None, orphans=True):
            living.setdefault(record[: len(record) // 2], set()).add(record)
    return living


def read_sockets(protocol: Protocol) -> Living:
    """Every socket of *protocol*, as read_living or read_datagrams has it."""
    return read_living() if protocol.has_states else read_datagrams()


def find_bound(ends: Iterable[bytes], datagrams: Living) -> frozenset[bytes]:
    """Those of the packed *ends* that a socket of UDP without a peer has, or a wildcard one.

    datagrams: what read_datagrams returned.
    """
    found = set()
    for end in ends:
        wild = (bytes(width) + end[-2:] for width in (4, 16) if width >= len(end) - 2)
        if any(at + bytes(len(at)) in datagrams.get(at, ()) for at in (end, *wild)):
            found.add(end)
    return frozenset(found)


def _records(
    path: str, version: int, besides: frozenset[bytes], unanswered: set[bytes] | None, *,
    orphans: bool,
) -> set[bytes]:  # fmt: skip
    """The sockets' records as plan.tuples packs them; an IPv4-mapped one as IPv4."""
    found: set[bytes] = set()
    for local, peer, state, rest in _rows(path):
        if state in besides:
            continue
        if not orphans and state in _CLOSED and rest.split(None, 6)[5] == _NO_INODE:
            continue
        record = local + peer
        if version == 6 and record[:12] == bytes(10) + b"\xff\xff":
            record = record[12:18] + record[30:36]
        found.add(record)
        if unanswered is not None and _is_unanswered(rest):
            unanswered.add(record)
    return found


def _is_unanswered(rest: bytes) -> bool:
    """Whether a socket has said the same for 5 s; rest: as in _rows.

    The first retransmission comes after 200 ms at least (TCP_RTO_MIN), each later one after twice
    the time: the fourth 3 s after the first segment, the fifth 3.2 s behind it.
    """
    times = int(rest[_RETRANSMITS], 16)
    return times > 4 or (times == 4 and int(rest[_TIMER], 16) <= 120)


def _read_rows(path: str, most: int = -1) -> Iterator[list[bytes]]:
    """The fields (*most* and the rest) of each row of a table below /proc/net, if there is one."""
    try:
        with open(path, "rb") as file:
            rows = file.read().splitlines()[1:]
    except FileNotFoundError:  # a kernel without IPv6
        return
    for row in rows:
        yield row.split(None, most)


def _rows(path: str) -> Iterator[tuple[bytes, bytes, bytes, bytes]]:
    """Local end, peer, state and all behind it of each socket; ends are address and port, packed.

    What follows begins with the queues, sent and received: that of a listener counts the
    connections that wait to be accepted.
    """
    for fields in _read_rows(path, 4):
        yield _endpoint(fields[1]), _endpoint(fields[2]), fields[3], fields[4]


def _endpoint(text: bytes) -> bytes:
    # The address stands there as 32-bit words in the machine's order, the port as a number.
    address, _, port = text.partition(b":")
    raw = bytes.fromhex(address.decode("ascii"))
    if sys.byteorder == "little":
        raw = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
    return raw + socket.htons(int(port, 16)).to_bytes(2, sys.byteorder)


def count_callers(
    ends: frozenset[Endpoint], kept: Iterable[Connections], living: Living | None = None
) -> int:
    """How many sockets have one of *ends* and a peer, and are none of the *kept* ones."""
    living = read_living() if living is None else living
    known = {record for some in kept for record in some.each()}
    called = (end.packed for end in ends)
    here = (record for end in called for record in living.get(end, ()))
    return sum(1 for record in here if any(record[-2:]) and record not in known)


def can_bind(address: Address, device: str | None) -> bool:
    """Whether a socket of this namespace, bound to *device* or to none, could have *address*.

    The kernel is asked, since an address need not be a device's (a local route, ip_nonlocal_bind).
    """
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        try:
            if device is not None:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
            probe.bind((str(address), 0))
        except OSError:
            return False
    return True


def is_taken(end: Endpoint) -> bool:
    """Whether a socket of TCP of this namespace listens at *end*, or has it for itself.

    The kernel is asked, since its tables do not show a socket that is only bound. A connection
    counts, until it is gone, where its server did not share the port (SO_REUSEADDR).
    """
    family = socket.AF_INET if end.address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return _is_in_use(probe, end)


def is_taken_of_udp(end: Endpoint) -> bool:
    """Whether another socket of UDP keeps CRIU from binding one to *end* in this namespace.

    The kernel is asked as CRIU asks it: both kinds of sharing are on, and the address may be
    missing still.
    """
    family = socket.AF_INET if end.address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            probe.setsockopt(socket.SOL_SOCKET, option, 1)
        probe.setsockopt(socket.IPPROTO_IP, _FREEBIND, 1)
        if end.address.version == 6:
            # Whether [::] serves IPv4 as well is not known here.
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        return _is_in_use(probe, end)


def _is_in_use(probe: socket.socket, end: Endpoint) -> bool:
    try:
        probe.bind((str(end.address), end.port))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return False


def listening_ports(address: Address) -> frozenset[int]:
    """TCP ports of the listeners at *address* or at the wildcard address."""
    return frozenset(
        end.port
        for end, _, _ in _local_ends(_LISTEN)
        if end.address == address
        or (end.address.is_unspecified and end.address.version >= address.version)
    )


def find_listeners(olds: frozenset[Address]) -> tuple[Endpoint, ...]:
    """The ends of the listeners at one of *olds* or at a wildcard address, sorted."""
    ends = {end for end, _, _ in _local_ends(_LISTEN)}
    found = (end for end in ends if end.address in olds or end.address.is_unspecified)
    return tuple(sorted(found, key=lambda end: (end.address.version, end)))


def count_waiting(listeners: tuple[Endpoint, ...]) -> dict[Endpoint, int]:
    """Callers of each of *listeners* in a handshake or not accepted yet; none is left out."""
    waiting: dict[Endpoint, int] = {}
    for local, state, queued in _local_ends(_LISTEN, _SYN_RECEIVED):
        number = queued if state == _LISTEN else 1
        for listener in listeners if number else ():
            same = local.address == listener.address
            if local.port == listener.port and (
                same or (state == _SYN_RECEIVED and listener.address.is_unspecified)
            ):
                waiting[listener] = waiting.get(listener, 0) + number
    return waiting


def _local_ends(*states: bytes) -> Iterator[tuple[Endpoint, bytes, int]]:
    """Local end, state and receive queue of each socket in one of *states*."""
    for path, _ in _TABLES:
        for local, _, state, rest in _rows(path):
            if state in states:
                queued = int(rest.partition(b":")[2].split(None, 1)[0], 16)
                port = int.from_bytes(local[-2:], "big")
                yield Endpoint(_address(local[:-2]), port), state, queued


def _address(packed: bytes) -> Address:
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return parse_address(socket.inet_ntop(family, packed))


# ---- every socket, as sock_diag shows it (linux/inet_diag.h) -------------------------------------

_SOCK_DIAG_BY_FAMILY, _NETLINK_SOCK_DIAG = 20, 4
_TCP, _UDP, _MPTCP = 6, 17, 262
_REQUEST = struct.Struct("=BBBxI48x")  # inet_diag_req_v2: family, protocol, extensions, states
# inet_diag_msg, with the device, the receive queue and the inode
_SHOWN = struct.Struct("=BBBB2s2s16s16sI8x4xI8xI")
_REQUEST_PROTOCOL = 3  # INET_DIAG_REQ_PROTOCOL: the protocol, where it does not fit into an octet
_OTHERS = (("udp", _UDP), ("udplite", 136), ("raw", 255), ("icmp", 1))

_End = tuple[Address, int] | None
Shown = tuple[int, int, int, _End, _End, str | None, int]
"""Inode, protocol, TCP state, local end, peer, device, octets of the receive buffer that datagrams
of UDP wait in; an end is None where it has no port."""


def list_sockets() -> list[Shown]:
    """Every inet socket of the namespace that the thread is in, that a descriptor can open."""
    found = {shown[0]: shown for shown in _dump_sockets(_TCP)}
    # One of MPTCP has the inode of its subflows, which TCP shows as well.
    found |= {shown[0]: shown for shown in _dump_sockets(_MPTCP)}
    for name, protocol in _OTHERS:
        # These tables are short, and sock_diag would have a module loaded for each.
        for path in (f"/proc/thread-self/net/{name}", f"/proc/thread-self/net/{name}6"):
            found |= {shown[0]: shown for shown in _read_table(path, protocol)}
    # Devices are shown here alone; without the kernel's udp_diag the tables must do.
    found |= {shown[0]: shown for shown in _dump_sockets(_UDP)}
    return [*found.values()]


def _dump_sockets(protocol: int) -> Iterator[Shown]:
    names = dict(socket.if_nameindex())
    number = protocol.to_bytes(4, sys.byteorder)
    more = b"" if protocol < 256 else attribute(_REQUEST_PROTOCOL, number)
    for family, width in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
        request = _REQUEST.pack(family, min(protocol, 255), 0, 0xFFFFFFFF) + more
        try:
            with Netlink(_NETLINK_SOCK_DIAG) as netlink:
                answers = [*netlink.request(_SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, request)]
        except OSError:
            if protocol == _TCP:
                raise
            continue  # a kernel without this protocol
        for answer in answers:
            _, state, _, _, sport, dport, source, peer, device, queue, inode = _SHOWN.unpack_from(
                answer
            )
            if inode:
                name = names.get(device, str(device)) if device else None
                local, remote = _end(source[:width] + sport), _end(peer[:width] + dport)
                unread = queue if protocol == _UDP else 0
                yield inode, protocol, state, local, remote, name, unread


def _read_table(path: str, protocol: int) -> Iterator[Shown]:
    for fields in _read_rows(path):
        local, peer = (_end(_endpoint(field)) for field in fields[1:3])
        unread = int(fields[4].partition(b":")[2], 16) if protocol == _UDP else 0
        yield int(fields[9]), protocol, 0, local, peer, None, unread


def _end(packed: bytes) -> _End:
    port = int.from_bytes(packed[-2:], "big")
    return (_address(packed[:-2]), port) if port else None
