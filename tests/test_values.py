"""values.py: what it makes behaves as what the standard library's dataclasses make."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from natkeep import values


def make_pair(module: Any) -> type[Any]:
    @module.dataclass(frozen=True, slots=True, order=True)
    class Pair:
        left: int
        right: str = "r"

        def __post_init__(self) -> None:
            if self.left < 0:
                raise ValueError("negative")

        def both(self) -> str:
            return f"{self.left}{self.right}"

    made: type[Any] = Pair
    return made


def make_bag(module: Any) -> type[Any]:
    @module.dataclass(slots=True)
    class Bag:
        name: str
        things: dict[str, int] = module.field(default_factory=dict)

    made: type[Any] = Bag
    return made


@values.dataclass(frozen=True, slots=True)
class Base:
    """At the top of a module, where pickle finds it."""

    site: str
    number: int = 3


@values.dataclass(frozen=True, slots=True)
class Empty:
    """Of no fields at all."""


def outcome(act: Callable[[], Any]) -> Any:
    """What *act* returns, or the kind of error that it raises."""
    try:
        return act()
    except Exception as error:
        return type(error)


USES: dict[str, Callable[[type[Any]], Any]] = {
    "by position": lambda pair: repr(pair(1, "x")),
    "by name": lambda pair: repr(pair(right="x", left=1)),
    "with its default": lambda pair: repr(pair(1)),
    "too many": lambda pair: pair(1, "x", 2),
    "too few": lambda pair: pair(),
    "twice": lambda pair: pair(1, left=1),
    "unknown": lambda pair: pair(1, other=1),
    "refused by its own check": lambda pair: pair(-1),
    "equal": lambda pair: (pair(1) == pair(1, "r"), pair(1) == pair(2), pair(1) != pair(1)),
    "unlike": lambda pair: pair(1) == (1, "r"),
    "hash": lambda pair: hash(pair(1)) == hash(pair(1)) and {pair(1), pair(1)} == {pair(1)},
    "order": lambda pair: [p.both() for p in sorted([pair(2), pair(1, "s"), pair(1)])],
    "order with others": lambda pair: pair(1) < 1,
    "comparisons": lambda pair: [
        pair(1) < pair(2), pair(1) <= pair(1), pair(1) > pair(2), pair(1) >= pair(1)
    ],
    "set": lambda pair: setattr(pair(1), "left", 2),
    "delete": lambda pair: delattr(pair(1), "left"),
    "no dictionary": lambda pair: hasattr(pair(1), "__dict__"),
    "slots": lambda pair: pair.__slots__,
    "name": lambda pair: (pair.__name__, pair.__module__),
    "copied": lambda pair: copy.copy(pair(1)) == pair(1),
    "match": lambda pair: pair.__match_args__,
    "replaced": lambda pair: repr(dataclasses.replace(pair(1), right="y")),
    "replaced wrongly": lambda pair: dataclasses.replace(pair(1), other="y"),
    "checked when replaced": lambda pair: dataclasses.replace(pair(1), left=-1),
    "fields": lambda pair: [field.name for field in dataclasses.fields(pair)],
    "as a dict": lambda pair: dataclasses.asdict(pair(1)),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_a_frozen_value_is_as_that_of_dataclasses(use: str) -> None:
    act = USES[use]

    ours, theirs = (outcome(lambda m=m: act(make_pair(m))) for m in (values, dataclasses))

    assert theirs == ours


BAG_USES: dict[str, Callable[[type[Any]], Any]] = {
    "defaults are not shared": lambda bag: (
        bag("a").things.update(x=1), bag("a").things
    ),
    "changed": lambda bag: (b := bag("a"), setattr(b, "name", "b"), b.name)[2],
    "equal": lambda bag: bag("a") == bag("a", {}),
    "hash": lambda bag: hash(bag("a")),
    "printed": lambda bag: repr(bag("a", {"x": 1})).rpartition(".")[2],
    "no class attribute": lambda bag: hasattr(bag, "things"),
}  # fmt: skip


@pytest.mark.parametrize("use", BAG_USES)
def test_a_value_that_changes_is_as_that_of_dataclasses(use: str) -> None:
    act = BAG_USES[use]

    ours, theirs = (outcome(lambda m=m: act(make_bag(m))) for m in (values, dataclasses))

    assert theirs == ours


def test_our_own_replace_is_theirs() -> None:
    pair = make_pair(values)

    assert values.replace(pair(1), right="y") == pair(1, "y")
    with pytest.raises(TypeError):
        values.replace(pair(1), other=1)
    with pytest.raises(ValueError, match="negative"):
        values.replace(pair(1), left=-1)


def test_a_value_that_would_inherit_fields_is_refused() -> None:
    with pytest.raises(TypeError, match="Heir: a value does not inherit fields"):

        @values.dataclass(frozen=True, slots=True)
        class Heir(Base):
            more: int


def test_values_go_through_pickle() -> None:
    assert pickle.loads(pickle.dumps(Base("x"))) == Base("x", 3)


def test_a_value_may_have_no_fields() -> None:
    assert (Empty(), repr(Empty())) == (Empty(), "Empty()")
    assert hash(Empty()) == hash(Empty())


def test_a_match_takes_a_value_apart() -> None:
    match Base("x", 4):
        case Base(site, number):
            assert (site, number) == ("x", 4)
        case _:
            pytest.fail("it does not match")


def test_preparing_imports_no_dataclasses() -> None:
    """They are a third of its processor time (see the top of values.py)."""
    modules = "natkeep.cli, natkeep.cli.change, natkeep.lifecycle.prepare, natkeep.kernel.linux"
    modules += ", natkeep.report, natkeep.checkpoint.listing, natkeep.policy"
    code = f"import sys, {modules}; print([m for m in ('dataclasses', 'inspect', 'pyroute2') "
    code += "if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
