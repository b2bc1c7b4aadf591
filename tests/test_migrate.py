"""natkeep migrate without hosts: what is wrong is told in one line, and nothing is begun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from natkeep import __version__
from natkeep.cli import main
from natkeep.errors import RefusedError
from natkeep.migrate import PROTOCOL, back
from natkeep.migrate.criu_errors import first_error
from natkeep.migrate.engines import Criu
from natkeep.migrate.forward import Migration, sum_up
from natkeep.migrate.host import LOCAL, Answer, Host, HostError, Ssh
from natkeep.migrate.image_copy import ImageCopy
from natkeep.migrate.record import IMAGES, Record, load, place
from natkeep.migrate.way import check, describe_lost, find_lost, find_maps, find_ports


@pytest.fixture
def state(tmp_path: Path) -> list[str]:
    return ["--state-dir", str(tmp_path / "state")]


def write_ssh(tmp_path: Path, text: str) -> list[str]:
    """An ssh that is this shell script, whatever it is asked for."""
    script = tmp_path / "ssh"
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)
    return ["--ssh", str(script)]


def hello(**other: object) -> str:
    line = json.dumps({"natkeep": __version__, "protocol": PROTOCOL, "hook": "/hook", **other})
    return f"echo '{line}'"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which process, and where to?"),
        (["a:1"], "which process, and where to?"),
        (["a", "b"], "'a' is not [USER@]A:PID"),
        (["a:x", "b"], "'a:x' is not [USER@]A:PID"),
        (["a:1", "a"], "the same host"),
        (["a:1", "b", "--map", "10.2.0.10"], "is not of the form"),
        (["a:1", "b", "--id", "-x"], "--id"),
        (["a:1", "b", "--pre-dump", "many"], "not a number of rounds"),
        (["a:1", "b", "--via", "c", "--via", "d"], "--via names one gateway"),
        (["a:1", "b", "--via", "peer:b"], "that is where the process is, or goes"),
        (["--resume", "x", "--rollback", "x"], "stand alone"),
        (["a:1", "b", "--resume", "x"], "stand alone"),
    ],
)
def test_a_wrong_command_line_is_exit_2(state, capsys, words: list[str], told: str) -> None:
    assert main(["migrate", *words, *state]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("verb", [["migrate", "--resume"], ["migrate", "--rollback"], ["finish"]])
def test_what_was_not_begun_is_exit_7(state, capsys, verb: list[str]) -> None:
    assert main([*verb, "web", *state]) == 7
    assert "no migration web was begun here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "code", "told"),
    [
        ("echo 'ssh: connect to host a: No route to host' >&2; exit 255", 9, "No route to host"),
        (
            "echo 'root@a: Permission denied (publickey).' >&2; exit 255",
            9,
            "(a key that ssh offers",
        ),
        ("echo 'sh: 1: natkeep: not found' >&2; exit 127", 9, "(natkeep there is to be in PATH"),
        ("exit 0", 9, "the connection has ended"),
        (hello(natkeep="0.0.1"), 2, "has natkeep 0.0.1, this is"),
        (hello(protocol=99), 2, "the same version on all hosts"),
    ],
)
def test_a_host_that_cannot_be_used(
    tmp_path: Path, state, capsys, script: str, code: int, told: str
) -> None:
    assert main(["migrate", "a:1", "b", *write_ssh(tmp_path, script), *state]) == code
    assert told in capsys.readouterr().err
    assert main(["migrate", "--rollback", "m1", *state]) == 7  # nothing was begun


def test_with_json_an_error_is_a_document(tmp_path: Path, state, capsys) -> None:
    ssh = write_ssh(tmp_path, "exit 255")
    assert main(["migrate", "a:1", "b", *ssh, *state, "--json"]) == 9
    assert json.loads(capsys.readouterr().out)["error"]["exit"] == 9


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Record("web", "root@a", 7, "b", maps=["10.2.0.10=10.3.0.20"], listeners=True)
    record.path = place(str(tmp_path), "web")
    record.begin("dump")
    found = load(str(tmp_path), "web")
    assert found == record
    assert found.is_past("prepare")
    assert not found.is_past("copy")


@pytest.mark.parametrize("change", [{"schema": 2}, {"more": 1}, {"id": None}])
def test_a_record_of_another_kind_is_refused(tmp_path: Path, capsys, change: dict) -> None:
    record = Record("web", "a", 7, "b", path=place(str(tmp_path), "web"))
    record.save()
    assert record.path is not None
    value = json.loads(record.path.read_text())
    value.update(change)
    if change == {"id": None}:
        del value["id"]
    record.path.write_text(json.dumps(value))
    assert main(["migrate", "--resume", "web", "--state-dir", str(tmp_path)]) == 7
    assert str(record.path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("log", "told"),
    [
        (["(00.1) Error (criu/util.c:1): Can't get rlimit 0", "(00.2) Error (criu/files.c:9): "
          "Can't open file dev/shm/x on restore", "(00.3) Error (criu/cr.c:2): Restoring FAILED."],
         "Can't open file dev/shm/x on restore (copy that file there, with the same path)"),
        (["(00.1) Error (criu/cr.c:1): Can't fork for 3003: File exists"],
         "Can't fork for 3003: File exists (a process there has that pid: end it)"),
        (["natkeep-hook: web: 2 prepared", "natkeep-hook: no such move"], "no such move"),
        (["(00.1) Error (criu/x.c:1): what nobody knows"], "what nobody knows"),
        (["all is well"], "all is well"),
        (['time="…" level=error msg="CRIU is missing features"'],
         "CRIU is missing features (that CRIU or kernel cannot tell changed memory: "
         "without --pre-dump)"),
        ([], "its log is empty"),
    ],
)  # fmt: skip
def test_the_first_true_error_of_criu_and_its_cure(log: list[str], told: str) -> None:
    assert first_error(log) == told


def test_serve_answers_requests_in_turn(tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    planned = ["web", "--map", "10.2.0.10=10.3.0.20", "--connections", "-", "--json"]
    requests = [
        {"natkeep": ["explain", "forwarding-off", "--json"]},
        {
            "run": ["sh", "-c", "echo $X; exit 3"],
            "environment": {"X": "y"},
            "otherwise": ["open", "none"],
        },
        {"run": ["no-such-program"]},
        {"digest": str(tmp_path / "some")},
        {"natkeep": ["plan", *planned], "stdin": "10.2.0.10:80 10.1.0.2:4000\n"},
        {"natkeep": ["plan", *planned], "stdin": ""},
        {"natkeep": ["plan", *planned], "stdin": "10.2.0.10:80 10.1.0.2:4001\n"},
        {"lock": "forget", "run_id": "", "netns": "", "pid": os.getpid()},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "natkeep.cli", "serve", "web", "--stdio", "--state-dir",
         str(tmp_path / "state")],
        input="".join(f"{json.dumps(each)}\n" for each in requests), capture_output=True, text=True,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said[0]["natkeep"] == __version__
    assert json.loads(said[1]["stdout"])["code"] == "forwarding-off"
    assert (said[2]["exit"], said[2]["stdout"]) == (3, "y\n")
    assert "natkeep: no move none" in said[2]["stderr"]
    assert said[3]["exit"] == 127
    assert len(said[4]["stdout"]) == 64
    assert "10.1.0.2:4000" in said[5]["stdout"]  # each verb has a stdin of its own
    assert (said[6]["exit"], said[6]["stderr"]) == (3, "natkeep: stdin lists no connections\n"
                                                       "  (a line is `LOCAL PEER`)\n")  # fmt: skip
    assert "10.1.0.2:4001" in said[7]["stdout"]
    assert (said[8]["exit"], said[8]["stdout"]) == (2, "")  # what is not known releases nothing
    assert "forget" in said[8]["stderr"]
    assert len(said) == 9
    assert done.returncode == 0
    assert not [*(tmp_path / "state").glob("serve-*")]  # it leaves nothing


def test_an_earlier_serve_does_nothing_more(tmp_path: Path) -> None:
    """Once another has begun, not even what was on its way to it."""
    words = [sys.executable, "-m", "natkeep.cli", "serve", "web", "--stdio"]
    words += ["--state-dir", str(tmp_path / "state")]
    mark = tmp_path / "mark"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as earlier:
        assert earlier.stdout is not None
        assert earlier.stdout.readline()
        with subprocess.Popen(words, text=True, **pipes) as later:
            assert later.stdout is not None
            assert later.stdout.readline()
            out, said = earlier.communicate(json.dumps({"run": ["touch", str(mark)]}) + "\n")
            later.communicate("")
    assert out == ""
    assert "another natkeep migrate has taken web over" in said
    assert not mark.exists()


class Routes:
    """A destination that speaks to every peer from 10.3.0.20."""

    def run(self, *words: str, ok: object) -> Answer:
        return Answer(0, json.dumps([{"prefsrc": "10.3.0.20"}]), "")


def test_connections_within_the_process_need_no_map() -> None:
    """As of nginx with its application: they are moved with both ends."""
    own = {"kept": True, "local": "127.0.0.1:8000", "peer": "127.0.0.1:40000"}
    kept = {"kept": True, "local": "10.2.0.10:80", "peer": "10.1.0.2:40000"}
    destination = cast(Host, Routes())
    assert find_maps({"sockets": [own, kept]}, destination, {}) == ["10.2.0.10=10.3.0.20"]
    asked = ["10.2.0.10:80=auto:8080", "10.2.0.11=10.3.0.21"]
    found = ["10.2.0.10:80=10.3.0.20:8080", "10.2.0.11=10.3.0.21"]
    assert find_maps({"sockets": [own, kept]}, destination, {}, asked) == found
    with pytest.raises(RefusedError, match="no connection"):
        find_maps({"sockets": [own]}, destination, {})
    assert find_maps({"sockets": [own]}, destination, {}, asked[1:]) == asked[1:]  # as of UDP
    with pytest.raises(RefusedError, match=r"10\.2\.0\.10 has no peer that tells NEW"):
        find_maps({"sockets": [own]}, destination, {}, asked)


def test_only_the_process_own_ports_are_held_before_the_dump() -> None:
    """Not those that it alone reaches; a connection's port is none."""
    rows = [
        ("tcp", "0.0.0.0:80", None), ("tcp", "[::]:80", None), ("tcp", "10.2.0.10:443", None),
        ("tcp", "127.0.0.1:8000", None), ("tcp", "10.2.0.10:9", "10.1.0.2:40000"),
        ("udp", "10.2.0.10:53", None), ("tcp", None, None),
    ]  # fmt: skip
    sockets = [dict(zip(("protocol", "local", "peer"), row, strict=True)) for row in rows]
    assert find_ports({"sockets": sockets}) == ["--port", "80", "--port", "443"]


