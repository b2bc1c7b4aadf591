"""a kernel for tests that behaves: it copies, applies and swaps, and fails on demand.

Rule: it obeys the same laws as the real one (natkeep/kernel/__init__.py), which the contract
tests hold, so a test that passes on it says something about natkeep and not about the fake.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address

from natkeep.errors import KernelError, RefusedError
from natkeep.kernel.interface import Kernel, P, Remember, RememberMany, T
from natkeep.kernel.old_address import Needs
from natkeep.kernel.sock_diag import Shown
from natkeep.plan import base_chains, filters, kept_sets, nft
from natkeep.plan.base_chains import is_address_chain
from natkeep.plan.conntrack import entries, stale_tuples
from natkeep.plan.diagnostics import Facts
from natkeep.plan.identity import Identity
from natkeep.plan.ip_rules import IpRule
from natkeep.plan.move import Move, Site
from natkeep.plan.nft import Key, Object, Rule, number_alike, split
from natkeep.plan.observation import Gate, Observation, SeenEntry
from natkeep.plan.path import Route, SourceRule, Way
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.relay import RelayFacts, Setting
from natkeep.plan.repair import LoadObjects, Patch, RestoreRoutes, StopCounting
from natkeep.plan.roles import Role
from natkeep.plan.silence import server_keys
from natkeep.plan.step_undo import (
    CloseGates,
    DeleteEntries,
    EndHolder,
    LowerLoopback,
    PutLockBack,
    RemoveAddress,
    RemoveGate,
    RemoveListeners,
    RemoveOwnedTable,
    RemoveRoute,
    RemoveRules,
    RemoveUndone,
    RestoreForwarding,
    Undo,
    Unload,
    undo_of,
)
from natkeep.plan.steps import (
    AddAddress,
    AddRoute,
    AddRules,
    DropUndone,
    FillSet,
    GuardSite,
    HoldListeners,
    HoldSegments,
    InsertEntries,
    InstallGate,
    InstallResets,
    InstallTranslation,
    Loads,
    OpenGate,
    PassKept,
    Plan,
    Prior,
    PurgeEntries,
    RaiseLoopback,
    SendResets,
    Step,
    SwitchForwarding,
    TakeOverLock,
)
from natkeep.plan.strays import SeenTable
from natkeep.plan.translation import NOTHING_SPECIAL, Surroundings, Translation
from natkeep.plan.tuples import NO_CONNECTIONS, Address, Connections, Endpoint, FourTuple
from natkeep.plan.wanted import objects_of, shared_of, split_opening, want


@dataclass
class FakeSite:
    """What one namespace holds; equal for equal content.

    sockets: inbound tuples of living sockets; locks: CRIU's tables and what they lock; waiting:
    the listeners there are, and who has not been accepted yet at each; holds: those of quiesces;
    resets: of each move that resets, whether it does so yet; loaded: the steps whose text is in the
    tables, broken: those of its things that somebody else has removed; holders: of which moves;
    lost: notes of routes that are gone; made: things that were loaded without a step; marked: the
    addresses that a step has put there; undone: what is dropped, since a move was undone.
    settings: what moves have switched on. bound, silences: as an Observation has them.
    """

    gates: dict[str, Gate] = field(default_factory=dict)
    sets: dict[str, Connections] = field(default_factory=dict)
    addresses: set[Address] = field(default_factory=set)
    loopback: bool = False
    entries: dict[FourTuple, FourTuple] = field(default_factory=dict)
    sockets: set[FourTuple] = field(default_factory=set)
    locks: dict[str, set[FourTuple]] = field(default_factory=dict)
    waiting: dict[Endpoint, int] = field(default_factory=dict)
    taken: frozenset[Endpoint] = frozenset()
    holds: dict[str, tuple[Endpoint, ...]] = field(default_factory=dict)
    resets: dict[str, Gate] = field(default_factory=dict)
    holders: set[str] = field(default_factory=set)
    guards: set[str] = field(default_factory=set)
    loaded: list[Step] = field(default_factory=list)
    broken: set[Key] = field(default_factory=set)
    lost: list[str] = field(default_factory=list)
    made: set[Key] = field(default_factory=set)
    marked: set[Address] = field(default_factory=set)
    rules: set[IpRule] = field(default_factory=set)
    routes: set[Address] = field(default_factory=set)
    undone: set[FourTuple] = field(default_factory=set)
    settings: set[str] = field(default_factory=set)
    bound: set[bytes] = field(default_factory=set)
    silences: dict[bytes, float] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> FakeSite:
        """The containers anew; what is in them cannot change, so it need not be copied."""
        made = FakeSite(**{name: copy.copy(value) for name, value in vars(self).items()})
        made.locks = {table: {*locked} for table, locked in self.locks.items()}
        return made

    def drop_rules(self, old: Address) -> None:
        """Those for *old* go, and with the last of its IP version what all need."""
        self.rules = {rule for rule in self.rules if rule.to != old}
        needed = {rule.version for rule in self.rules if rule.to is not None}
        self.rules = {rule for rule in self.rules if rule.version in needed}


class FakeKernel:
    """Set `fail_at` to the number of the apply (counted from 0) that must fail.

    die_at: likewise, but the process is "killed" after the change and before apply returns.
    """

    def __init__(self) -> None:
        self.sites: dict[str, FakeSite] = {}
        self.opened: set[Site] = set()
        self.fail_at: int | None = None
        self.die_at: int | None = None
        self.applied = 0
        self.surroundings = NOTHING_SPECIAL
        self.told: set[FourTuple] = set()
        self.shown: list[Shown] = []
        self.known: list[Step] = []
        self.needs: dict[Address, Needs] = {}
        self.living: dict[str, tuple[int, str]] = {}
        self.arriving: dict[str, Connections] = {}
        self.owners: dict[Address, str] = {}
        self.wire: dict[FourTuple, FourTuple] = {}
        self.ways: tuple[Way, ...] = ()
        self.source: Address | None = None
        self.unreached: set[Address] = set()
        self.relay: RelayFacts | None = None

    def open_sites(self, sites: Iterable[Site], known: dict[Site, Identity] | None = None) -> None:
        """Every name is a namespace here."""
        for site in sites:
            self.sites.setdefault(site.netns, FakeSite())
            self.opened.add(site)

    def close_sites(self, sites: Iterable[Site]) -> None:
        """Let go of the namespaces of *sites*; those that are not open are passed over."""
        self.opened -= {*sites}

    def identity(self, site: Site) -> Identity:
        """A number for each name."""
        if site not in self.opened:
            raise KeyError(site)
        return Identity(0, list(self.sites).index(site.netns))

    def ask(self, site: Site, question: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Each question has a method of its name here."""
        answer: T = getattr(self, question.__name__)(site, *args, **kwargs)
        return answer

    def global_addresses(self, site: Site, version: int) -> tuple[Address, ...]:
        """What a test put there."""
        here = self.sites[site.netns].addresses
        return tuple(sorted(a for a in here if a.version == version))

    def find_source(self, site: Site, new: Address, olds: frozenset[Address]) -> Address | None:
        """What a test put there."""
        return self.source

    def survey_relay(
        self, site: Site, translation: Translation, sources: tuple[Address, ...]
    ) -> RelayFacts:
        """Nothing in the way, or what a test says."""
        return self.relay or RelayFacts(True, frozenset(sources), range(32768, 61000), None, 0)

    def count_living(
        self, site: Site, table: SeenTable, strays: frozenset[str], olds: frozenset[Address]
    ) -> dict[str, tuple[int, str]]:
        """What a test put there."""
        return {name: of for name, of in self.living.items() if name in strays or not name}

    def find_arriving(
        self, site: Site, move_id: str, olds: frozenset[Address], heard_alone: bool = False
    ) -> Connections:
        """What a test put there."""
        return self.arriving.get(site.netns, NO_CONNECTIONS)

    def has_undone(self, site: Site) -> bool:
        """Whether undos have left something."""
        return bool(self.sites[site.netns].undone)

    def read_undone(self, site: Site) -> Connections:
        """What undos have left."""
        return Connections.of(self.sites[site.netns].undone)

    def find_needs(
        self, site: Site, old: Address, move_id: str, own: Connections, *others: object
    ) -> Needs:
        """What a test put there, and no more than its own moves know of each other."""
        return self.needs.get(old, Needs())

    def find_own(self, site: Site, old: Address, own: Connections) -> Connections:
        """None: no sockets are here."""
        return NO_CONNECTIONS

    def find_owner(self, site: Site, address: Address, *others: Address) -> str:
        """What a test says."""
        return self.owners.get(address, "")

    def find_idle(self, site: Site) -> tuple[Address, ...]:
        """Nothing: no address says who has put it there."""
        return ()

    def needs_loopback(self, site: Site, besides: frozenset[Address]) -> bool:
        """Whether a step has put an address there, or a test says that one is needed."""
        put = {step.address for step in self.known if isinstance(step, AddAddress)}
        there = self.sites[site.netns].addresses & put
        return bool((there | self.needs.keys()) - besides)

    def find_at_home(self, site: Site, olds: frozenset[Address]) -> frozenset[Address]:
        """Those that a test put there, and no step."""
        put = {step.address for step in self.known if isinstance(step, AddAddress)}
        return olds & (self.sites[site.netns].addresses - put)

    def gather_facts(self, site: Site) -> Facts:
        """A machine about which there is nothing to say."""
        return Facts(True, True, True, True, True, True, 0, 1000, 0, False, (), (), (), False)

    def read_at_gateway(self, site: Site, *about: object) -> tuple[Way, ...]:
        """What a test put there."""
        return self.ways

    read_at_destination = read_at_gateway

    def read_ways(
        self, site: Site, addresses: Iterable[bytes]
    ) -> tuple[tuple[Address, Route], ...]:
        """Everything is, but what a test put there."""
        found = map(ip_address, sorted(addresses))
        return tuple((to, Route("none" if to in self.unreached else "unicast")) for to in found)

    def _follow_at(self, site: Site, translation: object, *run_id: str | None) -> list[object]:
        """No rules of others are here."""
        return []

    _find_marked_apart = _follow_at

    def asks_for_ports(self, site: Site, *version: int) -> bool:
        """No policy rule."""
        return False

    has_legacy_tables = asks_for_ports

    def read_entrances(self, site: Site, *about: object) -> dict[Address, str]:
        """None is known."""
        return {}

    def read_virtual_servers(self, site: Site) -> str:
        """None."""
        return ""

    def read_address_state(self, site: Site, address: Address) -> str:
        """It can be used."""
        return ""

    def read_source_rules(self, site: Site, version: int) -> tuple[SourceRule, ...]:
        """None."""
        return ()

    def find_not_forwarding(self, site: Site, *about: object) -> tuple[str, ...]:
        """It forwards."""
        return ()

    def read_local(self, site: Site, version: int) -> frozenset[Address]:
        """No address that matters."""
        return frozenset()

    def device_names(self, site: Site) -> frozenset[str]:
        """Always the same."""
        return frozenset({"lo", "eth0"})

    def can_bind(self, site: Site, address: Address, device: str | None) -> bool:
        """Whether it is an address that a test, or a step, put there."""
        return address in self.sites[site.netns].addresses

    def is_taken_of_udp(self, site: Site, end: Endpoint) -> bool:
        """Whether a test has put a socket of UDP there."""
        return end in self.sites[site.netns].taken

    def find_translated(
        self, site: Site, connections: Connections, protocol: Protocol = TCP
    ) -> tuple[tuple[FourTuple, FourTuple], ...]:
        """What a test says that the host does."""
        return tuple((one, self.wire[one]) for one in connections if one in self.wire)

    def find_listeners(self, site: Site, olds: frozenset[Address]) -> tuple[Endpoint, ...]:
        """What a test put there."""
        listeners = self.sites[site.netns].waiting
        return tuple(e for e in listeners if e.address in olds or e.address.is_unspecified)

    def list_sockets(self, site: Site) -> list[Shown]:
        """What a test put there."""
        return list(self.shown)

    def count_waiting(self, site: Site, listeners: tuple[Endpoint, ...]) -> dict[Endpoint, int]:
        """What a test put there; one is accepted at each look."""
        here = self.sites[site.netns].waiting
        found = {end: here[end] for end in listeners if here.get(end)}
        here.update({end: number - 1 for end, number in found.items()})
        return found

    def look_around(self, move: Move, connections: Connections) -> Surroundings:
        """What a test put there."""
        return self.surroundings

    def check(self, step: Step) -> None:
        """NatkeepError when *step* could not work."""
        if isinstance(step, InstallGate) and step.move_id in self.sites[step.site.netns].gates:
            raise RefusedError(f"{step.site}: move {step.move_id} is prepared there already")

    def apply(self, step: Step, remember: Remember) -> Prior:
        """Do *step* on a copy, then swap; KernelError at `fail_at`."""
        number, self.applied = self.applied, self.applied + 1
        changed = copy.deepcopy(self.sites[step.site.netns])
        prior = _find_prior(changed, step)
        self.known = [*(known for known in self.known if known != step), step]
        remember(prior)
        if number == self.fail_at:
            raise KernelError(f"{step.site}: told to fail")
        _change(changed, step)
        if isinstance(step, HoldListeners):  # again, it holds these listeners and no others
            changed.loaded = [s for s in changed.loaded if type(s) is not type(step)]
        if step not in changed.loaded and _keys_of(step):
            changed.loaded.append(step)
        changed.broken -= set(_keys_of(step))
        self.sites[step.site.netns] = changed
        if isinstance(step, SendResets) and not prior.present:
            self.told.update(step.questions())  # which nothing undoes
        if number == self.die_at:
            raise KilledError
        return prior

    def mend(self, patch: Patch, remember: Remember) -> None:
        """What is missing of a step is there again, or the step is done again."""
        if not isinstance(patch, LoadObjects | RestoreRoutes | StopCounting):
            self.apply(patch, remember)
            return
        number, self.applied = self.applied, self.applied + 1
        remember(Prior())
        if number == self.fail_at:
            raise KernelError(f"{patch.site}: told to fail")
        _load(self.sites[patch.site.netns], patch)
        if number == self.die_at:
            raise KilledError

    def find_lost_routes(self, site: Site, noted: str) -> tuple[str, ...]:
        """What a test put there."""
        return tuple(self.sites[site.netns].lost)

    def find_missing(self, site: Site, plan: Plan) -> frozenset[Key]:
        """As `observe` has it."""
        seen = self.observe(site, plan)
        return seen.gone | seen.shut

    def find_left(self, site: Site, move_id: str) -> tuple[str, ...]:
        """The gates and holds that bear the id."""
        return self.read_table(site).names_of(move_id)

    def find_undone(self, site: Site, move_id: str, undos: tuple[nft.Undo, ...]) -> tuple[str, ...]:
        """The same."""
        return self.find_left(site, move_id)

    def read_table(self, site: Site) -> SeenTable:
        """The gates and holds, as the chains that they would be."""
        here = self.sites[site.netns]
        names = {f"gate-{move_id}" for move_id in here.gates}
        names |= {f"hold-{move_id}" for move_id in here.holds}
        return SeenTable(tuple(sorted(names)), there=bool(names))

    def clear_strays(
        self, site: Site, known: frozenset[str], olds: frozenset[Address], *, sure: bool
    ) -> None:
        """What no *known* move owns goes."""
        here = self.sites[site.netns]
        for move_id in self.read_table(site).ids() - known:
            here.gates.pop(move_id, None)
            here.holds.pop(move_id, None)
            for name in [n for n in here.sets if n.rpartition("-")[0].endswith(f"-{move_id}")]:
                del here.sets[name]
            here.loaded = [s for s in here.loaded if getattr(s, "move_id", None) != move_id]
        if not here.loaded:
            here.broken.clear()
            here.made.clear()

    def pack_open(self, site: Site, step: OpenGate) -> None:
        """Nothing: there is no netlink here."""

    def pack_gate_hook_removal(self, site: Site) -> bytes:
        """Nothing: there is no netlink here."""
        return b""

    def unhook_gates(self) -> bool:
        """Nothing: no packet comes by here."""
        return True

    def staying(self, sites: Iterable[Site]) -> AbstractContextManager[None]:
        return nullcontext()

    def note_absent(self, site: Site, some: Iterable[Connections]) -> None:
        """Nothing is slow here."""

    def apply_many(self, steps: Sequence[Step], remember: RememberMany) -> list[Prior]:
        return [
            self.apply(step, lambda prior, place=place: remember({place: prior}))  # type: ignore[misc]
            for place, step in enumerate(steps)
        ]

    def revert_many(self, site: Site, undos: Sequence[tuple[Undo, Prior]]) -> None:
        for undo, prior in undos:
            self.revert(site, undo, prior)

    def revert(self, site: Site, undo: Undo, prior: Prior) -> None:
        """Take back what a step made; already gone is fine."""
        steps = [s for s in self.known if s.site == site and _is_undone_by(undo, s)]
        if steps:
            self.undo_step(steps[-1], prior, undo)
        else:
            self._take_back(site, undo, prior)

    def undo_step(self, step: Step, prior: Prior, undo: Undo | None = None) -> None:
        """The same of a step that this kernel has seen: for tests that ask for its kind."""
        self._take_back(step.site, undo or undo_of(step), prior)

    def _take_back(self, site: Site, undo: Undo, prior: Prior) -> None:
        here = self.sites[site.netns]
        if prior.present:
            return
        match undo:
            case RemoveGate() | Unload() | RemoveListeners():
                _unload(here, undo.objects)
            case LowerLoopback():
                here.loopback = False
            case RemoveAddress():
                here.addresses.discard(undo.address)
                here.marked.discard(undo.address)
            case RemoveRoute():
                here.routes.discard(undo.address)
            case RemoveRules():
                here.rules -= {*undo.rules}
                for old in {*undo.olds} - here.marked:
                    here.drop_rules(old)
            case DeleteEntries():
                for original in undo.outer:
                    here.entries.pop(original, None)
            case EndHolder():
                here.holders.discard(undo.move_id)
            case RemoveOwnedTable():
                here.guards.discard(undo.move_id)
            case PutLockBack() if prior.facts:
                here.locks.setdefault(undo.lock.table, set()).update(undo.connections)
            case RestoreForwarding():
                passing = (one for one in here.loaded if isinstance(one, PassKept))
                others = [one for one in passing if one.move_id != undo.move_id]
                if not any(Setting(undo.setting) in one.settings for one in others):
                    here.settings.discard(undo.setting)
            case RemoveUndone():
                here.undone -= {*undo.connections}
            case CloseGates():
                for kind, _, move_id in (chain.partition("-") for chain in undo.chains):
                    gates = here.resets if kind == "reset" else here.gates
                    if kind in ("gate", "reset") and move_id in gates:
                        gates[move_id] = Gate.CLOSED
            case _:
                pass
        here.loaded = [other for other in here.loaded if not _is_undone_by(undo, other)]
        if not here.loaded:
            here.broken.clear()
            here.made.clear()

    def snapshot(self, site: Site) -> FakeSnapshot:
        """As quick as looking closely."""
        return FakeSnapshot(self)

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now."""
        here, move_id = self.sites[site.netns], plan.move.id
        translations = [t for t in plan.translations if t.site == site]
        lost = [reset for reset in plan.resets if reset.site == site]
        inserted = [s.translation for s in plan.prepare if isinstance(s, InsertEntries)]
        seen = {t.number: tuple(_see(here, t)) for t in inserted if t.site == site}
        prepared, opened = split_opening(plan, site)
        there = {key for step in here.loaded for key in _keys_of(step)} | here.made
        there -= here.broken
        return Observation(
            gone=prepared - there,
            shut=opened - there,
            loopback=here.loopback,
            guarded=not plan.move.guard or move_id in here.guards,
            sockets=_find_sockets(here, site, plan, TCP),
            datagrams=_find_sockets(here, site, plan, UDP) or NO_CONNECTIONS,
            lingers=10.0,
            gate=here.gates.get(move_id, Gate.ABSENT),
            missing={
                name: len(connections) - len(here.sets.get(name, NO_CONNECTIONS))
                for t in translations
                for name, connections in kept_sets.sets_of(move_id, t).items()
            }
            | {
                name: len(reset.connections) - len(here.sets.get(name, NO_CONNECTIONS))
                for reset in lost
                for name in (filters.reset_set(move_id, reset.number),)
            },
            addresses=plan.olds_at(site) & here.addresses,
            entries=seen,
            alive=_count_alive(here, site, plan, seen),
            bound=here.bound & frozenset(server_keys(plan.move).values()),
            silences={**here.silences},
            holds=move_id in here.holds,
            back=_count_back(here, site, translations),
            off=frozenset(
                step.setting.name
                for step in plan.prepare
                if isinstance(step, SwitchForwarding) and step.site == site
                if step.setting.name not in here.settings
            ),
            lacking=tuple(
                rule
                for step in plan.prepare
                if isinstance(step, AddRules) and step.site == site
                for rule in step.rules()
                if rule not in here.rules
            ),
        )


@dataclass
class FakeSnapshot:
    """What the kernel itself shows."""

    kernel: FakeKernel

    def observe(self, site: Site, plan: Plan) -> Observation:
        """What *site* shows of *plan* now."""
        return self.kernel.observe(site, plan)

    def find_lost_routes(self, site: Site, noted: str) -> tuple[str, ...]:
        """What a test put there."""
        return self.kernel.find_lost_routes(site, noted)

    def close(self) -> None:
        """There is nothing to let go of."""


# Thousands of tests ask it of the same few steps: computed anew, it is a third of their time.
_undo_of = lru_cache(maxsize=1024)(undo_of)


def _is_undone_by(undo: Undo, other: Step) -> bool:
    """Whether *other* goes with it: it is its step, or was before more connections came."""
    theirs = _undo_of(other)
    if isinstance(undo, RemoveGate | Unload) and type(theirs) is type(undo) and undo.objects:
        return set(theirs.objects) <= set(undo.objects) and bool(theirs.objects)
    return theirs == undo


def _unload(here: FakeSite, objects: Iterable[nft.Undo]) -> None:
    for one in objects:
        kind, _, move_id = one.name.partition("-")
        if one.kind == "set":
            here.sets.pop(one.name, None)
        elif one.kind == "chain" and kind in ("gate", "reset", "hold"):
            gates = {"gate": here.gates, "reset": here.resets, "hold": here.holds}[kind]
            gates.pop(move_id, None)  # type: ignore[attr-defined]  # each is a dictionary by id


def _count_alive(
    here: FakeSite,
    site: Site,
    plan: Plan,
    seen: dict[int, tuple[SeenEntry | None, ...]],
) -> int:
    datagrams = len(_find_sockets(here, site, plan, UDP) or ())
    if site.role == Role.SOURCE:
        return len(_find_sockets(here, site, plan, TCP) or ()) + datagrams
    return sum(1 for of_one in seen.values() for entry in of_one if entry) + datagrams


def _count_back(here: FakeSite, site: Site, translations: Iterable[Translation]) -> int:
    kept = (inbound for t in translations if site.row.relays for inbound in t.kept)
    return sum(1 for inbound in kept if inbound in here.sockets)


@lru_cache(maxsize=1024)
def _keys_of(step: Step) -> tuple[Key, ...]:
    """The objects that a step has in the tables; those of two steps are not told apart."""
    shared = [key for key, _ in shared_of(step)] if isinstance(step, Loads) else []
    return (*shared, *number_alike(one.key() for one in split(objects_of(step))))


def _load(here: FakeSite, patch: Patch) -> None:
    made: list[Object] = []
    if isinstance(patch, LoadObjects):
        made = [*split(patch.objects)]
    elif isinstance(patch, RestoreRoutes):
        here.lost = [note for note in here.lost if note not in patch.notes]
    keys = set(number_alike(one.key() for one in made))
    here.broken -= keys
    known = {key for step in here.loaded for key in _keys_of(step)}
    here.made |= keys - known
    for key in keys:
        if key.kind == "set" and key.name.startswith(("kept-", "outer-")):
            here.sets.setdefault(key.name, NO_CONNECTIONS)
    for move_id, gate in here.gates.items():
        chain = base_chains.gate_chain(move_id)
        if any(isinstance(one, Rule) and one.chain == chain and one.insert for one in made):
            here.gates[move_id] = Gate.OPEN
        elif gate == Gate.ABSENT:
            here.gates[move_id] = Gate.CLOSED


def _find_sockets(here: FakeSite, site: Site, plan: Plan, protocol: Protocol) -> Connections | None:
    if site.role not in (Role.DESTINATION, Role.SOURCE):
        return None
    some = (t for t in plan.translations if t.site == site and t.protocol == protocol)
    kept = (inbound for t in some for inbound in t.kept)
    return Connections.of(inbound for inbound in kept if inbound in here.sockets)


def revert_step(kernel: Kernel, step: Step, prior: Prior) -> None:
    """Undo *step* as a teardown does, by its inverse."""
    kernel.revert(step.site, undo_of(step), prior)


class KilledError(BaseException):
    """As SIGKILL would: nothing that natkeep catches."""


def _find_prior(here: FakeSite, step: Step) -> Prior:
    match step:
        case RaiseLoopback():
            return Prior(present=here.loopback)
        case AddRoute():
            return Prior(present=step.address in here.routes)
        case AddAddress():
            return Prior(present=step.address in here.addresses)
        case TakeOverLock():
            locked = here.locks.get(step.lock.table)
            return Prior(facts={} if locked is None else {"table": True})
        case SendResets():
            return Prior(present=here.resets.get(step.move_id) == Gate.OPEN)
        case OpenGate():
            return Prior(present=here.gates.get(step.move_id) == Gate.OPEN)
        case _:
            return Prior()


def _change(here: FakeSite, step: Step) -> None:
    if isinstance(step, InstallTranslation | OpenGate) and step.move_id not in here.gates:
        raise KernelError(f"{step.site}: no gate of {step.move_id}")
    match step:
        case InstallGate():
            here.gates[step.move_id] = Gate.CLOSED
            for translation in step.translations:
                for name in kept_sets.sets_of(step.move_id, translation):
                    here.sets[name] = NO_CONNECTIONS
                if translation.site.row.puts_old and translation.protocol.has_states:
                    name = base_chains.heard_set(step.move_id, translation.number)
                    here.sets[name] = NO_CONNECTIONS
        case FillSet():
            if step.name not in here.sets:
                raise KernelError(f"{step.site}: no set {step.name}")
            here.sets[step.name] = step.connections
        case RaiseLoopback():
            here.loopback = True
        case AddAddress():
            here.marked |= {step.address} - here.addresses
            here.addresses.add(step.address)
        case AddRoute():
            here.routes.add(step.address)
        case AddRules():
            here.rules |= {*step.rules()}
        case HoldListeners():
            here.holds[step.move_id] = step.listeners
        case HoldSegments():
            here.holders.add(step.move_id)
        case GuardSite():
            here.guards.add(step.move_id)
        case SwitchForwarding():
            here.settings.add(step.setting.name)
        case TakeOverLock():
            locked = here.locks.get(step.lock.table, set())
            locked -= set(step.connections)
            if not locked:
                here.locks.pop(step.lock.table, None)
        case PurgeEntries():
            for stale in stale_tuples(step.translation):
                here.entries.pop(stale, None)
        case InsertEntries():
            here.entries.update((e.original, e.reply) for e in entries(step.translation))
        case InstallResets():
            here.resets[step.move_id] = Gate.CLOSED
            for reset in step.resets:
                here.sets[filters.reset_set(step.move_id, reset.number)] = NO_CONNECTIONS
        case SendResets():
            if step.move_id not in here.resets:
                raise KernelError(f"{step.site}: nothing that {step.move_id} could open")
            here.resets[step.move_id] = Gate.OPEN
        case DropUndone():
            here.undone.update(step.arriving)
        case InstallTranslation() if step.site.row.puts_old:
            here.undone -= {tuple_ for t in step.translations for tuple_ in t.outer}
        case OpenGate():
            here.gates[step.move_id] = Gate.OPEN
            if step.delivers:
                here.holders.discard(step.move_id)


def _see(here: FakeSite, translation: Translation) -> Iterable[SeenEntry | None]:
    for entry in entries(translation):
        reply = here.entries.get(entry.original)
        yield SeenEntry(reply == entry.reply, 0, 0, True) if reply is not None else None


def chains_left(plan: Plan, seen: Observation) -> frozenset[str]:
    """The address chains in which a rule of *plan* at its first site is still there."""
    there = set(want(plan, plan.move.sites[0])) - seen.gone
    return frozenset(k.name for k in there if k.kind == "rule" and is_address_chain(k.name))
