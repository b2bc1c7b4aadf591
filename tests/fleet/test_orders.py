"""Orders as a person writes them, and as the store has them: what is read, what is refused."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from fleet_nodes import ORDER
from hypothesis import given
from hypothesis import strategies as st

from natkeep.errors import UsageError
from natkeep.fleet.done import NOTHING, UNREADABLE, Done, Error, parse_done
from natkeep.fleet.order import parse_file, parse_order
from natkeep.fleet.want import NO_WANT, Phase, parse_want
from natkeep.values import replace


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ORDER.items() if name != key}


def site(**words: Any) -> dict[str, Any]:
    return {**ORDER, "sites": [{"node": "b", "role": "destination"}, words]}


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (without("id"), "'id' is missing"),
        (without("maps"), "'maps' is missing"),
        (without("sites"), "'sites' is missing"),
        (without("connections"), "which connections"),
        ({**ORDER, "image": "/x"}, "which connections"),
        ({**ORDER, "schema": 2}, "schema 2 is not 1"),
        ({**ORDER, "deadline": 3}, "unknown key deadline"),
        ({**ORDER, "deadline_s": -1}, "-1 is not a number"),
        ({**ORDER, "deadline_s": True}, "True is not a number"),
        ({**ORDER, "mode": "both"}, "'both' is not a valid Mode"),
        ({**ORDER, "phase": "gone"}, "'gone' is none of staged, frozen"),
        ({**ORDER, "listeners": 1}, "listeners is true or false"),
        ({**ORDER, "id": "a b"}, "'a b' is not an id"),
        ({**ORDER, "maps": ["127.0.0.1=auto"]}, "is loopback"),
        ({**ORDER, "maps": ["10.2.0.10"]}, "is not of the form OLD=NEW"),
        ({**ORDER, "maps": []}, "maps: none"),
        ({**ORDER, "maps": "10.2.0.10=10.3.0.20"}, "is not a list of texts"),
        ({**ORDER, "sites": {}}, "sites is not a list"),
        ({**ORDER, "sites": []}, "there is one destination"),
        (site(node="a", role="destination"), "there is one destination"),
        (site(node="a", role="relay"), "'relay' is none of"),
        (site(node="b", role="gateway"), "b is two of them"),
        (site(node="../a", role="gateway"), "'../a' is not a name"),
        (site(role="gateway"), "of a node, or else of a group"),
        (site(group="edge", role="source"), "a group is of gateways"),
        (site(node="a", role="gateway", ns="x"), "unknown key ns"),
        (site(node="a", group="edge", role="gateway"), "of a node, or else of a group"),
        (site(group="edge", members=["a"], role="gateway"), "unknown key members"),
        (site(node="a", members=["c"], role="gateway"), "unknown key members"),
    ],
)
def test_half_an_order_is_refused_by_name(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=r"^half an order: ") as refused:
        parse_file(json.dumps(wrong))
    assert why in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "3", '{"id": NaN}', '{"a":' * 9999])
def test_what_is_no_json_object_is_no_order(text: str) -> None:
    for parse in (parse_file, parse_order, parse_want):
        with pytest.raises(UsageError):
            parse(text)
    assert parse_done(text) == UNREADABLE, "neither gone nor ready"
    assert parse_done(None) == NOTHING


def test_a_move_in_the_store_is_what_was_ordered() -> None:
    order, where = parse_file(json.dumps(ORDER))
    assert (where.path, where.is_image, where.listeners) == ("list", False, False)
    order = replace(order, generation=3, image="29fd1e37", phase="gone")
    assert parse_order(json.dumps(order.to_json())) == order


def test_what_a_node_is_ordered_is_read_as_it_was_written() -> None:
    order, _ = parse_file(json.dumps({**ORDER, "maps": ["[fd00::1]:80=[fd00::2]:8080"]}))
    wants = replace(order, generation=3).wants()
    assert len(wants) == 3
    for want in wants.values():
        assert parse_want(json.dumps(want.to_json())) == want


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(key=st.sampled_from([*NO_WANT.to_json()]), value=JSON)
def test_whatever_stands_in_an_order_it_is_read_or_refused(key: str, value: Any) -> None:
    order, _ = parse_file(json.dumps(ORDER))
    [want, *_] = replace(order, generation=3).wants().values()
    with suppress(UsageError):
        parse_want(json.dumps({**want.to_json(), key: value}))


@given(key=st.sampled_from([*NOTHING.to_json()]), value=JSON)
def test_whatever_a_node_says_it_is_read(key: str, value: Any) -> None:
    parse_done(json.dumps({**NOTHING.to_json(), key: value}))


def test_what_a_node_says_is_read_as_it_was_written() -> None:
    done = Done(Phase.OPENING, 3, Error(4, "refused", "no"), {"b": Phase.PREPARED}, lost=True)
    assert parse_done(done.write(1.5)) == done


@pytest.mark.parametrize(
    ("phase", "wanted", "reached"),
    [
        ("open", "prepared", True),
        ("prepared", "prepared", True),
        ("opening", "prepared", False),
        ("gone", "prepared", False),
        ("gone", "gone", True),
        ("open", "gone", False),
    ],
)
def test_how_far_is_far_enough(phase: str, wanted: str, *, reached: bool) -> None:
    assert Done(Phase(phase), 3).reaches(Phase(wanted), 3) is reached
    assert not Done(Phase(phase), 2).reaches(Phase(wanted), 3)
