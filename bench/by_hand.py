"""the ways to keep connections that natkeep is measured beside, and the files that they read.

By hand: maps of all connections for `nft -f` with their entries for `conntrack -R`, and two rules a
connection for `iptables-restore`. The floor: the same set and the same entries as natkeep's, packed
beforehand, and the program that does nothing but send them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path

from natkeep.kernel.ctnetlink import NEW as NEW_ENTRY
from natkeep.kernel.ctnetlink import for_each, pack_entry
from natkeep.kernel.netlink import NLM_F_CREATE, NLM_F_EXCL
from natkeep.kernel.nft_messages import pack_batch, pack_fill
from natkeep.plan.tuples import Connections

OLD, NEW, PORT = IPv4Address("10.2.0.10"), IPv4Address("10.3.0.20"), 5000

SENDER = """
import socket, struct, sys
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        data = file.read()
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
    s.bind((0, 0))
    for option in (32, 33):
        s.setsockopt(socket.SOL_SOCKET, option, 1 << 22)
    chunk, at = struct.unpack_from("=I", data)[0], 4
    while at < len(data):
        s.send(data[at : at + chunk])
        at += chunk
        if struct.unpack_from("=i", s.recv(65536), 16)[0]:
            sys.exit(path + ": refused")
"""


def make_connections(count: int) -> Connections:
    """Peers from 10.1.0.1 on, 250 connections each; all to one port of OLD."""
    local = OLD.packed + PORT.to_bytes(2, "big")
    peers = (IPv4Address("10.1.0.1") + i // 250 for i in range(count))
    ports = (1024 + i % 250 for i in range(count))
    return Connections(
        b"".join(local + peer.packed + port.to_bytes(2, "big")
                 for peer, port in zip(peers, ports, strict=True))
    )  # fmt: skip


def write_files(connections: Connections, path: Callable[[str], str]) -> None:
    """What each way reads, in a file of the way's name."""
    peers = [(str(c.source.address), c.source.port) for c in connections]
    write = {
        "list": (f"{c.destination} {c.source}\n" for c in connections),
        "nft": maps_text(peers),
        "entries": (
            f"-I -p tcp -s {a} --sport {p} -d {NEW} --dport {PORT} --dst-nat {OLD} "
            "--state ESTABLISHED --status SEEN_REPLY,ASSURED --timeout 432000 --mark 7\n"
            for a, p in peers
        ),
        "iptables": rules_text(peers),
    }
    for name, lines in write.items():
        Path(path(name)).write_text("".join(lines))
    write_floor(connections, path)


def maps_text(peers: list[tuple[str, int]]) -> Iterator[str]:
    """Two maps, as one would write them by hand."""
    key = "type ipv4_addr . inet_service . inet_service : ipv4_addr . inet_service; "
    for name, chain in (
        ("d", "prerouting priority -120; dnat to ip saddr . tcp sport . tcp dport map @d"),
        ("s", "postrouting priority 80; snat to ip daddr . tcp dport . tcp sport map @s"),
    ):
        address = OLD if name == "d" else NEW
        yield f"table ip hand {{\nmap {name} {{ {key}}}\n"
        yield f"chain {name}_chain {{ type nat hook {chain}\n}}\n}}\n"
        values = ", ".join(f"{a} . {p} . {PORT} : {address} . {PORT}" for a, p in peers)
        yield f"add element ip hand {name} {{ {values} }}\n"


def rules_text(peers: list[tuple[str, int]]) -> Iterator[str]:
    """Two rules a connection."""
    yield "*nat\n"
    for a, p in peers:
        yield f"-A PREROUTING -p tcp -s {a} --sport {p} -d {NEW} --dport {PORT} "
        yield f"-j DNAT --to-destination {OLD}:{PORT}\n"
        yield f"-A POSTROUTING -p tcp -s {OLD} --sport {PORT} -d {a} --dport {p} "
        yield f"-j SNAT --to-source {NEW}:{PORT}\n"
    yield "COMMIT\n"


def write_floor(connections: Connections, path: Callable[[str], str]) -> None:
    """The same set and the same entries as natkeep's, packed, in chunks of one size."""
    fill = pack_batch(pack_fill("floor", "kept", connections))
    Path(path("set")).write_bytes(len(fill).to_bytes(4, sys.byteorder) + fill)

    def pack(outer: object, inner: object) -> bytes:
        return pack_entry(outer, inner, timeout=432_000, ports=False)

    flags = NLM_F_CREATE | NLM_F_EXCL
    entries = for_each(connections.toward(NEW), connections, NEW_ENTRY, flags, pack)
    batch, size = entries.pack(0, entries.count), len(entries.template)
    chunk = (1 << 17) // size * size
    for at in (*range(chunk, len(batch), chunk), len(batch)):
        batch[at - size + 6] |= 4  # NLM_F_ACK for the last of each chunk
    Path(path("ct")).write_bytes(chunk.to_bytes(4, sys.byteorder) + batch)


FLOOR_TABLE = """table ip floor_nat {{
chain c {{ type nat hook prerouting priority -120; meta mark 7 dnat to 10.2.0.10
}}
}}
table inet floor {{
set kept {{ type ipv4_addr . inet_service . inet_service; size {size}; }}
}}
"""
