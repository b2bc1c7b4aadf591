"""the things of a table: what nft's text would make there, one by one, so that each can be missed.

    add chain inet natkeep gate-web           a chain
    add element inet natkeep in4 { 10.3.0.20 : jump in-at-10.3.0.20 }    an element
    insert rule inet natkeep gate-at-… @kept-web-0 jump gate-web …       a rule, known by its marks

A rule is not read back as text: the kernel keeps expressions, and another version of nft makes
others of the same words. So a rule is known by its *marks*, which every version must keep: the
sets that it asks, where it jumps to, whether it translates, drops or accepts, the port and the
address that it names, and its comment.

Rule: only lines that ruleset.py, reception.py and quiet.py rendered come in here. This file must
never look at a machine.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import lru_cache
from ipaddress import ip_address
from itertools import count
from typing import NamedTuple

from natkeep.plan.icmp_errors import LookUp, RawRule, Store
from natkeep.plan.ruleset import TABLE
from natkeep.values import dataclass, replace

_LINE = re.compile(
    rf"(create|add|insert) (table|chain|set|map|element|rule) (inet|arp) {TABLE} ?(\S*) ?(.*)"
)
_COMMENT = re.compile(r' comment "([^"]*)"$')
_LAST = frozenset(("drop", "accept"))
_PLAIN = {"dnat": "nat", "snat": "nat", "notrack": "notrack", "reject": "reject"}
_FOLLOWED = frozenset(("jump", "dport", "daddr", "saddr"))

_parse_address = lru_cache(maxsize=1 << 12)(ip_address)
"""A few addresses stand in all the lines of a move."""


class Thing(NamedTuple):
    """Something of a table natkeep, in a form that both the text and the kernel can be put in.

    kind: table, chain, set, element or rule; name: the chain or set, that an element or a rule
    is in. what: an element's key in hexadecimal, a rule's comment and marks; nth: which of
    several that are alike.
    A tuple, since there are tens of thousands, each looked for by its hash.
    """

    family: str
    kind: str
    name: str = ""
    what: str = ""
    nth: int = 0


known_thing = lru_cache(maxsize=1 << 16)(Thing)
"""A Thing, the same object as before for the same values.

They are looked for among tens of thousands, where it counts that one object is equal to itself.
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A thing that is to be there, and what makes it: a line of nft text, or a raw rule."""

    thing: Thing
    make: str | RawRule


def describe_rule(comment: str, marks: Iterable[str]) -> str:
    """A rule as a Thing's `what`."""
    return f"{comment}: {' '.join(sorted(set(marks)))}"


def number_alike(things: Iterable[Thing]) -> Iterator[Thing]:
    """The same things, rules that are alike numbered in their order."""
    seen: set[Thing] = set()
    for thing in things:
        one = next_alike(thing, seen) if thing in seen and thing.kind == "rule" else thing
        seen.add(one)
        yield one


def next_alike(thing: Thing, seen: Container[Thing]) -> Thing:
    """The same with the first number that none of those *seen* has."""
    numbers = (replace(thing, nth=number) for number in count(thing.nth + 1))
    return next(other for other in numbers if other not in seen)


@lru_cache(maxsize=1 << 8)
def find_static(lines: tuple[str, ...]) -> frozenset[Thing]:
    """The things of `parse_static`."""
    return frozenset([wanted.thing for wanted in parse_static(lines)])


def find_made(line: str) -> list[Thing]:
    """The things of `parse_line`."""
    return [thing for thing, _ in _parse_line(line)]


@lru_cache(maxsize=1 << 8)
def parse_static(lines: tuple[str, ...]) -> tuple[Wanted, ...]:
    """What *lines* make, which are the same for all moves."""
    return tuple(wanted for line in lines for wanted in parse_line(line))


def parse_line(line: str) -> Iterator[Wanted]:
    """What *line* makes; a deletion or a flush makes nothing."""
    return (Wanted(thing, make) for thing, make in _parse_line(line))


def _parse_line(line: str) -> Iterator[tuple[Thing, str]]:
    match = _LINE.fullmatch(line)
    if match is None:
        return
    _, kind, family, name, rest = match.groups()
    if kind == "element":
        for element in rest.removeprefix("{ ").removesuffix(" }").split(", "):
            key = _pack_key(element.partition(" : ")[0])
            one = f"add element {family} {TABLE} {name} {{ {element} }}"
            yield known_thing(family, "element", name, key.hex(), 0), one
    elif kind == "rule":
        comment, marks = _read_rule(rest)
        yield known_thing(family, "rule", name, describe_rule(comment, marks), 0), line
    else:
        yield known_thing(family, "set" if kind == "map" else kind, name, "", 0), line


def _pack_key(text: str) -> bytes:
    return int(text).to_bytes(2, "big") if text.isdigit() else _parse_address(text).packed


def _read_rule(text: str) -> tuple[str, set[str]]:
    found = _COMMENT.search(text)
    words = (text[: found.start()] if found else text).split()
    marks = {*words[-1:]} & _LAST
    for at, word in enumerate(words):
        if word[0] == "@":
            marks.add(word)
        elif word in _PLAIN:
            marks.add(_PLAIN[word])
        elif word in _FOLLOWED and at + 1 < len(words):
            marks |= _read_pair(words[at - 1] if at else "", word, words[at + 1])
    return (found.group(1) if found else ""), marks


def _read_pair(before: str, word: str, after: str) -> set[str]:
    """What a word tells by those that stand beside it."""
    if word == "jump":
        return {f">{after}"}
    if word == "dport":
        return {f"port {after}"} if before == "tcp" and after.isdigit() else set()
    if word == "daddr" and before in ("ip", "ip6") and after not in ("set", "vmap", "."):
        return {f"to {_parse_address(after)}"}
    return {"writes"} if after == "set" else set()


def want_rule(rule: RawRule) -> Wanted:
    """The same for a rule that nft's text cannot say."""
    return Wanted(known_thing("inet", "rule", rule.chain, _describe_raw(rule), 0), rule)


def _describe_raw(rule: RawRule) -> str:
    marks = {f"@{one.name}" for one in rule.expressions if isinstance(one, LookUp)}
    if any(isinstance(one, Store) for one in rule.expressions):
        marks.add("writes")
    return describe_rule(rule.comment, marks)


def place(line: str, thing: Thing, order: Sequence[Thing], gone: frozenset[Thing]) -> str:
    """*line*, such that its rule comes to stand where it belongs.

    order: the rules of its chain as all lines together leave them. `add` puts a rule behind those
    that are there and `insert` in front; alone it may have to go to the other end.
    """
    there = [place for place, other in enumerate(order) if other not in gone]
    if not there:
        return line
    verb = "insert" if order.index(thing) < there[0] else "add"
    return f"{verb} {line.partition(' ')[2]}"


def order_rules(wanted: Iterable[Wanted], chain: str) -> list[Thing]:
    """The rules of a chain as they stand when *wanted* have been made one after the other."""
    order: list[Thing] = []
    for one in wanted:
        if one.thing.kind == "rule" and one.thing.name == chain:
            front = isinstance(one.make, RawRule) or one.make.startswith("insert")
            order.insert(0 if front else len(order), one.thing)
    return order
