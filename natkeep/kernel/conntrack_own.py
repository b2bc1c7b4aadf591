"""Finds the entries that a site has of the kept connections, in every zone, before it is prepared.

Rule: read only, in the namespace of the calling thread. What the entries mean is decided in plan/:
which connections the site translates already (`find_carried`), what their entries say that has to
be said by those made in their place (`find_noted`), and which come back in the end
(`read_directions`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from natkeep.errors import RefusedError
from natkeep.kernel import nftables_dump, sysctl
from natkeep.kernel.conntrack_dump import (
    LOOK_UP,
    WALK,
    ask_each,
    count_tracked,
    dump,
    is_dump_cheaper,
)
from natkeep.kernel.conntrack_zones import find_zones
from natkeep.kernel.ctnetlink import (
    TUPLE_ORIG,
    TUPLE_REPLY,
    ask_for,
    ask_for_tcp_from,
    pack_inbound,
    pack_outbound,
    pack_zone,
    read_status,
    read_tuples,
    turn,
)
from natkeep.kernel.ctnetlink_answers import read_attributes
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink
from natkeep.kernel.once import ask_once
from natkeep.plan.conntrack import NOT_TRACKED, PEER_DIALLED, PROCESS_DIALLED
from natkeep.plan.entry_attributes import USUAL, Attributes, Noted
from natkeep.plan.move import Site
from natkeep.plan.nft import TABLE
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import RECORD_SIZE, Connections, FourTuple

_IPS_OFFLOAD = 0xC000
"""IPS_OFFLOAD and IPS_HW_OFFLOAD."""


class Own(NamedTuple):
    """An entry: the kept connection's record, its tuples (as records, source first), the answer."""

    record: bytes
    original: bytes
    reply: bytes
    answer: bytes

    def direction(self) -> str:
        """Which way it was dialled; NOT_TRACKED where a translation of natkeep's has made it."""
        if self.original == self.record:
            return PROCESS_DIALLED
        return PEER_DIALLED if self.reply == self.record else NOT_TRACKED


def find_own(
    connections: Connections, *, rare: bool = False, protocol: Protocol = TCP
) -> Iterator[Own]:
    """The entries that have the tuple of one of *connections*, in any zone.

    They have one local address. One that is asked for is found if it is there; a dump, which may
    miss one, is for tables with few entries, or of which few are wanted (rare: at a destination,
    for which `make bench` knows no look: the kernel picks those of the local address).
    """
    absent = ask_once("absent", frozenset[bytes])
    if not (protocol is TCP and absent and absent.issuperset(connections.each())):
        yield from _find_own(connections, rare=rare, protocol=protocol)


def _find_own(
    connections: Connections, *, rare: bool = False, protocol: Protocol = TCP
) -> Iterator[Own]:
    tracked = count_tracked()
    if not len(connections) or tracked == 0:
        return
    version = 4 if connections.v4 else 6
    with Netlink(NETLINK_NETFILTER) as netlink:
        zones = find_zones(netlink, tracked)
        looks = LOOK_UP * len(zones) * len(connections)
        if tracked is not None and is_dump_cheaper(looks, tracked):
            wanted = frozenset(connections.each())
            yield from _pick(dump(ask_for(protocol, version)), wanted, protocol)
            return
        if rare and version == 4 and looks > 2 * WALK and protocol is TCP:
            wanted, local = frozenset(connections.each()), connections.v4[:4]
            for type_ in (TUPLE_ORIG, TUPLE_REPLY):
                yield from _pick(dump(ask_for_tcp_from(local, type_)), wanted)
            return
        found: set[bytes] = set()
        for zone in zones:
            for own in _ask(netlink, connections, pack_outbound, zone, protocol):
                found.add(own.record)
                yield own
        if len(found) == len(connections) or not nftables_dump.has_table("inet", TABLE):
            return
        # An entry that a move made which is to be replaced has this tuple on the peers' side only.
        rest = connections.only(frozenset(connections.each()) - found)
        for zone in zones:
            yield from _ask(netlink, rest, pack_inbound, zone, protocol)


def note_absent(some: Iterable[Connections]) -> None:
    """Find out which of *some* have no entry of TCP, where all is read once (once.py)."""
    every = Connections.joined(some)

    def find() -> frozenset[bytes]:
        parts = (Connections.packed(every.records(version), version) for version in (4, 6))
        found = {own.record for part in parts for own in _find_own(part)}
        return frozenset(every.each()) - found

    ask_once("absent", find)


