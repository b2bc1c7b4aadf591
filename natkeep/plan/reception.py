"""the receptions: how new connections to OLD reach the listeners that moved (`--listeners`).

Rule: only a bare SYN to a listed port begins a new connection, and only those ports are let
through; what belongs to it afterwards is conntrack's (stateful) or goes by port (stateless).
This file must never touch the kernel.

    prerouting -350  gate      … SYN to a listed port ─► callers-ID: drop, until the move is opened
    then as the mode translates: inbound BEFORE becomes AFTER, outbound the reverse

At the destination NEW:port then means the moved listener, so nobody else may listen there:
kernel/linux.py looks before it is prepared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from natkeep.plan import ruleset
from natkeep.plan.move import Map, Mode, Move, Role, Site
from natkeep.plan.ruleset import TABLE
from natkeep.plan.tuples import Address

_IP = {4: "ip", 6: "ip6"}
_SYN = "tcp flags & (fin | syn | rst | ack) == syn"


@dataclass(frozen=True, slots=True)
class Reception:
    """At *site*, new connections to *ports* of OLD are translated as the kept ones are.

    number: part of the set's name; that of the map within the move.
    """

    site: Site
    number: int
    map: Map
    mode: Mode
    ports: tuple[int, ...]

    @property
    def before(self) -> Address:
        """Where a caller's packet is addressed when it reaches the site."""
        return self.map.new if self.site.role == Role.DESTINATION else self.map.old

    @property
    def after(self) -> Address:
        """Where a caller's packet is addressed when it leaves the site."""
        return self.map.old if self.site.role == Role.DESTINATION else self.map.new


def make_receptions(move: Move, site: Site) -> tuple[Reception, ...]:
    """The receptions of *move* at *site*: one for each map that has listeners."""
    receptions = []
    for number, map_ in enumerate(move.maps):
        ports = sorted({end.port for end in move.listeners if end.address == map_.old})
        if ports and site.role in (Role.DESTINATION, Role.GATEWAY):
            receptions.append(Reception(site, number, map_, move.mode, tuple(ports)))
    return tuple(receptions)


def comment(move_id: str) -> str:
    """Comment of the rules in shared chains; another than that of the kept connections' rules."""
    return f"{move_id}:listeners"


def listen_set(move_id: str, number: int) -> str:
    """Name of the set of ports that the moved process listens on."""
    return f"listen-{move_id}-{number}"


def callers_chain(move_id: str) -> str:
    """Name of the chain that holds callers back until the listeners are there."""
    return f"callers-{move_id}"


def render(move_id: str, receptions: Iterable[Reception]) -> tuple[str, ...]:
    """Everything of the receptions, callers held back."""
    callers = callers_chain(move_id)
    lines = [f"add chain inet {TABLE} {callers}", f"add rule inet {TABLE} {callers} drop"]
    for reception in receptions:
        name = listen_set(move_id, reception.number)
        ports = ", ".join(str(port) for port in reception.ports)
        lines.append(f"add set inet {TABLE} {name} {{ type inet_service; }}")
        lines.append(f"add element inet {TABLE} {name} {{ {ports} }}")
        lines += _render_rules(move_id, reception)
        if reception.site.role == Role.DESTINATION:
            lines += ruleset.render_silence(reception.map.old)
    return tuple(lines)


def _render_rules(move_id: str, reception: Reception) -> Iterator[str]:
    before, after = reception.before, reception.after
    family = _IP[before.version]
    ports = f"@{listen_set(move_id, reception.number)}"
    inbound, outbound = ruleset.DISPATCHES[reception.mode]
    at_destination = reception.site.role == Role.DESTINATION
    from_wire = 'iifname != "lo" ' if at_destination else ""
    to_wire = 'oifname != "lo" ' if at_destination else ""
    yield from _rule(
        ruleset.GATE, before, f"{_SYN} tcp dport {ports} jump {callers_chain(move_id)}", move_id
    )
    if reception.mode == Mode.STATEFUL:
        arriving = f"{_SYN} tcp dport {ports} {from_wire}dnat {family} to {after} : tcp dport"
        yield from _rule(inbound, before, arriving, move_id)
        return
    arriving = f"tcp dport {ports} {from_wire}{family} daddr set {after}"
    yield from _rule(inbound, before, arriving, move_id)
    departing = f"tcp sport {ports} {to_wire}{family} saddr set {before}"
    yield from _rule(outbound, after, departing, move_id)


def _rule(dispatch: str, address: Address, text: str, move_id: str) -> Iterator[str]:
    yield from ruleset.render_dispatch(dispatch, address)
    # Behind the kept connections' rules, which come first because they are inserted.
    chain = ruleset.address_chain(dispatch, address)
    yield f'add rule inet {TABLE} {chain} {text} comment "{comment(move_id)}"'


def render_open(move_id: str) -> str:
    """Let callers through."""
    chain = callers_chain(move_id)
    return f'insert rule inet {TABLE} {chain} accept comment "{ruleset.OPEN}"'


def chains(receptions: Iterable[Reception]) -> Iterator[tuple[str, Address]]:
    """Dispatch and address of every chain in which the receptions have a rule."""
    for reception in receptions:
        inbound, outbound = ruleset.DISPATCHES[reception.mode]
        yield ruleset.GATE, reception.before
        yield inbound, reception.before
        if reception.mode == Mode.STATELESS:
            yield outbound, reception.after


def render_removal(move_id: str, receptions: Iterable[Reception]) -> tuple[str, ...]:
    """The reverse of `render`, once no rule of an address chain refers to it."""
    return (
        f"delete chain inet {TABLE} {callers_chain(move_id)}",
        *(f"delete set inet {TABLE} {listen_set(move_id, r.number)}" for r in receptions),
    )
