"""How long it is since a packet of each kept UDP socket passed: a connection table tells.

An entry of UDP lasts nf_conntrack_udp_timeout_stream from its last packet, once both ends have
spoken for a while (it is assured then), else nf_conntrack_udp_timeout. So what is gone of that is
the time since that packet.

Rule: read only, in the namespace of the calling thread, by one dump for each IP version. Where a
rule gives entries other time-outs (`ct timeout`), a longer one shows a socket that speaks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from natkeep.kernel import sysctl
from natkeep.kernel.conntrack_dump import count_tracked, dump
from natkeep.kernel.ctnetlink import NFGENMSG, TIMEOUT, ask_for, read_status, read_tuples, turn
from natkeep.kernel.netlink import find_attribute
from natkeep.plan.protocols import UDP
from natkeep.plan.translation import Translation

_ASSURED = 0x04
_BRIEF = ("nf_conntrack_udp_timeout", 30)


def read_timeouts() -> tuple[int, int]:
    """Seconds that an entry lasts whose ends have both spoken for a while, and any other one."""
    stream, brief = (
        int(sysctl.read(f"netfilter/{name}") or default) for name, default in (UDP.timeout, _BRIEF)
    )
    return stream, brief


def read_silences(
    translations: Iterable[Translation], servers: Mapping[bytes, bytes]
) -> dict[bytes, float]:
    """Of each socket with an entry, by its key (plan/silence.py), the seconds without a packet.

    servers: what silence.server_keys has made. The kernel counts whole seconds, so it may be one
    more.
    """
    known = dict(servers)
    for one in translations:
        for view in (one.kept, one.outer, one.inner):
            known.update(zip(view.each(), one.kept.each(), strict=True))
    found: dict[bytes, float] = {}
    stream, brief = read_timeouts()
    for version in sorted({4 if len(key) in (6, 12) else 6 for key in known}):
        for answer in dump(ask_for(UDP, version)) if count_tracked() else ():
            keys = [known[view] for view in _views(answer) if view in known]
            if keys:
                left = int.from_bytes(find_attribute(answer[NFGENMSG:], TIMEOUT), "big")
                lasts = stream if read_status(answer) & _ASSURED else brief
                silent = float(max(lasts - left - 1, 0))
                found.update((key, min(silent, found.get(key, silent))) for key in keys)
    return found


def _views(answer: bytes) -> list[bytes]:
    """Each tuple of an entry from either end, and each of these ends."""
    original, reply, _ = read_tuples(answer, UDP)
    records = [original, turn(original), reply, turn(reply)]
    return [*records, *(record[: len(record) // 2] for record in records)]
