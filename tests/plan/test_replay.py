"""what is held of what peers say: which octets, in which order, in which bounds; and packets."""

from __future__ import annotations

import random
import struct
import tracemalloc
from ipaddress import ip_address
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natkeep.plan import replay, socket_filter
from natkeep.plan.replay import SEGMENT_COST, Store, Stream, make_packets
from natkeep.plan.tuples import Address, Connections, Endpoint, FourTuple

PEER = {4: ip_address("10.1.0.2"), 6: ip_address("fd00:1::2")}
OLD = {4: ip_address("10.2.0.10"), 6: ip_address("fd00:2::10")}
NEW = {4: ip_address("10.3.0.20"), 6: ip_address("fd00:3::20")}
PORT, PEER_PORT = 80, 50594
FIN, SYN, RST, PSH, ACK, URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
CE = 0x03  # congestion, as a router between marks it
OPTIONS = bytes.fromhex("0101080a1122334455667788")

EACH_VERSION = pytest.mark.parametrize("version", [4, 6])


def make_packet(
    data: bytes = b"",
    *,
    version: int = 4,
    seq: int = 1000,
    flags: int = ACK,
    ack: int = 7,
    source: Address | None = None,
    destination: Address | None = None,
    ports: tuple[int, int] = (PEER_PORT, PORT),
    offset: int = 0,
    options: bytes = OPTIONS,
) -> bytes:
    """A packet as a packet socket gives it; the checksums are left out, as offloading does."""
    urgent = 1 if flags & URG else 0
    size = (20 + len(options)) // 4 << 4
    tcp = struct.pack("!HHIIBBHHH", *ports, seq % 2**32, ack, size, flags, 501, 0, urgent) + options
    ends = (source or PEER[version]).packed + (destination or NEW[version]).packed
    length = len(tcp) + len(data)
    if version == 4:
        head = struct.pack("!BBHHHBBH", 0x45, CE, 20 + length, 0x4242, offset, 61, 6, 0)
    else:
        head = struct.pack("!IHBB", 6 << 28 | CE << 20, length, 6, 61)
    return head + ends + tcp + data


def keep(*versions: int) -> dict[bytes, bytes]:
    """The kept connections of a store: one of each family."""
    return replay.unpack_kept(replay.pack_kept(maps(*versions)))


def maps(*versions: int, count: int = 1, stride: int = 1) -> list[tuple[int, bytes, bytes]]:
    found = []
    for version in versions or (4, 6):
        kept = Connections.of(
            FourTuple(
                Endpoint(PEER[version], PEER_PORT - stride * n),
                Endpoint(OLD[version], PORT + stride * n),
            )
            for n in range(count)
        )
        arriving = kept.toward(NEW[version])
        found.append((version, arriving.records(version), kept.records(version)))
    return found


def made(store: Store) -> list[bytes]:
    return [p for stream, piece in store.replay() for p in make_packets(stream, piece)]


def octets(store: Store) -> list[tuple[int, bytes]]:
    """Sequence number and payload of all that returns, in its order."""
    found = []
    for packet in made(store):
        start = 20 if packet[0] >> 4 == 4 else 40
        [seq] = struct.unpack_from("!I", packet, start + 4)
        found.append((seq, packet[start + (packet[start + 12] >> 4) * 4 :]))
    return found


def flags_of(packet: bytes) -> int:
    return packet[(20 if packet[0] >> 4 == 4 else 40) + 13]


# ---- what returns ------------------------------------------------------------------------------


@EACH_VERSION
def test_only_the_destination_and_the_checksums_of_a_segment_change(version: int) -> None:
    scapy = pytest.importorskip("scapy.all")
    kind = scapy.IP if version == 4 else scapy.IPv6
    packet = make_packet(b"hello", version=version, flags=PSH | ACK)
    store = Store(keep())

    store.add(packet)

    [returned] = made(store)
    expected = kind(packet)
    expected.dst = str(OLD[version])
    del expected[scapy.TCP].chksum
    if version == 4:
        del expected.chksum
    assert returned == bytes(expected)


@EACH_VERSION
def test_padding_of_a_short_frame_does_not_return(version: int) -> None:
    store = Store(keep())

    store.add(make_packet(b"x", version=version) + bytes(6))

    assert octets(store) == [(1000, b"x")]


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_the_checksum_is_that_of_rfc_1071(data: bytes) -> None:
    padded = data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)

    found = replay.checksum(data)

    # 0 and 0xFFFF are one number in ones' complement.
    assert (found + total) % 0xFFFF == 0
    assert 0 <= found <= 0xFFFF


