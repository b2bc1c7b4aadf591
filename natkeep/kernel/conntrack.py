"""the connection table: the entries of exactly the kept tuples made, deleted and looked at.

Rule: nothing here ever flushes, and no entry is touched but by its full tuple. What an entry
must say is in plan/conntrack.py; how it is packed in ctnetlink.py; what is in its way in purge.py.

ctnetlink is not atomic: of a batch some may be refused, so every refusal is looked at. It
cannot change an entry's NAT (EOPNOTSUPP): an entry is deleted and made anew, behind the gate.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from natkeep import faultpoints
from natkeep.errors import RefusedError
from natkeep.kernel.ctnetlink import (
    DELETE,
    GET,
    NEW,
    STATUS_BITS,
    TUPLE_ORIG,
    TUPLE_REPLY,
    Pack,
    ask_for_status,
    for_each,
    make_keys,
    make_turned_keys,
    pack_entry,
    pack_inbound,
    pack_outbound,
    read_said,
    read_tcp_tuples,
    read_tuple,
    turn,
)
from natkeep.kernel.netlink import (
    NETLINK_NETFILTER,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLM_F_EXCL,
    Netlink,
    Refusal,
    attributes,
)
from natkeep.plan.conntrack import (
    ESTABLISHED_TIMEOUT,
    IPS_DST_NAT,
    IPS_SRC_NAT,
    TCP_ESTABLISHED,
)
from natkeep.plan.drift import SeenEntry
from natkeep.plan.move import Mode
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import RECORD_SIZE, Connections, FourTuple

if TYPE_CHECKING:
    from natkeep.kernel.ctwalk import Walk

_ALIVE = frozenset(range(TCP_ESTABLISHED, 7))
"""ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK; TIME_WAIT and CLOSE have ended."""

_IPS_OFFLOAD = 0xC000
"""IPS_OFFLOAD and IPS_HW_OFFLOAD."""

_GIVEN_BACK_S = 300
"""Seconds until the first packet, as for a connection that the kernel picks up by itself."""

_FEW = 1000
"""Up to so many entries are looked up one by one (6 us each) rather than by a walk (4 to 11 ms)."""

_SETTINGS = "/proc/sys/net/netfilter"


def insert(translation: Translation) -> None:
    """Create the entry of each kept connection; FileExistsError when one is in the way."""
    outer, inner = _sides(translation)
    timeout = established_timeout()
    raise_unless(_insert(outer, inner, timeout, "insert", ports=translation.renames))


def give_back(outer: Connections, kept: Connections, *, ports: bool) -> None:
    """Create the entries that a gateway had of its own, where there are none now.

    They must not wait for a packet: if the process's is the first, it would leave untranslated,
    or not at all. They last as long as the connection, or only briefly when it has ended.
    """
    refusals = _insert(outer, kept, _GIVEN_BACK_S, "give-back", ports=ports)
    raise_unless(refusals, errno.EEXIST)


def give_back_plain(connections: Connections) -> None:
    """Likewise, of *connections* that were dialled from their peers and not translated at all."""
    refusals = _insert(connections, connections, _GIVEN_BACK_S, "give-back", ports=False)
    raise_unless(refusals, errno.EEXIST)


def _insert(
    outer: Connections, inner: Connections, timeout: int, what: str, *, ports: bool
) -> list[Refusal]:
    pack: Pack = partial(pack_entry, timeout=timeout, ports=ports)
    batch = for_each(outer, inner, NEW, NLM_F_CREATE | NLM_F_EXCL, pack)
    with Netlink(NETLINK_NETFILTER) as netlink:
        faultpoints.reach("half", what, lambda: netlink.send_batch(batch.head(batch.count // 2)))
        return netlink.send_batch(batch)


def _sides(translation: Translation) -> tuple[Connections, Connections]:
    """What conntrack sees on the peer's and on the process' side (see plan.entries)."""
    if translation.mode == Mode.STATELESS:
        return translation.inner, translation.inner
    return translation.outer, translation.inner


def delete(translation: Translation) -> None:
    """Delete the entries of the kept connections as they arrive at the site; none is fine."""
    outer, _ = _sides(translation)
    delete_inbound(outer)


def delete_inbound(outer: Connections) -> None:
    """Delete the entries of these tuples, from the peers' side; none is fine."""
    batch = for_each(outer, outer, DELETE, 0, lambda o, _: pack_inbound(o))
    with Netlink(NETLINK_NETFILTER) as netlink:
        faultpoints.reach(
            "half", "delete", lambda: netlink.send_batch(batch.head(batch.count // 2))
        )
        raise_unless(netlink.send_batch(batch), errno.ENOENT)


def look_up(translation: Translation) -> Iterator[SeenEntry | None]:
    """For each kept connection what the table shows, or None when it has no such entry."""
    outer, inner = _sides(translation)
    queries = for_each(outer, outer, GET, 0, lambda o, _: pack_inbound(o))
    translated = IPS_DST_NAT if translation.mode == Mode.STATEFUL else 0
    with Netlink(NETLINK_NETFILTER) as netlink:
        for answer, wanted in zip(netlink.send_queries(queries), inner.each(), strict=True):
            if answer is None:
                yield None
            else:
                yield _see(attributes(answer[4:]), wanted, translated)


def look_up_in(translation: Translation, walk: Walk) -> tuple[list[SeenEntry | None], list[int]]:
    """The same, as a walk through the table shows it; and for which it showed nothing.

    Nothing is shown of one that has not the tuples that it should have.
    """
    outer, inner = _sides(translation)
    version = translation.map.old.version
    stateful = translation.mode == Mode.STATEFUL
    found = walk.find_each(make_keys(outer, inner, version))
    seen = _see_all(found, walk, IPS_DST_NAT if stateful else 0)
    if None in found:
        # Picked up by the rules when the process spoke first: the same, the other way round.
        turned = walk.find_each(make_turned_keys(outer, inner, version))
        others = _see_all(turned, walk, IPS_SRC_NAT if stateful else 0)
        for index, other in enumerate(others):
            if other is not None and seen[index] is None:
                translates, inward, outward, alive = other
                seen[index] = SeenEntry(translates, outward, inward, alive)
    return seen, [index for index, entry in enumerate(seen) if entry is None]


def _see_all(found: list[bytes | None], walk: Walk, translated: int) -> list[SeenEntry | None]:
    """What `_see` says of each that was found, by columns: it takes a fifth."""
    rests = [rest for rest in found if rest is not None]
    if not rests:
        return [None] * len(found)
    said = walk.read(rests)
    translates = [each & translated == translated for each in said.bits]
    alive = [state in _ALIVE for state in said.states]
    columns = zip(translates, said.inward, said.outward, alive, strict=True)
    entries = map(_make_entry, columns)
    if len(rests) == len(found):
        return [*entries]
    return [None if rest is None else next(entries) for rest in found]


_make_entry: Callable[[tuple[object, ...]], SeenEntry] = partial(tuple.__new__, SeenEntry)
"""Of its fields; SeenEntry._make counts them, which costs as much again."""


def count_wrong(translation: Translation) -> int:
    """How many of the entries that the kernel has just taken do not translate as planned.

    It refuses those that clash with another's tuple, in either direction (ctnetlink.pack_entry
    names both). What translates nothing it does take, and says so in the status (no DST_NAT): of
    many entries only those are asked for, since a walk of the table costs a fifth of filling it.
    """
    if len(translation.kept) <= _FEW or translation.renames:
        return sum(1 for entry in look_up(translation) if not (entry and entry.translated))
    outer, _ = _sides(translation)
    wrong = 0 if translation.mode == Mode.STATEFUL else IPS_DST_NAT
    with Netlink(NETLINK_NETFILTER) as netlink:
        return _count_lost(outer) + _count_with_status(netlink, outer, wrong, IPS_DST_NAT)


def _count_lost(connections: Connections) -> int:
    """How many entries the whole table has too few, if somebody has flushed it meanwhile."""
    tracked = read_setting("nf_conntrack_count")
    return 0 if tracked is None else max(0, len(connections) - int(tracked))


def _count_with_status(netlink: Netlink, outer: Connections, status: int, mask: int) -> int:
    version = 4 if outer.v4 else 6
    local = next(outer.each())[: 4 if version == 4 else 16]
    answers = netlink.request(GET, NLM_F_DUMP, ask_for_status(local, status, mask))
    asked_for = (a for a in answers if _read_status(a) & mask == status)
    found = [turn(original) for original, _, _ in read_tcp_tuples(asked_for, version)]
    return len(set(found).intersection(outer.each())) if found else 0


def _read_status(answer: bytes) -> int:
    return int.from_bytes(attributes(answer[4:])[STATUS_BITS], "big")


def find_carried(connections: Connections) -> Iterator[FourTuple | None]:
    """For each connection, as its process sees it, how its peer sees it; None when just so.

    They differ where this namespace translates already: then the entry that the process' own
    packets belong to has another tuple on its other side.
    """
    queries = for_each(connections, connections, GET, 0, lambda o, _: pack_outbound(o))
    version = 4 if connections.v4 else 6
    records, width = connections.records(version), RECORD_SIZE[version]
    with Netlink(NETLINK_NETFILTER) as netlink:
        for index, answer in enumerate(netlink.send_queries(queries)):
            record = records[index * width : (index + 1) * width]
            yield None if answer is None else _find_carrier(attributes(answer[4:]), record)


def _find_carrier(entry: dict[int, bytes], record: bytes) -> FourTuple | None:
    if int.from_bytes(entry[STATUS_BITS], "big") & _IPS_OFFLOAD:
        raise RefusedError(
            "a kept connection is offloaded to a flowtable, where no rule sees its packets",
            hint="take it out of the flowtable, and wait a second",
        )
    original, reply = (read_tuple(entry[type_]) for type_ in (TUPLE_ORIG, TUPLE_REPLY))
    if reply == record:  # the peer dialled: its tuple is the original one
        carrier = original[len(original) // 2 :] + original[: len(original) // 2]
    elif original == record:  # the process dialled: the peer answers with the reply tuple
        carrier = reply[len(reply) // 2 :] + reply[: len(reply) // 2]
    else:
        return None
    if carrier == record:
        return None
    packed = Connections(v4=carrier) if len(carrier) == 12 else Connections(v6=carrier)
    return next(iter(packed))


def _see(entry: dict[int, bytes], wanted: bytes, translated: int) -> SeenEntry:
    bits, state, _, inward, outward = read_said(entry)
    same = read_tuple(entry[TUPLE_REPLY]) == wanted
    if not same and read_tuple(entry[TUPLE_ORIG]) == wanted:
        # Picked up by the rules when the process spoke first: the same, the other way round.
        same, inward, outward = True, outward, inward
        translated = translated and IPS_SRC_NAT
    return SeenEntry(same and bits & translated == translated, inward, outward, state in _ALIVE)


def established_timeout() -> int:
    """Seconds, as this namespace is set."""
    value = read_setting("nf_conntrack_tcp_timeout_established")
    return int(value) if value is not None else ESTABLISHED_TIMEOUT


def shortest_end() -> float:
    """Seconds for which the kernel keeps the entry of a connection that has ended, at least."""
    names = ("close", "time_wait", "last_ack")
    values = [read_setting(f"nf_conntrack_tcp_timeout_{name}") for name in names]
    return float(min((int(value) for value in values if value is not None), default=0))


def read_setting(name: str) -> str | None:
    """A conntrack sysctl of this thread's namespace, or None when it cannot be read."""
    try:
        with open(f"{_SETTINGS}/{name}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def write_setting(name: str, value: str) -> bool:
    """Set a conntrack sysctl of this thread's namespace; whether that could be done."""
    try:
        with open(f"{_SETTINGS}/{name}", "w", encoding="ascii") as file:
            file.write(value)
    except OSError:
        return False
    return True


def raise_unless(refusals: Iterable[Refusal], tolerated: int = 0) -> None:
    for refusal in refusals:
        if refusal.errno != tolerated:
            raise OSError(refusal.errno, os.strerror(refusal.errno))
