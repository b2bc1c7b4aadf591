"""the calls: conntrack entries of new connections to listeners that moved, by raw ctnetlink.

Rule: an entry is deleted only as itself: by its tuple, its zone and the kernel's number for it. A
kept connection of another move may be to the same port; its entry is known by the flag that
natkeep sets (and conntrack itself for connections whose SYN it has not seen).

The kernel is asked for the entries of one destination only (CTA_FILTER, CTA_STATUS_MASK); one
that does not know these answers with more, so everything is looked at here once more.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

from natkeep import faultpoints
from natkeep.kernel.conntrack import read_setting
from natkeep.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_DUMP,
    Batch,
    Netlink,
    attribute,
    attributes,
    message,
    nested,
)
from natkeep.plan.conntrack import TCP_ESTABLISHED, TCP_FLAGS
from natkeep.plan.listeners import Reception
from natkeep.plan.move import Mode
from natkeep.plan.tuples import Address
from natkeep.values import dataclass

if TYPE_CHECKING:
    from natkeep.kernel.ctwalk import Walk

_GET, _DELETE = (1 << 8) | 1, (1 << 8) | 2
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _ID, _ZONE = 1, 2, 3, 4, 12, 18
_FILTER, _STATUS_MASK = 25, 26
_FILTER_ORIG_FLAGS = 1
_BY_ADDRESS, _BY_PORT = 1 << 1, 1 << 3 | 1 << 5
"""CTA_FILTER_FLAG of CTA_IP_DST; of CTA_PROTO_NUM and CTA_PROTO_DST_PORT."""

_AF = {4: 2, 6: 10}
_TCP = b"\x06"
_SEEN_REPLY = (0x02).to_bytes(4, "big")
_SYN_SENT = 1
_ALIVE = range(TCP_ESTABLISHED - 1, 7)
"""SYN_RECV to LAST_ACK."""

_LIBERAL = 0x08 & TCP_FLAGS


@dataclass(frozen=True, slots=True)
class _Call:
    """An entry: what names it, where its answers come from, its TCP state; kept: by a move."""

    name: bytes
    answered_by: bytes
    state: int
    kept: bool


def forget_unanswered(reception: Reception) -> None:
    """Delete the entries of callers whom nobody has answered."""
    # There may be many who have been answered, by the old host, and each costs 20 us to look at.
    unanswered = attribute(_STATUS, bytes(4)) + attribute(_STATUS_MASK, _SEEN_REPLY)
    found = _read_calls(reception, unanswered)
    _delete(reception, [call for call in found if call.state == _SYN_SENT])


def hang_up(reception: Reception) -> None:
    """Delete the entries of callers who were let in by *reception*; none is fine."""
    _delete(reception, list(_read_let_in(reception)))


def count(reception: Reception) -> int:
    """How many callers who were let in by *reception* are still there."""
    return sum(1 for call in _read_let_in(reception) if call.state in _ALIVE)


def count_in(reception: Reception, walk: Walk) -> int:
    """The same, as a walk through the connection table shows it."""
    called, inside = _called(reception).packed, reception.after.packed
    return sum(
        1
        for port in reception.ports
        for reply, state, flags in walk.find_calls(called + port.to_bytes(2, "big"))
        if reply.startswith(inside) and state in _ALIVE and not flags & _LIBERAL
    )


def _read_let_in(reception: Reception) -> Iterator[_Call]:
    inside = reception.after.packed
    found = _read_calls(reception)
    return (call for call in found if call.answered_by == inside and not call.kept)


def _read_calls(reception: Reception, which: bytes = b"") -> Iterator[_Call]:
    """Who calls a listener of *reception*; which: more attributes of the kernel's own filter."""
    if read_setting("nf_conntrack_count") in ("0", None):
        return
    called = _called(reception)
    with Netlink(NETLINK_NETFILTER) as netlink:
        for port in reception.ports:
            number = port.to_bytes(2, "big")
            body = _body(called) + _pack_filter(called, number) + which
            for answer in netlink.request(_GET, NLM_F_DUMP, body):
                call = _parse(attributes(answer[4:]), called, number)
                if call is not None:
                    yield call


def _called(reception: Reception) -> Address:
    """Whom callers call: stateless, conntrack stands between the two rewritings."""
    return reception.before if reception.mode == Mode.STATEFUL else reception.after


def _body(address: Address) -> bytes:
    return struct.pack("!BBH", _AF[address.version], 0, 0)


def _pack_filter(called: Address, port: bytes) -> bytes:
    # By an IPv6 address the kernel gives just the others (see ctnetlink.ask_for_status).
    by_address = called.version == 4
    destination = nested(1, attribute(2, called.packed)) if by_address else b""
    flags = _BY_PORT | (_BY_ADDRESS if by_address else 0)
    return nested(
        _TUPLE_ORIG,
        destination,
        nested(2, attribute(1, _TCP), attribute(3, port)),
    ) + nested(_FILTER, attribute(_FILTER_ORIG_FLAGS, struct.pack("=I", flags)))


def _parse(entry: dict[int, bytes], called: Address, port: bytes) -> _Call | None:
    original, reply = attributes(entry[_TUPLE_ORIG]), attributes(entry[_TUPLE_REPLY])
    ends, protocol = attributes(original[1]), attributes(original[2])
    version = called.version
    if (ends.get(2 if version == 4 else 4), protocol.get(1), protocol.get(3)) != (
        called.packed,
        _TCP,
        port,
    ):
        return None
    tcp = attributes(attributes(entry.get(_PROTOINFO, b"")).get(1, b""))
    name = attribute(_TUPLE_ORIG | 1 << 15, entry[_TUPLE_ORIG]) + attribute(_ID, entry[_ID])
    if _ZONE in entry:
        name += attribute(_ZONE, entry[_ZONE])
    answered_by = attributes(reply[1])[1 if version == 4 else 3]
    kept = tcp.get(4, b"\0")[0] & _LIBERAL != 0
    return _Call(name, answered_by, tcp.get(1, b"\0")[0], kept)


def _delete(reception: Reception, calls: list[_Call]) -> None:
    with Netlink(NETLINK_NETFILTER) as netlink:
        for call in calls:
            body = _body(reception.before) + call.name
            faultpoints.reach("half", "forget")
            for refusal in netlink.send_batch(Batch(message(_DELETE, 0, body), (), 1)):
                if refusal.errno != errno.ENOENT:
                    raise OSError(refusal.errno, os.strerror(refusal.errno))
