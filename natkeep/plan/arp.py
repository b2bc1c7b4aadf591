"""OLD on lo is not shown to the links: it is neither answered for nor announced in ARP.

Rule: pure; objects only. What a neighbour says is heard: it may be at home where OLD is. IPv6's
neighbour discovery does not answer for what is on lo.
"""

from __future__ import annotations

from functools import cache

from natkeep.plan.base_chains import GATE, address_chain, held_set
from natkeep.plan.nft import DROP, Chain, Elements, Match, Object, Rule, Set, Table
from natkeep.plan.tuples import Address


def silence(old: Address) -> tuple[Object, ...]:
    """OLD neither leaves this host as a source nor is it a sender in ARP, while a gate has it.

    A /32 on lo would still be answered for (arp_ignore 0) and announced (arp_announce 0 and
    1). IPv6 on lo is not answered for by neighbour discovery.
    """
    unused = address_chain(GATE, old)
    held = Elements(held_set(old.version), (old,), unused=unused)
    if old.version == 6:
        return (held,)
    return (held, Elements("silent", (old,), family="arp", unused=unused))


@cache
def arp_table() -> tuple[Object, ...]:
    """The ARP half of a destination's table; `create` fails when it is there already."""
    return (
        Table("arp"),
        Set("silent", ("ipv4_addr",), family="arp", shared=True),
        Chain("asking", "output", "0", family="arp"),
        Rule("asking", (Match(("arp saddr ip",), "@silent"), DROP), family="arp"),
    )
