"""tests of the quick way to open a move, and that whatever does not fit goes the long way.

The program is run as CRIU's call runs it; in its copy here the long way is `exit 9`, so that the
two can be told apart.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hook_caller import cable

import natkeep.criu

CORPUS = Path(__file__).parents[1] / "checkpoint/corpus"
SOURCE = Path(natkeep.criu.__file__ or "").with_name("natkeep_hook_open.py")
BIN = Path(sys.executable).parent
OLD, NEW = "10.2.0.10", "10.3.0.20"
LONG_WAY = 'SLOW = [sys.executable, "-I", "-S", "-c", CALL, *sys.argv[1:]]'
TAKEN = 9

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]


def command(directory: Path) -> list[str | Path]:
    """As the shell front has it, for the program in *directory*."""
    call = "import sys; sys.path.append(sys.argv[1]); import natkeep_hook_open as n; n.main()"
    return [sys.executable, "-I", "-S", "-c", call, directory]


@dataclass
class Site:
    """A destination with a move that is prepared there, and what opens it."""

    netns: str
    state: Path
    program: Path
    tree: int

    def natkeep(self, *arguments: str) -> str:
        done = subprocess.run(
            [BIN / "natkeep", *arguments],
            env={**os.environ, "NATKEEP_STATE_DIR": str(self.state)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    def prepare(self, *options: str) -> None:
        self.natkeep("prepare", "web", f"--map={OLD}={NEW}", f"--image={CORPUS / 'plain'}",
                     f"--site=destination={self.netns}", *options)  # fmt: skip

    def call(self, program: Path | None = None, **environment: str) -> tuple[int, str]:
        """Exit code and words of the program at post-restore."""
        usual = {
            "CRTOOLS_SCRIPT_ACTION": "post-restore",
            "CRTOOLS_INIT_PID": str(self.tree),
            "CRTOOLS_IMAGE_DIR": str(CORPUS / "plain"),
            "NATKEEP_ID": "web",
            "NATKEEP_STATE_DIR": str(self.state),
            "PATH": os.environ["PATH"],
        }
        done = subprocess.run(
            command((program or self.program).parent),
            env=usual | environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        assert done.stdout == ""
        return done.returncode, done.stderr

    def gate(self) -> str:
        (move,) = json.loads(self.natkeep("status", "--json"))["moves"]
        assert [site["drift"] for site in move["sites"]] == [[] for _ in move["sites"]]
        return str(move["gate"])

    def has_gate_hook(self) -> bool:
        """Whether packets still go by the gates: the base chain is there."""
        listing = ["ip", "netns", "exec", self.netns, "nft", "list", "chain", "inet", "natkeep"]
        return subprocess.run([*listing, "gate"], capture_output=True).returncode == 0

    @property
    def journal(self) -> Path:
        return self.state / "web.journal"

    @property
    def ready(self) -> Path:
        return self.state / "web.ready"


@pytest.fixture
def site(make_netns: Callable[[], str], tmp_path: Path) -> Iterator[Site]:
    netns = make_netns()
    cable(netns)
    text = SOURCE.read_text()
    assert text.count(LONG_WAY) == 1
    program = tmp_path / "natkeep_hook_open.py"
    program.write_text(text.replace(LONG_WAY, f'SLOW = ["/bin/sh", "-c", "exit {TAKEN}"]'))
    tree = subprocess.Popen(["nsenter", f"--net=/run/netns/{netns}", "sleep", "600"])
    try:
        yield Site(netns, tmp_path / "state", program, tree.pid)
    finally:
        tree.kill()
        tree.wait()


def test_a_prepared_move_is_opened_and_noted(site: Site) -> None:
    """From another namespace than the tree's, as where CRIU stands outside."""
    site.prepare()
    before = len(site.journal.read_bytes().splitlines())
    assert site.gate() == "closed"
    assert site.call() == (0, "natkeep-hook: web: gate open\n")
    assert site.gate() == "open"
    added = [json.loads(line) for line in site.journal.read_bytes().splitlines()[before:]]
    assert [record["state"] for record in added] == ["doing", "done"]
    assert 0 <= time.monotonic_ns() - added[1]["at"] < 60_000_000_000
    (move,) = json.loads(site.natkeep("status", "--json"))["moves"]
    assert move["opened_at"]
    assert move["silent_ms"] > 0
    site.natkeep("teardown", "web", "--yes")
    assert list(site.state.iterdir()) == [site.state / "lock"]


