"""the protocols whose connections are kept, as one row each: in rules, and in conntrack entries.

Numbers are IANA's, and those of linux/netfilter/nf_conntrack_tcp.h.
"""

from __future__ import annotations

from typing import NamedTuple


class Protocol(NamedTuple):
    """A transport protocol.

    name: as nft and conntrack(8) have it. established: the state of an entry that is made.
    alive: the states of a connection that was established; opening: those before; ended: those
    after both ends have closed it, or one has reset it.
    flags: of an entry that is made, both directions: IP_CT_TCP_FLAG_SACK_PERM and _BE_LIBERAL.
    The windows of a connection that the kernel has not seen cannot be told to it, so it must not
    judge by them; it does the same itself for connections that it picks up.
    A protocol without states has none of these.
    timeout: the sysctl of an established connection's time-out, and the kernel's default (seconds).
    ends: the sysctls of how long the entry of a connection that has ended is kept.
    """

    name: str
    number: int
    timeout: tuple[str, int]
    established: int = 0
    alive: frozenset[int] = frozenset()
    opening: frozenset[int] = frozenset()
    ended: frozenset[int] = frozenset()
    flags: int = 0
    liberal: int = 0
    ends: tuple[str, ...] = ()

    @property
    def has_states(self) -> bool:
        """Whether packets tell that a connection begins, and that it ends."""
        return bool(self.alive)

    @property
    def sport(self) -> str:
        """The field of a packet's source port, as nft has it."""
        return f"{self.name} sport"

    @property
    def dport(self) -> str:
        """The same of the destination port."""
        return f"{self.name} dport"


TCP = Protocol(
    name="tcp",
    number=6,
    established=3,
    alive=frozenset({3, 4, 5, 6}),  # ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK
    opening=frozenset({1, 2}),  # SYN_SENT, SYN_RECV
    ended=frozenset({7, 8}),  # TIME_WAIT, CLOSE
    flags=0x0A,
    liberal=0x08,
    timeout=("nf_conntrack_tcp_timeout_established", 432_000),
    ends=tuple(f"nf_conntrack_tcp_timeout_{name}" for name in ("close", "time_wait", "last_ack")),
)

UDP = Protocol(name="udp", number=17, timeout=("nf_conntrack_udp_timeout_stream", 120))
