"""tests of the journal: its format line by line, what is refused, the lock, what a crash leaves."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from natkeep import __version__
from natkeep.errors import JournalError, RefusedError, UsageError
from natkeep.plan.entry_attributes import Attributes, Noted
from natkeep.plan.identity import Identity
from natkeep.plan.move import Map, Mode, Move, Site
from natkeep.plan.roles import Role
from natkeep.plan.steps import AddAddress, Prior
from natkeep.plan.translation import Surroundings
from natkeep.plan.tuples import (
    NO_CONNECTIONS,
    Connections,
    Endpoint,
    FourTuple,
    parse_address,
)
from natkeep.state import files
from natkeep.state.directory import Header, StateDirectory, read_boot_id
from natkeep.state.files import StateFiles
from natkeep.state.journal import Journal
from natkeep.values import replace

MOVE = Move(
    "web",
    (
        Map(parse_address("10.2.0.10"), parse_address("10.3.0.20")),
        Map(parse_address("fd00:2::10"), parse_address("fd00:3::20")),
    ),
    (Site(Role.DESTINATION, "dst"), Site(Role.GATEWAY)),
)
CONNECTIONS = Connections.of(
    FourTuple(source=Endpoint.parse(peer), destination=Endpoint.parse(local))
    for local, peer in (
        ("10.2.0.10:5000", "10.1.0.2:50594"),
        ("[fd00:2::10]:5000", "[fd00:1::2]:50595"),
    )
)
NAMESPACES = (Identity(4, 4026531840, 1), Identity(4, 4026532299, 77))
KINDS = ("InstallGate", "FillSet", "OpenGate")
SURROUNDINGS = Surroundings(
    local=frozenset({parse_address("fd00:1::2"), parse_address("10.1.0.2")}),
    carried=Connections(v4=CONNECTIONS.v4),
    carriers=Connections(v4=bytes([192, 0, 2, 1, 0x1F, 0x90, 10, 1, 0, 2, 0xC5, 0xA2])),
)
PACKED = bytes.fromhex(
    "000000000000000c 0a02000a 1388 0a010002 c5a2"
    "0000000000000024 fd000002000000000000000000000010 1388"
    "                 fd000001000000000000000000000002 c5a3"
    "000000000000000c 0a02000a 1388 0a010002 c5a2"
    "0000000000000000"
    "000000000000000c c0000201 1f90 0a010002 c5a2"
    "0000000000000000"
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def state(place: Path) -> StateDirectory:
    return StateDirectory(str(place), create=True)


def names_in(place: Path) -> list[str]:
    """What is in the directory, besides the file that says whose it is."""
    return sorted(path.name for path in place.iterdir() if path.name != "lock")


STEP = AddAddress(MOVE.sites[0], parse_address("10.2.0.10"))
UNDO = b'"site":0,"undo":{"kind":"address","address":"10.2.0.10"}'


def begin(state: StateDirectory, move: Move = MOVE) -> Journal:
    return state.begin(move, CONNECTIONS, SURROUNDINGS, NAMESPACES, KINDS, before=(0, 1))


def plain(found: Journal) -> dict[str, Any]:
    """A journal's values, whoever read it."""
    found.resolve()
    names = ("move", "connections", "surroundings", "namespaces", "kinds", "boot", "records")
    return {name: getattr(found, name) for name in names}


# ---- round trip and format -------------------------------------------------------------------


def test_what_is_written_is_read_again(state: StateDirectory, place: Path) -> None:
    written = begin(state)
    assert plain(written) == plain(state.load("web"))

    written.note(0, "doing", Prior(), STEP)
    written.note(0, "done", Prior(present=True, facts={"acct": "0", "addresses": 2, "up": True}))
    written.note(1, "doing", Prior(), STEP)
    written.note(1, "undone", Prior())

    found = StateDirectory(str(place), create=False).load("web")
    assert plain(written) == plain(found)
    assert (
        *(found.move, found.connections),
        *(found.namespaces, found.kinds),
    ) == (MOVE, CONNECTIONS, NAMESPACES, KINDS)
    assert read_boot_id() == found.boot
    assert [found.is_done(step) for step in range(3)] == [True, False, False]
    assert Prior(True, {"acct": "0", "addresses": 2, "up": True}) == found.records[0].prior
    assert tuple(found.identity(site) for site in MOVE.sites) == NAMESPACES
    assert [here.cookie for here in found.namespaces] == [1, 77]


