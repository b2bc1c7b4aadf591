"""natkeep setup: links and units, made, taken away, and nothing else touched."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from natkeep.cli import installation, main

NAMES = ("natkeep", "natkeep-hook", "natkeep-cni")
Setup = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Setup:
    """`natkeep setup` of an installation in own/bin, in a machine that is tmp_path."""
    (tmp_path / "own/bin").mkdir(parents=True)
    for name in NAMES:
        (tmp_path / "own/bin" / name).touch(0o755)
    monkeypatch.setattr(installation, "BIN", str(tmp_path / "bin"))
    monkeypatch.setattr(installation, "UNITS", str(tmp_path / "units"))
    monkeypatch.setattr(installation, "CNI", (str(tmp_path / "cni"), "/nowhere"))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "own/bin/natkeep")])

    def call(*options: str) -> tuple[int, str, str]:
        code = main(["setup", *options])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def test_without_options_it_only_says_what_there_is(run: Setup, tmp_path: Path) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    states = [line.split() for line in out.splitlines()]
    assert {state for state, _ in states} == {"missing"}
    assert [Path(path).name for _, path in states[:3]] == [*NAMES]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_links_are_made_once_and_taken_away(run: Setup, tmp_path: Path) -> None:
    for made in ("made", "in place"):
        code, out, _ = run("--link", "--json")
        assert code == 0
        assert {each["state"] for each in json.loads(out)["setup"]} == {made}
    for name in NAMES:
        assert (tmp_path / "bin" / name).readlink() == tmp_path / "own/bin" / name
    assert not (tmp_path / "units").exists()
    code, out, _ = run("--remove")
    assert (code, out.count("removed")) == (0, 3)
    assert [*(tmp_path / "bin").iterdir()] == []


def test_the_units_start_this_natkeep_and_are_accepted(run: Setup, tmp_path: Path) -> None:
    code, out, err = run("--units")
    assert (code, out.count("made")) == (0, 5)
    assert (
        "systemctl enable --now natkeep-gc.service natkeep-repair.service natkeep-watch.timer"
        in err
    )
    assert "on a node of a fleet: systemctl enable --now natkeep-agent.service" in err
    units = [*(tmp_path / "units").iterdir()]
    starts = "".join(path.read_text() for path in units)
    assert starts.count(f"={tmp_path}/own/bin/natkeep ") == 5
    assert "/usr/bin/env" not in starts
    if shutil.which("systemd-analyze"):
        done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")

    (tmp_path / "units/natkeep-gc.service").write_text(units[0].read_text() + "# earlier\n")
    assert run("--units")[1].count("made") == 1
    assert run("--remove")[1].count("removed") == 5
    assert [*(tmp_path / "units").iterdir()] == []


def test_units_of_a_natkeep_in_a_home_may_read_it(
    run: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "_HOMES", (f"{tmp_path}/",))
    run("--units")
    assert "ProtectHome=read-only" in (tmp_path / "units/natkeep-gc.service").read_text()


@pytest.mark.parametrize("path", ["bin/natkeep-hook", "units/natkeep-watch.timer"])
@pytest.mark.parametrize("link", [True, False])
def test_what_is_not_ours_stays_and_nothing_is_made(
    run: Setup, tmp_path: Path, path: str, link: bool
) -> None:
    foreign = tmp_path / path
    foreign.parent.mkdir()
    foreign.symlink_to("/dev/null") if link else foreign.write_text("[Unit]\n")
    code, out, err = run("--link", "--units")
    assert (code, out) == (4, "")
    assert err.splitlines()[0] == f"natkeep: {foreign} is there, and was not made by natkeep setup"
    assert run("--remove")[0] == 0
    assert [each for each in tmp_path.glob("*s/*")] == ([foreign] if "units" in path else [])
    assert foreign.is_symlink() == link
    assert foreign.exists()


def test_another_natkeeps_link_is_replaced_but_not_taken_away(run: Setup, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    other = tmp_path / "bin/natkeep"
    other.symlink_to("/opt/natkeep/bin/natkeep")
    assert "removed" not in run("--remove")[1]
    assert other.is_symlink()
    assert run("--link")[1].count("made") == 3
    assert other.readlink() == tmp_path / "own/bin/natkeep"


def test_of_debians_package_only_what_it_does_not_link_itself_is_linked(
    run: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installation, "CNI", (str(tmp_path / "opt"), str(tmp_path / "cni")))
    monkeypatch.setattr(installation, "find_program", lambda name: f"/usr/bin/{name}")
    (tmp_path / "cni").mkdir()
    assert run("--link")[:2] == (0, "")
    (tmp_path / "opt").mkdir()
    assert run("--link")[1].split() == ["made", str(tmp_path / "opt/natkeep-cni")]
    assert [*(tmp_path / "cni").iterdir()] == []


def test_the_cni_plugin_is_linked_where_runtimes_look(run: Setup, tmp_path: Path) -> None:
    (tmp_path / "cni").mkdir()
    assert run("--link")[1].count("made") == 4
    link = tmp_path / "cni/natkeep-cni"
    assert link.readlink() == tmp_path / "own/bin/natkeep-cni"
    assert run("--remove")[1].count("removed") == 4
    assert not link.is_symlink()
