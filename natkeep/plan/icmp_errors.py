"""the quoted packets: rules that translate what an ICMP error quotes, for stateless mode.

Rule: values only; kernel/nft_messages.py packs them. nft's text cannot say these rules: it writes
into the quoted header without mending ICMP's checksum, while the kernel's payload expression
mends any 16-bit sum that it is told of (CSUM_TYPE, CSUM_OFFSET).

Why they are needed: path MTU discovery lives on these errors. A router on the peer's side quotes
what it saw, and sends it to the address it saw; no socket at the destination knows that packet.

    a router tells the process            arriving:  to BEFORE, quotes BEFORE > peer
                                                     becomes to AFTER, quotes AFTER > peer
    a router inside tells the peer        departing: to the peer, quotes peer > AFTER
                                                     becomes quotes peer > BEFORE

Only a quoted TCP segment of a kept connection matches, or of a caller of a listener that moved,
and of IPv4 only one without IP options, which is all that TCP sends. The quoted IPv4 header's
own checksum is left as it is: receivers look at ICMP's, which covers it.
"""

from __future__ import annotations

from natkeep.plan import listeners
from natkeep.plan.base_chains import DIRECTIONS, ERRORS, address_chain, ended_set, kept_set
from natkeep.plan.listeners import Reception
from natkeep.plan.move import Mode
from natkeep.plan.nft import Octets, OctetsIn, Protocol, Rule, Statement, WriteOctets
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address

_ICMP = {4: 1, 6: 58}
_TCP = 6
_QUOTE = 8  # octets of ICMP's header, of either version
_CHECKSUM = 2  # offset of ICMP's checksum, of either version
_HEADER = {4: 20, 6: 40}
_SOURCE, _DESTINATION, _NEXT = {4: 12, 6: 8}, {4: 16, 6: 24}, {4: 9, 6: 6}
_IPV4_NO_OPTIONS = 0x45


_NETWORK, _TRANSPORT = 1, 2
"""What an offset is counted from (enum nft_payload_bases)."""


def make_error_rules(move_id: str, translation: Translation) -> tuple[Rule, ...]:
    """The two rules of a stateless translation; none for a stateful one, which needs none."""
    if translation.mode != Mode.STATELESS:
        return ()
    return _make_pair(
        move_id,
        translation.before,
        translation.after,
        _lives(move_id, translation, peer=_DESTINATION, peer_port=2, local_port=0),
        _lives(move_id, translation, peer=_SOURCE, peer_port=0, local_port=2),
    )


def make_callers_error_rules(move_id: str, receiving: Reception) -> tuple[Rule, ...]:
    """The same for the connections of callers, which are known by the listener's port alone."""
    ports = _QUOTE + _HEADER[receiving.before.version]
    name = listeners.listen_set(move_id, receiving.number)
    return _make_pair(
        listeners.comment(move_id),
        receiving.before,
        receiving.after,
        (OctetsIn(name, ((ports, 2),)),),
        (OctetsIn(name, ((ports + 2, 2),)),),
    )


def _make_pair(
    comment: str,
    before: Address,
    after: Address,
    from_local: tuple[OctetsIn, ...],
    to_local: tuple[OctetsIn, ...],
) -> tuple[Rule, Rule]:
    """from_local, to_local: the sets have the quoted segment, which went from, to the local end."""
    version = before.version
    inbound, _ = DIRECTIONS[Mode.STATELESS]
    arriving = (
        *_quotes_tcp(version),
        Octets(_TRANSPORT, _QUOTE + _SOURCE[version], before.packed),
        *from_local,
        _store_quoted(_SOURCE, after),
        _store_destination(after),
    )
    departing = (
        *_quotes_tcp(version),
        Octets(_TRANSPORT, _QUOTE + _DESTINATION[version], after.packed),
        *to_local,
        _store_quoted(_DESTINATION, before),
    )
    return (
        Rule(address_chain(inbound, before), arriving, comment, insert=True),
        Rule(ERRORS, departing, comment, insert=True),
    )


def _quotes_tcp(version: int) -> tuple[Statement, ...]:
    quoted = Octets(_TRANSPORT, _QUOTE + _NEXT[version], bytes((_TCP,)))
    if version == 6:
        return (Protocol(_ICMP[6]), quoted)
    plain = Octets(_TRANSPORT, _QUOTE, bytes((_IPV4_NO_OPTIONS,)))
    return (Protocol(_ICMP[4]), plain, quoted)


def _lives(
    move_id: str, translation: Translation, *, peer: dict[int, int], peer_port: int, local_port: int
) -> tuple[OctetsIn, OctetsIn]:
    """What is quoted is of a kept connection that has not ended."""
    version, number = translation.map.old.version, translation.number
    key = _key(version, peer=peer, peer_port=peer_port, local_port=local_port)
    kept, ended = kept_set(move_id, number), ended_set(move_id, number)
    return OctetsIn(kept, key), OctetsIn(ended, key, equal=False)


def _key(
    version: int, *, peer: dict[int, int], peer_port: int, local_port: int
) -> tuple[tuple[int, int], ...]:
    """Where in the error the parts of the set's key stand: `peer . peer port . local port`."""
    ports = _QUOTE + _HEADER[version]
    width = 4 if version == 4 else 16
    return (_QUOTE + peer[version], width), (ports + peer_port, 2), (ports + local_port, 2)


def _store_quoted(field: dict[int, int], address: Address) -> WriteOctets:
    offset = _QUOTE + field[address.version]
    return WriteOctets(_TRANSPORT, offset, address.packed, checksum=_CHECKSUM)


def _store_destination(address: Address) -> WriteOctets:
    """The error's own destination; IPv4 has a header checksum, IPv6 is in ICMP's."""
    offset = _DESTINATION[address.version]
    if address.version == 4:
        return WriteOctets(_NETWORK, offset, address.packed, checksum=10)
    return WriteOctets(_NETWORK, offset, address.packed, checksum=None, pseudo=True)
