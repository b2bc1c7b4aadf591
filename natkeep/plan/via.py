"""the relay's own addresses and ports: under which of them each kept connection is passed on.

    peer:pp > OLD:p ── relay ── FROM:q > NEW:p ── destination ── peer:pp > OLD:p ── process

q is counted, not chosen by the kernel: relay and destination may be two machines, each of which
counts for itself, in the order of the connections' addresses and ports. So all connections at an
OLD are counted, also those that one of the two cannot keep.

Rule: a (FROM, q) stands for one connection of each NEW:p. This file must never look at a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.errors import RefusedError, UsageError
from natkeep.plan.tuples import Address, Connections, Local, address_of, parse_address
from natkeep.values import dataclass

LOW, HIGH = 10000, 32767
"""The ports that are used by default: below those that Linux takes for connections of its own."""


@dataclass(frozen=True, slots=True)
class Via:
    """An address FROM of the relay, and the ports there that it passes connections on from."""

    source: Address
    low: int = LOW
    high: int = HIGH

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high <= 65535:
            raise UsageError(f"--via {self}: {self.low}-{self.high} is no range of ports")
        if self.source.is_loopback or self.source.is_unspecified or self.source.is_multicast:
            raise RefusedError(f"--via {self}: {self.source} is no address of a wire")

    def __str__(self) -> str:
        at = f"[{self.source}]" if self.source.version == 6 else str(self.source)
        return f"{at}:{self.low}-{self.high}"


def parse_via(text: str) -> Via:
    """`FROM`, or `FROM:LOW-HIGH`; an IPv6 address with ports as `[FROM]:LOW-HIGH`."""
    host, low, high = text, LOW, HIGH
    head, colon, ports = text.rpartition(":")
    if colon and "-" in ports:
        host = head
        first, _, last = ports.partition("-")
        if not all(each.isascii() and each.isdigit() and len(each) < 6 for each in (first, last)):
            raise UsageError(f"--via {text}: {ports!r} is no range of ports", hint="FROM:LOW-HIGH")
        low, high = int(first), int(last)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        return Via(parse_address(host), low, high)
    except ValueError as error:
        raise UsageError(f"--via {text}: {error}", hint="FROM, or FROM:LOW-HIGH") from None


def count_ports(
    vias: Iterable[Via], found: Iterable[tuple[Local, Connections]]
) -> dict[bytes, bytes]:
    """For each record of the *found* connections of a NEW the FROM and q that stand for its peer.

    NEW is an end of the wire: without a port it has those of the connections. RefusedError where
    the ports do not suffice.
    """
    vias, ends = tuple(vias), dict[bytes, bytes]()
    of: dict[tuple[bytes, bytes], list[bytes]] = {}
    for new, some in found:
        at = address_of(new).packed
        half = len(at) + 2
        for record in some.each():
            port = new.packed[half - 2 :] or record[half - 2 : half]
            of.setdefault((at, port), []).append(record)
    for (at, port), records in sorted(of.items()):
        total = sum(v.high - v.low + 1 for v in vias if len(v.source.packed) == len(at))
        if len(records) > total:
            raise RefusedError(
                f"too few ports: {total} for the connections at port {int.from_bytes(port, 'big')}",
                hint="--via once more, with another address of the relay",
            )
        ends.update(zip(sorted(records), _each_end(vias, len(at)), strict=False))
    return ends


def _each_end(vias: Iterable[Via], width: int) -> Iterator[bytes]:
    for via in vias:
        if len(via.source.packed) == width:
            for port in range(via.low, via.high + 1):
                yield via.source.packed + port.to_bytes(2, "big")


def rename(connections: Connections, ends: dict[bytes, bytes]) -> Connections:
    """*connections* with the relay's ends in the place of their peers."""
    return Connections.of_records(one[: len(one) // 2] + ends[one] for one in connections.each())
