"""What rules of others do to a packet: their base chains of one hook followed, rule by rule.

Where a rule asks what is not known of the packet (or is not understood), it may match or not, and
both are followed: what is found then is not *sure*.

Rule: kernel/other_rules.py reads them. This file must never look at a machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from ipaddress import ip_address
from typing import NamedTuple

from natkeep.plan.criu_lock import CRIU_MARK, NAMESPACE_CHAIN, table_name
from natkeep.plan.tuples import Endpoint, FourTuple
from natkeep.values import dataclass

NEW, ESTABLISHED, UNTRACKED = 8, 2, 64
"""NF_CT_STATE_BIT of what conntrack calls a packet."""

_DEPTH = 16  # NFT_JUMP_STACK_SIZE
_TRANSLATES = frozenset({"masquerade", "snat", "dnat", "redirect"})
_ENDS = _TRANSLATES | {"drop", "queue", "tproxy", "synproxy"}


class Expression(NamedTuple):
    """One expression of a rule.

    kind: `load` (what is loaded into a register), `mask`, `cmp`, `range`, `lookup`, `set`; `do`,
    `mark` (set from a register) and `verdict`; `marked` (iptables' match), `always`, `unknown`, and
    `verdicts` for a map of them.
    """

    kind: str
    register: int
    word: str
    values: tuple[int | bytes | str, ...]


class Hook(NamedTuple):
    """Where the kernel calls a base chain; type: `filter`, `nat` or `route`."""

    name: str
    priority: int
    type: str
    drops: bool


class Chain(NamedTuple):
    """A chain's rules; hook: None where others jump to it."""

    hook: Hook | None
    rules: list[tuple[Expression, ...]]


class Ruleset(NamedTuple):
    """Chains by `FAMILY TABLE` and name."""

    chains: dict[tuple[str, str], Chain]


def without_lock(ruleset: Ruleset, run_id: str | None) -> Ruleset:
    """*ruleset* but for CRIU's lock of the dump *run_id*, which a restore of it takes away.

    In a filter table nothing tells whose it is: any chain CRIU, and rules for all but CRIU's mark.
    """
    own = None if run_id is None else f"inet {table_name(run_id)}"
    chains: dict[tuple[str, str], Chain] = {}
    for (table, name), chain in ruleset.chains.items():
        rules = chain.rules
        if table in ("ip filter", "ip6 filter"):
            rules = [] if name == NAMESPACE_CHAIN else [one for one in rules if not _locks(one)]
        if table != own:
            chains[table, name] = chain._replace(rules=rules)
    return Ruleset(chains)


def _locks(rule: tuple[Expression, ...]) -> bool:
    mark = (CRIU_MARK, CRIU_MARK.to_bytes(4, sys.byteorder))
    return any(
        one.kind in ("cmp", "marked") and one.word == "!=" and one.values[0] in mark for one in rule
    )


class Effect(NamedTuple):
    """What may be done to the packet: `masquerade`, `drop`, …; where: `FAMILY TABLE CHAIN`."""

    does: str
    where: str
    sure: bool


@dataclass(frozen=True, slots=True)
class Packet:
    """A TCP segment with data of an established connection, as it passes a hook.

    iif, oif: index and name of the devices; 0 and empty where there is none. state: what conntrack
    calls it, one of NEW, ESTABLISHED and UNTRACKED.
    """

    tuple_: FourTuple
    iif: tuple[int, str] = (0, "")
    oif: tuple[int, str] = (0, "")
    state: int = ESTABLISHED

    def load(self, what: str, at: tuple[int, ...]) -> bytes | None:
        """What an expression loads; None where it is not known."""
        version = self.tuple_.source.address.version
        if what.startswith("payload"):
            return self._payload(what, *at)
        known = {
            "iif": self.iif[0].to_bytes(4, sys.byteorder),
            "oif": self.oif[0].to_bytes(4, sys.byteorder),
            "iifname": self.iif[1].encode().ljust(16, b"\0"),
            "oifname": self.oif[1].encode().ljust(16, b"\0"),
            "nfproto": bytes([2 if version == 4 else 10]),
            "l4proto": b"\x06",
            "protocol": b"\x08\x00" if version == 4 else b"\x86\xdd",
            "mark": bytes(4),
            "ct state": self.state.to_bytes(4, sys.byteorder),
        }
        return known.get(what)

    def _payload(self, what: str, offset: int, length: int) -> bytes | None:
        source, destination = self.tuple_.source, self.tuple_.destination
        if what == "payload 2":
            ports = source.port.to_bytes(2, "big") + destination.port.to_bytes(2, "big")
            return ports[offset : offset + length] if offset + length <= 4 else None
        packed = source.address.packed + destination.address.packed
        start, protocol = (12, 9) if len(packed) == 8 else (8, 6)
        if what == "payload 1" and (offset, length) == (protocol, 1):
            return b"\x06"
        if what != "payload 1" or not start <= offset <= start + len(packed) - length:
            return None
        return packed[offset - start :][:length]


def follow(ruleset: Ruleset, hook: str, packet: Packet, types: frozenset[str]) -> list[Effect]:
    """What base chains of *hook* and of these *types* may do to *packet*, in their order."""
    based = [
        (chain.hook, table, name)
        for (table, name), chain in ruleset.chains.items()
        if chain.hook is not None and chain.hook.name == hook and chain.hook.type in types
    ]
    effects: list[Effect] = []
    for of, table, name in sorted(based, key=lambda one: one[0].priority):
        walk = _Walk(ruleset, packet, table)
        ended = walk.follow(name, sure=True, depth=0)
        if of.drops and not ended:
            walk.effects.append(Effect("drop", f"{table} {name}", walk.sure))
        effects += walk.effects
    return effects


class _Walk:
    """One base chain followed; sure: nothing may have ended it before."""

    def __init__(self, ruleset: Ruleset, packet: Packet, table: str) -> None:
        self._ruleset, self._packet, self._table = ruleset, packet, table
        self.effects: list[Effect] = []
        self.sure = True

    def follow(self, name: str, *, sure: bool, depth: int) -> bool:
        """Whether the packet's way through the base chain ends here for sure."""
        chain = self._ruleset.chains.get((self._table, name))
        if chain is None or depth > _DEPTH:
            self.sure = False
            return False
        for rule in chain.rules:
            matches = _match(rule, self._packet)
            if matches is False:
                continue
            ended = self._act(rule, name, sure=sure and matches is True, depth=depth)
            if ended == "base":
                return True
            if ended == "chain":
                return False
        return False

    def _act(self, rule: tuple[Expression, ...], name: str, *, sure: bool, depth: int) -> str:
        """What a rule that matches, or may, does: ends `base`, `chain`, or neither."""
        for each in rule:
            if each.kind == "do":
                self.effects.append(Effect(each.word, f"{self._table} {name}", sure and self.sure))
                if each.word not in _ENDS:
                    continue
                if sure and self.sure:
                    return "base"
                self.sure = False
            elif each.kind == "mark":
                value = next(
                    (one.values[0] for one in rule
                     if one.kind == "set" and one.register == each.register), b"",
                )  # fmt: skip
                number = int.from_bytes(value, sys.byteorder) if isinstance(value, bytes) else 0
                self.effects.append(
                    Effect(f"mark {number}", f"{self._table} {name}", sure and self.sure)
                )
            elif each.kind == "verdicts":
                self.sure = False
            elif each.kind == "verdict":
                return self._judge(each, name, sure=sure, depth=depth)
        return ""

    def _judge(self, verdict: Expression, name: str, *, sure: bool, depth: int) -> str:
        word, to = verdict.word, str(verdict.values[0])
        if word in ("jump", "goto"):
            before = self.sure
            self.sure = before and sure
            ended = self.follow(to, sure=True, depth=depth + 1)
            if ended and sure and before:
                return "base"
            # It came back, or was never there: what may have ended it leaves a doubt.
            self.sure = self.sure if sure else before and not self._may_end(to)
            return "chain" if word == "goto" and sure else ""
        if word in ("drop", "queue"):
            self.effects.append(Effect(word, f"{self._table} {name}", sure and self.sure))
        if word == "return":
            if not sure:
                self.sure = False
            return "chain" if sure else ""
        if sure:
            return "base"
        self.sure = False
        return ""

    def _may_end(self, name: str) -> bool:
        chain = self._ruleset.chains.get((self._table, name))
        return chain is None or any(
            each.kind in ("verdict", "verdicts") or each.word in _ENDS
            for rule in chain.rules
            for each in rule
        )


def _match(rule: tuple[Expression, ...], packet: Packet) -> bool | None:
    """Whether the rule matches; None: that is not known."""
    registers: dict[int, bytes | None] = {}
    doubt = False
    for each in rule:
        if each.kind == "load":
            at = tuple(value for value in each.values if isinstance(value, int))
            registers[each.register] = packet.load(each.word, at)
        elif each.kind == "mask":
            registers[each.register] = _mask(registers, each)
        elif each.kind == "set":
            registers[each.register] = None
        elif each.kind in _TESTS:
            found = _test(registers.get(each.register), each)
            if found is False:
                return False
            doubt = doubt or found is None
        elif each.kind == "unknown":
            doubt = True
        elif each.kind == "marked" and (each.values[0] == 0) == (each.word == "!="):
            return False  # a packet without a mark
    return None if doubt else True


_TESTS = frozenset({"cmp", "range", "lookup"})


def _mask(registers: dict[int, bytes | None], each: Expression) -> bytes | None:
    source, mask, xor = each.values
    value = registers.get(source) if isinstance(source, int) else None
    if value is None or not isinstance(mask, bytes) or not isinstance(xor, bytes):
        return None
    return bytes(v & m ^ x for v, m, x in zip(value, mask, xor, strict=False))


def _test(value: bytes | None, each: Expression) -> bool | None:
    wanted = [one for one in each.values if isinstance(one, bytes)]
    if value is None or (each.kind != "lookup" and not wanted):
        return None
    if each.kind == "lookup":
        if any(len(one) > (len(value) + 3) // 4 * 4 for one in wanted):
            return None  # of several registers
        return (value in wanted) == (each.word == "==")
    value = value[: len(wanted[0])]
    if each.kind == "range":
        return (wanted[0] <= value <= wanted[1]) == (each.word == "==")
    [one] = wanted
    return {
        "==": value == one, "!=": value != one, "<": value < one,
        "<=": value <= one, ">": value > one, ">=": value >= one,
    }[each.word]  # fmt: skip


def find_translating(effects: list[Effect]) -> Iterator[Effect]:
    """Those by which the packet would get another address or port."""
    return (effect for effect in effects if effect.does in _TRANSLATES)


def find_mark(effects: list[Effect]) -> int:
    """The mark that a packet leaves with, 0 where none is set, or where that is not sure."""
    marks = [effect for effect in effects if effect.does.startswith("mark ")]
    return int(marks[-1].does[5:]) if marks and marks[-1].sure else 0


def find_virtual(table: str, ends: frozenset[Endpoint]) -> Iterator[str]:
    """The virtual and real servers of IPVS' *table* (/proc/net/ip_vs) that are one of *ends*."""
    for line in table.splitlines():
        words = line.split()
        kind = {"TCP": "virtual", "->": "real"}.get(words[0] if words else "")
        end = _read_server(words[1]) if kind and len(words) > 1 else None
        if end in ends:
            yield f"{kind} server {end}"


def _read_server(text: str) -> Endpoint | None:
    """`0A02000A:1388`, or `[fd00:0002:…]:1388`."""
    address, _, port = text.rpartition(":")
    try:
        if address.startswith("["):
            return Endpoint(ip_address(address[1:-1]), int(port, 16))
        return Endpoint(ip_address(int(address, 16)), int(port, 16))
    except ValueError:
        return None
