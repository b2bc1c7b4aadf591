"""natkeep as pip installs it: a wheel in a virtual environment, for one user, by copies and links.

The wheel and what it needs are fetched once; the rest is without an index.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hook_caller import cable
from machine_copy import Machine
from pages import blocks_of

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/checkpoint/corpus/plain"
OLD, NEW = "10.2.0.10", "10.3.0.20"
SYSTEM = "/usr/bin/python3"
ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/nonexistent"}

pytestmark = pytest.mark.root


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        command, env={**ENVIRONMENT, **environment}, capture_output=True, text=True, cwd="/",
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


@dataclass
class Installed:
    """An installation of natkeep."""

    bin: Path

    def natkeep(self, *arguments: str | Path, **environment: str) -> str:
        return run(self.bin / "natkeep", *arguments, **environment)


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pip, and the directory of wheels that it installs from."""
    here = tmp_path_factory.mktemp("wheels")
    venv.create(here / "venv", with_pip=True, symlinks=True)
    pip = here / "venv/bin/pip"
    # As the user that we are: pip's own settings say where its index is.
    subprocess.run(
        [pip, "wheel", "-q", "--disable-pip-version-check", "--no-input", "-w", here, ROOT],
        check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return pip, here


def install(pip: tuple[Path, Path], *options: str | Path, **environment: str) -> None:
    quiet = ("-q", "--disable-pip-version-check", "--no-warn-script-location", "--root-user-action")
    sources = ("ignore", "--no-index", "--find-links", pip[1])
    python = ("--python", options[0], "install")
    run(pip[0], *python, *quiet, *sources, *options[1:], "natkeep", **environment)


def programs(prefix: Path) -> set[str]:
    """What natkeep itself has put into bin/; pyroute2 has programs of its own."""
    [record] = prefix.glob("lib/python3*/site-packages/natkeep-*/RECORD")
    files = [line.partition(",")[0] for line in record.read_text().splitlines()]
    return {Path(file).name for file in files if file.startswith("../../../bin/")}


@pytest.fixture(scope="module")
def in_venv(pip: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    where = tmp_path_factory.mktemp("a venv")
    venv.create(where, symlinks=True)
    install(pip, where / "bin/python3")
    assert programs(where) == {"natkeep", "natkeep-hook", "natkeep-cni"}
    share = where / "share"
    for page in ("man1/natkeep.1", "man1/natkeep-prepare.1", "man5/natkeep.toml.5"):
        assert (share / "man" / page).read_text().startswith(".TH NATKEEP")
    assert "natkeep" in (share / "bash-completion/completions/natkeep").read_text()
    return Installed(where / "bin")


@pytest.fixture(scope="module")
def of_user(pip: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("user")
    install(pip, SYSTEM, "--user", "--break-system-packages", PYTHONUSERBASE=str(base))
    assert programs(base) == {"natkeep", "natkeep-hook", "natkeep-cni"}
    return Installed(base / "bin")


WAYS = ["in_venv", "of_user"]
UNITS = ROOT / "natkeep/systemd"
ENABLED = {"natkeep-gc.service", "natkeep-repair.service", "natkeep-watch.timer"}


@pytest.fixture
def installed(request: pytest.FixtureRequest) -> Installed:
    found: Installed = request.getfixturevalue(request.param)
    return found


@dataclass
class Call:
    """natkeep-hook as CRIU calls it after a restore, in a namespace where a move is prepared."""

    installed: Installed
    netns: str
    state: str

    def __call__(self, hook: Path, **environment: str) -> str:
        enter = ("ip", "netns", "exec", self.netns)
        user = {"PYTHONUSERBASE": str(self.installed.bin.parent), "NATKEEP_STATE_DIR": self.state}
        prepare = ("-q", "prepare", "web", f"--map={OLD}={NEW}", f"--image={CORPUS}")
        run(*enter, self.installed.bin / "natkeep", *prepare, **user)
        try:
            tree = subprocess.Popen([*enter, "sleep", "600"])
            said = run(
                *enter, hook, NATKEEP_ID="web", NATKEEP_STATE_DIR=self.state,
                CRTOOLS_SCRIPT_ACTION="post-restore", CRTOOLS_INIT_PID=str(tree.pid),
                CRTOOLS_IMAGE_DIR=str(CORPUS), **environment,
            )  # fmt: skip
            [move] = json.loads(self.installed.natkeep("status", "--json", **user))["moves"]
            assert move["gate"] == "open"
            return said
        finally:
            tree.kill()
            tree.wait()
            self.installed.natkeep("-q", "teardown", "web", "--yes", **user)


@pytest.fixture
def call(installed: Installed, make_netns: Callable[[], str], tmp_path: Path) -> Call:
    netns = make_netns()
    cable(netns)
    return Call(installed, netns, str(tmp_path / "state"))


OPENED = "natkeep-hook: web: gate open\n"


@pytest.mark.parametrize("mode", ["", "stateful"])  # an order of its own: the long way
@pytest.mark.parametrize("installed", WAYS, indirect=True)
def test_the_hook_finds_its_package(call: Call, mode: str) -> None:
    """With the environment of root's, not of the user who installed it."""
    assert call(call.installed.bin / "natkeep-hook", NATKEEP_MODE=mode) == OPENED


@pytest.mark.parametrize("mode", ["", "stateful"])
@pytest.mark.parametrize("installed", WAYS, indirect=True)
def test_a_link_and_a_copy_of_the_hook_find_it_too(call: Call, mode: str, tmp_path: Path) -> None:
    """As pipx links it, and people copy it; to where natkeep is linked, or only in the path."""
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "natkeep").symlink_to(call.installed.bin / "natkeep")
    (linked / "natkeep-hook").symlink_to(call.installed.bin / "natkeep-hook")
    assert call(linked / "natkeep-hook", NATKEEP_MODE=mode) == OPENED

    copy = tmp_path / "natkeep-hook"
    copy.write_bytes((call.installed.bin / "natkeep-hook").read_bytes())
    copy.chmod(0o755)
    path = f"{ENVIRONMENT['PATH']}:{linked}"
    assert call(copy, NATKEEP_MODE=mode, PATH=path) == OPENED


@pytest.mark.parametrize("installed", WAYS, indirect=True)
def test_natkeep_finds_the_hook_of_its_own_installation(
    installed: Installed, tmp_path: Path
) -> None:
    """And not that of another one, which may be beside the interpreter or in the path."""
    said = installed.natkeep(
        "serve", "web", "--stdio", PYTHONUSERBASE=str(installed.bin.parent),
        NATKEEP_STATE_DIR=str(tmp_path / "state"),
    )  # fmt: skip
    assert json.loads(said.splitlines()[0])["hook"] == str(installed.bin / "natkeep-hook")


def test_the_lab_says_what_it_lacks(in_venv: Installed) -> None:
    done = subprocess.run(
        [in_venv.bin / "natkeep", "lab", "run", "server_moves_to_new_address"],
        env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "scapy (package python3-scapy, or pip install 'natkeep[lab]')" in line


@pytest.mark.skipif(shutil.which("systemctl") is None, reason="needs systemd")
def test_the_page_brings_natkeep_and_takes_it_away(tmp_path: Path) -> None:
    """With the units of docs/repair.md; in a copy of this machine, where no systemd runs."""
    blocks = blocks_of("test_the_page_brings_natkeep_and_takes_it_away")
    bring, remove, units = (block.text.replace(" --now ", " ") for block in blocks)
    machine = Machine(tmp_path)
    own = {name: value for name, value in os.environ.items() if name[:4] in ("HOME", "PIP_")}
    own |= {"SYSTEMD_OFFLINE": "1", "PIP_YES": "1"}
    try:
        machine.run("sh", "-c", "echo 'APT::Get::Assume-Yes yes;' >/etc/apt/apt.conf.d/yes")
        files = ("find", "/usr/local/bin", "/etc/systemd/system", "-name", "natkeep*")
        before = machine.run(*files)
        machine.run("sh", "-ec", f"cd {ROOT}\n{bring}", **own)
        machine.run("sh", "-ec", units, **own)
        made = set(machine.run(*files).splitlines()) - set(before.splitlines())
        wants = {path for path in made if ".wants/" in path}
        assert {Path(path).name for path in made - wants} == {
            "natkeep", "natkeep-hook", "natkeep-cni",
            *(path.name for path in UNITS.iterdir() if path.suffix)
        }  # fmt: skip
        assert {Path(path).name for path in wants} == ENABLED
        assert machine.run("natkeep", "status", NATKEEP_STATE_DIR="/nowhere").startswith("nothing")
        machine.run("sh", "-ec", remove, **own)
        assert machine.run(*files) == before
        assert not machine.has("/opt/natkeep/bin/natkeep")
    finally:
        machine.end()
