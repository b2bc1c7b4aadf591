"""Finds the conntrack zones in which a site's entries may be.

Rule: read only, in the namespace of the calling thread.

The kernel finds a tuple only in the zone that is named. Which zones there are, a small table tells
by itself. In a large one, whose reading would cost more than all the rest, the rules are asked
instead: an entry in a zone to which nothing assigns packets is one that no packet ever meets.
"""

from __future__ import annotations

import os
import re
import struct
from contextlib import suppress

from natkeep.kernel import nftables_dump
from natkeep.kernel.ctnetlink import GET
from natkeep.kernel.ctnetlink_answers import read_attributes
from natkeep.kernel.netlink import NLM_F_DUMP, Netlink
from natkeep.kernel.once import ask_once
from natkeep.plan.nft import TABLE

_SMALL = 2000
"""Entries up to which the table is read for its zones."""

_LISTING = "/proc/thread-self/net/nf_conntrack"
_LISTED_ZONE = re.compile(rb" zone(?:-orig|-reply)?=(\d+)")
_LEGACY_TABLES = tuple(f"/proc/thread-self/net/{ip}_tables_names" for ip in ("ip", "ip6"))
_ASSIGNERS = ("/sys/module/openvswitch", "/sys/module/act_ct")
"""What gives packets a zone without a rule of netfilter."""


def find_zones(netlink: Netlink, tracked: int | None) -> list[int]:
    """The zones in which a kept tuple may be, 0 among them; tracked: how many entries there are."""
    return ask_once("zones", lambda: _find_zones(netlink, tracked))


def _find_zones(netlink: Netlink, tracked: int | None) -> list[int]:
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
    """From the table itself."""
    entries = netlink.request(GET, NLM_F_DUMP, struct.pack("!BBH", 0, 0, 0))
    return sorted({0, *(read_attributes(entry).zone for entry in entries)})


def _assigns_zones() -> bool:
    """Whether anything here could give packets a zone; yes where that cannot be told."""
    if any(map(os.path.exists, _ASSIGNERS)) or "raw" in read_legacy_tables():
        return True
    try:
        return nftables_dump.assigns_zones(besides=TABLE)
    except OSError:
        return True


def read_legacy_tables() -> set[str]:
    """The tables of iptables' own kernel part, of both families."""
    found: set[str] = set()
    for path in _LEGACY_TABLES:
        with suppress(OSError), open(path, encoding="ascii") as file:
            found.update(file.read().split())
    return found
