"""What rules of others do to a packet: their base chains of one hook followed, rule by rule.

Where a rule asks what is not known of the packet (or is not understood), it may match or not, and
both are followed: what is found then is not *sure*. What is in a set or map, the kernel is asked.

Rule: kernel/other_rules.py reads them. This file must never look at a machine.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import NamedTuple

from natkeep.plan.criu_lock import CRIU_MARK, NAMESPACE_CHAIN, table_name
from natkeep.plan.packet import UNKNOWN, Effect, Packet
from natkeep.plan.tuples import Endpoint

_CONNTRACK = -200  # NF_IP_PRI_CONNTRACK: `notrack` behind it does nothing
_DEPTH = 16  # NFT_JUMP_STACK_SIZE
_TRANSLATES = frozenset({"masquerade", "snat", "dnat", "redirect"})
_ENDS = _TRANSLATES | {"drop", "queue", "tproxy", "synproxy"}


class Element(NamedTuple):
    """What a set or map has for a key: of a verdict map the verdict and its chain, else *data*."""

    verdict: str = ""
    chain: str = ""
    data: bytes = b""


class Expression(NamedTuple):
    """One expression of a rule.

    kind: `load` (what is loaded into a register), `mask`, `cmp`, `range`, `set`; `lookup` of a set,
    `map` and `verdicts` of a map, whose values are table, name and octets of the key (none where
    what it has comes and goes); `do`, `mark` and `connmark` (set from a register) and `verdict`;
    iptables' `marked`, `state`, `ports` and `remark`, of which word is the mark that is set, and
    values are value, mask and, if another mark is the value, its mask; `always`, `unknown`.
    """

    kind: str
    register: int
    word: str
    values: tuple[int | bytes | str, ...]


class Hook(NamedTuple):
    """Where the kernel calls a base chain; type: `filter`, `nat` or `route`.

    devices: of an ingress or egress chain, those that it is for.
    """

    name: str
    priority: int
    type: str
    drops: bool
    devices: tuple[str, ...] = ()


class Chain(NamedTuple):
    """A chain's rules; hook: None where others jump to it."""

    hook: Hook | None
    rules: list[tuple[Expression, ...]]


def _find_none(table: str, name: str, key: bytes) -> Element | None:
    return None


class Ruleset(NamedTuple):
    """Chains by `FAMILY TABLE` and name; find: what a set or map of a table has for a key."""

    chains: dict[tuple[str, str], Chain]
    find: Callable[[str, str, bytes], Element | None] = _find_none

    def has(self, does: str) -> bool:
        """Whether a rule does that to some packet."""
        rules = (rule for chain in self.chains.values() for rule in chain.rules)
        return any(each.kind == "do" and each.word == does for rule in rules for each in rule)


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
    return ruleset._replace(chains=chains)


def _locks(rule: tuple[Expression, ...]) -> bool:
    mark = (CRIU_MARK, CRIU_MARK.to_bytes(4, sys.byteorder))
    return any(
        one.kind in ("cmp", "marked") and one.word == "!=" and one.values[0] in mark for one in rule
    )


EVERY = range(-1 << 31, 1 << 31)
"""The priorities of all chains of a hook."""


def follow(
    ruleset: Ruleset,
    hook: str,
    packet: Packet,
    types: frozenset[str],
    priorities: range = EVERY,
) -> list[Effect]:
    """What base chains of *hook*, *types* and *priorities* may do to *packet*, in their order."""
    device = packet.oif[1] if hook == "egress" else packet.iif[1]
    device = packet.oif[1] if hook == "egress" else packet.iif[1]
    based = [
        (chain.hook, table, name)
        for (table, name), chain in ruleset.chains.items()
        if chain.hook is not None
        and (chain.hook.name == hook and chain.hook.type in types)
        and chain.hook.priority in priorities
        and (not chain.hook.devices or device in chain.hook.devices)
    ]
    effects: list[Effect] = []
    for of, table, name in sorted(based, key=lambda one: one[0].priority):
        walk = _Walk(ruleset, packet, table, of.priority)
        ended = walk.follow(name, depth=0)
        if of.drops and not ended:
            walk.effects.append(Effect("drop", f"{table} {name}", walk.sure))
        effects += walk.effects
        packet = walk.packet
    return effects


