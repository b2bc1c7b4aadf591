"""Who may what in etcd that demands certificates and passwords, after `natkeep fleet init`."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet_processes import Processes
from fleet_watcher import Watcher
from guarded_etcd import Guarded, certify
from two_hosts import demand_as_before, look, make_two_hosts

from natkeep.errors import NatkeepError, RefusedError, UnreachableError
from natkeep.fleet import etcd, keys
from natkeep.fleet.etcd import EtcdStore
from natkeep.policy import Agent

pytestmark = pytest.mark.needs("etcd", "openssl")

NODES = ("gw-1", "host-b")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path_factory.mktemp("guarded"))
    try:
        done = guarded.init(*NODES)
        assert done.returncode == 0, done.stderr
        made = {user["name"]: user["made"] for user in json.loads(done.stdout)["users"]}
        assert made == dict.fromkeys(("root", "orderer", *NODES), True)
        yield guarded
    finally:
        guarded.cluster.close()


def read_rights(guarded: Guarded) -> dict[str, Any]:
    store = guarded.open("node", "root")
    users = store.call("auth/user/list")["users"]
    roles = {
        name: store.call("auth/role/get", role=name).get("perm") for name in {*users} - {"root"}
    }
    got = {name: store.call("auth/user/get", name=name)["roles"] for name in users}
    store.close()
    return {
        "roles": {name: sorted(map(str, perm or ())) for name, perm in roles.items()},
        "got": got,
    }


def test_passwords_are_in_files_that_their_owner_reads(guarded: Guarded) -> None:
    files = {path.name: path for path in guarded.passwords.iterdir()}
    assert {"root", "orderer", *NODES} <= {*files}
    assert len({path.read_text() for path in files.values()}) == len(files)
    for path in (*files.values(), guarded.passwords):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_made_again_nothing_changes_and_one_more_is_made_alone(guarded: Guarded) -> None:
    before = read_rights(guarded)
    files = {path.name: path.read_text() for path in guarded.passwords.iterdir()}
    agent = guarded.open("node", "gw-1")
    own = keys.done("gw-1", "again")
    assert agent.txn({own: "1"})
    done = guarded.init(*NODES)
    assert done.returncode == 0, done.stderr
    assert not any(user["made"] for user in json.loads(done.stdout)["users"])
    assert read_rights(guarded) == before

    done = guarded.init("gw-2")
    assert done.returncode == 0, done.stderr
    made = [user["name"] for user in json.loads(done.stdout)["users"] if user["made"]]
    assert made == ["gw-2"]
    assert {name: (guarded.passwords / name).read_text() for name in files} == files
    assert agent.txn({own: "2"}), "an agent that runs goes on"
    agent.close()
    orderer = guarded.open("node", "orderer")
    for node in (*NODES, "gw-2"):
        assert orderer.txn({f"{keys.wants(node)}again": "{}"})
        assert orderer.txn({f"{keys.wants(node)}again": None})
    orderer.close()


def test_a_right_too_many_is_taken_back(guarded: Guarded) -> None:
    before = read_rights(guarded)
    root = guarded.open("node", "root")
    perm = {"permType": "READWRITE", **etcd.below("/natkeep/v1/node/host-b/want/")}
    root.call("auth/role/grant", name="host-b", perm=perm)
    root.close()
    assert read_rights(guarded) != before
    assert guarded.init("host-b").returncode == 0
    assert read_rights(guarded) == before


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No election is waited for."""
    monkeypatch.setattr(etcd, "_PATIENCE", 1.0)


# ---- the table of who may what -------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
def test_without_a_certificate_nothing_is_said(guarded: Guarded) -> None:
    with pytest.raises(UnreachableError, match=r"agent\.cert|closed|reset|aborted"):
        guarded.open("", "")


@pytest.mark.parametrize("user", ["", "gw-1"])
def test_a_certificate_with_a_name_is_told_in_words(guarded: Guarded, user: str) -> None:
    with pytest.raises(UnreachableError, match="it has a common name"):
        guarded.open("named", user).range(keys.NODES)


@pytest.mark.usefixtures("impatient")
def test_an_authority_that_is_not_the_members(guarded: Guarded, tmp_path: Path) -> None:
    other = certify(tmp_path)
    settings = {**guarded.settings("node", ""), "ca": f"{other['ca']}.pem"}
    store = EtcdStore(guarded.cluster.clients, Agent(**settings))
    with pytest.raises(UnreachableError, match=r"its certificate is none of agent\.ca's"):
        store.range("/")
    settings = {"ca": f"{guarded.names['ca']}.pem", "cert": f"{other['node']}.pem"}
    settings["key"] = f"{other['node']}.key"
    store = EtcdStore(guarded.cluster.clients, Agent(**settings))
    with pytest.raises(UnreachableError, match=r"signed, agent\.cert|closed|reset|aborted|EOF"):
        store.range("/")


def test_a_certificate_without_a_password_is_nobody(guarded: Guarded) -> None:
    with pytest.raises(RefusedError, match="gives no name"):
        guarded.open("node", "")


