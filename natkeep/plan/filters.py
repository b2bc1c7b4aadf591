"""the filters: rules that drop packets of certain connections until they are opened.

    filter    hook, priority           asks                       closed   opened by
    gate      prerouting -350          kept set                   drop     accept
              (peer: output -350)
    mute      output -350 (source)     the same set, reversed     drop     the same accept
    callers   prerouting -350          bare SYN, ports            drop     accept   (listeners.py)
    block     prerouting -350          bare SYN, listener         drop     its removal
    reset     prerouting, output -360  unkept set                 drop     reject with tcp reset
    early     prerouting -340          RST, kept, not yet heard   drop     the peer's first segment,
                                       and not marked
    answers   prerouting -340          RST of NEW, not yet spoken drop     NEW's first segment
    owned     a table of its own       outer, inner set           drop     never

- Gate and mute ask the same sets and jump to the same chain, so opening is one rule everywhere.
- Opening inserts a rule in front of the drop: it only adds, since a deletion would make the
  closing of the netlink socket wait for an RCU grace period.
- A listener at the wildcard address is blocked at every local address: CRIU refuses to dump it
  with a connection in its queue, whichever address was dialled.
- The reset filter answers with a reset that is in sequence, since it is made from the segment that
  it answers (RFC 9293, 3.5.2). A tuple may live again: its SYN (at the destination the listener's
  SYN-ACK) puts it into `again-ID-N`, and it is left alone from then on. It stands in front of the
  gate and of the listeners' rules; its sets hold no kept connection, so a kept one is never reset.
- A peer that was spoken to by NEW, since a gateway is not ready yet, answers with a reset; one that
  lives, once it is, with an acknowledgement. So at a destination a reset of a kept tuple is dropped
  until something else has come from its peer: `heard-ID-N` has these tuples. It stands behind the
  gate, since what that drops does not count, and before conntrack, whose entry a reset would end.
  A reset that a gateway has translated was sent to OLD: it bears a mark, and is let through. One
  to NEW that is not marked goes no further than a gateway that is ready (mode stateful).
  What comes by lo never was translated, and is not asked.
- A gateway that is open before its destination is prepared sends kept segments to a host that has
  no such socket, and resets them. So at a gateway whose move has no destination a reset from NEW is
  dropped until NEW has said something else with that tuple: `spoken-ID-N` has these. The peer says
  again what was lost. Once all were heard the base chain of either goes, as that of the gates does.
- The owned table has the flag `owner`, so the kernel spares it when the ruleset is flushed.

Rule: exact tuples of the move only. This file must never run anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.plan import servers
from natkeep.plan.arp import silence
from natkeep.plan.base_chains import (
    CAME,
    EARLY,
    GATE,
    HALF_OPEN,
    HEARD,
    LEAVING,
    NOT_SYN,
    OPEN,
    RST,
    SENT_TO_OLD,
    SPOKEN,
    SYN,
    TO_WIRE,
    address_chain,
    connection_set,
    dispatch_to,
    ended_set,
    gate_chain,
    heard_set,
    inbound_key,
    kept_set,
    outbound_key,
    peer_map,
    rule_at,
    spoken_set,
)
from natkeep.plan.kept_sets import more_of, outer_name, sets_of
from natkeep.plan.listeners import Reception
from natkeep.plan.move import Mode
from natkeep.plan.nft import (
    ACCEPT,
    DROP,
    IP,
    RESET,
    RETURN,
    Add,
    Chain,
    Match,
    Meta,
    Object,
    Rule,
    Statement,
    Table,
    jump,
)
from natkeep.plan.protocols import TCP
from natkeep.plan.resets import Reset
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections

RESET_PREFIX = "reset-"
_KEPT_PREFIX = "kept-"

# ---- gate and mute: the kept connections ---------------------------------------------------------


def gate(
    move_id: str, translations: Iterable[Translation], home: frozenset[Address] = frozenset()
) -> tuple[Object, ...]:
    """The sets of kept connections (empty), the closed gate, and what keeps OLD silent.

    home: addresses that are not kept silent, since the host serves others by them.

    The gate is closed as soon as the sets have been filled, which happens before OLD is local
    and before anything translates.
    """
    chain = gate_chain(move_id)
    objects: list[Object] = [Chain(chain), Rule(chain, (DROP,))]
    for translation in translations:
        version = translation.map.old.version
        size = len(translation.kept)
        for name in sets_of(move_id, translation):
            objects.append(connection_set(name, version, size))
        for one in more_of(move_id, translation):
            make = connection_set if one.peers is None else peer_map
            objects.append(make(one.name, version, size))
        ended = ended_set(move_id, translation.number)
        if gives_back(translation):
            objects.append(connection_set(ended, version, size, dynamic=True))
        inbound = inbound_key(version, translation.protocol)
        arriving = Match(inbound, f"@{outer_name(move_id, translation)}")
        for local in gated_addresses(translation):
            asked = arriving
            if local != translation.before:
                asked = arriving._replace(to=f"@{kept_set(move_id, translation.number)}")
            row, streams = translation.site.row, translation.protocol.has_states
            came = (CAME,) if row.passes_on and not streams else ()
            dispatch = "dial" if row.own else GATE
            objects += rule_at(dispatch, local, (*came, asked, jump(chain)), move_id)
        if translation.site.row.puts_old:
            objects += _silence_old(move_id, translation, home)
            heard = heard_set(move_id, translation.number)
            at = HEARD, translation.before, heard
            objects += _early_resets(move_id, translation, arriving, at)
    return tuple(objects)


def _silence_old(
    move_id: str, translation: Translation, home: frozenset[Address]
) -> Iterator[Object]:
    """What a destination does not say as OLD: SYN-ACKs on kept tuples, ARP, nor what is kept."""
    old, number = translation.map.old, translation.number
    outbound = outbound_key(old.version, translation.protocol)
    kept = Match(outbound, f"@{kept_set(move_id, number)}")
    from_old = Match((f"{IP[old.version]} saddr",), old)
    if gives_back(translation):
        note = Add(outbound, ended_set(move_id, number))
        yield Rule(HALF_OPEN, (from_old, kept, note), move_id)
    if translation.protocol.has_states:
        yield Rule(HALF_OPEN, (from_old, kept, DROP), move_id)
    yield from silence(old) if old not in home else ()
    if old in home:
        yield Rule(LEAVING, (from_old, kept, TO_WIRE, DROP), move_id)


def _early_resets(
    move_id: str, translation: Translation, kept: Match, at: tuple[str, Address, str]
) -> Iterator[Object]:
    """Resets of ends that were not heard yet are dropped; an end that was pays one lookup.

    at: the dispatch, the address there, and the set of those that were heard.
    """
    if not translation.protocol.has_states:
        return
    dispatch, address, heard = at
    version, size = translation.map.old.version, len(translation.kept)
    yield connection_set(heard, version, size, dynamic=True)
    rules: tuple[tuple[Statement, ...], ...] = (
        # Each in front of the one before.
        (NOT_SYN, kept, Add(kept.fields, heard)),
        (RST, kept, DROP),
        (kept._replace(to=f"@{heard}"), ACCEPT),
    )
    if dispatch == HEARD:
        marked = Match((SENT_TO_OLD[0],), SENT_TO_OLD[1])
        rules = (*rules[:2], (RST, marked, kept, ACCEPT), rules[2])
    yield from dispatch_to(dispatch, address)
    for statements in rules:
        yield Rule(address_chain(dispatch, address), statements, move_id, insert=True)


def await_destination(move_id: str, translations: Iterable[Translation]) -> tuple[Object, ...]:
    """The same at a gateway, of resets of a destination that has not spoken yet."""
    objects: list[Object] = []
    for one in translations:
        kept = Match(outbound_key(one.map.old.version), f"@{kept_set(move_id, one.number)}")
        spoken = spoken_set(move_id, one.number)
        objects += _early_resets(move_id, one, kept, (SPOKEN, one.after, spoken))
    return tuple(objects)


def noted_sets(name: str) -> Iterator[str]:
    """Names of the sets in which packets note what became of the connections of the set *name*."""
    for prefix, noted in ((RESET_PREFIX, "again-"), *((_KEPT_PREFIX, f"{one}-") for one in EARLY)):
        if name.startswith(prefix):
            yield f"{noted}{name.removeprefix(prefix)}"


def gives_back(translation: Translation) -> bool:
    """Whether its rules note which tuples have ended; in mode stateful conntrack does."""
    return translation.mode == Mode.STATELESS and bool(translation.site.row.leaves)


def mute(move_id: str, translations: Iterable[Translation]) -> tuple[Object, ...]:
    """The outbound half of a source's gate; the sets are those of the inbound half."""
    objects: list[Object] = []
    for translation in translations:
        old = translation.map.old
        key = outbound_key(old.version, translation.protocol)
        kept = Match(key, f"@{kept_set(move_id, translation.number)}")
        objects += rule_at("mute", old, (kept, jump(gate_chain(move_id))), move_id)
    return tuple(objects)


