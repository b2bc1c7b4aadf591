"""the lab of UDP: what its application and captures notice, and that its verdict can be fail."""

from __future__ import annotations

import re
from dataclasses import replace
from ipaddress import ip_address

import pytest

pytest.importorskip("scapy")

from scapy.layers.inet import ICMP, IP, UDP, IPerror, UDPerror, fragment
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import Ether
from scapy.utils import wrpcap

from natkeep.lab.capture import read_frames
from natkeep.lab.datagrams import Flow
from natkeep.lab.lab import Lab
from natkeep.lab.matrix import Cell, Column, find_situations, play
from natkeep.lab.scenario import perform
from natkeep.lab.traffic import make_octets
from natkeep.lab.udp import all_heard, no_unreachable
from natkeep.lab.wire_checks import Kept
from natkeep.plan.tuples import Endpoint, FourTuple

PEER, OLD = Endpoint.parse("10.1.0.2:40000"), Endpoint.parse("10.2.0.10:5000")
PEER6, OLD6 = Endpoint.parse("[fd00:1::2]:40000"), Endpoint.parse("[fd00:2::10]:5000")
SECOND = 1_000_000_000
FRAME = Ether(dst="02:00:00:00:00:01")  # or scapy asks this machine's neighbours, for a second


def datagram(number: int, size: int = 64) -> bytes:
    """What a peer says."""
    return make_octets("dial", number << 16, size)


@pytest.mark.parametrize(
    ("numbers", "heard", "wrong"),
    [
        ([0, 1, 2], [[0, 2]], None),
        ([0, 3, 4], [[0, 0], [3, 4]], None),  # lost, which UDP may
        ([0, 1, 1], [[0, 1], [1, 1]], "above 1"),  # twice
        ([0, 2, 1], [[0, 0], [2, 2], [1, 1]], "above 2"),  # late
    ],
)
def test_what_comes_twice_or_late_is_noticed(numbers, heard, wrong):
    flow = Flow(None, "serve", ("10.1.0.2", 40000))
    flow.do_swallow()
    for number in numbers:
        flow.take(datagram(number))

    assert flow.heard == heard
    assert (flow.mismatch and flow.mismatch["expected"]) == wrong


def test_a_wrong_octet_is_noticed():
    flow = Flow(None, "serve", ("10.1.0.2", 40000))
    flow.do_swallow()
    flow.take(datagram(0)[:-1] + b"?")

    assert flow.mismatch is not None


def four(version: int):
    """The tuple in IPv4 or IPv6, and the network header of it."""
    if version == 4:
        return FourTuple(PEER, OLD), IP(src="10.1.0.2", dst="10.2.0.10")
    return FourTuple(PEER6, OLD6), IPv6(src="fd00:1::2", dst="fd00:2::10")


@pytest.mark.parametrize("version", [4, 6])
def test_a_datagram_is_read_with_its_number(tmp_path, version):
    tuple_, network = four(version)
    udp = UDP(sport=40000, dport=5000)
    wrpcap(str(tmp_path / "one.pcap"), [FRAME / network / udp / datagram(7)])
    [frame] = read_frames(tmp_path / "one.pcap", udp=True)

    assert frame.segment is not None
    assert (frame.segment.tuple, frame.segment.seq, frame.segment.length) == (tuple_, 7, 64)
    [frame] = read_frames(tmp_path / "one.pcap")
    assert frame.segment is None


@pytest.mark.parametrize("version", [4, 6])
def test_one_in_fragments_is_its_first_one(tmp_path, version):
    tuple_, network = four(version)
    udp = UDP(sport=40000, dport=5000) / datagram(7, 6000)
    if version == 4:
        cut = fragment(network / udp, 1400)
    else:
        cut = fragment6(network / IPv6ExtHdrFragment(id=1) / udp, 1400)
    wrpcap(str(tmp_path / "cut.pcap"), [FRAME / each for each in cut])
    frames = read_frames(tmp_path / "cut.pcap", udp=True)

    assert len(frames) > 4
    [segment] = [each.segment for each in frames if each.segment]
    assert (segment.tuple, segment.seq, segment.length) == (tuple_, 7, 6000)
    assert {tuple_.source.address, tuple_.destination.address} == frames[-1].addresses


