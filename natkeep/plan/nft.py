"""the nft objects: tables, chains, sets, elements and rules as values.

Each has a text (`str`: the nft command that adds it), a key (by which it is found again in the
kernel) and an inverse (`undo`). The objects are the data; text is for libnftables and for people,
and is parsed back nowhere. kernel/nft_messages.py packs the few that do not go as text.

Rule: every value in an object is typed: an id that `parse_id` accepted, an `ipaddress` object, a
number; so no input can change the grammar. One command a line and never a nested block, since nft
1.0.6 stumbles over `}` before `chain`.

A rule is not found again by its text: the kernel keeps expressions, and another version of nft
makes others of the same words. So its key has *marks* that every version must keep: the sets that
it asks, where it jumps to, whether it translates, drops or accepts, the port and the address that
it names, and its comment.

Size: over 400 lines, because text, key and inverse of a kind of object belong side by side.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from itertools import count
from typing import NamedTuple

from natkeep.plan.tuples import Address

TABLE = "natkeep"
FAMILIES = (4, 6)
IP = {4: "ip", 6: "ip6"}
"""How nft calls an IP version."""
ADDRESS_TYPE = {4: "ipv4_addr", 6: "ipv6_addr"}


class Key(NamedTuple):
    """An object of a table natkeep, in a form that both a plan and the kernel can be put in.

    kind: table, chain, set, element or rule; name: the chain or set, that an element or a rule
    is in. what: an element's key in hexadecimal, a rule's comment and marks; nth: which of
    several that are alike.
    """

    family: str
    kind: str
    name: str = ""
    what: str = ""
    nth: int = 0


class Undo(NamedTuple):
    """How one object goes: the inverse of adding it, as the journal has it.

    what: an element's key as text, or the comment of the rules that go. unused: an object that
    moves share goes only once the chain of this name has no rule any more.
    """

    family: str
    kind: str
    name: str
    what: str = ""
    unused: str = ""

    def command(self, handle: int = 0) -> str:
        """The nft command; handle: the kernel's number of the rule."""
        if self.kind == "rule":
            return f"delete rule {self.family} {TABLE} {self.name} handle {handle}"
        if self.kind == "element":
            return f"delete element {self.family} {TABLE} {self.name} {{ {self.what} }}"
        return f"delete {self.kind} {self.family} {TABLE} {self.name}"


# ---- statements of a rule ------------------------------------------------------------------------


class Match(NamedTuple):
    """Fields of a packet are in a set (`@name`), or one is equal to a value; or not."""

    fields: tuple[str, ...]
    to: str | Address | int
    equal: bool = True

    def __str__(self) -> str:
        return f"{' . '.join(self.fields)} {'' if self.equal else '!= '}{self.to}"


class VerdictMap(NamedTuple):
    """The field's value leads to a chain."""

    field: str
    name: str

    def __str__(self) -> str:
        return f"{self.field} vmap @{self.name}"


class Meta(NamedTuple):
    """What is known of a packet besides its octets: `meta mark`, `iif`, `oif`, `meta l4proto`."""

    name: str
    value: str
    equal: bool = True

    def __str__(self) -> str:
        return f"{self.name} {'' if self.equal else '!= '}{self.value}"


class MarkBits(NamedTuple):
    """The packet's mark with these bits set, or without them."""

    bits: int
    on: bool = True

    def __str__(self) -> str:
        how = f"| {self.bits:#x}" if self.on else f"& {~self.bits & 0xFFFFFFFF:#x}"
        return f"meta mark set meta mark {how}"


class TcpFlags(NamedTuple):
    """Of these flags of a segment just those are set, or not just those."""

    mask: tuple[str, ...]
    value: tuple[str, ...]
    equal: bool = True

    def __str__(self) -> str:
        how = "==" if self.equal else "!="
        value = " | ".join(self.value) or "0x0"
        return f"tcp flags & ({' | '.join(self.mask)}) {how} {value}"


class Nat(NamedTuple):
    """`dnat` or `snat` to an address and a port, each itself or a field of the packet."""

    kind: str
    address: Address | str
    port: str | int

    def __str__(self) -> str:
        at = self.address
        ip = at.partition(" ")[0] if isinstance(at, str) else IP[at.version]
        return f"{self.kind} {ip} to {at} : {self.port}"


class NatMap(NamedTuple):
    """`dnat` or `snat` to the address and port that a map has for these fields, if it has them."""

    kind: str
    fields: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        ip = self.fields[0].partition(" ")[0]
        return f"{self.kind} {ip} to {' . '.join(self.fields)} map @{self.name}"


