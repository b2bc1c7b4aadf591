"""The path of a move's packets: what routes and policy rules of its sites mean for it.

    gateway       peer > NEW   comes in where the peer is, and has to leave for NEW
                  NEW > peer   comes in where NEW is, and has to leave as OLD > peer does
    destination   peer > NEW   comes in at NEW's device
                  NEW > peer   has to leave by a router: a peer on NEW's own link would get what no
                               gateway has translated

Rule: kernel/path.py asks the kernel, and what its answers mean is decided here.
This file must never look at a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_network

from natkeep.plan.findings import Finding, ok
from natkeep.plan.move import Site
from natkeep.plan.tuples import Address
from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class SourceRule:
    """A policy routing rule that selects a source: `from source/length`.

    priority: which rule is asked first. table: where it leads, if its action is a look-up. local:
    it may be about what this host itself sends. inverted: it selects all other sources (`not`).
    ours: a natkeep has added it. said: all else that it says, for kernel/policy_rules.py. copied:
    it is a rule of NEW's that a natkeep has copied for OLD.
    """

    source: bytes
    length: int
    priority: int
    table: int
    local: bool
    inverted: bool
    ours: bool
    said: bytes
    copied: bool = False

    def selects(self, address: Address) -> bool:
        """Whether *address* is such a source."""
        shift = address.max_prefixlen - self.length
        ours, theirs = int.from_bytes(self.source, "big"), int(address)
        return (ours >> shift == theirs >> shift) != self.inverted


def find_uncopied(rules: Iterable[SourceRule], new: Address, old: Address) -> list[SourceRule]:
    """The rules that route what *new* sends, and not what *old* does, nor does one like them."""
    some = [rule for rule in rules if rule.local]
    for_old = {rule.said for rule in some if rule.selects(old)}
    return [
        rule
        for rule in some
        if rule.selects(new) and not rule.selects(old) and rule.said not in for_old
    ]


def find_apart(rules: Iterable[SourceRule], new: Address, old: Address) -> list[SourceRule]:
    """The rules that route what *old* sends, and not what *new* does, nor does one like them."""
    return [rule for rule in find_uncopied(rules, old, new) if not rule.ours]


@dataclass(frozen=True, slots=True)
class Route:
    """The kernel's answer to which way a packet takes.

    kind: `unicast`, `local`, or another type of route; `none` where there is none, and `reverse`
    where a filter of the reverse path drops what comes in. device: by which it leaves. hop: the
    next router; empty for a host on the link. neighbour: the address belongs to a host on a link
    on which hosts ask for each other (a connected network, or a route to that host alone). entry:
    which of the routes it is, whatever it is called. mtu: octets that its device takes, 0 if not
    known.
    """

    kind: str
    device: str = ""
    hop: str = ""
    neighbour: bool = False
    entry: bytes = b""
    mtu: int = 0

    def said(self) -> str:
        """In the words of ip(8)."""
        if self.kind != "unicast":
            return self.kind
        return f"via {self.hop} dev {self.device}" if self.hop else f"dev {self.device}"


@dataclass(frozen=True, slots=True)
class Way:
    """What a site says of one peer and one pair of OLD and NEW.

    out: the route to the peer; of what NEW sends at a destination. there: of `peer > NEW` as it
    comes in; back: of `NEW > peer`; before: of `OLD > peer`, as sent
    there at a destination. These are None where they are not
    to be asked.
    to_old, to_new: the routes to these, at a gateway. by_route: a destination of the move tells
    itself whether NEW is on the peer's link. crosses: the gateway has seen packets of the
    peer's connections already. direct: the peer has moved, or its own host is a site, and nothing
    else has to translate. alone: the move has no gateway.
    home: at a destination, the device that has NEW, where what NEW sends does not leave by it to
    one of the gateways.
    """

    peer: Address
    old: Address
    new: Address
    out: Route
    there: Route | None = None
    back: Route | None = None
    before: Route | None = None
    to_old: Route | None = None
    to_new: Route | None = None
    by_route: bool = False
    crosses: bool = False
    direct: bool = False
    alone: bool = False
    home: str = ""

    def is_beside(self) -> bool:
        """Whether the peer is on one link with OLD or NEW."""
        beside_new = not self.by_route and _share_link(self.out, self.to_new)
        return beside_new or _share_link(self.out, self.to_old)


def _share_link(one: Route, other: Route | None) -> bool:
    if other is None or one.device != other.device:
        return False
    return one.neighbour and other.neighbour


Verdict = tuple[str, str, str]
"""Code, what was found, and what to do."""


def judge(site: Site, ways: Iterable[Way], *, forwards: bool = True) -> Iterator[Finding]:
    """The findings about the peers' way at *site*: one for all peers of which it is the same.

    forwards: forwarding is on, as far as a gateway needs it.
    """
    some = [*ways]
    look = _at_gateway if site.row.passes_on else _at_destination
    found: dict[tuple[str, Address, str], list[tuple[Way, Verdict]]] = {}
    for way in some:
        verdict = look(way)
        if verdict is not None and (forwards or verdict[0] not in _BY_FORWARDING):
            key = (verdict[0], way.new, way.out.said())
            found.setdefault(key, []).append((way, verdict))
    bad: set[Way] = set()
    for (code, *_), each in found.items():
        way, (_, what, remedy) = each[0]
        more = f" ({len(each)} peers in all)" if len(each) > 1 else ""
        yield Finding(code, site, what + more, remedy)
        bad.update(way for way, _ in each)
    yield from _well(site, [way for way in some if way not in bad])


_BY_FORWARDING = frozenset({"no-way-there", "no-way-back"})


def _well(site: Site, ways: list[Way]) -> Iterator[Finding]:
    """A line for each NEW: by which devices its peers are reached."""
    for new in dict.fromkeys(way.new for way in ways):
        here = [way for way in ways if way.new == new]
        to_old, to_new = here[0].to_old, here[0].to_new
        if to_old and to_new and 0 < to_new.mtu < to_old.mtu:
            what = f"the link to NEW {new} takes {to_new.mtu} octets, that to OLD {to_old.mtu}"
            yield Finding("smaller-mtu", site, what)
        devices = ", ".join(sorted({way.out.said() for way in here}))
        count = len({way.peer for way in here})
        peers = f"{count} peers are" if count > 1 else f"peer {here[0].peer} is"
        yield ok(site, f"{peers} reached from NEW {new} {devices}")


def _at_destination(way: Way) -> Verdict | None:
    peer, new = way.peer, way.new
    if way.out.kind == "local":
        return None  # on this host, through lo
    if way.out.kind != "unicast":
        return ("no-way-back", f"{peer} is not reached from NEW {new}: {way.out.said()}", "")
    if way.out.neighbour and way.alone and not way.direct:
        return (
            "needs-peer-site",
            f"peer {peer} is on NEW's link {way.out.device}, where no gateway translates",
            f"prepare its own host, too: --site peer there, before {new} says anything to it",
        )
    if way.out.neighbour and not way.direct:
        return (
            "peer-on-link",
            f"peer {peer} is on NEW's link {way.out.device}: what {new} sends goes to it directly, "
            "and no gateway translates it",
            f"route it by the gateway here and there: ip route add {peer} via GATEWAY, or give "
            "NEW another link",
        )
    before = way.before
    if before is not None and (before.kind, before.said()) != (way.out.kind, way.out.said()):
        return (
            "old-routed-apart",
            f"what OLD {way.old} sends to {peer} goes {before.said()}, and what NEW {new} does "
            f"{way.out.said()}: routes here name a source",
            f"have the same route for OLD: ip route add {peer} from {way.old} {way.out.said()}",
        )
    if way.there is not None and way.there.kind == "reverse":
        return (
            "reverse-path",
            f"what {peer} sends to NEW {new} is dropped: rp_filter is strict and the way back is "
            f"{way.out.said()}",
            "set net.ipv4.conf.DEVICE.rp_filter to 2, or route both ways by one device",
        )
    if way.home and way.home != way.out.device:
        return (
            "other-device",
            f"what NEW {new} sends to {peer} leaves {way.out.said()}, and NEW is an address of "
            f"{way.home}",
            f"ip rule add from {new} lookup TABLE, with a route by {way.home}",
        )
    return None


def _at_gateway(way: Way) -> Verdict | None:
    looks: tuple[Callable[[Way], Verdict | None], ...] = (_find_beside, _find_lost, _find_elsewhere)
    return next((found for look in looks if (found := look(way)) is not None), None)


def _find_beside(way: Way) -> Verdict | None:
    """A peer on the link of OLD, or of NEW, does not need this gateway."""
    peer = way.peer
    if way.crosses:
        return None
    if _share_link(way.out, way.to_old):
        return (
            "peer-beside-old",
            f"peer {peer} and OLD {way.old} are both on the link {way.out.device}: what they say "
            "goes past this gateway",
            "make OLD's host the gateway (--site gateway there: docs/by-hand.md)",
        )
    if way.is_beside():
        return (
            "peer-on-link",
            f"peer {peer} and NEW {way.new} are both on the link {way.out.device}: NEW answers it "
            "directly, and no gateway translates that",
            f"route it by the gateway: ip route add {peer} via GATEWAY at the destination, and "
            f"{way.new} at the peer",
        )
    return None


def _find_lost(way: Way) -> Verdict | None:
    """What is dropped for want of a route, or by the filter of the reverse path."""
    peer, new = way.peer, way.new
    for end, route in ((f"the peer {peer}", way.out), (f"NEW {new}", way.to_new)):
        if route is not None and route.kind not in ("unicast", "local"):
            return ("no-route", f"no route to {end} ({route.said()})", "")
    directions = (
        ("no-way-there", way.there, f"{peer} to NEW {new}"),
        ("no-way-back", way.back, f"NEW {new} to {peer}"),
    )
    for code, route, what in directions:
        if route is None or route.kind == "unicast":
            continue
        if route.kind == "reverse":
            return (
                "reverse-path",
                f"what goes from {what} is dropped: rp_filter is strict, and the way back to its "
                "source is another device",
                "set net.ipv4.conf.DEVICE.rp_filter to 2, or route both ways by one device",
            )
        return (code, f"what goes from {what} is not passed on: {route.said()}", "")
    there, to_new = way.there, way.to_new
    if there and to_new and to_new.neighbour and there.device != to_new.device:
        return (
            "no-way-there",
            f"what goes from {peer} to NEW {new} leaves {there.said()}, and NEW is a host on "
            f"{to_new.device}",
            f"have the rule or table that routes it so know {new}: ip rule, ip route show table N",
        )
    return None


def _find_elsewhere(way: Way) -> Verdict | None:
    """NEW's packets, which leave as OLD's, by another device than OLD's do."""
    back, before = way.back, way.before
    if back is not None and before is not None and _part(back, before):
        return (
            "other-uplink",
            f"what OLD {way.old} sends to {way.peer} leaves {before.said()}, and what NEW "
            f"{way.new} sends as OLD {back.said()}: that uplink may drop it",
            f"ip rule add from {way.new} to {way.peer} lookup TABLE, with that of OLD's rule",
        )
    there, to_new = way.there, way.to_new
    # Of several routes by turns none is told.
    if there and to_new and to_new.device and there.device != to_new.device:
        return (
            "other-way",
            f"what goes from {way.peer} to NEW {way.new} leaves {there.said()}, and what the "
            f"gateway itself says {to_new.said()}",
            "",
        )
    return None


def _part(back: Route, before: Route) -> bool:
    """Whether two ways to the same peer leave by different routes."""
    if before.kind != "unicast" or back.entry == before.entry:
        return False
    return (back.device, back.hop) != (before.device, before.hop)


def network_of(packed: bytes, length: int) -> tuple[int, int]:
    """The first address of a network and its mask, as numbers."""
    network = ip_network((packed, length), strict=False)
    return int(network.network_address), int(network.netmask)
