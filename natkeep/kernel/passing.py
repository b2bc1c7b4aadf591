"""the pass: where no gate is closed, packets do not come by the gates.

A packet asks for its mark, its address, the set of kept connections and the move's own gate before
it goes on: a sixth of what its whole way costs. While a gate is closed, it must. Where all are
open, one rule in front of the base chain `gate` (ruleset.render_pass) lets it by at once; at a
destination a bare SYN still goes the long way. Even that costs a thirtieth at each site, for as
long as the connections live. So once nobody waits any more the base chain is *unhooked*: it goes,
and what is left of the gates is called by nobody. A SYN of a kept tuple that conntrack then still
translates reaches a listener, whose answer goes nowhere (chain `half-open`).

Rule: the pass stands only where no gate is closed. It goes, and the base chain comes back, in the
transaction that adds a closed gate, or closes one again; it comes in one that the kernel refuses
(ERESTART) when anything, whoever did it, has changed since the gates were looked at, and so is the
unhooking. The pass is only ever added when a move is opened, and what opens in any case does so
without it. Unhooking deletes, for which the kernel lets one wait: it is never part of a blackout.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from contextlib import suppress

from natkeep.kernel import nftables
from natkeep.kernel.assembler import assemble
from natkeep.kernel.interface import Packed
from natkeep.plan import quiet, ruleset
from natkeep.plan.ruleset import TABLE
from natkeep.plan.steps import OpenGate
from natkeep.values import dataclass

_GATES = re.compile(r"(?:gate|callers)-[a-z0-9][a-z0-9-]*")
"""Chains that drop until they are opened; an address chain's name has a dot or an underscore."""

_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Look:
    """What was seen where no gate is closed: the ruleset's state, and who may not pass.

    guarded: bare SYNs still ask the gates; holding: some of them have to, to wait for a listener.
    """

    generation: int
    guarded: bool
    holding: bool


def open_gates(step: OpenGate) -> None:
    """Let the connections of these gates through, all or none; or OSError.

    With the pass, when no other gate is closed; it is not worth more than a few attempts.
    """
    for _ in range(_ATTEMPTS):
        look = _look(step.chains())
        if look is None:
            break
        try:
            _send(*_with_pass(step.lines(), look))
        except OSError as error:
            if error.errno != errno.ERESTART:
                raise
        else:
            return
    _send(step.lines())


def pack_open(step: OpenGate) -> Packed:
    """The transactions that open these gates, as things stand now and otherwise."""
    plain, look = nftables.pack_batch(assemble(step.lines())), _look(step.chains())
    if look is None:
        return Packed(plain, len(step.lines()))
    # Each transaction makes the next state.
    unhooking = b"" if look.holding else _pack_unhooking(look.generation + 1)
    lines, generation = _with_pass(step.lines(), look)
    with_pass = nftables.pack_batch(assemble(lines), generation)
    return Packed(plain, len(step.lines()), with_pass, unhooking)


def _with_pass(lines: Sequence[str], look: Look) -> tuple[tuple[str, ...], int]:
    """The same with the pass, and for which state of the ruleset."""
    return (*lines, ruleset.render_pass(guarded=look.guarded)), look.generation


def _send(lines: Sequence[str], generation: int = 0) -> None:
    nftables.send_packed(nftables.pack_batch(assemble(lines), generation), len(lines))


def _look(opening: Sequence[str]) -> Look | None:
    """None where another gate is closed, there is a pass already, or neither can be seen.

    opening: names of the chains that are being opened.
    """
    try:
        return _look_closely(opening)
    except OSError:  # nothing that is opened or prepared shall fail by it
        return None


def _look_closely(opening: Sequence[str]) -> Look | None:
    generation = nftables.read_generation()
    # A site that is, or has been, a destination has a chain that a gateway has not.
    guarded, seen = nftables.has_chain(TABLE, ruleset.LEAVING), set(opening)
    based = holding = False
    for rule in nftables.rules_of_chains(TABLE, ruleset.GATE, "callers-"):
        if rule.chain == ruleset.GATE:
            based = True
            if rule.comment == ruleset.PASS:
                return None
            holding |= quiet.is_hold(rule.comment)  # listeners are held in the base chain
        elif rule.chain not in seen and _GATES.fullmatch(rule.chain):
            seen.add(rule.chain)  # what opens a gate is its first rule
            if rule.comment != ruleset.OPEN:
                return None
    # Where its own rules were not seen, a closed gate may not have been either.
    return Look(generation, guarded or holding, holding) if based else None


def closing_lines() -> list[str]:
    """What has to stand in front of what closes a gate: the pass goes, the base chain is back."""
    rules = nftables.rules(TABLE, ruleset.GATE)
    if not rules and nftables.has_table(nftables.INET, TABLE):
        return [] if nftables.has_chain(TABLE, ruleset.GATE) else [*ruleset.render_hook()]
    return [
        f"delete rule inet {TABLE} {ruleset.GATE} handle {rule.handle}"
        for rule in rules
        if rule.comment == ruleset.PASS
    ]


def let_pass() -> None:
    """Put the pass in, when a gate that was closed has gone and no other is closed."""
    with suppress(OSError):  # it saves time and nothing else
        if look := _look(()):
            _send(*_with_pass((), look))


def unhook() -> None:
    """Take the base chain of the gates away where the pass stands; refused if anything changes.

    It deletes, so closing the socket waits for what still looks at the chain (an RCU grace period):
    nothing for a blackout.
    """
    if packed := pack_unhooking():
        with suppress(OSError):  # it saves time and nothing else
            nftables.send_packed(packed, 2)


def pack_unhooking() -> bytes:
    """The transaction of unhook, as things stand now; empty where the base chain has to stay."""
    try:
        generation = nftables.read_generation()
        comments = [rule.comment for rule in nftables.rules(TABLE, ruleset.GATE)]
    except OSError:  # nothing that is opened or prepared shall fail by it
        return b""
    if ruleset.PASS not in comments or any(map(quiet.is_hold, comments)):
        return b""
    return _pack_unhooking(generation)


def _pack_unhooking(generation: int) -> bytes:
    """For this state of the ruleset; its second message is answered."""
    return nftables.pack_batch(assemble(ruleset.render_unhooking()), generation)
