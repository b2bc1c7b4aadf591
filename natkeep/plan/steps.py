"""the steps: one change to one site as a value, and the plan that is made of them.

Rule: a step says everything that kernel/ needs to do it and to undo it, and describes itself
as commands that a person could type. In which order they come is written in step_order.py.
This file must never do a step.

Size: over 400 lines, because each kind of step is a short class, and there are two dozen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

from natkeep.plan import (
    arp,
    base_chains,
    filters,
    listeners,
    relay,
    ruleset,
    servers,
    syn_block,
    undone,
)
from natkeep.plan.conntrack import describe_purge, entries, stale_tuples, stale_views
from natkeep.plan.criu_lock import DumpLock, describe_taking
from natkeep.plan.ip_rules import IpRule, rules_of
from natkeep.plan.kept_sets import Filling
from natkeep.plan.listeners import Reception
from natkeep.plan.move import Move, Site
from natkeep.plan.nft import TABLE, Chain, Object, Rule
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.relay import Setting
from natkeep.plan.resets import Reset
from natkeep.plan.translation import Surroundings, Translation, Unkept
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, Endpoint, FourTuple
from natkeep.values import dataclass, field


@dataclass(frozen=True, slots=True)
class Prior:
    """What a step found before it acted; JSON values only, since it is written to the journal.

    present: what the step adds was there already, so undoing must not remove it.
    """

    present: bool = False
    facts: dict[str, str | int | bool] = field(default_factory=dict)

    def to_json(self) -> dict[str, object]:
        """As it stands in the journal."""
        return {"present": self.present, **self.facts}

    @classmethod
    def from_json(cls, value: dict[str, object]) -> Prior:
        """From the journal; TypeError for anything to_json does not write."""
        facts = dict(value)
        present = facts.pop("present", None)
        if not isinstance(present, bool):
            raise TypeError("a prior says whether it was present")
        if not all(isinstance(fact, str | int | bool) for fact in facts.values()):
            raise TypeError("a prior holds text, numbers and truth values")
        return cls(present, facts)  # type: ignore[arg-type]  # checked just above


SHOWN = 3
_LOCK_SHOWN = 8
"""How many of a step's connections `describe` spells out; `--format nft` and json show all."""


class Recorded(NamedTuple):
    """What a journal says that a step loaded, where it is not what this natkeep would load.

    shared: of the part that all moves share the sums of the keys (wanted.py) that were meant then;
    None: all.
    """

    objects: tuple[Object, ...]
    shared: frozenset[int] | None = None


class Loads:
    """A step that loads nft objects, and describes itself by their text."""

    __slots__ = ()
    site: Site
    recorded: Recorded | None

    def objects(self) -> tuple[Object, ...]:
        """What it adds to the tables, without the part that all moves share."""
        return self.make() if self.recorded is None else self.recorded.objects

    def make(self) -> tuple[Object, ...]:
        """The same, as this natkeep does it."""
        raise NotImplementedError

    def rules(self) -> tuple[Rule, ...]:
        """The rules among them."""
        return tuple(one for one in self.objects() if isinstance(one, Rule))

    def static(self) -> tuple[tuple[Object, ...], ...]:
        """The parts of the tables that all moves share and this step needs, in their order."""
        return ()

    def lines(self) -> tuple[str, ...]:
        """The nft text of `objects`."""
        return tuple(map(str, self.objects()))

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return as_commands(self.site, self.lines())


