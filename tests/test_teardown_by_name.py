"""A site whose journal is lost, and a teardown that looks before it says that all is undone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from golden_journals.cases import V4, listed
from two_hosts import look, make_two_hosts

from natkeep.errors import LeftoverError, RefusedError
from natkeep.kernel.linux import LinuxKernel
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown, teardown_by_name
from natkeep.plan.move import Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

CONNECTIONS = {
    "web": listed("10.2.0.10:5000 10.1.0.2:50001", "10.2.0.10:5001 10.1.0.2:50002"),
    "other": listed("10.2.0.10:5000 10.1.0.2:60001"),
}


class Place:
    """A gateway and a destination, and what they show."""

    def __init__(self, names: dict[str, str], directory: Path) -> None:
        self.names, self.directory = names, directory
        self.sites = tuple(Site(Role(role), name) for role, name in names.items())
        self.before = self.look()

    def executor(self) -> Executor:
        state = StateDirectory(str(self.directory), create=True)
        return Executor(LinuxKernel(state.path), state)

    def prepare(self, move_id: str, mode: Mode = Mode.STATEFUL, *, opened: bool = True) -> None:
        move = Move(move_id, (V4,), self.sites, mode)
        prepare(self.executor(), move, CONNECTIONS[move_id])
        if opened:
            open_move(self.executor(), move_id)

    def lose_journal(self, move_id: str) -> None:
        for path in self.directory.glob(f"{move_id}.*"):
            path.unlink()

    def look(self) -> dict[str, str]:
        return look(self.names)

    def nft(self, role: str, line: str) -> str:
        command = ["ip", "netns", "exec", self.names[role], "nft", line]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def place(make_netns: Callable[[], str], tmp_path: Path) -> Place:
    return Place(make_two_hosts(make_netns), tmp_path / "state")


@pytest.mark.parametrize("mode", Mode)
def test_a_move_without_a_journal_goes_by_its_name_and_no_other(place: Place, mode: Mode) -> None:
    for move_id in CONNECTIONS:
        place.prepare(move_id, mode)
    place.lose_journal("web")

    assert teardown_by_name(place.executor(), "web", place.sites, yes=True)
    assert not any("web" in text for text in place.look().values())
    [status] = read_status(place.executor(), ("other",))
    assert [site.drift for site in status.sites] == [(), ()]
    assert not teardown_by_name(place.executor(), "web", place.sites)
    teardown(place.executor(), "other")
    assert place.look() == place.before


@pytest.mark.parametrize("mode", Mode)
def test_the_last_one_takes_the_tables_and_the_address_along(place: Place, mode: Mode) -> None:
    place.prepare("web", mode)
    place.lose_journal("web")
    assert teardown_by_name(place.executor(), "web", place.sites, yes=True)
    assert place.look() == place.before


def test_it_asks_where_connections_live_and_changes_nothing(place: Place) -> None:
    """Behind a closed gate a process may be about to come back, so all of them count."""
    place.prepare("web", opened=False)
    place.lose_journal("web")
    before = place.look()
    with pytest.raises(LeftoverError, match="2 connections of web live") as caught:
        teardown_by_name(place.executor(), "web", place.sites)
    assert caught.value.exit_code == 8
    assert place.look() == before


def test_a_move_that_has_a_journal_is_not_undone_by_name(place: Place) -> None:
    place.prepare("web")
    before = place.look()
    with pytest.raises(RefusedError, match="move web has a journal"):
        teardown_by_name(place.executor(), "web", place.sites, yes=True)
    assert place.look() == before


def test_a_teardown_looks_before_it_says_that_all_is_undone(place: Place) -> None:
    for move_id in CONNECTIONS:
        place.prepare(move_id)
    place.nft("gateway", "add set inet natkeep kept-web-9 { type ipv4_addr; }")

    with pytest.raises(LeftoverError, match="set kept-web-9: still there") as caught:
        teardown(place.executor(), "web")
    assert caught.value.exit_code == 8
    assert "natkeep teardown web --by-name --site gateway=" in str(caught.value)
    assert teardown_by_name(place.executor(), "web", place.sites, yes=True)
    assert place.executor().state.ids() == ("other",)
    teardown(place.executor(), "other")
    assert place.look() == place.before
