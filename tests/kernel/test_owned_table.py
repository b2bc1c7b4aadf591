"""kernel/owned_table.py: what the table drops, what it survives, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from running import is_running

from natkeep.errors import KernelError
from natkeep.kernel import nft_messages, owned_table
from natkeep.kernel.interface import Place
from natkeep.kernel.netns import Namespace, open_namespace
from natkeep.lab.time_scale import scaled
from natkeep.plan.move import Map, Mode, Site
from natkeep.plan.roles import Role
from natkeep.plan.translation import Translation
from natkeep.plan.tuples import Connections, Endpoint, FourTuple

pytestmark = pytest.mark.root

TABLE = "natkeep-guard-web"
ADDRESSES = {4: ("10.2.0.10", "10.3.0.20", "10.1.0.2"), 6: ("fd00:2::10", "fd00:3::20", "fd00::2")}


def translation(role: Role, version: int = 4, count: int = 2, number: int = 0) -> Translation:
    old, new, peer = map(ip_address, ADDRESSES[version])
    kept = Connections.of(
        FourTuple(Endpoint(peer, 40_000 + i), Endpoint(old, 5000)) for i in range(count)
    )
    outer, inner = (kept, kept.toward(new)) if role == Role.GATEWAY else (kept.toward(new), kept)
    return Translation(Site(role), number, Map(old, new), Mode.STATEFUL, kept, outer, inner)


def nft(netns: str, *arguments: str, text: str = "", check: bool = True) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", netns, "nft", *arguments],
        input=text, capture_output=True, text=True, check=check,
    )  # fmt: skip
    return done.stdout + done.stderr


def tables(netns: str) -> list[str]:
    return [line.split()[-1] for line in nft(netns, "list", "tables").splitlines()]


def await_true(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + scaled(10)
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def place(namespace: Namespace, netns: str, state: Path) -> Place:
    return Place(Site(Role.DESTINATION, netns), namespace, str(state))


@pytest.fixture
def site(netns: str) -> Iterator[Namespace]:
    namespace = open_namespace(netns)
    yield namespace
    os.close(namespace.fd)


@pytest.fixture
def begin(netns: str, site: Namespace, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Start a guard of the move web; it ends with the test."""

    def start(*translations: Translation) -> int:
        some = translations or (translation(Role.DESTINATION),)
        return owned_table.start(place(site, netns, tmp_path), "web", some)

    yield start

    owned_table.end(str(tmp_path), "web", site)


def rules(netns: str) -> list[str]:
    listed = nft(netns, "-s", "list", "table", "inet", TABLE).splitlines()
    return [line.strip() for line in listed if " drop " in line or " hook " in line]


def test_at_a_destination_nothing_to_new_is_taken_and_nothing_from_old_leaves(begin, netns):
    begin()

    arrived = "ip daddr 10.3.0.20 ip saddr . tcp sport . tcp dport @outer-0 drop comment"
    assert rules(netns) == [
        "type filter hook input priority -350; policy accept;",
        f'{arrived} "web"',
        "type filter hook forward priority -350; policy accept;",
        f'{arrived} "web"',
        "type filter hook postrouting priority 350; policy accept;",
        'oif != "lo" ip saddr 10.2.0.10 ip daddr . tcp dport . tcp sport @inner-0 drop '
        'comment "web"',
    ]
    elements = nft(netns, "list", "set", "inet", TABLE, "outer-0")
    assert "10.1.0.2 . 40000 . 5000" in elements
    assert "10.1.0.2 . 40001 . 5000" in elements


def test_at_a_gateway_nothing_to_old_goes_on_and_nothing_from_new(begin, netns):
    begin(translation(Role.GATEWAY), translation(Role.GATEWAY, 6, number=1))

    shown = "\n".join(rules(netns))
    assert "ip daddr 10.2.0.10 ip saddr . tcp sport . tcp dport @outer-0 drop" in shown
    assert "ip saddr 10.3.0.20 ip daddr . tcp dport . tcp sport @inner-0 drop" in shown
    assert "ip6 daddr fd00:2::10 ip6 saddr . tcp sport . tcp dport @outer-1 drop" in shown
    assert "ip6 saddr fd00:3::20 ip6 daddr . tcp dport . tcp sport @inner-1 drop" in shown
    assert "fd00::2 . 40000 . 5000" in nft(netns, "list", "set", "inet", TABLE, "inner-1")