@dataclass(frozen=True, slots=True)
class InstallGate(Loads):
    """The table if there is none, the move's (still empty) sets, its drop, and ARP silence.

    home: OLD addresses that the host serves others by, which are not silenced. forwards: the host
    passes on what others send to OLD.
    awaits: no destination is prepared with it, so the gateway waits until it has heard one.
    """

    site: Site
    move_id: str
    translations: tuple[Translation, ...]
    recorded: Recorded | None = None
    home: frozenset[Address] = frozenset()
    awaits: bool = False
    forwards: bool = False

    def make(self) -> tuple[Object, ...]:
        """The gate; at a source in both directions."""
        gate = filters.gate(self.move_id, self.translations, self.home)
        if self.site.row.relays:
            gate = (*gate, *relay.keep_quiet(self.move_id, self.translations))
        if self.site.row.mutes:
            return (*gate, *filters.mute(self.move_id, self.translations))
        if self.awaits:
            return (*gate, *filters.await_destination(self.move_id, self.translations))
        return gate

    def static(self) -> tuple[tuple[Object, ...], ...]:
        """The table, and what it has at a site of this role."""
        if self.site.row.puts_old:
            parts = (base_chains.destination_table(), base_chains.dispatch_table(base_chains.HEARD))
            passed = (base_chains.forwarding_table(),) if self.forwards else ()
            return (base_chains.base_table(), *parts, *passed, arp.arp_table())
        row = self.site.row
        more = ["mute"] if row.mutes or row.relays else []
        more += ["dial"] if row.own else []
        more += [base_chains.SPOKEN] if self.awaits else []
        return (base_chains.base_table(), *map(base_chains.dispatch_table, more))


@dataclass(frozen=True, slots=True)
class FillSet:
    """One set of kept connections; with this the gate is closed for them.

    more: what else of the same connections is filled with it.
    """

    site: Site
    name: str
    connections: Connections
    more: tuple[Filling, ...] = ()

    def fillings(self) -> tuple[Filling, ...]:
        """The set, and what else is filled."""
        return (Filling(self.name, self.connections), *self.more)

    def lines(self) -> Iterator[str]:
        """The nft text, a line for each set."""
        for one in self.fillings():
            elements = ", ".join(_elements(one))
            yield f"add element inet {TABLE} {one.name} {{ {elements} }}"

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        found = []
        for one in self.fillings():
            shown = ", ".join(_first(_elements(one), len(one.keys)))
            found.append(f"add element inet {TABLE} {one.name} {{ {shown} }}")
        return as_commands(self.site, found)


@dataclass(frozen=True, slots=True)
class RaiseLoopback:
    """lo must be up, or an address on it is not local."""

    site: Site

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return (f"{_prefix(self.site)}ip link set lo up",)


@dataclass(frozen=True, slots=True)
class AddAddress:
    """OLD as /32 or /128 on lo, so that sockets can be bound to it and answers find a route.

    A host-length prefix on lo is never chosen as a source address for other connections; for
    IPv6 `nodad`, because a tentative address cannot be bound.
    like: the address whose policy routing rules are to hold for it, too; or None.
    """

    site: Site
    address: Address
    like: Address | None = None

    def describe(self) -> tuple[str, ...]:
        """One command a line; which rules there are is seen only when they are copied."""
        command = f"{_prefix(self.site)}ip address add {self.address}/{self.address.max_prefixlen}"
        more = " nodad noprefixroute preferred_lft 0" if self.address.version == 6 else ""
        lines = [f"{command} dev lo{more}"]
        if self.like is not None:
            lines.append(f"# {_prefix(self.site)}ip rule: those from {self.like} hold for it, too")
        return tuple(lines)


@dataclass(frozen=True, slots=True)
class AddRoute:
    """A route to OLD by lo, where there is none: a peer's socket looks it up before it is NEW."""

    site: Site
    address: Address

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        to = f"{self.address}/{self.address.max_prefixlen}"
        return (f"{_prefix(self.site)}ip route add {to} dev lo # where there is no route",)


@dataclass(frozen=True, slots=True)
class AddRules:
    """Rules by which what this host sends to *olds* is routed as before OLD is on lo.

    staying: what of it belongs to connections and listeners that were moved here. forwards: the
    host passes on what others send to *olds*, as before.
    """

    site: Site
    olds: tuple[Address, ...]
    staying: tuple[IpRule, ...] = ()
    forwards: bool = False

    def rules(self) -> tuple[IpRule, ...]:
        """All of them; of those that several OLDs need, one."""
        shared = (rule for old in self.olds for rule in rules_of(old, forwards=self.forwards))
        return tuple(dict.fromkeys((*self.staying, *shared)))

    def keeps(self, local: tuple[Address, int], peer: tuple[Address, int]) -> bool:
        """Whether a socket of this host with these ends talks with what was moved here."""
        return any(
            (rule.to, rule.source or local[0]) == (peer[0], local[0])
            and (rule.sport or local[1], rule.dport or peer[1]) == (local[1], peer[1])
            for rule in self.staying
        )

    def describe(self) -> tuple[str, ...]:
        """One comment a rule: the order of rules of one preference is no matter of ip(8)."""
        rules = self.rules()
        shown = _first((f"# {_prefix(self.site)}ip rule {rule}" for rule in rules), len(rules))
        return (*shown, f"# {_prefix(self.site)}these in front of lookup local")


