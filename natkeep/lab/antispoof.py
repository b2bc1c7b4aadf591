"""the anti-spoof filter: what clouds have in front of every host, and a flat lab network has not.

Without it a lab lies: un-translated packets get through, because the destination's own ARP
teaches the gateway where OLD is now. Rule: text only; topology.py loads it into the switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from natkeep.lab.topology import Seat


def anti_spoof(guarded: Sequence[Seat], spoofs: Sequence[Seat]) -> str:
    """The filter at the switch's ports of *guarded*: no frame may say that it comes from *spoofs*.

    As clouds have it: IP, IPv6, ARP and neighbour discovery (whose target is at octet 8 of the
    ICMPv6 message). The counter `spoofed` tells how many frames tried.
    """
    lines = ["add table netdev antispoof", "add counter netdev antispoof spoofed"]
    for port in guarded:
        chain = f"netdev antispoof {port.role}"
        lines.append(
            f"add chain {chain} {{ type filter hook ingress device {port.role} priority 0; }}"
        )
        for spoof in spoofs:
            old4, old6 = spoof.address(4), spoof.address(6)
            target = f"@th,64,128 {int(old6):#x}"
            for match in (
                f"ip saddr {old4}",
                f"arp saddr ip {old4}",
                f"ip6 saddr {old6}",
                f"icmpv6 type nd-neighbor-advert {target}",
                f"icmpv6 type nd-neighbor-solicit {target}",
            ):
                lines.append(f"add rule {chain} {match} counter name spoofed drop")
    return "\n".join(lines) + "\n"
