"""Policy routing rules: those that select NEW by its source address hold for OLD, too.

A host with two uplinks routes by source (`ip rule add from NEW lookup 100`). What the kept sockets
send has OLD as its source, and would leave by another device than NEW's, or find no route at all.

Rule: each rule is copied with all that it says but its source; ours bear a protocol (FRA_PROTOCOL,
Linux 4.17) by which they are known without a journal. No other rule is touched. All functions act
in the namespace that the calling thread is in.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator
from contextlib import suppress

from natkeep.kernel.fib_rules import (
    DELRULE,
    FAMILY,
    HEADER,
    IIFNAME,
    NEWRULE,
    PRIORITY,
    PROTOCOL,
    SRC,
    TABLE,
    dump_rules,
)
from natkeep.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    NLM_F_EXCL,
    Netlink,
    attribute,
    attributes,
)
from natkeep.plan.path import SourceRule, find_uncopied
from natkeep.plan.tuples import Address

_SAID = {1, 3, 4, 6, 10, 11, 12, 13, 14, 15, 16, 17, 19, 20, 22, 23, 24}
"""What a rule may say beside its source: FRA_DST to FRA_DPORT_RANGE."""
_COPIED = b"\xd1"
_OURS = range(0xC1, 0xD2)
"""Protocols of natkeep's rules: those of ip_rules.py, and of copies."""
_FLAGS = 0x2
"""FIB_RULE_INVERT; others the kernel sets itself."""


def read_rules(netlink: Netlink, version: int) -> tuple[SourceRule, ...]:
    """The rules of IP *version* that select a source, in the order in which they are asked."""
    return tuple(rule for answer in dump_rules(netlink, version) for rule in _read(answer, version))


def _read(answer: bytes, version: int) -> Iterator[SourceRule]:
    header, said = HEADER.unpack_from(answer), attributes(answer[HEADER.size :])
    if SRC not in said or header[0] != FAMILY[version]:
        return
    rest = b"".join(attribute(at, value) for at, value in sorted(said.items()) if at in _SAID)
    table = int.from_bytes(said.get(TABLE, b""), sys.byteorder) or header[4]
    yield SourceRule(
        source=said[SRC],
        length=header[2],
        priority=int.from_bytes(said.get(PRIORITY, b""), sys.byteorder),
        table=table,
        local=said.get(IIFNAME, b"lo\0") == b"lo\0",
        inverted=bool(header[6] & _FLAGS),
        ours=said.get(PROTOCOL, b"\0")[0] in _OURS,
        copied=said.get(PROTOCOL) == _COPIED,
        said=bytes((header[1], *header[3:6])) + struct.pack("=I", header[6] & _FLAGS) + rest,
    )


def asks_for(netlink: Netlink, version: int, *kinds: int) -> bool:
    """Whether a rule that is not natkeep's asks for one of *kinds*: MARK, SPORT, …"""
    found = [attributes(one[HEADER.size :]) for one in dump_rules(netlink, version)]
    others = (said for said in found if said.get(PROTOCOL, b"\0")[0] not in _OURS)
    return any(kind in said for said in others for kind in kinds)


def copy_rules(new: Address, old: Address) -> None:
    """Add for *old* what rules say of *new* alone; OSError when the kernel refuses."""
    with Netlink(NETLINK_ROUTE) as netlink:
        for rule in find_uncopied(read_rules(netlink, old.version), new, old):
            with suppress(FileExistsError):
                list(netlink.request(NEWRULE, NLM_F_CREATE | NLM_F_EXCL, _pack(rule, old)))


def remove_copies(old: Address) -> None:
    """Take away the rules for *old* that a natkeep has added."""
    with Netlink(NETLINK_ROUTE) as netlink:
        for rule in read_rules(netlink, old.version):
            if rule.copied and rule.source == old.packed:
                with suppress(FileNotFoundError):
                    list(netlink.request(DELRULE, 0, _pack(rule, old)))


def _pack(rule: SourceRule, old: Address) -> bytes:
    to_length, tos, table, action = rule.said[:4]
    flags = struct.unpack_from("=I", rule.said, 4)[0]
    header = HEADER.pack(
        FAMILY[old.version], to_length, old.max_prefixlen, tos, table, action, flags
    )
    return header + rule.said[8:] + attribute(SRC, old.packed) + attribute(PROTOCOL, _COPIED)
