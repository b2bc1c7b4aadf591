"""the holding of listeners at the source, and the look at who still waits in their queues.

Rule: text from plan/quiet.py goes in, the kernel's own tables are looked at; nothing is decided.
All functions act in the namespace that the calling thread is in.
"""

from __future__ import annotations

from natkeep.kernel import nft, nftables, passing
from natkeep.plan import quiet, ruleset
from natkeep.plan.ruleset import TABLE
from natkeep.plan.steps import HoldListeners

_MOVES = ("kept-", "outer-", "listen-", "reset-")
"""How the names of a move's sets begin."""


def missing_static_lines() -> list[str]:
    """What a source's table lacks, to be added behind the static part of every table."""
    return [] if nftables.has_chain(TABLE, quiet.BASE_CHAIN) else [*quiet.render_static()]


def hold(step: HoldListeners) -> None:
    """Hold these listeners; again is fine, and then these and no others."""
    lines = list(step.lines(linked=bool(_links(step.move_id))))
    if not nftables.has_table(nftables.INET, TABLE):
        lines = [*ruleset.render_static(), *lines]
    nft.run_transaction([*passing.closing_lines(), *lines])
    passing.let_pass()  # but not bare SYNs


def release(step: HoldListeners) -> None:
    """Let new connections in again; the table goes if nobody else is in it."""
    chains = nftables.chain_names(TABLE)
    if quiet.hold_chain(step.move_id) not in chains:
        return
    others = chains - {quiet.hold_chain(step.move_id)}
    if any(name.startswith((quiet.HOLD_PREFIX, "gate-")) for name in others):
        nft.run_transaction(quiet.render_release(step.move_id, _links(step.move_id)))
    else:
        nft.run_transaction(ruleset.render_removal())


def is_shared(own: set[str]) -> bool:
    """Whether the table has something of another move than the one whose sets are *own*."""
    sets = {name for name in nftables.set_names(TABLE) if name.startswith(_MOVES)}
    holds = (name for name in nftables.chain_names(TABLE) if name.startswith(quiet.HOLD_PREFIX))
    return not sets <= own or any(holds)


def _links(move_id: str) -> list[int]:
    comment = quiet.hold_comment(move_id)
    return [rule.handle for rule in nftables.rules(TABLE, "gate") if rule.comment == comment]
