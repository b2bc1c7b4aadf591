"""deploy/Containerfile: what it copies is enough, and the manifests find their programs.

No image is built here: that takes a base from a registry.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from kubernetes_schema import DEPLOY, find, load

ROOT = DEPLOY.parent
TEXT = (DEPLOY / "Containerfile").read_text()
LINES = [line.split(maxsplit=1) for line in TEXT.splitlines() if line and line[0] != "#"]


def arguments(name: str) -> list[str]:
    """Of each instruction of this name."""
    return [rest for word, rest in LINES if word == name]


def find_copies() -> dict[str, str]:
    """Where in the image each path of the checkout goes."""
    words = [rest.split() for rest in arguments("COPY") if not rest.startswith("--from=")]
    return {source: target for *sources, target in words for source in sources}


def find_commands() -> list[list[str]]:
    """What the manifests start in the image."""
    pods = [find(kind)["spec"]["template"]["spec"] for kind in ("DaemonSet", "Deployment")]
    return [container["command"] for pod in pods for container in pod["containers"]]


def test_its_instructions_are_known_and_its_base_is_debian_by_name() -> None:
    assert {word for word, _ in LINES} == {"FROM", "RUN", "COPY", "ENV", "CMD"}
    for base in arguments("FROM"):
        assert re.fullmatch(r"debian:[a-z]+-slim( AS build)?", base)
    assert "://" not in TEXT


def test_its_packages_are_those_of_the_set_up() -> None:
    setup = (ROOT / "scripts/setup").read_text()
    [known] = re.findall(r"^packages='([^']*)'", setup, re.MULTILINE)
    named: set[str] = set()
    for rest in arguments("RUN"):
        for words in re.findall(r"apt-get install ([^&]*)", rest):
            named |= {word for word in words.split() if word[0] != "-"}
    assert {"python3", "libnftables1"} <= named <= {*known.split()}


def test_it_is_built_as_the_page_says_under_the_name_of_the_kustomization() -> None:
    [image] = load("kustomization.yaml")[0]["images"]
    command = f"podman build -t {image['newName']} -f deploy/Containerfile ."
    assert command in TEXT
    assert command in (ROOT / "docs/controller.md").read_text()
    kinds: list[Any] = [find("DaemonSet"), find("Deployment")]
    for each in kinds:
        for container in each["spec"]["template"]["spec"]["containers"]:
            assert container["image"] == image["name"]


def test_the_programs_of_the_manifests_are_natkeeps_own() -> None:
    """Not the system's python3, which knows nothing of natkeep."""
    [path] = arguments("ENV")
    [prefix] = re.findall(r"python3 -m venv (\S+)", TEXT)
    assert path.startswith(f"PATH={prefix}/bin:")
    assert f"--from=build {prefix} {prefix}" in arguments("COPY")
    assert f'{prefix}/bin/pip install --no-cache-dir --no-input "/src[kubernetes]"' in TEXT
    for command in find_commands():
        assert command[0] == "natkeep" or command[:3] == ["python3", "-m", "natkeep.controller"]


@pytest.mark.whole
def test_what_it_copies_is_enough_for_natkeep_to_be_built(tmp_path: Path) -> None:
    source = tmp_path / "src"
    source.mkdir()
    for name, target in find_copies().items():
        assert target in ("/src/", f"/src/{name}")
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-input"]
    done = subprocess.run(
        [*pip, "-w", tmp_path, source], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [wheel] = tmp_path.glob("natkeep-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {*archive.namelist()}
        [metadata] = [name for name in names if name.endswith("/METADATA")]
        about = archive.read(metadata).decode()
        programs = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
    assert "natkeep/controller/__main__.py" in names
    assert "\nnatkeep = natkeep.cli:program\n" in programs
    assert re.search(r"^Requires-Dist: kopf.*extra == 'kubernetes'$", about, re.MULTILINE)
    assert any(name.endswith("/scripts/natkeep-hook") for name in names)