def gated_addresses(translation: Translation) -> tuple[Address, ...]:
    """Where a peer's packet may be addressed when the gate must stop it.

    At the destination both: NEW from the wire, and OLD from a peer on the same host. At the peers'
    own host nowhere for UDP: where a datagram is dropped on its way out, the send fails (EPERM).
    """
    if translation.site.row.own and not translation.protocol.has_states:
        return ()
    if translation.site.row.puts_old:
        return (translation.before, translation.after)
    return (translation.before,)


def opening(move_id: str) -> Rule:
    """Let the kept connections through: one rule, whatever their number.

    A bare SYN too: what becomes of it is the translation's to say.
    """
    return Rule(gate_chain(move_id), (ACCEPT,), OPEN, insert=True)


# ---- reset: connections that cannot be kept ------------------------------------------------------


def reset_set(move_id: str, number: int) -> str:
    """Name of the set of connections of the move's map *number* that cannot be kept."""
    return f"{RESET_PREFIX}{move_id}-{number}"


def again_set(move_id: str, number: int) -> str:
    """Name of the set of those of them whose tuple lives again."""
    return f"again-{move_id}-{number}"


def reset_chain(move_id: str) -> str:
    """Name of the chain that drops, and resets once the move is open."""
    return f"{RESET_PREFIX}{move_id}"


