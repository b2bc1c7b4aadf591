"""NATKEEP_READY: the hook asks for the gateways and waits for them before a socket exists."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hook_caller import BEFORE, NEW, OLD, TREE, Criu, own_netns

from natkeep.checkpoint.listing import read_listing
from natkeep.criu import readiness
from natkeep.plan.observation import Gate
from natkeep.plan.tuples import parse_address
from natkeep.state.directory import StateDirectory


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where the operator's two files are."""
    directory = tmp_path / "move"
    directory.mkdir(mode=0o700)
    return directory


def answer(told: Path, write: Callable[[str], object]) -> threading.Thread:
    """The gateways' side: *write* what the file *told*, once it is there, makes it say."""

    def serve() -> None:
        end = time.monotonic() + 10
        while not told.exists() and time.monotonic() < end:
            time.sleep(0.01)
        _, _, move_id, maps = told.read_text().splitlines()[0].split()
        assert maps == f"{OLD}={NEW}"
        write(f"ready {move_id}\n")

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def order(place: Path, **more: str) -> dict[str, str]:
    return {
        "NATKEEP_READY": str(place / "ready"), "NATKEEP_TELL": str(place / "told"),
        "NATKEEP_WAIT": "8", **more,
    }  # fmt: skip


def test_the_gateways_are_told_what_to_prepare_and_waited_for_once(criu: Criu, place: Path) -> None:
    thread = answer(place / "told", (place / "ready").write_text)
    assert criu.call("pre-restore", **order(place)) == 0
    thread.join()
    assert criu.gates() == {BEFORE: {criu.id: Gate.CLOSED}}
    assert (place / "told").read_text().startswith(f"# natkeep {criu.id} {OLD}={NEW}\n")
    listed = read_listing(place / "told").connections
    journal = StateDirectory(create=False).load(criu.id)
    assert set(listed) == set(journal.connections.at(parse_address(OLD)))
    assert len(listed) == 4
    (place / "ready").unlink()
    assert criu.call("pre-restore") == 0  # CRIU before 4.2 calls twice under RPC


def test_a_tree_with_a_namespace_of_its_own_waits_when_that_is_there(
    criu: Criu, images: Path, place: Path
) -> None:
    own_netns(images)
    assert criu.call("pre-restore", **order(place)) == 0
    assert not (place / "told").exists()
    thread = answer(place / "told", (place / "ready").write_text)
    assert criu.call("post-setup-namespaces") == 0
    thread.join()
    assert criu.gates() == {TREE: {criu.id: Gate.CLOSED}}
    (place / "ready").unlink()
    assert criu.call("post-restore") == 0  # it has waited
    assert criu.gates() == {TREE: {criu.id: Gate.OPEN}}


def test_a_line_in_a_fifo_counts_whoever_else_wrote_before(criu: Criu, place: Path) -> None:
    os.mkfifo(place / "ready", 0o600)

    def write(line: str) -> None:
        for said in ("ready criu-1-1\n", line):
            with open(place / "ready", "w", encoding="ascii") as fifo:
                fifo.write(said)

    thread = answer(place / "told", write)
    assert criu.call("pre-restore", **order(place)) == 0
    thread.join()


