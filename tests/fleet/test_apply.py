"""What is written into the store, and that an order which is refused changes nothing there."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fleet_nodes import LISTING, ORDER, READY, UNDONE, Fleet
from fleet_nodes import fleet as fleet
from fleet_nodes import quick as quick

from natkeep.cli import main
from natkeep.errors import RefusedError, UnreachableError
from natkeep.fleet import apply as orders
from natkeep.fleet import keys
from natkeep.fleet.order import Order
from natkeep.fleet.store import Snapshot, read

MORE = f"{LISTING}10.2.0.10:5000 10.1.0.2:50003\n"
OTHER: dict[str, Any] = {**ORDER, "id": "other"}


def owner(fleet: Fleet, old: str = "10.2.0.10") -> str:
    item = read(fleet.store, keys.owner(old))
    return item.value if item else ""


def everything(fleet: Fleet) -> dict[str, str]:
    """All values, but for what agents say."""
    items = fleet.store.range(keys.TOP).items
    return {key: item.value for key, item in items.items() if "/done/" not in key}


def come_between(fleet: Fleet, monkeypatch: pytest.MonkeyPatch, *words: Any) -> None:
    """While the next order is being written, another one comes."""
    txn = fleet.store.txn

    def write(puts: Any, *more: Any, **named: Any) -> bool:
        if more:
            monkeypatch.undo()
            fleet.apply(*words)
        return txn(puts, *more, **named)

    monkeypatch.setattr(fleet.store, "txn", write)


@pytest.mark.parametrize("first", [ORDER, OTHER], ids=["the same move", "another one"])
def test_an_order_that_comes_second_leaves_nothing(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, first: dict[str, Any]
) -> None:
    fleet.usual()
    come_between(fleet, monkeypatch, first)
    with pytest.raises(RefusedError, match="another order came at the same time"):
        fleet.apply(listing=MORE)
    before = everything(fleet)
    assert [key for key in before if key.startswith(f"{keys.TOP}conn/")] == [
        key for key in before if key.startswith(keys.lists(first["id"]))
    ]
    fleet.turn()
    assert str(fleet.done("host-b", first["id"]).phase) == "prepared"


def test_the_same_order_twice_at_one_moment_stands(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.usual()
    come_between(fleet, monkeypatch)
    fleet.apply()
    fleet.turn()
    assert fleet.phases() == READY


def test_an_order_that_is_not_written_to_the_end_leaves_the_list_of_the_one_before(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.usual()
    fleet.apply()
    fleet.turn()
    txn = fleet.store.txn

    def write(puts: Any, *more: Any, **named: Any) -> bool:
        if more:
            raise UnreachableError("no member answers")
        return txn(puts, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(fleet.store, "txn", write)
        with pytest.raises(UnreachableError):
            fleet.apply(listing=MORE)
    fleet.add("gw-2", groups=("edge",))
    fleet.turn()
    assert fleet.phases() == {**READY, "gw-2": "open"}
    fleet.end(force=True)
    fleet.turn()
    fleet.apply(listing=MORE)
    [piece] = fleet.store.range(keys.lists("web")).items.values()
    assert piece.value == MORE, "and no other list is left"


def undone(fleet: Fleet) -> Order:
    """A move that was ready everywhere, and is undone everywhere by the order that this is."""
    fleet.usual()
    fleet.apply()
    fleet.turn()
    ended = fleet.end()
    fleet.turn()
    assert ended is not None
    return ended


def test_who_forgets_a_move_takes_no_old_from_another(fleet: Fleet) -> None:
    ended = undone(fleet)
    fleet.apply(OTHER)
    assert owner(fleet) == "other"
    orders.forget(fleet.store, ended)
    assert owner(fleet) == "other"
    with pytest.raises(RefusedError, match="is moved by other already"):
        fleet.apply()


def test_who_forgets_a_move_leaves_the_list_of_a_newer_order(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = undone(fleet)
    come_between(fleet, monkeypatch)
    orders.forget(fleet.store, ended)
    fleet.turn()
    assert fleet.phases() == READY


def test_an_old_that_is_moved_no_more_is_free(fleet: Fleet) -> None:
    fleet.usual()
    two = [*ORDER["maps"], "10.2.0.11=10.3.0.21"]
    fleet.apply({**ORDER, "maps": two}, f"{LISTING}10.2.0.11:5000 10.1.0.2:50001\n")
    fleet.end()
    fleet.turn()
    fleet.apply()
    fleet.turn()
    fleet.apply({**OTHER, "maps": two[1:]}, "10.2.0.11:5000 10.1.0.2:50001\n")
    fleet.turn()
    assert str(fleet.done("gw-1", "other").phase) == "open"


def test_sites_that_are_no_more_are_ordered_nothing(fleet: Fleet) -> None:
    """A node that was named, and is one of a group in the next order."""
    fleet.usual()
    named = [ORDER["sites"][0], {"node": "gw-1", "role": "gateway", "netns": "gw"}]
    fleet.apply({**ORDER, "sites": named})
    fleet.turn()
    fleet.end()
    with pytest.raises(RefusedError, match="not undone yet, with other maps or sites"):
        fleet.apply()
    fleet.turn()
    assert fleet.phases() == UNDONE
    fleet.apply()
    fleet.turn()
    assert fleet.phases() == READY


def test_what_is_ordered_whole_is_not_staged_again(fleet: Fleet) -> None:
    fleet.usual()
    fleet.apply()
    before = everything(fleet)
    with pytest.raises(RefusedError, match="is ordered whole already"):
        fleet.apply({**ORDER, "phase": "staged"})
    assert everything(fleet) == before


def test_a_group_of_which_none_runs_any_more(fleet: Fleet) -> None:
    fleet.usual()
    fleet.apply()
    fleet.store.txn({keys.alive("gw-1"): None})
    with pytest.raises(RefusedError, match="no agent of the group edge runs"):
        fleet.apply()


def test_what_a_later_natkeep_says_is_neither_gone_nor_closed(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply()
    fleet.turn()
    fleet.nodes["gw-1"].kill()
    later = json.dumps({"schema": 2, "phase": "gone", "generation": 1, "error": None})
    fleet.store.txn({keys.done("gw-1", "web"): later})
    monkeypatch.setattr("natkeep.fleet.site.Seen.left", lambda *_: 0)
    fleet.turn()
    assert host_b.journal(), "peers may be sent here"
    error = fleet.error("host-b")
    assert "since peers are sent here by gw-1" in error.message
    fleet.store.txn({keys.done("host-b", "web"): later})
    assert not orders._is_unopened(fleet.store, fleet.apply())


def test_one_key_is_read_whatever_begins_like_it(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    found = fleet.store.range

    def look(*words: Any, **named: Any) -> Snapshot:
        snapshot = found(*words, **named)
        asked.append(len(snapshot.items))
        return snapshot

    fleet.store.txn({f"/t/web{n}": "x" for n in ("", *range(20))})
    monkeypatch.setattr(fleet.store, "range", look)
    assert read(fleet.store, "/t/web")
    assert asked == [1]


def test_a_move_that_cannot_be_read_hides_no_other(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.usual()
    fleet.apply()
    fleet.store.txn({keys.move("later"): '{"schema": 2}'})
    monkeypatch.setenv("NATKEEP_STORE", f"dir:{fleet.path}/store")
    assert main(["fleet", "status"]) == 0
    said = capsys.readouterr().out
    assert "web: frozen" in said
    assert "later: a move in the store cannot be read: schema 2 is not 1" in said
    assert main(["fleet", "status", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [move["id"] for move in shown["moves"]] == ["web"]
    assert [line.partition(":")[0] for line in shown["unread"]] == ["later"]