def test_what_entries_say_is_read_again_and_must_be_whole(
    state: StateDirectory, place: Path
) -> None:
    said = Attributes(zone=7, zone_of="reply", mark=2, seq_reply="0a", process_dialled=True)
    noted = (
        Noted(MOVE.sites[1], said, Connections(v4=CONNECTIONS.v4)),
        Noted(MOVE.sites[0], Attributes(helper="ftp"), Connections(v6=CONNECTIONS.v6)),
    )
    around = replace(SURROUNDINGS, noted=noted)

    state.begin(MOVE, CONNECTIONS, around, NAMESPACES, KINDS, before=(0, 1))

    assert state.load("web").surroundings == around
    header = (place / "web.journal").read_bytes()
    assert b'"entries":[[1,{"zone":7,"zone_of":"reply","mark":2,' in header
    for there, instead in (
        (b'"mark":2', b'"mark":true'),
        (b'"mark":2', b'"ground":2'),
        (b'"entries":[[1,', b'"entries":[[9,'),
        (b'"reply"', b'"noone"'),
        (b'"0a"', b'"0g"'),
        (b',[0,{"helper":"ftp"}]', b""),
    ):
        assert there in header
        (place / "web.journal").write_bytes(header.replace(there, instead))
        with pytest.raises(JournalError, match="corrupt"):
            state.load("web")


def test_the_format_line_by_line(state: StateDirectory, place: Path) -> None:
    """Who changes this changes what other versions, and a teardown after an update, can read."""
    written = begin(state)
    written.note(0, "doing", Prior(), STEP)
    written.note(0, "done", Prior(present=True, facts={"acct": "0"}))
    written.note(0, "undone", Prior())

    assert (place / "web.connections").read_bytes() == PACKED
    digest = hashlib.sha256(PACKED).hexdigest()
    assert [
        f'{{"schema":2,"natkeep":"{__version__}","boot":"{read_boot_id()}",'
        '"move":{"id":"web","mode":"stateful","listeners":[],'
        '"maps":[{"old":"10.2.0.10","new":"10.3.0.20"},{"old":"fd00:2::10","new":"fd00:3::20"}],'
        '"sites":[{"role":"destination","netns":"dst"},{"role":"gateway","netns":""}]},'
        '"namespaces":[[4,4026531840],[4,4026532299]],"cookies":[1,77],'
        '"steps":["InstallGate","FillSet","OpenGate"],"prepare":[0,1],"local":["10.1.0.2","fd00:1::2"],'
        f'"connections":"{digest}","image":null,"begun":{written.begun},"opening":[]}}',
        '{"step":0,"state":"doing","prior":{"present":false},'
        '"site":0,"undo":{"kind":"address","address":"10.2.0.10"}}',
        '{"step":0,"state":"done","prior":{"present":true,"acct":"0"}}',
        '{"step":0,"state":"undone"}',
        "",
    ] == (place / "web.journal").read_text().split("\n")
    assert names_in(place) == ["web.connections", "web.journal"]


def test_which_peers_were_moved_to_the_destination_before_is_read_again(
    state: StateDirectory,
) -> None:
    around = replace(SURROUNDINGS, joined=CONNECTIONS)
    state.begin(MOVE, CONNECTIONS, around, NAMESPACES, KINDS, before=(0, 1))
    assert state.load("web").surroundings == around


def test_which_peers_are_on_a_gateway_is_read_again(state: StateDirectory) -> None:
    beside = frozenset(map(parse_address, ("10.1.0.1", "fd00:1::1")))
    around = replace(SURROUNDINGS, beside=beside)
    state.begin(MOVE, CONNECTIONS, around, NAMESPACES, KINDS, before=(0, 1))
    assert state.load("web").surroundings == around


def test_the_moves_of_an_old_address_are_found_as_they_come_and_go(state: StateDirectory) -> None:
    of_old = frozenset({MOVE.maps[0].old.packed})
    assert state.ids_moving(of_old) == ()
    begin(state)
    assert state.ids_moving(of_old) == ("web",)
    assert state.ids_moving(frozenset({MOVE.maps[0].new.packed})) == ()
    state.remove("web")
    assert state.ids_moving(of_old) == ()


def test_of_two_moves_the_later_is_the_newer(state: StateDirectory) -> None:
    first = begin(state)
    state.remove("web")
    begin(state)
    assert state.load("web").begun > first.begun > 0


def test_when_a_step_was_done_is_read_again_and_stays_what_it_was(
    state: StateDirectory, place: Path
) -> None:
    """A repair that does a part of it again does not open the move once more."""
    written = begin(state)
    written.note(0, "doing", Prior(), STEP)
    written.note(0, "done", Prior(), at=7_000_000_000)
    written.note(1, "doing", Prior(), STEP)
    written.note(1, "done", Prior())
    written.note(0, "doing", Prior(), STEP)
    written.note(0, "done", Prior())

    found = StateDirectory(str(place), create=False).load("web")

    for journal in (written, found):
        assert [journal.records[number].at for number in (0, 1)] == [7_000_000_000, 0]
    for at, reason in (('"now"', "'now' is not a whole number"), ("-1", "-1 is not a place in")):
        with (place / "web.journal").open("ab") as file:
            file.write(RECORD.replace(b"}}", b'},"at":%s}' % at.encode()) + b"\n")
        assert refusal(state).startswith(f"the journal of web is corrupt: {reason}")
        text = (place / "web.journal").read_bytes()
        (place / "web.journal").write_bytes(b"".join(text.splitlines(keepends=True)[:-1]))


