"""The network state of a live TCP connection: frozen, as a value, and created again elsewhere.

It moves a connection without its process. It needs Linux, CAP_NET_ADMIN over the network
namespace, and no more than Python's standard library: this file also works alone, copied away.

At the source:                                      At the destination, in the right namespace:

    # nothing may reach the socket or leave it       # the local address is local here
    state = freeze(sock)                             state = SocketState.from_text(text)
    text = state.to_text()                           sock = recreate(state)
    sock.close()           # silent: no FIN, no RST  # open the network, then one of
    # or, to take it all back: thaw(sock, state)     leave_repair(sock)          # as CRIU does
                                                     leave_repair_silently(sock)

Rule: a socket in repair is not mute. It acknowledges what arrives, and what it acknowledges after
`freeze` is lost; and its timers run: unacknowledged data is sent again, at the destination one
second after `recreate`. So the caller closes the network in both directions before freezing (a drop
in front of the socket is enough: the peer retransmits), and keeps it closed until the destination's
socket exists, since without a socket the kernel answers with RST.

Kept: both queues, sequence numbers, windows, MSS, window scales, SACK, the timestamps' offset
(so PAWS at the peer sees time go on), shut-down states, and the options named in _OPTIONS.
Not kept, as with CRIU: congestion window and RTT, out-of-order segments (the peer sends them
again), ECN, urgent data. Refused: listening and half-made connections, TIME-WAIT, MPTCP, TLS in
the kernel, link-local addresses.

Unsent data (accepted by the kernel, not yet on the wire) is given to the socket after it has left
repair, by the leave_ functions. CRIU leaves repair for a moment while it creates the socket, so
these octets are on the wire some 25 ms before a gate is opened for them, and a dropped first
segment costs a retransmission time-out. Feeding them within repair would be no better: the
kernel counts what is written there as sent, and would find out one time-out later.

States other than ESTABLISHED are reached as CRIU reaches them: our own FIN by shutdown() within
repair, which emits nothing; what the peer did by a forged segment from the peer through `lo`
with mark 0xC114, which a gate lets pass. The kernel may answer that segment with an ACK.

Size: over 400 lines, because one interpreter has to run it without a package beside it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import ipaddress
import os
import pickle
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class RepairError(Exception):
    """A socket cannot be frozen or created again; *hint* says what may help."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MARK = 0xC114  # CRIU's own mark for its forged segments, so that one gate rule fits both

# linux/tcp.h, where Python's socket module has no name for it
_REPAIR, _REPAIR_QUEUE, _QUEUE_SEQ, _REPAIR_OPTIONS, _TIMESTAMP, _REPAIR_WINDOW, _ULP = (
    19, 20, 21, 22, 24, 29, 31
)  # fmt: skip
_ON, _OFF, _OFF_WITHOUT_PROBE = 1, 0, -1
_NO_QUEUE, _RECEIVE_QUEUE, _SEND_QUEUE = 0, 1, 2
_OPT_MSS, _OPT_WINDOW_SCALE, _OPT_SACK, _OPT_TIMESTAMPS = 2, 3, 4, 8
_INFO_TIMESTAMPS, _INFO_SACK, _INFO_WINDOW_SCALE = 1, 2, 4

_SNDBUFFORCE, _RCVBUFFORCE, _BUF_LOCK = 32, 33, 72
_SIOCINQ, _SIOCOUTQ, _SIOCOUTQNSD = 0x541B, 0x5411, 0x894B
_IPPROTO_MPTCP = 262
_MAXSEG_MAX = 32767

# How much is put into a queue by one call; the kernel wants one contiguous piece of memory for it.
_CHUNK = 32 * 1024
# What a buffer needs beyond its payload, generously: it is only lent while a queue is filled.
_OVERHEAD = 256 * 1024

