"""The recipes for runc and podman, run as they stand, with the files that the page gives."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from pages import blocks_of
from recipe import Recipe, Running, follow, freeze_by, judge, paragraphs, talk_on

from natkeep.checkpoint import Checkpoint
from natkeep.checkpoint.archive import opened_image
from natkeep.checkpoint.images import read_checkpoint_with_queues
from natkeep.checkpoint.tree import read_tree
from natkeep.lab.engine import end_silence
from natkeep.lab.engines import podman
from natkeep.lab.engines.podman import Podman
from natkeep.lab.engines.runc import Runc, container, inside
from natkeep.lab.host import NAMES
from natkeep.lab.lab import Lab
from natkeep.plan.process import Tree

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.criu]

HOOK = "/usr/local/bin/natkeep-hook"


def container_of(lab: Lab) -> str:
    return container(lab.topology["source"], lab.traffic.server.application)


class RuncRecipe(Recipe):
    """The same where the process is a container: runc and CRIU are in the machine's own netns."""

    def __init__(self, lab: Lab, engine: Runc) -> None:
        super().__init__(lab)
        self.engine, at = engine, lab.topology["destination"]
        self.places |= {"/run/netns/web": str(NAMES / at.name)}

    def enter(self, role: str) -> list[str]:
        host = self.lab.topology[role]
        return host.command() if role == "gateway" else inside(host)

    def start(self, role: str, script: str) -> Running:
        """runc keeps its containers where the lab's engine does, and calls this one as it does."""
        host, name = self.lab.topology[role], container_of(self.lab)
        own = f"runc --root {host.directory}/runc-{role} --log {host.directory}/runc.log"
        bundle = host.directory / f"bundle-{role}" / name
        script = re.sub(r"\brunc (.*) web$", rf"{own} \1 {name}", script, flags=re.MULTILINE)
        return super().start(role, script.replace("/bundles/web", str(bundle)))

    def configure(self, role: str, configuration: str) -> None:
        """Write CRIU's file, and the bundle that names it and the machine's network namespace."""
        host = self.lab.topology[role]
        self.engine._bundle(host, container_of(self.lab), configuration)

    def find_container(self) -> None:
        """Have the lab know what runc has restored."""
        host, name = self.lab.topology["destination"], container_of(self.lab)
        said = self.run("destination", "runc state web")
        self.lab.traffic.server.pid = json.loads(said)["pid"]
        self.engine._running[name] = host


@pytest.mark.needs("runc")
def test_the_recipe_for_runc_keeps_the_connections() -> None:
    *files, move = blocks_of("test_the_recipe_for_runc_keeps_the_connections")
    lock, hook = (block.text for block in files)
    (_, _, checkpoint), *steps = paragraphs(move)
    with Lab("recipe", engine="runc") as lab:
        assert isinstance(lab.engine, Runc)
        lab.translator = recipe = RuncRecipe(lab, lab.engine)
        lab.begin(connections=2)
        recipe.configure("source", lock)
        freeze_by(recipe, checkpoint, lab)
        del lab.engine._running[container_of(lab)]
        end_silence(lab.topology["destination"])
        recipe.configure("destination", hook.replace(HOOK, str(recipe.hook())))
        lab.place_order()
        follow(recipe, steps)
        recipe.find_container()
        talk_on(lab)
        judge(lab)


class PodmanRecipe(Recipe):
    """The same where it is a container of podman's."""

    def __init__(self, lab: Lab, engine: Podman) -> None:
        super().__init__(lab)
        self.engine, at = engine, lab.topology["destination"]
        self.places |= {"/run/netns/web": str(NAMES / at.name)}

    def enter(self, role: str) -> list[str]:
        host = self.lab.topology[role]
        return host.command() if role == "gateway" else inside(host)

    def start(self, role: str, script: str) -> Running:
        """podman as the lab's engine calls it."""
        host = self.lab.topology[role]
        name = container_of(self.lab)
        script = re.sub(r"(podman .*) web$", rf"\1 {name}", script, flags=re.MULTILINE)
        script = script.replace("podman --runtime runc", " ".join(self.engine.command(host)))
        settings = f"export CONTAINERS_CONF={host.directory}/containers.conf\n"
        return super().start(role, settings + script)


def read_all(place: Path) -> tuple[Checkpoint, Tree]:
    with opened_image(place) as images:
        tree = read_tree(images)
        assert tree is not None
        return read_checkpoint_with_queues(images), tree


def compare_archive(tar: Path) -> None:
    """What podman wrote says the same as it is, by gzip, and unpacked."""
    unpacked = tar.with_name("unpacked")
    unpacked.mkdir()
    subprocess.run(["tar", "-xf", tar, "-C", unpacked, "checkpoint"], check=True)
    subprocess.run(["gzip", "--keep", "--fast", tar], check=True)
    wanted = read_all(unpacked / "checkpoint")
    assert len(wanted[0].connections) == 2
    assert read_all(tar) == wanted
    assert read_all(tar.with_suffix(".tar.gz")) == wanted


@pytest.mark.needs("podman")
def test_the_recipe_for_podman_keeps_the_connections() -> None:
    move, hook = blocks_of("test_the_recipe_for_podman_keeps_the_connections")
    (_, _, checkpoint), *steps = paragraphs(move)
    with Lab("recipe", engine="podman") as lab:
        assert isinstance(lab.engine, Podman)
        lab.translator = recipe = PodmanRecipe(lab, lab.engine)
        lab.begin(connections=2)
        freeze_by(recipe, checkpoint, lab)
        compare_archive(recipe.frozen.with_suffix(".tar"))
        host = lab.topology["destination"]
        end_silence(host)
        lab.engine._furnish(host)
        state = f"export NATKEEP_STATE_DIR={recipe.state('destination')}\n"
        script = host.directory / "hook-of-the-page"
        text = hook.text.replace("export ", f"{state}export ")
        script.write_text(text.replace(HOOK, str(recipe.hook())))
        script.chmod(0o755)
        podman._configuration(host).write_text(f"action-script {script}\n")
        lab.place_order()
        follow(recipe, steps)
        lab.traffic.server.pid = lab.engine._pid(host, lab.traffic.server.application)
        talk_on(lab)
        judge(lab)
