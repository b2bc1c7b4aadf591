"""the nft text: what a site's table looks like, and the lines that add a move to it.

Rule: every line is rendered from typed values (an id that `parse_id` accepted, `ipaddress`
objects, integers), never from a free string, so nothing can be smuggled into the grammar.
One command a line and never a nested block, since nft 1.0.6 stumbles over `}` before `chain`.
This file must never run anything.

Theory of operation. A site has one table `inet natkeep`, shared by all moves.

    prerouting   -350  gate      local address ─► gate-at-ADDRESS ─► (kept?) ─► gate-ID: drop
    prerouting   -120  inbound   local address ─► in-at-ADDRESS   ─► (kept?) ─► dnat
    postrouting    80  outbound  local address ─► out-at-ADDRESS  ─► (kept?) ─► snat
    postrouting   350  leaving   a source that is still OLD is dropped, not leaked

- Base chains hold verdict maps on the local address only, so other people's packets leave
  after one lookup, and a packet costs the same with 1 move or 1,000.
- `kept-ID-N` is the one set of connections of the move's map N, `peer . peer port . local
  port`, with its size given: all three chains ask it, and nothing else depends on how many
  connections there are.
- `gate-ID` holds a drop. Opening inserts an accept in front of it: one rule, add-only
  (a deletion would make the closing of the netlink socket wait for an RCU grace period).
- Rules in the shared `…-at-ADDRESS` chains carry the id as comment; that is how they are found
  again without a journal.
- The mark 0xC114 is CRIU's (SOCCR_MARK): it restores half-closed sockets with segments of its
  own, through lo. They pass the gate and are not tracked, or conntrack would know the
  connection the wrong way round.
- Translations are 20 before dstnat and srcnat: at an equal priority the chain that was
  registered last would win.
- Ports are explicit (`dnat to OLD : tcp dport`): with a range of one port the kernel does not
  choose another on a clash; the packet is dropped, which TCP repairs.
- A bare SYN is never translated: a kept tuple does not open a new path.
"""

from __future__ import annotations

from collections.abc import Iterable

from natkeep.plan.move import Role, Translation
from natkeep.plan.tuples import Address

TABLE = "natkeep"
CRIU_MARK = 0xC114
FAMILIES = (4, 6)

_IP = {4: "ip", 6: "ip6"}
_TYPE = {4: "ipv4_addr", 6: "ipv6_addr"}
_NOT_SYN = "tcp flags & (fin | syn | rst | ack) != syn"

GATE, INBOUND, OUTBOUND = "gate", "in", "out"
DISPATCHES = (GATE, INBOUND, OUTBOUND)

OPEN = "open"
"""Comment of the rule that opens a gate."""


def kept_set(move_id: str, number: int) -> str:
    """Name of the set of kept connections of the move's map *number*."""
    return f"kept-{move_id}-{number}"


def gate_chain(move_id: str) -> str:
    """Name of the chain that holds the move's drop, and its accept once it is open."""
    return f"gate-{move_id}"


def address_chain(dispatch: str, address: Address) -> str:
    """Name of the chain that packets of one local address are sent to.

    An address has a dot or a colon and an id has neither, so this never equals a gate_chain.
    """
    return f"{dispatch}-at-{str(address).replace(':', '_')}"


def dispatch_map(dispatch: str, version: int) -> str:
    """Name of the verdict map from local address to address chain."""
    return f"{dispatch}{version}"


def held_set(version: int) -> str:
    """Name of the set of OLD addresses that the destination holds and must not leak."""
    return f"held{version}"


