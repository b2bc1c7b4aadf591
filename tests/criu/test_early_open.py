"""tests of the interpreter that natkeep-hook starts at pre-restore, and asks at post-restore.

The front is a copy, whose python3 notes that it was started and goes on as the real one. The test
is CRIU: it calls the front at both points.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import natkeep.criu

SOURCES = Path(natkeep.criu.__file__ or "").parent
CORPUS = Path(__file__).parents[1] / "checkpoint/corpus"
BIN = Path(sys.executable).parent
OLD, NEW = "10.2.0.10", "10.3.0.20"
OPENED = (0, "natkeep-hook: web: gate open\n")

pytestmark = [
    pytest.mark.root,
    pytest.mark.needs("nftables"),
    pytest.mark.skipif(os.getpid() < 300, reason="here the front starts nothing early"),
]


def await_true(ready: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@dataclass
class Restore:
    """A move that is prepared, and the calls of a CRIU that restores it."""

    bin: Path
    state: Path
    sites: tuple[str, str]
    tree: int

    @property
    def environment(self) -> dict[str, str]:
        return {
            "CRTOOLS_INIT_PID": str(self.tree),
            "CRTOOLS_IMAGE_DIR": str(CORPUS / "plain"),
            "NATKEEP_ID": "web",
            "NATKEEP_STATE_DIR": str(self.state),
            "PATH": os.environ["PATH"],
        }

    def call(self, action: str, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [self.bin / "natkeep-hook"], stdin=subprocess.DEVNULL, capture_output=True, text=True,
            env={**self.environment, "CRTOOLS_SCRIPT_ACTION": action, **environment}, timeout=30,
        )  # fmt: skip
        assert done.stdout == ""
        return done.returncode, done.stderr

    def started(self) -> list[str]:
        """What each interpreter was started for, so far."""
        noted = self.bin / "noted"
        calls = noted.read_text().splitlines() if noted.exists() else []
        return [call.partition(" ")[2] for call in calls]

    def opener(self) -> int:
        """The process that was started early."""
        await_true(self.started)
        [number] = [line.split()[0] for line in (self.bin / "noted").read_text().splitlines()]
        return int(number)

    def gate(self) -> str:
        done = subprocess.run(
            [BIN / "natkeep", "status", "--json"], check=True, capture_output=True,
            env={**os.environ, "NATKEEP_STATE_DIR": str(self.state)},
        )  # fmt: skip
        (move,) = json.loads(done.stdout)["moves"]
        return str(move["gate"])

    def hooked(self) -> list[str]:
        """The sites at which packets come by the gates."""
        enter = ["ip", "netns", "exec"]
        listing = ["nft", "list", "table", "inet", "natkeep"]
        return [
            site
            for site in self.sites
            if b"chain gate {" in subprocess.check_output([*enter, site, *listing])
        ]

    def channel(self) -> list[str]:
        return [path.name for path in self.state.iterdir() if path.is_fifo()]

    def has_ended(self, number: int) -> bool:
        """Whoever has adopted it may not have waited for it yet."""
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True


@pytest.fixture
def restore(make_netns: Callable[[], str], tmp_path: Path) -> Iterator[Restore]:
    netns, gateway = make_netns(), make_netns()
    bin_, state = tmp_path / "bin", tmp_path / "state"
    for name, address in ((netns, NEW), (gateway, "10.3.0.1")):
        lines = ["link add eth0 type veth peer name eth1", f"address add {address}/24 dev eth0",
                 "link set eth0 up", "link set eth1 up",
                 "route add default via 10.3.0.254"]  # fmt: skip
        subprocess.run(
            ["ip", "-n", name, "-batch", "-"], input="\n".join(lines), text=True, check=True
        )
    bin_.mkdir()
    for name in ("natkeep-hook", "natkeep_hook_open.py"):
        shutil.copy(SOURCES / name, bin_)
    (bin_ / "python3").write_text(
        f'#!/bin/sh\ncall=${{4##*n.}}\necho "$$ ${{call%()}}" >>{bin_}/noted\n'
        f'exec {sys.executable} "$@"\n'
    )
    (bin_ / "python3").chmod(0o755)
    subprocess.run(
        [BIN / "natkeep", "prepare", "web", f"--map={OLD}={NEW}", f"--image={CORPUS / 'plain'}",
         f"--site=destination={netns}", f"--site=gateway={gateway}"],
        env={**os.environ, "NATKEEP_STATE_DIR": str(state)}, check=True, capture_output=True,
    )  # fmt: skip
    tree = subprocess.Popen(["nsenter", f"--net=/run/netns/{netns}", "sleep", "600"])
    try:
        yield Restore(bin_, state, (netns, gateway), tree.pid)
    finally:
        tree.kill()
        tree.wait()


def test_what_was_started_at_pre_restore_opens_at_post_restore_and_not_before(
    restore: Restore,
) -> None:
    assert restore.call("pre-restore") == (0, "")
    opener = restore.opener()
    await_true(lambda: restore.channel())
    assert restore.call("post-setup-namespaces") == (0, "")
    time.sleep(0.2)
    assert restore.gate() == "closed"
    assert restore.call("post-restore") == OPENED
    assert restore.gate() == "open"
    assert restore.started() == ["open_when_asked"]
    await_true(lambda: restore.has_ended(opener))
    assert restore.channel() == []


def test_nobody_else_may_ask(restore: Restore) -> None:
    restore.call("pre-restore")
    await_true(restore.channel)
    for name in ("web.asked", "web.told"):
        assert (restore.state / name).stat().st_mode & 0o777 == 0o600


def test_it_is_waited_for_when_it_has_just_been_started(restore: Restore) -> None:
    for _ in range(3):  # the time in between is never the same
        restore.call("pre-restore")
    await_true(restore.channel)
    assert restore.call("post-restore") == OPENED
    assert restore.gate() == "open"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_without_it_post_restore_does_as_ever(number: signal.Signals, restore: Restore) -> None:
    restore.call("pre-restore")
    opener = restore.opener()
    await_true(restore.channel)
    os.kill(opener, number)
    await_true(lambda: restore.has_ended(opener))
    assert restore.call("post-restore") == OPENED
    assert restore.started() == ["open_when_asked", "main"]
    assert restore.gate() == "open"


def test_it_ends_with_criu_and_leaves_nothing(restore: Restore) -> None:
    """The restore has failed: CRIU calls nobody."""
    criu = subprocess.Popen(
        ["sh", "-c", '"$0"; sleep 600; exit 0', restore.bin / "natkeep-hook"],
        env={**restore.environment, "CRTOOLS_SCRIPT_ACTION": "pre-restore"},
    )
    opener = restore.opener()
    await_true(restore.channel)
    assert not restore.has_ended(opener)
    criu.kill()
    criu.wait()
    await_true(lambda: restore.has_ended(opener))
    assert restore.channel() == []
    assert restore.gate() == "closed"


def test_another_criu_is_not_served_by_it(restore: Restore) -> None:
    restore.call("pre-restore")
    opener = restore.opener()
    await_true(restore.channel)
    done = subprocess.run(
        ["sh", "-c", '"$0"; exit $?', restore.bin / "natkeep-hook"], stderr=subprocess.PIPE,
        env={**restore.environment, "CRTOOLS_SCRIPT_ACTION": "post-restore"}, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == OPENED
    assert restore.started() == ["open_when_asked", "main"]
    await_true(lambda: restore.has_ended(opener))


def test_what_does_not_fit_is_told_as_ever(restore: Restore) -> None:
    """Here by the long way, which is natkeep.criu.hook beside the interpreter."""
    restore.call("pre-restore")
    await_true(restore.channel)
    code, said = restore.call("post-restore", CRTOOLS_INIT_PID=str(os.getpid()))
    assert code != 0
    assert "was prepared for another namespace" in said
    assert restore.gate() == "closed"


def test_twice_opens_once(restore: Restore) -> None:
    """CRIU 4.1 and older call twice at each point where two configuration files name the hook."""
    for action in ("pre-restore", "pre-restore"):
        restore.call(action)
    await_true(restore.started)  # the second call may have found the first one at work
    await_true(lambda: len(restore.channel()) == 2)
    for _ in range(2):
        assert restore.call("post-restore") == OPENED
    lines = (restore.state / "web.journal").read_text().splitlines()
    states = [json.loads(line).get("state") for line in lines]
    assert states[-2:] == ["doing", "done"]
    assert states.count("doing") == states.count("done")


@pytest.mark.parametrize("early", [True, False])
def test_once_the_restore_is_over_packets_do_not_come_by_the_gates(
    restore: Restore, early: bool
) -> None:
    if early:
        restore.call("pre-restore")
        await_true(lambda: len(restore.channel()) == 2)
    assert sorted(restore.hooked()) == sorted(restore.sites)
    assert restore.call("post-restore") == OPENED
    await_true(lambda: not restore.hooked())
    assert restore.gate() == "open"


def test_what_a_killed_one_left_is_in_nobodys_way_and_goes_with_the_move(restore: Restore) -> None:
    for name in ("web.asked", "web.told"):
        os.mkfifo(restore.state / name, 0o600)
    assert restore.call("post-restore") == OPENED
    assert restore.started() == ["main"]
    subprocess.run(
        [BIN / "natkeep", "teardown", "web", "--yes"], check=True, capture_output=True,
        env={**os.environ, "NATKEEP_STATE_DIR": str(restore.state)},
    )  # fmt: skip
    assert [path.name for path in restore.state.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "orders",
    [
        {"NATKEEP_ID": "api"},
        {"NATKEEP_ID": "../state/web"},
        {"NATKEEP_MODE": "stateful"},
        {"NATKEEP_UNKEPT": "report"},
        {"NATKEEP_STATE_DIR": "/nonexistent"},
    ],
)
def test_nothing_is_started_early_for_what_goes_the_long_way(
    orders: dict[str, str], restore: Restore
) -> None:
    assert restore.call("pre-restore", **orders) == (0, "")
    time.sleep(0.1)
    assert (restore.started(), restore.channel()) == ([], [])
    assert restore.gate() == "closed"


@pytest.mark.parametrize("name", ["web.asked", "web.told"])
@pytest.mark.parametrize("kind", ["file", "link", "of another"])
def test_what_is_not_ours_is_not_written_to(name: str, kind: str, restore: Restore) -> None:
    for each in ("web.asked", "web.told"):
        os.mkfifo(restore.state / each, 0o600)
    path, elsewhere = restore.state / name, restore.bin / "elsewhere"
    elsewhere.write_text("")
    if kind == "of another":
        os.chown(path, 65534, 65534)
    else:
        path.unlink()
        path.write_text("") if kind == "file" else path.symlink_to(elsewhere)
    assert restore.call("post-restore") == OPENED
    assert restore.started() == ["main"]
    assert elsewhere.read_text() == ""


def test_none_is_started_in_a_young_pid_namespace(restore: Restore) -> None:
    """Its number may be one that CRIU is about to restore."""
    command = ["unshare", "--pid", "--fork", "sh", "-c", '"$0"; exit $?']
    done = subprocess.run(
        [*command, restore.bin / "natkeep-hook"],
        env={**restore.environment, "CRTOOLS_SCRIPT_ACTION": "pre-restore"},
    )
    time.sleep(0.1)
    assert (done.returncode, restore.started(), restore.channel()) == (0, [], [])


@pytest.mark.parametrize("mode", [0o720, 0o1777])
def test_none_is_started_where_others_may_write_to_the_state_directory(
    mode: int, restore: Restore
) -> None:
    restore.state.chmod(mode)
    assert restore.call("pre-restore") == (0, "")
    time.sleep(0.1)
    assert (restore.started(), restore.channel()) == ([], [])
