"""migrate/back.py: where the process is by now, as the hosts tell; a wrong answer runs it twice."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from natkeep.migrate import back, engines
from natkeep.migrate.back import Place
from natkeep.migrate.engines import Criu
from natkeep.migrate.forward import Migration
from natkeep.migrate.host import LOCAL, Answer, Host, HostError, Ssh, read_start
from natkeep.migrate.record import Record

LIVE = {"proto": "tcp", "state": "live"}
ENDED = {"proto": "tcp", "state": "ended"}
LOST = {"proto": "tcp", "state": None}
"""As of a connection whose entry lives and whose socket is gone."""


class End:
    """A host with these moves and processes, that was booted *boot*; what it runs is read only."""

    def __init__(self, *moves: dict[str, object], pids: tuple[int, ...] = (), boot: str = "b1"):
        self.moves, self.pids, self.boot = moves, pids, boot

    def __str__(self) -> str:
        return "b"

    def connect(self) -> None:
        pass

    def natkeep(self, *words: str) -> Answer:
        assert words == ("status", "--json")
        return Answer(0, json.dumps({"moves": self.moves}), "")

    def run(self, *words: str, ok: object = (0,)) -> Answer:
        assert words[0] == "cat"
        if words[1].endswith("boot_id"):
            return Answer(0, f"{self.boot}\n", "")
        if words[1].startswith("/proc/"):
            pid = int(words[1].split("/")[2])
            said = f"{pid} (x) S {' '.join(['0'] * 18)} 77 0" if pid in self.pids else ""
            return Answer(0 if said else 1, said, "")
        return Answer(0, "Dumping finished successfully", "")


class Source(End):
    """The source after a dump whose CRIU was killed, or is at work still: its log has no end."""

    def __init__(self, *, pids: tuple[int, ...], tracer: str = "", parent: str = "init"):
        super().__init__(pids=pids)
        self.table, self.taken = "CRIU-1", list[str]()
        self.tracer, self.parent = tracer, parent

    def run(self, *words: str, ok: object = (0,)) -> Answer:
        if words[1].endswith("/status"):
            return Answer(0, f"PPid:\t99\nTracerPid:\t{98 if self.tracer else 0}\n", "")
        if words[1].endswith("/comm"):
            return Answer(0, f"{self.parent if '/99/' in words[1] else self.tracer}\n", "")
        if words[1].endswith("boot_id"):
            return super().run(*words, ok=ok)
        if words[1].startswith("/proc/"):
            return super().run(*words, ok=ok)
        return Answer(0, "(00.000000) CRIU run id = 1-a\n", "")

    def find_lock(self, run_id: str, netns: str) -> str:
        assert (run_id, netns) == ("1-a", "/run/netns/pod")
        return self.table

    def release(self, run_id: str, netns: str, pid: int) -> str:
        assert (run_id, netns, pid) == ("1-a", "/run/netns/pod", 7)
        self.taken.append(self.table)
        return self.table


def move(gate: str, *connections: dict[str, object], **more: object) -> dict[str, object]:
    return {"id": "web", "gate": gate, "connections": connections, **more}


def find(destination: End, reached: str = "restore", boot: str = "b1") -> Place:
    """Of a process that was dumped: at the source it has ended, and its image is complete."""
    record = Record("web", "a", 7, "b", started=5, reached=reached, boot=boot)
    ends = {"source": End(), "destination": destination}
    migration = SimpleNamespace(record=record, engine=Criu(record), **ends)
    return back.find_place(cast(Migration, migration))


@pytest.mark.parametrize(
    "there",
    [
        End(move("open", ENDED, LIVE)),
        End(move("open", {"proto": "tcp", "state": "one-way"})),
        End(move("open", {"proto": "udp", "state": "silent"})),
        End(move("open", LOST, udp_states={"10.2.0.10:53": "silent"})),
        End(move("open", ENDED, LOST), pids=(7,)),  # all that it had has ended, and it has not
        End(move("open"), pids=(7,)),
    ],
)
def test_it_runs_where_the_gate_is_open_and_a_socket_or_it_itself_is(there: End) -> None:
    assert find(there) == Place.DESTINATION


@pytest.mark.parametrize("states", [(), (ENDED,), (LOST,), (ENDED, LOST)])
@pytest.mark.parametrize("reached", ["restore", "source", "done"])
def test_an_open_gate_without_process_and_socket_is_neither_here_nor_there(
    states: tuple[dict[str, object], ...], reached: str
) -> None:
    """It ended there, or its restore failed behind the hook: peers may have been answered."""
    with pytest.raises(HostError, match="gate of web is open, but neither process 7 nor a socket"):
        find(End(move("open", *states)), reached)


def test_while_criu_restores_it_there_it_is_nowhere_else() -> None:
    """As after a `serve` there that was killed: CRIU goes on, and its hook will open the gate."""
    there = Source(pids=(7,), parent="criu")
    there.moves = (move("closed", LOST),)
    with pytest.raises(HostError, match="criu, process 99 on b, is at work on process 7"):
        find(there)
    there.parent = "systemd"  # half a tree, which a CRIU that was killed has left
    assert find(there) == Place.FROZEN


@pytest.mark.parametrize("there", [End(), End(move("closed", LOST))])
def test_what_was_not_opened_there_is_frozen(there: End) -> None:
    assert find(there) == Place.FROZEN


@pytest.mark.parametrize("there", [End(), End(move("closed", LOST)), End(move("closed", LIVE))])
@pytest.mark.parametrize("reached", ["source", "verify", "done"])
def test_what_ran_there_is_not_frozen_because_that_host_knows_no_open_gate(
    there: End, reached: str
) -> None:
    """As after a boot: the image is one of before, and peers have been told more since."""
    with pytest.raises(HostError, match="was restored on b"):
        find(there, reached)


@pytest.mark.parametrize("there", [End(boot="b2"), End(move("closed", LOST), boot="b2")])
def test_a_destination_that_has_booted_since_does_not_tell_whether_it_was_opened(
    there: End,
) -> None:
    with pytest.raises(HostError, match="b has booted since"):
        find(there)


def test_a_record_that_names_no_boot_is_one_of_an_earlier_natkeep() -> None:
    assert find(End(boot="b2"), boot="") == Place.FROZEN


def test_a_zombie_is_no_process() -> None:
    """A dumped process whose parent does not wait for it must not count as one that runs."""
    zombie = subprocess.Popen(["true"], start_new_session=True, env={})
    host = SimpleNamespace(
        run=lambda *words, ok: Answer(
            (done := subprocess.run(words, capture_output=True, text=True)).returncode,
            done.stdout, done.stderr,
        )
    )  # fmt: skip
    deadline = time.monotonic() + 10
    while read_start(cast(Host, host), zombie.pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with open(f"/proc/{zombie.pid}/stat", encoding="ascii") as file:
        assert file.read().split()[2] == "Z"
    zombie.wait()


def killed(source: Source, reached: str = "dump") -> tuple[Migration, list[str]]:
    """The migration of a container whose dump was begun, and what it says."""
    netns = {"source": "/run/netns/pod"}
    record = Record("web", "a", 7, "b", started=77, reached=reached, netns=netns)
    said: list[str] = []
    ended = SimpleNamespace(
        connect=lambda: None, natkeep=lambda *words: said.append(" ".join(words))
    )
    migration = SimpleNamespace(
        record=record, engine=Criu(record), source=source, destination=ended, translators=(),
        say=lambda step, text: said.append(text), fresh=True,
    )  # fmt: skip
    return cast(Migration, migration), said


def test_the_lock_of_a_killed_criu_goes_where_the_process_lives_and_was_restored_nowhere() -> None:
    source = Source(pids=(7,))
    migration, said = killed(source)
    back.go_back(migration)
    assert source.taken == ["CRIU-1"]
    assert "removed CRIU-1, a killed CRIU's lock" in said[0]
    assert said[-1] == "runs on b, as before"


def test_no_lock_is_taken_while_criu_is_at_work_on_the_process() -> None:
    source = Source(pids=(7,), tracer="criu")
    migration, said = killed(source)
    with pytest.raises(HostError, match="criu, process 98 on b, is at work on process 7"):
        back.go_back(migration)
    assert (source.taken, said) == ([], [])


def test_a_debugger_is_no_criu() -> None:
    source = Source(pids=(7,), tracer="gdb")
    migration, said = killed(source)
    back.go_back(migration)
    assert said[-1] == "runs on b, as before"


def test_what_a_killed_criu_leaves_of_a_process_that_has_ended_is_said_and_stays() -> None:
    source = Source(pids=())
    migration, said = killed(source)
    with pytest.raises(HostError, match="its image is not complete; CRIU's lock, table") as error:
        back.go_back(migration)
    assert "nft delete table inet CRIU-1 there has them reset" in str(error.value.hint)
    assert (source.taken, said) == ([], [])


def test_criu_is_not_killed_however_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engines, "LONG", 0.05)
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path))
    said: list[tuple[str, str]] = []
    asked: list[object] = []
    host = Host(LOCAL, "source", Ssh(), "web")
    host.connect()
    asking = host._ask
    monkeypatch.setattr(host, "_ask", lambda *words: asked.append(words[0]) or asking(*words))
    go = tmp_path / "go"
    # It ends when it was said that it takes long.
    words = ("sh", "-c", f"until [ -e {go} ]; do sleep 0.01; done")
    try:
        engines.run(
            engines.Command("criu dump", words, {}, ()), host,
            lambda step, text: said.append((step, text)) or go.touch(),
        )  # fmt: skip
    finally:
        host.close()
    assert [(one["run"], one["seconds"]) for one in asked if isinstance(one, dict)] == [
        (words, None)
    ]
    assert said == [("waiting", f"{host}: criu dump takes longer than 0.05 s; to kill it may end "
                     "the process")]  # fmt: skip