_OPTIONS = {
    "nodelay": (socket.IPPROTO_TCP, socket.TCP_NODELAY),
    "keepidle": (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE),
    "keepintvl": (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL),
    "keepcnt": (socket.IPPROTO_TCP, socket.TCP_KEEPCNT),
    "user_timeout": (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT),
    "keepalive": (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    "reuseport": (socket.SOL_SOCKET, socket.SO_REUSEPORT),
    "priority": (socket.SOL_SOCKET, socket.SO_PRIORITY),
    "mark": (socket.SOL_SOCKET, socket.SO_MARK),
}
# The kernel overwrites SO_REUSEADDR on entering repair and on leaving it; a cork would hold back
# the unsent data. So these two are put back last, after repair.
_LATE_OPTIONS = {
    "reuseaddr": (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    "cork": (socket.IPPROTO_TCP, socket.TCP_CORK),
}


class TcpState(StrEnum):
    """The states that can be frozen, in the kernel's words."""

    ESTABLISHED = "ESTABLISHED"
    FIN_WAIT1 = "FIN_WAIT1"
    FIN_WAIT2 = "FIN_WAIT2"
    CLOSE_WAIT = "CLOSE_WAIT"
    LAST_ACK = "LAST_ACK"
    CLOSING = "CLOSING"

    @property
    def fin_sent(self) -> bool:
        """Our writing side is shut down: the send queue ends, or ended, with a FIN."""
        return self not in (TcpState.ESTABLISHED, TcpState.CLOSE_WAIT)

    @property
    def fin_received(self) -> bool:
        """The peer's FIN is in the receive queue."""
        return self in (TcpState.CLOSE_WAIT, TcpState.LAST_ACK, TcpState.CLOSING)


_STATE_NUMBER = {  # include/net/tcp_states.h
    1: TcpState.ESTABLISHED,
    4: TcpState.FIN_WAIT1,
    5: TcpState.FIN_WAIT2,
    8: TcpState.CLOSE_WAIT,
    9: TcpState.LAST_ACK,
    11: TcpState.CLOSING,
}


class Family(StrEnum):
    """What the socket is, beside what is on the wire."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"
    MAPPED = "IPv4-mapped"  # an IPv6 socket whose packets are IPv4


class Window(NamedTuple):
    """struct tcp_repair_window."""

    snd_wl1: int
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int


class Buffers(NamedTuple):
    """The sizes of both buffers, and which of them were set by hand (SO_BUF_LOCK)."""

    send: int
    receive: int
    lock: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketState:
    """One connection, complete; `local` and `peer` are (address on the wire, port)."""

    family: Family
    local: tuple[Address, int]
    peer: tuple[Address, int]
    tcp_state: TcpState
    send_seq: int  # of the first octet of `unacknowledged`
    unacknowledged: bytes  # sent, not acknowledged
    unsent: bytes  # in the send queue, never sent
    fin_unsent: bool  # shutdown() was called, but the FIN waits behind `unsent`
    receive_seq: int  # of the first octet of `unread`
    unread: bytes
    mss: int
    window_scales: tuple[int, int] | None  # of the peer, our own
    sack: bool
    timestamps: bool
    timestamp: int  # the clock that the peer sees, at the freeze
    window: Window
    buffers: Buffers
    options: tuple[tuple[str, int], ...]

    def to_text(self) -> str:
        """The state as text; only for files of which this program is the only writer."""
        return base64.b64encode(pickle.dumps(self)).decode()

    @classmethod
    def from_text(cls, text: str) -> SocketState:
        """What to_text made."""
        state: SocketState = pickle.loads(base64.b64decode(text))
        return state

    def __str__(self) -> str:
        return f"{_print(self.local)} < {_print(self.peer)} {self.tcp_state}"


class RepairSocket(socket.socket):
    """A re-created socket in repair, with what can only be done once it has left repair."""

    state: SocketState
    in_repair: bool


# Freezing ---------------------------------------------------------------------------------


def freeze(sock: socket.socket) -> SocketState:
    """Put *sock* into repair and read all of it; on an error it is back out of repair."""
    _check_kind(sock)
    late = {name: sock.getsockopt(*option) for name, option in _LATE_OPTIONS.items()}
    with _as_repair_error("cannot put the socket into repair"):
        sock.setsockopt(socket.IPPROTO_TCP, _REPAIR, _ON)
    try:
        with _plain(sock) as plain:
            return _read_steadily(plain, late)
    except BaseException:
        _leave(sock, _OFF_WITHOUT_PROBE, late)
        raise


def thaw(sock: socket.socket, state: SocketState) -> None:
    """Take a freeze back: *sock* goes on as if nothing had been; *state* is what freeze gave."""
    _leave(sock, _OFF_WITHOUT_PROBE, dict(state.options))


def _check_kind(sock: socket.socket) -> None:
    if sock.type != socket.SOCK_STREAM or sock.family not in (socket.AF_INET, socket.AF_INET6):
        raise RepairError("this is no TCP socket")
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == _IPPROTO_MPTCP:
        raise RepairError("MPTCP cannot be repaired", hint="for Go: GODEBUG=multipathtcp=0")
    _name_state(_tcp_info(sock)[0])
    if sock.family == socket.AF_INET6 and sock.getsockname()[3]:
        raise RepairError("a link-local address means nothing on another host")
    with contextlib.suppress(OSError):  # ENOPROTOOPT: a kernel without ULPs
        if sock.getsockopt(socket.IPPROTO_TCP, _ULP, 16).strip(b"\0"):
            raise RepairError("the kernel runs TLS on this socket, and does not tell its state")


def _name_state(number: int) -> TcpState:
    if number not in _STATE_NUMBER:
        raise RepairError(f"a socket in TCP state number {number} cannot be moved")
    return _STATE_NUMBER[number]


def _read_steadily(sock: socket.socket, late: dict[str, int]) -> SocketState:
    # The sequence numbers say whether something arrived while we read (it should not: see Rule).
    for _ in range(5):
        before = _read_positions(sock)
        state = _read_state(sock, before, late)
        if _read_positions(sock) == before:
            return state
    raise RepairError(
        "segments arrive while the socket is frozen", hint="close the network in front of it first"
    )


class _Positions(NamedTuple):
    tcp_state: int
    write_seq: int  # end of the send queue, FIN included
    rcv_nxt: int  # end of the receive queue, FIN included
    unread: int
    unacknowledged: int
    unsent: int


def _read_positions(sock: socket.socket) -> _Positions:
    write_seq, rcv_nxt = (_read_seq(sock, queue) for queue in (_SEND_QUEUE, _RECEIVE_QUEUE))
    # In no queue while we wait: with the send queue selected, the kernel would count unsent data
    # as sent as soon as an acknowledgement comes in.
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, _NO_QUEUE)
    unread, outstanding, unsent = (
        struct.unpack("=i", fcntl.ioctl(sock, request, bytes(4)))[0]
        for request in (_SIOCINQ, _SIOCOUTQ, _SIOCOUTQNSD)
    )
    return _Positions(_tcp_info(sock)[0], write_seq, rcv_nxt, unread, outstanding - unsent, unsent)


def _read_state(sock: socket.socket, at: _Positions, late: dict[str, int]) -> SocketState:
    state = _name_state(at.tcp_state)
    fin_unsent = state.fin_sent and at.unsent > 0
    # In FIN_WAIT2 the FIN is acknowledged: no longer in the queue, but before its end.
    fin_unacknowledged = state.fin_sent and not fin_unsent and state is not TcpState.FIN_WAIT2
    unacknowledged = at.unacknowledged - fin_unacknowledged
    unsent = at.unsent - fin_unsent
    sent = _peek(sock, _SEND_QUEUE, unacknowledged + unsent)
    _, _, _, _, _, offered, scales = _tcp_info(sock)
    return SocketState(
        **_read_addresses(sock),
        tcp_state=state,
        send_seq=(at.write_seq - state.fin_sent - unsent - unacknowledged) % 2**32,
        unacknowledged=sent[:unacknowledged],
        unsent=sent[unacknowledged:],
        fin_unsent=fin_unsent,
        receive_seq=(at.rcv_nxt - state.fin_received - at.unread) % 2**32,
        unread=_peek(sock, _RECEIVE_QUEUE, at.unread),
        mss=sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG),
        window_scales=(scales & 15, scales >> 4) if offered & _INFO_WINDOW_SCALE else None,
        sack=bool(offered & _INFO_SACK),
        timestamps=bool(offered & _INFO_TIMESTAMPS),
        timestamp=sock.getsockopt(socket.IPPROTO_TCP, _TIMESTAMP) % 2**32,
        window=Window(
            *struct.unpack("=5I", sock.getsockopt(socket.IPPROTO_TCP, _REPAIR_WINDOW, 20))
        ),
        buffers=_read_buffers(sock),
        options=(*_read_options(sock), *late.items()),
    )


def _read_addresses(sock: socket.socket) -> dict[str, Any]:
    local, peer = sock.getsockname(), sock.getpeername()
    if sock.family == socket.AF_INET:
        pair = [(ipaddress.IPv4Address(each[0]), each[1]) for each in (local, peer)]
        return {"family": Family.IPV4, "local": pair[0], "peer": pair[1]}
    six = [(ipaddress.IPv6Address(each[0]), each[1]) for each in (local, peer)]
    four = [(address.ipv4_mapped, port) for address, port in six]
    if four[0][0] is None:
        return {"family": Family.IPV6, "local": six[0], "peer": six[1]}
    return {"family": Family.MAPPED, "local": four[0], "peer": four[1]}


def _read_seq(sock: socket.socket, queue: int) -> int:
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, queue)
    return sock.getsockopt(socket.IPPROTO_TCP, _QUEUE_SEQ) % 2**32


def _peek(sock: socket.socket, queue: int, length: int) -> bytes:
    if length <= 0:
        return b""
    sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, queue)
    try:
        data = sock.recv(length, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    finally:
        sock.setsockopt(socket.IPPROTO_TCP, _REPAIR_QUEUE, _NO_QUEUE)
    if len(data) != length:
        raise RepairError(f"only {len(data)} of {length} queued octets can be read (urgent data?)")
    return data


def _read_buffers(sock: socket.socket) -> Buffers:
    try:
        lock = sock.getsockopt(socket.SOL_SOCKET, _BUF_LOCK)
    except OSError:  # before Linux 5.14 it is not told, so leave the kernel free to adapt
        lock = 0
    send = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return Buffers(send, sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF), lock)


def _read_options(sock: socket.socket) -> Iterator[tuple[str, int]]:
    for name, option in (*_OPTIONS.items(), *_service_option(sock).items()):
        yield name, sock.getsockopt(*option)


def _service_option(sock: socket.socket) -> dict[str, tuple[int, int]]:
    if sock.family == socket.AF_INET6:
        return {"tclass": (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)}
    return {"tos": (socket.IPPROTO_IP, socket.IP_TOS)}


# Re-creating ------------------------------------------------------------------------------


def recreate(state: SocketState) -> RepairSocket:
    """The socket of *state* in this thread's network namespace, still in repair.

    Leave repair within a second, or unacknowledged data is sent before (see Rule). A forged FIN
    makes it acknowledge at once. A listener on the same port is bound after it.
    """
    family = socket.AF_INET if state.family is Family.IPV4 else socket.AF_INET6
    sock = RepairSocket(family, socket.SOCK_STREAM)
    sock.state = state
    sock.in_repair = True
    try:
        with _as_repair_error("cannot put the socket into repair"):
            sock.setsockopt(socket.IPPROTO_TCP, _REPAIR, _ON)
        with _as_repair_error(f"cannot re-create {state}"):
            _attach(sock, state)
            _agree(sock, state)
            _fill(sock, state)
            _shut(sock, state)
            # After the forged segments, which would move the window.
            _set(sock, _REPAIR_WINDOW, struct.pack("=5I", *state.window))
            _write_options(sock, state)
    except BaseException:
        sock.close()
        raise
    return sock


def leave_repair(sock: RepairSocket) -> None:
    """Let the socket live, as CRIU does: in ESTABLISHED the kernel sends a window probe.

    The peer answers it with an ACK, so data on both sides moves without a time-out.
    """
    _live(sock, _OFF)


def leave_repair_silently(sock: RepairSocket) -> None:
    """Let the socket live, and send nothing but data that was never sent; needs Linux 4.20."""
    _live(sock, _OFF_WITHOUT_PROBE)


def _attach(sock: socket.socket, state: SocketState) -> None:
    """Sequence numbers first: the kernel takes them in a closed socket only."""
    _set(sock, _REPAIR_QUEUE, _SEND_QUEUE)
    _set(sock, _QUEUE_SEQ, state.send_seq)
    _set(sock, _REPAIR_QUEUE, _RECEIVE_QUEUE)
    _set(sock, _QUEUE_SEQ, state.receive_seq)
    try:
        sock.bind(_sockaddr(state.family, state.local))
    except OSError as error:
        raise _explain_bind(state, error) from error
    # connect() derives the size of segments from this option. Without it they stay at 524 octets
    # until the path's MTU changes, whatever _REPAIR_OPTIONS says about the MSS (Linux 6.18).
    _set(sock, socket.TCP_MAXSEG, min(state.mss, _MAXSEG_MAX))
    try:
        # No SYN in repair, but a route to the peer has to exist.
        sock.connect(_sockaddr(state.family, state.peer))
    except OSError as error:
        raise _explain_connect(state, error) from error
    _set(sock, socket.TCP_MAXSEG, 0)


def _agree(sock: socket.socket, state: SocketState) -> None:
    """What the two sides had agreed upon in the handshake."""
    options = [(_OPT_MSS, state.mss)]
    if state.window_scales is not None:
        theirs, ours = state.window_scales
        options.append((_OPT_WINDOW_SCALE, theirs | ours << 16))
    if state.sack:
        options.append((_OPT_SACK, 0))
    if state.timestamps:
        options.append((_OPT_TIMESTAMPS, 0))
    _set(sock, _REPAIR_OPTIONS, b"".join(struct.pack("=2I", *each) for each in options))
    if state.timestamps:
        # Two ahead: since Linux 6.12 the lowest bit is a flag (microseconds) and not part of the
        # clock, so that what was read may be one behind what the peer has seen.
        _set(sock, _TIMESTAMP, (state.timestamp + 2) % 2**32)


def _fill(sock: socket.socket, state: SocketState) -> None:
    # Room for everything first; _write_options sets the sizes that the buffers had. Not before
    # connect(), which would take the size for the largest window it may ever offer.
    send = state.buffers.send + 2 * len(state.unacknowledged + state.unsent) + _OVERHEAD
    receive = state.buffers.receive + 2 * len(state.unread) + _OVERHEAD
    sock.setsockopt(socket.SOL_SOCKET, _SNDBUFFORCE, send // 2)
    sock.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, receive // 2)
    _set(sock, _REPAIR_QUEUE, _RECEIVE_QUEUE)
    _write(sock, state.unread)
    _set(sock, _REPAIR_QUEUE, _SEND_QUEUE)
    _write(sock, state.unacknowledged)
    _set(sock, _REPAIR_QUEUE, _NO_QUEUE)


def _shut(sock: socket.socket, state: SocketState) -> None:
    """Walk from ESTABLISHED to the state's own, in the order in which the two FINs went."""
    target = state.tcp_state
    if target is TcpState.LAST_ACK:
        _forge_until(sock, TcpState.CLOSE_WAIT, state, flags=_FIN | _ACK, ack=state.send_seq)
        _shut_own_side(sock, state)
        return
    _shut_own_side(sock, state)
    if target is TcpState.FIN_WAIT2:
        ack = state.send_seq + len(state.unacknowledged) + 1
        _forge_until(sock, target, state, flags=_ACK, ack=ack % 2**32)
    elif target.fin_received:
        # While our own FIN is unsent, CLOSING looks like CLOSE_WAIT, and comes to the same end.
        reached = TcpState.CLOSE_WAIT if state.fin_unsent else target
        _forge_until(sock, reached, state, flags=_FIN | _ACK, ack=state.send_seq)


def _shut_own_side(sock: socket.socket, state: SocketState) -> None:
    if state.tcp_state.fin_sent and not state.fin_unsent:
        # With the send queue selected, the FIN counts as sent and nothing is emitted.
        _set(sock, _REPAIR_QUEUE, _SEND_QUEUE)
        sock.shutdown(socket.SHUT_WR)
        _set(sock, _REPAIR_QUEUE, _NO_QUEUE)


def _forge_until(
    sock: socket.socket, target: TcpState, state: SocketState, *, flags: int, ack: int
) -> None:
    """Forge a segment, again where necessary, until it has brought the socket to *target*.

    Once is not always enough: a new IPv6 address, `nodad` or not, gets its local route from a work
    queue some time after the command has returned, and until then the segment leaves by the wire.
    """
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        _forge(state, flags=flags, ack=ack)
        again = time.monotonic() + 0.02
        while time.monotonic() < again:
            if _STATE_NUMBER.get(_tcp_info(sock)[0]) is target:
                return
            time.sleep(0.0005)
    raise RepairError(
        f"cannot re-create {state}: a forged segment does not arrive",
        hint=f"let packets with mark {MARK:#x} through on lo, untracked",
    )


def _write_options(sock: socket.socket, state: SocketState) -> None:
    known = {**_OPTIONS, **_service_option(sock)}
    for name, value in state.options:
        if name in known:
            sock.setsockopt(*known[name], value)
    # The send buffer follows after the unsent data: see _live.
    sock.setsockopt(socket.SOL_SOCKET, _RCVBUFFORCE, state.buffers.receive // 2)


def _live(sock: RepairSocket, how: int) -> None:
    state = sock.state
    if not sock.in_repair:
        raise RepairError(f"{state} has left repair already")
    _leave(sock, how, {})
    sock.in_repair = False
    with _plain(sock) as plain, _as_repair_error(f"cannot send the unsent data of {state}"):
        _write(plain, state.unsent)
        if state.fin_unsent:
            plain.shutdown(socket.SHUT_WR)
        plain.setsockopt(socket.SOL_SOCKET, _SNDBUFFORCE, state.buffers.send // 2)
        with contextlib.suppress(OSError):  # before Linux 5.14
            plain.setsockopt(socket.SOL_SOCKET, _BUF_LOCK, state.buffers.lock)
    _write_late_options(sock, dict(state.options))


def _leave(sock: socket.socket, how: int, options: dict[str, int]) -> None:
    with _as_repair_error("cannot leave repair"):
        sock.setsockopt(socket.IPPROTO_TCP, _REPAIR, how)
    _write_late_options(sock, options)


def _write_late_options(sock: socket.socket, options: dict[str, int]) -> None:
    for name, option in _LATE_OPTIONS.items():
        if name in options:
            sock.setsockopt(*option, options[name])


def _set(sock: socket.socket, option: int, value: int | bytes) -> None:
    if isinstance(value, int):
        value = struct.pack("=I", value)
    sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _write(sock: socket.socket, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[sock.send(view[:_CHUNK], socket.MSG_DONTWAIT) :]


# Forged segments --------------------------------------------------------------------------

_FIN, _ACK = 0x01, 0x10


def _forge(state: SocketState, *, flags: int, ack: int) -> None:
    """A segment from the peer to us, through lo, as if it had come from the wire."""
    (peer, peer_port), (local, local_port) = state.peer, state.local
    seq = (state.receive_seq + len(state.unread)) % 2**32
    scale = state.window_scales[0] if state.window_scales else 0
    window = min(state.window.snd_wnd >> scale, 0xFFFF)
    header = struct.pack(
        "!HHIIBBHHH", peer_port, local_port, seq, ack, 5 << 4, flags, window, 0, 0
    )  # fmt: skip
    pseudo = peer.packed + local.packed + struct.pack("!II", len(header), socket.IPPROTO_TCP)
    segment = header[:16] + _checksum(pseudo + header).to_bytes(2, "big") + header[18:]
    if local.version == 4:
        # The kernel fills in length and checksum of an IPv4 header.
        packet = struct.pack("!BBHHHBBH", 0x45, 0, 0, 0, 0, 64, socket.IPPROTO_TCP, 0)
        family = socket.AF_INET
    else:
        packet = struct.pack("!IHBB", 6 << 28, len(segment), socket.IPPROTO_TCP, 64)
        family = socket.AF_INET6
    with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK)
        raw.sendto(packet + peer.packed + local.packed + segment, (str(local), 0))


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


# Small things -----------------------------------------------------------------------------


def _tcp_info(sock: socket.socket) -> tuple[int, ...]:
    """The first seven octets of struct tcp_info: state first, then option bits, then scales."""
    return struct.unpack("=7B", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 7))


def _plain(sock: socket.socket) -> socket.socket:
    # A duplicate without Python's time-outs, which would poll() for what repair never signals.
    return socket.socket(fileno=os.dup(sock.fileno()))


def _sockaddr(family: Family, endpoint: tuple[Address, int]) -> tuple[Any, ...]:
    address, port = endpoint
    if family is Family.IPV4:
        return (str(address), port)
    return (f"::ffff:{address}" if family is Family.MAPPED else str(address), port, 0, 0)


def _print(endpoint: tuple[Address, int]) -> str:
    address, port = endpoint
    return f"{address}:{port}" if address.version == 4 else f"[{address}]:{port}"


def _explain_bind(state: SocketState, error: OSError) -> RepairError:
    local = state.local[0]
    message = f"cannot bind to {_print(state.local)}: {error.strerror}"
    if error.errno != errno.EADDRNOTAVAIL:
        return RepairError(message)
    command = f"ip addr add {local}/32 dev lo" if local.version == 4 else (
        f"ip addr add {local}/128 dev lo nodad"
    )  # fmt: skip
    return RepairError(message, hint=f"the old address has to be local here first: {command}")


def _explain_connect(state: SocketState, error: OSError) -> RepairError:
    hint = None
    if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
        hint = f"a route from {state.local[0]} to {state.peer[0]} has to exist here first"
    elif error.errno in (errno.EADDRNOTAVAIL, errno.EADDRINUSE):
        hint = "another socket in this network namespace has the same connection"
    return RepairError(f"cannot attach to {_print(state.peer)}: {error.strerror}", hint=hint)


@contextlib.contextmanager
def _as_repair_error(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "CAP_NET_ADMIN is needed" if error.errno == errno.EPERM else None
        raise RepairError(f"{what}: {error.strerror}", hint=hint) from error
