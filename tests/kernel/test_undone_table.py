"""What stays at a destination where a move was undone: exact tuples are dropped, for a while."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_journals.cases import V4, V6, listed
from two_hosts import look, make_two_hosts, run_ip

from natkeep.errors import KernelError
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import entered
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lab.translators import natkeep_command
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import Cleared, gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.rollback import rollback
from natkeep.lifecycle.teardown import teardown, teardown_by_name
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

TCP_REPAIR = 19
CONNECTIONS = listed(
    "10.2.0.10:5000 10.1.0.2:50001",
    "10.2.0.10:5001 10.1.0.2:50002",
    "[fd00:2::10]:80 [fd00:1::2]:50003",
)
KEYS = (
    "10.3.0.20 . 10.1.0.2 . 50001 . 5000",
    "10.3.0.20 . 10.1.0.2 . 50002 . 5001",
    "fd00:3::20 . fd00:1::2 . 50003 . 80",
)


class Place:
    """A gateway and a destination, of which a move of its own is made or not."""

    def __init__(self, names: dict[str, str], directory: Path) -> None:
        self.names, self.directory = names, directory
        self.sites = {role: Site(Role(role), name) for role, name in names.items()}
        self.before = self.look()

    def executor(self, drops: int = 600) -> Executor:
        state = StateDirectory(str(self.directory), create=True)
        return Executor(LinuxKernel(state.path), state, drops=drops)

    def prepare(self, *roles: str, mode: Mode = Mode.STATEFUL, move_id: str = "web") -> None:
        sites = tuple(self.sites[role] for role in roles or ("destination",))
        prepare(self.executor(), Move(move_id, (V4, V6), sites, mode), CONNECTIONS)

    def look(self) -> dict[str, str]:
        return look(self.names)

    def run(self, *command: str) -> str:
        at = ["ip", "netns", "exec", self.names["destination"], *command]
        return subprocess.run(at, capture_output=True, text=True, check=False).stdout

    def dropped(self) -> list[str]:
        """Which tuples are."""
        text = self.run("nft", "list", "table", "inet", "natkeep-undone")
        words = " ".join(text.split())
        return [key for key in KEYS if f"{key} timeout" in words]


@pytest.fixture
def place(make_netns: Callable[[], str], tmp_path: Path) -> Place:
    names = make_two_hosts(make_netns)
    run_ip("-n {destination} address add fd00:3::20/64 dev dest0 nodad", names)
    run_ip("-n {destination} route add fd00:1::/64 dev dest0", names)
    await_addresses(names["destination"])
    return Place(names, tmp_path / "state")


@pytest.mark.parametrize("mode", Mode)
def test_where_a_move_was_never_opened_what_a_gateway_sends_goes_on_being_dropped(
    place: Place, mode: Mode
) -> None:
    place.prepare(mode=mode)
    assert place.dropped() == []
    teardown(place.executor(), "web")
    assert place.dropped() == [*KEYS]
    after = place.look()
    ruleset = after.pop("destination: ruleset")
    place.before.pop("destination: ruleset")
    assert after == place.before
    assert '"name": "natkeep"' not in ruleset
    teardown(place.executor(), "web")
    assert place.dropped() == [*KEYS]


def test_status_there_tells_of_it(place: Place) -> None:
    command = (*natkeep_command(), "--state-dir", str(place.directory), "status", "--json")
    place.prepare()
    assert "dropped" not in json.loads(place.run(*command))
    teardown(place.executor(), "web")
    assert json.loads(place.run(*command)) == {"schema": 1, "moves": [], "dropped": 3}


def test_it_ends_by_itself_and_the_next_act_leaves_no_trace(place: Place) -> None:
    place.prepare()
    teardown(place.executor(drops=3), "web")
    assert place.dropped() == [*KEYS]
    deadline = time.monotonic() + 30
    while place.dropped():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    place.prepare()
    assert "natkeep-undone" not in place.run("nft", "list", "tables")
    teardown(place.executor(drops=0), "web")
    assert place.look() == place.before


def test_a_gate_takes_its_place(place: Place) -> None:
    place.prepare()
    teardown(place.executor(), "web")
    place.prepare()
    assert "natkeep-undone" not in place.run("nft", "list", "tables")
    rollback(place.executor(), "web")
    assert place.dropped() == [*KEYS]


def test_one_move_with_its_gateway_leaves_none(place: Place) -> None:
    place.prepare("gateway", "destination")
    teardown(place.executor(), "web")
    assert place.look() == place.before


def test_only_what_has_not_ended_is_dropped(place: Place) -> None:
    place.prepare()
    open_move(place.executor(), "web")
    place.run("conntrack", "-D", "-p", "tcp", "--orig-port-src", "50001")
    teardown(place.executor(), "web")
    assert place.dropped() == [*KEYS[1:]]


def test_what_has_its_socket_here_is_broken_and_not_dropped(place: Place) -> None:
    """--yes was said, and its peer is told by a reset."""
    place.prepare()
    with entered(place.names["destination"]):
        restored = socket.socket()
        restored.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        restored.bind(("10.2.0.10", 5000))
        restored.connect(("10.1.0.2", 50001))  # in repair: nothing is sent
    open_move(place.executor(), "web")
    teardown(place.executor(), "web")
    restored.close()
    assert place.dropped() == [*KEYS[1:]]


def test_a_move_whose_connections_have_all_ended_leaves_none(place: Place) -> None:
    place.prepare()
    open_move(place.executor(), "web")
    for family in ("ipv4", "ipv6"):
        place.run("conntrack", "-D", "-f", family, "-p", "tcp")
    teardown(place.executor(), "web")
    assert place.look() == place.before


def test_a_prepare_that_fails_leaves_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from natkeep.lifecycle import executor

    def fail(*_: object) -> None:
        raise KernelError("told to fail")

    monkeypatch.setattr(
        executor.faultpoints,
        "reach",
        lambda point, *kind: (
            point == "x" or (fail() if (point, *kind) == ("done", "InsertEntries") else None)
        ),
    )
    with pytest.raises(KernelError):
        place.prepare()
    assert place.dropped() == [*KEYS]


def test_gc_ends_it_unless_it_has_just_left_it(place: Place) -> None:
    place.prepare()
    teardown(place.executor(), "web")
    site = place.sites["destination"]
    cleared = gc(place.executor(), (site,)).cleared
    assert cleared == (Cleared("drop", str(site), "of 3 connections undone"),)
    assert place.look() == place.before

    place.prepare()
    executor = place.executor()
    journal = place.directory / "web.journal"
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join(lines[:-1]) + "\n")  # begun, and killed in the last step
    assert [one.kind for one in gc(executor, (site,)).cleared] == ["move"]
    assert place.dropped() == [*KEYS]


def test_a_lost_journal_leaves_it_too(place: Place) -> None:
    place.prepare()
    for path in place.directory.glob("web.*"):
        path.unlink()
    sites = (place.sites["destination"],)
    assert teardown_by_name(place.executor(), "web", sites, yes=True)
    assert place.dropped() == [*KEYS]


def test_what_another_move_keeps_there_is_not_dropped(place: Place) -> None:
    """As of a move that was to be replaced, and goes on."""
    place.prepare()
    open_move(place.executor(), "web")
    keys = place.executor().kernel
    site = place.sites["destination"]
    keys.open_sites([site])
    from natkeep.kernel.undone_table import find_arriving

    olds = frozenset({V4.old, V6.old})
    assert len(keys.ask(site, find_arriving, "web", olds)) == 3
    asks = "ip saddr . tcp sport . tcp dport @kept-web-0"
    rule = f'insert rule inet natkeep gate-at-10.3.0.20 {asks} jump gate-web comment "next"'
    place.run("nft", rule)
    assert len(keys.ask(site, find_arriving, "web", olds)) == 1


@pytest.mark.parametrize("mode", Mode)
def test_where_yes_was_said_of_an_open_move_only_what_has_lived_there(
    place: Place, mode: Mode
) -> None:
    """Its process was dumped, to move on or back: that --yes breaks nothing."""
    place.prepare(mode=mode)
    open_move(place.executor(), "web")
    place.run("nft", "add element inet natkeep heard-web-0 { 10.1.0.2 . 50002 . 5001 }")
    executor = place.executor()
    executor.breaks = True
    teardown(executor, "web")
    assert place.dropped() == [KEYS[1]]


def test_an_id_that_looks_like_the_name_of_an_address_chain(place: Place) -> None:
    place.prepare(move_id="at-web")
    teardown(place.executor(), "at-web")
    assert place.dropped() == [*KEYS]