def reset_comment(move_id: str) -> str:
    """Comment of the rules in shared chains; another than that of the kept connections' rules."""
    return f"{move_id}:unkept"


def reset(
    move_id: str, resets: Iterable[Reset], home: frozenset[Address] = frozenset()
) -> tuple[Object, ...]:
    """The sets (empty), the chain that drops, and the rules that lead there."""
    chain = reset_chain(move_id)
    objects: list[Object] = [Chain(chain), Rule(chain, (DROP,))]
    for one in resets:
        objects += _reset_one(move_id, one)
        if one.site.row.puts_old and one.old not in home:
            objects += silence(one.old)
    return tuple(objects)


def _reset_one(move_id: str, one: Reset) -> Iterator[Object]:
    version, size = one.old.version, len(one.connections)
    key, begins = inbound_key(version), SYN
    if one.dispatch == "answer":
        key, begins = outbound_key(version), SYN._replace(value=("syn", "ack"))
    lost, again = reset_set(move_id, one.number), again_set(move_id, one.number)
    yield connection_set(lost, version, size)
    yield connection_set(again, version, size, dynamic=True)
    yield from dispatch_to(one.dispatch, one.old)
    asked = Match(key, f"@{lost}")
    rules: tuple[tuple[Statement, ...], ...] = (
        # Each in front of the one before: what begins anew, what began anew, all others.
        (asked, jump(reset_chain(move_id))),
        (Match(key, f"@{again}"), RETURN),
        (begins, asked, Add(key, again), RETURN),
    )
    for statements in rules:
        yield Rule(address_chain(*one.chain), statements, reset_comment(move_id), insert=True)


def reset_opening(move_id: str) -> Rule:
    """Answer with resets from now on."""
    tcp = Meta("meta l4proto", TCP.name)
    return Rule(reset_chain(move_id), (tcp, RESET), OPEN, insert=True)


# ---- owned: a table that outlives a flush of the ruleset -----------------------------------------

_OWNED_CHAINS = (
    ("arriving", "input", "-350"),
    ("passing", "forward", "-350"),
    ("leaving", "postrouting", "350"),
)


def owned_table_name(move_id: str) -> str:
    """Name of the move's owned inet table; natkeep's own table is another."""
    return f"natkeep-guard-{move_id}"


def owned_sets(translation: Translation) -> dict[str, Connections]:
    """The translation's sets in the owned table by name, and what is in them."""
    number = translation.number
    return {f"outer-{number}": translation.outer, f"inner-{number}": translation.inner}


def owned_table(
    move_id: str, translations: Iterable[Translation], receptions: Iterable[Reception] = ()
) -> tuple[Object, ...]:
    """The whole table, its sets empty; it lives as long as the socket that makes it."""
    translations, table = tuple(translations), owned_table_name(move_id)
    objects: list[Object] = [Table(name=table, owner=True)]
    objects += [Chain(name, hook, prio, table=table) for name, hook, prio in _OWNED_CHAINS]
    for one in translations:
        version, size = one.map.old.version, len(one.kept)
        objects += [connection_set(name, version, size, table=table) for name in owned_sets(one)]
    for one in translations:
        for chain, statements in _untranslated(one):
            objects.append(Rule(chain, (*statements, DROP), move_id, table=table))
    for reception in receptions:
        for chain, asked in servers.find_untranslated(reception):
            objects.append(Rule(chain, (*asked, DROP), move_id, table=table))
    return tuple(objects)


def _untranslated(translation: Translation) -> Iterator[tuple[str, tuple[Statement, ...]]]:
    """What is still un-translated where everything should be translated."""
    outer, inner = owned_sets(translation)
    before, after = translation.before, translation.after
    version, protocol = before.version, translation.protocol
    inbound, outbound = inbound_key(version, protocol), outbound_key(version, protocol)
    to_before = Match((f"{IP[version]} daddr",), before)
    arrived = (to_before, Match(inbound, f"@{outer}"))
    if translation.site.row.own:  # the same the other way round, since the peer is here
        yield "leaving", arrived
        from_after = Match((f"{IP[version]} saddr",), after)
        yield "arriving", (from_after, Match(outbound, f"@{inner}"))
        return
    yield "arriving", arrived
    yield "passing", arrived
    # A peer on the destination itself is not translated.
    to_wire = (TO_WIRE,) if translation.site.row.puts_old else ()
    from_after = Match((f"{IP[version]} saddr",), after)
    yield "leaving", (*to_wire, from_after, Match(outbound, f"@{inner}"))
