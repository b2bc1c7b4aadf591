"""what is held of datagrams: which, in which order, in which bounds; and what returns."""

from __future__ import annotations

import random
import struct
from ipaddress import ip_address

import pytest

from natkeep.plan import datagrams, replay, socket_filter
from natkeep.plan.datagrams import AGE, Datagrams
from natkeep.plan.replay import SEGMENT_COST
from natkeep.plan.tuples import RECORD_SIZE, Address, Connections, Endpoint, FourTuple

PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
OTHER = {4: ip_address("10.1.0.99"), 6: ip_address("fd00:1::99")}
OLD = {4: ip_address("10.2.0.10"), 6: ip_address("fd00:2::10")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
PORT, PEER_PORT = 53, 50594

EACH_VERSION = pytest.mark.parametrize("version", [4, 6])


def keep(*, server: bool = False) -> dict[bytes, bytes]:
    """A connected socket of each family, or one that any peer may speak to."""
    maps = []
    for version in (4, 6):
        end = FourTuple(Endpoint(PEER[version], PEER_PORT), Endpoint(OLD[version], PORT))
        kept = Connections.of([end])
        both = [kept.toward(NEW[version]).records(version), kept.records(version)]
        half = RECORD_SIZE[version] // 2
        both = [one[:half] + bytes(half) if server else one for one in both]
        maps.append((version, both[0], both[1]))
    return replay.unpack_kept(replay.pack_kept(maps))


def make_datagram(
    data: bytes,
    *,
    version: int = 4,
    source: Address | None = None,
    destination: Address | None = None,
    ports: tuple[int, int] = (PEER_PORT, PORT),
    checked: bool = True,
) -> tuple[bytes, bytes]:
    """IP header and UDP datagram."""
    ends = (source or PEER[version]).packed + (destination or NEW[version]).packed
    length = 8 + len(data)
    if version == 4:
        ip = struct.pack("!BBHHHBBH", 0x45, 3, 20 + length, 0x4242, 0, 61, 17, 0) + ends
    else:
        ip = struct.pack("!IHBB", 6 << 28, length, 17, 61) + ends
    udp = struct.pack("!HHHH", *ports, length, 0) + data
    if checked:
        found = replay.checksum(replay.pseudo_header(ip, length, 17) + udp) or 0xFFFF
        udp = udp[:6] + struct.pack("!H", found) + data
    return ip, udp


def make_packet(data: bytes, **more: object) -> bytes:
    return b"".join(make_datagram(data, **more))  # type: ignore[arg-type]


def make_fragments(data: bytes, size: int, *, version: int = 4, ident: int = 7) -> list[bytes]:
    """The same in packets with *size* octets of it each."""
    ip, udp = make_datagram(data, version=version)
    packets = []
    for at in range(0, len(udp), size):
        part, more = udp[at : at + size], at + size < len(udp)
        if version == 4:
            place = at // 8 | (0x2000 if more else 0)
            head = ip[:2] + struct.pack("!HHH", 20 + len(part), ident, place) + ip[8:]
        else:
            fragment = struct.pack("!BxHI", 17, at | more, ident)
            head = ip[:4] + struct.pack("!HB", 8 + len(part), 44) + ip[7:] + fragment
        packets.append(head + part)
    return packets


def payloads(store: Datagrams, now: float = 0.0) -> list[bytes]:
    """What the process reads."""
    found = []
    for one in store.take(now):
        packet = one.packet
        found.append(packet[28 if packet[0] >> 4 == 4 else 48 :])
    return found


@EACH_VERSION
@pytest.mark.parametrize("server", [False, True])
@pytest.mark.parametrize("data", [b"", b"a question"])
def test_only_the_destination_and_the_checksums_change(
    version: int, server: bool, data: bytes
) -> None:
    scapy = pytest.importorskip("scapy.all")
    kind = scapy.IP if version == 4 else scapy.IPv6
    store = Datagrams(keep(server=server))

    store.add(make_packet(data, version=version), 0.0, verify=True)

    [held] = store.take(0.0)
    expected = kind(make_packet(data, version=version))
    expected.dst = str(OLD[version])
    del expected[scapy.UDP].chksum
    if version == 4:
        del expected.chksum
    assert held.packet == bytes(expected)


@EACH_VERSION
def test_a_peer_that_has_moved_and_a_port_that_is_another_return_as_they_are_known(
    version: int,
) -> None:
    [arriving], [known] = (
        replay.unpack_kept(replay.pack_kept([(version, one, one)])).keys()
        for one in (
            Connections.of([FourTuple(Endpoint(p, a), Endpoint(old, b))]).records(version)
            for p, a, old, b in (
                (OTHER[version], 10_001, NEW[version], PORT),
                (PEER[version], PEER_PORT, OLD[version], 5353),
            )
        )
    )
    store = Datagrams({arriving: known})

    store.add(make_packet(b"x", version=version, source=OTHER[version], ports=(10_001, PORT)), 0.0)

    [held] = store.take(0.0)
    expected = make_packet(b"x", version=version, destination=OLD[version], ports=(PEER_PORT, 5353))
    start = 20 if version == 4 else 40
    assert held.packet[12 if version == 4 else 8 :] == expected[12 if version == 4 else 8 :]
    assert replay.checksum(held.packet[:start]) in (0, 0xFFFF) or version == 6


def test_all_return_in_the_order_of_arrival_and_equal_ones_are_two() -> None:
    store = Datagrams(keep(server=True))
    said = [b"one", b"two", b"two", b"one"]

    for place, data in enumerate(said):
        source = (PEER, OTHER)[place % 2][4]
        store.add(make_packet(data, source=source), 0.0)

    assert payloads(store) == said
    assert payloads(store) == []  # and once


@EACH_VERSION
@pytest.mark.parametrize(
    "changed",
    [{"ports": (PEER_PORT, 54)}, {"source": OTHER}, {"destination": OLD}, {"ports": (1, PORT)}],
)
def test_what_is_to_another_socket_is_not_held(version: int, changed: dict[str, object]) -> None:
    store = Datagrams(keep())
    some = {k: v[version] if isinstance(v, dict) else v for k, v in changed.items()}

    store.add(make_packet(b"x", version=version, **some), 0.0)

    assert payloads(store) == []


@EACH_VERSION
def test_what_was_damaged_on_its_way_is_not_held(version: int) -> None:
    store = Datagrams(keep())
    packet = make_packet(b"hello", version=version)

    store.add(packet[:-1] + b"a", 0.0, verify=True)
    store.add(packet[:-1], 0.0)
    store.add(make_packet(b"none", version=version, checked=False), 0.0, verify=True)

    assert payloads(store) == ([b"none"] if version == 4 else [])


@EACH_VERSION
def test_whatever_arrives_raises_nothing_and_costs_what_it_has(version: int) -> None:
    chance = random.Random(version)
    store, whole = Datagrams(keep(server=True)), make_packet(b"hello", version=version)

    for _ in range(2000):
        packet = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            packet[chance.randrange(len(packet))] = chance.randrange(256)
        store.add(bytes(packet[: chance.randrange(len(packet) + 1)]), 0.0)

    assert store.cost == sum(one.cost for one in store.held) == sum(store.costs.values())
    assert all(one.packet for one in store.held)


# ---- fragments and offloads ----------------------------------------------------------------------


@EACH_VERSION
def test_fragments_return_as_one_in_any_order_and_with_repetitions(version: int) -> None:
    store, data = Datagrams(keep()), random.Random(1).randbytes(6000)
    packets = make_fragments(data, 1480, version=version)

    for packet in [*packets[1:], packets[1], packets[0]]:
        store.add(packet, 0.0)

    [held] = store.take(0.0)
    assert held.packet[28 if version == 4 else 48 :] == data
    assert not store.fragments.parts


@EACH_VERSION
def test_fragments_that_overlap_or_are_damaged_are_dropped(version: int) -> None:
    store, data = Datagrams(keep()), random.Random(1).randbytes(400)
    first, second = make_fragments(data, 208, version=version)
    overlapping = make_fragments(data, 200, version=version)[1]

    for packets in ((first, overlapping), (first, second[:-1] + b"\0")):
        for packet in packets:
            store.add(packet, 0.0)
        assert payloads(store) == []
    store.add(second, 0.0)
    assert payloads(store) == []


def test_fragments_of_many_that_never_become_whole_are_given_up() -> None:
    store, data = Datagrams(keep()), bytes(3000)

    for ident in range(1000):
        store.add(make_fragments(data, 1480, ident=ident)[0], 0.0)
    for at in range(500):  # and one of ever more
        store.add(make_fragments(bytes(60_000), 104, ident=5000)[at], 0.0)

    fragments = store.fragments
    assert len(fragments.parts) <= 64
    assert all(len(parts) <= 128 for parts in fragments.parts.values())
    assert fragments.headers.keys() | fragments.sizes.keys() <= fragments.parts.keys()


@EACH_VERSION
def test_what_an_offload_has_put_together_returns_one_by_one(version: int) -> None:
    store, data = Datagrams(keep()), random.Random(1).randbytes(2500)

    store.add(make_packet(data, version=version), 0.0, size=1000)

    assert payloads(store) == [data[:1000], data[1000:2000], data[2000:]]


# ---- bounds --------------------------------------------------------------------------------------


def test_where_there_is_no_room_the_newest_is_refused() -> None:
    each = 10 * (SEGMENT_COST + 1)
    store = Datagrams(keep(), each=each)

    for n in range(25):
        store.add(make_packet(bytes((n,))), 0.0)

    assert store.refused == 15
    assert payloads(store) == [bytes((n,)) for n in range(10)]


def test_a_socket_that_is_sent_much_leaves_room_to_the_others() -> None:
    kept = {**keep(), **keep(server=True)}
    store = Datagrams(kept, total=10 * (SEGMENT_COST + 1), each=5 * (SEGMENT_COST + 1))

    for _ in range(25):
        store.add(make_packet(b"x", source=OTHER[4]), 0.0)
    for _ in range(5):
        store.add(make_packet(b"y"), 0.0)
    store.add(make_packet(b"z", version=6), 0.0)

    assert payloads(store) == [b"x"] * 5 + [b"y"] * 5
    assert store.refused == 21


def test_what_is_old_is_not_delivered_and_leaves_its_room() -> None:
    store = Datagrams(keep(), each=2 * (SEGMENT_COST + 1))

    for at, data in ((0.0, b"a"), (1.0, b"b"), (AGE + 0.5, b"c"), (AGE + 0.6, b"d")):
        store.add(make_packet(data), at)

    assert store.refused == 2  # "a", which was too old, and "d"
    assert payloads(store, AGE + 1.5) == [b"c"]
    assert store.refused == 3
    assert store.cost == 0


# ---- the socket filter ---------------------------------------------------------------------------


def run(program: tuple[socket_filter.Instruction, ...], packet: bytes, link: int = 14) -> int:
    """What the kernel does with the *program*, of which it has what natkeep's programs use."""
    net, skb = 0xFFF00000, bytes(link) + packet
    start = 8 + ((packet[0] & 15) * 4 if packet[0] >> 4 == 4 else 40)
    fragment = packet[0] >> 4 == 4 and struct.unpack_from("!H", packet, 6)[0] & 0x1FFF
    a = x = at = 0
    while True:
        code, jt, jf, k = program[at]
        at += 1
        if code == 0x06:
            return k
        if code in (0x20, 0x28, 0x30, 0x48):
            width = {0x20: 4, 0x28: 2, 0x30: 1, 0x48: 2}[code]
            if k >= 0xFFFFF000 and code != 0x48:
                a = {4: 0, 52: link + start - (8 if fragment else 0)}[k - 0xFFFFF000]
                continue
            where = (x + k) % 2**32 if code == 0x48 else k - net + link if k >= net else k
            if where + width > len(skb):
                return 0
            a = int.from_bytes(skb[where : where + width], "big")
        elif code == 0x07:
            x = a
        elif code == 0x05:
            at += k
        else:
            truth = {0x15: a == k, 0x25: a > k, 0x35: a >= k, 0x45: bool(a & k)}[code]
            at += jt if truth else jf


def shown(version: int, packet: bytes, *, server: bool = False) -> bool:
    local, peer = Endpoint(NEW[version], PORT), Endpoint(PEER[version], PEER_PORT)
    records = Connections.of([FourTuple(peer, local)]).records(version)
    half = len(records) // 2
    records = records[:half] + bytes(half) if server else records
    program = socket_filter.make_datagram_filter(version, [(version, records, records)])
    assert run(program, packet, 0) == run(program, packet, 14)  # a device without a header
    return bool(run(program, packet))


@EACH_VERSION
def test_the_filter_shows_what_is_kept_and_no_others(version: int) -> None:
    other = make_packet(b"x", version=version, source=OTHER[version])

    assert shown(version, make_packet(b"x", version=version))
    assert not shown(version, other)
    assert shown(version, other, server=True)
    assert not shown(version, make_packet(b"x", version=version, ports=(PEER_PORT, 54)))
    assert not shown(version, make_packet(b"x", version=version, destination=OLD[version]))
    assert all(shown(version, one) for one in make_fragments(bytes(3000), 1480, version=version))
    tcp = bytearray(make_packet(b"x", version=version))
    tcp[9 if version == 4 else 6] = 6
    assert not shown(version, bytes(tcp))


def test_the_store_is_bounded_as_its_constants_say() -> None:
    store = Datagrams(keep())

    for _ in range(datagrams.EACH // SEGMENT_COST + 100):
        store.add(make_packet(b""), 0.0)

    assert len(store.held) == datagrams.EACH // SEGMENT_COST