@dataclass(frozen=True, slots=True)
class InstallTranslation(Loads):
    """The rules that translate."""

    site: Site
    move_id: str
    translations: tuple[Translation, ...]
    recorded: Recorded | None = None

    def make(self) -> tuple[Object, ...]:
        """The rules, and their chains."""
        return ruleset.translate(self.move_id, self.translations)

    def static(self) -> tuple[tuple[Object, ...], ...]:
        """The base chains of its mode."""
        modes = dict.fromkeys(translation.mode for translation in self.translations)
        peers = any(one.turns_peers for one in self.translations)
        parts = (base_chains.translation_tables(self.site.row, mode, peers=peers) for mode in modes)
        return tuple(part for some in parts for part in some)


@dataclass(frozen=True, slots=True)
class InstallReception(Loads):
    """The rules by which new connections reach the listeners, callers held back.

    masqueraded: of those of UDP what the gateway sends from another address, as of Surroundings.
    """

    site: Site
    move_id: str
    receptions: tuple[Reception, ...]
    recorded: Recorded | None = None
    home: frozenset[Address] = frozenset()
    masqueraded: frozenset[Endpoint] = frozenset()

    def make(self) -> tuple[Object, ...]:
        """The rules, their chains and sets."""
        callers = listeners.objects(self.move_id, self.receptions, self.home)
        return (*callers, *servers.objects(self.move_id, self.receptions, self.masqueraded))

    def static(self) -> tuple[tuple[Object, ...], ...]:
        """The base chains of its mode; of UDP all that translate."""
        parts: list[tuple[Object, ...]] = []
        for one in self.receptions if self.site.row.leaves else ():
            if one.protocol == UDP:
                parts += base_chains.translation_tables(self.site.row, one.mode)
            else:
                parts.append(base_chains.mode_table(one.mode))
        parts += [base_chains.dispatch_table(base_chains.SAID)] if self.answers_as_old else []
        return tuple(dict.fromkeys(parts))

    @property
    def answers_as_old(self) -> bool:
        """Whether what comes from NEW here is made to come from OLD (servers.py)."""
        return self.site.row.puts_old and any(one.protocol == UDP for one in self.receptions)


@dataclass(frozen=True, slots=True)
class ForgetCalls:
    """Delete the entries in SYN_SENT of new connections to the listeners.

    Their SYNs are retransmitted, and the entries would send them where the first SYN went. Undone,
    the entries of connections that were let in are deleted: there is no listener behind them.
    Of UDP all entries of the ports go, both times.
    """

    site: Site
    receptions: tuple[Reception, ...]

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return tuple(
            f"{_prefix(self.site)}{command}"
            for receiving in self.receptions
            for command in listeners.describe_forgetting(receiving)
        )


@dataclass(frozen=True, slots=True)
class TranslateErrors(Loads):
    """The rules that translate what ICMP errors quote, in stateless mode."""

    site: Site
    move_id: str
    translations: tuple[Translation, ...]
    receptions: tuple[Reception, ...] = ()
    recorded: Recorded | None = None

    def describe(self) -> tuple[str, ...]:
        """One comment a rule: nft has no text for them (see plan/icmp_errors.py)."""
        return tuple(
            f"# {_prefix(self.site)}raw nf_tables rule in chain {rule.chain}: translate the TCP "
            "segment that an ICMP error quotes"
            for rule in self.rules()
        )

    def make(self) -> tuple[Rule, ...]:
        """What is inserted, the kept connections' rules last: then they come first."""
        from natkeep.plan.icmp_errors import make_callers_error_rules, make_error_rules

        callers = (
            rule for r in self.receptions for rule in make_callers_error_rules(self.move_id, r)
        )
        kept = (rule for t in self.translations for rule in make_error_rules(self.move_id, t))
        return (*callers, *kept)