@pytest.mark.parametrize(
    "packet",
    [
        make_packet(flags=SYN),
        make_packet(b"data", flags=SYN | ACK),
        make_packet(flags=RST),
        make_packet(flags=RST | ACK),
        make_packet(b"urgent", flags=ACK | URG),
        make_packet(b"fragment", offset=0x2000),
        make_packet(b"fragment", offset=0x0001),
        make_packet(b"another's", ports=(PEER_PORT + 1, PORT)),
        make_packet(b"another's", ports=(PEER_PORT, PORT + 1)),
        make_packet(b"another's", source=OLD[4]),
        make_packet(b"to OLD", destination=OLD[4]),
        make_packet(b"cut")[:-1],
        make_packet()[:39],
        b"\x55" + make_packet(b"no version")[1:],
        make_packet(b"too long a header")[:32] + b"\xf0" + make_packet(b"too long")[33:],
    ],
)
def test_what_is_no_segment_of_a_kept_connection_is_not_held(packet: bytes) -> None:
    store = Store(keep())

    store.add(packet)

    assert made(store) == []


@EACH_VERSION
def test_a_segment_above_the_usual_size_returns_in_parts(version: int) -> None:
    data = random.Random(1).randbytes(65_000)
    store = Store(keep())

    store.add(make_packet(data, version=version, seq=2**32 - 10, flags=PSH | FIN | ACK))

    parts = octets(store)
    assert b"".join(payload for _, payload in parts) == data
    starts = [sum(len(payload) for _, payload in parts[:n]) for n in range(len(parts))]
    assert [(seq + 10) % 2**32 for seq, _ in parts] == starts
    assert len(parts) == 3
    assert all(len(packet) <= replay.PACKET_SIZE for packet in made(store))
    assert [flags_of(p) & FIN for p in made(store)] == [0] * (len(parts) - 1) + [FIN]


def test_a_packet_too_long_for_its_length_field_is_taken_whole() -> None:
    packet = bytearray(make_packet(bytes(60_000)) + bytes(10_000))
    packet[2:4] = b"\0\0"
    store = Store(keep())

    store.add(bytes(packet))

    assert sum(len(payload) for _, payload in octets(store)) == 70_000


# ---- which octets, and when --------------------------------------------------------------------


def test_segments_of_all_connections_return_in_the_order_of_arrival() -> None:
    store = Store(keep())

    store.add(make_packet(b"aa", seq=10))
    store.add(make_packet(b"BB", version=6, seq=90))
    store.add(make_packet(b"cc", seq=12))

    assert octets(store) == [(10, b"aa"), (90, b"BB"), (12, b"cc")]


def test_of_the_last_segment_the_newest_copy_returns_and_no_other() -> None:
    store = Store(keep())

    store.add(make_packet(b"aa", seq=10, ack=1))
    store.add(make_packet(b"bb", seq=12, ack=1))
    store.add(make_packet(b"bb", seq=12, ack=2))

    assert octets(store) == [(10, b"aa"), (12, b"bb")]
    assert struct.unpack_from("!I", made(store)[1], 28) == (2,)


def test_a_copy_of_a_segment_that_others_have_followed_changes_nothing() -> None:
    store = Store(keep())

    store.add(make_packet(b"aa", seq=10, ack=1))
    store.add(make_packet(b"bb", seq=12, ack=1))
    store.add(make_packet(b"aa", seq=10, ack=2))

    assert octets(store) == [(10, b"aa"), (12, b"bb")]
    assert struct.unpack_from("!I", made(store)[0], 28) == (1,)


def test_octets_that_come_again_in_other_segments_return_once() -> None:
    store = Store(keep())

    store.add(make_packet(b"abcdef", seq=10))
    store.add(make_packet(b"cd", seq=12))
    store.add(make_packet(b"xyefgh", seq=12))

    assert octets(store) == [(10, b"abcdef"), (16, b"gh")]


def test_a_fin_stays_behind_the_data_that_it_came_with() -> None:
    store = Store(keep())

    store.add(make_packet(b"ab", seq=10))
    store.add(make_packet(b"abcd", seq=10, flags=FIN | ACK))

    assert octets(store) == [(10, b"ab"), (12, b"cd")]
    assert [flags_of(packet) & FIN for packet in made(store)] == [0, FIN]


def test_of_a_segment_between_two_that_are_held_only_the_gap_is_kept() -> None:
    store = Store(keep())

    store.add(make_packet(b"ab", seq=10))
    store.add(make_packet(b"ef", seq=14))
    store.add(make_packet(b"xxcdxxgh", seq=10))

    # "ef", the newest one, came again with it.
    assert octets(store) == [(10, b"ab"), (12, b"cd"), (14, b"ef"), (16, b"gh")]


