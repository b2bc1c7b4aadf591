"""the table `inet natkeep-undone`: a drop that stays where a move was undone, for some minutes.

Where a destination is undone while a gateway still sends peers' packets there, it would answer each
with a reset, for a socket that it does not have. So the exact tuples go on being dropped, as they
arrive there: addressed to NEW. They are elements with a time-out, which the kernel removes by
itself; a prepare of the same tuples removes them, since its gate drops them as well.

    prerouting -350   NEW . peer . peer port . local port in @undone4, @undone6 ─► drop

It is a table of its own, since the table natkeep goes with its last move. In front of conntrack and
of the filters of others, it lets neither TCP nor a filter's `reject` answer.

Rule: values only; kernel/undone_table.py loads them. This file must never run anything.
"""

from __future__ import annotations

from collections.abc import Iterator

from natkeep.plan.nft import ADDRESS_TYPE, DROP, FAMILIES, IP, Chain, Match, Rule
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.tuples import Connections

UNDONE_TABLE = "natkeep-undone"
SECONDS = 600
"""How long what a gateway may still send is dropped, unless something else is asked for."""
LONGEST = 86_400

_CHAIN = Chain("undone", "prerouting", "-350", table=UNDONE_TABLE)


def undone_set(version: int) -> str:
    """Name of the set of one IP version."""
    return f"undone{version}"


def table_lines() -> Iterator[str]:
    """What makes the table, empty; it fails where the table is there already."""
    yield f"create table inet {UNDONE_TABLE}"
    yield str(_CHAIN)
    for version in FAMILIES:
        name, address = undone_set(version), ADDRESS_TYPE[version]
        form = f"type {address} . {address} . inet_service . inet_service; flags timeout;"
        yield f"add set inet {UNDONE_TABLE} {name} {{ {form} }}"
        addresses = f"{IP[version]} daddr", f"{IP[version]} saddr"
        for protocol in (TCP, UDP):
            asked = Match((*addresses, protocol.sport, protocol.dport), f"@{name}")
            yield str(Rule(_CHAIN.name, (asked, DROP), table=UNDONE_TABLE))


def element_lines(verb: str, arriving: Connections, seconds: int = 0) -> Iterator[str]:
    """What adds (*verb*) these tuples for so many seconds, or deletes them: a line a set."""
    timeout = f" timeout {seconds}s" if seconds else ""
    for version in FAMILIES:
        elements = ", ".join(
            f"{to.address} . {peer.address} . {peer.port} . {to.port}{timeout}"
            for peer, to in (
                (one.source, one.destination)
                for one in Connections.packed(arriving.records(version), version)
            )
        )
        if elements:
            yield f"{verb} element inet {UNDONE_TABLE} {undone_set(version)} {{ {elements} }}"


def read_key(key: bytes) -> bytes:
    """The record (plan/tuples.py) of an element as the kernel has it, ports padded."""
    width = (len(key) - 8) // 2
    local, peer = key[:width], key[width : 2 * width]
    return local + key[-4:-2] + peer + key[-8:-6]