def test_a_wrong_password(guarded: Guarded, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.touch(0o600)
    wrong.write_text("wrong\n")
    settings = {**guarded.settings("node", "gw-1"), "password_file": str(wrong)}
    with pytest.raises(RefusedError, match="authentication failed"):
        EtcdStore(guarded.cluster.clients, Agent(**settings)).range(keys.NODES)


def test_a_node_writes_what_it_has_done_and_that_it_lives_and_nothing_else(
    guarded: Guarded,
) -> None:
    store = guarded.open("node", "gw-1")
    own = keys.done("gw-1", "web")
    for readable in ("move/", "conn/", "node/", "group/"):
        store.range(f"{keys.TOP}{readable}")
    assert store.txn({own: "1"}, {keys.done("host-b", "web"): 0})
    assert store.txn({keys.alive("gw-1"): "{}"}, lease=store.lease(10))
    watcher = Watcher(store, keys.node("gw-1"), 1)
    assert watcher.wait(lambda it: own in it.changes)
    denied = [
        f"{keys.wants('gw-1')}web", f"{keys.group_wants('edge')}web", keys.alive("gw-2"),
        keys.done("gw-2", "web"), keys.move("web"), keys.owner("10.2.0.10"), "/other",
        f"{keys.lists('web')}1-a/0000", f"{keys.alive('gw-1')}s", keys.node("gw-1"),
    ]  # fmt: skip
    for key in denied:
        for value in ("1", None):
            with pytest.raises(RefusedError, match="permission denied"):
                store.txn({key: value})
    for prefix in ("/", keys.TOP, f"{keys.TOP}owner/"):
        with pytest.raises(RefusedError, match="permission denied"):
            store.range(prefix)
        with pytest.raises(NatkeepError):
            next(iter(store.watch(prefix, 1)))
    with pytest.raises(RefusedError, match="permission denied"):
        store.delete(keys.node("gw-1"))
    for path, words in (("auth/user/list", {}), ("auth/user/add", {"name": "x", "password": "y"})):
        with pytest.raises(RefusedError, match="permission denied"):
            store.call(path, **words)
    store._token = "ended"
    assert store.range(own).items, "it gives its password again"
    assert store.txn({own: None, keys.alive("gw-1"): None})
    store.close()


def test_who_orders_writes_nothing_that_a_node_says(guarded: Guarded) -> None:
    store = guarded.open("node", "orderer")
    written = [
        keys.move("x"), keys.owner("10.2.0.99"), f"{keys.wants('gw-1')}x",
        f"{keys.group_wants('edge')}x", f"{keys.lists('x')}1-a/0000",
    ]  # fmt: skip
    assert store.txn(dict.fromkeys(written, "1"))
    assert {*written} <= {*store.range(keys.TOP).items}
    assert store.txn(dict.fromkeys(written))
    for key in (keys.done("gw-1", "x"), keys.alive("gw-1"), f"{keys.wants('unknown')}x", "/other"):
        with pytest.raises(RefusedError, match="permission denied"):
            store.txn({key: "1"})
    with pytest.raises(RefusedError, match="permission denied"):
        store.call("auth/user/list")
    store.close()


# ---- bad input, and the whole way of a move ------------------------------------------------------


def test_bad_orders_to_init_change_nothing(guarded: Guarded, tmp_path: Path) -> None:
    before = read_rights(guarded)
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "root").write_text((guarded.passwords / "root").read_text())
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "root").touch(0o600)
    (wrong / "root").write_text("wrong\n")
    for nodes, place, code, why in (
        ((), "", 2, "which nodes?"),
        (("root",), "", 2, "is a user of its own"),
        (("orderer",), "", 2, "is a user of its own"),
        (("a/b",), "", 2, "is not a name of a node"),
        (("gw-3",), str(tmp_path / "none"), 4, "root's password of etcd"),
        (("gw-3",), str(wrong), 4, "authentication failed"),
        (("gw-3",), str(shared), 2, "can be read by others"),
    ):
        done = guarded.init(*nodes, place=place)
        assert done.returncode == code, done.stderr
        assert why in done.stderr
    assert read_rights(guarded) == before


class Named(Processes):
    """The agents and who orders, each by its own password."""

    guarded: Guarded

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        config = ["--config", self.guarded.config("orderer", "orderer")]
        return super().run(*words, *(config if words[0] == "fleet" else ()), **environment)

    def start(self, node: str, *words: str, fault: str = "") -> None:
        super().start(node, "--config", self.guarded.config(node, node), *words, fault=fault)


@pytest.mark.root
def test_agents_carry_a_move_from_apply_to_settled_by_these_rights(
    guarded: Guarded, tmp_path: Path, make_netns: Callable[[], str]
) -> None:
    fleet = Named(tmp_path, make_two_hosts(make_netns), guarded.cluster.store)
    fleet.guarded = guarded
    before = look(fleet.names)
    try:
        fleet.start_both()
        done = fleet.apply()
        assert done.returncode == 0, done.stderr
        fleet.call("fleet", "wait", "web")
        assert guarded.init("gw-3").returncode == 0, "rights change while agents run"
        fleet.call("open", "web", "--state-dir", fleet.state("host-b"))  # as the hook does
        fleet.call("fleet", "wait", "web", "--for", "open")
        fleet.call("fleet", "end", "web", "--yes")
        fleet.call("fleet", "wait", "web", "--for", "settled")
        demand_as_before(fleet.names, before)
        store = guarded.open("node", "orderer")
        left = {key for key in store.range(keys.TOP).items if "web" in key}
        store.close()
        assert keys.move("web") in left
        assert not left - {keys.move("web"), *(keys.done(node, "web") for node in NODES)}
    finally:
        fleet.close()
