"""What every store does: snapshot, watch, transaction, lease."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fleet_watcher import PATIENCE, Watcher

from bench.etcd_cluster import Cluster
from natkeep.errors import RefusedError, UnreachableError, UsageError
from natkeep.fleet.directory import DirectoryStore
from natkeep.fleet.store import ABSENT, Store, read
from natkeep.fleet.stores import open_store
from natkeep.policy import Agent

Open = Callable[[], Store]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("etcd"))
    cluster.wait()
    yield cluster
    cluster.close()


@pytest.fixture(params=["dir", pytest.param("etcd", marks=pytest.mark.needs("etcd"))])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Clients of one store, which is empty at first."""
    made: list[Store] = []
    name = f"dir:{tmp_path}/store"
    if request.param == "etcd":
        name = request.getfixturevalue("cluster").store

    def make() -> Store:
        made.append(open_store(name, Agent()))
        return made[-1]

    make().delete("/")
    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(stores: Open) -> Store:
    return stores()


def test_what_is_written_is_read(store: Store) -> None:
    assert store.range("/t/").items == {}
    assert store.txn({"/t/a": "1", "/t/b": '{"é": "\\u0000"}', "/u": "3"})
    items, revision = store.range("/t/")
    assert {key: item.value for key, item in items.items()} == {
        "/t/a": "1",
        "/t/b": '{"é": "\\u0000"}',
    }
    assert {item.revision for item in items.values()} == {revision}
    assert store.txn({"/t/a": None})
    assert read(store, "/t/a") is None
    store.delete("/t/")
    assert store.range("/t/").items == {}
    assert read(store, "/u") == store.range("/u").items["/u"]
    assert store.range("/u").revision > revision


def test_a_key_is_no_prefix_of_itself_with_more(store: Store) -> None:
    store.txn({"/t/web": "1", "/t/web2": "2"})
    item = read(store, "/t/web")
    assert item is not None
    assert item.value == "1"


@pytest.mark.parametrize("page", [1, 2, 6, 100])
def test_a_range_goes_on_from_a_key(
    store: Store, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natkeep.fleet.etcd._PAGE", page)
    keys = ["/t/a-b/1", "/t/a.b/1", "/t/a/1", "/t/a/2", "/t/a0/1", "/t/b/1"]
    store.txn(dict.fromkeys(keys, "x"))
    store.txn({"/s": "x", "/u": "x"})
    items, revision = store.range("/t/")
    assert [*items] == keys
    assert revision == items["/t/b/1"].revision + 1
    assert [*store.range("/t/", limit=1).items] == keys[:1]
    assert [*store.range("/t/", limit=4).items] == keys[:4]
    assert [*store.range("/t/", "/t/a0", 1).items] == keys[4:5]
    assert [*store.range("/t/", "/t/a/2").items] == keys[3:]
    assert [*store.range("/t/", "/t/b0", 1).items] == []


def test_a_transaction_is_whole_or_nothing(store: Store) -> None:
    assert store.txn({"/t/a": "1"}, {"/t/a": ABSENT})
    assert not store.txn({"/t/a": "2", "/t/b": "2"}, {"/t/a": ABSENT})
    assert not store.txn({"/t/a": "2", "/t/b": "2"}, {"/t/b": 7})
    item = read(store, "/t/a")
    assert item is not None
    assert (item.value, read(store, "/t/b")) == ("1", None)
    assert store.txn({"/t/a": "3", "/t/b": "3"}, {"/t/a": item.revision, "/t/b": ABSENT})
    assert not store.txn({"/t/a": "4"}, {"/t/a": item.revision}), "it is another by now"


def test_of_many_at_one_moment_one_creates(stores: Open) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        if stores().txn({"/t/owner": str(number)}, {"/t/owner": ABSENT}):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    item = read(stores(), "/t/owner")
    assert item is not None
    assert [int(item.value)] == won


def test_a_watch_misses_nothing_after_its_snapshot(stores: Open) -> None:
    ours, other = stores(), stores()
    ours.txn({"/t/before": "1"})
    _, revision = ours.range("/t/")
    other.txn({"/t/between": "2"})
    watcher = Watcher(ours, "/t/", revision)
    for number in range(50):
        other.txn({f"/t/{number}": "x", "/u": "not ours"})
    other.txn({"/t/before": None})
    assert watcher.wait(lambda it: "/t/before" in it.changes)
    assert watcher.changes == {
        "/t/between": "2", "/t/before": None, **{f"/t/{n}": "x" for n in range(50)}
    }  # fmt: skip
    assert watcher.count == 52


def test_what_was_deleted_is_said_once(stores: Open) -> None:
    ours, other = stores(), stores()
    ours.txn({"/t/a": "1"})
    watcher = Watcher(ours, "/t/", ours.range("/t/").revision)
    other.txn({"/t/a": None})
    assert watcher.wait(lambda it: it.count == 1)
    other.txn({"/t/b": "2"})
    assert watcher.wait(lambda it: "/t/b" in it.changes)
    assert watcher.count == 2


def test_close_ends_a_watch(store: Store) -> None:
    watcher = Watcher(store, "/t/", store.range("/t/").revision)
    store.close()
    assert watcher.wait(lambda it: it.ended)


@pytest.mark.whole
def test_what_is_leased_goes_with_its_lease(stores: Open) -> None:
    ours, other = stores(), stores()
    watcher = Watcher(other, "/t/", other.range("/t/").revision)
    lease = ours.lease(3)
    assert ours.txn({"/t/alive": "1"}, lease=lease)
    until = time.monotonic() + 3.2  # longer than it lasts
    while time.monotonic() < until:
        time.sleep(0.3)
        assert ours.lease(3, lease) == lease
    assert read(other, "/t/alive")
    until = time.monotonic() + PATIENCE
    while read(other, "/t/alive") and time.monotonic() < until:
        time.sleep(0.1)
    assert read(other, "/t/alive") is None
    assert watcher.wait(lambda it: it.changes == {"/t/alive": None})
    again = ours.lease(3, lease)
    assert again != lease, "who was away too long learns that it was"


def test_a_directory_that_others_can_write_is_no_store(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(RefusedError, match="others can write there"):
        DirectoryStore(str(tmp_path)).range("/")


def test_a_directory_that_cannot_be_made_is_away(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnreachableError, match="the store"):
        DirectoryStore(str(tmp_path / "file" / "x")).range("/")


def test_a_database_that_is_none_is_away(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "store").write_text("this is no database" * 100)
    with pytest.raises(UnreachableError, match="not a database"):
        DirectoryStore(str(tmp_path)).range("/")


@pytest.mark.parametrize("text", ["", "dir:", "redis://x", "dir"])
def test_what_is_no_store(text: str) -> None:
    with pytest.raises(UsageError, match="is not a store"):
        open_store(text, Agent())
