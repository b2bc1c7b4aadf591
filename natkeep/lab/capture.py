"""Captures on the wires, by tcpdump, and their frames, read with scapy.

A capture is made at a point (a host's interface), and is ready when `Captures` returns. It is
evidence only if the kernel dropped none of its packets and if it holds any: `are_complete` says so
for every point. wire_checks.py says what the frames prove.

    client ── near ── gateway ── far ── switch ── destination

are the points, one interface each; `destination` is the switch's port to that host, before the
anti-spoof filter drops anything.

Rule: a TCP segment is dissected here (captures may be long), everything else by scapy, so that
ARP, neighbour discovery and the packet that an ICMP error quotes count as carriers of addresses.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import signal
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from natkeep.lab.datagrams import NUMBER_BITS
from natkeep.lab.host import Host, LabError, await_true
from natkeep.lab.report import Assertion
from natkeep.lab.time_scale import scaled
from natkeep.lab.topology import Address, Topology
from natkeep.plan.tuples import Endpoint, FourTuple

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
_SNAPLEN = 160  # all headers, with options and with what an ICMP error quotes
_EARLY_LOOKS = 3
_STATISTICS = re.compile(
    r"(\d+) packets? captured.*?(\d+) packets? received.*?(\d+) packets? dropped by kernel", re.S
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A TCP segment: sequence numbers as on the wire, length of its data, timestamp value.

    In a lab of UDP a datagram, whose number is *seq*; of one in fragments the first fragment.
    """

    tuple: FourTuple
    flags: int
    seq: int
    ack: int
    length: int
    timestamp: int | None


@dataclass(frozen=True, slots=True)
class Frame:
    """A captured frame: when, every address that it carries in any header, and its segment."""

    at_ns: int
    addresses: frozenset[Address]
    summary: str
    segment: Segment | None = None


COMPLETE = "the captures are complete"
"""The assertion about the evidence itself."""


