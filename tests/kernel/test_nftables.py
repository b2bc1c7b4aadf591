"""kernel/nftables.py: filling a set, however many elements."""

from __future__ import annotations

import struct
from ipaddress import ip_address

import pytest

from natkeep.kernel import nftables, nftables_dump
from natkeep.kernel.netlink import BUFFER
from natkeep.kernel.netns import entered
from natkeep.kernel.nft_messages import pack_batch, pack_fill
from natkeep.plan.kept_sets import Filling
from natkeep.plan.tuples import Connections


@pytest.mark.root
@pytest.mark.parametrize(("old", "peer", "count"), [
    ("10.2.0.10", "10.1.0.2", 400_000),
    ("fd00:2::10", "fd00:1::2", 250_000),
])  # fmt: skip
def test_a_set_that_no_usual_socket_buffer_holds_is_filled(
    old: str, peer: str, count: int, netns: str, run
) -> None:
    """In one transaction: the kernel takes all of it or nothing."""
    local = ip_address(old).packed + struct.pack("!H", 5000)
    first = int(ip_address(peer))
    records = b"".join(
        local + type(ip_address(peer))(first + n // 60_000).packed + struct.pack("!H", n % 60_000)
        for n in range(count)
    )
    four = ip_address(old).version == 4
    connections = Connections(v4=records) if four else Connections(v6=records)
    kind = "ipv4_addr" if four else "ipv6_addr"
    text = f"set kept {{ type {kind} . inet_service . inet_service; size {count}; }}"
    run(netns, "nft", f"table inet natkeep {{ {text}; }}")
    batch = pack_batch(pack_fill("natkeep", "kept", connections))
    assert len(batch) > 2 * BUFFER, "the kernel doubles what is asked for"

    with entered(netns):
        nftables.fill_sets([Filling("kept", connections)])

        keys = sum(1 for _ in nftables_dump.read_keys("natkeep", "kept"))
    assert keys == count