class Checked:
    """A host whose check has looked at the process."""

    def natkeep(self, *words: str, stdin: str, ok: object) -> Answer:
        look = {"result": "stop", "code": "sysv-ipc", "what": "processes 7", "remedy": "unshare"}
        return Answer(6, json.dumps({"looks": [look]}), "")


def test_no_host_is_blamed_for_shared_memory() -> None:
    """As of PostgreSQL; another gateway would not help."""
    record = Record("web", "a", 7, "b")
    with pytest.raises(RefusedError, match="processes 7 have System V") as refused:
        check(cast(Host, Checked()), record, "gateway", "{}")
    assert refused.value.hint == "unshare"


def test_what_is_lost_is_said_before() -> None:
    """As a connection to a program behind it that stays."""
    row = {"local": "127.0.0.1:9", "peer": "127.0.0.1:8", "reason": "loopback", "outcome": "lost"}
    told = "127.0.0.1:9 to 127.0.0.1:8: loopback"
    assert find_lost({"sockets": [row, {**row, "outcome": "kept"}]}) == [row]
    assert describe_lost([row]) == [told]
    assert describe_lost([row] * 5) == [told] * 3 + ["2 more"]


def test_what_came_of_it_in_one_line() -> None:
    row = {"local": "10.2.0.10:5", "peer": "10.1.0.2:8", "reason": "half-closed"}
    done = SimpleNamespace(silent_ms=93, answered=20, count=20, lost=[row])
    assert sum_up(cast(Migration, done)) == (
        "silent for 93 ms at most; 20 of 20 peers answered; "
        "1 not kept: 10.2.0.10:5 to 10.1.0.2:8: half-closed"
    )
    done = SimpleNamespace(silent_ms=None, answered=None, count=2, lost=None)  # --resume
    assert sum_up(cast(Migration, done)) == "0 of 2 peers answered"