@pytest.mark.parametrize("said", [None, "", "ready criu-1-1\n", "ready\n"])
def test_a_time_out_ends_the_restore_behind_the_closed_gate(
    said: str | None,
    criu: Criu,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is there from an earlier restore is no answer."""
    if said is not None:
        (place / "ready").write_text(said)
    assert criu.call("pre-restore", **order(place, NATKEEP_WAIT="0.2")) == 1
    prepared, told = capsys.readouterr().err.splitlines()
    assert prepared.endswith("5 prepared")
    what = f"says {said.strip()!r}" if said and said.strip() else "said nothing"
    assert f"waited 0.2 s for the line 'ready {criu.id}' in {place}/ready, which {what}" in told
    assert criu.gates() == {BEFORE: {criu.id: Gate.CLOSED}}
    assert not (place / "told").exists()


def test_a_fifo_that_nothing_writes_to_is_not_waited_for_longer(criu: Criu, place: Path) -> None:
    os.mkfifo(place / "ready", 0o600)
    began = time.monotonic()
    assert criu.call("pre-restore", **order(place, NATKEEP_WAIT="0.3")) == 1
    assert 0.3 <= time.monotonic() - began < 5


def test_a_wait_may_be_longer_than_the_hooks_own_deadline(
    criu: Criu, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("natkeep.criu.hook.DEADLINE", 1.0)

    def write(line: str) -> None:
        time.sleep(1.5)
        (place / "ready").write_text(line)

    thread = answer(place / "told", write)
    assert criu.call("pre-restore", **order(place)) == 0
    thread.join()


def test_what_is_no_place_for_an_answer_is_refused_before_anything_is_prepared(
    criu: Criu, images: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_netns(images)  # told at the first point, where there is nothing to prepare yet
    open_to_others = place / "open"
    open_to_others.mkdir()
    open_to_others.chmod(0o777)
    (place / "link").symlink_to("/dev/null")
    (place / "shared").touch()
    (place / "shared").chmod(0o666)
    wrong = [
        (2, order(place, NATKEEP_WAIT="soon"), "NATKEEP_WAIT: 'soon' is no number of seconds"),
        (2, order(place, NATKEEP_WAIT="0"), "NATKEEP_WAIT: '0' is no number of seconds"),
        (2, order(place, NATKEEP_WAIT="-1"), "NATKEEP_WAIT: '-1' is no number of seconds"),
        (2, order(place, NATKEEP_WAIT="nan"), "NATKEEP_WAIT: 'nan' is no number of seconds"),
        (2, order(place, NATKEEP_WAIT="1e3"), "NATKEEP_WAIT: '1e3' is no number of seconds"),
        (2, order(place, NATKEEP_WAIT="3601"), "NATKEEP_WAIT: '3601' is no number of seconds"),
        (2, order(place, NATKEEP_READY=""), "NATKEEP_TELL without NATKEEP_READY"),
        (2, order(place, NATKEEP_READY="", NATKEEP_TELL=""), "NATKEEP_WAIT without NATKEEP_READY"),
        (2, order(place, NATKEEP_READY="ready"), "'ready' is no absolute path"),
        (2, order(place, NATKEEP_READY="/nowhere/ready"), "/nowhere: No such file"),
        (2, order(place, NATKEEP_READY=f"{place}/link"), "link is neither a file nor a FIFO"),
        (2, order(place, NATKEEP_READY=f"{place}/told"), "name the same file"),
        (2, order(place, NATKEEP_TELL=str(open_to_others)), "open is no file"),
        (4, order(place, NATKEEP_READY=f"{open_to_others}/ready"), "can be written by others"),
        (4, order(place, NATKEEP_TELL=f"{open_to_others}/told"), "can be written by others"),
        (4, order(place, NATKEEP_READY=f"{place}/shared"), "shared can be written by others"),
    ]
    for code, environment, said in wrong:
        assert criu.call("pre-restore", **environment) == code, said
        assert said in capsys.readouterr().err
    assert criu.gates() == {}
    assert not StateDirectory(create=True).ids()


def test_a_move_that_was_prepared_before_does_not_wait(
    criu: Criu, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    criu.patch.delenv("NATKEEP_MAP")
    assert criu.call("post-restore", NATKEEP_ID="web", **order(place)) == 2
    assert "are for NATKEEP_MAP" in capsys.readouterr().err


def test_an_answer_that_others_could_have_written_is_none(place: Path) -> None:
    (place / "ready").touch()
    (place / "ready").chmod(0o622)
    with pytest.raises(readiness.RefusedError, match="can be written by others"):
        readiness._read(str(place / "ready"))
