"""two state directories at one site: neither takes what the other's connections live by."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from natkeep.errors import LeftoverError
from natkeep.kernel import nft_strays, rtnetlink
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import inside, open_namespace
from natkeep.lab.ipv6_addresses import await_addresses
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.gc import Collected, gc
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

_TCP_REPAIR = 19
OLDS = {4: "10.2.0.10", 6: "2001:db8:2::10"}
NEWS = {4: "10.3.0.20", 6: "2001:db8:3::20"}
PEERS = {4: "10.1.0.2", 6: "2001:db8:1::2"}


class Destination:
    """One destination, and natkeeps with a state directory each."""

    def __init__(self, netns: str, directory: Path) -> None:
        self.site, self.directory = Site(Role.DESTINATION, netns), directory
        self.sockets: list[socket.socket] = []
        self.namespace = open_namespace(netns)

    def executor(self, name: str) -> Executor:
        state = StateDirectory(str(self.directory / name), create=True)
        return Executor(LinuxKernel(state.path), state)

    def move(
        self,
        name: str,
        port: int,
        *,
        version: int = 4,
        mode: Mode = Mode.STATEFUL,
        opens: bool = True,
    ) -> socket.socket:
        """A move of one connection, by the natkeep of this name; its socket is there."""
        old, new, peer = (parse_address(of[version]) for of in (OLDS, NEWS, PEERS))
        kept = Connections.of([FourTuple(Endpoint(peer, 2000), Endpoint(old, port))])
        move = Move(f"m{port}", (Map(old, new),), (self.site,), mode)
        prepare(self.executor(name), move, kept)
        restored = self.restore(port, version=version)
        if opens:
            open_move(self.executor(name), move.id)
        return restored

    def restore(self, port: int, *, version: int = 4) -> socket.socket:
        """An established socket at OLD, as CRIU makes it; it says nothing."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with inside(self.namespace):
            restored = socket.socket(family)
            restored.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
            restored.bind((OLDS[version], port))
            restored.connect((PEERS[version], 2000))
        self.sockets.append(restored)
        return restored

    def has_old(self, version: int = 4) -> bool:
        with inside(self.namespace):
            return parse_address(OLDS[version]).packed in rtnetlink.all_addresses()

    def ids(self) -> frozenset[str]:
        with inside(self.namespace):
            return nft_strays.read_table().ids()

    def gc(self, name: str, *, yes: bool = False) -> Collected:
        return gc(self.executor(name), (self.site,), yes=yes)


@pytest.fixture
def destination(make_netns: Callable[[], str], tmp_path: Path) -> Iterator[Destination]:
    netns = make_netns()
    lines = [
        "link set lo up",
        "link add eth0 type veth peer name eth1",
        f"address add {NEWS[4]}/24 dev eth0",
        f"address add {NEWS[6]}/64 dev eth0 nodad",
        *(f"link set {name} up" for name in ("eth0", "eth1")),
        *(f"route add default dev eth0 via {via}" for via in ("10.3.0.1", "2001:db8:3::1")),
    ]
    command = ["ip", "-n", netns, "-batch", "-"]
    subprocess.run(command, input="\n".join(lines), text=True, check=True)
    await_addresses(netns)
    destination = Destination(netns, tmp_path)
    yield destination
    for restored in destination.sockets:
        restored.close()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("first", "last"), [("one", "two"), ("two", "one")])
def test_old_stays_as_long_as_a_move_of_another_directory_has_rules_for_it(
    version: int, first: str, last: str, destination: Destination
) -> None:
    """In whichever order they go; with the last it goes, too."""
    ports = {"one": 80, "two": 81}
    for name, port in ports.items():
        destination.move(name, port, version=version)
    destination.sockets[ports[first] - 80].close()
    teardown(destination.executor(first), f"m{ports[first]}")
    assert destination.has_old(version)
    assert destination.ids() == {f"m{ports[last]}"}
    destination.sockets[ports[last] - 80].close()
    teardown(destination.executor(last), f"m{ports[last]}")
    assert not destination.has_old(version)


def test_old_that_was_there_before_stays_when_all_have_gone(destination: Destination) -> None:
    with inside(destination.namespace):
        subprocess.run(["ip", "address", "add", f"{OLDS[4]}/32", "dev", "lo"], check=True)
    for name, port in (("one", 80), ("two", 81)):
        destination.move(name, port).close()
    for name, port in (("one", 80), ("two", 81)):
        teardown(destination.executor(name), f"m{port}")
    assert destination.has_old()