def render_static() -> tuple[str, ...]:
    """The table as it is before any move; `create` fails when it is there already."""
    lines = [f"create table inet {TABLE}"]
    for version in FAMILIES:
        for dispatch in DISPATCHES:
            name = dispatch_map(dispatch, version)
            lines.append(f"add map inet {TABLE} {name} {{ type {_TYPE[version]} : verdict; }}")
        lines.append(f"add set inet {TABLE} {held_set(version)} {{ type {_TYPE[version]}; }}")
    mark = f"meta mark {CRIU_MARK:#x}"
    lines += [
        _base_chain("gate", "filter", "prerouting", "-350"),
        f"add rule inet {TABLE} gate {mark} notrack accept",
        *_dispatches("gate", GATE, "daddr"),
        _base_chain("injected", "filter", "output", "-350"),
        f"add rule inet {TABLE} injected {mark} notrack",
        _base_chain("inbound", "nat", "prerouting", "dstnat - 20"),
        *_dispatches("inbound", INBOUND, "daddr"),
        _base_chain("outbound", "nat", "postrouting", "srcnat - 20"),
        *_dispatches("outbound", OUTBOUND, "saddr"),
        _base_chain("leaving", "filter", "postrouting", "350"),
        *(
            f'add rule inet {TABLE} leaving oifname != "lo" '
            f"{_IP[version]} saddr @{held_set(version)} drop"
            for version in FAMILIES
        ),
    ]
    return tuple(lines)


def _base_chain(name: str, type_: str, hook: str, priority: str) -> str:
    return f"add chain inet {TABLE} {name} {{ type {type_} hook {hook} priority {priority}; }}"


def _dispatches(chain: str, dispatch: str, field: str) -> tuple[str, ...]:
    return tuple(
        f"add rule inet {TABLE} {chain} "
        f"{_IP[version]} {field} vmap @{dispatch_map(dispatch, version)}"
        for version in FAMILIES
    )


def render_gate(move_id: str, translations: Iterable[Translation]) -> tuple[str, ...]:
    """The sets of kept connections (empty), the closed gate, and what keeps OLD silent.

    The gate is closed as soon as the sets have been filled, which happens before OLD is local
    and before anything translates. At the destination it is on both addresses: packets for
    NEW from the wire, and for OLD from a peer on the same host.
    """
    lines = [
        f"add chain inet {TABLE} {gate_chain(move_id)}",
        f"add rule inet {TABLE} {gate_chain(move_id)} drop",
    ]
    for translation in translations:
        lines += _render_kept_set(move_id, translation)
        lines += _render_dispatch(GATE, translation.before)
        lines.append(_render_gate_rule(move_id, translation, translation.before))
        if translation.site.role == Role.DESTINATION:
            lines += _render_dispatch(GATE, translation.after)
            lines.append(_render_gate_rule(move_id, translation, translation.after))
            lines += _render_silence(translation.map.old)
    return tuple(lines)


def _render_kept_set(move_id: str, translation: Translation) -> list[str]:
    # A set with a size is a hash of that size from the start; without, it grows while it is
    # filled, at three times the cost.
    return [
        f"add set inet {TABLE} {kept_set(move_id, translation.number)} "
        f"{{ type {_TYPE[translation.map.old.version]} . inet_service . inet_service; "
        f"size {len(translation.kept)}; }}"
    ]


def _render_dispatch(dispatch: str, address: Address) -> list[str]:
    chain = address_chain(dispatch, address)
    name = dispatch_map(dispatch, address.version)
    return [
        f"add chain inet {TABLE} {chain}",
        f"add element inet {TABLE} {name} {{ {address} : jump {chain} }}",
    ]


def _render_gate_rule(move_id: str, translation: Translation, address: Address) -> str:
    return (
        f"add rule inet {TABLE} {address_chain(GATE, address)} "
        f"{_inbound_key(address)} @{kept_set(move_id, translation.number)} "
        f'jump {gate_chain(move_id)} comment "{move_id}"'
    )


def _inbound_key(address: Address) -> str:
    return f"{_IP[address.version]} saddr . tcp sport . tcp dport"


def _outbound_key(address: Address) -> str:
    return f"{_IP[address.version]} daddr . tcp dport . tcp sport"


