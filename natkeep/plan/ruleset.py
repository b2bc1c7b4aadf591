"""the nft text: what a site's table looks like, and the lines that add a move to it.

Rule: every line is rendered from typed values (an id that `parse_id` accepted, `ipaddress`
objects, integers), never from a free string, so nothing can be smuggled into the grammar.
One command a line and never a nested block, since nft 1.0.6 stumbles over `}` before `chain`.
This file must never run anything.

Theory of operation. A site has one table `inet natkeep`, shared by all moves.

    prerouting   -350  gate      local address ─► gate-at-ADDRESS ─► (kept?) ─► gate-ID: drop
    stateful:
    prerouting   -120  inbound   local address ─► in-at-ADDRESS   ─► (kept?) ─► dnat
    postrouting    80  outbound  local address ─► out-at-ADDRESS  ─► (kept?) ─► snat
    stateless:
    prerouting   -300  arriving  local address ─► set-at-ADDRESS  ─► (kept?) ─► set daddr
    postrouting   300  departing local address ─► put-at-ADDRESS  ─► (kept?) ─► set saddr
    either:
    postrouting   350  leaving   a source that is still OLD is dropped, not leaked
    output       -350  injected  CRIU's own segments are not tracked; SYN-ACK ─► half-open

- Base chains hold verdict maps on the local address only, so other people's packets leave
  after one lookup, and a packet costs the same with 1 move or 1,000.
- `kept-ID-N` is the one set of connections of the move's translation N, `peer . peer port .
  local port`, with its size given: all chains ask it, and nothing else depends on how many
  connections there are. Only where a gateway publishes another port, or masquerades the peer,
  do packets look different outside: then `outer-ID-N` is that side's set.
- `gate-ID` holds a drop. Opening inserts an accept in front of it: one rule, add-only
  (a deletion would make the closing of the netlink socket wait for an RCU grace period).
- Where no gate is closed any more, opening also inserts the *pass* in front of the base chain
  `gate`, so that nobody has to ask for marks, addresses and sets. What closes a gate takes it out
  first. Once the blackout is over the base chain goes altogether, since even one with a single
  rule costs every packet a thirtieth of its way; what closes a gate makes it anew.
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
- A bare SYN is never translated by a rule, and dropped at the destination, open or not: a kept
  tuple does not open a new path. While the connection's entry lives, conntrack does translate one;
  then what a listener at OLD answers is where it ends: a SYN-ACK of a kept tuple goes nowhere
  (chain `half-open`; only SYN-ACKs are sent there).
- What a peer on the destination itself sends goes through lo, and is not translated.
- What an ICMP error quotes is translated by conntrack in stateful mode, and by the raw rules of
  quoted.py in stateless mode: without, path MTU discovery would fail.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache

from natkeep.plan.criu_lock import CRIU_MARK
from natkeep.plan.move import Mode, Role
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, Connections

TABLE = "natkeep"
FAMILIES = (4, 6)

IP = {4: "ip", 6: "ip6"}
"""How nft calls an IP version."""
_TYPE = {4: "ipv4_addr", 6: "ipv6_addr"}
_NOT_SYN = "tcp flags & (fin | syn | rst | ack) != syn"
SYN = "tcp flags & (fin | syn | rst | ack) == syn"
"""A bare SYN: who begins a connection."""

_CRIUS_OWN = f"meta mark {CRIU_MARK:#x}"
_SYN_ACK = "tcp flags & (syn | ack) == syn | ack"

GATE = "gate"
INJECTED = "injected"
LEAVING = "leaving"
HALF_OPEN = "half-open"
"""Name of the chain that SYN-ACKs are sent to, at a destination."""
DISPATCHES = {Mode.STATEFUL: ("in", "out"), Mode.STATELESS: ("set", "put")}
"""Inbound and outbound dispatch of each mode; GATE is every mode's."""

_BASE_CHAINS = {
    "in": ("inbound", "nat", "prerouting", "dstnat - 20", "daddr"),
    "out": ("outbound", "nat", "postrouting", "srcnat - 20", "saddr"),
    "set": ("arriving", "filter", "prerouting", "-300", "daddr"),
    "put": ("departing", "filter", "postrouting", "300", "saddr"),
}

ERRORS = "errors"
"""Name of the chain for departing ICMP errors; the base chain sends nothing else there."""

OPEN = "open"
"""Comment of the rule that opens a gate."""

_DROPPING = ("gate-", "callers-")
"""How the names of chains begin that drop until they are opened."""

PASS = "gate:pass"
"""Comment of the rule that lets packets go by the gates; no move's id has a colon."""


