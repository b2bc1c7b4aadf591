"""The store in etcd: members that die or hang, and what it says of who may do what."""

from __future__ import annotations

import http.server
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    store = open_at(cluster, follower, *(number for number in NUMBERS if number != follower))
    watcher = Watcher(store, "/t/", store.range("/t/").revision)
    assert store.txn({"/t/a": "1"})
    assert watcher.wait(lambda it: bool(it.changes))
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


def test_a_certificate_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        EtcdStore(["https://h:1"], Agent(ca=str(tmp_path / "ca.pem")))


def certify(path: Path) -> dict[str, str]:
    """A CA, and certificates of it: the server's, and clients' without and with a CN."""

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=path, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(*new, "-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/O=natkeep test")
    for name, subject, extensions in (
        (
            "server",
            "/O=etcd",
            "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth",
        ),
        ("node", "/O=natkeep/OU=gw-1", "extendedKeyUsage=clientAuth"),
        ("named", "/CN=gw-1", "extendedKeyUsage=clientAuth"),
    ):
        (path / "ext").write_text(extensions)
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", subject)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "ext")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    return {name: str(path / name) for name in ("ca", "server", "node", "named")}


@pytest.mark.needs("etcd", "openssl")
def test_who_may_ask_and_what(tmp_path: Path) -> None:
    """mTLS proves the machine, a password names it, and a role is a prefix of keys."""
    names = certify(tmp_path)
    cluster = Cluster(
        tmp_path, f"--cert-file={names['server']}.pem", f"--key-file={names['server']}.key",
        f"--trusted-ca-file={names['ca']}.pem", "--client-cert-auth", scheme="https",
    )  # fmt: skip
    try:
        for secret in ("root", "gw-1"):
            (tmp_path / secret).write_text(f"{secret}-secret\n")
            (tmp_path / secret).chmod(0o600)
        ca = f"{names['ca']}.pem"
        node = {"ca": ca, "cert": f"{names['node']}.pem", "key": f"{names['node']}.key"}
        named = {"ca": ca, "cert": f"{names['named']}.pem", "key": f"{names['named']}.key"}
        gateway = {"user": "gw-1", "password_file": str(tmp_path / "gw-1")}

        admin = open_at(cluster, *NUMBERS, **node)
        until = time.monotonic() + 60
        while True:
            try:
                admin.range("/")
                break
            except UnreachableError:
                assert time.monotonic() < until
        _give_roles(admin, {"root": "root-secret", "gw-1": "gw-1-secret"})

        with pytest.raises(UnreachableError, match=r"certificate|closed|reset|aborted|EOF"):
            open_at(cluster, 0, ca=ca).range("/t/")
        for settings in (named, {**named, **gateway}):
            with pytest.raises(UnreachableError, match="it has a common name"):
                open_at(cluster, 0, **settings).range("/t/")
        with pytest.raises(RefusedError, match="gives no name"):
            open_at(cluster, 0, **node).range("/natkeep/v1/node/")
        (tmp_path / "gw-1").write_text("wrong")
        with pytest.raises(RefusedError, match="authentication failed"):
            open_at(cluster, 0, **node, **gateway).range("/natkeep/v1/node/")
        (tmp_path / "gw-1").write_text("gw-1-secret")
        store = open_at(cluster, *NUMBERS, **node, **gateway)
        own = "/natkeep/v1/node/gw-1/"
        assert store.txn({f"{own}done/web": "1"}, {"/natkeep/v1/node/b/done/web": 0})
        watcher = Watcher(store, own, 1)
        assert watcher.wait(lambda it: it.changes == {f"{own}done/web": "1"})
        for key in (f"{own}want/web", "/natkeep/v1/node/gw-2/done/web", "/natkeep/v1/move/web"):
            with pytest.raises(RefusedError, match="permission denied"):
                store.txn({key: "1"})
        with pytest.raises(RefusedError, match="permission denied"):
            store.range("/")
        store._token = "ended"
        assert store.range(own).items
        store.close()
    finally:
        cluster.close()


def _give_roles(admin: EtcdStore, passwords: dict[str, str]) -> None:
    """root, and gw-1 as an agent: it reads, and writes what it has done."""

    for name, password in passwords.items():
        admin._call("auth/user/add", name=name, password=password)
        admin._call("auth/role/add", name=name)
        admin._call("auth/user/grant", user=name, role=name)
    for kind, key in (("READ", "/natkeep/v1/"), ("READWRITE", "/natkeep/v1/node/gw-1/done/")):
        perm = {"permType": kind, **etcd._below(key)}
        admin._call("auth/role/grant", name="gw-1", perm=perm)
    admin._call("auth/enable")