def _render_silence(old: Address) -> list[str]:
    """OLD neither leaves this host as a source nor is spoken of in ARP.

    A /32 on lo would still be answered for (arp_ignore 0) and announced (arp_announce 0 and
    1). IPv6 on lo is not answered for by neighbour discovery.
    """
    lines = [f"add element inet {TABLE} {held_set(old.version)} {{ {old} }}"]
    if old.version == 4:
        lines.append(f"add element arp {TABLE} silent {{ {old} }}")
    return lines


def render_arp_static() -> tuple[str, ...]:
    """The ARP half of a destination's table; `create` fails when it is there already."""
    return (
        f"create table arp {TABLE}",
        f"add set arp {TABLE} silent {{ type ipv4_addr; }}",
        f"add chain arp {TABLE} asked {{ type filter hook input priority 0; }}",
        f"add rule arp {TABLE} asked arp daddr ip @silent drop",
        f"add chain arp {TABLE} asking {{ type filter hook output priority 0; }}",
        f"add rule arp {TABLE} asking arp saddr ip @silent drop",
    )


def render_translation(move_id: str, translations: Iterable[Translation]) -> tuple[str, ...]:
    """The rules that translate, live as soon as they are loaded.

    A nat expression is what makes the kernel track connections in this namespace, so from
    here on un-translated entries can appear: they are purged by the step after this one.
    """
    lines: list[str] = []
    for translation in translations:
        before, after = translation.before, translation.after
        kept = kept_set(move_id, translation.number)
        family = _IP[before.version]
        lines += _render_dispatch(INBOUND, before)
        lines.append(
            f"add rule inet {TABLE} {address_chain(INBOUND, before)} "
            f"{_inbound_key(before)} @{kept} {_NOT_SYN} "
            f'dnat {family} to {after} : tcp dport comment "{move_id}"'
        )
        lines += _render_dispatch(OUTBOUND, after)
        lines.append(
            f"add rule inet {TABLE} {address_chain(OUTBOUND, after)} "
            f"{_outbound_key(after)} @{kept} {_NOT_SYN} "
            f'snat {family} to {before} : tcp sport comment "{move_id}"'
        )
    return tuple(lines)


def render_open(move_id: str, role: Role) -> tuple[str, ...]:
    """Let the kept connections through: one rule, whatever their number.

    At the destination a bare SYN stays refused: there it would reach a listener.
    """
    guard = f"{_NOT_SYN} " if role == Role.DESTINATION else ""
    return (f'insert rule inet {TABLE} {gate_chain(move_id)} {guard}accept comment "{OPEN}"',)


def render_withdrawal(
    dispatch: str, address: Address, handles: Iterable[int], *, last: bool
) -> tuple[str, ...]:
    """Take a move's rules, known by their handles, out of an address chain.

    last: the chain is empty then, so it goes as well, its dispatch before it.
    """
    chain = address_chain(dispatch, address)
    lines = [f"delete rule inet {TABLE} {chain} handle {handle}" for handle in handles]
    if last:
        name = dispatch_map(dispatch, address.version)
        lines.append(f"delete element inet {TABLE} {name} {{ {address} }}")
        lines.append(f"delete chain inet {TABLE} {chain}")
    return tuple(lines)


def render_gate_removal(move_id: str, numbers: Iterable[int]) -> tuple[str, ...]:
    """Remove the move's gate chain and sets, once no address chain refers to them."""
    return (
        f"delete chain inet {TABLE} {gate_chain(move_id)}",
        *(f"delete set inet {TABLE} {kept_set(move_id, number)}" for number in numbers),
    )


def render_speech(old: Address) -> tuple[str, ...]:
    """The reverse of what keeps OLD silent."""
    lines = [f"delete element inet {TABLE} {held_set(old.version)} {{ {old} }}"]
    if old.version == 4:
        lines.append(f"delete element arp {TABLE} silent {{ {old} }}")
    return tuple(lines)


def render_removal() -> tuple[str, ...]:
    """Remove both tables, whether they are there or not (`destroy` needs a newer nft)."""
    return tuple(
        f"{verb} table {family} {TABLE}" for family in ("inet", "arp") for verb in ("add", "delete")
    )