def _ask(
    netlink: Netlink,
    connections: Connections,
    pack: Callable[..., bytes],
    zone: int,
    protocol: Protocol,
) -> Iterator[Own]:
    suffix = pack_zone(zone)
    answers = ask_each(netlink, connections, lambda end: pack(end, protocol=protocol) + suffix)
    for record, answer in zip(connections.each(), answers, strict=True):
        if answer is not None:
            original, reply, _ = read_tuples(answer, protocol)
            yield Own(record, original, reply, answer)


def _pick(
    answers: Iterator[bytes], wanted: frozenset[bytes], protocol: Protocol = TCP
) -> Iterator[Own]:
    for answer in answers:
        original, reply, _ = read_tuples(answer, protocol)
        for record in (original, reply, turn(original), turn(reply)):
            if record in wanted:
                yield Own(record, original, reply, answer)
                break


def find_carried(entries: Iterable[Own]) -> Iterator[tuple[FourTuple, FourTuple]]:
    """Those that this namespace translates already: as the process sees them, and as their peers.

    The entry that the process' own packets belong to has another tuple on its other side.
    """
    for own in entries:
        carrier = _read_carrier(own)
        if carrier != own.record:
            yield _unpack(own.record), _unpack(carrier)


def find_masqueraded(ends: frozenset[bytes], version: int) -> frozenset[bytes]:
    """Those of *ends*, packed, whose own datagrams this namespace sends from another address."""
    half, found = RECORD_SIZE[version] // 2, set[bytes]()
    for answer in dump(ask_for(UDP, version)) if count_tracked() else ():
        original, reply, _ = read_tuples(answer, UDP)
        if original[:half] in ends and reply[half:] != original[:half]:
            found.add(original[:half])
    return frozenset(found)


def find_translated(
    connections: Connections, protocol: Protocol = TCP
) -> tuple[tuple[FourTuple, FourTuple], ...]:
    """find_carried of all entries of *connections*, which have one local address."""
    return tuple(find_carried(find_own(connections, protocol=protocol)))


def _read_carrier(own: Own) -> bytes:
    if read_status(own.answer) & _IPS_OFFLOAD:
        raise RefusedError(
            "a kept connection is offloaded to a flowtable, where no rule sees its packets",
            hint="take it out of the flowtable, and wait a second",
        )
    direction = own.direction()
    if direction == NOT_TRACKED:
        return own.record
    # The peer dialled: its tuple is the original one. Or the process did, and the reply is.
    return turn(own.original if direction == PEER_DIALLED else own.reply)


def _unpack(record: bytes) -> FourTuple:
    [tuple_] = Connections.packed(record, 4 if len(record) == 12 else 6)
    return tuple_


def find_noted(site: Site, entries: Sequence[Own]) -> tuple[Noted, ...]:
    """What the entries say beside their tuples, where it is not the usual.

    Of a connection that has an entry in another zone than 0 all entries are named.
    """
    usual_timeout = read_timeout()
    said: dict[bytes, list[Attributes]] = {}
    usual: list[tuple[bytes, bool]] = []
    for own in entries:
        # Also when a move that is to be replaced has translated the process' first packet.
        dialled = own.record in (own.original, turn(own.reply))
        attributes = read_attributes(own.answer, usual_timeout, process_dialled=dialled)
        if attributes is USUAL[dialled]:
            usual.append((own.record, dialled))
        else:
            said.setdefault(own.record, []).append(attributes)
    for record, dialled in usual if said else ():
        if record in said:
            said[record].append(USUAL[dialled])
    groups: dict[Attributes, list[bytes]] = {}
    for record, some in said.items():
        for attributes in some:
            groups.setdefault(attributes, []).append(record)
    return tuple(
        Noted(site, attributes, Connections.packed(b"".join(sorted(records)), version))
        for attributes, of_both in groups.items()
        for version, size in RECORD_SIZE.items()
        if (records := [record for record in of_both if len(record) == size])
    )


def read_timeout() -> int:
    """Seconds that an established connection may be silent, as this namespace is set."""
    name, default = TCP.timeout
    value = sysctl.read(f"netfilter/{name}")
    return int(value) if value is not None else default


def read_directions(translation: Translation) -> str:
    """For each kept connection the direction of the entry that the gateway has of its own.

    In the characters of plan/conntrack.py; empty where none has one. They are looked for as the
    process sees them: what another move translates has no such tuple.
    """
    found: dict[bytes, str] = {}
    for own in find_own(translation.kept):
        direction = own.direction()
        if direction != NOT_TRACKED:
            found.setdefault(own.record, direction)
    if not found:
        return ""
    return "".join([found.get(record, NOT_TRACKED) for record in translation.kept.each()])