def test_old_stays_for_a_connection_of_no_move_and_gc_takes_it_away_afterwards(
    destination: Destination,
) -> None:
    destination.move("one", 80)
    others = destination.restore(81)
    executor = destination.executor("one")
    executor.drops = 0  # which gc would take away, too
    with pytest.raises(LeftoverError, match=r"stays on lo at .* 1 connections there are not"):
        teardown(executor, "m80")
    assert destination.has_old()
    assert destination.ids() == frozenset()
    for restored in (others, destination.sockets[0]):
        assert destination.gc("one") == Collected((), ())
        restored.close()
    cleared = destination.gc("one").cleared
    assert [(one.kind, one.name) for one in cleared] == [
        ("address", f"10.2.0.10 at {destination.site}")
    ]
    assert not destination.has_old()


@pytest.mark.parametrize("version", [4, 6])
def test_a_handshake_that_has_not_ended_does_not_keep_old(
    version: int, destination: Destination
) -> None:
    """A process that was dumped while it dialled dials again when it is restored."""
    destination.move("one", 80, version=version)
    with inside(destination.namespace):
        dials = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        destination.sockets.append(dials)
        dials.setblocking(False)
        dials.bind((OLDS[version], 81))
        with pytest.raises(BlockingIOError):
            dials.connect((PEERS[version], 2001))
    teardown(destination.executor("one"), "m80")
    assert not destination.has_old(version)


@pytest.mark.parametrize("mine", [True, False])
def test_sockets_of_a_move_undone_before_do_not_keep_an_old_that_was_left_to_another(
    mine: bool, destination: Destination
) -> None:
    """But one that was of no move all the time does."""
    for port in (80, 81, 82):
        destination.move("one", port)
    if not mine:
        destination.restore(83)
    for move_id in ("m82", "m81"):
        teardown(destination.executor("one"), move_id)
    assert destination.has_old()
    if mine:
        teardown(destination.executor("one"), "m80")
    else:
        with pytest.raises(LeftoverError, match="1 connections there are not of m80"):
            teardown(destination.executor("one"), "m80")
    assert destination.has_old() is not mine


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("lost", [False, True])
def test_gc_names_what_lives_by_a_stray_and_clears_it_only_when_told_to(
    version: int, mode: Mode, lost: bool, destination: Destination, tmp_path: Path
) -> None:
    destination.move("one", 80, version=version, mode=mode)
    if lost:
        for path in (tmp_path / "one").iterdir():
            path.unlink()
    [error] = destination.gc("two").left
    assert error.exit_code == 8
    assert (
        f"1 connections of m80 live (as that of {Endpoint(parse_address(PEERS[version]), 2000)})"
        in str(error)
    )
    assert error.hint is not None
    assert "gc --yes" in error.hint
    assert destination.ids() == {"m80"}
    assert destination.has_old(version)
    cleared = destination.gc("two", yes=True).cleared
    assert [(one.kind, one.reason) for one in cleared] == [("table", "no journal knows m80")]
    assert destination.ids() == frozenset()


def test_while_a_gate_is_closed_its_frozen_connections_live(destination: Destination) -> None:
    """Nothing shows them: the entries were flushed, and no socket is there yet."""
    destination.move("one", 80, opens=False).close()
    with inside(destination.namespace):
        subprocess.run(["conntrack", "-F"], check=True, capture_output=True)
    [error] = destination.gc("two").left
    assert "1 connections of m80 live" in str(error)
    assert destination.ids() == {"m80"}


def test_a_stray_by_which_nothing_lives_goes_beside_one_by_which_something_does(
    destination: Destination,
) -> None:
    destination.move("one", 80)
    destination.move("one", 81).close()
    with inside(destination.namespace):
        delete = ["conntrack", "-D", "-p", "tcp", "--reply-port-src", "81"]
        subprocess.run(delete, check=True, capture_output=True)
    collected = destination.gc("two")
    assert [one.reason for one in collected.cleared] == ["no journal knows m81"]
    assert ["1 connections of m80 live" in str(error) for error in collected.left] == [True]
    assert destination.ids() == {"m80"}
    assert destination.has_old()
