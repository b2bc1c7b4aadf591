"""the rules of mode stateless: headers are rewritten, and a tuple is given back once it has ended.

Rule: no conntrack. What a rule has to know of a connection is asked of the kernel that has the
socket, by what it answers; nothing that a peer sends ends a translation.
This file must never run anything.

    gateway      arriving   no SYN, no RST; kept, not ended      set daddr NEW, accept
                            RST, bare SYN; kept, not ended       marked, set daddr NEW, accept
                            SYN-ACK; kept, not ended             set daddr NEW, accept
                 departing  no SYN, no RST; kept, not ended      set saddr OLD, accept
                            SYN-ACK; kept                        ended, accept
                            RST-ACK of number 0; kept, not ended ended, drop
                            RST; kept, not ended                 set saddr OLD, accept
    destination  arriving   no bare SYN; kept, not ended         set daddr OLD, accept
                            bare SYN; kept, not ended            set daddr OLD; a socket? accept
                            …that is OLD's now, marked           reset
                            …that is OLD's now                   set daddr NEW, ended, accept
                 departing  no bare SYN; kept                    set saddr NEW, accept
                 half-open  SYN-ACK of OLD; kept                 ended, drop  (filters.py)

- `ended-ID-N` has the tuples that are free again: they are not translated any more.
- A peer's bare SYN is a peer that has booted, whose SYN is answered by a challenge acknowledgement
  (RFC 9293, 3.10.7.4) as long as the process has the connection; or a new connection from the same
  port. So it goes to the destination, where the `socket` expression tells. It does not tell
  a listener at OLD from a connection; that one's SYN-ACK does.
- Who dialled OLD must not get to a service of NEW. So the gateway marks the SYN, by the urgent
  pointer, which means nothing in a segment without URG; the destination answers such a one with a
  reset. One that is not marked was sent to NEW, whose it is from then on. What a reset is marked
  for, filters.py says.
- By the answer the gateway knows: the RST-ACK of number 0 that only a SYN gets, or the SYN-ACK of
  NEW. The RST is dropped: the peer's SYN comes again after a second, and then goes where it would
  have gone without natkeep.
- With --listeners the SYN to a listed port is let in by the rules of listeners.py, which stand in
  front of these.
- A rule whose fields are of TCP does not match the later fragments of a packet, so the kernel has
  to defragment. It does as long as a rule with a `tproxy` expression exists, which packets need not
  reach: `defragment` is a chain that nothing jumps to.
"""

from __future__ import annotations

from natkeep.plan.base_chains import (
    DIRECTIONS,
    FROM_WIRE,
    NOT_SYN,
    RST,
    SENT_TO_OLD,
    SYN,
    SYN_ACK,
    TO_WIRE,
    address_chain,
    dispatch_to,
    ended_set,
    inbound_key,
    kept_set,
    outbound_key,
)
from natkeep.plan.move import Mode
from natkeep.plan.nft import (
    ACCEPT,
    DROP,
    IP,
    RESET,
    Add,
    Match,
    Meta,
    Object,
    Rule,
    Statement,
    TcpFlags,
    Write,
)
from natkeep.plan.translation import Translation

_RST_ACK = TcpFlags(("rst", "ack"), ("rst", "ack"))
_NEITHER = TcpFlags(("syn", "rst"), ())
_NUMBER_0 = Match(("tcp sequence",), 0)
_HAS_SOCKET = Meta("socket wildcard", "0")
"""One that is bound to the packet's own destination, not to the wildcard address."""


def rewrite(move_id: str, translation: Translation) -> list[Object]:
    """The rules of one translation; those further behind first, since each goes to the front."""
    make = _at_destination if translation.site.row.puts_old else _at_gateway
    ends = translation.before, translation.after
    objects: list[Object] = []
    both = zip(DIRECTIONS[Mode.STATELESS], ends, make(move_id, translation), strict=True)
    for dispatch, address, rules in both:
        objects += dispatch_to(dispatch, address)
        chain = address_chain(dispatch, address)
        objects += (Rule(chain, said, move_id, insert=True) for said in reversed(rules))
    return objects


Rules = list[tuple[Statement, ...]]


def _at_gateway(move_id: str, translation: Translation) -> tuple[Rules, Rules]:
    ip, kept, ended = _names(move_id, translation)
    inbound, outbound = _keys(translation)
    kept_one = (Match(inbound, kept), Match(inbound, ended, equal=False))
    to_new = Write(f"{ip} daddr", translation.after), ACCEPT
    to_old = Write(f"{ip} saddr", translation.before), ACCEPT
    there, gone = Match(outbound, kept), Match(outbound, ended, equal=False)
    note = Add(outbound, ended[1:])
    return [
        (_NEITHER, *kept_one, *to_new),
        (RST, *kept_one, Write(*SENT_TO_OLD), *to_new),
        (SYN, *kept_one, Write(*SENT_TO_OLD), *to_new),
        (NOT_SYN, *kept_one, *to_new),
    ], [
        (_NEITHER, there, gone, *to_old),
        (SYN_ACK, there, note, ACCEPT),
        (_RST_ACK, _NUMBER_0, there, gone, note, DROP),
        (RST, there, gone, *to_old),
    ]


def _at_destination(move_id: str, translation: Translation) -> tuple[Rules, Rules]:
    ip, kept, ended = _names(move_id, translation)
    inbound, outbound = _keys(translation)
    before, after = translation.before, translation.after
    to_old = Write(f"{ip} daddr", after)
    kept_one = (Match(inbound, kept), FROM_WIRE, Match(inbound, ended, equal=False))
    is_old = Match((f"{ip} daddr",), after)
    return [
        (NOT_SYN, *kept_one, to_old, ACCEPT),
        (SYN, *kept_one, to_old, _HAS_SOCKET, Write(SENT_TO_OLD[0], 0), ACCEPT),
        (SYN, is_old, Match((SENT_TO_OLD[0],), SENT_TO_OLD[1]), RESET),
        (SYN, is_old, Write(f"{ip} daddr", before), Add(inbound, ended[1:]), ACCEPT),
    ], [(NOT_SYN, Match(outbound, kept), TO_WIRE, Write(f"{ip} saddr", before), ACCEPT)]


def _names(move_id: str, translation: Translation) -> tuple[str, str, str]:
    """nft's word for the IP version, and how the sets of kept and of ended tuples are asked."""
    number = translation.number
    ip = IP[translation.map.old.version]
    return ip, f"@{kept_set(move_id, number)}", f"@{ended_set(move_id, number)}"


def _keys(translation: Translation) -> tuple[tuple[str, ...], tuple[str, ...]]:
    version = translation.map.old.version
    return inbound_key(version), outbound_key(version)