def kept_set(move_id: str, number: int) -> str:
    """Name of the set of kept connections of the move's map *number*."""
    return f"kept-{move_id}-{number}"


def gate_chain(move_id: str) -> str:
    """Name of the chain that holds the move's drop, and its accept once it is open."""
    return f"gate-{move_id}"


@lru_cache(maxsize=1 << 12)  # a move asks for each of its few a dozen times
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


def outer_set(move_id: str, number: int) -> str:
    """Name of the set of the same connections as they look outside, where that differs."""
    return f"outer-{move_id}-{number}"


@cache
def render_static() -> tuple[str, ...]:
    """The table as it is before any move; `create` fails when it is there already."""
    return (
        f"create table inet {TABLE}",
        *(
            f"add set inet {TABLE} {held_set(version)} {{ type {_TYPE[version]}; }}"
            for version in FAMILIES
        ),
        *render_dispatch_maps(GATE),
        *render_hook(),
        _base_chain(INJECTED, "filter", "output", "-350"),
        f"add rule inet {TABLE} {INJECTED} {_CRIUS_OWN} notrack",
    )


@cache
def render_hook() -> tuple[str, ...]:
    """The base chain `gate`, by which packets get to the gates; it is there while one is closed."""
    return (
        _base_chain(GATE, "filter", "prerouting", "-350"),
        f"add rule inet {TABLE} {GATE} {_CRIUS_OWN} notrack accept",
        *_dispatches(GATE, GATE, "daddr"),
    )


def render_leaving() -> tuple[str, ...]:
    """What only a destination's table has besides: what must not leave it.

    A gateway has no OLD to leak, and no listener there; each packet would pay for it.
    """
    return (
        _base_chain(LEAVING, "filter", "postrouting", "350"),
        *(
            f"add rule inet {TABLE} {LEAVING} {IP[version]} saddr @{held_set(version)} "
            'oif != "lo" drop'
            for version in FAMILIES
        ),
        f"add chain inet {TABLE} {HALF_OPEN}",
        f"add rule inet {TABLE} {INJECTED} {_SYN_ACK} jump {HALF_OPEN}",
    )


def base_chain_of(mode: Mode) -> str:
    """The chain by whose presence one knows that render_mode has been loaded."""
    return _BASE_CHAINS[DISPATCHES[mode][0]][0]


@cache
def render_mode(mode: Mode) -> tuple[str, ...]:
    """The base chains of a mode, added by the first move that uses it.

    A gateway with stateless moves only has no nat chain: that would track everybody's
    connections.
    """
    lines: list[str] = []
    for dispatch in DISPATCHES[mode]:
        chain, type_, hook, priority, field = _BASE_CHAINS[dispatch]
        lines += render_dispatch_maps(dispatch)
        lines.append(_base_chain(chain, type_, hook, priority))
        lines += _dispatches(chain, dispatch, field)
    if mode == Mode.STATELESS:
        chain, *_ = _BASE_CHAINS[DISPATCHES[mode][1]]
        lines += [
            f"add chain inet {TABLE} {ERRORS}",
            # Nothing else may get there: it would ask a rule for each move.
            f"add rule inet {TABLE} {chain} meta l4proto {{ icmp, ipv6-icmp }} jump {ERRORS}",
        ]
    return tuple(lines)


def render_dispatch_maps(dispatch: str) -> tuple[str, ...]:
    """The verdict maps of a dispatch, one for each family."""
    return tuple(
        f"add map inet {TABLE} {dispatch_map(dispatch, version)} "
        f"{{ type {_TYPE[version]} : verdict; }}"
        for version in FAMILIES
    )


def _base_chain(name: str, type_: str, hook: str, priority: str) -> str:
    return f"add chain inet {TABLE} {name} {{ type {type_} hook {hook} priority {priority}; }}"


def _dispatches(chain: str, dispatch: str, field: str) -> tuple[str, ...]:
    return tuple(
        f"add rule inet {TABLE} {chain} "
        f"{IP[version]} {field} vmap @{dispatch_map(dispatch, version)}"
        for version in FAMILIES
    )


