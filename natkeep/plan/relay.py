"""the relay's own rules: nothing there answers for what moved, and the host becomes no router.

    output   -350  muted            what its stack says as OLD to a kept peer: dropped
    input     350  half-translated  what came to OLD, or back to FROM:q, untranslated: dropped
    forward  -350  passing          where natkeep switches forwarding on: kept packets and the ICMP
                                    errors about them pass, all else that came by the device is
                                    dropped, as it was before
    output   -350  redirecting      and redirects, which name NEW to peers: dropped

- The forward rules ask sets and no entry: after a flush the entry may stand the other way round.
- Accepts stand in front of all drops, those of later moves too. A drop is of one device and IP
  version, which its comment names: by it moves know that forwarding there is not the operator's.

Rule: this file must never run anything.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address

from natkeep.errors import RefusedError
from natkeep.plan.base_chains import (
    NOT_CRIU,
    PASSING,
    REDIRECTING,
    inbound_key,
    kept_set,
    outbound_key,
    rule_at,
)
from natkeep.plan.kept_sets import outer_name, routed_name
from natkeep.plan.nft import ACCEPT, DROP, IP, Match, Meta, Object, Rule, Statement
from natkeep.plan.protocols import Protocol
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Address, FourTuple
from natkeep.plan.via import Via
from natkeep.values import dataclass

_DEVICE = re.compile(r"[A-Za-z0-9_.@-]{1,15}")
"""Names of devices that are put into a rule; others could change its grammar."""
SWITCHED = re.compile(rf"(via|ra)([46])-({_DEVICE.pattern})")
"""What the comment of a drop says behind the move's id: `via6-eth0` of Setting.comment."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One that a device passes packets on by, below /proc/sys/net/.

    Or, where IPv6 knows no device that does so alone, `all` of them; then `accept_ra` is one as
    well, by which a device keeps the routes that routers have told it of.
    """

    name: str

    @property
    def on(self) -> str:
        """What it is while a relay needs it."""
        return "2" if self._is_of_routes else "1"

    @property
    def off(self) -> str:
        """What it is where a relay has to switch it on."""
        return "1" if self._is_of_routes else "0"

    @property
    def _is_of_routes(self) -> bool:
        return self.name.endswith("/accept_ra")

    @property
    def device(self) -> str:
        """The device that it is of."""
        return self.name.split("/")[2]

    @property
    def version(self) -> int:
        """The IP version."""
        return 6 if self.name.startswith("ipv6/") else 4

    def comment(self, move_id: str) -> str:
        """Of the rule by which a move drops what else comes by the device."""
        kind = "ra" if self._is_of_routes else "via"
        return f"{move_id}:{kind}{self.version}-{self.device}"

    def is_of_natkeep(self, comments: Iterable[str], besides: str = "") -> bool:
        """Whether a move's rule says so, of those with these *comments*; but for that move."""
        pairs = (comment.partition(":") for comment in comments)
        own = self.comment("").removeprefix(":")
        return any(what == own and move_id != besides for move_id, _, what in pairs)


def find_left_on(comments: Iterable[str], known: frozenset[str]) -> tuple[Setting, ...]:
    """The settings that moves have switched on whose rules have these *comments*, none *known*."""
    of: dict[Setting, set[str]] = {}
    for move_id, _, what in (comment.partition(":") for comment in comments):
        if match := SWITCHED.fullmatch(what):
            kind, version, device = match.groups()
            named = routes_of(device) if kind == "ra" else forwarding_of(int(version), device)
            of.setdefault(named, set()).add(move_id)
    return tuple(setting for setting, moves in of.items() if not moves & known)


def forwarding_of(version: int, device: str) -> Setting:
    """How *device* is made to pass packets on; IPv6 without the loss of its routes (R3)."""
    if version == 4:
        return Setting(f"ipv4/conf/{device}/forwarding")
    if device == "all":
        return Setting("ipv6/conf/all/forwarding")
    return Setting(f"ipv6/conf/{device}/force_forwarding")


def routes_of(device: str) -> Setting:
    """How *device* keeps the routes that routers advertise, though it passes packets on."""
    return Setting(f"ipv6/conf/{device}/accept_ra")


def is_plain(device: str) -> bool:
    """Whether the name of a device can stand in a rule."""
    return _DEVICE.fullmatch(device) is not None


