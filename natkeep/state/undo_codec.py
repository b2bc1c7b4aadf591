"""The form of an undo in the journal: JSON values, connections by reference.

    {"kind": "address", "address": "10.2.0.10"}
    {"kind": "entries", "outer": {"of": "connections", "old": "10.2.0.10", "at": "10.3.0.20"}}

A reference means the connections of a file beside the journal (`connections` or `came`) whose local
address is `old`, with the local address `at`. What no reference gives is written out.

Rule: as state/codec.py: what is not written here is an error and never guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from natkeep.plan import nft, step_undo
from natkeep.plan.ip_rules import IpRule
from natkeep.plan.listeners import Reception
from natkeep.plan.maps import make_map
from natkeep.plan.move import Mode, Site
from natkeep.plan.protocols import TCP, UDP, Protocol
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Address, Connections, parse_address, parse_local
from natkeep.state.codec import as_flag, as_list, as_text, as_whole, lock_from_json, lock_to_json

KINDS: dict[str, type[step_undo.Undo]] = {
    "nothing": step_undo.Nothing,
    "objects": step_undo.Unload,
    "gate": step_undo.RemoveGate,
    "listeners": step_undo.RemoveListeners,
    "opening": step_undo.CloseGates,
    "loopback": step_undo.LowerLoopback,
    "address": step_undo.RemoveAddress,
    "route": step_undo.RemoveRoute,
    "rules": step_undo.RemoveRules,
    "purged": step_undo.RestoreEntries,
    "entries": step_undo.DeleteEntries,
    "datagrams": step_undo.DeleteDatagrams,
    "let-in": step_undo.ForgetListeners,
    "holder": step_undo.EndHolder,
    "owned-table": step_undo.RemoveOwnedTable,
    "lock": step_undo.PutLockBack,
    "forwarding": step_undo.RestoreForwarding,
}
_NAMES = {cls: name for name, cls in KINDS.items()}


class Files:
    """The connections in the files beside a journal, by the file's name; olds: the move's."""

    def __init__(self, olds: tuple[Address, ...], **files: Connections) -> None:
        self.olds, self.files = olds, files
        self._at: dict[tuple[str, Address], Connections] = {}

    def at(self, name: str, old: Address) -> Connections:
        """Those of a file whose local address is *old*."""
        if (name, old) not in self._at:
            self._at[name, old] = self.files[name].at(old)
        return self._at[name, old]

    def refer(self, some: Connections) -> dict[str, str]:
        """A reference to *some*, or all of them."""
        if len(some):
            at = next(iter(some)).destination.address
            for name in self.files:
                for old in self.olds:
                    found = self.at(name, old)
                    if len(found) == len(some) and (found is some or found.toward(at) == some):
                        return {"of": name, "old": str(old), "at": str(at)}
        return {"v4": some.v4.hex(), "v6": some.v6.hex()}

    def resolve(self, value: Mapping[str, Any]) -> Connections:
        """What a reference gives."""
        if "of" not in value:
            return Connections(*(bytes.fromhex(as_text(value[name])) for name in ("v4", "v6")))
        old, at = (parse_address(as_text(value[name])) for name in ("old", "at"))
        found = self.at(as_text(value["of"]), old)
        return found if at == old else found.toward(at)


def undo_to_json(one: step_undo.Undo, files: Files) -> dict[str, Any]:
    """As it stands in the journal."""
    names: tuple[str, ...] = type(one).__match_args__
    fields = {name: _FIELDS[name][0](getattr(one, name), files) for name in names}
    return {"kind": _NAMES[type(one)], **fields}


def undo_from_json(value: dict[str, Any], files: Files) -> step_undo.Undo:
    """From the journal; ValueError, KeyError or TypeError for what undo_to_json does not write."""
    cls = KINDS[as_text(value["kind"])]
    names: tuple[str, ...] = cls.__match_args__
    if set(value) != {"kind", *names}:
        raise ValueError(f"{sorted(value)} are not the fields of an undo {value['kind']}")
    return cls(**{name: _FIELDS[name][1](value[name], files) for name in names})


def _plain(value: object, _: Files) -> object:
    return value


def _write_objects(objects: tuple[nft.Undo, ...], _: Files) -> list[list[str]]:
    return [list(one) for one in objects]


def _read_objects(value: object, _: Files) -> tuple[nft.Undo, ...]:
    return tuple(nft.Undo(*map(as_text, as_list(row))) for row in as_list(value))


def _write_listeners(listeners: tuple[Reception, ...], _: Files) -> list[list[Any]]:
    return [
        [
            *(str(r.site.role), str(r.map.old_end), str(r.map.new_end), str(r.mode), [*r.ports]),
            *_name_udp(r.protocol),
        ]
        for r in listeners
    ]


def _read_listeners(value: object, _: Files) -> tuple[Reception, ...]:
    found = []
    for role, old, new, mode, ports, *named in map(as_list, as_list(value)):
        map_ = make_map(parse_local(as_text(old)), parse_local(as_text(new)))
        numbers = tuple(map(as_whole, as_list(ports)))
        protocol = _read_protocol(named)
        found.append(Reception(Site(Role(role)), 0, map_, Mode(mode), numbers, protocol))
    return tuple(found)


def _write_rules(rules: tuple[IpRule, ...], _: Files) -> list[list[Any]]:
    return [
        [str(rule.to), str(rule.source or ""), rule.sport, rule.dport, *_name_udp(rule.protocol)]
        for rule in rules
    ]


def _read_rules(value: object, _: Files) -> tuple[IpRule, ...]:
    found = []
    for to, source, sport, dport, *named in map(as_list, as_list(value)):
        old, at = parse_address(as_text(to)), as_text(source)
        peer = parse_address(at) if at else None
        ports, protocol = (as_whole(sport), as_whole(dport)), _read_protocol(named)
        found.append(IpRule(old.version, old, peer, *ports, protocol=protocol))
    return tuple(found)


def _name_udp(protocol: Protocol) -> list[str]:
    """What stands behind what is not TCP's; the first natkeeps knew no other."""
    return [] if protocol == TCP else [protocol.name]


def _read_protocol(named: list[object]) -> Protocol:
    if named not in ([], [UDP.name]):
        raise ValueError(f"{named!r} is no protocol")
    return UDP if named else TCP


_CONNECTIONS = (lambda some, files: files.refer(some), lambda value, files: files.resolve(value))
_FIELDS: dict[str, tuple[Callable[[Any, Files], Any], Callable[[Any, Files], Any]]] = {
    "objects": (_write_objects, _read_objects),
    "part": (_plain, lambda value, _: as_text(value)),
    "chains": (lambda names, _: [*names], lambda value, _: tuple(map(as_text, as_list(value)))),
    "move_id": (_plain, lambda value, _: as_text(value)),
    "setting": (_plain, lambda value, _: as_text(value)),
    "address": (lambda one, _: str(one), lambda value, _: parse_address(as_text(value))),
    "olds": (
        lambda some, _: [str(one) for one in some],
        lambda value, _: tuple(parse_address(as_text(text)) for text in as_list(value)),
    ),
    "rules": (_write_rules, _read_rules),
    "listeners": (_write_listeners, _read_listeners),
    "outer": _CONNECTIONS,
    "kept": _CONNECTIONS,
    "connections": _CONNECTIONS,
    "renames": (_plain, lambda value, _: as_flag(value)),
    "lock": (lambda lock, _: lock_to_json(lock), lambda value, _: lock_from_json(value)),
}