@pytest.mark.parametrize("version", [4, 6])
def test_an_unreachable_port_is_noticed(tmp_path, version):
    quoted = UDPerror(sport=40000, dport=5000)
    if version == 4:
        error = IP(src="10.2.0.10", dst="10.1.0.2") / ICMP(type=3, code=3)
        error /= IPerror(src="10.1.0.2", dst="10.2.0.10") / quoted
    else:
        error = IPv6(src="fd00:2::10", dst="fd00:1::2") / ICMPv6DestUnreach(code=4)
        error /= IPv6(src="fd00:1::2", dst="fd00:2::10") / UDP(sport=40000, dport=5000)
    wrpcap(str(tmp_path / "one.pcap"), [FRAME / error])

    assert not no_unreachable(read_frames(tmp_path / "one.pcap", udp=True)).ok


def test_only_what_is_said_in_the_blackout_may_be_lost(tmp_path):
    tuple_, network = four(4)
    packets = []
    for number, at in enumerate((1, 2, 5, 9, 10)):  # s
        packet = FRAME / network / UDP(sport=40000, dport=5000) / datagram(number)
        packet.time = at
        packets.append(packet)
    wrpcap(str(tmp_path / "five.pcap"), packets)
    frames = read_frames(tmp_path / "five.pcap", udp=True)
    news = {OLD.address: (ip_address("10.3.0.20"),)}
    kept = Kept((tuple_,), news, 4 * SECOND, 6 * SECOND)

    assert all_heard(frames, kept, {tuple_: [[0, 1], [3, 4]]}).ok
    assert not all_heard(frames, kept, {tuple_: [[0, 1], [4, 4]]}).ok
    assert not all_heard(frames, kept, {tuple_: [[1, 4]]}).ok
    assert not all_heard([], kept, {tuple_: [[0, 4]]}).ok


def by_hand(lab: Lab) -> None:
    """The server's socket, one that is connected beside it, and a gateway that knows them.

    Nothing is said in the blackout: those have no gate.
    """
    lab.conditions.gateway_tracks()
    lab.begin(connections=3, pause=True)
    lab.traffic.connect(0)
    lab.move()
    lab.traffic.client_says()
    lab.traffic.server_says()
    lab.finish()


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.parametrize("engine", [pytest.param("criu", marks=pytest.mark.criu), "repair"])
@pytest.mark.parametrize(("translator", "lives"), [("naive", False), ("naive+purge", True)])
def test_rules_by_hand_keep_datagrams_if_stale_entries_are_purged(engine, translator, lives):
    with Lab("udp", engine=engine, translator=translator, udp=True) as lab:
        perform(lab, by_hand)
        failed = [each for each in lab.report.assertions if not each.ok]

    if lives:
        assert [str(each) for each in failed] == []
    else:
        assert failed[0].name == "what the client says is answered"
        counted = re.findall(r"(\d+) x open with", failed[0].detail)
        assert sum(map(int, counted)) == 3  # nothing else is wrong with them


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.criu
@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("UDP, a server's socket", 6),
        ("UDP, a socket of all addresses", 6),
        ("UDP, a socket of both families", 4),
        ("UDP, moved on and back", 4),
        ("UDP, connected sockets", 6),
        ("UDP, by a relay", 4),
        ("UDP, the peers' own host", 4),
        ("UDP, both ends move", 6),
    ],
)
def test_twenty_sockets_move_by_criu(name, family):
    """As the rows of the matrix, which are told without CRIU."""
    [row] = (each for each in find_situations() if each.name == name)
    outcome = play(Cell(replace(row, engine="criu"), family, Column("natkeep", "stateful", True)))

    assert (outcome.verdict, outcome.reason) == ("pass", "")
