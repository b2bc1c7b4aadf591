"""what a plan wants in the tables of a site, object by object, so that each can be missed.

This file must never look at a machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from zlib import crc32

from natkeep.plan.move import Site
from natkeep.plan.nft import Key, Object, Rule, next_alike, split
from natkeep.plan.steps import Loads, Plan, Step
from natkeep.values import dataclass


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object that is to be there, and the key by which it is found; no two have one key."""

    key: Key
    object: Object


def want(plan: Plan, site: Site) -> dict[Key, tuple[int, Wanted]]:
    """The objects of *plan* in the tables of *site*, each with the number of its first step."""
    # What two steps have, as those of the part that all moves share, is there once.
    made: set[Object] = set()
    found: dict[Key, tuple[int, Wanted]] = {}
    for number, step in enumerate(plan.steps):
        for key, one in _keys_of(step) if step.site == site else ():
            if one in made:
                continue
            made.add(one)
            if key in found and key.kind == "rule":
                key = next_alike(key, found)
            found.setdefault(key, (number, Wanted(key, one)))
    return found


def split_opening(plan: Plan, site: Site) -> tuple[frozenset[Key], frozenset[Key]]:
    """What prepare puts into the tables of *site*, and what open does."""
    first = len(plan.prepare)
    wanted = want(plan, site)
    opened = frozenset([key for key, (number, _) in wanted.items() if number >= first])
    return frozenset(wanted) - opened, opened


def objects_of(step: Step) -> tuple[Object, ...]:
    """What *step* puts into the tables, without the part that all moves share."""
    return step.objects() if isinstance(step, Loads) else ()


def shared_of(step: Loads) -> Iterator[tuple[Key, Object]]:
    """What it needs of the part that all moves share, as far as that was there when it was done."""
    meant = None if step.recorded is None else step.recorded.shared
    for part in step.static():
        for summed, pair in zip(shared_sums(part), shared_keys(part), strict=True):
            if meant is None or summed in meant:
                yield pair


def sums_of(step: Loads) -> list[int]:
    """By which a journal names what `shared_of` gives."""
    meant = None if step.recorded is None else step.recorded.shared
    return [
        one for part in step.static() for one in shared_sums(part) if meant is None or one in meant
    ]


def _keys_of(step: Step) -> Iterator[tuple[Key, Object]]:
    if isinstance(step, Loads):
        yield from shared_of(step)
    yield from ((one.key(), one) for one in split(objects_of(step)))


@lru_cache(maxsize=1 << 6)
def shared_keys(part: tuple[Object, ...]) -> tuple[tuple[Key, Object], ...]:
    """The objects of a part that all moves share, each with its key."""
    return tuple((one.key(), one) for one in split(part))


@lru_cache(maxsize=1 << 6)
def shared_sums(part: tuple[Object, ...]) -> tuple[int, ...]:
    """For each of them a number by which a journal names it."""
    return tuple(crc32("\n".join(map(str, key)).encode()) for key, _ in shared_keys(part))


def place(rule: Rule, key: Key, order: Sequence[Key], gone: frozenset[Key]) -> Rule:
    """*rule*, such that it comes to stand where it belongs.

    order: the rules of its chain as all objects together leave them. A rule is added behind those
    that are there, or inserted in front; alone it may have to go to the other end.
    """
    there = [place for place, other in enumerate(order) if other not in gone]
    return rule._replace(insert=order.index(key) < there[0]) if there else rule


def order_rules(wanted: Iterable[Wanted], chain: str) -> list[Key]:
    """The rules of a chain as they stand when *wanted* have been made one after the other."""
    order: list[Key] = []
    for one in wanted:
        if isinstance(one.object, Rule) and one.object.chain == chain:
            order.insert(0 if one.object.insert else len(order), one.key)
    return order