def render_gate(move_id: str, translations: Iterable[Translation]) -> tuple[str, ...]:
    """The sets of kept connections (empty), the closed gate, and what keeps OLD silent.

    The gate is closed as soon as the sets have been filled, which happens before OLD is local
    and before anything translates.
    """
    lines = [
        f"add chain inet {TABLE} {gate_chain(move_id)}",
        f"add rule inet {TABLE} {gate_chain(move_id)} drop",
    ]
    for translation in translations:
        for name in sets_of(move_id, translation):
            lines.append(render_set(name, translation))
        for local in gated_addresses(translation):
            lines += render_dispatch(GATE, local)
            lines.append(
                f"insert rule inet {TABLE} {address_chain(GATE, local)} "
                f"{inbound_key(local)} @{_outer_name(move_id, translation)} "
                f'jump {gate_chain(move_id)} comment "{move_id}"'
            )
        if translation.site.role == Role.DESTINATION:
            old, kept = translation.map.old, kept_set(move_id, translation.number)
            lines.append(
                f"add rule inet {TABLE} {HALF_OPEN} {IP[old.version]} saddr {old} "
                f'{outbound_key(old)} @{kept} drop comment "{move_id}"'
            )
            lines += render_silence(old)
    return tuple(lines)


def gated_addresses(translation: Translation) -> tuple[Address, ...]:
    """Where a peer's packet may be addressed when the gate must stop it.

    At the destination both: NEW from the wire, and OLD from a peer on the same host.
    """
    if translation.site.role == Role.DESTINATION:
        return (translation.before, translation.after)
    return (translation.before,)


def sets_of(move_id: str, translation: Translation) -> dict[str, Connections]:
    """The translation's sets by name, and what is in them."""
    sets = {kept_set(move_id, translation.number): translation.inner}
    if translation.renames:
        sets[outer_set(move_id, translation.number)] = translation.outer
    return sets


def _outer_name(move_id: str, translation: Translation) -> str:
    name = outer_set if translation.renames else kept_set
    return name(move_id, translation.number)


def render_set(name: str, translation: Translation, table: str = TABLE) -> str:
    """An empty set for the translation's connections."""
    # A set with a size is a hash of that size from the start; without, it grows while it is
    # filled, at three times the cost.
    return (
        f"add set inet {table} {name} "
        f"{{ type {_TYPE[translation.map.old.version]} . inet_service . inet_service; "
        f"size {len(translation.kept)}; }}"
    )


def render_dispatch(dispatch: str, address: Address) -> list[str]:
    """Send packets of *address* to its chain, which is made if there is none."""
    chain = address_chain(dispatch, address)
    name = dispatch_map(dispatch, address.version)
    return [
        f"add chain inet {TABLE} {chain}",
        f"add element inet {TABLE} {name} {{ {address} : jump {chain} }}",
    ]


def inbound_key(address: Address) -> str:
    """What a set is asked for of a packet to *address*: peer, its port, the local one."""
    return f"{IP[address.version]} saddr . tcp sport . tcp dport"


def outbound_key(address: Address) -> str:
    """The same of a packet from *address*."""
    return f"{IP[address.version]} daddr . tcp dport . tcp sport"


def render_silence(old: Address) -> list[str]:
    """OLD neither leaves this host as a source nor is spoken of in ARP.

    A /32 on lo would still be answered for (arp_ignore 0) and announced (arp_announce 0 and
    1). IPv6 on lo is not answered for by neighbour discovery.
    """
    lines = [f"add element inet {TABLE} {held_set(old.version)} {{ {old} }}"]
    if old.version == 4:
        lines.append(f"add element arp {TABLE} silent {{ {old} }}")
    return lines


@cache
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
        render = _render_nat if translation.mode == Mode.STATEFUL else _render_rewriting
        lines += render(move_id, translation)
    return tuple(lines)


def _render_nat(move_id: str, translation: Translation) -> list[str]:
    before, after = translation.before, translation.after
    family, inbound, outbound = IP[before.version], *DISPATCHES[Mode.STATEFUL]
    outer_port, inner_port = "tcp sport", "tcp dport"
    if translation.renames:
        outer_port, inner_port = (str(port) for port in translation.ports())
    return [
        *render_dispatch(inbound, before),
        *_render_syn_drop(move_id, translation, inbound),
        f"insert rule inet {TABLE} {address_chain(inbound, before)} {_NOT_SYN} "
        f"{inbound_key(before)} @{_outer_name(move_id, translation)} "
        f'{_from_wire(translation)}dnat {family} to {after} : {inner_port} comment "{move_id}"',
        *render_dispatch(outbound, after),
        f"insert rule inet {TABLE} {address_chain(outbound, after)} {_NOT_SYN} "
        f"{outbound_key(after)} @{kept_set(move_id, translation.number)} "
        f'{_to_wire(translation)}snat {family} to {before} : {outer_port} comment "{move_id}"',
        *_render_stray_drop(move_id, translation),
    ]