class _Walk:
    """One base chain followed; sure: nothing may have ended it before."""

    def __init__(self, ruleset: Ruleset, packet: Packet, table: str, priority: int) -> None:
        self._ruleset, self._table, self._priority = ruleset, table, priority
        self.packet = packet
        self._loaded: dict[Expression, bytes | None] = {}
        self.effects: list[Effect] = []
        self.sure = True

    def follow(self, name: str, *, depth: int) -> bool:
        """Whether the packet's way through the base chain ends here for sure."""
        chain = self._ruleset.chains.get((self._table, name))
        if chain is None or depth > _DEPTH:
            self.sure = False
            return False
        for rule in chain.rules:
            ended = self._run(rule, name, depth)
            if ended == "base":
                return True
            if ended == "chain":
                return False
        return False

    def _run(self, rule: tuple[Expression, ...], name: str, depth: int) -> str:
        """A rule, expression by expression as the kernel runs it: ends `base`, `chain`, or neither.

        It ends at the first that does not match; sure: all that came before do.
        """
        registers, sure = _Registers(), True
        for each in rule:
            if each.kind in ("do", "mark", "connmark", "remark"):
                does = each.word if each.kind == "do" else self._mark(each, registers)
                self._note(does, name, sure=sure)
                if does in _ENDS and sure and self.sure:
                    return "base"
                self.sure = self.sure and does not in _ENDS
            elif each.kind == "verdict":
                return self._judge(each.word, str(each.values[0]), name, sure=sure, depth=depth)
            elif each.kind == "verdicts":
                found = self._find(each, registers)
                if isinstance(found, Element):
                    return self._judge(found.verdict, found.chain, name, sure=sure, depth=depth)
                self.sure = self.sure and found is False
                return ""
            elif (matches := self._match(each, registers)) is False:
                return ""
            else:
                sure = sure and matches is True
        return ""

    def _note(self, does: str, name: str, *, sure: bool) -> None:
        if does == "notrack" and self._priority >= _CONNTRACK:
            return
        self.effects.append(Effect(does, f"{self._table} {name}", sure and self.sure))
        self.packet = self.packet.after(self.effects[-1:])
        self._loaded.clear()

    def _mark(self, each: Expression, registers: _Registers) -> str:
        if each.kind != "remark":
            value = registers.read(each.register, 4)
            known = UNKNOWN if value is None else int.from_bytes(value, sys.byteorder)
            return f"{each.kind} {known}"
        marks = {"mark": self.packet.mark, "connmark": self.packet.connmark}
        value_, mask, *of_other = (one for one in each.values if isinstance(one, int))
        before = 0 if mask == 0xFFFFFFFF else marks.pop(each.word)
        if of_other:
            marks.pop(each.word, None)
            [other] = marks.values()
            value_ = UNKNOWN if other is None else other & of_other[0]
        if before is None or value_ == UNKNOWN:
            return f"{each.word} {UNKNOWN}"
        return f"{each.word} {before & ~mask ^ value_}"

    def _judge(self, word: str, to: str, name: str, *, sure: bool, depth: int) -> str:
        if word in ("jump", "goto"):
            before = self.sure
            self.sure = before and sure
            ended = self.follow(to, depth=depth + 1)
            if ended and sure and before:
                return "base"
            # It came back, or was never there: what may have ended it leaves a doubt.
            self.sure = self.sure if sure else before and not self._may_end(to)
            return "chain" if word == "goto" and sure else ""
        if word == "continue":
            return ""
        if word in ("drop", "queue"):
            self._note(word, name, sure=sure)
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

    def _match(self, each: Expression, registers: _Registers) -> bool | None:
        """Whether it lets the rule go on; None: that is not known."""
        packet = self.packet
        match each.kind:
            case "load":
                registers.write(each.register, self._load(each))
            case "mask":
                registers.write(each.register, _mask(registers, each))
            case "set":
                value = each.values[0]
                registers.write(each.register, value if isinstance(value, bytes) else None)
            case "map":
                found = self._find(each, registers)
                data = found.data if isinstance(found, Element) else None
                registers.write(int(each.word), data)
                return None if found is None else found is not False
            case "lookup":
                found = self._find(each, registers)
                return None if found is None else (found is not False) == (each.word == "==")
            case "cmp" | "range":
                return _compare(registers, each)
            case "marked" | "state" | "ports":
                return _match_of_iptables(packet, each)
            case "unknown":
                return None
        return True

    def _load(self, each: Expression) -> bytes | None:
        if each not in self._loaded:  # by many rules alike
            at = tuple(value for value in each.values if isinstance(value, int))
            self._loaded[each] = self.packet.load(each.word, at)
        return self._loaded[each]

    def _find(self, each: Expression, registers: _Registers) -> Element | bool | None:
        """What the set or map has: False where nothing, None where that is not known."""
        if not each.values:
            return None
        table, name, width = each.values
        key = registers.read(each.register, int(width))
        if key is None:
            return None
        return self._ruleset.find(str(table), str(name), key) or False