def keep_quiet(move_id: str, translations: Iterable[Translation]) -> Iterator[Object]:
    """The relay's own stack says nothing to kept peers, be the gate open or closed."""
    for one in translations:
        outer = _outer(outbound_key, move_id, one)
        yield from rule_at("mute", one.map.old, (outer, DROP), move_id)


def drop_untranslated(move_id: str, translation: Translation) -> Iterator[Object]:
    """Nor does it hear what no rule has translated: it would answer with a reset."""
    version, new = translation.map.old.version, translation.map.new
    outer = _outer(inbound_key, move_id, translation)
    # CRIU's own segments are for a process that is restored here again (rollback).
    yield from rule_at("half", translation.before, (outer, NOT_CRIU, DROP), move_id)
    key = outbound_key(version, translation.protocol)
    kept = Match(key, f"@{kept_set(move_id, translation.number)}")
    back = (Match((f"{IP[version]} saddr",), new), kept, DROP)
    for packed in sorted(translation.inner.peers()):
        yield from rule_at("half", ip_address(packed), back, move_id)


def pass_kept(
    move_id: str, translations: Iterable[Translation], settings: Iterable[Setting]
) -> Iterator[Object]:
    """What a host passes on that did not before: what is kept, and errors about it."""
    for one in translations:
        version, new = one.map.old.version, one.map.new
        for key, end in ((inbound_key, "daddr"), (outbound_key, "saddr")):
            kept = Match(key(version, one.protocol), f"@{routed_name(move_id, one)}")
            passes = Match((f"{IP[version]} {end}",), new), kept, ACCEPT
            yield Rule(PASSING, passes, move_id, insert=True)
    for protocol in ("icmp", "ipv6-icmp"):
        related: tuple[Statement, ...] = (
            Meta("meta l4proto", protocol),
            Meta("ct state", "related"),
            ACCEPT,
        )
        yield Rule(PASSING, related, move_id, insert=True)
    for setting in settings:
        family = Meta("meta nfproto", f"ipv{setting.version}")
        device = Meta("iifname", f'"{setting.device}"')
        by = () if setting.device == "all" else (device,)
        yield Rule(PASSING, (family, *by, DROP), setting.comment(move_id))
    for redirect in ("icmp type", "redirect"), ("icmpv6 type", "nd-redirect"):
        yield Rule(REDIRECTING, (Meta(*redirect), DROP), move_id, insert=True)


def _outer(
    key: Callable[[int, Protocol], tuple[str, ...]], move_id: str, translation: Translation
) -> Match:
    fields = key(translation.map.old.version, translation.protocol)
    return Match(fields, f"@{outer_name(move_id, translation)}")


# ---- what stands in its way ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RelayFacts:
    """What a relay's host shows before it is one.

    routed: it has a route to NEW. local: which FROM it has. ephemeral: the ports that its own
    connections take. taken: a connection or an entry there that has a FROM:q and NEW:p. living: how
    many kept connections have their sockets there still.
    """

    routed: bool
    local: frozenset[Address]
    ephemeral: range
    taken: FourTuple | None
    living: int


def refuse_relay(translation: Translation, vias: Iterable[Via], facts: RelayFacts) -> None:
    """RefusedError, with a remedy, where the host could not be the relay of *translation*."""
    site, new = translation.site, translation.map.new
    if facts.living:
        raise RefusedError(
            f"{site}: {facts.living} of the connections still have their sockets there",
            hint="was it dumped with --leave-running? End that process first",
        )
    if not facts.routed:
        raise RefusedError(f"{site} has no route to NEW {new}")
    for via in vias:
        if via.source.version != new.version:
            continue
        if via.source not in facts.local:
            raise RefusedError(f"--via {via}: {site} does not have {via.source}")
        if via.low < facts.ephemeral.stop and facts.ephemeral.start <= via.high:
            own = f"{facts.ephemeral.start}-{facts.ephemeral.stop - 1}"
            raise RefusedError(
                f"--via {via}: {site} takes the ports {own} for connections of its own",
                hint="other ports, or: sysctl -w net.ipv4.ip_local_port_range",
            )
    if facts.taken is not None:
        taken = facts.taken
        raise RefusedError(
            f"{site}: {taken.destination} to {taken.source} is a connection there already",
            hint="--via FROM:LOW-HIGH names other ports",
        )
