"""the purge: entries that already have a kept tuple, found in every zone and deleted.

Rule: an entry is deleted only by its full tuple, and nothing is ever flushed. An established entry
that knows no translation is never asked about rules, so none may be left (plan/conntrack.py).

Two ways, whichever has less to ask. Few connections: each of their tuples is deleted, whether it
is there or not; the kernel answers in 2 us. Many: the table is read once and what is found is
deleted; that costs 4 to 11 ms for its buckets and 2 us for each entry.

The kernel finds a tuple only in the zone that is named. Which zones there are, a small table tells
by itself. In a large one, whose reading would cost more than all the rest, the rules are asked
instead: an entry in a zone to which nothing assigns packets is one that no packet ever meets.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress

from natkeep import faultpoints
from natkeep.kernel import nftables_dump
from natkeep.kernel.conntrack import raise_unless, read_setting
from natkeep.kernel.ctnetlink import (
    DELETE,
    GET,
    Ends,
    ask_for_tcp,
    for_each,
    pack_inbound,
    pack_outbound,
    pack_zone,
    read_tcp_tuples,
    turn,
)
from natkeep.kernel.netlink import NETLINK_NETFILTER, NLM_F_DUMP, Netlink
from natkeep.plan.conntrack import stale_views
from natkeep.plan.nft import TABLE
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections

_BUCKETS = 2000
"""To walk the table's buckets costs as much as to look up so many tuples."""

_SMALL = 2000
"""Entries up to which the table is read for its zones."""

_LISTING = "/proc/thread-self/net/nf_conntrack"
_LISTED_ZONE = re.compile(rb" zone(?:-orig|-reply)?=(\d+)")
_LEGACY_TABLES = ("/proc/net/ip_tables_names", "/proc/net/ip6_tables_names")
_ASSIGNERS = ("/sys/module/openvswitch", "/sys/module/act_ct")
"""What gives packets a zone without a rule of netfilter."""


def purge(translation: Translation) -> int:
    """Delete every entry that has one of the stale tuples; the number that there were.

    A packet may make another one at any time: whoever inserts finds it in the way, and comes again.
    """
    tracked = read_setting("nf_conntrack_count")
    if tracked == "0":
        return 0
    views = stale_views(translation)
    queries = 2 * len(views) * len(translation.kept)
    with Netlink(NETLINK_NETFILTER) as netlink:
        if tracked is None or queries < int(tracked) + _BUCKETS:
            zones = _find_zones(netlink, None if tracked is None else int(tracked))
            return sum(_purge_each(netlink, views, zone) for zone in zones)
        return _purge_found(netlink, views, translation.map.old.version)


def forget_untracked(olds: Iterable[Address]) -> None:
    """Delete the TCP entries that name one of *olds*, if nothing tracks connections here any more.

    While our last rules go, our chains still have conntrack note who speaks, un-translated. Where
    somebody else's chains do so too, such an entry is theirs and as it was before us.
    """
    if read_setting("nf_conntrack_count") in ("0", None):
        return
    if nftables_dump.base_chains() or _read_legacy_tables():
        return
    for version in (4, 6):
        named = {old.packed for old in olds if old.version == version}
        if named:
            with Netlink(NETLINK_NETFILTER) as netlink:
                _forget_named(netlink, named, version)


def _forget_named(netlink: Netlink, named: set[bytes], version: int) -> None:
    width = 4 if version == 4 else 16
    found: dict[int, list[bytes]] = {}
    for original, reply, zone in read_tcp_tuples(
        netlink.request(GET, NLM_F_DUMP, ask_for_tcp(version)), version
    ):
        if not named.isdisjoint(r[:width] for t in (original, reply) for r in (t, turn(t))):
            found.setdefault(zone, []).append(original)
    for zone, some in found.items():
        _delete(netlink, Connections.packed(b"".join(some), version), zone, pack_outbound)


def _purge_each(netlink: Netlink, views: Iterable[Connections], zone: int) -> int:
    return sum(
        _delete(netlink, view, zone, pack)
        for view in views
        for pack in (pack_inbound, pack_outbound)
    )


def _delete(
    netlink: Netlink, connections: Connections, zone: int, pack: Callable[[Ends], bytes]
) -> int:
    """Delete the entries that have the packed tuples; how many there were."""
    suffix = pack_zone(zone)
    batch = for_each(connections, connections, DELETE, 0, lambda end, _: pack(end) + suffix)
    faultpoints.reach("half", "purge", lambda: netlink.send_batch(batch.head(batch.count // 2)))
    refusals = netlink.send_batch(batch)
    raise_unless(refusals, errno.ENOENT)
    return len(connections) - len(refusals)


def _purge_found(netlink: Netlink, views: Iterable[Connections], version: int) -> int:
    """Read the table once, and delete what has a stale tuple in either direction."""
    stale = {record for view in views for record in view.each()}
    found: dict[int, list[bytes]] = {}
    answers = netlink.request(GET, NLM_F_DUMP, ask_for_tcp(version))
    for original, reply, zone in read_tcp_tuples(answers, version):
        if original in stale or reply in stale or turn(original) in stale or turn(reply) in stale:
            found.setdefault(zone, []).append(original)
    return sum(
        # A record's local end comes first, as the source does in a tuple that was read.
        _delete(netlink, Connections.packed(b"".join(some), version), zone, pack_outbound)
        for zone, some in found.items()
    )


def _find_zones(netlink: Netlink, tracked: int | None) -> list[int]:
    """The zones in which a kept tuple may be, 0 among them; tracked: how many entries there are."""
    if tracked is not None and tracked <= _SMALL:
        try:
            with open(_LISTING, "rb") as file:
                return sorted({0, *map(int, _LISTED_ZONE.findall(file.read()))})
        except OSError:  # a kernel without this file
            pass
    elif not _assigns_zones():
        return [0]
    return _read_zones(netlink)


def _read_zones(netlink: Netlink) -> list[int]:
    """From the table itself, each entry searched for the attribute instead of taken apart."""
    mark = pack_zone(1)[:4]
    zones = {0}
    for entry in netlink.request(GET, NLM_F_DUMP, struct.pack("!BBH", 0, 0, 0)):
        if mark in entry:
            at = entry.index(mark) + len(mark)
            zones.add(int.from_bytes(entry[at : at + 2], "big"))
    return sorted(zones)


def _assigns_zones() -> bool:
    """Whether anything here could give packets a zone; yes where that cannot be told."""
    if any(map(os.path.exists, _ASSIGNERS)) or "raw" in _read_legacy_tables():
        return True
    try:
        return nftables_dump.assigns_zones(besides=TABLE)
    except OSError:
        return True


def _read_legacy_tables() -> set[str]:
    """The tables of iptables' own kernel part, of both families."""
    found: set[str] = set()
    for path in _LEGACY_TABLES:
        with suppress(OSError), open(path, encoding="ascii") as file:
            found.update(file.read().split())
    return found
