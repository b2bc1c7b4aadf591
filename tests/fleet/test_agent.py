"""The agent on the fake kernel and a store in a directory: what it does, and what it never does."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_kernel import KilledError
from fleet_nodes import LISTING, OPENED, ORDER, READY, UNDONE, Fleet, later
from fleet_nodes import fleet as fleet
from fleet_nodes import quick as quick

from natkeep.checkpoint.listing import parse_listing
from natkeep.errors import JournalError, RefusedError, UnreachableError
from natkeep.fleet import apply as orders
from natkeep.fleet import jobs, keys, progress, site
from natkeep.fleet.directory import DirectoryStore
from natkeep.fleet.done import NOTHING
from natkeep.fleet.order import parse_file
from natkeep.fleet.store import read
from natkeep.fleet.want import make_maps, parse_want
from natkeep.lifecycle import many
from natkeep.lifecycle.open import close_move, open_move
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.observation import Gate
from natkeep.plan.tuples import Endpoint
from natkeep.policy import Agent
from natkeep.values import replace


def surfaces(fleet: Fleet) -> dict[str, Any]:
    """All that the kernels hold, and the journals."""
    return {
        name: (copy.deepcopy(node.kernel.sites), node.journal())
        for name, node in fleet.nodes.items()
    }


# ---- the way of a move ---------------------------------------------------------------------------


def test_a_move_is_made_ready_opened_and_undone(fleet: Fleet) -> None:
    host_b, gateway, host_a = fleet.usual()
    fleet.apply()
    fleet.turn()
    assert fleet.phases() == READY
    assert host_b.kernel.sites["dst"].gates == {"web": Gate.CLOSED}
    assert gateway.kernel.sites["gw"].gates == {"web": Gate.OPEN}
    assert host_a.kernel.sites["src"].gates == {"web": Gate.CLOSED}

    fleet.open()
    fleet.turn()
    assert fleet.phases() == OPENED

    fleet.end(force=True)
    fleet.turn()
    assert fleet.phases() == UNDONE
    assert [node.journal() for node in fleet.nodes.values()] == [None] * 3
    assert all(
        not any(vars(s).values()) for n in fleet.nodes.values() for s in n.kernel.sites.values()
    )


def test_the_gateway_waits_for_the_destination(fleet: Fleet) -> None:
    host_b, gateway, _ = fleet.usual()
    fleet.apply()
    gateway.turn()
    assert gateway.journal() is None
    assert fleet.done("gw-1").waits == {"host-b": "prepared"}
    host_b.turn()
    gateway.turn()
    assert fleet.phases()["gw-1"] == "open"


def test_of_an_earlier_order_prepared_is_not_what_is_waited_for(fleet: Fleet) -> None:
    host_b, gateway, _ = fleet.usual()
    fleet.apply()
    fleet.turn()
    fleet.end()
    gateway.turn()
    host_b.kill()  # it says `prepared` still, of order 1
    host_b.start()
    fleet.apply()
    gateway.turn()
    assert fleet.done("gw-1").waits == {"host-b": "prepared"}


def test_what_sends_is_undone_first_and_the_destination_last(fleet: Fleet) -> None:
    host_b, gateway, host_a = fleet.usual()
    fleet.apply()
    fleet.turn()
    fleet.end()
    host_b.turn()
    host_a.turn()
    assert host_b.journal()
    assert host_a.journal()
    assert fleet.done("host-b").waits == {"gw-1": "gone", "host-a": "gone"}
    gateway.turn()
    host_b.turn()
    assert host_b.journal(), "the source is still there"
    host_a.turn()
    host_b.turn()
    assert fleet.phases() == UNDONE


def test_staged_orders_the_destination_alone_and_frozen_the_rest(fleet: Fleet) -> None:
    host_b, gateway, _ = fleet.usual()
    fleet.apply({**ORDER, "phase": "staged"})
    fleet.turn()
    assert fleet.phases() == {"host-b": "prepared", "gw-1": "gone", "host-a": "gone"}
    fleet.apply(listing=LISTING + "10.2.0.10:5000 10.1.0.2:50003\n")  # one more since
    fleet.turn()
    assert fleet.phases() == READY
    assert len(host_b.executor().state.load("web").connections) == 3
    assert gateway.kernel.sites["gw"].gates == {"web": Gate.OPEN}


def test_connections_that_live_are_asked_for(fleet: Fleet) -> None:
    fleet.usual()
    fleet.apply()
    fleet.turn()
    fleet.open()
    fleet.turn()
    before = surfaces(fleet)
    fleet.end()
    fleet.turn()
    error = fleet.error("gw-1")
    assert (error.exit, error.message.split(";")[0]) == (8, "2 connections live")
    assert surfaces(fleet) == before
    fleet.end(force=True)
    fleet.turn()
    assert fleet.phases() == UNDONE


def test_where_the_process_was_peers_are_not_reset(fleet: Fleet) -> None:
    """A way back: until the process is there again its host stays silent, then the rest goes."""
    host_b, gateway, host_a = fleet.usual()
    fleet.apply()
    fleet.turn()
    old = next(iter(host_b.kernel.sites["dst"].addresses))
    host_a.kernel.sites["src"].addresses.add(old)
    fleet.end()
    fleet.turn()
    error = fleet.error("host-a")
    assert (error.exit, "would answer 2 peers with a reset" in error.message) == (4, True)
    assert gateway.journal() is None
    assert host_a.journal()
    assert host_b.journal()
    open_move(host_a.executor(), "web")  # by the hook, of the restore there
    fleet.turn()
    assert fleet.phases() == UNDONE


def test_a_gateway_that_hears_the_process_is_not_undone_by_what_was_said_before(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook opens, and its agent has not told yet: the store says that nothing was opened."""
    host_b, gateway, _ = fleet.usual()
    fleet.apply()
    fleet.turn()
    fleet.open()
    look_at_sites = site.drain.look_at_sites

    def hear(*words: Any) -> Any:
        return tuple(
            replace(one, seen=one.seen and replace(one.seen, spoken=frozenset({b"x"})))
            for one in look_at_sites(*words)
        )

    fleet.end()
    with monkeypatch.context() as patch:
        patch.setattr(site.drain, "look_at_sites", hear)
        fleet.turn()
    error = fleet.error("gw-1")
    assert (error.exit, error.message.split(";")[0]) == (8, "2 connections live")
    assert gateway.journal()
    assert host_b.journal()


