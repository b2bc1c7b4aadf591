"""Finds, counts and deletes conntrack entries of new connections to listeners that moved.

Rule: an entry is deleted only as itself: by its tuple, its zone and the kernel's number for it. A
kept connection of another move may be to the same port; its entry is known by the flag that
natkeep sets (and conntrack itself for connections whose SYN it has not seen).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator

from natkeep import faultpoints
from natkeep.kernel.conntrack_dump import count_tracked, dump
from natkeep.kernel.conntrack_purge import delete_ends, raise_unless
from natkeep.kernel.ctnetlink import (
    DELETE,
    ask_for_tcp,
    pack_itself,
    read_flags,
    read_tuples,
)
from natkeep.kernel.ctnetlink_answers import Said, read_said
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.kernel.netlink import NETLINK_NETFILTER, Batch, Netlink, message
from natkeep.plan.listeners import Reception
from natkeep.plan.move import Mode
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.step_undo import ForgetListeners
from natkeep.plan.steps import ForgetCalls, Prior

_SEEN_REPLY = 0x02
_SYN_SENT = 1
_ALIVE = (TCP.opening - {_SYN_SENT}) | TCP.alive
"""SYN_RECV to LAST_ACK."""


class ForgetDriver(Driver[ForgetCalls]):
    """ForgetCalls: what conntrack believes of SYNs that came before the listeners moved."""

    def apply(self, at: Place, step: ForgetCalls, remember: Remember) -> Prior:
        """Unreplied entries go: their SYNs come again, and take the new way."""
        remember(Prior())
        for reception in step.receptions:
            if reception.protocol == UDP:
                delete_datagrams(reception)
            else:
                delete_unreplied(reception)
        return Prior()

    def revert(self, at: Place, undo: ForgetListeners, prior: Prior) -> None:
        """Translated entries go: they lead to where nothing listens any more."""
        for reception in undo.listeners:
            delete_translated(reception)


def delete_unreplied(reception: Reception) -> None:
    """Delete the entries of SYNs to a listener of *reception* that were not answered."""
    # There may be many that were, by the old host, and each costs 20 us to look at.
    _delete(a for a, said in _find(reception, mask=_SEEN_REPLY) if said.state == _SYN_SENT)


def delete_datagrams(reception: Reception) -> None:
    """Delete all entries of UDP of the ports of *reception*, whatever they say; none is fine."""
    ends = frozenset(end.packed for end in reception.ends())
    delete_ends(ends, reception.map.old.version)


def delete_translated(reception: Reception) -> None:
    """Delete the entries of connections that *reception* has let in; none is fine."""
    if reception.protocol == UDP:
        if reception.site.row.leaves:
            delete_datagrams(reception)
        return
    _delete(answer for answer, _ in _find_let_in(reception))


Table = dict[bytes, list[bytes]]
"""Entries by where their original tuple leads to: address and port."""


def read_table(version: int) -> Table:
    """All TCP entries of IP *version*, of whatever zone."""
    table: Table = {}
    for answer in dump(ask_for_tcp(version)):
        original, _, _ = read_tuples(answer)
        table.setdefault(original[len(original) // 2 :], []).append(answer)
    return table


def count(reception: Reception, table: Table | None = None) -> int:
    """How many connections that *reception* has let in live, in *table* or as the kernel says."""
    if reception.protocol == UDP:
        return 0
    return sum(1 for _, said in _find_let_in(reception, table) if said.state in _ALIVE)


def _find_let_in(reception: Reception, table: Table | None = None) -> Iterator[tuple[bytes, Said]]:
    for answer, said in _find(reception, table):
        is_inside = read_tuples(answer)[1].startswith(reception.after.packed)
        if is_inside and not read_flags(answer) & TCP.liberal:
            yield answer, said


def _find(
    reception: Reception, table: Table | None = None, mask: int = 0
) -> Iterator[tuple[bytes, Said]]:
    """The entries whose original tuple leads to a listener, with none of the status bits *mask*."""
    if not count_tracked():
        return
    # Stateless, conntrack stands between the two rewritings.
    called = reception.before if reception.mode == Mode.STATEFUL else reception.after
    for number in reception.ports_at(called):
        port = number.to_bytes(2, "big")
        end = called.packed + port
        request = ask_for_tcp(called.version, destination=called.packed, port=port, mask=mask)
        for answer in dump(request) if table is None else table.get(end, ()):
            said = read_said(answer)
            if read_tuples(answer)[0].endswith(end) and not said.status & mask:
                yield answer, said


def _delete(answers: Iterable[bytes]) -> None:
    entries = [*answers]  # before the first goes, since the table is still being read
    with Netlink(NETLINK_NETFILTER) as netlink:
        for answer in entries:
            faultpoints.reach("half", "forget")
            refusals = netlink.send_batch(Batch(message(DELETE, 0, pack_itself(answer)), (), 1))
            raise_unless(refusals, errno.ENOENT)
