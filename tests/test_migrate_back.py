"""migrate/back.py: where the process is by now, as the hosts tell; a wrong answer runs it twice."""

from __future__ import annotations

import json
import subprocess
import time
from types import SimpleNamespace
from typing import cast

import pytest

from natkeep.migrate import back
from natkeep.migrate.back import Place
from natkeep.migrate.engines import Criu
from natkeep.migrate.forward import Migration
from natkeep.migrate.host import Answer, Host, HostError, read_start
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