class Write(NamedTuple):
    """The field becomes the value, checksums are mended."""

    field: str
    value: Address | int

    def __str__(self) -> str:
        return f"{self.field} set {self.value}"


class Add(NamedTuple):
    """The fields are added to a dynamic set."""

    fields: tuple[str, ...]
    name: str

    def __str__(self) -> str:
        return f"add @{self.name} {{ {' . '.join(self.fields)} }}"


class Verdict(NamedTuple):
    """`drop`, `accept`, `return`, `notrack`, `jump CHAIN`, `reject with tcp reset`, `tproxy …`."""

    name: str
    chain: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.chain}".rstrip()


DROP, ACCEPT, RETURN, NOTRACK = map(Verdict, ("drop", "accept", "return", "notrack"))
RESET, TPROXY = Verdict("reject with tcp reset"), Verdict("tproxy to :1")


def jump(chain: str) -> Verdict:
    """On to another chain."""
    return Verdict("jump", chain)


# ---- and those that nft's text cannot say --------------------------------------------------------


class Protocol(NamedTuple):
    """The packet's transport protocol is this number."""

    number: int


class Octets(NamedTuple):
    """The octets at *offset* are *value*; base: 1 from the IP header, 2 from the transport's."""

    base: int
    offset: int
    value: bytes


class OctetsIn(NamedTuple):
    """*fields*, (offset, octets) from the transport header, together are in the set; or not."""

    name: str
    fields: tuple[tuple[int, int], ...]
    equal: bool = True


class WriteOctets(NamedTuple):
    """Write *value* at *offset*, and mend the checksum.

    checksum: offset, from the same base, of the 16-bit sum that covers what is written.
    pseudo: the transport checksum covers it as part of its pseudo-header.
    """

    base: int
    offset: int
    value: bytes
    checksum: int | None
    pseudo: bool = False


class WriteMap(NamedTuple):
    """An address and a port become what a map has for these fields, if it has them.

    nft's text writes one field at a time, and with the first the key would be another.
    """

    fields: tuple[str, ...]
    name: str
    to: tuple[str, str]


Raw = Protocol | Octets | OctetsIn | WriteOctets | WriteMap
Words = Match | VerdictMap | Meta | MarkBits | TcpFlags | Nat | NatMap | Write | Add | Verdict
Statement = Words | Raw


def marks(statement: Statement) -> Iterator[str]:
    """What every version of nft keeps of a statement."""
    match statement:
        case Match(fields, to, _):
            if isinstance(to, str):
                yield to
            elif fields in (("tcp dport",), ("udp dport",)):
                yield f"port {to}"
            elif fields[0].endswith("daddr"):
                yield f"to {to}"
        case VerdictMap(_, name) | Add(_, name) | OctetsIn(name, _, _):
            yield f"@{name}"
        case Nat():
            yield "nat"
        case NatMap(_, _, name):
            yield from ("nat", f"@{name}")
        case WriteMap(_, name):
            yield from ("writes", f"@{name}")
        case Write() | WriteOctets():
            yield "writes"
        case Verdict("jump", chain):
            yield f">{chain}"
        case Verdict(name) if name != "return":
            yield name.partition(" ")[0]


# ---- objects -------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A table; `create` fails when it is there already. owner: it ends with its netlink socket."""

    family: str = "inet"
    name: str = TABLE
    owner: bool = False

    def __str__(self) -> str:
        flags = " { flags owner; }" if self.owner else ""
        return f"create table {self.family} {self.name}{flags}"

    def key(self) -> Key:
        """By which it is found again."""
        return Key(self.family, "table")

    def undo(self) -> Iterator[Undo]:
        """Nothing: the tables go with the last move."""
        yield from ()


class Chain(NamedTuple):
    """A chain; with a hook it is a base chain, which is there for all moves.

    shared: several moves have rules in it, so it goes when none is left.
    """

    name: str
    hook: str = ""
    priority: str = ""
    type: str = "filter"
    family: str = "inet"
    table: str = TABLE
    shared: bool = False

    def __str__(self) -> str:
        base = f" {{ type {self.type} hook {self.hook} priority {self.priority}; }}"
        return f"add chain {self.family} {self.table} {self.name}{base if self.hook else ''}"

    def key(self) -> Key:
        """By which it is found again."""
        return Key(self.family, "chain", self.name)

    def undo(self) -> Iterator[Undo]:
        """It goes; a base chain with its table only."""
        if not self.hook:
            yield Undo(self.family, "chain", self.name, "", self.name if self.shared else "")


