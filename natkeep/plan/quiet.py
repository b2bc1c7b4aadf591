"""the quiet: what keeps the source from saying anything about connections that it gave away.

    prerouting -350  gate    a peer's segment of a kept connection: drop (ruleset.py's gate)
                             a bare SYN to a held listener ─► hold-ID: drop, and the peer retries
    output     -350  muted   OLD ─► mute-at-OLD ─► (kept?) ─► gate-ID: drop, so that neither a
                             retransmission nor a reset leaves

Both gates ask the same sets and jump to the same chain, so opening (the process is back) is the
one rule that it is everywhere.

A listener at the wildcard address is held at every local address, since CRIU refuses to dump it
with anybody in its queue, whoever was dialled.

Rule: as ruleset.py: rendered from typed values only; this file must never run anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from natkeep.plan import ruleset
from natkeep.plan.move import Role
from natkeep.plan.ruleset import FAMILIES, GATE, SYN, TABLE
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Endpoint

MUTE = "mute"
"""Outbound dispatch of a source's gate."""

BASE_CHAIN = "muted"
HOLD_PREFIX = "hold-"
_HOLD = ":hold"


def gate_chains(translation: Translation) -> tuple[tuple[str, Address], ...]:
    """Dispatch and address of the chains in which the translation's gate has a rule."""
    inbound = tuple((GATE, local) for local in ruleset.gated_addresses(translation))
    if translation.site.role == Role.SOURCE:
        return (*inbound, (MUTE, translation.map.old))
    return inbound


@cache
def render_static() -> tuple[str, ...]:
    """What only a source's table has besides."""
    return (
        *ruleset.render_dispatch_maps(MUTE),
        f"add chain inet {TABLE} {BASE_CHAIN} {{ type filter hook output priority -350; }}",
        *(
            f"add rule inet {TABLE} {BASE_CHAIN} "
            f"{ruleset.IP[version]} saddr vmap @{ruleset.dispatch_map(MUTE, version)}"
            for version in FAMILIES
        ),
    )


def render_mute(move_id: str, translations: Iterable[Translation]) -> tuple[str, ...]:
    """The outbound half of a source's gate; the sets are those of the inbound half."""
    lines: list[str] = []
    for translation in translations:
        old = translation.map.old
        family, kept = ruleset.IP[old.version], ruleset.kept_set(move_id, translation.number)
        lines += ruleset.render_dispatch(MUTE, old)
        lines.append(
            f"insert rule inet {TABLE} {ruleset.address_chain(MUTE, old)} "
            f"{family} daddr . tcp dport . tcp sport @{kept} "
            f'jump {ruleset.gate_chain(move_id)} comment "{move_id}"'
        )
    return tuple(lines)


def hold_chain(move_id: str) -> str:
    """Name of the chain that drops bare SYNs to the held listeners."""
    return f"{HOLD_PREFIX}{move_id}"


def hold_comment(move_id: str) -> str:
    """Comment of the rule that jumps there; no move's kept connections have it."""
    return f"{move_id}{_HOLD}"


def is_hold(comment: str) -> bool:
    """Whether a rule with this comment jumps to some move's hold."""
    return comment.endswith(_HOLD)


def render_hold(move_id: str, listeners: Iterable[Endpoint], *, linked: bool) -> tuple[str, ...]:
    """Hold these listeners and no others; linked: the gate jumps to the chain already."""
    chain = hold_chain(move_id)
    lines = [f"add chain inet {TABLE} {chain}", f"flush chain inet {TABLE} {chain}"]
    for listener in listeners:
        at = "" if listener.address.is_unspecified else f"{_at(listener.address)} "
        lines.append(f"add rule inet {TABLE} {chain} {at}tcp dport {listener.port} {SYN} drop")
    if not linked:
        lines.append(f'add rule inet {TABLE} gate jump {chain} comment "{hold_comment(move_id)}"')
    return tuple(lines)


def _at(address: Address) -> str:
    return f"{ruleset.IP[address.version]} daddr {address}"


def render_release(move_id: str, handles: Iterable[int]) -> tuple[str, ...]:
    """The reverse of `render_hold`; *handles* are of the rules in `gate` that jump there."""
    return (
        *(f"delete rule inet {TABLE} gate handle {handle}" for handle in handles),
        f"flush chain inet {TABLE} {hold_chain(move_id)}",
        f"delete chain inet {TABLE} {hold_chain(move_id)}",
    )
