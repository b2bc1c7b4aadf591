"""the judgement of one socket: what it is, and why it could not be kept, wherever it was read.

Rule: an image, a living process and what was written of one are judged alike, by this file.
"""

from __future__ import annotations

import ipaddress
from functools import lru_cache

from natkeep.checkpoint import LOOPBACK, SYNCHRONIZED, Socket, TcpState
from natkeep.plan.tuples import Address, Endpoint

PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 33: "dccp", 58: "icmpv6", 132: "sctp"}
PROTOCOLS |= {136: "udplite", 262: "mptcp"}
STATES = dict(enumerate(TcpState, 1)) | {12: TcpState.SYN_RECEIVED}
"""By number, as in the kernel's include/net/tcp_states.h; 12 is TCP_NEW_SYN_RECV."""
_UNKEPT_STATES = {
    TcpState.SYN_SENT: "not yet established: CRIU dials again on restore",
    TcpState.SYN_RECEIVED: "not yet established: CRIU does not restore it",
    TcpState.TIME_WAIT: "closed",
    TcpState.CLOSED: "closed",
}


_BROADCAST = ipaddress.IPv4Address("255.255.255.255")


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
        reason = LOOPBACK
    elif address.version == 6 and address.is_link_local:
        reason = "link-local address: CRIU drops its scope"
    return address, address.packed, reason


def find_reason(*ends: Endpoint | None) -> str | None:
    """Why a connection or listener of these *ends* cannot be kept, if so."""
    reasons = (find_address(end.address.packed)[2] for end in ends if end is not None)
    return next(filter(None, reasons), None)


def judge(
    protocol: str,
    state: TcpState | None,
    local: Endpoint | None,
    peer: Endpoint | None,
    device: str | None,
    reason: str | None,
) -> Socket:
    """The socket, with why it cannot be kept; ValueError where its state and ends do not agree.

    reason: why a connection or listener of these ends cannot be, if so.
    """
    if protocol in ("mptcp", "sctp", "dccp"):
        reason = f"{protocol.upper()}: CRIU cannot restore it"
    elif protocol not in ("tcp", "udp"):
        reason = f"{protocol}: neither TCP nor UDP"
    elif protocol == "udp":
        reason = reason or _find_reason_of_udp(local, peer)
    elif state is None:
        raise ValueError("a TCP socket has a state")
    elif state in _UNKEPT_STATES:
        reason = _UNKEPT_STATES[state]
    elif local is None or (peer is None) == (state in SYNCHRONIZED):
        raise ValueError(f"{state} from {local} to {peer}")
    elif peer is not None:
        _demand_one_family(local, peer)
    return Socket(protocol, local, peer, state, device, reason)


def _find_reason_of_udp(local: Endpoint | None, peer: Endpoint | None) -> str | None:
    if local is None:
        return "bound to no port: no datagram reaches it"
    if local.address.is_multicast:
        return "bound to a multicast address: CRIU restores no membership"
    if peer is None:
        return None
    _demand_one_family(local, peer)
    if peer.address.is_multicast or peer.address == _BROADCAST:
        return f"its peer {peer.address} is no unicast address: it is whatever the link has there"
    return None


def _demand_one_family(local: Endpoint, peer: Endpoint) -> None:
    if local.address.version != peer.address.version:
        raise ValueError(f"{local} and {peer} are of different families")