def test_the_base_chain_of_the_gates_goes_once_no_restore_waits(site: Site) -> None:
    site.prepare()
    assert site.has_gate_hook()
    assert site.call()[0] == 0
    deadline = time.monotonic() + 20  # it waits a second for CRIU to end
    while site.has_gate_hook():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert site.gate() == "open"


def test_it_is_opened_from_within_the_trees_namespace(site: Site) -> None:
    site.prepare()
    code = subprocess.run(
        ["nsenter", f"--net=/run/netns/{site.netns}", *command(site.program.parent)],
        env={"CRTOOLS_INIT_PID": str(site.tree), "CRTOOLS_IMAGE_DIR": str(CORPUS / "plain"),
             "NATKEEP_ID": "web", "NATKEEP_STATE_DIR": str(site.state)},
    ).returncode  # fmt: skip
    assert (code, site.gate()) == (0, "open")


def test_every_site_is_opened_gateway_first(site: Site, make_netns: Callable[[], str]) -> None:
    gateway = make_netns()
    site.prepare(f"--site=gateway={gateway}", "--no-hold")  # else the gateway is open already
    assert site.call() == (0, "natkeep-hook: web: gate open\n")
    assert site.gate() == "open"
    words = [line.split(" ", 2) for line in site.ready.read_text().splitlines()]
    named = [os.stat(f"/run/netns/{name}") for name in (gateway, site.netns)]
    sites = [word[1] for word in words if word[0] == "site"]
    assert sites == [f"{status.st_dev}:{status.st_ino}" for status in named]


def test_a_stateless_move_is_opened(site: Site) -> None:
    site.prepare("--mode=stateless")
    assert site.call()[0] == 0
    assert site.gate() == "open"


def _remove(site: Site) -> None:
    site.ready.unlink()


def _truncate(site: Site) -> None:
    site.ready.write_bytes(site.ready.read_bytes()[:-4])


def _be_of_another_form(site: Site) -> None:
    site.ready.write_text(site.ready.read_text().replace("natkeep-ready 5", "natkeep-ready 4"))


def _be_of_another_boot(site: Site) -> None:
    lines = site.ready.read_text().splitlines()
    lines[1] = "boot 00000000-0000-0000-0000-000000000000"
    site.ready.write_text("\n".join([*lines, ""]))


def _be_a_link(site: Site) -> None:
    site.ready.rename(site.state / "elsewhere")
    site.ready.symlink_to("elsewhere")


def _be_a_fifo(site: Site) -> None:
    site.ready.unlink()
    os.mkfifo(site.ready)


def _let_the_journal_grow(site: Site) -> None:
    with site.journal.open("ab") as file:
        file.write(b"{")  # as of a writer that was killed


def _lose_the_namespace(site: Site) -> None:
    text = site.ready.read_text()
    site.ready.write_text(text.replace(f"/run/netns/{site.netns}", "/proc/self/ns/net"))


def _name_another_cookie(site: Site) -> None:
    """As where the namespace has ended, and the kernel gave its inode to another one."""
    text = site.ready.read_text()
    (cookie,) = re.findall(r"(?m)^site \S+ (\d+) ", text)
    site.ready.write_text(text.replace(f" {cookie} ", f" {int(cookie) + 1} "))


def _let_others_write(site: Site) -> None:
    site.state.chmod(0o777)


DEVIATIONS = [_remove, _truncate, _be_of_another_form, _be_of_another_boot, _be_a_link, _be_a_fifo,
              _let_the_journal_grow, _lose_the_namespace, _name_another_cookie,
              _let_others_write]  # fmt: skip


@pytest.mark.parametrize("deviate", DEVIATIONS, ids=lambda each: each.__name__.strip("_"))
def test_what_is_not_as_prepare_left_it_goes_the_long_way_and_is_untouched(
    deviate: Callable[[Site], None], site: Site
) -> None:
    site.prepare()
    deviate(site)
    journal = site.journal.read_bytes()
    assert site.call() == (TAKEN, "")
    assert site.journal.read_bytes() == journal
    site.state.chmod(0o700)
    assert site.gate() == "closed"


