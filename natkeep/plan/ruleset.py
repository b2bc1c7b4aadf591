"""the ruleset: what a site's table looks like, and the objects that add a move to it.

This file must never run anything.

Theory of operation. A site has one table `inet natkeep`, shared by all moves.

    prerouting   -350  gate      local address ─► gate-at-ADDRESS ─► (kept?) ─► gate-ID: drop
    stateful:
    prerouting   -120  inbound   local address ─► in-at-ADDRESS   ─► (kept?) ─► dnat
    postrouting    80  outbound  local address ─► out-at-ADDRESS  ─► (kept?) ─► snat
    stateful, at a gateway: the peers' part of it
    prerouting   -119  peer-inbound   from local address ─► from-at-ADDRESS ─► (kept?) ─► dnat
    postrouting    81  peer-outbound  to local address   ─► to-at-ADDRESS   ─► (kept?) ─► snat
    stateful, has no entry (invalid, or not tracked):
    prerouting   -110  invalid-inbound   invalid-in-, invalid-from-at-ADDRESS ─► set daddr
    postrouting    90  invalid-outbound  invalid-out-, invalid-to-at-ADDRESS  ─► set saddr
    stateful, at a gateway, of resets, in front of both
    prerouting   -110  marked-resets  OLD ─► mark-at-OLD ─► (kept?) ─► marked; NEW ─► … ─► drop
    stateful, at a destination whose peers have moved: the peers' part, and what is left over
    output and input, -120 and 80  peer-output, peer-input, as peer-inbound and peer-outbound
    output and input, -110 and 90  invalid-peer-output, invalid-peer-input
    input         350  half-translated  local address ─► half-at-ADDRESS ─► (kept?) ─► drop
    stateful, at the peers' own host: as at a gateway, but for the gate, and what is left over
    output   -350  dialled       local address ─► dial-at-ADDRESS ─► (kept?) ─► gate-ID: drop
    output   -330  own-resets    ─► marked-resets
    input     350  untranslated  local address ─► new-at-ADDRESS ─► (kept?) ─► drop
    stateful, at a relay: half-translated too, and what relay.py has
    stateful, at a gateway that is a peer itself: the same maps
    output, -350                   local-gate, as gate
    output and input, -120 and 80  local-inbound, local-outbound, as inbound and outbound
    output and input, -110 and 90  invalid-local-inbound, invalid-local-outbound
    stateless:
    prerouting   -300  arriving  local address ─► set-at-ADDRESS  ─► (kept?) ─► set daddr
    postrouting   300  departing local address ─► put-at-ADDRESS  ─► (kept?) ─► set saddr
    stateless.py has the rules of these two
    either:
    postrouting   350  leaving   said here, with a source that is still OLD: dropped, not leaked
    output       -350  injected  CRIU's own segments are not tracked; SYN-ACK ─► half-open

- Base chains hold verdict maps on the local address only, so other people's packets leave
  after one lookup, and a packet costs the same with 1 move or 1,000.
- `kept-ID-N` is the one set of connections of the move's translation N, `peer . peer port .
  local port`, with its size given: all chains ask it, and nothing else depends on how many
  connections there are. Only where a gateway publishes another port, or masquerades the peer, or
  it has moved, or the map is to another port, do packets look different outside: then `outer-ID-N`
  is that side's set, and `old-ID-N` what the old host says, where neither of them has that. Of a
  peer that changes the maps `to-inner-ID-N` and `to-outer-ID-N` say which it is on the other side,
  and `routed-ID-N` is the set of what is routed, its destination translated and its source not yet.
- `gate-ID` holds a drop. Opening inserts an accept in front of it: one rule, add-only
  (a deletion would make the closing of the netlink socket wait for an RCU grace period).
- Where no gate is closed any more the base chain `gate` goes, once the blackout is over: even one
  with a single rule costs every packet a thirtieth of its way. What closes a gate makes it anew.
- Rules in the shared `…-at-ADDRESS` chains carry the id as comment; that is how they are found
  again without a journal. They are inserted in front: the newest move of a tuple has the word,
  so a translation is replaced without a moment in which there is none.
- The mark 0xC114 is CRIU's (SOCCR_MARK): it restores half-closed sockets with segments of its
  own, through lo. They pass the gate and are not tracked, or conntrack would know the
  connection the wrong way round.
- Translations are 20 before dstnat and srcnat: at an equal priority the chain that was
  registered last would win. Stateless ones are before conntrack inbound and after it outbound,
  so that it sees one and the same tuple in both directions.
- Ports are explicit (`dnat to OLD : tcp dport`): with a range of one port the kernel does not
  choose another on a clash; the packet is dropped, which TCP repairs.
- No kept connection hangs on its entry, which time, a flush or a forged reset can end. What then
  comes is `new` to conntrack, and goes by the nat rules as a first packet; or it is `invalid` (a
  FIN or RST, all where nf_conntrack_tcp_loose is 0, a SYN-ACK), which nat chains never see: the
  invalid chains rewrite its headers. A packet with an entry only pays for being asked for it.
- At a gateway the peer's address and port are pinned, too: without its entry a connection would
  be masqueraded or redirected anew by the gateway's other rules. What arrives for a kept tuple and
  is still addressed as it arrived behind all that is dropped; the old host would reset it.
- In mode stateful a bare SYN is never translated by a rule, and dropped at the destination: a kept
  tuple does not open a new path. While the connection's entry lives, conntrack does translate one;
  then what a listener at OLD answers is where it ends: a SYN-ACK of a kept tuple goes nowhere
  (chain `half-open`; only SYN-ACKs are sent there).
- What a peer on the destination itself sends goes through lo, and is not translated.
- What an ICMP error quotes is translated by conntrack in stateful mode, and by the raw rules of
  icmp_errors.py in stateless mode: without, path MTU discovery would fail.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.plan.base_chains import (
    DIRECTIONS,
    FROM_WIRE,
    MARK,
    SENT_TO_OLD,
    SYN,
    TO_WIRE,
    address_chain,
    dispatch_to,
    inbound_key,
    inner_map,
    kept_set,
    not_syn,
    outbound_key,
    outer_map,
    rule_at,
)
from natkeep.plan.kept_sets import old_name, outer_name, routed_name
from natkeep.plan.move import Mode
from natkeep.plan.nft import (
    ACCEPT,
    DROP,
    IP,
    Match,
    Meta,
    Nat,
    NatMap,
    Object,
    Rule,
    Statement,
    Write,
    WriteMap,
)
from natkeep.plan.relay import drop_untranslated
from natkeep.plan.stateless import rewrite
from natkeep.plan.translation import Translation


def translate(move_id: str, translations: Iterable[Translation]) -> tuple[Object, ...]:
    """The rules that translate, live as soon as they are loaded.

    A nat expression is what makes the kernel track connections in this namespace, so from
    here on un-translated entries can appear: they are purged by the step after this one.
    """
    objects: list[Object] = []
    for one in translations:
        objects += (_nat if one.mode == Mode.STATEFUL else rewrite)(move_id, one)
    return tuple(objects)


def _nat(move_id: str, translation: Translation) -> list[Object]:
    before, after = translation.before, translation.after
    inbound, outbound = DIRECTIONS[Mode.STATEFUL]
    protocol, some = translation.protocol, not_syn(translation.protocol)
    outer_port: str | int = protocol.sport
    inner_port: str | int = protocol.dport
    if translation.renames and (ports := translation.ports()):
        outer_port, inner_port = ports
    outer, routed = _outer(move_id, translation), _routed(move_id, translation)
    dnat, snat = Nat("dnat", after, inner_port), Nat("snat", before, outer_port)
    arriving: tuple[Statement, ...] = (*some, outer, *_wire(translation, FROM_WIRE), dnat)
    departing: tuple[Statement, ...] = (*some, routed, *_wire(translation, TO_WIRE), snat)
    objects: list[Object] = [
        *dispatch_to(inbound, before),
        *_syn_drop(move_id, translation),
        Rule(address_chain(inbound, before), arriving, move_id, insert=True),
        *rule_at(outbound, after, departing, move_id),
    ]
    if translation.site.row.passes_on:
        # What the old host still sends for a kept connection goes no further. It would be a new
        # flow to conntrack, clash with our entry and leave from another port, which the peer
        # answers with a reset. Only first packets of a flow come by here, so it costs nothing.
        if not translation.site.row.relays:  # whose own stack is quiet (relay.py)
            drop = (_of_old(move_id, translation), DROP)
            objects += rule_at(outbound, translation.map.old, drop, move_id)
        objects += _nat_peers(move_id, translation)
        objects += _mark_resets(move_id, translation) if protocol.has_states else ()
        if translation.site.row.own:
            # The peer's kernel knows no such socket, and would answer with a reset.
            objects += rule_at("new", after, (_kept(move_id, translation), DROP), move_id)
    elif translation.turns_peers:
        objects += _nat_peers(move_id, translation)
    return objects + _invalid(move_id, translation)


def _mark_resets(move_id: str, translation: Translation) -> Iterator[Object]:
    """The destination believes a reset that was sent to OLD (filters.py)."""
    before, after = translation.before, translation.after
    mark = (_outer(move_id, translation), Write(*SENT_TO_OLD))
    yield from rule_at(MARK, before, mark, move_id)
    # One to NEW answers what has passed untranslated, before all gateways were ready.
    answers = Match(inbound_key(before.version), f"@{kept_set(move_id, translation.number)}")
    unmarked = Match((SENT_TO_OLD[0],), SENT_TO_OLD[1], equal=False)
    yield from rule_at(MARK, after, (answers, unmarked, DROP), move_id)


def _outer(move_id: str, translation: Translation) -> Match:
    """A packet from a peer, as it arrives."""
    return Match(_inbound(translation), f"@{outer_name(move_id, translation)}")


def _routed(move_id: str, translation: Translation) -> Match:
    """A packet to a peer, as it departs but for its source."""
    return Match(_outbound(translation), f"@{routed_name(move_id, translation)}")


def _kept(move_id: str, translation: Translation) -> Match:
    """A packet to a peer, as it comes from where the process is."""
    return Match(_outbound(translation), f"@{kept_set(move_id, translation.number)}")


def _inbound(translation: Translation) -> tuple[str, ...]:
    return inbound_key(translation.map.old.version, translation.protocol)


def _outbound(translation: Translation) -> tuple[str, ...]:
    return outbound_key(translation.map.old.version, translation.protocol)


def _of_old(move_id: str, translation: Translation) -> Match:
    """A packet to a peer, as the old host says it."""
    return Match(_outbound(translation), f"@{old_name(move_id, translation)}")


def _nat_peers(move_id: str, translation: Translation) -> Iterator[Object]:
    """The peers' part of the same: as the process knows them, or as they are.

    Where both is the same they are translated into themselves, so that no rule of another's
    masquerades or redirects a connection anew whose entry was lost. And what comes here with the
    destination that it arrived with goes no further: the old host would answer with a reset. Nor
    does what comes to a destination's sockets with a peer that they do not know.
    """
    ip, number, protocol = IP[translation.map.old.version], translation.number, translation.protocol
    inbound, outbound, some = _inbound(translation), _outbound(translation), not_syn(protocol)
    to_peer: tuple[Statement, ...] = (
        _kept(move_id, translation),
        Nat("dnat", f"{ip} daddr", protocol.dport),
    )
    from_peer: tuple[Statement, ...] = (
        Match(inbound, f"@{routed_name(move_id, translation)}"),
        Nat("snat", f"{ip} saddr", protocol.sport),
    )
    if translation.masks:
        to_peer = (NatMap("dnat", outbound, outer_map(move_id, number)),)
        from_peer = (NatMap("snat", inbound, inner_map(move_id, number)),)
    yield from rule_at("from", translation.after, (*some, *to_peer), move_id)
    yield from rule_at("to", translation.after, (*some, *from_peer), move_id)
    outer = _outer(move_id, translation)
    if translation.site.row.passes_on:
        yield from rule_at("to", translation.before, (*some, outer, DROP), move_id)
        if translation.site.row.relays:
            yield from drop_untranslated(move_id, translation)
        return
    yield from rule_at("half", translation.before, (outer, DROP), move_id)
    half = outer._replace(to=f"@{routed_name(move_id, translation)}")
    yield from rule_at("half", translation.after, (half, DROP), move_id)
    # In front, since one peer may have moved to where another was.
    whole = outer._replace(to=f"@{kept_set(move_id, number)}")
    yield from rule_at("half", translation.after, (whole, ACCEPT), move_id)


def _invalid(move_id: str, translation: Translation) -> list[Object]:
    """The same for packets that have no entry: their headers are rewritten.

    An accept ends the base chain: no other move's rules are asked as well.
    """
    before, after, ip = translation.before, translation.after, IP[translation.map.old.version]
    protocol, some = translation.protocol, not_syn(translation.protocol)
    ports: tuple[tuple[Statement, ...], ...] = ((), ())
    if translation.renames and (changed := translation.ports()):
        outside, inside = changed
        ports = (Write(protocol.dport, inside),), (Write(protocol.sport, outside),)
    outer = _outer(move_id, translation)
    inward = Write(f"{ip} daddr", after), *ports[0], ACCEPT
    outward = Write(f"{ip} saddr", before), *ports[1], ACCEPT
    arriving = (*some, outer, *_wire(translation, FROM_WIRE), *inward)
    departing = (
        *some,
        _routed(move_id, translation),
        *_wire(translation, TO_WIRE),
        *outward,
    )
    objects: list[Object] = [
        *rule_at("invalid-in", before, arriving, move_id),
        *rule_at("invalid-out", after, departing, move_id),
    ]
    if translation.site.row.passes_on:
        objects += rule_at("invalid-to", before, (*some, outer, DROP), move_id)
        drop = (_of_old(move_id, translation), DROP)
        if not translation.site.row.relays:
            objects += rule_at("invalid-out", translation.map.old, drop, move_id)
    if translation.masks:
        objects += _invalid_peers(move_id, translation)
    return objects


def _invalid_peers(move_id: str, translation: Translation) -> Iterator[Object]:
    ip, number, protocol = IP[translation.map.old.version], translation.number, translation.protocol
    after, some = translation.after, not_syn(protocol)
    to = (f"{ip} daddr", protocol.dport)
    to_peer = WriteMap(_outbound(translation), outer_map(move_id, number), to)
    to = (f"{ip} saddr", protocol.sport)
    from_peer = WriteMap(_inbound(translation), inner_map(move_id, number), to)
    yield from rule_at("invalid-from", after, (*some, to_peer, ACCEPT), move_id)
    yield from rule_at("invalid-to", after, (*some, from_peer, ACCEPT), move_id)


def _syn_drop(move_id: str, translation: Translation) -> list[Object]:
    """At the destination: a bare SYN of a kept tuple that no entry translates ends here."""
    if not (translation.site.row.puts_old and translation.protocol.has_states):
        return []
    local, asked = translation.before, _outer(move_id, translation)
    inbound, _ = DIRECTIONS[Mode.STATEFUL]
    return [Rule(address_chain(inbound, local), (SYN, asked, DROP), move_id, insert=True)]


def _wire(translation: Translation, meta: Meta) -> tuple[Meta, ...]:
    return (meta,) if translation.site.row.puts_old else ()
