"""A packet of a kept connection, as rules of others see it, and what may be done to it.

Rule: values only; plan/other_rules.py follows the rules. This file must never look at a machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

from natkeep.plan.protocols import TCP, Protocol
from natkeep.plan.tuples import FourTuple
from natkeep.values import dataclass, replace

INVALID, NEW, ESTABLISHED, UNTRACKED = 1, 8, 2, 64
"""NF_CT_STATE_BIT of what conntrack calls a packet."""
UNKNOWN = -1
"""A mark that is not known: it came with the connection, or from a map."""
ANY = -1, ""
"""A device that is not known: of several routes one is chosen."""


class Effect(NamedTuple):
    """What may be done to the packet: `masquerade`, `drop`, …; where: `FAMILY TABLE CHAIN`."""

    does: str
    where: str
    sure: bool

    def mark(self) -> int | None:
        """Of an effect `mark N` or `connmark N` the number, where that is known."""
        mark = int(self.does.partition(" ")[2])
        return mark if self.sure and mark != UNKNOWN else None


@dataclass(frozen=True, slots=True)
class Packet:
    """A segment with data of an established connection, or a datagram, as it passes a hook.

    iif, oif: index and name of the devices; 0 and empty where there is none, ANY where one of
    several is chosen. state: what conntrack calls it, one of INVALID, NEW, ESTABLISHED and
    UNTRACKED. mark: what rules before have given it; connmark: what its connection has. back: index
    of the device by which its source is reached. None where these are not known.
    """

    tuple_: FourTuple
    iif: tuple[int, str] = (0, "")
    oif: tuple[int, str] = (0, "")
    state: int | None = ESTABLISHED
    mark: int | None = 0
    connmark: int | None = None
    back: int | None = None
    protocol: Protocol = TCP

    def after(self, effects: Iterable[Effect]) -> Packet:
        """The same when *effects* have been done to it."""
        packet = self
        for effect in effects:
            if effect.does == "notrack":
                packet = replace(packet, state=UNTRACKED if effect.sure else None)
            elif effect.does.startswith("mark "):
                packet = replace(packet, mark=effect.mark())
            elif effect.does.startswith("connmark "):
                packet = replace(packet, connmark=effect.mark())
        return packet

    def load(self, what: str, at: tuple[int, ...]) -> bytes | None:
        """What an expression loads; None where it is not known."""
        version = self.tuple_.source.address.version
        if what.startswith("payload"):
            return self._payload(what, *at)
        known = {
            "iif": None if self.iif == ANY else _pack(self.iif[0]),
            "oif": None if self.oif == ANY else _pack(self.oif[0]),
            "iifname": None if self.iif == ANY else self.iif[1].encode().ljust(16, b"\0"),
            "oifname": None if self.oif == ANY else self.oif[1].encode().ljust(16, b"\0"),
            "nfproto": bytes([2 if version == 4 else 10]),
            "l4proto": bytes([self.protocol.number]),
            "protocol": b"\x08\x00" if version == 4 else b"\x86\xdd",
            "mark": _pack(self.mark),
            "ct mark": _pack(self.connmark),
            "ct state": _pack(self.state),
        }
        if what.startswith("fib") and self.back is not None and self.iif != ANY:
            comes_back = self.back == self.iif[0]
            return bytes([comes_back]) if what == "fib present" else _pack(comes_back * self.iif[0])
        return known.get(what)

    def _payload(self, what: str, offset: int, length: int) -> bytes | None:
        source, destination = self.tuple_.source, self.tuple_.destination
        if (what, offset, length) == ("payload 2", 13, 1) and self.protocol == TCP:
            return b"\x10"  # ACK
        if what == "payload 2":
            ports = source.port.to_bytes(2, "big") + destination.port.to_bytes(2, "big")
            return ports[offset : offset + length] if offset + length <= 4 else None
        packed = source.address.packed + destination.address.packed
        start, protocol = (12, 9) if len(packed) == 8 else (8, 6)
        if what == "payload 1" and (offset, length) == (protocol, 1):
            return bytes([self.protocol.number])
        if what != "payload 1" or not start <= offset <= start + len(packed) - length:
            return None
        return packed[offset - start :][:length]


def _pack(number: int | None) -> bytes | None:
    return None if number is None else number.to_bytes(4, sys.byteorder)
