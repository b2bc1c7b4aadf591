"""The block of a quiesce: bare SYNs to the source's listeners are dropped, so callers try again.

Rule: pure; objects only.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.plan.base_chains import GATE, SYN
from natkeep.plan.nft import DROP, IP, Chain, Match, Object, Rule, jump
from natkeep.plan.protocols import TCP
from natkeep.plan.tuples import Endpoint

PREFIX = "hold-"
"""How the names of these chains begin; `hold` as in released versions."""
_ENDING = ":hold"


def chain_name(move_id: str) -> str:
    """Name of the chain that drops bare SYNs to the blocked listeners."""
    return f"{PREFIX}{move_id}"


def comment(move_id: str) -> str:
    """Comment of the rule that jumps there; no move's kept connections have it."""
    return f"{move_id}{_ENDING}"


def is_comment(text: str) -> bool:
    """Whether a rule with this comment jumps to some move's blocked listeners."""
    return text.endswith(_ENDING)


def block(move_id: str, listeners: Iterable[Endpoint], *, linked: bool) -> tuple[Object, ...]:
    """Block these listeners; linked: the gate jumps to the chain already."""
    chain = chain_name(move_id)
    objects: list[Object] = [Chain(chain)]
    for listener in listeners:
        address = listener.address
        at = () if address.is_unspecified else (Match((f"{IP[address.version]} daddr",), address),)
        port = Match((TCP.dport,), listener.port)
        objects.append(Rule(chain, (*at, port, SYN, DROP)))
    if not linked:
        objects.append(Rule(GATE, (jump(chain),), comment(move_id)))
    return tuple(objects)