def test_a_fin_alone_is_an_octet_of_the_sequence() -> None:
    store = Store(keep())

    store.add(make_packet(seq=10, flags=FIN | ACK))
    store.add(make_packet(seq=10, flags=FIN | ACK))

    assert octets(store) == [(10, b"")]
    assert flags_of(made(store)[0]) & FIN


def test_of_acknowledgements_the_newest_returns_unless_data_follows_it() -> None:
    store = Store(keep())

    store.add(make_packet(ack=1))
    store.add(make_packet(ack=2))
    before = [struct.unpack_from("!I", packet, 28)[0] for packet in made(store)]
    store.add(make_packet(b"data", ack=3))

    assert before == [2]
    assert [struct.unpack_from("!I", packet, 28)[0] for packet in made(store)] == [3]
    assert store.cost == SEGMENT_COST + 4


class Talk:
    """A peer that sends a stream by heart, in any segments, again and again."""

    DATA = random.Random(2).randbytes(3000)

    def __init__(self, base: int) -> None:
        self.base = base

    def packet(self, start: int, end: int) -> bytes:
        return make_packet(self.DATA[start:end], seq=self.base + start)


segments = st.lists(
    st.tuples(st.integers(0, 2999), st.integers(1, 700)).map(lambda p: (p[0], min(sum(p), 3000))),
    min_size=1,
    max_size=40,
)


@settings(deadline=None)
@given(segments, st.sampled_from([1, 2**31 - 1500, 2**32 - 1500]))
def test_of_overlapping_segments_each_octet_that_arrived_returns_once(
    sent: list[tuple[int, int]], base: int
) -> None:
    store, talk = Store(keep()), Talk(base)

    for start, end in sent:
        store.add(talk.packet(start, end))

    seen: dict[int, int] = {}
    for seq, payload in octets(store):
        for place, octet in enumerate(payload, (seq - base) % 2**32):
            assert place not in seen
            seen[place] = octet
    assert seen == {p: talk.DATA[p] for start, end in sent for p in range(start, end)}
    assert store.cost == sum(piece.cost for _, piece in store.replay())


# ---- bounds ------------------------------------------------------------------------------------

SIZE = 100
COST = SIZE + SEGMENT_COST


def fill(store: Store, numbers: range, version: int = 4) -> None:
    for number in numbers:
        store.add(make_packet(bytes(SIZE), version=version, seq=SIZE * number))


