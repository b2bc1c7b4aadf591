"""the applications on loopback: every order, every kind of end, and that a wrong octet is found."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from natkeep.kernel.netns import entered
from natkeep.lab import traffic
from natkeep.lab.application import (
    Application,
    Report,
    TrafficError,
    all_in,
    all_open,
    answered,
    faults,
    handed_over,
    received,
)
from natkeep.lab.traffic import find_mismatch, make_octets

root = pytest.mark.root

SERVERS = ("127.0.0.1:7000", "[::1]:7000")
TALK = {"talk": {"interval_ms": 5, "size": 64}}


class Stage:
    """One namespace, a server, and a client that is connected to it; ends what it started."""

    def __init__(self, netns: str, directory: Path) -> None:
        self.netns, self.directory = netns, directory
        self.processes: list[subprocess.Popen[bytes]] = []
        self.serve, self.dial = Application(directory / "serve"), Application(directory / "dial")

    def start(self, line: list[str]) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(["ip", "netns", "exec", self.netns, *line])
        self.processes.append(process)
        return process

    def connect(self, to: str = SERVERS[0], count: int = 2) -> None:
        self.server = self.start(self.serve.serve_line(*SERVERS))
        self.serve.wait(lambda report: len(report["listening"]) == 2, "to listen")
        self.client = self.start(self.dial.dial_line(to, count=count))
        for application in (self.serve, self.dial):
            application.wait(all_open(count), "to be connected")

    @contextlib.contextmanager
    def shut(self) -> Iterator[None]:
        """No TCP segment arrives anywhere while the block runs, forged ones excepted."""
        self.nft("add table inet gate; "
                 "add chain inet gate input { type filter hook input priority 0; }; "
                 "add rule inet gate input meta l4proto tcp meta mark != 0xc114 drop")  # fmt: skip
        yield
        self.nft("delete table inet gate")

    def move(self, application: Application, process: subprocess.Popen[bytes], role: str) -> Report:
        """Freeze, kill, re-create in a new process; the report of the frozen one."""
        state = self.directory / "state.json"
        frozen = application.do({"freeze": str(state)})
        process.kill()
        process.wait()
        self.latest = self.start(application.resume_line(state, role=role))
        application.wait(lambda report: report["phase"] == "recreated", "to be re-created")
        return frozen

    def nft(self, text: str) -> None:
        subprocess.run(["ip", "netns", "exec", self.netns, "nft", text], check=True)

    def assert_sound(self) -> None:
        """No fault on either side, and what one has sent is what the other has read."""
        reports = [application.fresh() for application in (self.serve, self.dial)]
        assert [faults(report) for report in reports] == [[], []]
        server = {each["peer"]: each for each in reports[0]["connections"]}
        for each in reports[1]["connections"]:
            assert (each["tx"], each["rx"]) == (server[each["local"]]["rx"],
                                                server[each["local"]]["tx"])  # fmt: skip

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture
def stage(netns: str, tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(netns, tmp_path)
    yield stage
    stage.end()


# The octets


def test_a_block_says_who_sent_it_and_where_it_belongs() -> None:
    assert make_octets("dial", 16, 8) == b"D" + (16).to_bytes(7, "big")
    assert make_octets("serve", 2**40, 8) == b"S" + (2**40).to_bytes(7, "big")


@pytest.mark.parametrize("start", [0, 1, 7, 8, 65533])
def test_octets_depend_on_their_offset_alone(start: int) -> None:
    whole = make_octets("dial", 0, 70_000)
    assert make_octets("dial", start, 21) == whole[start : start + 21]


GOOD = make_octets("dial", 100, 4096)


@pytest.mark.parametrize(
    ("at", "data"),
    [
        pytest.param(1000, GOOD[:1000] + b"!" + GOOD[1001:], id="changed"),
        pytest.param(1000, GOOD[:1000] + GOOD[1001:], id="one lost"),
        pytest.param(1000, GOOD[:1000] + GOOD[2448:], id="a segment lost"),
        pytest.param(1448, GOOD[:1448] + GOOD, id="repeated"),
        pytest.param(1000, GOOD[:1000] + GOOD[2000:3000] + GOOD[1000:2000], id="reordered"),
        pytest.param(4, make_octets("serve", 100, 64), id="the other direction"),
    ],
)
def test_a_fault_is_found_within_eight_octets(at: int, data: bytes) -> None:
    mismatch = find_mismatch("dial", 100, data)
    assert mismatch is not None
    assert 100 + at <= mismatch["offset"] < 100 + at + 8


def test_what_belongs_there_is_no_mismatch() -> None:
    assert find_mismatch("dial", 100, GOOD) is None


# The orders


@root
@pytest.mark.parametrize(
    ("to", "family", "wire"),
    [
        ("127.0.0.1:7000", "4", "127.0.0.1:7000"),
        ("[::1]:7000", "6", "[::1]:7000"),
        ("[::ffff:127.0.0.1]:7000", "mapped", "127.0.0.1:7000"),
    ],
)
def test_the_client_asks_and_the_server_answers(
    stage: Stage, to: str, family: str, wire: str
) -> None:
    stage.connect(to)
    stage.dial.do(TALK)
    stage.dial.wait(answered(20), "20 answers")
    stage.dial.do("quiet")
    report = stage.dial.wait(
        lambda r: all(c["asked"] == c["answered"] for c in r["connections"]), "the last answer"
    )

    for each in report["connections"]:
        assert (each["family"], each["peer"]) == (family, wire)
        assert each["rx"] == each["answered"] * 64
    stage.assert_sound()


@root
def test_the_server_asks_and_the_client_answers(stage: Stage) -> None:
    stage.connect()
    stage.dial.do("answer")
    stage.serve.do(TALK)
    stage.serve.wait(answered(20), "20 answers")
    stage.serve.do("quiet")
    stage.serve.wait(lambda r: all(c["rx"] == c["tx"] for c in r["connections"]), "the last")
    stage.assert_sound()


@root
def test_an_order_may_be_for_some_connections_only(stage: Stage) -> None:
    stage.connect(count=3)
    stage.dial.do({"push": 1000, "only": [1]})
    report = stage.dial.wait(lambda r: r["connections"][1]["rx"] == 1000, "the answer")
    assert [each["tx"] for each in report["connections"]] == [0, 1000, 0]


@root
def test_bulk_runs_both_ways_at_once(stage: Stage) -> None:
    stage.connect()
    stage.serve.do("swallow")
    for application in (stage.serve, stage.dial):
        application.do({"bulk": 5_000_000})
    for application in (stage.serve, stage.dial):
        application.wait(received(5_000_000), "5 MB", within=10)
    stage.assert_sound()


@root
def test_endless_bulk_ends_with_quiet(stage: Stage) -> None:
    stage.connect()
    stage.serve.do("swallow")
    stage.dial.do({"bulk": None})
    report = stage.serve.wait(received(1_000_000), "1 MB")
    assert stage.dial.fresh()["connections"][0]["owed"] is None
    report = stage.dial.do("quiet")
    assert handed_over(report)
    sent = [each["tx"] for each in report["connections"]]
    stage.serve.wait(lambda r: sorted(c["rx"] for c in r["connections"]) == sorted(sent), "it all")
    stage.assert_sound()


@root
def test_queues_fill_while_nobody_reads(stage: Stage) -> None:
    stage.connect()
    stage.serve.do("swallow", "pause_reading")
    report = stage.dial.do({"push": 20_000_000})
    assert not handed_over(report)
    assert [each["rx"] for each in stage.serve.fresh()["connections"]] == [0, 0]

    stage.serve.do("resume_reading")
    stage.serve.wait(received(20_000_000), "20 MB", within=10)
    stage.assert_sound()


@root
@pytest.mark.parametrize("first", ["dial", "serve"])
def test_half_closed_either_way(stage: Stage, first: str) -> None:
    """Who has not closed goes on to send, and the other one reads it."""
    stage.connect()
    closer, other = (
        (stage.dial, stage.serve) if first == "dial" else (stage.serve, stage.dial)
    )  # fmt: skip
    closer.do("shutdown_write")
    other.wait(all_in("eof", 2), "the FIN")
    other.do({"push": 5000})
    closer.wait(received(5000), "what still comes")
    closer.wait(all_in("shut", 2), "to stay half-closed")
    other.do("shutdown_write")
    for application in (closer, other):
        application.wait(all_in("done", 2), "the end")
    stage.assert_sound()


@root
def test_shutdown_waits_for_what_is_owed(stage: Stage) -> None:
    stage.connect()
    stage.serve.do("swallow", "pause_reading")
    stage.dial.do({"push": 20_000_000}, "shutdown_write")
    stage.dial.wait(all_open(2), "to be stuck")
    stage.serve.do("resume_reading")
    stage.serve.wait(all_in("eof", 2), "the FIN", within=10)
    stage.assert_sound()


@root
@pytest.mark.parametrize("octets", [0, 1, 65536, 131072])
def test_shutdown_follows_the_last_octet(stage: Stage, octets: int) -> None:
    """Also where the last piece is a full one."""
    stage.connect()
    stage.serve.do("swallow")
    stage.dial.do({"push": octets}, "shutdown_write")
    stage.serve.wait(all_in("eof", 2), "the FIN")
    stage.assert_sound()


@root
def test_a_reset_is_told_apart_from_a_close(stage: Stage) -> None:
    stage.connect()
    stage.dial.do({"close": None, "only": [0]}, {"reset": None, "only": [1]})
    report = stage.serve.wait(
        lambda r: {c["state"] for c in r["connections"]} == {"eof", "reset"}, "both ends"
    )
    assert len(faults(report)) == 1
    assert "ECONNRESET" in faults(report)[0]
    assert [each["state"] for each in stage.dial.fresh()["connections"]] == ["closed", "closed"]


@root
def test_a_refused_connection_says_so(stage: Stage) -> None:
    stage.connect()
    stage.dial.do({"open": "127.0.0.1:7999"})
    report = stage.dial.wait(lambda r: r["connections"][-1]["state"] == "failed", "the refusal")
    assert report["connections"][-1]["error"] == "ECONNREFUSED"


@root
def test_connections_leave_from_the_ports_that_were_asked_for(stage: Stage) -> None:
    stage.start(stage.serve.serve_line(*SERVERS))
    stage.serve.wait(lambda report: len(report["listening"]) == 2, "to listen")
    stage.start(stage.dial.dial_line(SERVERS[0], count=2, source="127.0.0.1:40000"))
    report = stage.dial.wait(all_open(2), "to be connected")
    assert [c["local"] for c in report["connections"]] == ["127.0.0.1:40000", "127.0.0.1:40001"]


@root
def test_silence_is_measured_from_mark_on(stage: Stage) -> None:
    stage.connect(count=1)
    stage.dial.do(TALK)
    stage.dial.wait(answered(5), "5 answers")
    stage.serve.do("pause_reading")
    stage.dial.do("mark")
    marked = stage.dial.fresh()
    while (now := stage.dial.fresh())["monotonic"] < marked["monotonic"] + 0.1:
        pass
    assert now["connections"][0]["longest_silence_ms"] == 0  # no gap is complete yet
    stage.serve.do("resume_reading")
    before = stage.dial.fresh()["connections"][0]["answered"]
    silent = stage.dial.wait(answered(before + 5), "more answers")["connections"][0]
    assert 100 <= silent["longest_silence_ms"] < 1000
    assert stage.dial.do("mark")["connections"][0]["longest_silence_ms"] == 0


@root
def test_a_wrong_octet_on_the_wire_is_reported(stage: Stage) -> None:
    """The check can fail: a stranger sends 99 right octets and a wrong one."""
    stage.connect(count=1)
    with entered(stage.netns):
        stranger = socket.create_connection(("127.0.0.1", 7000), timeout=5)
    stranger.sendall(make_octets("dial", 0, 99) + b"!")
    report = stage.serve.wait(lambda r: r["connections"][-1]["rx"] == 100, "its octets")
    stranger.close()

    assert report["connections"][0]["mismatch"] is None
    assert report["connections"][1]["mismatch"]["offset"] == 99
    assert "wrong octet" in faults(report)[0]


@root
@pytest.mark.parametrize("item", ["dance", {"push": "x"}, {"push": 1, "only": [9]}, {"open": "x"}])
def test_an_order_that_cannot_be_carried_out_is_an_error(stage: Stage, item: str) -> None:
    """And the application goes on to work."""
    stage.connect()
    with pytest.raises(TrafficError):
        stage.dial.do(item)
    stage.dial.do({"push": 10})
    stage.dial.wait(received(10), "answers")


@root
def test_waiting_ends_at_the_deadline_and_tells_the_state(stage: Stage) -> None:
    stage.connect()
    with pytest.raises(TrafficError, match=r"waited 0\.05 s for more; last report: \{.*'seq'"):
        stage.dial.wait(received(1), "for more", within=0.05)


@root
def test_exit_leaves_a_last_report(stage: Stage) -> None:
    stage.connect()
    assert stage.dial.do("exit")["phase"] == "exited"
    assert stage.client.wait(5) == 0
    stage.serve.wait(all_in("eof", 2), "the FIN")


# Freezing and resuming


@root
@pytest.mark.parametrize("how", ["probe", "silent"])
@pytest.mark.parametrize("moving", ["serve", "dial"])
def test_a_frozen_application_is_resumed_in_another_process(
    stage: Stage, moving: str, how: str
) -> None:
    """Under traffic; what was ordered in between is done, and it still listens."""
    stage.connect()
    stage.dial.do(TALK)
    stage.dial.do({"open": SERVERS[1]})
    stage.dial.wait(all_open(3), "to be connected")
    stage.dial.wait(lambda r: r["connections"][0]["answered"] >= 5, "answers")
    application, process = (
        (stage.serve, stage.server) if moving == "serve" else (stage.dial, stage.client)
    )  # fmt: skip
    with stage.shut():
        frozen = stage.move(application, process, moving)
    application.command({"push": 100, "only": [2]})
    application.go(how)

    report = application.wait(lambda r: r["seq"] == frozen["seq"] + 1, "the order in between")
    assert (frozen["phase"], report["phase"]) == ("frozen", "running")
    assert report["failed"] is None
    more = stage.dial.fresh()["connections"][0]["answered"] + 5
    stage.dial.wait(lambda r: r["connections"][1]["answered"] >= more, "more answers")
    stage.dial.do({"open": SERVERS[0]})
    stage.dial.wait(all_open(4), "a new connection")
    assert [faults(each.fresh()) for each in (stage.serve, stage.dial)] == [[], []]


@root
def test_an_application_moves_twice(stage: Stage) -> None:
    """The second one waits for a `go` of its own, and the last answer is not lost count of."""
    stage.connect()
    stage.dial.do(TALK)
    with stage.shut():
        stage.move(stage.serve, stage.server, "serve")
    stage.serve.go()
    stage.serve.wait(lambda report: report["phase"] == "running", "to run")
    with stage.shut():
        stage.move(stage.serve, stage.latest, "serve")
        assert stage.serve.report()["phase"] == "recreated"
    stage.serve.go()

    more = max(c["answered"] for c in stage.dial.fresh()["connections"]) + 5
    stage.dial.wait(answered(more), "answers")
    stage.dial.do("quiet")
    stage.dial.wait(
        lambda r: all(c["asked"] == c["answered"] for c in r["connections"]), "the last answer"
    )
    stage.assert_sound()


@root
def test_a_freeze_is_taken_back(stage: Stage) -> None:
    stage.connect()
    stage.dial.do(TALK)
    with stage.shut():
        stage.serve.do({"freeze": str(stage.directory / "state.json")})
        with pytest.raises(TrafficError, match="frozen: only thaw and exit"):
            stage.serve.do({"push": 1})
        assert stage.serve.do("thaw")["phase"] == "running"
    stage.dial.wait(answered(5), "answers")
    stage.dial.do({"open": SERVERS[0]})
    stage.dial.wait(all_open(3), "a new connection")


@root
def test_a_freeze_that_fails_leaves_everything_running(stage: Stage) -> None:
    stage.connect()
    with pytest.raises(TrafficError, match="No such file"):
        stage.serve.do({"freeze": "/nowhere/state.json"})
    stage.dial.do(TALK)
    stage.dial.wait(answered(5), "answers")


@root
def test_half_closed_and_full_connections_are_resumed(stage: Stage) -> None:
    """Connection 0 waits for our FIN, 1 has seen ours, 2 has 20 MB under way to a slow reader."""
    stage.connect(count=3)
    stage.serve.do("swallow")
    by_peer = {c["peer"]: i for i, c in enumerate(stage.serve.fresh()["connections"])}
    first, second, third = (by_peer[c["local"]] for c in stage.dial.fresh()["connections"])
    stage.dial.do({"shutdown_write": None, "only": [0]}, {"pause_reading": None, "only": [2]})
    stage.serve.do({"shutdown_write": None, "only": [second]})
    stage.serve.do({"push": 20_000_000, "only": [third]})
    stage.serve.wait(lambda r: r["connections"][first]["state"] == "eof", "the FIN")
    stage.dial.wait(lambda r: r["connections"][1]["state"] == "eof", "the FIN")
    with stage.shut():
        stage.move(stage.serve, stage.server, "serve")
    stage.serve.go()
    stage.serve.do({"push": 1000, "only": [first]})
    stage.dial.do({"push": 1000, "only": [1]}, {"resume_reading": None, "only": [2]})

    stage.dial.wait(lambda r: r["connections"][0]["rx"] == 1000, "data after our FIN")
    stage.serve.wait(lambda r: r["connections"][second]["rx"] == 1000, "data after its FIN")
    stage.dial.wait(lambda r: r["connections"][2]["rx"] == 20_000_000, "20 MB", within=10)
    stage.assert_sound()


def test_who_is_frozen_while_it_reports_does_not_report_the_later(tmp_path, monkeypatch):
    """Its next report would come ten blackouts later, and nobody would know what has become."""
    process = traffic.Process("serve", tmp_path)
    write = traffic.replace

    def freeze(path, text):
        time.sleep(0.3)
        write(path, text)

    monkeypatch.setattr(traffic, "replace", freeze)
    process.report()

    assert process._next_report < time.monotonic() + 0.3
    assert (tmp_path / "report.json").exists()
