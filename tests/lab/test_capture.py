"""captures: what is read from them, and when they are no evidence."""

from __future__ import annotations

import ipaddress
import sys
from pathlib import Path

import pytest

pytest.importorskip("scapy")

from scapy.layers.inet import ICMP, IP, TCP, UDP, IPerror, TCPerror, fragment
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet
from scapy.utils import wrpcap

from natkeep.lab.capture import ACK, PSH, Captures, Frame, beyond_gateway, points, read_frames
from natkeep.lab.topology import THIRD, USUAL, Topology
from natkeep.plan.tuples import Endpoint, FourTuple

FRAME = Ether(dst="02:00:00:00:00:01")  # or scapy asks this machine's neighbours, for a second


def read(tmp_path: Path, packet: Packet) -> Frame:
    wrpcap(str(tmp_path / "one.pcap"), [packet])
    (frame,) = read_frames(tmp_path / "one.pcap")
    return frame


def endpoints(source: str, destination: str) -> FourTuple:
    return FourTuple(Endpoint.parse(source), Endpoint.parse(destination))


@pytest.mark.parametrize(
    ("network", "tuple_"),
    [
        (
            IP(src="10.1.0.2", dst="10.2.0.10"),
            endpoints("10.1.0.2:50000", "10.2.0.10:5000"),
        ),
        (
            IPv6(src="fd00:1::2", dst="fd00:2::10"),
            endpoints("[fd00:1::2]:50000", "[fd00:2::10]:5000"),
        ),
    ],
)
def test_a_segment_is_read_as_scapy_wrote_it(tmp_path, network, tuple_):
    options = [("MSS", 1460), ("NOP", None), ("Timestamp", (4711, 0)), ("EOL", None)]
    tcp = TCP(sport=50000, dport=5000, seq=17, ack=18, flags="PA", options=options)
    frame = read(tmp_path, FRAME / network / tcp / b"twelve bytes")

    segment = frame.segment

    assert segment is not None
    assert segment.tuple == tuple_
    assert (segment.flags, segment.seq, segment.ack) == (PSH | ACK, 17, 18)
    assert (segment.length, segment.timestamp) == (12, 4711)
    assert frame.addresses == {tuple_.source.address, tuple_.destination.address}


def test_padding_of_short_frames_is_no_data(tmp_path):
    packet = FRAME / IP(src="10.1.0.2", dst="10.2.0.10") / TCP(flags="A")
    frame = read(tmp_path, Ether(bytes(packet) + bytes(6)))

    assert frame.segment is not None
    assert frame.segment.length == 0
    assert frame.segment.timestamp is None


@pytest.mark.parametrize(
    ("packet", "carried"),
    [
        (ARP(psrc="10.2.0.10", pdst="10.3.0.1"), "10.2.0.10"),
        (ARP(psrc="10.3.0.1", pdst="10.2.0.10"), "10.2.0.10"),
        (IPv6(src="fe80::1", dst="ff02::1") / ICMPv6ND_NA(tgt="fd00:2::10"), "fd00:2::10"),
        (IPv6(src="fe80::1", dst="ff02::1") / ICMPv6ND_NS(tgt="fd00:2::10"), "fd00:2::10"),
        (IP(src="10.2.0.10", dst="10.1.0.2") / UDP(), "10.2.0.10"),
        (
            IP(src="10.3.0.1", dst="10.3.0.20")
            / ICMP(type=3, code=4)
            / IPerror(src="10.2.0.10", dst="10.1.0.2", proto=6)
            / TCPerror(),
            "10.2.0.10",
        ),
    ],
    ids=["ARP sender", "ARP target", "advertisement", "solicitation", "UDP", "quoted by ICMP"],
)
def test_every_header_that_can_carry_an_address_is_read(tmp_path, packet, carried):
    frame = read(tmp_path, FRAME / packet)

    assert ipaddress.ip_address(carried) in frame.addresses
    assert frame.segment is None


def test_order_and_nanoseconds_are_those_of_the_capture(tmp_path):
    packets = [FRAME / IP(src="10.1.0.2", dst="10.2.0.10") / TCP(seq=n) for n in (1, 2)]
    packets[0].time, packets[1].time = 1000.000000001, 999.5
    wrpcap(str(tmp_path / "two.pcap"), packets, nano=True)

    first, second = read_frames(tmp_path / "two.pcap")

    assert second.at_ns == 999_500_000_000
    assert first.at_ns >= 1000 * 10**9


def test_a_segment_in_fragments_has_its_whole_length(tmp_path):
    whole = IP(src="10.1.0.2", dst="10.2.0.10", id=7) / TCP(seq=9) / (b"x" * 1200)
    alone = IP(src="10.1.0.2", dst="10.2.0.10", id=8) / TCP(seq=1209) / b"y"
    packets = [FRAME / each for each in (*fragment(whole, 400), alone)]
    wrpcap(str(tmp_path / "cut.pcap"), packets)

    frames = read_frames(tmp_path / "cut.pcap")

    assert len(frames) == 5
    assert [(f.segment.seq, f.segment.length) for f in frames if f.segment] == [
        (9, 1200),
        (1209, 1),
    ]


def test_points_are_the_peers_both_sides_of_the_gateway_and_each_destination():
    lab = Topology([*USUAL, THIRD])

    assert points(lab) == {
        "near": ("gateway", "near"),
        "client": ("client", "eth0"),
        "far": ("gateway", "far"),
        "destination": ("switch", "destination"),
        "third": ("switch", "third"),
        "third-gateway": ("gateway", "third"),
    }
    assert set(beyond_gateway(lab)) == {"far", "destination", "third", "third-gateway"}


SEND = (
    "import socket; s = socket.socket(type=socket.SOCK_DGRAM);"
    "[s.sendto(b'x', ('10.3.0.20', 9)) for _ in range(500)]"
)


@pytest.mark.root
@pytest.mark.lab
def test_a_capture_has_every_packet_that_was_sent_before_it_ended():
    with Topology() as lab:
        tap = Captures(lab, {})
        lab["client"].run(sys.executable, "-c", SEND)
        frames = tap.stop()
        sent = [f for f in frames["destination"] if "UDP" in f.summary and "ICMP" not in f.summary]

        assert len(sent) == 500
        assert tap.are_complete().ok


@pytest.mark.root
@pytest.mark.lab
def test_an_empty_capture_is_no_evidence():
    with Topology() as lab:
        # Hosts may speak of themselves at any time (ARP, MLD), but not to themselves.
        tap = Captures(lab, {"idle": ("client", "lo")})
        tap.stop()
        flaws = tap.are_complete()

        assert not flaws.ok
        assert "idle: no packet at all" in flaws.detail


@pytest.mark.root
@pytest.mark.lab
def test_a_capture_with_drops_is_no_evidence():
    with Topology() as lab:
        tap = Captures(lab, {})
        lab["client"].run(sys.executable, "-c", SEND)
        tap.stop()
        tap["client"].dropped = 1

        assert "1 packets dropped" in tap.are_complete().detail
        assert not tap.are_complete().ok