@dataclass(frozen=True, slots=True)
class PurgeEntries:
    """Delete what conntrack believes of exactly the kept tuples."""

    site: Site
    translation: Translation

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        stale = (
            f"{_prefix(self.site)}{describe_purge(tuple_, self.translation.protocol)}"
            for tuple_ in stale_tuples(self.translation)
        )
        views = len(stale_views(self.translation))
        return tuple(_first(stale, 2 * views * len(self.translation.kept)))


@dataclass(frozen=True, slots=True)
class InsertEntries:
    """Pre-create the translated entries, and verify that the kernel took them as meant."""

    site: Site
    translation: Translation

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        new = (f"{_prefix(self.site)}{e.describe()}" for e in entries(self.translation))
        return tuple(_first(new, len(self.translation.kept)))


@dataclass(frozen=True, slots=True)
class HoldSegments:
    """Keep what peers say while the gate is closed; where that may not be, go on without."""

    site: Site
    move_id: str
    translations: tuple[Translation, ...]
    servers: tuple[Reception, ...] = ()

    def describe(self) -> tuple[str, ...]:
        """One comment: it is a process of natkeep's own (kernel/segment_holderd.py), no command."""
        count = sum(len(translation.kept) for translation in self.translations)
        count += sum(len(one.ports) for one in self.servers)
        return (
            f"# {_prefix(self.site)}natkeep's holder: keep what peers say on {count} connections, "
            "deliver it when the gate opens",
        )

    def kept(self, protocol: Protocol = TCP) -> list[tuple[int, bytes, bytes]]:
        """Of each map its IP version, and the records as they arrive, and as they are known.

        Of a UDP socket that any peer may speak to the peer is all zeros.
        """
        found = ((t.map.old.version, t) for t in self.translations if t.protocol == protocol)
        kept: list[tuple[int, bytes, bytes]]
        kept = [(v, t.outer.records(v), t.kept.records(v)) for v, t in found]
        for one in self.servers if protocol == UDP else ():
            version, nobody = one.map.old.version, bytes(len(one.map.old.packed) + 2)
            new, old = (
                b"".join(
                    address.packed + port.to_bytes(2, "big") + nobody
                    for port in one.ports_at(address)
                )
                for address in (one.map.new, one.map.old)
            )
            kept.append((version, new, old))
        return kept


@dataclass(frozen=True, slots=True)
class GuardSite:
    """Drop un-translated segments even after another program has flushed the ruleset."""

    site: Site
    move_id: str
    translations: tuple[Translation, ...]
    servers: tuple[Reception, ...] = ()

    def describe(self) -> tuple[str, ...]:
        """One comment: a table that lives by a process (kernel/owned_tabled.py) is no command."""
        count = sum(len(translation.kept) for translation in self.translations)
        return (
            f"# {_prefix(self.site)}natkeep's guard: {count} connections outlive a flush of the "
            "ruleset",
        )


@dataclass(frozen=True, slots=True)
class OpenGate(Loads):
    """Let the kept connections through, and callers to the listeners.

    delivers: what has been held goes to the sockets that are back. datagrams: those before, since
    what passes an open gate must not have been delivered already, nor come first.
    """

    site: Site
    move_id: str
    listening: tuple[Reception, ...] = ()
    delivers: bool = False
    datagrams: bool = False
    recorded: Recorded | None = None

    def make(self) -> tuple[Rule, ...]:
        """One rule in front of each drop."""
        kept = filters.opening(self.move_id)
        return (kept, listeners.opening(self.move_id)) if self.listening else (kept,)

    def describe(self) -> tuple[str, ...]:
        """One command a line; what comes later depends on other moves."""
        later = f"# {_prefix(self.site)}later, unless another gate is closed: delete chain gate"
        return (*as_commands(self.site, self.lines()), later)


