"""the receptions: how new connections to OLD reach the listeners that moved (`--listeners`).

Rule: only a bare SYN to a listed port begins a new connection, and only those ports are let
through; what belongs to it afterwards is conntrack's (stateful) or goes by port (stateless).
This file must never touch the kernel.

    prerouting -350  gate      … SYN to a listed port ─► callers-ID: drop, until the move is opened
    then as the mode translates: inbound BEFORE becomes AFTER, outbound the reverse

- A caller's SYN is dropped, never refused, so it comes again and is let in once the gate is open.
- The gate's rule stands in front of those of the kept connections: a peer may call again from the
  port of a connection that has ended, which is a SYN of a kept tuple.
- A stateless rule asks for the address that it changes: what a kept connection's rule has turned
  into another OLD already is not turned once more.
- At the destination NEW:port then means the moved listener, so no other socket may listen there,
  and no other move may have one there: kernel/linux.py and lifecycle/ look beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count

from natkeep.errors import RefusedError
from natkeep.plan.arp import silence
from natkeep.plan.base_chains import (
    CAME,
    DIRECTIONS,
    FROM_WIRE,
    GATE,
    HALF_OPEN,
    OPEN,
    RST,
    SENT_TO_OLD,
    SYN,
    TO_WIRE,
    rule_at,
)
from natkeep.plan.maps import Map, find_map
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.nft import (
    ACCEPT,
    DROP,
    IP,
    Chain,
    Elements,
    Match,
    Nat,
    Object,
    Rule,
    Set,
    Statement,
    Write,
    jump,
)
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.tuples import Address, Endpoint
from natkeep.values import dataclass

SET_PREFIX = "listen-"
_WORDS = {
    TCP: ("listeners", "without --listeners new connections go on reaching the old host"),
    UDP: ("sockets of UDP", "--no-udp leaves those of this move out"),
}


@dataclass(frozen=True, slots=True)
class Reception:
    """At *site*, new connections to *ports* of OLD are translated as the kept ones are.

    A map of one port has that one alone, and on the wire to NEW its own.

    number: part of the set's name; that of the map within the move, and of UDP more than all maps'.
    protocol: of UDP all datagrams of these ports, from and to any peer (servers.py).
    """

    site: Site
    number: int
    map: Map
    mode: Mode
    ports: tuple[int, ...]
    protocol: Protocol = TCP

    @property
    def before(self) -> Address:
        """Where a caller's packet is addressed when it reaches the site."""
        return self.map.new if self.site.row.arrives == "new" else self.map.old

    @property
    def after(self) -> Address:
        """Where a caller's packet is addressed when it leaves the site."""
        return self.map.old if self.site.row.leaves == "old" else self.map.new

    def ports_at(self, address: Address) -> tuple[int, ...]:
        """The ports by which callers reach them at OLD, or at NEW."""
        new_port = self.map.new_port
        return self.ports if new_port is None or address == self.map.old else (new_port,)

    def ends(self) -> Iterator[Endpoint]:
        """Where they are reached, at OLD and at NEW."""
        for address in (self.map.old, self.map.new):
            yield from (Endpoint(address, port) for port in self.ports_at(address))

    @property
    def gated(self) -> tuple[Address, ...]:
        """Where a caller's packet may be addressed when the gate must hold it back.

        At the destination both: NEW from the wire, and OLD from a caller on the same host; nowhere
        at the peers' own host for UDP (filters.gated_addresses).
        """
        if self.site.row.own and self.protocol == UDP:
            return ()
        return (self.before, self.after) if self.site.row.puts_old else (self.before,)


def make_receptions(move: Move, site: Site) -> tuple[Reception, ...]:
    """The receptions of *move* at *site*: one for each map that has listeners, or sockets of UDP.

    At a source, which translates nothing, what UDP says and hears is held back.
    """
    receptions = []
    numbers = count()
    for protocol, all_ends in _ends(move).items():
        for map_, number in zip(move.maps, numbers, strict=False):
            ends = (end for end in all_ends if find_map(move.maps, end) is map_)
            ports = sorted({end.port for end in ends})
            if ports and (site.row.leaves or protocol == UDP):
                made = Reception(site, number, map_, move.mode, tuple(ports), protocol)
                receptions.append(made)
    return tuple(receptions)


def _ends(move: Move) -> dict[Protocol, tuple[Endpoint, ...]]:
    """What is called at OLD."""
    return {TCP: move.listeners, UDP: move.kept_servers}


def refuse_one_end_for_two(move: Move, *others: Move) -> None:
    """A port of OLD, or NEW, can be one listener's only, of all the moves that share a site."""
    taken = {end: other.id for other in others for end in _called_ends(other)}
    for called in _called_ends(move):
        if called in taken:
            protocol, end = called
            what, hint = _WORDS[protocol]
            moves = f"of moves {move.id} and {taken[called]}"
            raise RefusedError(f"{end} would stand for two {what}, {moves}", hint=hint)
        taken[called] = move.id


def _called_ends(move: Move) -> Iterator[tuple[Protocol, Endpoint]]:
    """OLD and port of each listener, NEW and port."""
    for protocol, ends in _ends(move).items():
        for end in ends:
            if (map_ := find_map(move.maps, end)) is not None:
                yield protocol, end
                yield protocol, map_.on_wire(end)