def test_what_has_ended_says_the_gateway(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source need not ask whether its process is back."""
    host_b, _, host_a = fleet.usual()
    fleet.apply()
    fleet.turn()
    fleet.open()
    fleet.turn()
    old = next(iter(host_b.kernel.sites["dst"].addresses))
    host_a.kernel.sites["src"].addresses.add(old)
    monkeypatch.setattr(site.drain, "count_alive", lambda *_: 0)
    fleet.end()
    fleet.turn()
    assert fleet.phases() == UNDONE


def test_nothing_is_left_in_the_store_but_the_generation(fleet: Fleet) -> None:
    fleet.usual()
    fleet.apply()
    fleet.turn()
    order = fleet.end()
    assert order is not None
    fleet.turn()
    assert orders.is_undone(fleet.store, order)
    orders.forget(fleet.store, order)
    fleet.turn()
    left = {key for key in fleet.store.range(keys.TOP).items if not key.endswith("/alive")}
    assert left == {keys.move("web")}
    assert fleet.end() is None
    assert fleet.apply().generation == 3
    fleet.turn()
    assert fleet.phases() == READY


def test_a_group_is_all_its_gateways_and_one_that_comes_later(fleet: Fleet) -> None:
    host_b, *_ = fleet.usual()
    second = fleet.add("gw-2", groups=("edge", "core"))
    order = fleet.apply()
    assert [name for name, _ in order.nodes()] == ["gw-1", "gw-2", "host-a", "host-b"]
    fleet.turn()
    assert fleet.phases() == {**READY, "gw-2": "open"}
    third = fleet.add("gw-3", groups=("edge",))
    fleet.turn()
    assert third.kernel.sites["gw"].gates == {"web": Gate.OPEN}
    assert not progress.look(fleet.store, "web").lacking("ready")
    second.kill()
    host_b.kill()
    host_b.bounds = Agent(node="host-b", groups=("edge",))  # a mistake that stops no end
    host_b.start()
    fleet.end()
    fleet.turn()
    assert host_b.journal(), "gw-2 sends here, as far as is known"
    assert "gw-2" in fleet.done("host-a").waits
    assert third.journal() is None
    host_b.kill()
    host_b.bounds = Agent(node="host-b")
    host_b.start()
    second.start()
    fleet.turn()
    assert {*fleet.phases().values()} == {"gone"}


def test_listeners_datagrams_and_peers_hosts_are_ordered_too(fleet: Fleet) -> None:
    host_b = fleet.add("host-b")
    peer = fleet.add("peer-1")
    sites = [ORDER["sites"][0], {"node": "peer-1", "role": "peer", "netns": "peer"}]
    listing = f"{LISTING}udp 10.2.0.10:53 *\nudp 10.2.0.10:4433 10.1.0.2:50594\n"
    order, _ = parse_file(json.dumps({**ORDER, "sites": sites}))
    order = replace(order, listeners=(Endpoint.parse("10.2.0.10:80"),))
    done, _ = orders.apply(fleet.store, order, parse_listing(listing, "list"))
    assert done.listed.count == 4
    fleet.turn()
    assert fleet.phases() == {"host-b": "prepared", "peer-1": "open"}
    for node in (host_b, peer):
        move = node.executor().state.load("web").move
        assert [*map(str, move.listeners)] == ["10.2.0.10:80"]
        assert (len(move.udp), len(move.udp_servers)) == (1, 1)


def test_nodes_are_found_whatever_their_names_are(fleet: Fleet) -> None:
    for name in ("a", "a-b", "a.b", "a0", "b"):
        fleet.add(name, groups=("edge",))
    fleet.add("host-b")
    order = fleet.apply({**ORDER, "sites": ORDER["sites"][:2]})
    assert [name for name, _ in order.nodes()] == ["a", "a-b", "a.b", "a0", "b", "host-b"]


def test_a_long_list_comes_in_pieces(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natkeep.fleet.listing.PIECE", 100)
    host_b, *_ = fleet.usual()
    listing = "".join(f"10.2.0.10:5000 10.1.0.2:{50000 + n}\n" for n in range(40))
    assert fleet.apply(listing=listing).listed.pieces == 12
    fleet.turn()
    assert fleet.phases() == READY
    assert len(host_b.executor().state.load("web").connections) == 40


# ---- what undoes ---------------------------------------------------------------------------------


def test_an_order_that_vanishes_undoes_nothing_and_it_is_said(fleet: Fleet) -> None:
    fleet.usual()
    fleet.apply()
    fleet.turn()
    before = surfaces(fleet)
    fleet.store.delete(keys.wants("host-b"))
    fleet.store.delete(keys.group_wants("edge"))
    fleet.turn()
    assert surfaces(fleet) == before
    for name in ("host-b", "gw-1"):
        error = fleet.error(name)
        assert error.code == "no-order"
        assert any("nothing is undone" in line for line in fleet.nodes[name].said)


def test_a_store_without_anything_undoes_nothing_after_a_start_either(fleet: Fleet) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply()
    fleet.turn()
    before = surfaces(fleet)
    host_b.kill()
    fleet.store.delete(keys.TOP)
    host_b.start()
    fleet.turn()
    assert surfaces(fleet) == before
    assert fleet.done("host-b").phase == "prepared"
    error = fleet.error("host-b")
    assert error.code == "no-order"


@pytest.mark.parametrize("ended", [False, True], ids=["still there", "ended since"])
def test_a_restored_backup_is_not_followed(fleet: Fleet, *, ended: bool) -> None:
    fleet.usual()
    fleet.apply()
    fleet.turn()
    backup = {key: item.value for key, item in fleet.store.range(keys.TOP).items.items()}
    fleet.end() if ended else fleet.apply()
    fleet.turn()
    before = surfaces(fleet)
    fleet.store.txn(backup)
    fleet.turn()
    assert surfaces(fleet) == before
    error = fleet.error("host-b")
    assert (error.exit, error.message.partition(",")[0]) == (4, "order 1 is older than 2")
    assert fleet.done("host-b").generation == 2, "what it said is said again"


def test_who_orders_after_a_restored_backup_is_heard(fleet: Fleet) -> None:
    fleet.usual()
    for _ in range(3):
        fleet.apply()
        fleet.turn()
    item = read(fleet.store, keys.move("web"))
    assert item is not None
    old = json.loads(item.value)
    fleet.store.txn({keys.move("web"): json.dumps({**old, "generation": 1})})
    assert fleet.apply().generation == 4


def test_the_deadline_undoes_a_gate_that_was_never_opened(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply({**ORDER, "phase": "staged"})
    fleet.turn()
    later(monkeypatch, 59)
    fleet.turn()
    assert host_b.journal()
    later(monkeypatch, 2)
    fleet.turn()
    assert host_b.journal() is None
    error = fleet.error("host-b")
    assert (error.exit, error.code) == (4, "deadline")
    host_b.kill()
    host_b.start()
    fleet.turn()
    assert host_b.journal() is None, "the same order does not have it prepared again"
    fleet.apply()
    fleet.turn()
    assert fleet.phases() == READY, "a newer one does"


def test_the_deadline_undoes_nothing_that_was_opened_even_if_it_is_closed_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply()
    fleet.turn()
    fleet.open()
    close_move(host_b.executor(), "web", dumps=True)
    before = surfaces(fleet)
    later(monkeypatch, 3600)
    fleet.turn()
    assert surfaces(fleet) == before
    assert fleet.done("host-b").phase == "prepared"


def test_the_deadline_undoes_no_destination_that_peers_are_sent_to(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway's gate was opened; without the destination peers would be reset."""
    fleet.usual()
    fleet.apply()
    fleet.turn()
    before = surfaces(fleet)
    later(monkeypatch, 3600)
    fleet.turn()
    assert surfaces(fleet) == before
    error = fleet.error("host-b")
    assert "not undone, since peers are sent here by gw-1" in error.message


def test_where_the_process_was_no_deadline_ends_the_silence(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, host_a = fleet.usual()
    fleet.apply()
    fleet.turn()
    later(monkeypatch, 3600)
    fleet.turn()
    assert host_a.journal()


def test_of_deadline_and_gateway_only_one_comes_first(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gateway has seen `prepared`, and the destination is undone before it opens."""
    host_b, gateway, _ = fleet.usual()
    fleet.apply()
    host_b.turn()
    assert gateway.agent is not None
    for prefix in (*gateway.agent.known.prefixes, keys.dones("host-b")):
        gateway._hear(gateway.agent, prefix)
    later(monkeypatch, 61)
    host_b.turn()
    assert host_b.journal() is None
    gateway.agent.reconcile({"web"})
    assert gateway.journal() is None, "it saw `prepared`, which is not true any more"
    gateway.turn()
    assert gateway.journal() is None


def test_the_hook_opens_in_the_moment_of_the_deadline(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply({**ORDER, "phase": "staged"})
    fleet.turn()
    clear = site.clear

    def open_before(*words: Any) -> bool:
        fleet.open()
        return clear(*words)

    monkeypatch.setattr(site, "clear", open_before)
    later(monkeypatch, 61)
    fleet.turn()
    assert host_b.journal()
    assert fleet.phases()["host-b"] == "open"


# ---- agents that are killed ----------------------------------------------------------------------


def test_agents_killed_after_open_touch_nothing_when_they_are_back(fleet: Fleet) -> None:
    fleet.usual()
    fleet.apply()
    fleet.turn()
    fleet.open()
    fleet.turn()
    before = surfaces(fleet)
    for node in fleet.nodes.values():
        node.kill()
        node.start()
    revision = fleet.store.range(keys.TOP).revision
    fleet.turn()
    assert surfaces(fleet) == before
    assert fleet.phases() == OPENED
    assert fleet.store.range(keys.TOP).revision == revision, "what was told is not told again"


def test_an_agent_killed_in_any_step_comes_to_the_same(tmp_path: Path, quick: None) -> None:
    """Each of the steps of the three nodes, in turn, is the agent's last."""

    def run(name: str, at: int | None) -> tuple[dict[str, str], int]:
        store = DirectoryStore(str(tmp_path / f"store-{name}-{at}"))
        fleet = Fleet(tmp_path / f"{name}-{at}", store)
        fleet.usual()
        fleet.apply()
        node = fleet.nodes[name]
        node.kernel.die_at = at
        try:
            fleet.turn()
        except KilledError:
            assert at is not None
            node.kill()
            node.kernel.die_at = None
            node.start()
            fleet.turn()
        count = node.kernel.applied
        fleet.open()
        fleet.end(force=True)
        phases = fleet.phases()
        fleet.turn()
        assert fleet.phases() == UNDONE
        assert all(not any(vars(s).values()) for s in node.kernel.sites.values())
        store.close()
        return phases, count

    for name in READY:
        phases, count = run(name, None)
        assert phases == READY
        assert count >= 2
        for at in range(count):
            assert run(name, at)[0] == READY


def test_an_agent_killed_before_the_journal_knows_as_much(fleet: Fleet) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply()
    want = read(fleet.store, f"{keys.wants('host-b')}web")
    assert want is not None
    assert host_b.agent is not None
    host_b.agent.followed.note("web", 1, "begun", parse_want(want.value).digest())
    host_b.kill()
    host_b.start()
    fleet.turn()
    assert fleet.phases() == READY


def test_a_gateway_that_may_have_been_opened_is_and_one_closed_since_is_not(
    fleet: Fleet,
) -> None:
    """The agent was killed between the kernel's word and the journal's."""
    _, gateway, _ = fleet.usual()
    fleet.apply()
    fleet.turn()
    journal = Path(gateway.directory, "web.journal")
    lines = journal.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["state"] == "done"
    journal.write_text("".join(lines[:-1]))
    gateway.kill()
    gateway.start()
    fleet.turn()
    assert fleet.phases() == READY
    close_move(gateway.executor(), "web", dumps=True)
    fleet.turn()
    assert gateway.kernel.sites["gw"].gates == {"web": Gate.CLOSED}
    assert fleet.phases()["gw-1"] == "prepared"


def test_a_step_that_fails_is_told_and_tried_again(fleet: Fleet) -> None:
    host_b, *_ = fleet.usual()
    host_b.kernel.fail_at = 2
    fleet.apply()
    host_b.turn()
    error = fleet.error("host-b")
    assert error.exit == 5
    assert host_b.journal() is None
    fleet.turn()
    assert fleet.phases() == READY
    assert fleet.done("host-b").error is None


def test_a_host_that_boots_is_made_ready_again(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gateway, _ = fleet.usual()
    fleet.apply()
    fleet.turn()
    gateway.kill()
    gateway.kernel.sites.clear()
    journal = Path(gateway.directory, "web.journal")
    lines = journal.read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    lines[0] = json.dumps({**header, "boot": "another"}) + "\n"
    journal.write_text("".join(lines))
    gateway.start()
    fleet.turn()
    assert gateway.kernel.sites["gw"].gates == {"web": Gate.OPEN}
    assert fleet.phases() == READY


# ---- what others do ------------------------------------------------------------------------------


def test_what_was_prepared_by_hand_is_left_alone(fleet: Fleet) -> None:
    from natkeep.lifecycle.prepare import prepare
    from natkeep.plan.move import Move, Site
    from natkeep.plan.roles import Role

    host_b, *_ = fleet.usual()
    order = fleet.apply()
    move = Move("web", make_maps(order.maps), (Site(Role.DESTINATION, "dst"),))
    prepare(host_b.executor(), move, parse_listing(LISTING, "list").connections)
    before = surfaces(fleet)
    fleet.turn()
    error = fleet.error("host-b")
    assert "by another hand" in error.message
    fleet.end()
    fleet.turn()
    assert surfaces(fleet)["host-b"] == before["host-b"]


def test_what_was_undone_by_hand_is_not_prepared_again(fleet: Fleet) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply()
    fleet.turn()
    teardown(host_b.executor(), "web")
    fleet.turn()
    assert host_b.journal() is None
    error = fleet.error("host-b")
    assert "undone by another hand" in error.message


def test_a_journal_that_cannot_be_read_is_told_and_stops_nothing_else(fleet: Fleet) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply()
    fleet.turn()
    Path(host_b.directory, "web.journal").write_text("{}\n")
    other = {**ORDER, "id": "other", "maps": ["10.2.0.11=10.3.0.21"]}
    fleet.apply(other, "10.2.0.11:5000 10.1.0.2:50001\n")
    fleet.end()
    fleet.turn()
    done = fleet.done("host-b")
    assert done.error is not None
    assert (done.error.exit, done.phase) == (7, "opening"), "it is neither gone nor prepared"
    assert fleet.done("host-b", "other").phase == "prepared"


def test_a_fault_of_natkeeps_is_told_and_stops_nothing_else(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    host_b, *_ = fleet.usual()

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("never")

    fleet.apply()
    with monkeypatch.context() as patch:
        patch.setattr(many, "prepare", fail)
        host_b.turn()
    error = fleet.error("host-b")
    assert (error.exit, error.message) == (1, "ZeroDivisionError: never")
    fleet.turn()
    assert fleet.phases() == READY


def test_one_agent_has_a_state_directory(fleet: Fleet) -> None:
    node = fleet.add("host-b")
    with pytest.raises(JournalError, match="another natkeep agent"):
        node.start()


def test_a_store_that_is_away_undoes_nothing(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply({**ORDER, "phase": "staged"})
    fleet.turn()
    before = surfaces(fleet)

    def away(*_: object, **__: object) -> None:
        raise UnreachableError("no member answers")

    assert host_b.agent is not None
    later(monkeypatch, 3600)
    with monkeypatch.context() as patch:
        for call in ("range", "txn"):
            patch.setattr(host_b.agent.store, call, away)
        host_b.agent.reconcile({"web"})
        host_b.agent.reconcile({"web"})
    assert surfaces(fleet) == before
    assert [line for line in host_b.said if "away" in line] == [
        "the store is away, nothing is undone: no member answers"
    ]


# ---- orders that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "refusal"),
    [
        ({"roles": ("gateway",)}, "host-b takes no orders as destination"),
        ({"netns": ("", "web")}, "host-b takes no orders in the namespace 'dst'"),
        ({"max_moves": 0}, "host-b has 0 moves already"),
    ],
)
def test_the_operators_file_bounds_the_store(
    fleet: Fleet, bounds: dict[str, Any], refusal: str
) -> None:
    host_b = fleet.add("host-b", **bounds)
    fleet.add("gw-1", groups=("edge",))
    fleet.add("host-a")
    fleet.apply()
    fleet.turn()
    error = fleet.error("host-b")
    assert error.exit == 4
    assert refusal in error.message
    assert not host_b.kernel.sites
    assert fleet.phases() == UNDONE


def test_a_list_that_does_not_match_its_checksum_is_none(fleet: Fleet) -> None:
    host_b, *_ = fleet.usual()
    fleet.apply()
    [piece] = fleet.store.range(keys.lists("web")).items
    fleet.store.txn({piece: LISTING.replace("50001", "50009")})
    fleet.turn()
    error = fleet.error("host-b")
    assert (error.exit, host_b.journal()) == (3, None)
    assert "checksum" in error.message


@pytest.mark.parametrize(
    "wrong",
    ["", "[]", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "role": 3}', "{", '"\\ud800"'],
)
def test_what_is_no_order_is_refused_by_name(fleet: Fleet, wrong: str) -> None:
    host_b = fleet.add("host-b")
    fleet.store.txn({f"{keys.wants('host-b')}web": wrong})
    fleet.turn()
    error = fleet.error("host-b")
    assert (error.exit, error.message[:13]) == (2, "half an order")
    assert host_b.journal() is None


def test_two_orders_for_one_old(fleet: Fleet) -> None:
    fleet.usual()
    fleet.apply()
    before = dict(fleet.store.range(keys.TOP).items)
    with pytest.raises(RefusedError, match=r"10\.2\.0\.10 is moved by web already"):
        fleet.apply({**ORDER, "id": "other"})
    assert fleet.store.range(keys.TOP).items == before
    fleet.turn()
    fleet.end()
    fleet.turn()
    assert fleet.apply({**ORDER, "id": "other"}).generation == 1


def test_of_two_orderers_at_one_moment_one_is_refused(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet.usual()
    cut = orders.cut

    def meanwhile(*words: Any) -> Any:
        monkeypatch.setattr(orders, "cut", cut)
        fleet.apply({**ORDER, "id": "other"})
        return cut(*words)

    monkeypatch.setattr(orders, "cut", meanwhile)
    with pytest.raises(RefusedError, match="is moved by other already"):
        fleet.apply()
    assert not read(fleet.store, keys.move("web"))


def test_an_order_for_a_node_that_is_not_there(fleet: Fleet) -> None:
    fleet.add("host-b")
    with pytest.raises(RefusedError, match="no agent of the group edge runs"):
        fleet.apply()
    fleet.add("gw-1", groups=("edge",))
    with pytest.raises(RefusedError, match="no agent runs as host-a"):
        fleet.apply()
    assert not fleet.store.range(keys.MOVES).items


def test_an_order_with_other_sites_is_not_taken_for_the_same(fleet: Fleet) -> None:
    fleet.usual()
    fleet.apply()
    with pytest.raises(RefusedError, match="with other maps or sites"):
        fleet.apply({**ORDER, "sites": ORDER["sites"][:2]})
    with pytest.raises(RefusedError, match="with other maps or sites"):
        fleet.apply({**ORDER, "maps": ["10.2.0.10=10.3.0.21"]})


def test_a_node_that_is_ordered_twice(fleet: Fleet) -> None:
    fleet.add("host-b", groups=("edge",))
    fleet.add("host-a")
    with pytest.raises(Exception, match="host-b is two of them"):
        fleet.apply()


# ---- many moves ----------------------------------------------------------------------------------


def apply_many(fleet: Fleet, count: int) -> list[str]:
    ids = [f"m{n}" for n in range(count)]
    for n, move_id in enumerate(ids):
        order = {**ORDER, "id": move_id, "maps": [f"10.2.1.{n}=10.3.1.{n}"], "deadline_s": 0}
        fleet.apply(order, f"10.2.1.{n}:5000 10.1.0.2:{50000 + n}\n")
    return ids


def test_many_orders_are_followed_at_once_and_each_is_told(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, gateway, _ = fleet.usual()
    ids = apply_many(fleet, 4)
    made = []
    prepare_many = jobs.prepare_many

    def note(executor: Any, wanted: Any) -> Any:
        made.append([one.move.id for one in wanted])
        return prepare_many(executor, wanted)

    monkeypatch.setattr(jobs, "prepare_many", note)
    vars(gateway.kernel)["fail_at"] = 1  # of one of them, once
    fleet.turn()
    assert ids in made
    for move_id in ids:
        assert {n: str(fleet.done(n, move_id).phase) for n in fleet.nodes} == READY
    for move_id in ids[1:]:
        fleet.end(move_id, force=True)
    fleet.turn()
    assert gateway.executor().state.ids() == ("m0",)
    assert {str(fleet.done("gw-1", move_id).phase) for move_id in ids[1:]} == {"gone"}


def test_of_many_orders_as_many_are_followed_as_are_allowed(fleet: Fleet) -> None:
    fleet.add("host-b", max_moves=2)
    fleet.add("gw-1", groups=("edge",))
    fleet.add("host-a")
    ids = apply_many(fleet, 3)
    fleet.turn()
    errors = [fleet.done("host-b", move_id).error for move_id in ids]
    assert [error and error.message for error in errors] == [
        None, None, "host-b has 2 moves already (agent.max_moves)"
    ]  # fmt: skip
    assert str(fleet.done("gw-1", ids[2]).phase) == "gone"


def test_a_gateway_that_boots_before_its_destination_is_heard_was_ready_all_the_same(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it waits it is gone; what it was before decides whether it is filled in time."""
    host_b, gateway, _ = fleet.usual()
    fleet.apply()
    fleet.turn()
    for node in (host_b, gateway):
        node.kill()
        node.kernel.sites.clear()
        shutil.rmtree(node.directory)
    fleet.store.txn({keys.done("host-b", "web"): NOTHING.write(0)})
    gateway.start()
    for _ in range(2):
        gateway.turn()
        done = fleet.done("gw-1")
        assert (done.waits, done.lost) == ({"host-b": "prepared"}, True)
    made = []
    prepare_many = jobs.prepare_many

    def note(executor: Any, wanted: Any) -> Any:
        made.extend(one.again for one in wanted)
        return prepare_many(executor, wanted)

    host_b.start()
    host_b.turn()
    monkeypatch.setattr(jobs, "prepare_many", note)
    gateway.turn()
    assert made == [True]
    assert not fleet.done("gw-1").lost
