"""An intruder: it tries what was never kept, and nothing of that may be opened.

    intruder = Intruder(lab)     listens at the destination, on NEW's port and on any address
    intruder.try_everything()    another port, source, destination, protocol; spoofed segments
    intruder.try_again()         after the connection's end: a SYN on its tuple

Rule: an attempt is a frame put on a wire as it is, with a sequence number of its own by which it
is known again wherever it appears. What may arrive, because it is addressed to NEW or was put on
the destination's own wire, must still not be answered on a kept tuple nor from OLD.
(A SYN to NEW from a kept peer's port is NEW's own business: conntrack gives it another port.)
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from natkeep.lab.application import start_server
from natkeep.lab.capture import ACK, RST, SYN, Frame, beyond_gateway
from natkeep.lab.host import Host
from natkeep.lab.lab import Lab
from natkeep.lab.topology import CLIENT, DESTINATION, SECOND_CLIENT, Address
from natkeep.plan.move import Mode
from natkeep.plan.tuples import Endpoint, FourTuple

OTHER_PORT = 5001
_FIRST_SEQ = 0x51_00_00_00
_NARROW = 1280

# Puts frames on wires as they are: [[interface, hex], …] on its standard input.
_SENDER = """
import json, socket, sys
for interface, frame in json.load(sys.stdin):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind((interface, 0))
        sock.send(bytes.fromhex(frame))
"""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One frame: what it tries, by which number it is known, and whether it may arrive at B.

    may_be_refused: B may tell the gateway, which tells no peer, that no socket has the tuple.
    """

    name: str
    seq: int
    may_arrive: bool = False
    may_be_refused: bool = False


