"""kernel/tcp_probe.py: a probe is a good packet, and has no data."""

from __future__ import annotations

import pytest

from natkeep.kernel import tcp_probe
from natkeep.plan.tuples import Endpoint, FourTuple

TUPLES = {
    4: FourTuple(Endpoint.parse("10.2.0.10:5000"), Endpoint.parse("10.1.0.2:65535")),
    6: FourTuple(Endpoint.parse("[fd00:2::10]:5000"), Endpoint.parse("[fd00:1::2]:1")),
}


@pytest.mark.needs("scapy")
@pytest.mark.parametrize("sequence", [*tcp_probe.SEQUENCES, 0xFFFFFFFF])
@pytest.mark.parametrize("version", [4, 6])
def test_a_probe_is_a_bare_acknowledgement_with_a_good_checksum(
    version: int, sequence: int
) -> None:
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6

    tuple_ = TUPLES[version]
    packet = (IP if version == 4 else IPv6)(tcp_probe.pack_probe(tuple_, sequence))
    segment = packet[TCP]
    again = type(packet)(bytes(packet))
    del again[TCP].chksum  # scapy then computes it

    assert (packet.src, packet.dst) == (
        str(tuple_.source.address), str(tuple_.destination.address),
    )  # fmt: skip
    assert (segment.sport, segment.dport) == (tuple_.source.port, tuple_.destination.port)
    assert (segment.flags, segment.seq, segment.ack) == ("A", sequence, sequence)
    assert bytes(segment.payload) == b""
    assert segment.chksum == type(packet)(bytes(again))[TCP].chksum


def test_of_two_probes_one_is_outside_of_any_window() -> None:
    """A window is less than 2^30 (RFC 7323), and these are half of the circle apart."""
    first, second = tcp_probe.SEQUENCES

    assert (second - first) % (1 << 32) == 1 << 31


@pytest.mark.root
def test_what_cannot_be_sent_is_counted_and_no_failure(netns: str) -> None:
    """In a namespace that has nothing but lo, no peer can be reached."""
    from natkeep.kernel.netns import inside, open_namespace

    here = FourTuple(Endpoint.parse("10.2.0.10:5000"), Endpoint.parse("127.0.0.1:9"))
    with inside(open_namespace(netns)):
        assert tcp_probe.probe([*TUPLES.values(), here]) == 1