def test_it_survives_a_flush_of_the_ruleset(begin, netns):
    begin()
    before = nft(netns, "list", "table", "inet", TABLE)

    nft(netns, "add", "table", "inet", "other")
    nft(netns, "flush", "ruleset")
    nft(netns, "-f", "-", text="flush ruleset\ntable inet reloaded { }\n")

    assert tables(netns) == [TABLE, "reloaded"]
    assert nft(netns, "list", "table", "inet", TABLE) == before
    assert "not permitted" in nft(netns, "delete", "table", "inet", TABLE, check=False)


def test_end_right_after_start_finds_it_as_well(begin, netns, site, tmp_path):
    for _ in range(5):
        begin()
        owned_table.end(str(tmp_path), "web", site)
        assert tables(netns) == []


def test_a_second_one_takes_the_place_of_the_first(begin, netns, tmp_path):
    first = begin()
    second = begin(translation(Role.GATEWAY, count=1))

    assert not is_running(first)
    assert is_running(second)
    assert len(list(tmp_path.iterdir())) == 1
    assert "ip daddr 10.2.0.10" in "\n".join(rules(netns))


def test_killed_it_takes_the_table_along_and_can_be_started_again(begin, netns, site, tmp_path):
    pid = begin()

    os.kill(pid, signal.SIGKILL)
    await_true(lambda: not is_running(pid))

    assert tables(netns) == []
    assert not owned_table.is_guarded(str(tmp_path), "web", site)
    begin()
    assert tables(netns) == [TABLE]


def test_it_ends_when_its_file_is_gone(begin, netns, tmp_path):
    pid = begin()

    (file,) = tmp_path.iterdir()
    file.unlink()

    await_true(lambda: not is_running(pid))
    assert tables(netns) == []


def test_it_ends_with_the_namespace_and_clears_its_file(make_netns, tmp_path):
    netns = make_netns()
    namespace = open_namespace(netns)
    pid = owned_table.start(
        place(namespace, netns, tmp_path), "web", [translation(Role.DESTINATION)]
    )

    subprocess.run(["ip", "netns", "delete", netns], check=True)
    os.close(namespace.fd)

    await_true(lambda: not is_running(pid))
    assert list(tmp_path.iterdir()) == []


def test_end_kills_no_other_process_whose_pid_is_in_the_file(site, tmp_path):
    """The file of one that was killed, and its number is another's by now."""
    innocent = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        file = tmp_path / f"web.guard-{site.identity.inode}"
        file.write_text(f"{innocent.pid}\n")

        owned_table.end(str(tmp_path), "web", site)

        assert innocent.poll() is None
        assert not file.exists()
    finally:
        innocent.kill()
        innocent.wait()


def test_it_follows_no_link(site, netns, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / f"web.guard-{site.identity.inode}").symlink_to(victim)

    with pytest.raises(OSError, match="symbolic links"):
        owned_table.start(place(site, netns, tmp_path), "web", [translation(Role.DESTINATION)])

    assert victim.read_text() == "mine"
    assert tables(netns) == []


def test_one_whose_interpreter_takes_long_to_start_is_ended(
    begin, netns, site, tmp_path, monkeypatch
):
    """As on a loaded machine, where it has written no pid when it is to end."""
    asleep = tmp_path / "asleep.py"
    asleep.write_text("import time; time.sleep(60)")
    spawn = owned_table.spawn
    monkeypatch.setattr(owned_table, "spawn", lambda _, *more: spawn(str(asleep), *more))
    pid = begin()

    owned_table.end(str(tmp_path), "web", site)

    assert not is_running(pid)
    assert tables(netns) == []


def test_what_the_kernel_refuses_leaves_nothing(site, netns, tmp_path, monkeypatch):
    # An older kernel knows no such flag.
    monkeypatch.setattr(nft_messages, "_OWNER", 0x8000)

    with pytest.raises(OSError, match=r"supported|Invalid"):
        owned_table.start(place(site, netns, tmp_path), "web", [translation(Role.DESTINATION)])

    assert tables(netns) == []
    assert list(tmp_path.iterdir()) == []


def test_one_that_does_not_end_is_named(begin, site, tmp_path, monkeypatch):
    begin()
    monkeypatch.setattr(owned_table, "_PATIENCE", 0.05)
    monkeypatch.setattr(owned_table, "_stop", lambda *_: None)

    with pytest.raises(KernelError, match="the guardian of web does not end"):
        owned_table.end(str(tmp_path), "web", site)

    monkeypatch.undo()


def test_many_connections_are_guarded_in_one_transaction(begin, netns):
    begin(translation(Role.DESTINATION, count=20_000))

    listed = nft(netns, "list", "set", "inet", TABLE, "inner-0")
    assert listed.count("10.1.0.2 . ") == 20_000
