"""Deletes conntrack entries by their tuples, in every zone: stale ones before ours are inserted.

Rule: an entry is deleted only by its full tuple, and nothing is ever flushed. An established entry
that knows no translation is never asked about rules, so none may be left (plan/conntrack.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from functools import partial

from natkeep import faultpoints
from natkeep.kernel import nftables_dump
from natkeep.kernel.conntrack_dump import DELETE_ONE, count_tracked, dump, is_dump_cheaper
from natkeep.kernel.conntrack_zones import find_zones, read_legacy_tables
from natkeep.kernel.ctnetlink import (
    DELETE,
    Ends,
    ask_for,
    for_each,
    pack_inbound,
    pack_outbound,
    pack_zone,
    read_tuples,
    turn,
)
from natkeep.kernel.netlink import NETLINK_NETFILTER, Netlink, Refusal
from natkeep.plan.conntrack import stale_views
from natkeep.plan.nft import TABLE
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import RECORD_SIZE, Address, Connections
from natkeep.plan.undone import UNDONE_TABLE


def purge(translation: Translation) -> int:
    """Delete every entry that has one of the stale tuples; the number that there were.

    A packet may make another one at any time: an insertion finds it in the way, and purges again.
    """
    return purge_many([translation])


def purge_many(translations: Iterable[Translation]) -> int:
    """The same of many."""
    alike: dict[tuple[int, Protocol], list[Connections]] = {}
    for one in translations:
        alike.setdefault((one.map.old.version, one.protocol), []).extend(stale_views(one))
    return sum(_purge(Connections.joined(views), *kind) for kind, views in alike.items())


def _purge(stale: Connections, version: int, protocol: Protocol) -> int:
    tracked = count_tracked()
    if tracked == 0:
        return 0
    if tracked is not None and is_dump_cheaper(DELETE_ONE * 2 * len(stale), tracked):
        return _delete_dumped(version, {*stale.each()}.__contains__, protocol)
    with Netlink(NETLINK_NETFILTER) as netlink:
        return sum(
            _delete(netlink, stale, zone, partial(pack, protocol=protocol))
            for zone in find_zones(netlink, tracked)
            for pack in (pack_inbound, pack_outbound)
        )


def delete_inbound(outer: Connections, protocol: Protocol = TCP) -> None:
    """Delete the entries of these tuples, from the peers' side, in every zone; none is fine."""
    pack = partial(pack_inbound, protocol=protocol)
    with Netlink(NETLINK_NETFILTER) as netlink:
        for zone in find_zones(netlink, count_tracked()):
            _delete(netlink, outer, zone, pack, "delete")


def delete_ends(ends: frozenset[bytes], version: int) -> None:
    """Delete each entry of UDP one of whose ends, in either direction, is one of *ends*, packed."""
    half = RECORD_SIZE[version] // 2
    if count_tracked():
        _delete_dumped(version, lambda tuple_: tuple_[:half] in ends, UDP)


def delete_untracked(olds: Iterable[Address]) -> None:
    """Delete the entries that name one of *olds*, if nothing tracks connections here any more.

    While our last rules go, our chains still have conntrack note packets un-translated. Where
    the chains of others do so too, such an entry is theirs and as it was before us.
    """
    if not count_tracked() or _has_chains_of_others() or read_legacy_tables():
        return
    named = {old.packed for old in olds}
    for version in {old.version for old in olds}:
        width = RECORD_SIZE[version] // 2 - 2
        for protocol in (TCP, UDP):
            if count_tracked():
                _delete_dumped(version, partial(_starts_with, named, width), protocol)


def _has_chains_of_others() -> bool:
    """Whether a chain may track, of other moves too; the drop that an undo leaves does not."""
    if nftables_dump.has_table("inet", TABLE):  # with base chains, beside those of thousands
        return True
    return any(chain.table != UNDONE_TABLE for chain in nftables_dump.base_chains())


def _starts_with(addresses: set[bytes], width: int, tuple_: bytes) -> bool:
    return tuple_[:width] in addresses


def raise_unless(refusals: Iterable[Refusal], tolerated: int = 0) -> None:
    """OSError for the first of *refusals* that is not *tolerated*."""
    for refusal in refusals:
        if refusal.errno != tolerated:
            raise OSError(refusal.errno, os.strerror(refusal.errno))


def _delete(
    netlink: Netlink,
    connections: Connections,
    zone: int,
    pack: Callable[[Ends], bytes],
    fault: str = "purge",
) -> int:
    """Delete the entries that have the packed tuples; how many there were."""
    suffix = pack_zone(zone)
    batch = for_each(connections, connections, DELETE, 0, lambda end, _: pack(end) + suffix)
    faultpoints.reach("half", fault, lambda: netlink.send_batch(batch.head(batch.count // 2)))
    refusals = netlink.send_batch(batch)
    raise_unless(refusals, errno.ENOENT)
    return len(connections) - len(refusals)


def _delete_dumped(version: int, is_meant: Callable[[bytes], bool], protocol: Protocol) -> int:
    """Delete each entry one of whose tuples, turned or not, is meant; how many there were."""
    found: dict[int, list[bytes]] = {}
    pack = partial(pack_outbound, protocol=protocol)
    for answer in dump(ask_for(protocol, version)):
        original, reply, zone = read_tuples(answer, protocol)
        if any(map(is_meant, (original, reply, turn(original), turn(reply)))):
            found.setdefault(zone, []).append(original)
    with Netlink(NETLINK_NETFILTER) as netlink:
        return sum(
            # A record's local end comes first, as the source does in a tuple that was read.
            _delete(netlink, Connections.packed(b"".join(some), version), zone, pack)
            for zone, some in found.items()
        )
