"""The holder's part for datagrams: its packet sockets, and the delivery before the gate opens.

Rule: a datagram is delivered once, so never one that may have passed the gate. So they are
delivered while it is closed, and not taken any more from then on: what arrives between that and the
opening, some tenths of a millisecond, is dropped by the gate. Where the opening does not wait any
longer, nothing more is delivered.
The holder (kernel/segment_holderd.py) loads this file where a move has UDP sockets alone.
"""

from __future__ import annotations

import time
from _socket import AF_INET, AF_INET6, MSG_TRUNC, inet_ntop, socket
from struct import unpack_from

TYPE_CHECKING = False  # typing.TYPE_CHECKING, without importing typing
if TYPE_CHECKING:
    from collections.abc import Callable

    from natkeep.plan.datagrams import Datagram, Datagrams

_AT_A_TIME = 256  # packets, before anything else has its turn
_ANCILLARY = 64  # octets; struct tpacket_auxdata has 20, its header 16
_CHECKSUM_KNOWN = 0x08 | 0x80  # TP_STATUS_CSUMNOTREADY: still to be computed; TP_STATUS_CSUM_VALID
_OFFLOAD = 10  # octets: struct virtio_net_hdr
_GSO_UDP_L4 = 5
_EINVAL = 22


class HeldDatagrams:
    """The datagrams of a move, and the sockets by which they come and go.

    pairs: for each IP version a packet socket and a raw socket. buffer: room for a packet.
    has_socket: whether a socket has the datagrams of a key (plan/replay.py).
    """

    def __init__(
        self,
        store: Datagrams,
        pairs: dict[int, tuple[socket, socket]],
        buffer: bytearray,
        has_socket: Callable[[bytes], bool],
        close_filter: Callable[[socket], None],
    ) -> None:
        self.store, self.pairs, self.buffer = store, pairs, buffer
        self.has_socket, self.close_filter = has_socket, close_filter
        self.delivered = self.octets = self.cut = 0

    def take(self, packets: socket, most: int = _AT_A_TIME) -> bool:
        """Take packets from the kernel, *most* of them; whether there may be more."""
        buffers, view, now = [self.buffer], memoryview(self.buffer), time.monotonic()
        for _ in range(most):
            try:
                length, ancillary, flags, _ = packets.recvmsg_into(buffers, _ANCILLARY)
            except OSError as error:
                if error.errno != _EINVAL:  # there is no more, or the device has gone down
                    return False
                self.cut += 1  # an offload that this kernel cannot describe
                continue
            if flags & MSG_TRUNC or not ancillary:
                self.cut += 1
                continue
            status, start = unpack_from("=I10xH", ancillary[0][2])
            kind, size = unpack_from("=xB2xH", view)
            self.store.add(
                bytes(view[_OFFLOAD + start : length]),
                now,
                size=size if kind == _GSO_UDP_L4 else 0,
                verify=not status & _CHECKSUM_KNOWN,
            )
        return True

    def count(self) -> tuple[int, int, int]:
        """Datagrams held or delivered, their octets, and those that found no room or time."""
        held = self.store.held
        octets = self.octets + sum(one.octets for one in held)
        return len(held) + self.delivered, octets, self.cut + self.store.refused

    def deliver(self, deadline: float) -> None:
        """Send all that is held, until *deadline* of the monotonic clock; nothing is taken then."""
        known: dict[bytes, bool] = {}
        while self._send(self._gather(deadline), known, deadline):
            pass
        self.close()
        self._send(self._gather(deadline), known, deadline)

    def close(self) -> None:
        """Take no packet any more."""
        for packets, _ in self.pairs.values():
            self.close_filter(packets)

    def _gather(self, deadline: float) -> list[Datagram]:
        for packets, _ in self.pairs.values():
            while self.take(packets) and time.monotonic() < deadline:
                pass
        return self.store.take(time.monotonic())

    def _send(self, held: list[Datagram], known: dict[bytes, bool], deadline: float) -> bool:
        """Send them through lo, those that have a socket; whether there may be more to send."""
        for one in held:
            if time.monotonic() >= deadline:
                self.store.refused += 1
                continue
            if one.end not in known:
                known[one.end] = self.has_socket(one.known)
            if known[one.end]:
                self._send_one(one)
        return bool(held) and time.monotonic() < deadline

    def _send_one(self, one: Datagram) -> None:
        width = (len(one.known) - 4) // 2
        version, family = (4, AF_INET) if width == 4 else (6, AF_INET6)
        try:
            self.pairs[version][1].sendto(one.packet, (inet_ntop(family, one.known[:width]), 0))
        except OSError:
            self.store.refused += 1
            return
        self.delivered += 1
        self.octets += one.octets
