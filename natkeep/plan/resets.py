"""the resets: how both ends of a connection that cannot be kept are told so (`--unkept reset`).

Rule: exact tuples of the image only, whose local address is an OLD; never NEW, where another
process may have the very same tuple. Nobody is told before the move is opened: until then the
process can be restored where it was, and its connections with it.
This file must never touch the kernel.

    gateway, source   prerouting -360  refusing   OLD ─► refuse-at-OLD ─► (unkept?) ─► reset-ID
    destination       output     -360  answering  OLD ─► answer-at-OLD ─► (unkept?) ─► reset-ID

- `reset-ID` holds a drop. Opening puts `reject with tcp reset` in front of it: then whatever an
  end says is answered by a reset that is in sequence, because it is made from that very segment
  (RFC 9293, 3.5.2: its sequence number is the segment's acknowledgement number).
- Who says nothing is asked: a bare acknowledgement that fits no window makes an end state what it
  expects (RFC 9293, 3.10.7.4), which is again a segment to answer. kernel/tcp_probe.py sends it,
  with CRIU's mark, so that it is neither held back nor tracked.
- A tuple may live again: a peer dials anew from the same port. Its SYN (at the destination the
  listener's SYN-ACK) puts the tuple into `again-ID-N`, and it is left alone from then on.
- The chains are in front of the gate and of listeners' rules, which could let such a SYN pass
  unseen; the sets hold no kept connection, so a kept one is never answered.

Who is told depends on where a segment passes: peers on a wire at the gateway, all at the source,
the process at the destination. Not told is who lives on: a connection whose other end moves along
(both are in the image), or is at the destination already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natkeep.plan import ruleset
from natkeep.plan.move import Fate, Move, Role, Site
from natkeep.plan.ruleset import FAMILIES, TABLE
from natkeep.plan.translation import Surroundings, Unkept
from natkeep.plan.tuples import Address, Connections, FourTuple
from natkeep.values import dataclass

SET_PREFIX = "reset-"
_TYPE = {4: "ipv4_addr", 6: "ipv6_addr"}
_FLAGS = "tcp flags & (fin | syn | rst | ack)"
_BASE_CHAINS = {
    "refuse": ("refusing", "prerouting", "daddr"),
    "answer": ("answering", "output", "saddr"),
}


@dataclass(frozen=True, slots=True)
class Reset:
    """At *site*, what one end of these connections says is answered with a reset.

    The end is the process at the destination, and the peer elsewhere. number: that of the map
    within the move; connections: from the peer to the process, all with *old*, its OLD.
    """

    site: Site
    number: int
    old: Address
    connections: Connections

    @property
    def dispatch(self) -> str:
        """Which way the segments go that are answered."""
        return "answer" if self.site.role == Role.DESTINATION else "refuse"

    @property
    def chain(self) -> tuple[str, Address]:
        """Dispatch and address of the chain in which its rules are."""
        return self.dispatch, self.old


def make_resets(
    move: Move, unkept: Iterable[Unkept], connections: Connections, surroundings: Surroundings
) -> tuple[Reset, ...]:
    """What of *unkept*, and of what the image has besides (`move.lost`), is told, and where."""
    if move.unkept != Fate.RESET:
        return ()
    lost = find_lost(move, unkept, connections, surroundings)
    resets = []
    for site in move.ordered_sites():
        for number, map_ in enumerate(move.maps):
            told = [
                inbound
                for inbound in lost
                if inbound.destination.address == map_.old and _passes(site, inbound, move)
            ]
            if told:
                resets.append(Reset(site, number, map_.old, Connections.of(told)))
    return tuple(resets)


def find_lost(
    move: Move, unkept: Iterable[Unkept], connections: Connections, surroundings: Surroundings
) -> tuple[FourTuple, ...]:
    """The connections that both ends are to be told of, from the peer to the process."""
    olds = {map_.old for map_ in move.maps}
    wanted = [entry.inbound for entry in unkept]
    wanted += [inbound for inbound in move.lost if inbound.destination.address in olds]
    if not wanted:
        return ()
    known, unkept_ones = frozenset(connections.each()), {entry.inbound for entry in unkept}
    found = []
    for inbound in dict.fromkeys(wanted):
        peer = inbound.source.address
        record, reverse = (b"".join(Connections.of([t]).each()) for t in (inbound, inbound.reply()))
        is_kept = record in known and inbound not in unkept_ones
        on_destination = peer in surroundings.local and not (peer in olds or peer.is_loopback)
        if not (is_kept or reverse in known or on_destination or _is_nowhere(peer)):
            found.append(inbound)
    return tuple(found)


def _is_nowhere(peer: Address) -> bool:
    """Nothing can be sent there: an answer would have no route, or no one receiver."""
    return peer.is_link_local or peer.is_unspecified or peer.is_multicast


def _passes(site: Site, inbound: FourTuple, move: Move) -> bool:
    """Whether a segment of the connection is seen at *site*; at a gateway, if a wire has it."""
    peer = inbound.source.address
    on_source_host = peer.is_loopback or any(peer == map_.old for map_ in move.maps)
    return site.role != Role.GATEWAY or not on_source_host


NOT_TOLD = "cannot be reset: no site of this move meets it, or its other end lives on"


def describe_fates(resets: Iterable[Reset]) -> dict[FourTuple, str]:
    """Who of each connection's two ends is told, for a person; NOT_TOLD of all others."""
    told: dict[FourTuple, set[bool]] = {}
    for reset in resets:
        for inbound in reset.connections:
            told.setdefault(inbound, set()).add(reset.site.role == Role.DESTINATION)
    words = {
        frozenset({True, False}): "reset, both ends",
        frozenset({True}): "reset, the process; its peer is met at no site of this move",
        frozenset({False}): "reset, its peer; the process is met at no site of this move",
    }
    return {inbound: words[frozenset(ends)] for inbound, ends in told.items()}