def comment(move_id: str) -> str:
    """Comment of the rules in shared chains; another than that of the kept connections' rules."""
    return f"{move_id}:listeners"


def listen_set(move_id: str, number: int) -> str:
    """Name of the set of ports that the moved process listens on."""
    return f"{SET_PREFIX}{move_id}-{number}"


def callers_chain(move_id: str) -> str:
    """Name of the chain that holds callers back until the listeners are there."""
    return f"callers-{move_id}"


def objects(
    move_id: str, receptions: Iterable[Reception], home: frozenset[Address] = frozenset()
) -> tuple[Object, ...]:
    """Everything of the receptions, callers held back; home: as in filters.gate."""
    callers = callers_chain(move_id)
    found: list[Object] = [Chain(callers), Rule(callers, (DROP,))]
    for reception in receptions:
        name = listen_set(move_id, reception.number)
        found += [Set(name, ("inet_service",)), Elements(name, reception.ports)]
        found += _gate(move_id, reception)
        if reception.protocol == TCP:
            found += _translation(move_id, reception)
        if reception.site.row.puts_old:
            found += [_answers(move_id, reception)] if reception.protocol == TCP else []
            old = reception.map.old
            found += silence(old) if old not in home else ()
    return tuple(found)


def _gate(move_id: str, reception: Reception) -> Iterator[Object]:
    row, protocol = reception.site.row, reception.protocol
    begins: tuple[Statement, ...] = (SYN,) if protocol == TCP else ()
    if protocol == UDP and row.passes_on:
        begins = (CAME,)
    for address in reception.gated:
        to_port = port_at(move_id, reception, address, protocol.dport)
        statements = (*begins, to_port, jump(callers_chain(move_id)))
        yield from rule_at(GATE, address, statements, comment(move_id))
        if row.mutes:
            from_port = port_at(move_id, reception, address, protocol.sport)
            statements = (from_port, jump(callers_chain(move_id)))
            yield from rule_at("mute", address, statements, comment(move_id))


def port_at(move_id: str, reception: Reception, address: Address, field: str) -> Match:
    """A packet to, or from, one of the listeners, addressed as it is at *address*."""
    ports: tuple[int, ...] = reception.ports_at(address)
    if ports != reception.ports:
        return Match((field,), ports[0])
    return Match((field,), f"@{listen_set(move_id, reception.number)}")


def _translation(move_id: str, reception: Reception) -> Iterator[Object]:
    before, after = reception.before, reception.after
    ip = IP[before.version]
    inbound, outbound = DIRECTIONS[reception.mode]
    by_wire = reception.site.row.puts_old
    from_wire, to_wire = ((FROM_WIRE,), (TO_WIRE,)) if by_wire else ((), ())
    to_port = port_at(move_id, reception, before, TCP.dport)
    from_port = port_at(move_id, reception, after, TCP.sport)
    mine = comment(move_id)
    if reception.mode == Mode.STATEFUL:
        turned = reception.ports_at(before) != reception.ports_at(after)
        port = reception.ports_at(after)[0] if turned else TCP.dport
        arriving = (SYN, to_port, *from_wire, Nat("dnat", after, port))
        yield from rule_at(inbound, before, arriving, mine)
        return
    to_before, from_after = Match((f"{ip} daddr",), before), Match((f"{ip} saddr",), after)
    # An accept ends the base chain: the kept connections' rules would have the SYN of a tuple that
    # was kept go to the process that had it.
    inward = (to_port, *from_wire, Write(f"{ip} daddr", after), ACCEPT)
    yield from rule_at(inbound, before, (to_before, *inward), mine)
    if not by_wire:  # a reset may be of a kept tuple: the destination looks for the mark
        reset = (to_before, RST, Write(*SENT_TO_OLD), *inward)
        yield from rule_at(inbound, before, reset, mine)
    outward = (from_after, from_port, *to_wire, Write(f"{ip} saddr", before), ACCEPT)
    yield from rule_at(outbound, after, outward, mine)


def _answers(move_id: str, reception: Reception) -> Rule:
    """What listeners answer is let out, also to a caller from the port of a kept connection."""
    old = reception.map.old
    from_old = Match((f"{IP[old.version]} saddr",), old)
    from_port = port_at(move_id, reception, old, TCP.sport)
    return Rule(HALF_OPEN, (from_old, from_port, ACCEPT), comment(move_id), insert=True)


def opening(move_id: str) -> Rule:
    """Let callers through."""
    return Rule(callers_chain(move_id), (ACCEPT,), OPEN, insert=True)


def describe_forgetting(reception: Reception) -> Iterator[str]:
    """The deletion of calls that were never answered, as conntrack(8) commands; of UDP all."""
    if reception.protocol == UDP:
        for end in reception.ends():
            for way, back in (("orig", "dst"), ("orig", "src"), ("reply", "dst"), ("reply", "src")):
                at = f"--{way}-{back} {end.address} --{way}-port-{back} {end.port}"
                yield f"conntrack -D -p {UDP.name} {at}"
        return
    for port in reception.ports_at(reception.before):
        yield (
            f"conntrack -D -p {TCP.name} --orig-dst {reception.before} --orig-port-dst {port} "
            "--state SYN_SENT"
        )