class OpenEarly(OpenGate):
    """At a gateway, as the end of prepare: what peers say shall reach the holder."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class HoldListeners(Loads):
    """New connections to these listeners wait: their SYNs are dropped, and peers retry."""

    site: Site
    move_id: str
    listeners: tuple[Endpoint, ...]
    recorded: Recorded | None = None

    def make(self, *, linked: bool = False) -> tuple[Object, ...]:
        """A chain that drops, and a rule that leads there; linked: that one is there already."""
        return syn_block.block(self.move_id, self.listeners, linked=linked)

    def static(self) -> tuple[tuple[Object, ...], ...]:
        """The table."""
        return (base_chains.base_table(),)


@dataclass(frozen=True, slots=True)
class InstallResets(Loads):
    """The rules by which connections that cannot be kept are reset, silent so far."""

    site: Site
    move_id: str
    resets: tuple[Reset, ...]
    recorded: Recorded | None = None
    home: frozenset[Address] = frozenset()

    def make(self) -> tuple[Object, ...]:
        """A chain that drops, and the rules that lead there."""
        return filters.reset(self.move_id, self.resets, self.home)

    def static(self) -> tuple[tuple[Object, ...], ...]:
        """The base chain in front of the gate."""
        return tuple(
            base_chains.dispatch_table(d) for d in dict.fromkeys(r.dispatch for r in self.resets)
        )


@dataclass(frozen=True, slots=True)
class SendResets(Loads):
    """Answer the ends of these connections with a reset, and probe those that send nothing.

    Undone, no more resets are sent; an end that has been reset stays so.
    """

    site: Site
    move_id: str
    resets: tuple[Reset, ...]
    recorded: Recorded | None = None

    def make(self) -> tuple[Rule, ...]:
        """One rule in front of the drop."""
        return (filters.reset_opening(self.move_id),)

    def questions(self) -> Iterator[FourTuple]:
        """Along which tuples the ends are asked: to the process, or to its peers."""
        for reset in self.resets:
            for inbound in reset.connections:
                yield inbound if reset.dispatch == "answer" else inbound.reply()

    def describe(self) -> tuple[str, ...]:
        """One command a line; no program says the question, so it is a comment."""
        asks = f"# {_prefix(self.site)}ask by a bare acknowledgement"
        questions = (f"{asks}: {tuple_}" for tuple_ in self.questions())
        total = sum(len(reset.connections) for reset in self.resets)
        return (*as_commands(self.site, self.lines()), *_first(questions, total))


@dataclass(frozen=True, slots=True)
class TakeOverLock:
    """Remove the network lock that CRIU left for this dump, now that our gate stands.

    Undone, it is put back: where our gate goes after a failure, CRIU's lock stands again.
    """

    site: Site
    lock: DumpLock
    connections: Connections

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        commands = describe_taking(self.lock, self.connections)
        return tuple(f"{_prefix(self.site)}{command}" for command in islice(commands, _LOCK_SHOWN))


@dataclass(frozen=True, slots=True)
class PassKept(Loads):
    """At a relay: the rules by which it passes on what is kept, and nothing else."""

    site: Site
    move_id: str
    translations: tuple[Translation, ...]
    settings: tuple[Setting, ...]
    recorded: Recorded | None = None

    def make(self) -> tuple[Object, ...]:
        """Rules in chains that all relays' moves share."""
        return tuple(relay.pass_kept(self.move_id, self.translations, self.settings))

    def static(self) -> tuple[tuple[Object, ...], ...]:
        """These chains."""
        return (base_chains.relay_table(),)


@dataclass(frozen=True, slots=True)
class SwitchForwarding:
    """A relay's device passes packets on; undone, as it was, unless another move needs it."""

    site: Site
    move_id: str
    setting: Setting

    def describe(self) -> tuple[str, ...]:
        """One command a line."""
        return (f"{_prefix(self.site)}sysctl -w net/{self.setting.name}={self.setting.on}",)


