"""criu/run.py: what is said before CRIU is started, and what is left when it failed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from natkeep.checkpoint import Checkpoint, Inventory, NetworkLock
from natkeep.criu import run
from natkeep.criu.run import Command, Restore, demand_criu, find_slow_lock, read_command
from natkeep.errors import NatkeepError, RefusedError, UsageError
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Map, Move, Site
from natkeep.plan.observation import Gate
from natkeep.plan.roles import Role
from natkeep.plan.tuples import Connections, Endpoint, FourTuple, parse_address
from natkeep.state.directory import StateDirectory

GOOD = ["criu", "restore", "-D", "/images", "--tcp-established"]


# ---- the command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        GOOD,
        ["/opt/criu", "restore", "--images-dir", "/images", "--tcp-established", "-d"],
        ["criu", "restore", "--images-dir=/images", "--tcp-est"],
        ["criu", "restore", "--tcp-established", "-D/images"],
        ["criu", "restore", "--tcp-established", "-D", "/other", "-D", "/images"],
        [*GOOD, "--exec-cmd", "--", "cmd", "-D", "/else", "--tcp-close"],
    ],
)
def test_the_image_directory_is_the_one_that_criu_will_take(words: list[str]) -> None:
    assert read_command(words, None) == Command(tuple(words), "/images")


@pytest.mark.parametrize(
    ("words", "image", "said", "hint"),
    [
        ([], None, "'nothing' is not `criu restore`", "natkeep run ID OPTIONS -- criu restore"),
        (["criu"], None, "'criu' is not `criu restore`", "-- criu restore"),
        (["criu", "dump", *GOOD[2:]], None, "'criu dump' is not", "-- criu restore"),
        (GOOD[:4], None, "without --tcp-established", "criu restore --tcp-established"),
        ([*GOOD[:4], "--", GOOD[4]], None, "without --tcp-established", "add it"),
        ([*GOOD, "--tcp-close"], None, "--tcp-close closes every connection", "restore"),
        (["criu", "restore", "--tcp-established"], None, "without --images-dir DIR", "add it"),
        (["criu", "restore", "--tcp-established"], "/i", "without --images-dir /i", "add it"),
        (GOOD, "/etc", "--image is /etc, but criu restores /images", "leave --image out"),
    ],
)
def test_what_would_go_wrong_is_said_at_once_with_the_fix(
    words: list[str], image: str | None, said: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read_command(words, image)
    assert said in str(caught.value)
    assert hint in (caught.value.hint or "")


def test_one_directory_may_be_named_in_two_ways(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    words = ["criu", "restore", "-D", str(tmp_path), "--tcp-established"]
    assert read_command(words, f"{tmp_path}/link/.").images == str(tmp_path)


def test_our_hook_is_the_first_script_and_so_the_last_to_run() -> None:
    words = [*GOOD, "--action-script", "theirs"]
    command = Command(tuple(words), "/images").with_hook(Path("/bin/natkeep-hook"))
    assert command == ["criu", "restore", "--action-script", "/bin/natkeep-hook", *words[2:]]


# ---- CRIU itself -------------------------------------------------------------------------------

MakeCriu = Callable[[str], str]


@pytest.fixture
def make_criu(tmp_path: Path) -> MakeCriu:
    """A program that does what a test says where CRIU would do its work."""

    def make(body: str) -> str:
        path = tmp_path / "criu"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)
        return str(path)

    return make


def test_no_criu_is_told() -> None:
    with pytest.raises(UsageError, match="there is no program 'no-such-criu'"):
        demand_criu("no-such-criu")


@pytest.mark.parametrize(
    ("body", "kernel", "said"),
    [
        ("echo Version: 4.2.1", (6, 18), None),
        ("echo Version: 3.17.1", (6, 1), None),
        ("[ $1 = check ] || echo Version: 3.17.1", (6, 18), None),  # someone has mended it
        ("[ $1 != check ] || { echo 'Error: vdso' >&2; exit 1; }; echo Version: 4.0", (6, 18),
         r"CRIU 4\.0 does not work on Linux .*: Error: vdso"),
        ("echo Version: 3.15", (6, 1), r"CRIU 3\.15 is too old"),
        ("echo Version: 2.6", (6, 18), r"CRIU 2\.6 is too old"),
        ("echo something else", (6, 1), "does not say that it is CRIU"),
    ],
)  # fmt: skip
def test_a_criu_that_cannot_do_it_is_told(
    body: str,
    kernel: tuple[int, int],
    said: str | None,
    make_criu: MakeCriu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run, "_kernel", lambda: kernel)
    criu = make_criu(body)
    if said is None:
        demand_criu(criu)
        return
    with pytest.raises(UsageError, match=said):
        demand_criu(criu)


def test_an_iptables_lock_of_many_connections_is_worth_a_word() -> None:
    dump = Checkpoint(Connections(), inventory=Inventory(NetworkLock.IPTABLES))
    said = find_slow_lock(dump, 1000)
    assert said is not None
    assert "1000 connections will take CRIU some 55 s more" in said
    assert "--network-lock nftables" in said
    assert find_slow_lock(dump, 50) is None
    assert find_slow_lock(replace(dump, inventory=Inventory(NetworkLock.NFTABLES)), 1000) is None
    assert find_slow_lock(Checkpoint(Connections()), 1000) is None


# ---- the run -----------------------------------------------------------------------------------

PEER, LOCAL = Endpoint.parse("10.1.0.2:50594"), Endpoint.parse("10.2.0.10:5000")
MOVE = Move(
    "web",
    (Map(parse_address("10.2.0.10"), parse_address("10.3.0.20")),),
    (Site(Role.DESTINATION, "dst"), Site(Role.GATEWAY, "gw")),
)
CHECKPOINT = Checkpoint(
    Connections.of([FourTuple(PEER, LOCAL)]), inventory=Inventory(NetworkLock.NFTABLES, "aa-bb")
)


class Run:
    """A restore with a fake kernel, and a CRIU of the test's own; said is what was told."""

    def __init__(self, make_criu: MakeCriu, state: Path) -> None:
        self.make_criu, self.kernel = make_criu, FakeKernel()
        self.executor = Executor(self.kernel, StateDirectory(str(state), create=True))
        self.said: list[str] = []

    def __call__(
        self,
        body: str,
        *,
        keep: bool = False,
        checkpoint: Checkpoint = CHECKPOINT,
        move: Move = MOVE,
    ) -> int:
        words = (self.make_criu(body), "restore", "-D", "/images", "--tcp-established")
        command, say = Command(words, "/images"), self.said.append
        return Restore(self.executor, move, checkpoint, command, say, keep_closed=keep).run()

    def gates(self) -> list[Gate]:
        return [gate for site in self.kernel.sites.values() for gate in site.gates.values()]


