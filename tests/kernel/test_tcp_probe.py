"""kernel/tcp_probe.py: a probe is a good packet, and has no data."""

from __future__ import annotations

import pytest

from natkeep.kernel import tcp_probe
from natkeep.kernel.netns import entered
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

    here = FourTuple(Endpoint.parse("10.2.0.10:5000"), Endpoint.parse("127.0.0.1:9"))
    with entered(netns):
        assert tcp_probe.probe([*TUPLES.values(), here]) == 1


@pytest.mark.root
def test_a_next_hop_that_does_not_answer_does_not_stop_the_others(
    netns: str, run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its packets fill the send buffer; who is behind another hop is probed all the same."""

    for line in (
        "link add eth0 type veth peer name eth1", "link set eth0 up", "link set eth1 up",
        "link set lo up", "address add 10.3.0.20/24 dev eth0",
        "route add 10.1.0.0/24 via 10.3.0.1", "route add 10.4.0.0/24 via 10.3.0.2",
        "neighbour add 10.3.0.2 lladdr 02:00:00:00:00:02 dev eth0",
    ):  # fmt: skip
        run(netns, "ip", *line.split())
    old = Endpoint.parse("10.2.0.10:5000")
    silent = [FourTuple(old, Endpoint.parse(f"10.1.0.2:{port}")) for port in range(1, 2001)]
    known = [FourTuple(old, Endpoint.parse(f"10.4.0.2:{port}")) for port in range(1, 11)]

    monkeypatch.setattr(tcp_probe, "PATIENCE", 0.1)
    with entered(netns):
        assert tcp_probe.probe(known) == len(known)
        assert tcp_probe.probe(silent) < len(silent)
        run(netns, "nft", "add table ip seen; add chain ip seen out "
            "{ type filter hook postrouting priority 0; }; "
            "add rule ip seen out ip daddr 10.4.0.2 counter")  # fmt: skip
        tcp_probe.probe([*silent, *known])
    assert f"packets {2 * len(known)} " in run(netns, "nft", "list", "chain", "ip", "seen", "out")
