"""What a real CRIU leaves when it is killed in the midst of a dump, and what becomes of that.

    the test, and CRIU ── A: a server and its peer, whose namespace CRIU locks as a whole

Before CRIU has anything in the process this goes on, behind the lock; after that its sockets are
in repair as well, so that it ends unless it waits for them to become readable.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from natkeep.kernel.netns import entered
from natkeep.lab.time_scale import scaled
from natkeep.migrate import back
from natkeep.migrate.engines import Criu
from natkeep.migrate.forward import Migration
from natkeep.migrate.host import LOCAL, Host, HostError, Ssh, read_start
from natkeep.migrate.record import Record

CRIU = Path(__file__).resolve().parents[2] / ".lab/criu/criu"
pytestmark = [pytest.mark.root, pytest.mark.criu, pytest.mark.needs("nftables")]

# CRIU writes shared memory before it has anything in the process, and private memory after that.
SERVER = """
import mmap, os, select, socket, sys
os.closerange(3, 1024)
memory = mmap.mmap(-1, 192 << 20, getattr(mmap, sys.argv[1]))
for at in range(0, len(memory), 4096):
    memory[at] = 1
listener = socket.create_server(("10.2.0.10", 5000))
print("ready", file=open("told", "w"))
accepted, _ = listener.accept()
while True:
    if sys.argv[2] == "waits":
        select.select([accepted], [], [])
    said = accepted.recv(64)
    if not said:
        break
    accepted.sendall(said)
"""


class Dumped:
    """The server in its namespace, with a peer; `kill_criu` begins a dump and kills CRIU."""

    def __init__(self, netns: str, path: Path, memory: str, how: str) -> None:
        self.netns, self.path = netns, path
        words = [f"--net=/run/netns/{netns}", sys.executable, "-I", "-S", "-c", SERVER, memory, how]
        self.server = subprocess.Popen(
            ["nsenter", *words], cwd=path, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.await_word(path / "told", "ready")
        with entered(netns):
            self.peer = socket.create_connection(("10.2.0.10", 5000))
        self.peer.settimeout(scaled(30))
        assert self.ask(b"before") == b"before"

    def await_word(self, path: Path, word: str) -> None:
        deadline = time.monotonic() + scaled(60)
        while not (path.exists() and word in path.read_text(errors="replace")):
            assert time.monotonic() < deadline, f"{path} does not say {word!r}"
            time.sleep(0.001)

    def ask(self, word: bytes) -> bytes:
        self.peer.sendall(word)
        return self.peer.recv(64)

    def kill_criu(self, when: str) -> None:
        images = self.path / "dump"
        images.mkdir()
        inode = os.stat(f"/run/netns/{self.netns}").st_ino
        criu = subprocess.Popen(
            # Scheduled behind us, so that it cannot be through before we have read its log.
            ["nice", "-n", "19", CRIU, "dump", "-t", str(self.server.pid), "-D", images,
             "--tcp-established", "-v3", "--network-lock", "nftables", "-o", "dump.log",
             "--external", f"net[{inode}]:key"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.await_word(images / "dump.log", when)
        criu.kill()
        assert criu.wait() == -signal.SIGKILL, "it was through before it could be killed"

    def tables(self) -> list[str]:
        words = ["ip", "netns", "exec", self.netns, "nft", "list", "tables"]
        listed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return [line.split()[-1] for line in listed.splitlines()]

    def close(self) -> None:
        self.server.kill()
        self.server.wait()
        self.peer.close()


@pytest.fixture
def dumped(netns: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Dumped]:
    for words in ("link set lo up", "address add 10.2.0.10/32 dev lo"):
        subprocess.run(["ip", "-n", netns, *words.split()], check=True)
    dumped = Dumped(netns, tmp_path, *request.param)
    yield dumped
    dumped.close()


@pytest.fixture
def migration(
    dumped: Dumped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Migration]:
    """One whose dump was begun, and whose destination undoes what it is told to."""
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path / "state"))
    source = Host(LOCAL, "source", Ssh(), "web")
    source.connect()
    pid = dumped.server.pid
    record = Record(
        "web", "a", pid, "b", started=read_start(source, pid), reached="dump",
        images=str(tmp_path), netns={"source": f"/run/netns/{dumped.netns}"},
    )  # fmt: skip
    other = SimpleNamespace(connect=lambda: None, natkeep=lambda *words: None)
    yield cast(
        Migration,
        SimpleNamespace(
            record=record, engine=Criu(record), source=source, destination=other, translators=(),
            say=lambda step, text: None, fresh=True,
        ),
    )  # fmt: skip
    source.close()


@pytest.mark.parametrize(
    ("dumped", "when"),
    [
        (("MAP_SHARED", "reads"), "Dumping memfd"),
        (("MAP_PRIVATE", "waits"), "Dumping pages"),
    ],
    indirect=["dumped"],
    ids=["before it is in the process", "after"],
)
def test_where_the_process_lives_the_way_back_lets_it_go_on(
    dumped: Dumped, migration: Migration, when: str
) -> None:
    dumped.kill_criu(when)
    [table] = dumped.tables()
    assert table.startswith("CRIU-")
    assert dumped.server.poll() is None

    back.go_back(migration)

    assert dumped.tables() == []
    assert dumped.ask(b"after") == b"after"


@pytest.mark.parametrize("dumped", [("MAP_PRIVATE", "reads")], indirect=True)
def test_where_the_process_ends_by_that_it_is_said_what_stays(
    dumped: Dumped, migration: Migration
) -> None:
    dumped.kill_criu("Dumping pages")
    dumped.server.wait(scaled(20))  # of PermissionError
    [table] = dumped.tables()

    with pytest.raises(HostError, match=f"has ended, .* not complete; .* inet {table}, keeps"):
        back.go_back(migration)

    assert dumped.tables() == [table], "its peers are reset by nobody unasked"
