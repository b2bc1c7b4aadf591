"""the sets of kept connections: which there are of each translation, and what is in them.

A set holds `peer . peer port . local port` and no local address. So where nothing but the local
address is translated one set is that of all views of the connections, and each further one is there
only where it differs.

    kept     as they leave the site           always
    outer    as they arrive there             where peers or ports are translated, too
    routed   with their destination           where peers and ports are: between the site's
             translated, and the source not   prerouting and postrouting
    old      as the old host says them        where a gateway publishes a port and the map is to
                                              another: both others have another one

Rule: the rules' keys ask by these names. This file must never run anything.
"""

from __future__ import annotations

from typing import NamedTuple

from natkeep.plan.base_chains import (
    inner_map,
    kept_set,
    old_set,
    outer_map,
    outer_set,
    routed_set,
)
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections


def sets_of(move_id: str, translation: Translation) -> dict[str, Connections]:
    """The translation's sets by name, and what is in them."""
    sets = {kept_set(move_id, translation.number): translation.inner}
    if translation.renames:
        sets[outer_set(move_id, translation.number)] = translation.outer
    return sets


class Filling(NamedTuple):
    """What a set is filled with; a map: with the peers of *peers*, in the order of its keys."""

    name: str
    keys: Connections
    peers: Connections | None = None


def more_of(move_id: str, translation: Translation) -> tuple[Filling, ...]:
    """What a translation that renames the peers, or has three ports, asks besides its sets."""
    name = old_set(move_id, translation.number)
    own = (Filling(name, translation.kept),) if old_name(move_id, translation) == name else ()
    return (*own, *_more_of_peers(move_id, translation))


def _more_of_peers(move_id: str, translation: Translation) -> tuple[Filling, ...]:
    if not translation.masks:
        return ()
    number, routed, inner = translation.number, translation.routed, translation.inner
    maps = (
        Filling(outer_map(move_id, number), inner, translation.outer),
        Filling(inner_map(move_id, number), routed, inner),
    )
    name = routed_set(move_id, number)
    own = (Filling(name, routed),) if routed_name(move_id, translation) == name else ()
    return (*own, *maps)


def outer_name(move_id: str, translation: Translation) -> str:
    """Name of the set of the connections as they arrive."""
    name = outer_set if translation.renames else kept_set
    return name(move_id, translation.number)


def old_name(move_id: str, translation: Translation) -> str:
    """Name of the set of the connections as the old host says them, at a site where these pass."""
    if not (translation.site.row.passes_on and translation.map.turns_ports):
        return kept_set(move_id, translation.number)
    return (old_set if translation.carries else outer_set)(move_id, translation.number)


def routed_name(move_id: str, translation: Translation) -> str:
    """Name of the set of the connections as they are routed; a set holds no local address."""
    if not translation.masks:
        return kept_set(move_id, translation.number)
    return (routed_set if translation.ports() else outer_set)(move_id, translation.number)