@pytest.mark.parametrize(
    "environment",
    [
        {"CRTOOLS_INIT_PID": str(os.getpid())},  # in another namespace than the destination
        {"CRTOOLS_INIT_PID": "4194305"},  # beyond the largest pid
        {"CRTOOLS_INIT_PID": "1x"},
        {"CRTOOLS_INIT_PID": ""},
        {"CRTOOLS_IMAGE_DIR": str(CORPUS / "half-closed")},  # of another dump
        {"CRTOOLS_IMAGE_DIR": "/nonexistent"},
        {"NATKEEP_ID": "web/../web"},
        {"NATKEEP_ID": "w" * 33},
        {"NATKEEP_ID": "api"},
        {"NATKEEP_STATE_DIR": "/nonexistent"},
    ],
    ids=[
        "another namespace",
        "no such pid",
        "no pid",
        "no tree",
        "another dump",
        "no images",
        "a path for an id",
        "a long id",
        "an unknown id",
        "no state directory",
    ],
)
def test_a_call_that_does_not_fit_goes_the_long_way(
    environment: dict[str, str], site: Site
) -> None:
    site.prepare()
    assert site.call(**environment) == (TAKEN, "")
    assert site.gate() == "closed"


def test_work_on_other_moves_is_not_waited_for(site: Site) -> None:
    site.prepare()
    with (site.state / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert site.call() == (0, "natkeep-hook: web: gate open\n")


def test_work_on_the_same_move_is_waited_for_and_then_the_long_way_goes_on(site: Site) -> None:
    site.prepare()
    text = site.program.read_text()
    site.program.write_text(text.replace("SECONDS = 5", "SECONDS = 0.3"))
    with site.journal.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert site.call() == (TAKEN, "")
        site.program.write_text(text)
        ended = threading.Timer(0.1, lambda: fcntl.flock(lock, fcntl.LOCK_UN))
        ended.start()
        assert site.call() == (0, "natkeep-hook: web: gate open\n")
        ended.join()


def test_what_goes_on_after_the_hook_keeps_nothing_open(site: Site) -> None:
    """For a second it waits for CRIU's end: nothing is locked, and a file system can be left."""
    site.prepare()
    text = site.program.read_text()
    assert text.count("REST = 1000 ") == text.count("SECONDS = 5 ") == 1
    text = text.replace("REST = 1000 ", "REST = 30_000 ")  # until we have looked
    site.program.write_text(text.replace("SECONDS = 5 ", "SECONDS = 60 "))
    held = os.open(site.state.parent, os.O_RDONLY)
    os.set_inheritable(held, True)
    try:
        assert site.call(CRTOOLS_IMAGE_DIR=str(CORPUS / "plain"))[0] == 0
    finally:
        os.close(held)
    with site.journal.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    deadline = time.monotonic() + 20
    while not (children := [pid for pid in map(int, find_pids()) if is_left_by(site, pid)]):
        assert time.monotonic() < deadline
    [child] = children
    while os.readlink(f"/proc/{child}/cwd") != "/":  # which is the last that it does before
        assert time.monotonic() < deadline
    links = [os.readlink(path) for path in Path(f"/proc/{child}/fd").iterdir()]
    os.kill(child, signal.SIGKILL)
    assert [link for link in links if link.startswith((str(site.state.parent), str(CORPUS)))] == []


def find_pids() -> Iterator[str]:
    return filter(str.isdigit, os.listdir("/proc"))


def is_left_by(site: Site, pid: int) -> bool:
    """Whether it is what the site's program has left behind: a session of its own."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return os.fsencode(site.program.parent) in words and os.getsid(pid) == pid
    except OSError:
        return False


def test_a_comparison_of_an_open_move_does_not_have_it_opened_twice(site: Site) -> None:
    site.prepare()
    compare = ("open", "web", "--compare", f"--image={CORPUS / 'plain'}")
    site.natkeep(*compare)
    assert site.call() == (0, "natkeep-hook: web: gate open\n")
    site.natkeep(*compare)
    assert site.call()[0] == TAKEN
    assert site.gate() == "open"


def test_a_second_call_finds_the_gate_open_the_long_way(site: Site) -> None:
    """CRIU 4.1 and older call twice where two configuration files name the hook."""
    site.prepare()
    assert site.call()[0] == 0
    assert site.call() == (TAKEN, "")
    assert site.call(SOURCE) == (0, "natkeep-hook: web: gate open\n")
    assert site.gate() == "open"


def test_what_the_kernel_refuses_is_told_by_the_long_way_and_undone(
    site: Site, make_netns: Callable[[], str]
) -> None:
    """The gateway's gate was open already when the destination refused."""
    gateway = make_netns()
    site.prepare(f"--site=gateway={gateway}", "--no-hold")
    flush = ["nsenter", f"--net=/run/netns/{site.netns}", "nft", "flush", "ruleset"]
    subprocess.run(flush, check=True)
    code, said = site.call(SOURCE)
    assert code == 5
    assert said.startswith("natkeep-hook: destination=")
    assert said.count("\n") == 1
    (move,) = json.loads(site.natkeep("status", "--json"))["moves"]
    assert move["gate"] == "closed"
    rules = ["nsenter", f"--net=/run/netns/{gateway}", "nft", "list", "chain", "inet", "natkeep",
             "gate-web"]  # fmt: skip
    listed = subprocess.run(rules, capture_output=True, text=True, check=True).stdout
    assert "accept" not in listed.replace("mark 0x0000c114 accept", "")
    site.natkeep("teardown", "web", "--yes")
    assert list(site.state.iterdir()) == [site.state / "lock"]


def test_nothing_but_builtin_modules_is_imported(site: Site) -> None:
    """Else the hook takes longer than what it saves."""
    site.prepare()
    text = site.program.read_text().replace(
        "\n        posix._exit(0)",
        "\n        print(*sys.modules, file=sys.stderr)\n        posix._exit(0)",
    )
    site.program.write_text(text)
    bare = subprocess.run([sys.executable, "-I", "-S", "-c", "import sys; print(*sys.modules)"],
                          capture_output=True, text=True, check=True).stdout.split()  # fmt: skip
    enter = ["nsenter", f"--net=/run/netns/{site.netns}", *command(site.program.parent)]
    done = subprocess.run(
        enter, capture_output=True, text=True, check=True,
        env={"CRTOOLS_INIT_PID": str(site.tree), "CRTOOLS_IMAGE_DIR": str(CORPUS / "plain"),
             "NATKEEP_ID": "web", "NATKEEP_STATE_DIR": str(site.state)},
    )  # fmt: skip
    imported = set(done.stderr.splitlines()[-1].split()) - set(bare)
    assert imported <= {"natkeep_hook_open", "_socket", "fcntl", "posix", "_signal"}


@pytest.mark.parametrize("sudo", [{"SUDO_USER": "alice"}, {}], ids=["sudo", "login"])
def test_the_opening_is_a_line_in_the_systems_log(site: Site, sudo: dict[str, str]) -> None:
    """Written by the process that nothing waits for."""
    site.prepare()
    with tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX, 2) as log:
        log.bind(f"{short}/log")
        log.settimeout(20)
        text = site.program.read_text().replace('"/dev/log"', repr(f"{short}/log"))
        site.program.write_text(text)
        assert site.call(**sudo)[0] == 0
        line = log.recv(1000).decode()
    assert re.fullmatch(r"<29>natkeep-hook\[\d+\]: web: gate open \(by (.+)\)", line)
    uid = Path("/proc/self/loginuid").read_text().replace("4294967295", str(os.getuid()))
    assert line.endswith(f" (by {sudo.get('SUDO_USER', f'uid {uid}')})")


