"""Puts rules in front of `lookup local`, and takes them away again (plan/ip_rules.py says why).

A new rule comes to stand behind those of its own preference, and `local` has 0, the lowest. So ours
are added behind it, then `local` once more, and then the first `local` is deleted: it is missing at
no moment, and at the end, when ours have gone, all is as it was. A rule that has to stand in front
of one that is there already is added in the same way.

Rule: ours are told by their protocol, 0xc1 and above, a number for each shape of a rule: the kernel
deletes the first rule that has what a request names, so a rule of another shape must not have it.
Each family has its own. All functions act in the namespace that the calling thread is in.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from glob import glob
from ipaddress import ip_address
from typing import NamedTuple

from natkeep import faultpoints
from natkeep.errors import RefusedError
from natkeep.kernel import fib_rules as fib
from natkeep.kernel import rtnetlink, sock_diag, sources
from natkeep.kernel.interface import Driver, Place, Remember
from natkeep.kernel.netlink import (
    NETLINK_ROUTE,
    NLM_F_CREATE,
    Netlink,
    attribute,
    attributes,
)
from natkeep.plan.ip_rules import HERE, LOOPBACK, SOURCES, IpRule
from natkeep.plan.nft import FAMILIES
from natkeep.plan.protocols import TCP, UDP
from natkeep.plan.step_undo import RemoveRules
from natkeep.plan.steps import AddRules, Prior
from natkeep.plan.tuples import Address, Endpoint

_LOOK_UP, _GOTO_RULE, _NOTHING = 1, 2, 3
_TABLE_LOCAL = 255
_FIND_SADDR = 0x10000  # FIB_RULE_FIND_SADDR
_FIRST = 0xC1
_SHAPES = 1 << 4
_EVERYWHERE, _BOUND = 9, 10
_LISTENING = 10  # TCP_LISTEN


class _Standing(NamedTuple):
    """A rule as the kernel shows it; ours: what it is, if it is one of ours."""

    body: bytes
    preference: int
    is_local: bool
    ours: IpRule | None
    is_target: bool


class _Rules:
    """The rules of an IP version, in their order, and a socket to change them by."""

    def __init__(self, netlink: Netlink, version: int) -> None:
        self._netlink, self._version = netlink, version
        self.standing = [_read(answer, version) for answer in fib.dump_rules(netlink, version)]

    def local(self) -> _Standing | None:
        """The rule by which all packets are asked for local addresses."""
        return next((one for one in self.standing if one.is_local), None)

    def find(self) -> frozenset[IpRule]:
        """Ours that do their work: in front of `local`, and those that stay in front of others."""
        found: set[IpRule] = set()
        passed: set[Address | None] = set()
        for one in self.standing:
            if one.is_local:
                break
            if one.ours is None:
                continue
            if not one.ours.passes and (one.ours.to in passed or (one.ours.mark and passed)):
                continue
            if one.ours.sources and not sources.is_there(self._netlink, one.ours.to):
                continue
            found.add(one.ours)
            if one.ours.passes:
                passed.add(one.ours.to)
        return frozenset(found)

    def add(self, wanted: Sequence[IpRule]) -> None:
        """Those of *wanted* that are not there; nothing where no rule looks table local up."""
        local = self.local()
        there = self.find()
        new = [rule for rule in dict.fromkeys(wanted) if rule not in there]
        if local is None or not new:
            return
        behind = {rule.to for rule in new if not rule.passes}
        every = any(rule.mark for rule in new)
        passing = [rule for rule in there if rule.passes and (every or rule.to in behind)]
        new.sort(key=lambda rule: (rule.passes, rule.sources))
        target = local.preference + 1
        if not any(one.is_target for one in self.standing):
            self._request(fib.NEWRULE, _pack_target(self._version, target))
        added = [_pack(rule, local.preference) for rule in (*new, *passing)]
        for body in (*added, local.body):
            self._request(fib.NEWRULE, body)
            faultpoints.reach("rule-added")
        # Those that were there before are behind the new ones now; of each the first is deleted.
        ours = {*new, *passing}
        for one in self.standing:
            if one.ours in ours or one.body == local.body:
                self._request(fib.DELRULE, one.body)

    def remove(self, rules: Iterable[IpRule], olds: Iterable[Address]) -> None:
        """Take these away, all for *olds*, and with the last what all need; gone is fine."""
        gone, addresses = {*rules}, {*olds}
        ours = [one for one in self.standing if one.ours is not None or one.is_target]
        going = [one for one in ours if one.ours in gone or (one.ours and one.ours.to in addresses)]
        if not any(one.ours and one.ours.to for one in ours if one not in going):
            going = ours
            # One more than there was is of an addition that was killed in the middle.
            locals_ = [one for one in self.standing if one.is_local] if ours else []
            going += [one for one in locals_[1:] if one.body == locals_[0].body]
        for one in going:
            self._request(fib.DELRULE, one.body)

    def _request(self, type_: int, body: bytes) -> None:
        try:
            list(self._netlink.request(type_, NLM_F_CREATE if type_ == fib.NEWRULE else 0, body))
        except OSError as error:
            if type_ != fib.DELRULE or error.errno != errno.ENOENT:
                raise


def _pack(rule: IpRule, preference: int) -> bytes:
    width = {4: 32, 6: 128}[rule.version]
    of_source = 8 if rule.source == LOOPBACK[4] else width
    lengths = (width if rule.to else 0, of_source if rule.source else 0)
    table, action = (0, _GOTO_RULE) if rule.passes else (_TABLE_LOCAL, _LOOK_UP)
    flags = _FIND_SADDR if rule.sources else 0
    body = fib.HEADER.pack(fib.FAMILY[rule.version], *lengths, 0, table, action, flags)
    body += attribute(fib.DST, rule.to.packed) if rule.to else b""
    body += attribute(fib.SRC, rule.source.packed) if rule.source else b""
    sent = rule.sources or (rule.passes and not rule.everywhere)
    body += attribute(fib.IIFNAME, b"lo\0") if sent else b""
    body += attribute(fib.GOTO, _number(preference + 1)) if rule.passes else b""
    body += attribute(fib.TABLE, _number(SOURCES)) if rule.sources else b""
    body += attribute(fib.MARK, _number(rule.mark)) if rule.mark else b""
    body += attribute(fib.MASK, _number(HERE)) if rule.mark == HERE else b""
    if rule.sport or rule.dport:
        body += attribute(fib.IP_PROTO, bytes([rule.protocol.number]))
    for type_, port in ((fib.SPORT, rule.sport), (fib.DPORT, rule.dport)):
        body += attribute(type_, struct.pack("=HH", port, port)) if port else b""
    shape = bool(rule.source) + 2 * bool(rule.sport) + 4 * bool(rule.dport)
    shape = _EVERYWHERE if rule.everywhere else _BOUND if rule.bound else shape
    return _finish(body, preference, shape)


def _pack_target(version: int, preference: int) -> bytes:
    body = fib.HEADER.pack(fib.FAMILY[version], 0, 0, 0, 0, _NOTHING, 0)
    return _finish(body, preference, 8)


def _finish(body: bytes, preference: int, shape: int) -> bytes:
    protocol = attribute(fib.PROTOCOL, bytes([_FIRST + shape]))
    return body + attribute(fib.PRIORITY, _number(preference)) + protocol


def _number(value: int) -> bytes:
    return struct.pack("=I", value)


def _read(answer: bytes, version: int) -> _Standing:
    _, to_length, from_length, tos, _, action, flags = fib.HEADER.unpack_from(answer)
    found = attributes(answer[fib.HEADER.size :])
    table, preference = (
        int.from_bytes(found.get(type_, b""), sys.byteorder) for type_ in (fib.TABLE, fib.PRIORITY)
    )
    plain = not (to_length or from_length or tos or flags or any(t in found for t in fib.SELECTS))
    is_local = action == _LOOK_UP and table == _TABLE_LOCAL and plain
    protocol = found.get(fib.PROTOCOL, b"\0")[0] - _FIRST
    if not 0 <= protocol < _SHAPES:
        return _Standing(answer, preference, is_local, None, False)
    if action == _NOTHING:
        return _Standing(answer, preference, False, None, True)
    to, source = (ip_address(found[t]) if t in found else None for t in (fib.DST, fib.SRC))
    mark = int.from_bytes(found.get(fib.MARK, b""), sys.byteorder)
    sport, dport = (struct.unpack("=HH", found.get(t, bytes(4)))[0] for t in (fib.SPORT, fib.DPORT))
    everywhere = action == _GOTO_RULE and fib.IIFNAME not in found
    of_udp = found.get(fib.IP_PROTO) == bytes([UDP.number])
    shape = everywhere, protocol == _BOUND, UDP if of_udp else TCP
    ours = IpRule(version, to, source, sport, dport, mark, *shape)
    return _Standing(answer, preference, False, ours, False)


# ---- asked and changed ---------------------------------------------------------------------------


def find_standing(version: int) -> frozenset[IpRule] | None:
    """Those of ours that stand where they have to; None where the kernel has no policy routing."""
    with Netlink(NETLINK_ROUTE) as netlink:
        rules = _Rules(netlink, version)
        return None if rules.local() is None else rules.find()


def add(rules: Iterable[IpRule]) -> None:
    """Add those that are not there; OSError when the kernel refuses."""
    wanted = [*rules]
    with Netlink(NETLINK_ROUTE) as netlink:
        for version in FAMILIES:
            some = [rule for rule in wanted if rule.version == version]
            for old in {rule.to for rule in some if rule.sources and rule.to}:
                sources.add(netlink, old)
            if some:
                _Rules(netlink, version).add(some)


def remove(rules: Iterable[IpRule], olds: Iterable[Address] = ()) -> None:
    """Take *rules* away, and what leads past table local for *olds*; gone is fine."""
    wanted, addresses = [*rules], [*olds]
    with Netlink(NETLINK_ROUTE) as netlink:
        for version in FAMILIES:
            some = [rule for rule in wanted if rule.version == version]
            gone = [old for old in addresses if old.version == version]
            if some or gone:
                _Rules(netlink, version).remove(some, gone)
            for old in gone if version == 6 else ():
                sources.remove(netlink, old)


def find_olds() -> frozenset[Address]:
    """The addresses that rules of ours lead past table local for."""
    return frozenset(
        rule.to
        for version in FAMILIES
        for rule in find_standing(version) or ()
        if rule.passes and rule.to is not None
    )


def _name(inode: int) -> str:
    """The command that has that socket, as far as /proc tells."""
    for path in glob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):  # a process that has ended meanwhile
            if os.readlink(path) == f"socket:[{inode}]":
                with open(f"{path.partition('/fd/')[0]}/comm", encoding="utf-8") as file:
                    return f"{file.read().strip()}, "
    return ""


class RulesDriver(Driver[AddRules]):
    """The rules of a move; what leads past table local stays as long as OLD is on lo."""

    def check(self, at: Place, step: AddRules) -> None:
        """RefusedError where the kernel has no such rules and something here talks with OLD."""
        lacking = {old for old in step.olds if find_standing(old.version) is None}
        for inode, _, state, local, peer, *_ in sock_diag.list_sockets() if lacking else ():
            if peer is None or local is None or peer[0] not in lacking:
                continue
            if state != _LISTENING and not step.keeps(local, peer):
                raise RefusedError(
                    f"{at.site}: this host talks with OLD: {_name(inode)}{Endpoint(*peer)}",
                    hint="its kernel has no policy routing, so that would end: close it before",
                )

    def apply(self, at: Place, step: AddRules, remember: Remember) -> Prior:
        """Add those that are not there."""
        prior = Prior()
        remember(prior)
        add(step.rules())
        for old in {rule.to for rule in step.staying if rule.to and rule.to.version == 6}:
            rtnetlink.refresh_cached_routes(old)
        return prior

    def revert(self, at: Place, undo: RemoveRules, prior: Prior) -> None:
        """Remove them; what leads past table local, too, unless a move has OLD on lo still."""
        on_lo = rtnetlink.marked_addresses()
        remove(undo.rules, [old for old in undo.olds if old.packed not in on_lo])
