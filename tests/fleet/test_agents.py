"""Agents as processes, with real namespaces and a store in a directory: the command line's way."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet_processes import Processes
from two_hosts import demand_as_before, look, run_ip

from bench.etcd_cluster import NUMBERS, Cluster
from natkeep.errors import RefusedError
from natkeep.faultpoints import POINTS
from natkeep.fleet import keys
from natkeep.fleet.done import parse_done
from natkeep.fleet.store import read
from natkeep.fleet.stores import open_store
from natkeep.fleet.wake import _EVENT, _OVERFLOW, Wake
from natkeep.policy import Agent

pytestmark = pytest.mark.root


def test_a_move_from_apply_to_settled(fleet: Processes) -> None:
    before = look(fleet.names)
    fleet.start_both()
    assert fleet.apply().returncode == 0
    fleet.call("fleet", "wait", "web")
    moves = json.loads(fleet.call("fleet", "status", "--json"))["moves"]
    assert [(s["node"], s["phase"]) for s in moves[0]["sites"]] == [
        ("gw-1", "open"), ("host-b", "prepared")
    ]  # fmt: skip
    assert fleet.run("fleet", "wait", "web", "--for", "open", "--timeout", "0").returncode == 1
    fleet.call("open", "web", "--state-dir", fleet.state("host-b"))  # as the hook does
    fleet.call("fleet", "wait", "web", "--for", "open")

    fleet.call("fleet", "end", "web")
    done = fleet.run("fleet", "wait", "web", "--for", "settled")
    assert (done.returncode, "2 connections live" in done.stderr) == (8, True)
    fleet.call("fleet", "end", "web", "--yes")
    assert fleet.run("fleet", "wait", "web").returncode == 4, "it is to be undone"
    fleet.call("fleet", "wait", "web", "--for", "settled")
    demand_as_before(fleet.names, before)
    assert "nothing is ordered" in fleet.call("fleet", "status")
    fleet.call("fleet", "wait", "web", "--for", "settled")
    fleet.call("fleet", "end", "web")


def test_agents_that_are_killed_and_come_back_touch_nothing(fleet: Processes) -> None:
    fleet.start_both()
    fleet.apply()
    fleet.call("fleet", "wait", "web")
    fleet.call("open", "web", "--state-dir", fleet.state("host-b"))
    fleet.call("fleet", "wait", "web", "--for", "open")
    times = [journal.stat().st_mtime_ns for journal in fleet.journals()]
    for node in ("host-b", "gw-1"):
        fleet.kill(node)
    fleet.start_both()
    fleet.call("fleet", "wait", "web", "--for", "open")
    assert [journal.stat().st_mtime_ns for journal in fleet.journals()] == times
    for node in ("host-b", "gw-1"):
        fleet.call("status", "web", "--strict", "--state-dir", fleet.state(node))


def test_where_the_process_was_is_silent_and_no_end_has_it_answer(
    fleet: Processes, make_netns: Callable[[], str]
) -> None:
    fleet.names["source"] = make_netns()
    run_ip("-n {source} address add 10.2.0.10/32 dev lo", fleet.names)
    before = look(fleet.names)
    fleet.start("host-a")
    fleet.start_both()
    fleet.wait_alive("host-a")
    site = {"node": "host-a", "role": "source", "netns": fleet.names["source"]}
    assert fleet.apply(sites=[*fleet.sites, site]).returncode == 0
    fleet.call("fleet", "wait", "web")
    [move] = json.loads(fleet.call("fleet", "status", "web", "--json"))["moves"]
    assert [(s["node"], s["phase"]) for s in move["sites"]] == [
        ("gw-1", "open"), ("host-a", "prepared"), ("host-b", "prepared")
    ]  # fmt: skip
    fleet.call("fleet", "end", "web")
    done = fleet.run("fleet", "wait", "web", "--for", "settled")
    assert done.returncode == 4
    assert "it would answer 2 peers with a reset" in done.stderr
    run_ip("-n {source} address del 10.2.0.10/32 dev lo", fleet.names)  # what is said there helps
    fleet.wait_settled("web")
    run_ip("-n {source} address add 10.2.0.10/32 dev lo", fleet.names)
    demand_as_before(fleet.names, before)


@pytest.mark.parametrize(
    ("node", "point"),
    [
        ("host-b", "begun-InstallGate"),
        ("host-b", "applied-FillSet"),
        ("gw-1", "applied-OpenGate"),
        ("gw-1", "applied-InsertEntries"),
    ],
)
def test_an_agent_killed_at_a_fault_point_and_started_again(
    fleet: Processes, node: str, point: str
) -> None:
    assert point in POINTS
    before = look(fleet.names)
    fleet.start("host-b", fault=point if node == "host-b" else "")
    fleet.start("gw-1", "--group", "edge", fault=point if node == "gw-1" else "")
    fleet.wait_alive("host-b", "gw-1")
    fleet.apply()
    assert fleet.agents[node].wait(30) == -signal.SIGKILL
    fleet.start(node, *(["--group", "edge"] if node == "gw-1" else []))
    fleet.call("fleet", "wait", "web")
    fleet.call("fleet", "end", "web")
    fleet.call("fleet", "wait", "web", "--for", "settled")
    demand_as_before(fleet.names, before)


@pytest.mark.needs("etcd")
def test_a_move_goes_on_while_etcd_and_the_agents_die(fleet: Processes) -> None:
    """The leader before the order, the quorum and both agents before the destination opens."""
    before = look(fleet.names)
    cluster = Cluster(fleet.path)
    try:
        cluster.wait()
        fleet.store = cluster.store
        fleet.start_both()
        leader = cluster.leader()
        cluster.kill(leader)
        assert fleet.apply().returncode == 0
        fleet.call("fleet", "wait", "web")

        left = [number for number in NUMBERS if number != leader]
        cluster.stop(*left)
        assert fleet.run("fleet", "status").returncode == 9
        fleet.call("open", "web", "--state-dir", fleet.state("host-b"))  # as the hook does
        for node in ("host-b", "gw-1"):
            fleet.kill(node)
        times = [journal.stat().st_mtime_ns for journal in fleet.journals()]
        fleet.start("host-b")
        fleet.start("gw-1", "--group", "edge")
        fleet.wait_said("host-b", "the store is away, nothing is undone")
        fleet.wait_said("gw-1", "the store is away, nothing is undone")
        cluster.go_on(*left)
        cluster.start(leader)
        cluster.wait()
        fleet.wait_alive("gw-1", "host-b")
        fleet.call("fleet", "wait", "web", "--for", "open")
        assert [journal.stat().st_mtime_ns for journal in fleet.journals()] == times
        for node in ("host-b", "gw-1"):
            fleet.call("status", "web", "--strict", "--state-dir", fleet.state(node))

        fleet.call("fleet", "end", "web", "--yes")
        fleet.call("fleet", "wait", "web", "--for", "settled")
        demand_as_before(fleet.names, before)
    finally:
        fleet.close()
        cluster.close()


def test_once_follows_what_is_ordered_and_ends(fleet: Processes) -> None:
    store = open_store(fleet.store, Agent())
    store.txn({keys.alive("host-b"): "{}", keys.alive("gw-1"): '{"groups": ["edge"]}'})
    assert fleet.apply().returncode == 0
    for node, group in (("host-b", ()), ("gw-1", ("--group", "edge"))):
        words = ("agent", "--once", "--node", node, *group, "--state-dir", fleet.state(node))
        fleet.call(*words)
    fleet.call("fleet", "wait", "web", "--timeout", "0")
    store.close()


def test_sigterm_ends_an_agent_and_not_its_moves(fleet: Processes) -> None:
    fleet.start_both()
    fleet.apply()
    fleet.call("fleet", "wait", "web")
    agent = fleet.agents["host-b"]
    agent.terminate()
    assert agent.wait(30) == 0
    status = json.loads(fleet.call("fleet", "status", "web", "--json"))
    assert status["agents"] == ["gw-1"]
    assert [site["phase"] for site in status["moves"][0]["sites"]] == ["open", "prepared"]


def test_an_order_ends_in_its_exit_code_and_changes_nothing(fleet: Processes) -> None:
    store = open_store(fleet.store, Agent())
    assert fleet.apply().returncode == 4, "no agent runs"
    fleet.start_both()
    for more, code in (
        ({"sites": fleet.sites[1:]}, 2),
        ({"maps": ["10.2.0.10"]}, 2),
        ({"connections": "not-there"}, 3),
        ({"maps": ["10.9.9.9=10.3.0.20"]}, 4),
        ({"sites": [{"node": "host-c", "role": "destination"}]}, 4),
        ({"maps": ["10.2.0.10=10.2.0.10"]}, 2),
    ):
        done = fleet.apply(**more)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("\nnatkeep: ") == 0, "one line, and perhaps its hint"
    assert not store.range(keys.MOVES).items
    assert fleet.run("fleet", "apply").returncode == 2
    assert fleet.run("fleet", "status", "web").returncode == 7
    assert fleet.run("fleet", "wait", "web").returncode == 7
    assert fleet.run("fleet", "end", "web").returncode == 0
    (fleet.path / "file").touch()
    away = {"NATKEEP_STORE": f"dir:{fleet.path}/file/x"}
    assert fleet.run("fleet", "status", **away).returncode == 9
    assert fleet.run("fleet", "status", NATKEEP_STORE="").returncode == 2
    store.close()


def test_a_wait_for_a_node_whose_agent_has_ended(fleet: Processes) -> None:
    fleet.start_both()
    fleet.agents["gw-1"].terminate()
    store = open_store(fleet.store, Agent())
    fleet.agents["gw-1"].wait(30)
    store.txn({keys.alive("gw-1"): '{"groups": ["edge"]}'})
    fleet.apply()
    store.txn({keys.alive("gw-1"): None})
    done = fleet.run("fleet", "wait", "web", "--timeout", "0.5")
    assert (done.returncode, "no agent runs as gw-1" in done.stderr) == (9, True)
    store.close()


def test_the_operators_file_bounds_what_the_store_orders(fleet: Processes) -> None:
    config = fleet.path / "natkeep.toml"
    config.write_text('allow_new = ["10.4.0.0/16"]\n[agent]\nnode = "host-b"\nmax_moves = 5\n')
    config.chmod(0o600)
    fleet.start("host-b", "--config", str(config))
    fleet.wait_alive("host-b")
    fleet.apply(sites=fleet.sites[:1])
    done = fleet.run("fleet", "wait", "web")
    assert (done.returncode, "NEW 10.3.0.20 is not allowed" in done.stderr) == (4, True)


def test_a_journal_that_changes_wakes(tmp_path: Path) -> None:
    wake = Wake(open_store(f"dir:{tmp_path}/store", Agent()))
    (tmp_path / "web.journal").write_text("1\n")
    wake.follow_journals(str(tmp_path), tuple)
    with (tmp_path / "web.journal").open("a") as file:
        file.write("2\n")
    assert {"web"} in wake.wait(10)
    (tmp_path / "web.journal").unlink()
    assert {"web"} in wake.wait(10)
    (tmp_path / "lock").touch()
    assert wake.wait(0.2) == []
    wake.close()


def test_a_name_that_another_host_has(fleet: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(fleet.store, Agent())
    wake = Wake(store)
    monkeypatch.setattr("natkeep.fleet.wake.LEASE", 0)
    wake.demand_name("host-b")
    fleet.start("host-b")
    fleet.wait_alive("host-b")
    wake.demand_name("host-b")  # of this host: one that was killed, and is started again
    key = keys.alive("host-b")
    told = json.loads(store.range(key).items[key].value)
    store.txn({key: json.dumps({**told, "boot": "another"})})
    with pytest.raises(RefusedError, match="an agent of another host runs as host-b"):
        wake.demand_name("host-b")
    wake.close()


def test_who_may_not_have_a_name_takes_it_from_no_other(fleet: Processes) -> None:
    store = open_store(fleet.store, Agent())
    other = json.dumps({"boot": "another"})
    store.txn({keys.alive("host-b"): other})
    fleet.start("host-b")
    agent = fleet.agents.pop("host-b")
    while not Path(fleet.state("host-b"), "agent.followed").exists():
        assert agent.poll() is None
    agent.terminate()
    assert agent.wait(30) == 0
    item = read(store, keys.alive("host-b"))
    assert item is not None
    assert item.value == other
    store.close()


def test_journals_of_which_too_many_change_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IN_Q_OVERFLOW: of those that are gone the kernel says nothing."""
    wake = Wake(open_store(f"dir:{tmp_path}/store", Agent()))
    (tmp_path / "web.journal").touch()
    events = [_EVENT.pack(-1, _OVERFLOW, 0, 0), b""]
    monkeypatch.setattr("natkeep.fleet.wake.os.read", lambda *_: events.pop(0))
    wake._follow_journals(-1, str(tmp_path), lambda: ["mail"])
    assert wake.wait(10) == [{"web", "mail"}]
    wake.close()


def test_what_an_agent_says_is_of_the_form(fleet: Processes) -> None:
    fleet.start("host-b")
    fleet.wait_alive("host-b")
    fleet.apply(sites=fleet.sites[:1])
    fleet.call("fleet", "wait", "web")
    store = open_store(fleet.store, Agent())
    items = store.range(keys.node("host-b")).items
    alive = json.loads(items[keys.alive("host-b")].value)
    assert {*alive} == {"schema", "pid", "version", "boot", "roles", "groups", "open"}
    assert alive["pid"] == fleet.agents["host-b"].pid
    done = json.loads(items[keys.done("host-b", "web")].value)
    assert {*done} == {
        "schema", "phase", "generation", "since", "maps", "as", "observed", "waits", "error", "lost"
    }  # fmt: skip
    assert abs(done["since"] - time.time()) < 60
    assert parse_done(items[keys.done("host-b", "web")].value).phase == "prepared"
    store.close()