def test_a_journal_that_version_0_1_0_wrote_is_read(state: StateDirectory, place: Path) -> None:
    """Not written by this code, so reading and writing cannot change together unnoticed."""
    digest = hashlib.sha256(PACKED).hexdigest()
    (place / "web.connections").write_bytes(PACKED)
    (place / "web.journal").write_text(
        '{"schema": 1, "natkeep": "0.1.0", "boot": "b", "move": {"id": "web", "mode": "stateful",'
        ' "maps": [{"old": "10.2.0.10", "new": "10.3.0.20"}],'
        ' "sites": [{"role": "destination", "netns": "dst"}]}, "namespaces": [[4, 9]],'
        f' "steps": ["InstallGate"], "local": [], "connections": "{digest}"}}\n'
        '{"step": 0, "state": "done", "prior": {"present": true, "addresses": 2}}\n'
    )
    found = state.load("web")
    move = Move("web", MOVE.maps[:1], MOVE.sites[:1], Mode.STATEFUL)
    assert (move, CONNECTIONS) == (found.move, found.connections)
    assert [(here.device, here.inode, here.cookie) for here in found.namespaces] == [(4, 9, 0)]
    assert Prior(present=True, facts={"addresses": 2}) == found.records[0].prior


def test_what_is_on_disk_when_note_returns_was_synced(
    state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line `doing` must be on disk before the kernel is asked."""
    written = begin(state)
    synced: list[bytes] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        synced.append(os.pread(fd, 1 << 20, 0))

    monkeypatch.setattr(os, "fsync", fsync)
    written.note(0, "doing", Prior(), STEP)
    assert synced[-1].endswith(b'{"step":0,"state":"doing","prior":{"present":false},%s}\n' % UNDO)


def test_a_journal_that_is_removed_is_gone_and_so_are_its_connections(
    state: StateDirectory, place: Path
) -> None:
    written = begin(state)
    begin(state, Move("api", MOVE.maps, MOVE.sites))
    written.remove()
    assert state.ids() == ("api",)
    assert names_in(place) == ["api.connections", "api.journal"]
    written.remove()  # a second time is fine


def test_the_ids_are_sorted_and_other_files_are_none(state: StateDirectory, place: Path) -> None:
    assert state.ids() == ()
    for name in ("web", "api", "a-1"):
        begin(state, Move(name, MOVE.maps, MOVE.sites))
    for name in (
        "lock",
        ".web.journal.new",
        "journal",
        "readme.txt",
        "x.connections",
        "-x.journal",
        "a b.journal",
    ):
        (place / name).touch()
    assert state.ids() == ("a-1", "api", "web")


# ---- what a crash leaves ---------------------------------------------------------------------


@pytest.mark.parametrize("torn", [b"{", b'{"step":1,"state":"do', b'{"step":2,"state":"undone"}'])
def test_a_last_line_without_its_newline_is_ignored_and_cut_before_the_next(
    torn: bytes, state: StateDirectory, place: Path
) -> None:
    written = begin(state)
    written.note(0, "doing", Prior(), STEP)
    whole = (place / "web.journal").read_bytes()
    with (place / "web.journal").open("ab") as file:
        file.write(torn)

    found = state.load("web")
    assert plain(written) == plain(found)

    found.note(1, "doing", Prior(), STEP)
    added = b'{"step":1,"state":"doing","prior":{"present":false},%s}\n' % UNDO
    assert whole + added == (place / "web.journal").read_bytes()
    assert plain(found) == plain(state.load("web"))


def test_begin_takes_no_notice_of_what_a_crash_in_begin_left(
    state: StateDirectory, place: Path
) -> None:
    for name in (".web.connections.new", ".web.journal.new", "web.connections"):
        (place / name).write_text("half")
    assert state.ids() == ()
    assert plain(begin(state)) == plain(state.load("web"))
    assert names_in(place) == ["web.connections", "web.journal"]


@pytest.mark.parametrize("writes", range(2))
def test_begin_that_cannot_write_leaves_nothing(
    writes: int, state: StateDirectory, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write

    def write(fd: int, content: bytes) -> int:
        nonlocal writes
        writes -= 1
        if writes < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, content)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(JournalError, match="No space left on device"):
        begin(state)
    assert names_in(place) == []


def test_note_that_cannot_write_is_an_error_of_the_journal(
    state: StateDirectory, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = begin(state)
    whole = (place / "web.journal").read_bytes()

    def write(fd: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(JournalError) as caught:
        written.note(0, "doing", Prior(), STEP)
    assert f"{place}/web.journal: No space left on device" == str(caught.value)
    assert whole == (place / "web.journal").read_bytes()
    assert written.records == {}


def test_a_write_that_the_kernel_takes_in_parts_is_finished(
    state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, content: real(fd, bytes(content)[:7]))
    written = begin(state)
    written.note(0, "doing", Prior(), STEP)
    assert plain(written) == plain(state.load("web"))


# ---- what is refused -------------------------------------------------------------------------


def refusal(state: StateDirectory, move_id: str = "web") -> str:
    """The message of load, which has to fail as an error of the journal."""
    with pytest.raises(JournalError) as caught:
        state.load(move_id)
    assert caught.value.exit_code == 7
    return str(caught.value)


def test_an_unknown_id(state: StateDirectory, place: Path) -> None:
    assert f"no move web in {place}" == refusal(state)
    assert f"no move web in {place}/not" == refusal(
        StateDirectory(str(place / "not"), create=False)
    )


@pytest.mark.parametrize("move_id", ["../web", "-web", "", "a" * 33, "web.journal", "web\n"])
def test_what_is_no_id_is_never_a_file_name(move_id: str, state: StateDirectory) -> None:
    begin(state)
    for verb in (state.load, state.remove):
        with pytest.raises(UsageError):
            verb(move_id)
    assert state.ids() == ("web",)


RECORD = b'{"step":0,"state":"done","prior":{"present":false}}'


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "Expecting value: line 1 column 1 (char 0)"),
        (b"", "Expecting value: line 1 column 1 (char 0)"),
        (b"[]", "a line of it is not a JSON object"),
        (b"[" * 5000, "a line of it is nested too deeply"),
        (RECORD.replace(b"0", b"0e9"), "0e9 is not a whole number"),
        (RECORD.replace(b"0", b"Infinity"), "Infinity is not a whole number"),
        (RECORD.replace(b"0", b"true"), "line 2: no step True"),
        (
            RECORD.replace(b'{"present":false}', b'[["present",false]]'),
            "line 2: no prior [['present', False]]",
        ),
        (b"\xff", "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (RECORD.replace(b"0", b"3"), "line 2: no step 3"),
        (RECORD.replace(b"0", b"-1"), "line 2: no step -1"),
        (RECORD.replace(b"0", b'"0"'), "line 2: no step '0'"),
        (RECORD.replace(b"done", b"perhaps"), "line 2: no state 'perhaps'"),
        (RECORD.replace(b"false", b"0"), "a prior says whether it was present"),
        (RECORD.replace(b"false", b'false,"a":[]'), "a prior holds text, numbers and truth values"),
        (b'{"step":0,"state":"done"}', "'prior'"),
        (b'{"state":"undone"}', "'step'"),
        (RECORD + RECORD, "Extra data: line 1 column 52 (char 51)"),
    ],
)
def test_a_line_that_is_not_of_the_form_makes_the_journal_corrupt(
    line: bytes, reason: str, state: StateDirectory, place: Path
) -> None:
    """Also when lines follow that are: a lost record is an undo that is not done."""
    begin(state)
    with (place / "web.journal").open("ab") as file:
        file.write(line + b"\n" + RECORD + b"\n")
    assert f"the journal of web is corrupt: {reason}" == refusal(state)


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


def without(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.pop(key)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (put("schema", value=3), "the journal of web has schema 3, this natkeep knows 2"),
    "older": (put("schema", value=0), "the journal of web has schema 0, this natkeep knows 2"),
    "no schema": (without("schema"), "the journal of web is corrupt: 'schema'"),
    "another move": (
        put("move", "id", value="api"),
        "the journal of web is corrupt: it is of move api",
    ),
    "no id": (
        put("move", "id", value="../x"),
        "the journal of web is corrupt: '../x' is not an id",
    ),
    "role": (
        put("move", "sites", 0, "role", value="king"),
        "the journal of web is corrupt: 'king' is not a valid Role",
    ),
    "address": (
        put("move", "maps", 0, "old", value="10.2.0"),
        "the journal of web is corrupt: '10.2.0' does not appear to be an IPv4 or IPv6 address",
    ),
    "loopback": (
        put("move", "maps", 0, "old", value="127.0.0.1"),
        "the journal of web is corrupt: OLD 127.0.0.1 is loopback",
    ),
    "mode": (
        put("move", "mode", value="bpf"),
        "the journal of web is corrupt: 'bpf' is not a valid Mode",
    ),
    "cookies": (
        put("cookies", value=[1]),
        "the journal of web is corrupt: it does not have a cookie for each namespace",
    ),
    "cookie": (
        put("cookies", value=[1, "7"]),
        "the journal of web is corrupt: '7' is not a whole number",
    ),
    "namespaces": (
        lambda header: header.update(namespaces=[[4, 1]], cookies=[1]),
        "the journal of web is corrupt: it does not name a namespace for each site",
    ),
    "local": (
        put("local", value=["10.1.0"]),
        "the journal of web is corrupt: '10.1.0' does not appear to be an IPv4 or IPv6 address",
    ),
    "digest": (
        put("connections", value="0" * 64),
        "the journal of web is corrupt: its connections are not those that were written",
    ),
}


@pytest.mark.parametrize(("change", "message"), HEADERS.values(), ids=HEADERS)
def test_a_header_that_is_not_of_the_form(
    change: Callable[[dict[str, Any]], Any], message: str, state: StateDirectory, place: Path
) -> None:
    begin(state)
    header = json.loads((place / "web.journal").read_text())
    change(header)
    (place / "web.journal").write_text(json.dumps(header) + "\n")
    assert message == refusal(state)


def test_a_newer_journal_names_its_version(state: StateDirectory, place: Path) -> None:
    (place / "web.journal").write_text('{"schema": 9, "natkeep": "7.0"}\n')
    with pytest.raises(JournalError) as caught:
        state.load("web")
    assert caught.value.hint == "it was written by natkeep 7.0"


@pytest.mark.parametrize("content", [b"", b'{"schema":1'])
def test_a_journal_without_a_whole_line_is_corrupt(
    content: bytes, state: StateDirectory, place: Path
) -> None:
    (place / "web.journal").write_bytes(content)
    assert refusal(state) == "the journal of web is corrupt: it is empty"


@pytest.mark.parametrize("content", [None, PACKED[:-1], PACKED + b"\0", b"", PACKED[::-1]])
def test_connections_that_are_missing_or_others_are_noticed(
    content: bytes | None, state: StateDirectory, place: Path
) -> None:
    begin(state)
    (place / "web.connections").unlink()
    if content is not None:
        (place / "web.connections").write_bytes(content)
    what = "not those that were written" if content is not None else "missing"
    assert f"the journal of web is corrupt: its connections are {what}" == refusal(state)


@pytest.mark.parametrize("content", [PACKED[:-8], PACKED + bytes(8), PACKED[:-1], b"", bytes(47)])
def test_connections_of_another_form_are_noticed_although_their_digest_is_right(
    content: bytes, state: StateDirectory, place: Path
) -> None:
    begin(state)
    header = json.loads((place / "web.journal").read_text())
    header["connections"] = hashlib.sha256(content).hexdigest()
    (place / "web.journal").write_text(json.dumps(header) + "\n")
    (place / "web.connections").write_bytes(content)
    assert refusal(state).startswith("the journal of web is corrupt: ")


def test_an_id_is_known_if_it_has_a_journal_and_named_if_that_has_the_address(
    state: StateDirectory, place: Path
) -> None:
    begin(state)
    (place / "not an id.journal").write_bytes((place / "web.journal").read_bytes())
    (place / "hollow.journal").mkdir()
    old = MOVE.maps[0].old

    known = ["web", "hollow", "other", "not an id", "../state/web", ""]
    assert [state.knows(move_id) for move_id in known] == [True, True] + [False] * 4
    assert state.ids_naming([old]) == ("web",)
    assert state.ids_naming([old + 77]) == ()
    assert not StateDirectory(str(place / "none"), create=False).knows("web")
    assert StateDirectory(str(place / "none"), create=False).ids_naming([old]) == ()


def test_a_corrupt_journal_tells_where_it_is(state: StateDirectory, place: Path) -> None:
    (place / "web.journal").write_text("{}\n")
    with pytest.raises(JournalError) as caught:
        state.load("web")
    assert str(caught.value.hint).startswith(f"{place}/web.journal;")


def test_read_header_gives_none_for_what_it_cannot_read(state: StateDirectory, place: Path) -> None:
    begin(state)
    assert Header(MOVE, NAMESPACES, read_boot_id()) == state.read_header("web")
    for text in ("", "x\n", "[]\n", '{"namespaces": [], "boot": "b", "move": {}}\n'):
        (place / "bad.journal").write_text(text)
        assert state.read_header("bad") is None
    assert state.read_header("unknown") is None


# ---- nothing is opened through a link, nothing is waited for ---------------------------------


def make_link(path: Path) -> None:
    victim = path.parent.parent / "victim"
    victim.write_bytes(path.read_bytes() if path.exists() else b"")
    path.unlink(missing_ok=True)
    path.symlink_to(victim)


def make_fifo(path: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def make_directory(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


@pytest.mark.parametrize("name", ["web.journal", "web.connections"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_link, "cannot open {path}: Too many levels of symbolic links"),
        (make_fifo, "{path} is not a file"),
        (make_directory, "{path} is not a file"),
    ],
)
def test_what_is_no_file_is_not_read(
    name: str, make: Callable[[Path], None], reason: str, state: StateDirectory, place: Path
) -> None:
    begin(state)
    make(place / name)
    assert reason.format(path=place / name) == refusal(state)


def test_a_link_in_place_of_the_journal_is_not_written_through(
    state: StateDirectory, place: Path
) -> None:
    written = begin(state)
    make_link(place / "web.journal")
    before = (place.parent / "victim").read_bytes()
    with pytest.raises(JournalError, match="Too many levels of symbolic links"):
        written.note(0, "doing", Prior(), STEP)
    written.remove()
    assert before == (place.parent / "victim").read_bytes()


def test_links_in_place_of_new_files_are_replaced_and_not_followed(
    state: StateDirectory, place: Path
) -> None:
    victim = place.parent / "victim"
    victim.write_text("mine")
    for name in (".web.connections.new", ".web.journal.new", "web.connections"):
        (place / name).symlink_to(victim)
    begin(state)
    assert victim.read_text() == "mine"
    assert [(place / name).is_symlink() for name in names_in(place)] == [False, False]


def test_a_link_in_place_of_the_lock_is_refused(state: StateDirectory, place: Path) -> None:
    (place / "lock").unlink()
    (place / "lock").symlink_to(place.parent / "elsewhere")
    with pytest.raises(JournalError, match="Too many levels of symbolic links"), state.locked():
        pass
    assert not (place.parent / "elsewhere").exists()


def test_the_directory_stays_the_same_when_another_takes_its_name(
    state: StateDirectory, place: Path, tmp_path: Path
) -> None:
    written = begin(state)
    place.rename(tmp_path / "moved")
    place.mkdir()
    written.note(0, "doing", Prior(), STEP)
    assert names_in(place) == []
    assert plain(written) == plain(state.load("web"))


def test_a_journal_too_large_to_be_one_is_not_read(
    state: StateDirectory, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(state)
    monkeypatch.setattr(files, "_SIZE_LIMIT", 100)
    assert f"{place}/web.journal is too large" == refusal(state)


# ---- the directory itself --------------------------------------------------------------------


def test_modes_let_nobody_else_read_or_write(place: Path) -> None:
    old = os.umask(0)
    try:
        state = StateDirectory(str(place), create=True)
        begin(state).note(0, "doing", Prior(), STEP)
        with state.locked():
            pass
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o7777 for path in place.iterdir()}
    assert place.stat().st_mode & 0o7777 == 0o700
    assert modes == {"lock": 0o600, "web.connections": 0o600, "web.journal": 0o600}


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_directory_that_others_can_write_to_is_refused(mode: int, place: Path) -> None:
    place.mkdir()
    place.chmod(mode)
    for create in (True, False):
        with pytest.raises(JournalError) as caught:
            StateDirectory(str(place), create=create)
        assert f"the state directory {place} can be written by others" == str(caught.value)
        assert f"chmod 700 {place}" == caught.value.hint


@pytest.mark.root
@pytest.mark.needs("powers")
def test_a_directory_of_somebody_else_is_refused(place: Path) -> None:
    place.mkdir(mode=0o700)
    os.chown(place, 65534, -1)
    with pytest.raises(JournalError, match=f"^the state directory {place} belongs to uid 65534$"):
        StateDirectory(str(place), create=True)


def test_a_directory_that_cannot_be_is_an_error_of_the_journal(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, create, reason in (
        ("file", True, "cannot make the state directory {path}: File exists"),
        ("file/state", True, "cannot make the state directory {path}: Not a directory"),
        ("file", False, "cannot open the state directory {path}: Not a directory"),
    ):
        with pytest.raises(JournalError) as caught:
            StateDirectory(str(tmp_path / path), create=create)
        assert reason.format(path=tmp_path / path) == str(caught.value)


def test_a_directory_that_is_not_there_holds_nothing_and_is_not_made(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names are never looked up in the working directory instead."""
    monkeypatch.chdir(tmp_path)
    for name in ("web.journal", "web.connections"):
        (tmp_path / name).write_text("mine\n")
    state = StateDirectory(str(place), create=False)

    assert state.ids() == ()
    assert state.read_header("web") is None
    assert f"no move web in {place}" == refusal(state)
    state.remove("web")
    with state.locked():
        pass
    assert {"web.journal", "web.connections"} == {path.name for path in tmp_path.iterdir()}


def test_the_place_is_the_option_or_the_variable_or_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATKEEP_STATE_DIR", str(tmp_path / "variable"))
    assert str(tmp_path / "option") == StateDirectory(str(tmp_path / "option"), create=False).path
    assert str(tmp_path / "variable") == StateDirectory(create=False).path
    monkeypatch.setenv("NATKEEP_STATE_DIR", "")
    assert StateDirectory(create=False).path == "/run/natkeep"


def test_its_handle_goes_with_it(place: Path) -> None:
    def opened() -> int:
        fds = Path("/proc/self/fd").iterdir()
        return sum(fd.is_symlink() and fd.resolve() == place for fd in fds)

    state = StateDirectory(str(place), create=True)
    assert opened() == 1
    del state
    assert opened() == 0


# ---- the lock --------------------------------------------------------------------------------


def test_a_lock_that_another_holds_is_waited_for_so_long_and_no_longer(
    state: StateDirectory, place: Path
) -> None:
    with StateDirectory(str(place), create=False).locked():
        with pytest.raises(JournalError) as caught, state.locked(timeout=0.05):
            pass
        assert f"another natkeep holds {place}/lock" == str(caught.value)
        said = "waited 0.05 s: end it, or NATKEEP_LOCK_TIMEOUT=SECONDS waits longer"
        assert (caught.value.exit_code, caught.value.hint) == (7, said)
    with state.locked(timeout=20):
        pass


def count_waiting(lock: Path) -> int:
    lines = Path("/proc/locks").read_text().splitlines()
    return sum("->" in line and f":{lock.stat().st_ino} " in line for line in lines)


def test_who_waits_for_the_lock_is_served_in_order(
    state: StateDirectory, place: Path, tmp_path: Path
) -> None:
    """However many wait, none is passed over until its time-out has come."""
    served, children = tmp_path / "served", []
    with state.locked():
        for number in range(6):
            child = os.fork()
            if not child:
                code = 1
                try:
                    os.closerange(3, 4096)  # our own descriptor of the lock would keep it held
                    with StateDirectory(str(place), create=False).locked(), served.open("a") as out:
                        out.write(f"{number}\n")
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
            deadline = time.monotonic() + 20
            # who waits stands in the kernel's list of locks
            while count_waiting(place / "lock") < number + 1:
                assert time.monotonic() < deadline, "it does not wait"
        assert not served.exists()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 6
    assert served.read_text().split() == [str(number) for number in range(6)]


def test_a_lock_that_comes_too_late_is_given_back(state: StateDirectory, place: Path) -> None:
    with StateDirectory(str(place), create=False).locked():  # noqa: SIM117  # one, then the other
        with pytest.raises(JournalError), state.locked(timeout=0.05):
            pass
    with StateDirectory(str(place), create=False).locked(timeout=20):
        pass


@pytest.mark.parametrize(
    ("text", "patience", "expected"),
    [("", None, 30), ("5", None, 5), ("0", None, 0), ("60", 10, 10), ("5", 10, 5), ("", 10, 10)],
)
def test_how_long_the_lock_is_waited_for(
    text: str, patience: float | None, expected: float, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATKEEP_LOCK_TIMEOUT", text)
    state = StateDirectory(str(place), create=True, patience=patience)
    assert state.patience == expected


def test_a_lock_is_given_up_when_its_holder_fails(state: StateDirectory, place: Path) -> None:
    with pytest.raises(ZeroDivisionError), state.locked():
        raise ZeroDivisionError
    with (place / "lock").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("ids", [("web",), ("api", "web"), ("web", "no-such")])
def test_a_move_that_is_changed_is_locked_and_others_are_not(
    ids: tuple[str, ...], state: StateDirectory, place: Path
) -> None:
    for name in ("web", "api", "else"):
        begin(state, Move(name, MOVE.maps, MOVE.sites))
    second = StateDirectory(str(place), create=False)
    with state.changing(*ids):
        for name in ids:
            if state.knows(name):
                held = pytest.raises(JournalError, match=f"holds .*/{name}.journal")
                with held, second.holding(name, timeout=0):
                    pass
        with pytest.raises(JournalError, match=r"holds .*/lock"), second.locked(0):
            pass
        with second.holding("else", timeout=0) as there:  # as a hook that opens it
            assert there
    with second.holding("web", timeout=0) as there, second.locked(0):
        assert there
    with second.holding("no-such", timeout=0) as there:
        assert not there


def test_a_journal_is_locked_from_its_begin_on(state: StateDirectory, place: Path) -> None:
    second = StateDirectory(str(place), create=False)
    with state.changing("web"):
        begin(state)
        with pytest.raises(JournalError, match=r"web\.journal"), second.holding("web", timeout=0):
            pass
    with second.holding("web", timeout=0) as there:
        assert there


def test_a_lock_of_a_journal_that_is_removed_meanwhile_is_none(
    state: StateDirectory, place: Path
) -> None:
    written = begin(state)
    waits, got = threading.Event(), []

    def wait() -> None:
        waits.set()
        with StateDirectory(str(place), create=False).holding("web", timeout=10) as there:
            got.append(there)

    with state.changing("web"):
        other = threading.Thread(target=wait)
        other.start()
        waits.wait(10)
        while not count_waiting(place / "web.journal"):
            time.sleep(0.01)
        written.remove()
    other.join(10)
    assert got == [False]


def test_a_journal_that_changes_while_it_is_read_is_read_again(
    state: StateDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock: another one of its id takes its place between two files, or none does."""
    begin(state)
    read, meanwhile = StateFiles.read, [True, False]

    def read_late(files: StateFiles, name: str) -> bytes:
        content = read(files, name)
        if name == "web.journal" and meanwhile:
            state.remove("web")
            if meanwhile.pop(0):
                state.begin(MOVE, NO_CONNECTIONS, SURROUNDINGS, NAMESPACES, KINDS, before=(0, 1))
        return content

    monkeypatch.setattr(StateFiles, "read", read_late)
    with pytest.raises(JournalError, match="no move web in"):
        state.load("web")
    begin(state)
    meanwhile[:] = [True]
    assert state.load("web").connections == NO_CONNECTIONS


# ---- whose directory it is -------------------------------------------------------------------


def test_a_directory_that_was_made_or_found_empty_is_natkeeps(tmp_path: Path) -> None:
    for name in ("made", "empty", "full"):
        (tmp_path / name).mkdir(mode=0o700)
    (tmp_path / "made").rmdir()
    (tmp_path / "full/web.ready").write_text("mine")
    for name, own in (("made", True), ("empty", True), ("full", False)):
        state = StateDirectory(str(tmp_path / name), create=True)
        with state.locked():
            pass
        assert StateDirectory(str(tmp_path / name), create=True).is_natkeeps() is own
    state = StateDirectory(str(tmp_path / "other"), create=False)
    assert not state.is_natkeeps()
    state.refuse_foreign_path()  # there is nothing to clear


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.chmod(0o777), "can be written by others"),
        (lambda path: path.chmod(0o775), "can be written by others"),
        (lambda path: os.chown(path, 65534, -1), "belongs to uid 65534"),
        (lambda path: path.chmod(0o1777), None),
    ],
)
@pytest.mark.root
@pytest.mark.needs("powers")
def test_a_directory_that_another_user_could_have_put_there_is_told(
    change: Callable[[Path], None], said: str | None, tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    (parent / "natkeep").mkdir(mode=0o700, parents=True)
    (tmp_path / "link").symlink_to(parent)
    change(parent)
    for path in (
        parent / "natkeep",
        tmp_path / "link/natkeep",
        tmp_path / "link/../parent/natkeep",
    ):
        state = StateDirectory(str(path), create=False)
        if said is None:
            state.refuse_foreign_path()
            continue
        with pytest.raises(JournalError, match=f"{path}: {parent} {said}"):
            state.refuse_foreign_path()


@pytest.mark.root
@pytest.mark.needs("powers")
def test_a_link_of_another_user_that_leads_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "natkeep").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("natkeep")
    os.chown(tmp_path / "link", 65534, -1, follow_symlinks=False)
    state = StateDirectory(str(tmp_path / "link"), create=False)
    with pytest.raises(JournalError, match="link belongs to uid 65534"):
        state.refuse_foreign_path()


def test_the_lock_is_not_inherited_by_what_is_started_meanwhile(
    state: StateDirectory, place: Path
) -> None:
    """Else a daemon that was started under the lock would hold it for ever."""
    with state.locked():
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    try:
        with state.locked(timeout=0):
            pass
    finally:
        child.communicate()


def test_of_many_processes_that_begin_one_id_one_wins(state: StateDirectory, place: Path) -> None:
    """They all wait at one pipe, so that they begin at once."""
    started, start = os.pipe()
    children = []
    for number in range(8):
        child = os.fork()
        if not child:
            code = 3
            try:
                os.close(start)
                os.read(started, 1)  # its end is the shot
                own = StateDirectory(str(place), create=True)
                with own.locked():
                    move = Move("web", (MOVE.maps[number % 2],), MOVE.sites)
                    own.begin(move, CONNECTIONS, SURROUNDINGS, NAMESPACES, (f"by {number}",))
                code = 0
            except RefusedError as error:
                code = 1 if str(error) == "the id web is in use" else 2
            finally:
                os._exit(code)
        children.append(child)
    os.close(started)
    os.close(start)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

    assert sorted(codes) == [0] + [1] * 7
    found = state.load("web")
    winner = codes.index(0)
    assert (f"by {winner}",) == found.kinds
    assert (MOVE.maps[winner % 2],) == found.move.maps


def test_an_id_in_use_is_refused_and_what_is_there_stays(
    state: StateDirectory, place: Path
) -> None:
    begin(state)
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(RefusedError, match="the id web is in use"):
        state.begin(MOVE, Connections(), Surroundings(), (), ())
    assert before == {path.name: path.read_bytes() for path in place.iterdir()}


def test_the_boot_id_is_the_kernels() -> None:
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", read_boot_id())


@pytest.mark.parametrize("size", [0, 10, 299_999, 300_000, 400_000])
def test_a_file_is_read_to_its_end_whatever_its_size_was(tmp_path: Path, size: int) -> None:
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)
    fd = os.open(tmp_path / "file", os.O_RDONLY)

    assert files._read_all(fd, size) == content
    os.close(fd)