class Rooted(Host):
    """This machine, whose images are below *root*."""

    def __init__(self, root: Path) -> None:
        super().__init__(LOCAL, "one", Ssh(), "web")
        self.root = root
        (root / "images").mkdir(parents=True)

    def start(self, *words: str, **streams: Any) -> subprocess.Popen[bytes]:
        there = [word.replace("/images", f"{self.root}/images") for word in words]
        return super().start(*there, **streams)


class Shown(list[tuple[int, int | None]]):
    """All that a copy has told."""

    ended = False

    def show(self, octets: int, total: int | None) -> None:
        self.append((octets, total))
        time.sleep(0.001)  # or it would be over before its size is known

    def end(self) -> None:
        self.ended = True


def test_a_copy_tells_how_far_it_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("natkeep.migrate.image_copy._LONG", 0.0)
    source, destination = Rooted(tmp_path / "a"), Rooted(tmp_path / "b")
    image = tmp_path / "a/images/dump"
    image.mkdir()
    (image / "pages.img").write_bytes(bytes(20 << 20))
    shown = Shown()
    copy = ImageCopy(source, destination, "/images", "dump")
    copy.go(shown)
    assert shown.ended
    assert (tmp_path / "b/images/dump/pages.img").stat().st_size == 20 << 20
    octets = [octets for octets, _ in shown]
    assert octets == sorted(octets)
    assert octets[-1] == copy.octets
    totals = {total for _, total in shown}
    assert totals <= {None, *range(20 << 20, 21 << 20)}
    assert len(totals - {None}) == 1  # told in time; at the first piece it may be there already