# ---- the text ----------------------------------------------------------------------------------


def reset_set(move_id: str, number: int) -> str:
    """Name of the set of connections of the move's map *number* that cannot be kept."""
    return f"{SET_PREFIX}{move_id}-{number}"


def again_set(move_id: str, number: int) -> str:
    """Name of the set of those of them whose tuple lives again."""
    return f"again-{move_id}-{number}"


def again_of(name: str) -> str:
    """The again_set that belongs to the reset_set *name*."""
    return f"again-{name.removeprefix(SET_PREFIX)}"


def reset_chain(move_id: str) -> str:
    """Name of the chain that drops, and resets once the move is open."""
    return f"{SET_PREFIX}{move_id}"


def comment(move_id: str) -> str:
    """Comment of the rules in shared chains; another than that of the kept connections' rules."""
    return f"{move_id}:unkept"


def base_chain_of(dispatch: str) -> str:
    """The chain by whose presence one knows that render_static has been loaded."""
    return _BASE_CHAINS[dispatch][0]


def render_static(dispatch: str) -> tuple[str, ...]:
    """What a table has besides once something is reset at its site."""
    chain, hook, field = _BASE_CHAINS[dispatch]
    return (
        *ruleset.render_dispatch_maps(dispatch),
        f"add chain inet {TABLE} {chain} {{ type filter hook {hook} priority -360; }}",
        *(
            f"add rule inet {TABLE} {chain} "
            f"{ruleset.IP[version]} {field} vmap @{ruleset.dispatch_map(dispatch, version)}"
            for version in FAMILIES
        ),
    )


def render(move_id: str, resets: Iterable[Reset]) -> tuple[str, ...]:
    """The sets (empty), the chain that drops, and the rules that lead there."""
    chain = reset_chain(move_id)
    lines = [f"add chain inet {TABLE} {chain}", f"add rule inet {TABLE} {chain} drop"]
    for reset in resets:
        lines += _render_one(move_id, reset)
        if reset.site.role == Role.DESTINATION:
            lines += ruleset.render_silence(reset.old)
    return tuple(lines)


def _render_one(move_id: str, reset: Reset) -> Iterator[str]:
    family, outbound = ruleset.IP[reset.old.version], reset.dispatch == "answer"
    key = f"{family} saddr . tcp sport . tcp dport"
    begins = f"{_FLAGS} == syn"
    if outbound:
        key = f"{family} daddr . tcp dport . tcp sport"
        begins = f"{_FLAGS} == syn | ack"
    lost, again = reset_set(move_id, reset.number), again_set(move_id, reset.number)
    form = (
        f"type {_TYPE[reset.old.version]} . inet_service . inet_service; "
        f"size {len(reset.connections)};"
    )
    yield f"add set inet {TABLE} {lost} {{ {form} }}"
    yield f"add set inet {TABLE} {again} {{ {form} flags dynamic; }}"
    yield from ruleset.render_dispatch(reset.dispatch, reset.old)
    rule = f"insert rule inet {TABLE} {ruleset.address_chain(*reset.chain)}"
    mine = f'comment "{comment(move_id)}"'
    # Each in front of the one before: who begins anew, who began anew, all others.
    yield f"{rule} {key} @{lost} jump {reset_chain(move_id)} {mine}"
    yield f"{rule} {key} @{again} return {mine}"
    yield f"{rule} {begins} {key} @{lost} add @{again} {{ {key} }} return {mine}"


def render_open(move_id: str) -> str:
    """Answer from now on."""
    return (
        f"insert rule inet {TABLE} {reset_chain(move_id)} meta l4proto tcp "
        f'reject with tcp reset comment "{ruleset.OPEN}"'
    )


def render_removal(move_id: str, resets: Iterable[Reset]) -> tuple[str, ...]:
    """The reverse of `render`, once no rule of an address chain refers to it."""
    names = [make(move_id, reset.number) for reset in resets for make in (reset_set, again_set)]
    return (
        f"delete chain inet {TABLE} {reset_chain(move_id)}",
        *(f"delete set inet {TABLE} {name}" for name in names),
    )
