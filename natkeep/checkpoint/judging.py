"""the judgement of one socket: what it is, and why it could not be kept, wherever it was read.

Rule: an image, a living process and what was written of one are judged alike, by this file.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from natkeep.checkpoint import SYNCHRONIZED, Socket, TcpState
from natkeep.plan.tuples import Address, Endpoint

PROTOCOLS = {
    1: "icmp",
    6: "tcp",
    17: "udp",
    33: "dccp",
    58: "icmpv6",
    132: "sctp",
    136: "udplite",
    262: "mptcp",
}
STATES = {  # the kernel's include/net/tcp_states.h
    1: TcpState.ESTABLISHED,
    2: TcpState.SYN_SENT,
    3: TcpState.SYN_RECEIVED,
    4: TcpState.FIN_WAIT_1,
    5: TcpState.FIN_WAIT_2,
    6: TcpState.TIME_WAIT,
    7: TcpState.CLOSED,
    8: TcpState.CLOSE_WAIT,
    9: TcpState.LAST_ACK,
    10: TcpState.LISTEN,
    11: TcpState.CLOSING,
    12: TcpState.SYN_RECEIVED,  # TCP_NEW_SYN_RECV
}
UNKEPT_STATES = {
    TcpState.SYN_SENT: "not yet established: CRIU dials again on restore",
    TcpState.SYN_RECEIVED: "not yet established: CRIU does not restore it",
    TcpState.TIME_WAIT: "closed",
    TcpState.CLOSED: "closed",
}


def why_not_tcp(protocol: str) -> str:
    if protocol in ("mptcp", "sctp", "dccp"):
        return f"{protocol.upper()}: CRIU cannot restore it"
    return f"{protocol}: not a TCP connection"


@lru_cache(maxsize=4096)
def find_address(packed: bytes) -> tuple[Address, bytes, str | None]:
    """The address, its octets on the wire, and why a connection there cannot be kept, if so."""
    address: Address
    if len(packed) == 4:
        address = ipaddress.IPv4Address(packed)
    else:
        full = ipaddress.IPv6Address(packed)
        address = full.ipv4_mapped or full
    reason = None
    if address.is_loopback:
        reason = "loopback: both ends must be moved"
    elif address.version == 6 and address.is_link_local:
        reason = "link-local address: CRIU drops its scope"
    return address, address.packed, reason


def judge(
    protocol: str,
    state: TcpState | None,
    local: Endpoint | None,
    peer: Endpoint | None,
    device: str | None,
) -> Socket:
    """The socket, with why it cannot be kept; ValueError where its state and ends do not agree."""
    if protocol != "tcp":
        return Socket(protocol, local, peer, None, device, why_not_tcp(protocol))
    unkept = UNKEPT_STATES.get(state) if state is not None else None
    if state is None:
        raise ValueError("a TCP socket has a state")
    if state in SYNCHRONIZED or state is TcpState.LISTEN:
        if local is None or (peer is None) == (state in SYNCHRONIZED):
            raise ValueError(f"{state} from {local} to {peer}")
        if peer is not None and local.address.version != peer.address.version:
            raise ValueError(f"{local} and {peer} are of different families")
        ends = [local] if peer is None else [local, peer]
        unkept = next(filter(None, (find_address(end.address.packed)[2] for end in ends)), None)
    return Socket(protocol, local, peer, state, device, unkept)
