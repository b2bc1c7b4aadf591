"""The store in etcd: members that die or hang, and what it says of who may do what."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import pytest
from fleet_watcher import Watcher

from bench.etcd_cluster import NUMBERS, Cluster
from natkeep.errors import RefusedError, UnreachableError, UsageError
from natkeep.fleet import etcd
from natkeep.fleet.etcd import Endpoint, EtcdStore
from natkeep.fleet.store import read
from natkeep.policy import Agent


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path)
    cluster.wait()
    yield cluster
    cluster.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No election is waited for."""
    monkeypatch.setattr(etcd, "_PATIENCE", 0.3)


def open_at(cluster: Cluster, *numbers: int, **settings: Any) -> EtcdStore:
    """A client that asks these members, in this order."""
    return EtcdStore([cluster.clients[number] for number in numbers], Agent(**settings))


@pytest.mark.needs("etcd")
def test_a_member_that_dies_is_left_and_nothing_is_missed(cluster: Cluster) -> None:
    """The leader, to which the writer and a watch are connected."""
    leader = cluster.leader()
    others = [number for number in NUMBERS if number != leader]
    store = open_at(cluster, leader, *others)
    _, revision = store.range("/t/")
    near, far = Watcher(store, "/t/", revision), Watcher(open_at(cluster, *others), "/t/", revision)
    for number in range(20):
        if number == 10:
            cluster.kill(leader)
        store.txn({f"/t/{number}": "x"})
    assert far.wait(lambda it: len(it.changes) == 20)
    assert near.wait(lambda it: it.ended), "its follower takes a snapshot then"
    assert len(store.range("/t/").items) == 20
    store.close()


@pytest.mark.needs("etcd")
def test_a_member_that_hangs_is_left_and_its_watches_end(cluster: Cluster) -> None:
    [follower, *_] = [number for number in NUMBERS if number != cluster.leader()]
    others = [number for number in NUMBERS if number != follower]
    for _ in range(10):  # on a busy machine it may have been left before it hangs
        store = open_at(cluster, follower, *others)
        watcher = Watcher(store, "/t/", store.range("/t/").revision)
        assert store.txn({"/t/a": "1"})
        assert watcher.wait(lambda it: bool(it.changes) or it.ended)
        if [*store._watches.values()] == [Endpoint.parse(cluster.clients[follower])]:
            break
        store.close()
    assert watcher.changes
    cluster.stop(follower)
    began = time.monotonic()
    assert store.txn({"/t/b": "1"})
    assert time.monotonic() - began < 10
    assert watcher.wait(lambda it: it.ended)
    cluster.go_on(follower)
    store.close()


@pytest.mark.needs("etcd")
def test_without_a_quorum_it_is_away_and_then_back(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_at(cluster, *NUMBERS)
    lease = store.lease(60)
    assert store.txn({"/t/a": "1"}, lease=lease)
    watcher = Watcher(store, "/t/", store.range("/t/").revision)
    leader = cluster.leader()
    stopped = [leader, next(number for number in NUMBERS if number != leader)]
    cluster.stop(*stopped)
    monkeypatch.setattr(etcd, "_PATIENCE", 0.3)
    with pytest.raises(UnreachableError, match="etcd cannot be reached"):
        store.range("/t/")
    monkeypatch.undo()
    cluster.go_on(*stopped)
    cluster.wait()
    assert read(store, "/t/a")
    assert store.lease(60, lease) == lease
    assert watcher.wait(lambda it: it.ended)
    store.close()


@pytest.mark.usefixtures("impatient")
def test_no_member_at_all() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        store = EtcdStore([f"http://127.0.0.1:{closed.getsockname()[1]}"], Agent())
        with pytest.raises(UnreachableError, match=r"cannot be reached: .*Connection refused"):
            store.range("/")


@pytest.mark.parametrize("url", ["", "x", "http://", "http://h", "ftp://h:1", "http://h:x", "h:1"])
def test_what_is_no_member(url: str) -> None:
    with pytest.raises(UsageError, match="is no member of etcd"):
        EtcdStore([url], Agent())


def test_ipv6_is_a_member() -> None:
    assert Endpoint.parse("https://[fd00::1]:2379") == Endpoint(True, "fd00::1", 2379)


class Strange(http.server.BaseHTTPRequestHandler):
    """What is not etcd, or what etcd's gateway may say."""

    answers: tuple[tuple[int, bytes], ...] = ()

    def do_POST(self) -> None:
        status, body = self.answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing is said."""


@pytest.mark.parametrize(
    ("status", "body", "error", "why"),
    [
        (400, b"CommonName of client sending a request against gateway will be ignored and not "
              b"used as expected\n", UnreachableError, "it has a common name"),
        (400, b"Client sent an HTTP request to an HTTPS server.\n", UnreachableError, "https"),
        (403, b'{"error":"etcdserver: permission denied","code":7}', RefusedError, "denied"),
        (400, b'{"error":"user name is empty","code":3}', RefusedError, "gives no name"),
        (404, b'{"error":"requested lease not found","code":5}', UnreachableError, "not found"),
        (502, b"<html>bad gateway</html>", UnreachableError, "bad gateway"),
        (200, b"<html>welcome</html>", UnreachableError, "not etcd"),
        (200, b"[]", UnreachableError, "not etcd"),
        (200, b"{}", UnreachableError, "not etcd"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("impatient")
def test_what_is_said_instead_is_told_in_words(
    status: int, body: bytes, error: type[Exception], why: str
) -> None:
    handler = type("Now", (Strange,), {"answers": ((status, body),)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        store = EtcdStore([f"http://127.0.0.1:{server.server_address[1]}"], Agent())
        with pytest.raises(error, match=why):
            store.range("/t/")
        server.shutdown()


def test_a_password_that_others_can_read_is_none(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("secret\n")
    path.chmod(0o644)
    with pytest.raises(UsageError, match="can be read by others"):
        EtcdStore(["http://h:1"], Agent(user="gw-1", password_file=str(path)))
    with pytest.raises(UsageError, match="cannot read"):
        EtcdStore(["http://h:1"], Agent(password_file=str(tmp_path / "none")))
    path.write_text("\n")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="is empty"):  # an `init` was killed as it wrote it
        EtcdStore(["http://h:1"], Agent(user="gw-1", password_file=str(path)))


def test_while_one_thread_leaves_a_member_others_have_one() -> None:
    store = EtcdStore(["http://h:1"], Agent())
    members = store._members
    [member] = members
    monitored = Emptied(members)
    store._members = monitored
    store._leave(member)
    assert not monitored.was_empty
    assert store._members == [member]


class Emptied(list[etcd.Endpoint]):
    """Whether it was empty for a moment."""

    was_empty = False

    def pop(self, index: SupportsIndex = -1) -> etcd.Endpoint:
        one = super().pop(index)
        self.was_empty |= not self
        return one


def test_a_certificate_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        EtcdStore(["https://h:1"], Agent(ca=str(tmp_path / "ca.pem")))