def _render_stray_drop(move_id: str, translation: Translation) -> list[str]:
    """At a gateway: what the old host still sends for a kept connection goes no further.

    It would be a new flow to conntrack, clash with our entry, and leave from another port, which
    the peer answers with a reset. Only first packets of a flow come by here, so it costs nobody.
    """
    if translation.site.role != Role.GATEWAY:
        return []
    old, (_, outbound) = translation.map.old, DISPATCHES[Mode.STATEFUL]
    return [
        *render_dispatch(outbound, old),
        f"insert rule inet {TABLE} {address_chain(outbound, old)} {outbound_key(old)} "
        f'@{kept_set(move_id, translation.number)} drop comment "{move_id}"',
    ]


def _render_syn_drop(move_id: str, translation: Translation, dispatch: str) -> list[str]:
    """At the destination: a bare SYN of a kept tuple that no entry translates ends here."""
    if translation.site.role != Role.DESTINATION:
        return []
    local, kept = translation.before, kept_set(move_id, translation.number)
    return [
        f"insert rule inet {TABLE} {address_chain(dispatch, local)} {SYN} "
        f'{inbound_key(local)} @{kept} drop comment "{move_id}"'
    ]


def _from_wire(translation: Translation) -> str:
    return 'iif != "lo" ' if translation.site.role == Role.DESTINATION else ""


def _to_wire(translation: Translation) -> str:
    return 'oif != "lo" ' if translation.site.role == Role.DESTINATION else ""


def _render_rewriting(move_id: str, translation: Translation) -> list[str]:
    before, after = translation.before, translation.after
    family, (arrive, depart) = IP[before.version], DISPATCHES[Mode.STATELESS]
    kept, mine = kept_set(move_id, translation.number), f'comment "{move_id}"'
    # An accept ends the base chain: no other move's rules are asked as well.
    return [
        *render_dispatch(arrive, before),
        *_render_syn_drop(move_id, translation, arrive),
        f"insert rule inet {TABLE} {address_chain(arrive, before)} {_NOT_SYN} "
        f"{inbound_key(before)} @{kept} {_from_wire(translation)}"
        f"{family} daddr set {after} accept {mine}",
        *render_dispatch(depart, after),
        f"insert rule inet {TABLE} {address_chain(depart, after)} {_NOT_SYN} "
        f"{outbound_key(after)} @{kept} {_to_wire(translation)}"
        f"{family} saddr set {before} accept {mine}",
    ]


def translating_chains(translation: Translation) -> tuple[tuple[str, Address], ...]:
    """Dispatch and address of the chains in which the translation has a rule."""
    if translation.site.role == Role.SOURCE:
        return ()  # it only keeps quiet
    inbound, outbound = DISPATCHES[translation.mode]
    chains = ((inbound, translation.before), (outbound, translation.after))
    if translation.mode == Mode.STATEFUL and translation.site.role == Role.GATEWAY:
        return (*chains, (outbound, translation.map.old))
    return chains


def render_open(move_id: str, role: Role) -> str:
    """Let the kept connections through: one rule, whatever their number.

    At the destination a bare SYN stays refused: there it would reach a listener.
    """
    guard = f"{_NOT_SYN} " if role == Role.DESTINATION else ""
    return f'insert rule inet {TABLE} {gate_chain(move_id)} {guard}accept comment "{OPEN}"'


def closes_gate(line: str) -> bool:
    """Whether packets have to get to the gates once this line is loaded.

    It closes one, or it has its place in the base chain.
    """
    words = line.split()
    if words[1] != "rule":
        return False
    return words[4] == GATE or (words[-1] == "drop" and words[4].startswith(_DROPPING))


def render_pass(*, guarded: bool) -> str:
    """What lets packets go by the gates of a site, where none of them is closed.

    guarded: there is a destination's, so bare SYNs and CRIU's own segments still go to the gates.
    """
    those = f"meta mark != {CRIU_MARK:#x} {_NOT_SYN} " if guarded else ""
    return f'insert rule inet {TABLE} {GATE} {those}accept comment "{PASS}"'


def render_unhooking() -> tuple[str, ...]:
    """The reverse of render_hook: no packet is sent to the gates any more."""
    return (f"flush chain inet {TABLE} {GATE}", f"delete chain inet {TABLE} {GATE}")


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


def render_gate_removal(move_id: str, translations: Iterable[Translation]) -> tuple[str, ...]:
    """Remove the move's gate chain and sets, once no address chain refers to them."""
    lines = [f"delete chain inet {TABLE} {gate_chain(move_id)}"]
    for translation in translations:
        lines += [f"delete set inet {TABLE} {name}" for name in sets_of(move_id, translation)]
    return tuple(lines)


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
