"""state/files.py: a file in the place of another, whole or not at all."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from natkeep.errors import JournalError
from natkeep.fleet.followed import Followed, FollowedFile
from natkeep.state.files import replace_file


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed, in turn."""
    made: list[str] = []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd: int) -> None:
        made.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{fd}')).name}")
        fsync(fd)

    def note_rename(one: str, other: str) -> None:
        made.append(f"rename {Path(one).name}")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "rename", note_rename)
    return made


def test_a_file_is_replaced_with_its_mode_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("earlier")

    replace_file(path, b"later", mode=0o640, durable=False)

    assert path.read_bytes() == b"later"
    assert path.stat().st_mode & 0o777 == 0o640
    assert names(tmp_path) == ["file"]


def test_a_durable_file_is_on_disk_before_its_name_and_its_name_after(
    tmp_path: Path, calls: list[str]
) -> None:
    replace_file(tmp_path / "file", b"whole", durable=True)

    beside = f".file.{os.getpid()}"
    assert calls == [f"fsync {beside}", f"rename {beside}", f"fsync {tmp_path.name}"]


def test_another_file_waits_for_no_disk(tmp_path: Path, calls: list[str]) -> None:
    replace_file(tmp_path / "file", b"whole", durable=False)

    assert calls == [f"rename .file.{os.getpid()}"]


def test_a_file_that_cannot_be_made_leaves_the_earlier_one_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("earlier")

    def fail(fd: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"later", durable=True, first=fail)

    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["file"]


def test_a_directory_of_that_name_is_an_error_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)

    with pytest.raises(IsADirectoryError):
        replace_file(tmp_path / "file", b"later", durable=True)

    assert names(tmp_path) == ["file"]


def test_a_link_beside_it_is_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("of another")
    (tmp_path / f".file.{os.getpid()}").symlink_to(other)

    replace_file(tmp_path / "file", b"later", durable=False)

    assert other.read_text() == "of another"
    assert names(tmp_path) == ["file", "other"]


def test_what_an_agent_has_followed_is_written_anew_under_its_lock(tmp_path: Path) -> None:
    first = FollowedFile(str(tmp_path))
    for generation in range(4):
        first.note("web", generation, "prepared", "d")
    first.close()

    anew = FollowedFile(str(tmp_path))  # of four lines one is needed
    path = tmp_path / "agent.followed"
    assert len(path.read_bytes().splitlines()) == 1
    with pytest.raises(JournalError, match="another natkeep agent"):
        FollowedFile(str(tmp_path))
    with path.open("rb") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    anew.note("web", 9, "gone", "d")
    anew.close()
    last = FollowedFile(str(tmp_path))
    assert last.known == {"web": Followed(9, "gone", "d")}
    assert names(tmp_path) == ["agent.followed"]
    last.close()
