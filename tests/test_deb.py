"""the Debian package: what lintian says, and a life of it, installed, upgraded and removed.

By Debian's own apt and dpkg, in a copy of this machine's root.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hook_caller import cable
from machine_copy import Machine
from pages import blocks_of

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests/checkpoint/corpus/plain"
OLD, NEW = "10.2.0.10", "10.3.0.20"
UNITS = {path.name for path in (ROOT / "natkeep/systemd").iterdir() if path.suffix}

pytestmark = [pytest.mark.root, pytest.mark.needs("debhelper", "lintian")]


@pytest.fixture(scope="module")
def package() -> Path:
    made = subprocess.run([ROOT / "scripts/make-deb"], check=True, capture_output=True, text=True)
    return ROOT / made.stdout.strip()


@pytest.fixture(scope="module")
def older(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of an earlier version."""
    tree = tmp_path_factory.mktemp("older") / "tree"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    lines = control.read_text().splitlines(keepends=True)
    earlier = ["Version: 0.0.1\n" if line.startswith("Version:") else line for line in lines]
    control.write_text("".join(earlier))
    made = tree.with_name("older.deb")
    subprocess.run(["dpkg-deb", "--build", tree, made], check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    found = Machine(tmp_path_factory.mktemp("machine"))
    yield found
    found.end()


def test_lintian_has_nothing_to_say(package: Path) -> None:
    changes = next(package.parent.glob("*.changes"))
    done = subprocess.run(
        ["lintian", "--allow-root", "--fail-on=error,warning", changes],
        capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")


def test_it_keeps_moves_over_an_upgrade_and_warns_of_them_when_it_is_removed(
    package: Path, older: Path, machine: Machine
) -> None:
    machine.run("ip", "netns", "add", "destination")
    enter = ("ip", "netns", "exec", "destination")
    machine.run(*enter, "ip", "link", "set", "lo", "up")
    cable("destination", within=machine.enter)
    machine.run("apt-get", "install", "-y", "-qq", "--no-install-recommends", older)
    move = (f"--map={OLD}={NEW}", f"--image={CORPUS}")
    machine.run(*enter, "natkeep", "-q", "prepare", "web", *move)

    machine.run("dpkg", "--install", package)
    assert f"natkeep {package.name.split('_')[1]}" in machine.run("natkeep", "--version")
    machine.run("natkeep", "status", "web", "--strict")
    tree = subprocess.Popen([*machine.enter, *enter, "sleep", "600"])
    try:
        opened = machine.run(
            *enter, "natkeep-hook", NATKEEP_ID="web", CRTOOLS_SCRIPT_ACTION="post-restore",
            CRTOOLS_INIT_PID=str(tree.pid), CRTOOLS_IMAGE_DIR=str(CORPUS),
        )  # fmt: skip
    finally:
        tree.kill()
        tree.wait()
    assert opened == "natkeep-hook: web: gate open\n"

    said = machine.run("apt-get", "remove", "-y", "-qq", "natkeep")
    assert "natkeep: WARNING: there are moves at this host: web\n" in said
    assert machine.try_("natkeep", "--version").returncode == 127
    machine.run("dpkg", "--install", package)
    [found] = json.loads(machine.run("natkeep", "status", "web", "--strict", "--json"))["moves"]
    assert found["gate"] == "open"
    machine.run("natkeep", "-q", "teardown", "web", "--yes")


def test_its_programs_pages_and_units_are_there_and_go_with_it(machine: Machine) -> None:
    """Made and installed as the page says."""
    [block] = blocks_of("test_its_programs_pages_and_units_are_there_and_go_with_it")
    settings = "APT::Get::Assume-Yes yes; APT::Install-Recommends no;"
    machine.run("sh", "-c", f"echo '{settings}' >/etc/apt/apt.conf.d/settings")
    machine.run("sh", "-ec", f"cd {ROOT}\n{block.text}")
    listed = machine.run("dpkg", "--listfiles", "natkeep").splitlines()
    in_path = {Path(each).name for each in listed if "/bin/" in each or "/sbin/" in each}
    assert in_path == {"natkeep", "natkeep-hook", "natkeep-cni"}
    units = {Path(each).name for each in listed if "systemd/system/" in each}
    assert units == UNITS
    pages = {Path(each).name for each in listed if "/man/man" in each}
    assert {
        "natkeep.1.gz",
        "natkeep-migrate.1.gz",
        "natkeep-hook.8.gz",
        "natkeep-cni.8.gz",
        "natkeep.toml.5.gz",
    } <= pages
    completion = machine.run(
        "bash", "-c", "complete -r; . /usr/share/bash-completion/completions/natkeep; complete -p"
    )
    assert completion.endswith(" natkeep\n")
    assert machine.has("/usr/share/natkeep/__pycache__")  # no restore waits for it to be compiled
    linked = machine.run("find", "/etc/systemd", "-name", "natkeep*")
    assert linked == ""  # none of them is enabled
    said = machine.run("natkeep", "setup", "--link", "--units")
    assert said == "natkeep: its package has put all in its place\n"
    assert "server_moves_to_new_address" in machine.run("natkeep", "lab", "list")
    checked = machine.try_("natkeep", "check", "--json")
    assert checked.stderr == ""
    assert json.loads(checked.stdout)["schema"] == 1
    lab = machine.try_("natkeep", "lab", "run", "server_moves_to_new_address")
    assert "python3-scapy" in lab.stderr
    machine.run("apt-get", "install", "-y", "-qq", "--no-install-recommends", "python3-scapy")
    lab = machine.try_("natkeep", "lab", "run", "server_moves_to_new_address", "--engine=repair")
    assert lab.stdout.endswith("verdict: pass\n")  # by Debian's nftables, and an older scapy

    said = machine.run("apt-get", "purge", "-y", "-qq", "natkeep")
    assert "WARNING: there are moves" not in said
    left = [each for each in listed if "natkeep" in each and machine.has(each)]
    assert left == []
    assert not os.path.exists("/usr/bin/natkeep")