@dataclass(frozen=True, slots=True)
class DropUndone:
    """Where a destination is undone: go on dropping what a gateway may still send there.

    arriving: the tuples as they arrive; seconds: for how long. No plan has it: an undo does it.
    """

    site: Site
    arriving: Connections
    seconds: int = undone.SECONDS

    def describe(self) -> tuple[str, ...]:
        """One command a line, of a few connections, and a comment for the rest."""
        some = Connections.of(islice(self.arriving, SHOWN))
        lines = as_commands(self.site, undone.element_lines("add", some, self.seconds))
        left = len(self.arriving) - len(some)
        return (*lines, *([f"# ... and {left} more"] if left else []))


@dataclass(frozen=True, slots=True)
class Unknown:
    """A step of a journal that this natkeep does not take; its record says how it is undone."""

    site: Site
    kind: str

    def describe(self) -> tuple[str, ...]:
        """One comment."""
        return (f"# {_prefix(self.site)}{self.kind}: a step of another natkeep",)


Step = (
    InstallGate
    | FillSet
    | RaiseLoopback
    | AddAddress
    | AddRoute
    | AddRules
    | InstallTranslation
    | InstallReception
    | ForgetCalls
    | TranslateErrors
    | PurgeEntries
    | InsertEntries
    | HoldListeners
    | HoldSegments
    | GuardSite
    | InstallResets
    | TakeOverLock
    | PassKept
    | SwitchForwarding
    | OpenEarly
    | OpenGate
    | SendResets
    | DropUndone
    | Unknown
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What prepare does, in order, and what open does later; nothing has happened yet.

    inner: connections of the process with itself, which need OLD and nothing else.
    written: it is not what this natkeep would do, but what a journal says (recorded.py). unnoted:
    the journal does not say what was loaded, as the first natkeeps' do not.
    """

    move: Move
    translations: tuple[Translation, ...]
    unkept: tuple[Unkept, ...]
    surroundings: Surroundings
    prepare: tuple[Step, ...]
    open: tuple[OpenGate | SendResets, ...]
    resets: tuple[Reset, ...] = ()
    inner: Connections = NO_CONNECTIONS
    written: bool = False
    unnoted: bool = False

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps, in order; a step's index here is its number in the journal."""
        return (*self.prepare, *self.open)

    def gate_at(self, site: Site) -> str:
        """Name of the chain that drops what is kept there until it is opened; "" without one."""
        gates = (s for s in self.prepare if isinstance(s, InstallGate) and s.site == site)
        objects = (one for step in gates for one in step.objects() if isinstance(one, Chain))
        return next((chain.name for chain in objects if not chain.shared), "")

    def olds_at(self, site: Site) -> frozenset[Address]:
        """The addresses that may be put on lo of *site*, or are at home there at a source."""
        added = (s.address for s in self.prepare if isinstance(s, AddAddress) and s.site == site)
        return frozenset([*(map_.old for map_ in self.move.maps), *added])


def _elements(filling: Filling) -> Iterator[str]:
    """`peer . peer port . local port` of each connection; of a map, and the peer it leads to."""
    peers = (None for _ in filling.keys) if filling.peers is None else iter(filling.peers)
    for tuple_, to in zip(filling.keys, peers, strict=True):
        source = tuple_.source
        key = f"{source.address} . {source.port} . {tuple_.destination.port}"
        yield key if to is None else f"{key} : {to.source.address} . {to.source.port}"


def _first(lines: Iterable[str], total: int) -> Iterator[str]:
    yield from islice(lines, SHOWN)
    if total > SHOWN:
        yield f"# ... and {total - SHOWN} more"


def as_commands(site: Site, lines: Iterable[str]) -> tuple[str, ...]:
    """Lines of nft text as commands that a person could type at *site*."""
    return tuple(f"{_prefix(site)}nft '{line}'" for line in lines)


def _prefix(site: Site) -> str:
    if not site.netns:
        return ""
    from shlex import quote  # a hook describes nothing, and need not wait for it

    # Quoted, since a path may hold anything and the command is there to be typed.
    if site.netns.startswith("pid:"):
        return f"nsenter --target {quote(site.netns[4:])} --net "
    if "/" in site.netns:
        return f"nsenter --net={quote(site.netns)} "
    return f"ip netns exec {quote(site.netns)} "
