"""the roles: what a site is to a move, as one row each.

                    a peer's packet             OLD     kept packets   reset    order
                    arrives for   leaves for    there   pass on        filter   of opening
    gateway         OLD           NEW           no      yes            refuse   0
    destination     NEW           OLD           yes     no             answer   1
    source          OLD           (no change)   yes     no             refuse   2
    peer            OLD           NEW           no      yes            refuse   0
    relay           OLD           NEW           may     yes            refuse   0

A peer site is a gateway for processes of its own: their packets begin and end there.
Gateway entries exist before the destination can emit a packet, since a half-translated connection
is reset, not stalled. The source comes last: until then CRIU's lock keeps it silent.
A relay is a gateway and the source in one: it passes on under an address and ports of its own.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class Role(StrEnum):
    """What a site is to a move."""

    DESTINATION = "destination"
    GATEWAY = "gateway"
    PEER = "peer"
    RELAY = "relay"
    SOURCE = "source"


class RoleRow(NamedTuple):
    """What follows from a role.

    arrives, leaves: whether a peer's packet is addressed to OLD or NEW when it reaches the site,
    and when it leaves it; `leaves` is empty where the site translates nothing.
    puts_old: OLD is put on lo here. So what goes through lo is not translated, a bare SYN of a
    kept tuple is dropped, and OLD neither leaves as a source nor is spoken of in ARP.
    passes_on: kept packets only pass here; the process' sockets are elsewhere.
    mutes: the gate is closed in the outbound direction as well.
    resets: the dispatch of the reset filter: `answer` of the process, `refuse` of peers.
    order: in which sites are opened, and as a rule prepared.
    own: the peers are processes of this host, and no others' packets are translated.
    relays: peers' packets leave as ones of its own, and OLD may be an address of it.
    """

    arrives: str
    leaves: str
    puts_old: bool
    passes_on: bool
    mutes: bool
    resets: str
    order: int
    own: bool = False
    relays: bool = False


ROLES = {
    Role.GATEWAY: RoleRow("old", "new", False, True, False, "refuse", 0),
    Role.DESTINATION: RoleRow("new", "old", True, False, False, "answer", 1),
    Role.RELAY: RoleRow("old", "new", False, True, False, "refuse", 0, relays=True),
    Role.SOURCE: RoleRow("old", "", False, False, True, "refuse", 2),
    Role.PEER: RoleRow("old", "new", False, True, False, "refuse", 0, own=True),
}
