"""A capture at a host that translates, of some kept connections, for a report as a page.

tcpdump there, on all interfaces: of headers alone, of connections that the kernel's filter names,
and of a bounded number of packets. It begins before the freeze. What it captures comes to us by its
standard output, and it ends with its standard input: nothing is left at that host, even if we are
killed.

Rule: once the freeze has begun nothing here fails, or waits.
"""

from __future__ import annotations

import ipaddress
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from subprocess import PIPE, Popen, TimeoutExpired
from typing import NamedTuple

from natkeep.migrate.host import LOCAL, Host, HostError
from natkeep.page import Seen
from natkeep.plan.tuples import Endpoint, FourTuple

_PACKETS = 50_000
_OCTETS = 128  # of each: link, IPv6, and TCP with all its options
_PATIENCE = 5.0  # s for it to end
LATE = 1.0  # s that a packet may have waited in the kernel when tcpdump gets it
# Without --immediate-mode, by which it would wake for each packet: the kernel hands on what it has
# once in LATE seconds, and a blackout has better use for a processor.
_PROGRAM = """exec 3<&0
tcpdump -i any -y LINUX_SLL2 -B 8192 --time-stamp-precision=nano -n -s "$1" -c "$2" -w - "$3" \
    </dev/null 3<&- & tcpdump=$!
{ read -r _ <&3; kill $tcpdump; } >/dev/null 2>&1 & end=$!
wait $tcpdump; kill $end 2>/dev/null"""
_READY = b"listening on"
_HEADER, _RECORD, _LINK = 24, 16, 20  # octets of the file's, a packet's, and SLL2's
_OUTGOING, _OF_OTHERS = 4, 3  # in SLL2, packet types
_IPV4, _IPV6, _TCP = 0x0800, 0x86DD, 6
_ACK = 0x10

Wires = Mapping[tuple[FourTuple, bool], FourTuple]
"""What is looked for: four-tuple and whether it leaves that host, and what the peer knows it as."""


class Packet(NamedTuple):
    """A segment that passed an interface, by its number; outgoing: on its way out."""

    interface: int
    outgoing: bool
    seen: Seen


def demand_tcpdump(host: Host) -> None:
    """HostError where *host* has none."""
    if host.run("sh", "-c", "command -v tcpdump", ok=None).exit:
        raise HostError(f"{host}: a report as a page needs tcpdump there", hint="package tcpdump")


class Capture:
    """tcpdump at *host*, of the connections that these peers' ends have; it captures when made."""

    def __init__(self, host: Host, peers: Sequence[Endpoint]) -> None:
        wanted = " or ".join(f"host {peer.address} and port {peer.port}" for peer in peers)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - until end
        self.ahead_ns = _read_clock(host)
        words = ("sh", "-c", _PROGRAM, "sh", str(_OCTETS), str(_PACKETS), f"tcp and ({wanted})")
        self._program = host.start(*words, stdin=PIPE, stdout=self._file, stderr=PIPE)
        try:
            self._await_ready(host)
        except BaseException:
            self.end()
            raise

    def _await_ready(self, host: Host) -> None:
        assert self._program.stderr is not None
        said = [b""]
        for line in self._program.stderr:
            if line.startswith((_READY, b"tcpdump: " + _READY)):
                return
            said.append(line)
        raise HostError(f"{host}: tcpdump: {said[-1].decode(errors='backslashreplace').strip()}")

    def read(self, wires: Wires) -> list[Seen]:
        """End it, and what it saw, as the peers know it; times are of our clock."""
        self.end()
        self._file.seek(0)
        found = select(read_packets(self._file.read()), wires)
        return [each._replace(at_ns=each.at_ns - self.ahead_ns) for each in found]

    def end(self) -> None:
        """End it; a second time is fine."""
        assert self._program.stdin is not None
        with suppress(OSError):
            self._program.stdin.close()
        if _has_ended(self._program):
            return
        self._program.terminate()
        self._program.wait()

    def close(self) -> None:
        """End it, and forget what it saw."""
        self.end()
        self._file.close()


def _has_ended(program: Popen[bytes]) -> bool:
    try:
        program.wait(_PATIENCE)
    except TimeoutExpired:
        return False
    return True


def _read_clock(host: Host) -> int:
    """Nanoseconds by which the clock of *host* is ahead of ours."""
    if host.target == LOCAL:
        return 0
    before = time.time_ns()
    there = host.run("date", "+%s%N").stdout.strip()
    return int(there) - (before + time.time_ns()) // 2 if there.isdigit() else 0


def select(packets: Iterator[Packet], wires: Wires) -> list[Seen]:
    """Those that *wires* names, with the peers' four-tuples, in the order of time.

    Bridges and bonds show a packet once more: each four-tuple is taken from one interface.
    """
    found = [
        packet._replace(seen=packet.seen._replace(tuple=kept))
        for packet in packets
        if (kept := wires.get((packet.seen.tuple, packet.outgoing))) is not None
    ]
    counts = Counter((packet.seen.tuple, packet.interface) for packet in found)
    busiest: dict[FourTuple, int] = {}
    for (tuple_, interface), _ in counts.most_common():
        busiest.setdefault(tuple_, interface)
    some = (each.seen for each in found if busiest[each.seen.tuple] == each.interface)
    return sorted(some, key=lambda each: each.at_ns)


def read_packets(octets: bytes) -> Iterator[Packet]:
    """The TCP segments of a capture file, as tcpdump writes it on `any` with nanoseconds."""
    order = "<" if octets[:1] == b"\x4d" else ">"  # of the magic number a1b23c4d
    at = _HEADER
    while at + _RECORD <= len(octets):
        seconds, nanoseconds, size, _ = struct.unpack_from(f"{order}4I", octets, at)
        at += _RECORD
        if packet := _read_packet(octets[at : at + size], seconds * 10**9 + nanoseconds):
            yield packet
        at += size


def _read_packet(raw: bytes, at_ns: int) -> Packet | None:
    if len(raw) < _LINK + 40:
        return None
    protocol, _, interface, _, kind = struct.unpack_from("!HHIHB", raw)
    ip = raw[_LINK:]
    if protocol == _IPV4 and ip[9] == _TCP:
        start, total = (ip[0] & 15) * 4, int.from_bytes(ip[2:4], "big")
        addresses, later = (ip[12:16], ip[16:20]), int.from_bytes(ip[6:8], "big") & 0x1FFF
    elif protocol == _IPV6 and ip[6] == _TCP:
        start, total = 40, 40 + int.from_bytes(ip[4:6], "big")
        addresses, later = (ip[8:24], ip[24:40]), 0
    else:
        return None
    if later or kind == _OF_OTHERS or len(ip) < start + 20:
        return None
    source, destination, seq, ack, offset, flags = struct.unpack_from("!HHIIBB", ip, start)
    ends = zip(addresses, (source, destination), strict=True)
    tuple_ = FourTuple(*(Endpoint(ipaddress.ip_address(each), port) for each, port in ends))
    length = total - start - (offset >> 4) * 4
    seen = Seen(at_ns, tuple_, seq, ack if flags & _ACK else None, max(0, length))
    return Packet(interface, kind == _OUTGOING, seen)