def places(store: Store) -> list[int]:
    return sorted(seq // SIZE for seq, _ in octets(store))


def test_what_finds_no_room_is_the_right_end() -> None:
    store = Store(keep(), each=5 * COST)

    fill(store, range(8))

    assert places(store) == [0, 1, 2, 3, 4]
    assert store.refused == 3


def test_behind_a_segment_that_found_no_room_nothing_is_taken_though_there_is_room_again() -> None:
    store = Store(keep(), each=5 * COST)
    fill(store, range(6))

    store.each += 2 * COST
    fill(store, range(6, 7))
    without = places(store)
    fill(store, range(5, 7))

    assert without == [0, 1, 2, 3, 4]
    assert places(store) == [0, 1, 2, 3, 4, 5, 6]


def test_the_left_end_has_room_at_the_cost_of_the_right() -> None:
    store = Store(keep(), each=5 * COST)
    fill(store, range(1, 6))

    fill(store, range(1))  # lost on its way at first, and sent again

    assert places(store) == [0, 1, 2, 3, 4]


def test_a_peer_that_sends_much_does_not_starve_another() -> None:
    store = Store(keep(), total=40 * COST, each=40 * COST)
    fill(store, range(40))

    fill(store, range(10), version=6)

    mine = [stream.cost // COST for stream in store.streams.values()]
    assert mine == [20, 10]
    assert store.cost <= store.total


@settings(deadline=None)
@given(segments, st.integers(1, 12))
def test_no_bound_is_ever_exceeded_and_the_run_has_no_hole(
    sent: list[tuple[int, int]], room: int
) -> None:
    store, talk = Store(keep(), total=room * COST * 2, each=room * COST), Talk(1)
    in_order = [(start, start + 50) for start in range(0, 3000, 50)]

    for start, end in in_order + sent:
        store.add(talk.packet(start, end))

    assert all(stream.cost <= store.each for stream in store.streams.values())
    assert store.cost <= store.total
    held = sorted((seq, seq + len(payload)) for seq, payload in octets(store))
    assert all(a[1] == b[0] for a, b in pairwise(held))
    assert not held or held[0][0] == 1


def test_the_holes_of_a_stream_are_bounded() -> None:
    store = Store(keep())
    count = 2 * replay.RUNS

    fill(store, range(0, 2 * count, 2))  # every second segment is lost
    before = places(store)
    fill(store, range(1, 2, 2))
    fill(store, range(2 * replay.RUNS, 2 * replay.RUNS + 1))

    assert before == list(range(0, 2 * replay.RUNS, 2))
    assert store.refused == count - replay.RUNS
    assert places(store) == sorted([*before, 1, 2 * replay.RUNS])  # a hole filled makes room


def test_a_piece_does_not_keep_the_rest_of_its_segment_in_memory() -> None:
    store = Store(keep())

    tracemalloc.start()
    for end in range(1, 200):
        store.add(make_packet(bytes(60_000 + end), seq=10, flags=PSH | ACK))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert store.cost == 60_199 + 199 * SEGMENT_COST
    assert most < 4 * store.cost


@pytest.mark.parametrize("kind", ["tiny", "holes", "overlapping", "backwards", "repeated"])
def test_a_packet_costs_as_much_with_thousands_of_segments_as_with_a_few(kind: str) -> None:
    count = 8000
    data = {
        "tiny": [(n, n + 1) for n in range(count)],
        "holes": [(2 * n, 2 * n + 1) for n in range(count)],
        "overlapping": [(n, n + 900) for n in range(0, 3 * count, 3)],
        "backwards": [(n, n + 1) for n in range(count, 0, -1)],
        "repeated": [(0, n % 64 + 1) for n in range(count)],
    }[kind]
    stream = Stream(bytes(12), 0)
    steps = []

    for number, (start, end) in enumerate(data):
        segment = replay.parse(make_packet(bytes(end - start), seq=start))
        assert segment is not None
        before = len(stream.runs) + len(stream.newest)
        stream.add(number, segment, replay.EACH)
        steps.append(before)

    assert max(steps) <= 2 * (replay.RUNS + 1)
    assert stream.cost == sum(piece.cost for piece in stream.pieces) <= replay.EACH
    assert [piece.start for piece in stream.pieces] == sorted(p.start for p in stream.pieces)


# ---- lengths and checksums -----------------------------------------------------------------------


@EACH_VERSION
@pytest.mark.parametrize("octets_", [30, 60_000])
def test_a_length_of_zero_is_believed_above_64_kib_only(version: int, octets_: int) -> None:
    packet = bytearray(make_packet(bytes(octets_), version=version, flags=FIN | ACK))
    packet[slice(2, 4) if version == 4 else slice(4, 6)] = b"\0\0"

    assert replay.parse(bytes(packet)) is None
    assert replay.parse(bytes(packet) + bytes(70_000)) is not None


@EACH_VERSION
@pytest.mark.parametrize("flipped", [None, 40, -1])
def test_a_segment_whose_checksum_is_wrong_is_not_held(version: int, flipped: int | None) -> None:
    scapy = pytest.importorskip("scapy.all")
    kind = scapy.IP if version == 4 else scapy.IPv6
    whole = kind(make_packet(b"data", version=version))
    del whole[scapy.TCP].chksum
    packet = bytearray(bytes(whole))
    if flipped is not None:
        packet[flipped] ^= 1
    store = Store(keep())

    store.add(bytes(packet), verify=True)

    assert len(made(store)) == (flipped is None)


def test_where_there_is_room_for_nothing_more_a_newcomer_waits() -> None:
    store = Store(keep(), total=2 * COST, each=2 * COST)
    fill(store, range(2))

    fill(store, range(1), version=6)

    assert store.cost <= store.total
    assert places(store) == [0, 1]


# ---- the kernel's filter -----------------------------------------------------------------------


def passes(program: tuple[socket_filter.Instruction, ...], packet: bytes, *, kind: int = 0) -> bool:
    """Classic BPF, as far as the programs need it."""
    accumulator = index = at = 0
    sizes = {0x20: 4, 0x28: 2, 0x30: 1, 0x48: 2, 0x50: 1}
    tests = {
        0x15: lambda k: accumulator == k,
        0x25: lambda k: accumulator > k,
        0x35: lambda k: accumulator >= k,
        0x45: lambda k: bool(accumulator & k),
    }
    while True:
        code, if_true, if_false, k = program[at]
        at += 1
        if code == 0x06:
            return bool(k)
        if code == 0x05:
            at += k
        elif code == 0xB1:
            index = (packet[k] & 15) * 4
        elif code in tests:
            at += if_true if tests[code](k) else if_false
        elif k >= 0xFFFFF000:
            accumulator = kind
        else:
            place = k + (index if code in (0x48, 0x50) else 0)
            octets_ = packet[place : place + sizes[code]]
            if len(octets_) < sizes[code]:
                return False
            accumulator = int.from_bytes(octets_, "big")


@EACH_VERSION
@pytest.mark.parametrize("count", [1, 5, 400])
def test_the_filter_shows_every_kept_connection(version: int, count: int) -> None:
    program = socket_filter.make_filter(version, maps(version, count=count, stride=7))

    shown = [
        passes(program, make_packet(version=version, ports=(PEER_PORT - 7 * n, PORT + 7 * n)))
        for n in range(count)
    ]

    assert shown == [True] * count
    assert len(program) < 4096


@EACH_VERSION
def test_the_filter_hides_what_is_of_no_kept_connection(version: int) -> None:
    program = socket_filter.make_filter(version, maps(version, count=5, stride=7))
    others = {
        "SYN": make_packet(version=version, flags=SYN),
        "RST": make_packet(version=version, flags=RST | ACK),
        "urgent": make_packet(version=version, flags=URG | ACK),
        "port": make_packet(version=version, ports=(PEER_PORT, PORT + 1)),
        "port below": make_packet(version=version, ports=(PEER_PORT, PORT - 1)),
        "port above": make_packet(version=version, ports=(PEER_PORT, PORT + 29)),
        "peer": make_packet(version=version, source=PEER[version] + 1),
        "destination": make_packet(version=version, destination=OLD[version]),
        "UDP": make_packet(version=version).replace(b"\x3d\x06", b"\x3d\x11", 1).replace(
            b"\x06\x3d", b"\x11\x3d", 1
        ),
    }  # fmt: skip
    if version == 4:
        others["fragment"] = make_packet(offset=0x2000)

    shown = [name for name, packet in others.items() if passes(program, packet)]

    assert shown == []
    assert passes(program, make_packet(version=version))
    assert not passes(program, make_packet(version=version), kind=3)  # PACKET_OTHERHOST


@given(st.sets(st.integers(0, 2000), min_size=1, max_size=80), st.integers(1, 10))
def test_intervals_cover_the_values_and_leave_the_widest_gaps_out(
    values: set[int], most: int
) -> None:
    found = socket_filter.cover(values, most)

    covered = {value for first, last in found for value in range(first, last + 1)}
    assert values <= covered
    assert len(found) <= most
    assert {end for pair in found for end in pair} <= values
    gaps = [b - a for a, b in pairwise(sorted(values)) if b - a > 1]
    left_out = [b[0] - a[1] for a, b in pairwise(found)]
    assert sorted(left_out) == sorted(gaps)[max(len(gaps) - most + 1, 0) :]


def test_the_table_of_kept_connections_has_each_under_its_key_at_new() -> None:
    kept = replay.unpack_kept(replay.pack_kept(maps(count=2)))

    assert len(set(kept.values())) == len(kept) == 4
    for version in (4, 6):
        segment = replay.parse(make_packet(version=version))
        assert segment is not None
        assert kept[segment.key] == segment.key.replace(NEW[version].packed, OLD[version].packed)


@EACH_VERSION
def test_a_peer_that_has_moved_is_replayed_as_the_process_knows_it(version: int) -> None:
    moved = PEER[version] + 5
    [(_, arriving, kept)] = maps(version)
    arriving = arriving.replace(PEER[version].packed, moved.packed)
    store = Store(replay.unpack_kept(replay.pack_kept([(version, arriving, kept)])))

    store.add(make_packet(b"unknown", version=version))
    store.add(make_packet(b"hello", version=version, source=moved))

    [packet] = made(store)
    segment = replay.parse(packet)
    assert segment is not None
    assert segment.payload == b"hello"
    assert segment.is_intact()
    ends = OLD[version].packed + PEER[version].packed
    assert segment.key == ends + struct.pack("!HH", PEER_PORT, PORT)
    program = socket_filter.make_filter(version, [(version, arriving, kept)])
    shown = [passes(program, make_packet(version=version, source=s)) for s in (None, moved)]
    assert shown == [False, True]


def test_a_stream_counts_places_from_its_first_segment_across_the_end_of_the_numbers() -> None:
    segment = replay.parse(make_packet(b"abcd", seq=2**32 - 2))
    assert segment is not None
    stream = Stream(bytes(12), segment.seq)

    stream.add(1, segment, replay.EACH)
    more = replay.parse(make_packet(b"cdef", seq=0))
    assert more is not None
    stream.add(2, more, replay.EACH)

    assert [(piece.start, piece.payload) for piece in stream.pieces] == [(0, b"abcd"), (4, b"ef")]