class Intruder:
    """Tries everything at one lab; `select_frames` keeps its frames from the usual checks."""

    def __init__(self, lab: Lab, wire: FourTuple | None = None) -> None:
        """wire: the kept tuple as it arrives at NEW, where that is not from its peer itself."""
        self.lab, self.attempts = lab, list[Attempt]()
        self.kept = lab.traffic.kept[0]
        self.wire = wire or FourTuple(
            self.kept.source, Endpoint(lab.new, self.kept.destination.port)
        )
        self.began_ns = time.time_ns()
        self.usual, lab.select_frames = lab.select_frames, self.select_frames
        port, anywhere = self.kept.destination.port, "0.0.0.0" if lab.family == 4 else "[::]"
        self.listener = start_server(
            lab.topology[DESTINATION.role], "listener",
            Endpoint(lab.new, port), f"{anywhere}:{OTHER_PORT}",
        )  # fmt: skip

    # What is tried

    def try_everything(self) -> None:
        """All attempts on a connection that lives."""
        client, port = self.kept.source.address, self.kept.source.port
        to = self.kept.destination.port
        neighbour, old, new = SECOND_CLIENT.address(self.lab.family), self.lab.old, self.lab.new
        at_client = [
            self._tcp("another client port", client, port + 1, old, to, "S"),
            self._tcp("another destination port", client, port, old, OTHER_PORT, "S"),
            self._datagram("UDP", client, port, old, to),
            self._tcp("an ACK beside a kept tuple", client, port + 2, old, to, "A"),
            self._tcp("data beside a kept tuple", client, port + 2, old, to, "PA"),
            self._error("an error that quotes another tuple", neighbour, port + 1, old),
            self._tcp("a SYN to NEW from a kept peer", client, port, new, to, "S", arrives=True),
        ]
        at_neighbour = [
            self._tcp("another source", neighbour, port, old, to, "S"),
            self._tcp("another source, no SYN", neighbour, port, old, to, "A"),
        ]
        # Past the gateway, on the destination's own wire, with OLD as the destination.
        at_far = [
            self._tcp("a SYN to OLD itself", client, port + 3, old, to, "S", arrives=True),
            self._tcp("a SYN to any address", client, port + 3, old, OTHER_PORT, "S", arrives=True),
            self._tcp("data to OLD itself", client, port + 3, old, to, "PA", arrives=True),
            self._tcp("a kept tuple to OLD itself", client, port, old, to, "PA", arrives=True),
        ]
        gateway = self.lab.topology["gateway"]
        near = _mac(gateway, "near")
        self._send(self.lab.topology[CLIENT.role], "eth0", near, at_client)
        self._send(self.lab.topology[SECOND_CLIENT.role], "eth0", near, at_neighbour)
        destination = _mac(self.lab.topology[DESTINATION.role], "eth0")
        self._send(gateway, "far", destination, at_far)

    def try_again(self) -> None:
        """When the connection has ended: a SYN on its tuple, which must not find a listener."""
        source, destination = self.kept.source, self.kept.destination
        again = self._tcp(
            "a SYN on a kept tuple after its end",
            source.address, source.port, destination.address, destination.port, "S",
        )  # fmt: skip
        if self.lab.mode == Mode.STATELESS:  # it is the destination that knows of the end
            self.attempts[-1] = replace(self.attempts[-1], may_arrive=True, may_be_refused=True)
        gateway = _mac(self.lab.topology["gateway"], "near")
        self._send(self.lab.topology[CLIENT.role], "eth0", gateway, [again])

    # What came of it

    def select_frames(self, frames: Mapping[str, Sequence[Frame]]) -> dict[str, list[Frame]]:
        """Assert from all frames that nothing was opened; returns those from before the attempts.

        Whether the kept connections live on afterwards is shown by their octets.
        """
        far = beyond_gateway(self.lab.topology)
        late = [f for at in far for f in frames[at] if f.at_ns >= self.began_ns]
        self._check_arrivals(late)
        self._check_answers(late)
        self._check_listeners()
        before = {
            at: [frame for frame in each if frame.at_ns < self.began_ns]
            for at, each in frames.items()
        }
        return self.usual(before)

    def _check_arrivals(self, late: Sequence[Frame]) -> None:
        seqs = {frame.segment.seq for frame in late if frame.segment}
        neighbour = SECOND_CLIENT.address(self.lab.family)
        bad = [each.name for each in self.attempts if not each.may_arrive and each.seq in seqs]
        bad += [f.summary for f in late if neighbour in f.addresses and not f.segment]
        bad += [frame.summary for frame in late if "UDP" in frame.summary]
        detail = ", ".join(dict.fromkeys(bad)) or f"{len(self.attempts)} attempts"
        self.lab.report.check("what was never kept does not pass the gateway", not bad, detail)

    def _check_answers(self, late: Sequence[Frame]) -> None:
        """An answer means that there is something to talk to; a reset would show it, too."""
        numbers = {(each.seq + 1) % 2**32: each for each in self.attempts}
        taken = {self.wire.reply()}
        bad = []
        for frame in late:
            segment = frame.segment
            if segment is None or not segment.flags & ACK:
                continue
            attempt = numbers.get(segment.ack)
            if attempt is None and not segment.flags & SYN:
                continue
            if attempt and attempt.may_be_refused and segment.flags & RST:
                continue
            if attempt is None or not attempt.may_arrive or segment.tuple in taken:
                bad.append(f"{attempt.name if attempt else 'unknown'}: {frame.summary}")
        detail = "; ".join(dict.fromkeys(bad)) or f"0 answers in {len(late)} frames"
        self.lab.report.check("no attempt is answered by the destination", not bad, detail)

    def _check_listeners(self) -> None:
        accepted = [
            f"{each['peer']} at {each['local']}"
            for each in self.listener.fresh()["connections"]
        ]  # fmt: skip
        traffic = self.lab.traffic
        more = traffic.process.fresh()["connections"][len(traffic.kept) :]
        accepted += [f"{each['peer']} at the process" for each in more]
        detail = ", ".join(accepted) or "listeners on NEW's port, on any address, and the process"
        self.lab.report.check("no listener has accepted anybody", not accepted, detail)

    # How the frames are made

    def _tcp(
        self, name: str, source: Address, sport: int, destination: Address, dport: int,
        flags: str, *, arrives: bool = False,
    ) -> Any:  # fmt: skip
        from scapy.layers.inet import TCP

        seq = self._note(name, arrives=arrives)
        tcp = TCP(sport=sport, dport=dport, flags=flags, seq=seq, ack=0 if flags == "S" else 1)
        packet = _ip(source, destination) / tcp
        return packet / b"let me in" if "P" in flags else packet

    def _datagram(
        self, name: str, source: Address, sport: int, destination: Address, dport: int
    ) -> Any:
        from scapy.layers.inet import UDP

        self._note(name)
        return _ip(source, destination) / UDP(sport=sport, dport=dport) / b"let me in"

    def _error(self, name: str, source: Address, quoted_port: int, old: Address) -> Any:
        """`Packet too big`, from *source* about a segment that OLD never sent there."""
        from scapy.layers.inet import ICMP, TCP
        from scapy.layers.inet6 import ICMPv6PacketTooBig

        seq = self._note(name)
        port = self.kept.destination.port
        quoted = _ip(old, source) / TCP(sport=port, dport=quoted_port, seq=seq)
        too_big = (
            ICMP(type=3, code=4, nexthopmtu=_NARROW)
            if old.version == 4
            else ICMPv6PacketTooBig(mtu=_NARROW)
        )
        return _ip(source, old) / too_big / bytes(quoted)

    def _note(self, name: str, *, arrives: bool = False) -> int:
        attempt = Attempt(name, _FIRST_SEQ + 0x1_0000 * len(self.attempts), arrives)
        self.attempts.append(attempt)
        return attempt.seq

    def _send(self, host: Host, interface: str, to: str, packets: Sequence[Any]) -> None:
        from scapy.layers.l2 import Ether

        source = _mac(host, interface)
        frames = [
            (interface, bytes(Ether(src=source, dst=to) / packet).hex()) for packet in packets
        ]
        host.run(sys.executable, "-I", "-S", "-c", _SENDER, text_in=json.dumps(frames))


def _ip(source: Address, destination: Address) -> Any:
    from scapy.layers.inet import IP
    from scapy.layers.inet6 import IPv6

    kind = IP if source.version == 4 else IPv6
    return kind(src=str(source), dst=str(destination))


def _mac(host: Host, interface: str) -> str:
    shown: list[dict[str, str]] = json.loads(host.run("ip", "-j", "link", "show", interface).stdout)
    return shown[0]["address"]
