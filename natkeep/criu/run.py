"""What calls CRIU: `natkeep run ID OPTIONS -- criu restore …`, prepared before, opened behind it.

    read_command     the words after `--`, and at once what would go wrong, with the fix
    demand_criu      is there a CRIU, and one that can do it?
    Restore.run      prepare closed, run CRIU with natkeep-hook (it opens); unless it restored undo,
                     or leave the gate closed where the move does not have its gateways as sites;
                     nothing but the move that was prepared here is opened or undone

CRIU calls no hook when a restore fails, so what started it has to look after it. While a CRIU
that was killed may have left half a tree behind, orphans come to us (PR_SET_CHILD_SUBREAPER) and
are killed: their sockets are in repair still, and vanish without a word to the peer.

Rule: nothing is prepared before everything that can be known has been looked at; once the tree
runs, its move is not touched any more.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from natkeep import report
from natkeep.checkpoint import Checkpoint, NetworkLock
from natkeep.errors import NatkeepError, UsageError
from natkeep.installed import find_program
from natkeep.lifecycle.check import require_devices, require_sockets
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import close_move, open_move, remove_gate_hooks
from natkeep.lifecycle.prepare import find_unheld, prepare
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.move import Move
from natkeep.state.directory import read_boot_id
from natkeep.values import dataclass

EXAMPLE = "natkeep run ID OPTIONS -- criu restore --images-dir DIR --tcp-established"
MANY = 50
"""Connections from which on an iptables lock is worth a word: each takes CRIU some 55 ms."""

_OLDEST = (3, 16)
_NEWEST_KERNEL_OF_OLD = (6, 13)  # since then CRIU before 4.1 may stumble over the kernel's vvar
_PR_SET_CHILD_SUBREAPER = 36
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PATIENCE = 3.0  # s for a CRIU that was asked to end
_LOOK_EVERY = 0.2  # s, whether the tree runs


# ---- what is known beforehand ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Command:
    """A `criu restore` that natkeep can go along with; images is its directory."""

    words: tuple[str, ...]
    images: str

    def at(self, program: str) -> Command:
        """The same with *program*, the path of CRIU: looked up once, and not by each process."""
        return Command((program, *self.words[1:]), self.images)

    def with_hook(self, hook: Path) -> list[str]:
        """The same with one more action script, which is the first given, so that it runs last.

        What another script does not survive happens before the gate is opened.
        """
        return [*self.words[:2], "--action-script", str(hook), *self.words[2:]]


def read_command(words: Sequence[str], image: str | None) -> Command:
    """The command line of CRIU; UsageError with the fix where it could not keep a connection.

    image: natkeep's own --image, which must be the same directory.
    """
    if len(words) < 2 or words[1] != "restore":
        raise UsageError(
            f"{' '.join(words[:2]) or 'nothing'!r} is not `criu restore`", hint=EXAMPLE
        )
    if _has(words, "tcp-close"):
        raise UsageError("criu restore --tcp-close closes every connection", hint=EXAMPLE)
    if not _has(words, "tcp-established"):
        raise UsageError(
            "criu restore without --tcp-established restores no connection",
            hint=f"add it: {' '.join(words[:2])} --tcp-established …",
        )
    directories = list(_values(words, "images-dir", "D"))
    if not directories:
        wanted = f"--images-dir {image or 'DIR'}"
        raise UsageError(f"criu restore without {wanted}", hint=f"add it: {EXAMPLE}")
    if image is not None and not _is_same(image, directories[-1]):
        raise UsageError(
            f"--image is {image}, but criu restores {directories[-1]}",
            hint="leave --image out: it is taken from criu's command line",
        )
    return Command(tuple(words), directories[-1])


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False  # what is wrong with it is said where it is read


def _options(words: Sequence[str]) -> Iterator[tuple[int, str, str | None]]:
    """Where each long option stands, its name, and what follows its `=`."""
    for at, word in enumerate(words):
        if word == "--":
            return
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield at, name, value if equals else None


def _has(words: Sequence[str], option: str) -> bool:
    return any(_means(name, option) for _, name, _ in _options(words))


def _means(name: str, option: str) -> bool:
    """Whether *name* is *option*, or so much of it that getopt_long cannot take it for another."""
    return name == option or (len(name) > len("tcp-") and option.startswith(name))


def _values(words: Sequence[str], option: str, letter: str) -> Iterator[str]:
    long = {at: value for at, name, value in _options(words) if _means(name, option)}
    for at, word in enumerate(words):
        if word == "--":
            return
        if at in long or word == f"-{letter}":
            value = long.get(at)
            yield from words[at + 1 : at + 2] if value is None else (value,)
        elif word.startswith(f"-{letter}") and not word.startswith("--"):
            yield word[2:]


def demand_criu(program: str) -> str:
    """Absolute path of *program*; UsageError unless it is a CRIU that works on this kernel."""
    path = shutil.which(program)
    if path is None:
        raise UsageError(f"there is no program {program!r}", hint="CRIU is criu.org, or a package")
    path = os.path.abspath(path)
    found = re.search(r"Version: (\d+)\.(\d+)(\S*)", _say(path, "--version").stdout)
    if found is None:
        raise UsageError(f"{program} --version does not say that it is CRIU")
    version, name = (int(found[1]), int(found[2])), f"{found[1]}.{found[2]}{found[3]}"
    if version < _OLDEST:
        raise UsageError(f"CRIU {name} is too old", hint="3.16 is the first with an nftables lock")
    if version < (4, 1) and _kernel() >= _NEWEST_KERNEL_OF_OLD:
        checked = _say(path, "check")
        if checked.returncode:
            why = next((line for line in checked.stderr.splitlines() if "Error" in line), "")
            raise UsageError(
                f"CRIU {name} does not work on Linux {os.uname().release}: {why}",
                hint="CRIU 4.1 or later does",
            )
    return path


def _say(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env={"PATH": _PATH, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"{command[0]}: {error}") from None


def _kernel() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def find_slow_lock(checkpoint: Checkpoint, count: int) -> str | None:
    """What to say of a dump whose lock will take CRIU long to take away."""
    inventory = checkpoint.inventory
    if inventory is None or inventory.network_lock != NetworkLock.IPTABLES or count <= MANY:
        return None
    return (
        f"the dump was made with --network-lock iptables: {count} connections will take CRIU some "
        f"{count * 0.055:.0f} s more; dump with --network-lock nftables"
    )


# ---- prepare, run, undo ------------------------------------------------------------------------


@dataclass(slots=True)
class Restore:
    """One run of CRIU around which a move is prepared."""

    executor: Executor
    move: Move
    checkpoint: Checkpoint
    command: Command
    talk: Callable[[str], None]
    keep_closed: bool = False
    own_stdout: bool = False  # then CRIU's goes to stderr
    ours: frozenset[int] = frozenset()  # children that are no part of CRIU's tree
    is_own: Callable[[], bool] = lambda: False  # whether the journal is the one of this run
    resumed: bool = False  # whether the tree runs, as the hook has noted
    told: bool = False  # that it does

    def run(self) -> int:
        """CRIU's exit code, once the tree was restored; NatkeepError when it was not."""
        hook = find_program("natkeep-hook")
        if hook is None:
            raise UsageError(
                "there is no natkeep-hook beside natkeep, nor in PATH", hint="install natkeep anew"
            )
        adopt_orphans()
        with tempfile.TemporaryDirectory(prefix="natkeep-run-") as directory:
            resumed = Path(directory, "resumed")
            self._prepare()
            self.is_own = self.executor.state.follow(self.move.id)
            try:
                status = self._run_criu(Path(hook), resumed)
            except BaseException:  # Ctrl-C and SIGTERM: nothing stays but a tree that runs
                self._undo_unless_resumed(keep=False)
                raise
            if status == 0:
                self._make_sure()
                return 0
            how = _describe(status)
            # A gateway that is not this move's may be open, and goes on sending here.
            keep = self.keep_closed or not any(site.row.passes_on for site in self.move.sites)
            if not self._undo_unless_resumed(keep=keep):
                return status if status > 0 else 128 - status
        if keep:
            raise NatkeepError(
                f"{how}; move {self.move.id} stays prepared, its gate closed",
                hint=f"CRIU's log says why: try again, or natkeep rollback {self.move.id}",
            )
        raise NatkeepError(f"{how}; everything was undone", hint="CRIU's log says why")

    def _prepare(self) -> None:
        executor, move, connections = self.executor, self.move, self.checkpoint.connections
        if executor.state.knows(move.id):
            journal = executor.state.load(move.id)
            same = (journal.move, journal.connections, journal.image, journal.boot)
            wanted = (move, connections, self.checkpoint.run_id, read_boot_id())
            if same == wanted and journal.is_prepared() and not journal.is_opened():
                self.talk(f"natkeep: {move.id} is prepared already")
                return
        require_devices(executor, move, self.checkpoint)
        require_sockets(executor, move, self.checkpoint)
        plan = prepare(executor, move, connections, image=self.checkpoint.run_id)
        for line in report.unkept_lines(self.checkpoint, plan):
            self.talk(f"natkeep: not kept: {line}")
        for line in (*report.warning_lines(executor.warned), *find_unheld(executor, move.id)):
            self.talk(f"natkeep: {line}")
        self.talk(f"natkeep: {report.summary(plan)}, gate closed")

    def _run_criu(self, hook: Path, resumed: Path) -> int:
        environment = {
            **{name: value for name, value in os.environ.items() if name[:8] != "NATKEEP_"},
            "NATKEEP_ID": self.move.id,
            "NATKEEP_STATE_DIR": os.path.abspath(self.executor.state.path),
            "NATKEEP_RESUMED": str(resumed),
        }
        self.ours = frozenset(_children())  # the holder; what comes later is CRIU's
        criu = subprocess.Popen(
            self.command.with_hook(hook),
            env=environment,
            stdout=sys.stderr if self.own_stdout else None,
        )
        try:
            # CRIU may stay for as long as the tree lives; by then the file may have been removed,
            # as files in /tmp are after some days.
            while not resumed.exists():
                with suppress(subprocess.TimeoutExpired):
                    return criu.wait(_LOOK_EVERY)
            self.resumed = True
            self._tell_opened()
            return criu.wait()
        except BaseException:
            _end(criu)
            raise
        finally:
            self.resumed = self.resumed or resumed.exists()

    def _make_sure(self) -> None:
        """Open the move if CRIU ended with 0 and has called no hook.

        Where the hook was called the move is open, or was until its teardown: CRIU stays until the
        tree ends, and by then the id may be another move's.
        """
        if not self.resumed and self.is_own():
            open_move(self.executor, self.move.id)
            remove_gate_hooks(self.executor, self.move.id)
            self.resumed = True
        if self.resumed:
            self._tell_opened()

    def _tell_opened(self) -> None:
        """Once: the last line, unless CRIU stays for as long as the tree lives and then fails."""
        if not self.told:
            self.talk(f"natkeep: {self.move.id}: restored, gate open")
        self.told = True

    def _undo_unless_resumed(self, *, keep: bool) -> bool:
        """Undo what was prepared and end what is left of a tree; not so if the tree runs."""
        if self.resumed:
            if self.is_own():
                self.talk(f"natkeep: the tree runs; {self.move.id} stays, until natkeep teardown")
            return False
        failed: NatkeepError | None = None
        if self.is_own():
            # The hook may have opened it: CRIU can fail after that, too. It closes before a socket
            # goes, or this host would answer what comes in between with a reset.
            try:
                close_move(self.executor, self.move.id)
            except NatkeepError as error:
                failed = error
        kill_orphans(self.ours)
        if self.is_own() and not keep:
            teardown(self.executor, self.move.id)
        elif failed is not None:
            raise failed
        return True


def _describe(status: int) -> str:
    if status < 0:
        return f"criu restore was killed by {signal.Signals(-status).name}"
    return f"criu restore exited {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def adopt_orphans() -> None:
    """From here on this process is the parent of any process below it that loses its own."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_orphans(spared: frozenset[int] = frozenset()) -> None:
    """End every child of this process, and with each round those that come to us by that."""
    while True:
        children = [pid for pid in _children() if pid not in spared]
        if not children:
            return
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            os.waitpid(pid, 0)


def _children() -> Iterator[int]:
    own = str(os.getpid()).encode()
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
        except OSError:
            continue
        if fields[1] == own:
            yield int(name)