def test_a_copy_that_fails_is_over_too(tmp_path: Path) -> None:
    source, destination = Rooted(tmp_path / "a"), Rooted(tmp_path / "b")
    shown = Shown()
    copy = ImageCopy(source, destination, "/images", "dump")
    with pytest.raises(HostError, match="reading the image"):
        copy.go(shown)
    assert shown.ended


def test_what_a_host_was_asked_for_is_over_before_it_answers_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This machine too: a CRIU that restores here must not be one that is not asked about."""
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path / "state"))
    mark = tmp_path / "mark"
    left = Host(LOCAL, "destination", Ssh(), "web")
    left.connect()
    assert left._serve is not None
    assert left._serve.stdin is not None
    request = {"run": ["sh", "-c", f"sleep 1; touch {mark}"]}
    left._serve.stdin.write(json.dumps(request).encode() + b"\n")
    left._serve.stdin.flush()
    left.close()
    again = Host(LOCAL, "destination", Ssh(), "web")
    again.connect()
    assert mark.exists()
    again.close()


class Told:
    """A host that knows these moves."""

    target = "gw"

    def __init__(self, *moves: dict[str, object]) -> None:
        self.moves = moves

    def natkeep(self, *words: str) -> Answer:
        assert words == ("status", "--json")
        return Answer(0, json.dumps({"moves": self.moves}), "")


class Frozen(Told):
    """A host whose process has ended, with a complete image; it knows no move."""

    def connect(self) -> None:
        pass

    def run(self, *words: str, ok: object) -> Answer:
        assert words[0] == "cat"  # what removes something is not asked
        return Answer(int("/proc" in words[1]), "Dumping finished successfully", "")


@pytest.mark.parametrize("reached", ["check", "dump", "copy", "restore"])
def test_finish_leaves_the_image_of_a_process_that_does_not_run(reached: str) -> None:
    """As of a relay, where no host knows the move yet."""
    record = Record("web", "a", 7, "b", role="relay", started=5, reached=reached)
    host = Frozen()
    ends = {"source": host, "destination": host, "hosts": lambda: (host,)}
    migration = SimpleNamespace(record=record, engine=Criu(record), translators=(), **ends)
    with pytest.raises(RefusedError, match=f"web is not through: {reached} was begun") as refused:
        back.finish(cast(Migration, migration), 0)
    assert "--resume web or --rollback web" in str(refused.value.hint)


@pytest.mark.parametrize(("reached", "asked"), [("copy", ["copy"]), ("restore", ["clear", "copy"])])
def test_what_a_failed_restore_has_left_goes_before_another(reached: str, asked: list[str]) -> None:
    """As a container of that name."""
    record = Record("web", "a", 7, "b", started=5, shared=True, reached=reached)
    host, done, engine = Frozen(), list[str](), Criu(record)
    ends = {"source": host, "destination": host, "hosts": lambda: (host,)}
    engine.clear = lambda destination: done.append("clear")  # type: ignore[method-assign]
    migration = SimpleNamespace(record=record, engine=engine, go=done.append, **ends)
    back.resume(cast(Migration, migration))
    assert done == asked


class Planted:
    """A host where the directory above that of the images is another user's."""

    def run(self, *words: str) -> Answer:
        return Answer(0, IMAGES if words[:2] == ("find", IMAGES) else "", "")

    def __str__(self) -> str:
        return "b"


def test_no_image_is_put_where_another_user_could_change_it() -> None:
    """As /var/tmp/natkeep, which anyone may have made before."""
    migration = SimpleNamespace(record=Record("web", "a", 7, "b", images=f"{IMAGES}/web"))
    with pytest.raises(RefusedError, match="b: /var/tmp/natkeep is not root's alone"):
        Migration._make_directory(cast(Migration, migration), cast(Host, Planted()))
    migration.record.images = "/images"
    Migration._make_directory(cast(Migration, migration), cast(Host, Planted()))


@pytest.mark.parametrize("role", ["gateway", "peer", "relay"])
def test_a_destination_that_forgot_the_move_does_not_end_it(role: str) -> None:
    record = Record("web", "a", 7, "b", role=role)
    knowing, empty = Told({"id": "web"}), Told()
    own = {"gateway": (empty,), "peer": (empty, knowing), "relay": ()}[role]
    hosts = {"translators": own, "source": empty, "destination": empty}
    # As it is where an earlier `finish` came to its end there, but for a peer's host that was away:
    assert back._find_live(SimpleNamespace(record=record, **hosts)) == 0
    hosts |= {"translators": (knowing,)} if role == "gateway" else {"source": knowing}
    with pytest.raises(HostError, match="does not know web any more"):
        back._find_live(SimpleNamespace(record=record, **hosts))