class Set(NamedTuple):
    """A set of *type*, or a map to verdicts or to *data*; size: that of its hash, 0 grows.

    A set with a size is a hash of that size from the start; without, it grows while it is filled,
    at three times the cost. shared: it is there for all moves.
    """

    name: str
    type: tuple[str, ...]
    size: int = 0
    verdicts: bool = False
    dynamic: bool = False
    family: str = "inet"
    table: str = TABLE
    shared: bool = False
    data: tuple[str, ...] = ()

    def __str__(self) -> str:
        to = ("verdict",) if self.verdicts else self.data
        kind, data = ("map", f" : {' . '.join(to)}") if to else ("set", "")
        size = f" size {self.size};" if self.size else ""
        flags = " flags dynamic;" if self.dynamic else ""
        form = f"type {' . '.join(self.type)}{data};{size}{flags}"
        return f"add {kind} {self.family} {self.table} {self.name} {{ {form} }}"

    def key(self) -> Key:
        """By which it is found again."""
        return Key(self.family, "set", self.name)

    def undo(self) -> Iterator[Undo]:
        """It goes; what all moves share goes with its table."""
        if not self.shared:
            yield Undo(self.family, "map" if self.data else "set", self.name)


class Elements(NamedTuple):
    """Elements of a set, or of a map to one chain; unused: as of Undo."""

    name: str
    values: tuple[Address | int, ...]
    chain: str = ""
    family: str = "inet"
    unused: str = ""

    def __str__(self) -> str:
        return f"add element {self.family} {TABLE} {self.name} {{ {self.said()} }}"

    def said(self) -> str:
        """What stands between the braces."""
        data = f" : jump {self.chain}" if self.chain else ""
        return ", ".join(f"{value}{data}" for value in self.values)

    def each(self) -> Iterator[Elements]:
        """One by one, as each can be missing."""
        return (self._replace(values=(value,)) for value in self.values)

    def key(self) -> Key:
        """By which it is found again, if it is one."""
        [value] = self.values
        packed = value.to_bytes(2, "big") if isinstance(value, int) else value.packed
        return Key(self.family, "element", self.name, packed.hex())

    def undo(self) -> Iterator[Undo]:
        """They go, if their set does not."""
        unused = self.unused or self.chain
        for value in self.values if unused else ():
            yield Undo(self.family, "element", self.name, str(value), unused)


class Rule(NamedTuple):
    """A rule behind the others of its chain, or with *insert* in front of them."""

    chain: str
    statements: tuple[Statement, ...]
    comment: str = ""
    insert: bool = False
    family: str = "inet"
    table: str = TABLE

    def __str__(self) -> str:
        if self.is_raw():
            return f"# raw nf_tables rule in chain {self.chain}"
        verb = "insert" if self.insert else "add"
        comment = f' comment "{self.comment}"' if self.comment else ""
        said = " ".join(map(str, self.statements))
        return f"{verb} rule {self.family} {self.table} {self.chain} {said}{comment}"

    def is_raw(self) -> bool:
        """Whether nft's text cannot say it."""
        return any(isinstance(statement, Raw) for statement in self.statements)

    def key(self) -> Key:
        """By which it is found again: its comment and marks."""
        found = [mark for statement in self.statements for mark in marks(statement)]
        return Key(self.family, "rule", self.chain, describe_rule(self.comment, found))

    def undo(self) -> Iterator[Undo]:
        """It goes by its comment; without one it stands in a chain that goes."""
        if self.comment:
            yield Undo(self.family, "rule", self.chain, self.comment)


Object = Table | Chain | Set | Elements | Rule


def describe_rule(comment: str, marks: Iterable[str]) -> str:
    """A rule as a Key's `what`."""
    return f"{comment}: {' '.join(sorted(set(marks)))}"


def split(objects: Iterable[Object]) -> Iterator[Object]:
    """The same objects, elements one by one."""
    for one in objects:
        if isinstance(one, Elements):
            yield from one.each()
        else:
            yield one


def next_alike(key: Key, seen: Container[Key]) -> Key:
    """The same with the first number that none of those *seen* has."""
    numbers = (key._replace(nth=number) for number in count(key.nth + 1))
    return next(other for other in numbers if other not in seen)


def number_alike(keys: Iterable[Key]) -> Iterator[Key]:
    """The same keys, rules that are alike numbered in their order."""
    seen: set[Key] = set()
    for key in keys:
        one = next_alike(key, seen) if key in seen and key.kind == "rule" else key
        seen.add(one)
        yield one
