"""the state of a TCP connection in which nothing is under way, as tests re-create it."""

from __future__ import annotations

from natkeep.lab import tcp_repair
from natkeep.lab.tcp_repair import SocketState, TcpState
from natkeep.plan.tuples import Endpoint


def make_state(local: Endpoint, remote: Endpoint, send: int, receive: int) -> SocketState:
    """A connection in which nothing is under way."""
    return SocketState(
        family=tcp_repair.Family.IPV4 if local.address.version == 4 else tcp_repair.Family.IPV6,
        local=(local.address, local.port), peer=(remote.address, remote.port),
        tcp_state=TcpState.ESTABLISHED, send_seq=send, unacknowledged=b"", unsent=b"",
        fin_unsent=False, receive_seq=receive, unread=b"", mss=1400, window_scales=(7, 7),
        sack=True, timestamps=True, timestamp=1000,
        window=tcp_repair.Window(receive, 65_536, 65_536, 65_536, receive),
        buffers=tcp_repair.Buffers(262_144, 262_144, 0), options=(("nodelay", 1),),
    )  # fmt: skip