def test_it_is_compiled_once(site: Site) -> None:
    """Compiling it takes a tenth of the time that it saves."""
    site.prepare()
    assert site.call()[0] == 0
    (compiled,) = (site.program.parent / "__pycache__").iterdir()
    assert compiled.name.startswith("natkeep_hook_open.")


def test_datagrams_are_delivered_before_the_gate_is_opened(site: Site, tmp_path: Path) -> None:
    listing = tmp_path / "list"
    listing.write_text(f"{OLD}:5000 10.1.0.2:50594\nudp {OLD}:53 10.1.0.2:5353\n")
    site.natkeep("prepare", "web", f"--map={OLD}={NEW}", f"--connections={listing}",
                 f"--site=destination={site.netns}")  # fmt: skip
    assert "\ndatagrams web.hold\nhold web.hold\n" in site.ready.read_text()
    (site.state / "web.hold").unlink()
    asked = []

    def answer(listening: socket.socket) -> None:
        for _ in range(2):
            with listening.accept()[0] as asking:
                # Not by status, which asks the holder too.
                listing = ["nft", "list", "chain", "inet", "natkeep", "gate-web"]
                there = subprocess.run(
                    ["ip", "netns", "exec", site.netns, *listing], capture_output=True, text=True
                )
                asked.append((asking.recv(64).split()[0], "accept" in there.stdout))
                with suppress(BrokenPipeError):  # of segments no answer is waited for
                    asking.sendall(b"held 0 0 0 0\n")

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(site.state / "web.hold"))
        listening.listen()
        thread = threading.Thread(target=answer, args=[listening])
        thread.start()
        text = site.program.read_text().replace("PATIENCE = 0.05", "PATIENCE = 30.0")
        site.program.write_text(text)
        assert site.call()[0] == 0
        thread.join()

    assert asked == [(b"datagrams", False), (b"deliver", True)]