class _Registers:
    """The kernel's registers: 16 of four octets, also called 1 to 4 of sixteen."""

    def __init__(self) -> None:
        self._values: dict[int, bytes | None] = {}

    def write(self, register: int, value: bytes | None) -> None:
        self._values[register - 8 if register >= 8 else (register - 1) * 4] = value

    def read(self, register: int, width: int) -> bytes | None:
        """*width* octets, of one value or of several; None where one of them is not known."""
        at = register - 8 if register >= 8 else (register - 1) * 4
        value = self._values.get(at)
        while value is not None and len(value) < width:
            value += bytes(-len(value) % 4)
            following = self._values.get(at + len(value) // 4)
            if len(value) < width:
                value = None if following is None else value + following
        return value and value[:width]


def _mask(registers: _Registers, each: Expression) -> bytes | None:
    source, mask, xor = each.values
    if not isinstance(source, int) or not isinstance(mask, bytes) or not isinstance(xor, bytes):
        return None
    value = registers.read(source, len(mask))
    return value and bytes(v & m ^ x for v, m, x in zip(value, mask, xor, strict=False))


def _compare(registers: _Registers, each: Expression) -> bool | None:
    wanted = [one for one in each.values if isinstance(one, bytes)]
    value = registers.read(each.register, len(wanted[0])) if wanted else None
    if value is None:
        return None
    if each.kind == "range":
        return (wanted[0] <= value <= wanted[1]) == (each.word == "==")
    [one] = wanted
    return {
        "==": value == one, "!=": value != one, "<": value < one,
        "<=": value <= one, ">": value > one, ">=": value >= one,
    }[each.word]  # fmt: skip


def _match_of_iptables(packet: Packet, each: Expression) -> bool | None:
    first, *rest = (one for one in each.values if isinstance(one, int))
    if each.kind == "ports":
        source, destination = packet.tuple_.source.port, packet.tuple_.destination.port
        asked = {0: (source,), 1: (destination,)}.get(first, (source, destination))
        ranges = [*zip(rest[::2], rest[1::2], strict=True)]
        found = any(low <= port <= high for port in asked for low, high in ranges)
    elif each.kind == "state":
        if packet.state is None:
            return None
        found = bool(packet.state & first)
    elif packet.mark is None:
        return None
    else:
        found = packet.mark & rest[0] == first
    return found == (each.word == "==")


def find_translating(effects: list[Effect]) -> Iterator[Effect]:
    """Those by which the packet would get another address or port."""
    return (effect for effect in effects if effect.does in _TRANSLATES)


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
