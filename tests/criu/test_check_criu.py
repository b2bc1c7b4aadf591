"""What `natkeep check` finds out by a real CRIU: whether it works, and what its image needs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fake_kernel import FakeKernel

from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.tree import read_tree
from natkeep.errors import ImageError, KernelError
from natkeep.kernel import criu_trial, process
from natkeep.lifecycle.process import look_at_criu, look_at_tree, read_living_tree
from natkeep.lifecycle.subject import Subject
from natkeep.plan.move import Site
from natkeep.plan.process import Tree, judge
from natkeep.plan.roles import Role
from natkeep.values import replace

CRIU = Path(__file__).resolve().parents[2] / ".lab/criu/criu"
HERE = Site(Role.DESTINATION)


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def look(image: str = "image", *sites: Site) -> list[tuple[str, str]]:
    subject = Subject(FakeKernel(), sites or (HERE,), image=image)
    return [(each.code, each.detail) for each in look_at_criu(subject)]


@pytest.mark.root
@pytest.mark.criu
def test_a_criu_that_works_is_tried_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATKEEP_CRIU", str(CRIU))
    [(code, detail)] = look()

    assert not code
    assert detail.startswith(
        f"criu {criu_trial.read_version(str(CRIU))} ({CRIU}) dumps and restores"
    )
    tasks = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "criu_trial" not in tasks


@pytest.mark.root
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('echo "Version: 3.17.1"; exit 1', "criu 3.17.1 (CRIU): dump: exit 1"),
        (
            'echo "Version: 4.2"; [ "$1" != dump ] || echo "Error (a.c:1): no" >"$3/dump.log"\n'
            '[ "$1" = --version ]',
            "criu 4.2 (CRIU): dump: (a.c:1): no",
        ),
        ("true", "criu of no version (CRIU): restore: the connection is not there afterwards"),
    ],
)
def test_a_criu_that_fails_is_a_finding(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    criu = program(tmp_path / "criu", text)
    monkeypatch.setenv("NATKEEP_CRIU", criu)

    assert look() == [("criu-fails", said.replace("CRIU", criu))]


def test_no_criu_is_a_finding_only_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATKEEP_CRIU", "/nowhere/criu")

    assert [code for code, _ in look()] == ["no-criu"]
    assert look("image", Site(Role.GATEWAY)) == []
    assert look("") == []


SERVER = """
import os, signal, socket, sys
os.setsid()
log = open("log", "w+")
log.write("said")
log.flush()
os.mkdir("run")
door = socket.socket(socket.AF_UNIX)
door.bind(os.path.abspath("run/door"))
door.listen()
os.close(2)
print("ready", flush=True)
os.close(1)
signal.pause()
"""


@pytest.mark.root
@pytest.mark.criu
def test_what_an_image_of_criu_needs_and_what_is_missing(netns: str, tmp_path: Path) -> None:
    inside = ["nsenter", f"--net=/run/netns/{netns}"]
    server = subprocess.Popen(
        [*inside, sys.executable, "-c", SERVER],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=tmp_path,
    )  # fmt: skip
    assert server.stdout is not None
    image = tmp_path / "image"
    image.mkdir()
    server.stdout.readline()
    command = [str(CRIU), "dump", "-t", str(server.pid), "-D", str(image), "-o", "log"]
    done = subprocess.run([*inside, *command], check=False)
    server.kill()
    server.wait()
    assert not done.returncode, (image / "log").read_text()[-500:]

    tree = read_tree(image)
    assert tree is not None
    assert tree.ids == {server.pid}
    assert not [each.code for each in judge(HERE, tree, process.look_at("", tree)) if each.code]

    (tmp_path / "log").write_text("said more")
    (tmp_path / "run/door").unlink()
    (tmp_path / "run").rmdir()
    found = {
        each.code: each.detail
        for each in look_at_tree(Subject(FakeKernel(), (HERE,), image=str(image)))
    }
    assert found["file-differs"] == f"{tmp_path}/log has 9 octets, not 4"
    assert found["socket-directory"] == f"not there: {tmp_path}/run"
    (tmp_path / "log").unlink()
    found = {
        each.code: each.detail
        for each in look_at_tree(Subject(FakeKernel(), (HERE,), image=str(image)))
    }
    assert f"{tmp_path}/log" in found["file-missing"]
    assert os.path.realpath(sys.executable) not in found["file-missing"]


def test_an_image_of_sockets_alone_is_told_where_it_is_to_be_restored(tmp_path: Path) -> None:
    subject = Subject(FakeKernel(), (HERE,), image=str(tmp_path))

    assert [each.code for each in look_at_tree(subject)] == ["image-incomplete"]
    assert not [*look_at_tree(Subject(FakeKernel(), (Site(Role.GATEWAY),), image=str(tmp_path)))]


def test_a_process_that_is_gone_is_one_line() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()

    with pytest.raises(ImageError, match=f"^there is no process {gone.pid}"):
        read_living_tree(gone.pid)
    with pytest.raises(KernelError, match="cannot look at its processes: No such file"):
        [*look_at_tree(make_subject(Site(Role.DESTINATION, f"pid:{gone.pid}")))]


def make_subject(site: Site) -> Subject:
    tree = Tree(frozenset({1}), home="another boot")
    checkpoint = replace(Checkpoint.of((), live=True), tree=tree)
    return Subject(FakeKernel(), (site,), checkpoint=checkpoint)


@pytest.mark.root
def test_a_place_is_that_of_the_process_that_a_site_names() -> None:
    inner = subprocess.Popen(
        ["unshare", "--pid", "--mount-proc", "--kill-child", "sleep", "60"],
        stdout=subprocess.DEVNULL,
    )
    try:
        task = Path(f"/proc/{inner.pid}/task/{inner.pid}/children")
        while not (children := task.read_text().split()):
            time.sleep(0.01)
        found = {each.code for each in look_at_tree(make_subject(at(children[0])))}
        assert "pid-in-use" in found  # sleep is 1 there
        tree = Tree(frozenset({int(children[0])}))
        assert process.look_at(f"pid:{children[0]}", tree).in_use == frozenset()
        assert process.look_at("", tree).in_use == tree.ids
    finally:
        inner.kill()
        inner.wait()


def at(pid: str) -> Site:
    return Site(Role.DESTINATION, f"pid:{pid}")
