"""The inverses of steps, as data: all that an undo has to know, without the step or its plan.

The journal holds them, so a later natkeep that does other steps tears a move of this one down.
What a step found before it acted (its Prior) is kept beside them: of what was there already
nothing is undone.

Rule: values only, each of a kind that `state/undo_codec.py` writes and reads, but for RemoveUndone,
which no journal holds. This file must never undo anything.
"""

from __future__ import annotations

from natkeep.plan import nft
from natkeep.plan.base_chains import ERRORS
from natkeep.plan.criu_lock import DumpLock
from natkeep.plan.ip_rules import IpRule
from natkeep.plan.listeners import Reception
from natkeep.plan.move import Mode, Site
from natkeep.plan.steps import (
    AddAddress,
    AddRoute,
    AddRules,
    DropUndone,
    ForgetCalls,
    GuardSite,
    HoldSegments,
    InsertEntries,
    InstallGate,
    InstallReception,
    InstallTranslation,
    Loads,
    OpenGate,
    PurgeEntries,
    RaiseLoopback,
    SendResets,
    Step,
    SwitchForwarding,
    TakeOverLock,
    TranslateErrors,
)
from natkeep.plan.tuples import Address, Connections
from natkeep.values import dataclass, replace


@dataclass(frozen=True, slots=True)
class Nothing:
    """What the step added goes with something else, as a set's elements with the set."""


@dataclass(frozen=True, slots=True)
class Unload:
    """Objects go from the tables; part: what they are, to the faults."""

    objects: tuple[nft.Undo, ...]
    part: str = ""


@dataclass(frozen=True, slots=True)
class RemoveGate:
    """A gate and its sets go, with the last of them the tables; olds: what it was closed for."""

    objects: tuple[nft.Undo, ...]
    olds: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class RemoveListeners:
    """The rules of these listeners go, then the entries of connections that they let in."""

    objects: tuple[nft.Undo, ...]
    listeners: tuple[Reception, ...]


@dataclass(frozen=True, slots=True)
class CloseGates:
    """What was put in front of these chains' drops goes."""

    chains: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LowerLoopback:
    """lo goes down."""


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """The address goes from lo."""

    address: Address


@dataclass(frozen=True, slots=True)
class RemoveRoute:
    """The route to the address goes from lo."""

    address: Address


@dataclass(frozen=True, slots=True)
class RemoveRules:
    """These rules of the routing policy go; those for *olds*, too, that are not on lo."""

    rules: tuple[IpRule, ...]
    olds: tuple[Address, ...]


@dataclass(frozen=True, slots=True)
class RestoreEntries:
    """The entries that a gateway had of its own come back; which, its Prior says.

    renames: they translate more than the local address.
    """

    outer: Connections
    kept: Connections
    renames: bool


@dataclass(frozen=True, slots=True)
class DeleteEntries:
    """The entries of these connections go, as they arrive at the site."""

    outer: Connections


@dataclass(frozen=True, slots=True)
class DeleteDatagrams:
    """The same of UDP."""

    outer: Connections


@dataclass(frozen=True, slots=True)
class ForgetListeners:
    """The entries of connections go that came in by these listeners."""

    listeners: tuple[Reception, ...]


@dataclass(frozen=True, slots=True)
class EndHolder:
    """The process ends that holds segments for this move."""

    move_id: str


@dataclass(frozen=True, slots=True)
class RemoveOwnedTable:
    """The process ends that owns a table for this move, and the table with it."""

    move_id: str


@dataclass(frozen=True, slots=True)
class PutLockBack:
    """CRIU's lock of these connections comes back, where its Prior says that it was."""

    lock: DumpLock
    connections: Connections


@dataclass(frozen=True, slots=True)
class RestoreForwarding:
    """A setting below /proc/sys/net/ is as its Prior says, unless another move has it on."""

    move_id: str
    setting: str


@dataclass(frozen=True, slots=True)
class RemoveUndone:
    """These tuples are not dropped any more where a move was undone; an empty table goes."""

    connections: Connections


Undo = (
    Nothing
    | Unload
    | RemoveGate
    | RemoveListeners
    | CloseGates
    | LowerLoopback
    | RemoveAddress
    | RemoveRoute
    | RemoveRules
    | RestoreEntries
    | DeleteEntries
    | DeleteDatagrams
    | ForgetListeners
    | EndHolder
    | RemoveOwnedTable
    | PutLockBack
    | RestoreForwarding
    | RemoveUndone
)

UNDONE_AGAIN = (RemoveGate, RemoveRules, RestoreEntries)
"""Undone once more when anything of their site was left: the tables go with the last gate, rules
with the address that they are for, and what is given back could be taken for entries of ours that
were left."""


def undo_of(step: Step) -> Undo:  # one line a kind of step
    """The inverse of *step*."""
    match step:
        case OpenGate() | SendResets():
            return CloseGates(tuple(dict.fromkeys(rule.chain for rule in step.rules())))
        case TranslateErrors():
            # Those in address chains go with the others of their chain.
            rules = (rule for rule in step.rules() if rule.chain == ERRORS)
            return Unload(tuple(undo for rule in rules for undo in rule.undo()))
        case Loads():
            return _unload(step)
        case RaiseLoopback():
            return LowerLoopback()
        case AddAddress():
            return RemoveAddress(step.address)
        case AddRoute():
            return RemoveRoute(step.address)
        case AddRules():
            return RemoveRules(step.staying, step.olds)
        case PurgeEntries():
            translation = step.translation
            outer, kept = translation.outer, translation.kept
            if not translation.protocol.has_states:  # whose first packet makes one anew
                return DeleteDatagrams(outer)
            # What a gateway had before was plain, of peers that have moved since as well.
            plain = translation.site.row.passes_on and not translation.carries
            return RestoreEntries(kept if plain else outer, kept, translation.renames)
        case InsertEntries():
            translation = step.translation
            inside = translation.mode == Mode.STATELESS  # what conntrack sees then
            return DeleteEntries(translation.inner if inside else translation.outer)
        case ForgetCalls():
            return ForgetListeners(_of_role(step.receptions))
        case HoldSegments():
            return EndHolder(step.move_id)
        case GuardSite():
            return RemoveOwnedTable(step.move_id)
        case TakeOverLock():
            return PutLockBack(step.lock, step.connections)
        case SwitchForwarding():
            return RestoreForwarding(step.move_id, step.setting.name)
        case DropUndone():
            return RemoveUndone(step.arriving)
    return Nothing()


def _unload(step: Loads) -> Undo:
    objects = tuple(dict.fromkeys(undo for one in step.objects() for undo in one.undo()))
    match step:
        case InstallGate():
            olds = tuple(dict.fromkeys(t.map.old for t in step.translations))
            return RemoveGate(objects, olds)
        case InstallReception():
            return RemoveListeners(objects, _of_role(step.receptions))
        case InstallTranslation():
            return Unload(objects, "translation")
    return Unload(objects)


def _of_role(listeners: tuple[Reception, ...]) -> tuple[Reception, ...]:
    """The same without what only the rules need."""
    return tuple(replace(each, site=Site(each.site.role), number=0) for each in listeners)