@pytest.fixture
def restore(make_criu: MakeCriu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    hook = tmp_path / "bin/natkeep-hook"
    hook.parent.mkdir()
    hook.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin/python3"))
    monkeypatch.setattr(run, "adopt_orphans", lambda: None)
    monkeypatch.setattr(run, "kill_orphans", lambda *_: None)
    return Run(make_criu, tmp_path / "state")


def test_a_restore_that_succeeds_is_open(restore: Run) -> None:
    assert restore("exit 0") == 0
    assert restore.gates() == [Gate.OPEN, Gate.OPEN]


def test_criu_gets_the_hook_and_its_orders_and_none_but_ours(
    restore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATKEEP_MAP", "10.9.9.9=auto")
    monkeypatch.setenv("OTHERS", "stay")
    restore(f'echo "$*" >{tmp_path}/words; env >{tmp_path}/environment')
    assert (tmp_path / "words").read_text() == (
        f"restore --action-script {tmp_path}/bin/natkeep-hook -D /images --tcp-established\n"
    )
    environment = (tmp_path / "environment").read_text().splitlines()
    assert {"NATKEEP_ID=web", f"NATKEEP_STATE_DIR={tmp_path}/state", "OTHERS=stay"} <= {
        *environment
    }
    assert not [line for line in environment if line.startswith("NATKEEP_MAP")]


@pytest.mark.parametrize(
    ("body", "how"),
    [("exit 3", "criu restore exited 3"), ("kill -9 $$", "criu restore was killed by SIGKILL")],
)
def test_a_criu_that_fails_leaves_nothing(body: str, how: str, restore: Run) -> None:
    with pytest.raises(NatkeepError, match=f"{how}; everything was undone") as caught:
        restore(body)
    assert caught.value.exit_code == 1
    assert restore.gates() == []
    assert restore.executor.state.ids() == ()


def test_without_its_gateways_a_move_stays_closed_when_criu_fails(restore: Run) -> None:
    """A gateway that was prepared by itself may be open, and goes on sending here."""
    alone = replace(MOVE, sites=MOVE.sites[:1])
    with pytest.raises(NatkeepError, match="exited 1; move web stays prepared") as caught:
        restore("exit 1", move=alone)
    assert "natkeep rollback web" in (caught.value.hint or "")
    assert restore.gates() == [Gate.CLOSED]
    assert restore("exit 0", move=alone) == 0
    assert restore.said[-1] == "natkeep: web: restored, gate open"


def test_it_says_at_once_that_a_tree_runs_in_the_foreground(restore: Run) -> None:
    assert restore(': >"$NATKEEP_RESUMED"; sleep 0.5; exit 0') == 0
    assert restore.said.count("natkeep: web: restored, gate open") == 1


def test_a_gate_that_was_opened_for_a_tree_that_never_ran_is_undone_too(
    restore: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore.kernel.open_sites(MOVE.sites)
    real = run.prepare

    def prepare(*arguments: object, **more: object) -> object:
        plan = real(*arguments, **more)  # type: ignore[arg-type]  # whatever it was given
        open_move(restore.executor, "web")  # as the hook does, before another script gives up
        return plan

    meanwhile: list[list[Gate]] = []
    monkeypatch.setattr(run, "kill_orphans", lambda *_: meanwhile.append(restore.gates()))
    monkeypatch.setattr(run, "prepare", prepare)
    with pytest.raises(NatkeepError, match="everything was undone"):
        restore("exit 1")
    assert restore.gates() == []
    assert meanwhile == [[Gate.CLOSED, Gate.CLOSED]]  # before a socket goes
    with pytest.raises(NatkeepError, match="move web stays prepared, its gate closed"):
        restore("exit 1", keep=True)
    assert restore.gates() == [Gate.CLOSED, Gate.CLOSED]
    assert restore("exit 0") == 0  # again, with what is prepared
    assert restore.gates() == [Gate.OPEN, Gate.OPEN]


def test_kept_closed_for_a_retry_that_goes_on_with_it(restore: Run) -> None:
    with pytest.raises(NatkeepError, match="move web stays prepared, its gate closed"):
        restore("exit 1", keep=True)
    assert restore.gates() == [Gate.CLOSED, Gate.CLOSED]
    applied = restore.kernel.applied
    assert restore("exit 0") == 0
    prepared, opened = restore.said[-2:]
    assert prepared == "natkeep: web is prepared already"
    assert opened == "natkeep: web: restored, gate open"
    assert restore.kernel.applied == applied + 2  # opened at both sites, and nothing else
    assert restore.gates() == [Gate.OPEN, Gate.OPEN]


def test_what_is_prepared_for_another_dump_is_not_gone_on_with(restore: Run) -> None:
    with pytest.raises(NatkeepError):
        restore("exit 1", keep=True)
    other = replace(CHECKPOINT, inventory=Inventory(NetworkLock.NFTABLES, "cc-dd"))
    with pytest.raises(RefusedError, match="the id web is in use"):
        restore("exit 0", checkpoint=other)


def test_a_tree_that_ran_keeps_its_move_whatever_becomes_of_criu(restore: Run) -> None:
    """Not detached, CRIU stays until the tree ends, and exits as it ended."""
    assert restore(': >"$NATKEEP_RESUMED"; exit 7') == 7
    assert len(restore.gates()) == 2
    assert "stays, until natkeep teardown" in restore.said[-1]
    teardown(restore.executor, "web")
    assert restore(': >"$NATKEEP_RESUMED"; kill -9 $$') == 137


UNTIL = 'while [ ! -e "$ENDED" ]; do sleep 0.02; done; '
RESUMED = ': >"$NATKEEP_RESUMED"; '


@pytest.mark.parametrize("code", [0, 7])
@pytest.mark.parametrize("next_one", [False, True])
def test_a_tree_that_ends_after_its_move_leaves_the_next_move_of_that_id_alone(
    code: int, next_one: bool, restore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not detached, CRIU ends days later, and its exit code is that of run."""
    ended = tmp_path / "ended"
    monkeypatch.setenv("ENDED", str(ended))
    executor = Executor(restore.kernel, StateDirectory(str(tmp_path / "state"), create=False))
    real, known = subprocess.Popen.wait, threading.Event()

    def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None:
            known.set()
        return real(self, timeout)

    def meanwhile() -> None:
        known.wait(10)
        open_move(executor, "web")  # the hook
        teardown(executor, "web")
        if next_one:
            prepare(executor, MOVE, CHECKPOINT.connections)
        ended.touch()

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    other = threading.Thread(target=meanwhile)
    other.start()
    assert restore(f"{RESUMED}{UNTIL}rm $NATKEEP_RESUMED; exit {code}") == code
    other.join()
    assert restore.gates() == ([Gate.CLOSED, Gate.CLOSED] if next_one else [])
    assert not any("stays, until" in line for line in restore.said)


def test_a_restore_that_fails_undoes_no_other_move_that_has_the_id_by_now(
    restore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = Executor(restore.kernel, StateDirectory(str(tmp_path / "state"), create=False))
    real = Restore._run_criu

    def run_criu(self: Restore, *arguments: Path) -> int:
        status = real(self, *arguments)
        teardown(executor, "web")
        prepare(executor, MOVE, CHECKPOINT.connections)
        return status

    monkeypatch.setattr(Restore, "_run_criu", run_criu)
    with pytest.raises(NatkeepError, match="criu restore exited 3"):
        restore("exit 3")
    assert restore.gates() == [Gate.CLOSED, Gate.CLOSED]


def test_an_interrupt_ends_criu_and_leaves_nothing(
    restore: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real, interrupted, began = subprocess.Popen.wait, [], tmp_path / "began"

    def wait(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not interrupted:
            deadline = time.monotonic() + 30
            while not began.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            interrupted.append(True)
            raise KeyboardInterrupt
        return real(self, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        restore(f"echo $$ >{began}.new; mv {began}.new {began}; exec sleep 60", keep=True)
    assert restore.gates() == []
    pid = int(began.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_a_hook_nothing_is_prepared(
    restore: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin/natkeep-hook").unlink()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(UsageError, match="there is no natkeep-hook beside natkeep, nor in PATH"):
        restore("exit 0")
    assert restore.gates() == []


def test_orphans_come_to_us_and_are_killed() -> None:
    """In a process of its own, since it kills all its children."""
    script = (
        "import subprocess, sys, time; from natkeep.criu.run import *\n"
        "adopt_orphans()\n"
        "line = \"setsid sh -c 'sleep 60 & echo $! $$; wait' &\"\n"
        "parent = subprocess.Popen(['sh', '-c', line], stdout=subprocess.PIPE)\n"
        "print(parent.stdout.readline().decode())\n"
        "parent.wait()\n"
        "kill_orphans()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_child_that_was_there_before_criu_is_spared() -> None:
    """The holder of what peers say: a move that is kept for another try goes on holding."""
    script = (
        "import subprocess; from natkeep.criu.run import *\n"
        "from natkeep.criu.run import _children\n"
        "holder = subprocess.Popen(['sleep', '60'])\n"
        "ours = frozenset(_children())\n"
        "orphan = subprocess.Popen(['sleep', '60'])\n"
        "kill_orphans(ours)\n"
        "print(holder.poll(), orphan.poll())\n"
        "holder.kill()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "None 0\n"