class Capture:
    """tcpdump at one point; started by making it, ended by `stop`."""

    def __init__(
        self, point: str, host: Host, interface: str, directory: Path, *, udp: bool = False
    ) -> None:
        self._udp = udp
        self.point, self.path = point, directory / f"{point}.pcap"
        self.captured = self.received = self.dropped = 0
        self._host, self._stopped, self._early, self._lost = host, False, 0, 0
        # The kernel counts what passes lo on its way out and in; libpcap keeps what comes in.
        self._counted = 2 if interface == "lo" else 1
        # In the host's pid namespace, so that it ends with the host whatever happens.
        self._tcpdump = host.start(
            f"tcpdump-{point}",
            "tcpdump", "-i", interface, "-w", str(self.path), "-U", "--immediate-mode",
            "-s", str(_SNAPLEN), "-B", "16384", "-Z", "root", "-n",
            "--time-stamp-precision=nano",
        )  # fmt: skip

    def await_ready(self) -> None:
        """Wait until tcpdump says that it listens."""

        def listening() -> bool:
            said = self._tcpdump.log.read_text()
            if self._tcpdump.process.poll() is not None:
                raise LabError(f"tcpdump at {self.point}: {said.strip()}")
            return "listening on" in said

        await_true(listening, f"tcpdump at {self.point} to listen")
        # What the kernel counted while libpcap was still setting its buffer up is in no buffer,
        # and before the scenario: what is not written after some looks never will be.
        self._early = min(self._look_at_missing() for _ in range(_EARLY_LOOKS))

    def stop(self) -> None:
        """End the capture once tcpdump has written all that the kernel gave it; once."""
        if self._stopped:
            return
        self._stopped = True
        with contextlib.suppress(LabError):  # an incomplete capture shows in `flaws`
            await_true(self._caught_up, f"tcpdump at {self.point} to write", seconds=6)
        # What comes between here and its end is counted and not written, and after the scenario.
        self._lost = self._missing()
        self._host.kill(self._tcpdump.pid, signal.SIGINT)
        self._tcpdump.process.wait(scaled(5))
        self._read_statistics()

    def flaws(self) -> str:
        """Why this capture proves nothing; empty when it is good evidence."""
        if self.dropped:
            return f"{self.point}: {self.dropped} packets dropped by the kernel"
        if self._lost:
            return f"{self.point}: {self._lost} packets never written"
        return "" if self.captured else f"{self.point}: no packet at all"

    def frames(self) -> list[Frame]:
        """What was captured, in the order of capture."""
        return read_frames(self.path, udp=self._udp)

    def _caught_up(self) -> bool:
        if self._tcpdump.process.poll() is not None:
            self._read_statistics()
            return True  # ended already, by an interrupt or with its host
        return self._look_at_missing() <= 0

    def _look_at_missing(self) -> int:
        # SIGUSR1 makes tcpdump print its statistics and go on.
        known = self._read_statistics()
        self._host.kill(self._tcpdump.pid, signal.SIGUSR1)
        await_true(lambda: self._read_statistics() > known, "tcpdump's statistics")
        return self._missing()

    def _missing(self) -> int:
        """How many packets the kernel had for us that are not in the file."""
        return max(0, self.received // self._counted - self.captured - self._early)

    def _read_statistics(self) -> int:
        """Read the newest statistics; how many there are."""
        found = _STATISTICS.findall(self._tcpdump.log.read_text())
        if found:
            self.captured, self.received, self.dropped = (int(number) for number in found[-1])
        return len(found)


class Captures:
    """All captures of a lab, by point; *more* points: name to role and interface.

    udp: the segments of the frames are datagrams.
    """

    def __init__(
        self, lab: Topology, more: Mapping[str, tuple[str, str]], *, udp: bool = False
    ) -> None:
        self._captures: dict[str, Capture] = {}
        for point, (role, interface) in {**points(lab), **more}.items():
            self._captures[point] = Capture(point, lab[role], interface, lab.directory, udp=udp)
            lab.defer(self._captures[point].stop)
        for capture in self._captures.values():
            capture.await_ready()

    def __getitem__(self, point: str) -> Capture:
        return self._captures[point]

    def __iter__(self) -> Iterator[Capture]:
        return iter(self._captures.values())

    def stop(self) -> dict[str, list[Frame]]:
        """End all captures; the frames of each point."""
        for capture in self:
            capture.stop()
        return {point: capture.frames() for point, capture in self._captures.items()}

    def are_complete(self) -> Assertion:
        """Whether the captures are evidence at all."""
        flaws = [flaw for capture in self if (flaw := capture.flaws())]
        counts = ", ".join(f"{capture.point} {capture.captured}" for capture in self)
        return Assertion(COMPLETE, not flaws, "; ".join(flaws) or counts)


def points(lab: Topology) -> dict[str, tuple[str, str]]:
    """The points of a lab: name to role and interface.

    Each host on the client's side, by its role; both sides of the gateway; and the switch's
    port to each destination, by that one's role.
    """
    found = {"near": ("gateway", "near")}
    for seat in lab.seats:
        if seat.role in lab.peers:
            found[seat.role] = (seat.role, "eth0")
        elif seat.network == "near" and seat.role in lab.sites:
            found[seat.role] = ("switch", seat.role)
        elif seat.network not in ("near", "old"):
            found[seat.role] = ("switch", seat.role)
            side = seat.network if seat.network not in found else f"{seat.network}-gateway"
            found[side] = ("gateway", seat.network)
    return found


def beyond_gateway(lab: Topology) -> list[str]:
    """The points between gateway and destinations, where no frame may carry OLD."""
    sides = {("switch", seat.role) for seat in lab.seats if seat.role in lab.sites}
    beyond = (seat for seat in lab.seats if seat.network != "near")
    sides |= {("gateway", seat.network) for seat in beyond if seat.role in lab.sites}
    return [point for point, where in points(lab).items() if where in sides]


def read_frames(path: Path, *, udp: bool = False) -> list[Frame]:
    """The frames of a capture file; a segment in fragments is in the first one, with its length.

    udp: datagrams are what is taken for segments.
    """
    from scapy.utils import RawPcapReader  # slow to import, and needed only here

    frames: list[Frame] = []
    cut: dict[bytes, int] = {}  # where the first fragment of an IPv4 packet is
    with contextlib.closing(RawPcapReader(str(path))) as reader:  # scapy 2.5 knows no `with`
        for raw, meta in reader:
            # `usec` holds nanoseconds in a nanosecond capture
            at_ns = meta.sec * 10**9 + meta.usec * (1 if reader.nano else 1000)
            frame = _udp_frame(at_ns, raw) if udp else _tcp_frame(at_ns, raw)
            if (
                not udp and raw[12:14] == b"\x08\x00" and raw[20] & 0x3F | raw[21]
            ):  # more follow, or an offset
                number = raw[18:20] + raw[26:34]
                if frame is not None:
                    cut[number] = len(frames)
                elif number in cut:
                    more = int.from_bytes(raw[16:18], "big") - (raw[14] & 15) * 4
                    frames[cut[number]] = _lengthen(frames[cut[number]], more)
            frames.append(frame or _other_frame(at_ns, raw))
    return frames


def _lengthen(frame: Frame, octets: int) -> Frame:
    """With what another fragment has of the same segment."""
    assert frame.segment is not None
    return replace(frame, segment=replace(frame.segment, length=frame.segment.length + octets))


def _tcp_frame(at_ns: int, raw: bytes) -> Frame | None:
    """The frame when it is plain TCP, else None."""
    kind = raw[12:14]
    if kind == b"\x08\x00" and raw[23] == 6:
        header = (raw[14] & 15) * 4
        # a fragment other than the first has no TCP header
        if int.from_bytes(raw[20:22], "big") & 0x1FFF:
            return None
        total = int.from_bytes(raw[16:18], "big") - header
        ends, tcp = (raw[26:30], raw[30:34]), raw[14 + header :]
    elif kind == b"\x86\xdd" and raw[20] == 6:
        total = int.from_bytes(raw[18:20], "big")
        ends, tcp = (raw[22:38], raw[38:54]), raw[54:]
    else:
        return None
    sport, dport, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", tcp)
    tuple_ = _four_tuple(ends[0], sport, ends[1], dport)
    size = (offset >> 4) * 4
    segment = Segment(tuple_, flags, seq, ack, total - size, _timestamp(tcp[20:size]))
    carried = frozenset((tuple_.source.address, tuple_.destination.address))
    return Frame(at_ns, carried, f"{tuple_} flags {flags:#04x} len {total - size}", segment)


def _udp_frame(at_ns: int, raw: bytes) -> Frame | None:
    """The frame when it begins a datagram of UDP, else None."""
    kind = raw[12:14]
    if kind == b"\x08\x00" and raw[23] == 17 and not int.from_bytes(raw[20:22], "big") & 0x1FFF:
        ends, udp = (raw[26:30], raw[30:34]), raw[14 + (raw[14] & 15) * 4 :]
    elif kind == b"\x86\xdd" and raw[20] == 17:
        ends, udp = (raw[22:38], raw[38:54]), raw[54:]
    elif kind == b"\x86\xdd" and (raw[20], raw[54]) == (44, 17) and not raw[56] and raw[57] < 8:
        ends, udp = (raw[22:38], raw[38:54]), raw[62:]  # behind a fragment header, of offset 0
    else:
        return None
    sport, dport, length = struct.unpack_from("!HHH", udp)
    tuple_ = _four_tuple(ends[0], sport, ends[1], dport)
    number = int.from_bytes(udp[9:16], "big") >> NUMBER_BITS
    segment = Segment(tuple_, 0, number, 0, length - 8, None)
    carried = frozenset((tuple_.source.address, tuple_.destination.address))
    return Frame(at_ns, carried, f"{tuple_} datagram {number} len {length - 8}", segment)


def _timestamp(options: bytes) -> int | None:
    """The timestamp value (option 8) of TCP options."""
    at = 0
    while at < len(options) and options[at]:
        if options[at] == 1:
            at += 1
        elif options[at] == 8:
            return int.from_bytes(options[at + 2 : at + 6], "big")
        else:
            at += max(options[at + 1], 2) if at + 1 < len(options) else 2
    return None


@lru_cache(maxsize=4096)
def _four_tuple(source: bytes, sport: int, destination: bytes, dport: int) -> FourTuple:
    return FourTuple(
        Endpoint(ipaddress.ip_address(source), sport),
        Endpoint(ipaddress.ip_address(destination), dport),
    )


def _other_frame(at_ns: int, raw: bytes) -> Frame:
    """A frame that is not plain TCP: every address in any of its layers."""
    from scapy.layers.inet import IP, IPerror
    from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPerror6, IPv6
    from scapy.layers.l2 import ARP, Ether

    packet = Ether(raw)
    fields: dict[type, tuple[str, ...]] = {
        IP: ("src", "dst"), IPerror: ("src", "dst"), IPv6: ("src", "dst"),
        IPerror6: ("src", "dst"), ICMPv6ND_NS: ("tgt",), ICMPv6ND_NA: ("tgt",),
    }  # fmt: skip
    texts: list[str] = []
    for layer in _layers(packet):
        if isinstance(layer, ARP) and layer.ptype == 0x0800:
            texts += [layer.psrc, layer.pdst]
        for name in fields.get(type(layer), ()):
            texts.append(getattr(layer, name))
    return Frame(at_ns, frozenset(_addresses(texts)), packet.summary())


def _layers(packet: object) -> Iterator[object]:
    layer = packet
    while layer:  # scapy's NoPayload is false
        yield layer
        layer = layer.payload  # type: ignore[attr-defined]  # scapy is untyped


def _addresses(texts: Iterable[str]) -> Iterator[Address]:
    for text in texts:
        with contextlib.suppress(ValueError):
            yield ipaddress.ip_address(text)
