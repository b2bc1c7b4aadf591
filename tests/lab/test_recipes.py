"""The recipes of README and docs, run as they stand: each paragraph at the machine it names.

A recipe is a code block whose paragraphs begin with `# source`, `# gateway` or `# destination`.
The machines are a lab's; what is replaced is the directories, and ssh by a way into the gateway.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from natkeep.lab.engine import Frozen, end_silence
from natkeep.lab.engines.criu import find_criu
from natkeep.lab.engines.runc import LOCK, Runc, container, inside
from natkeep.lab.host import NAMES, Host, write_script
from natkeep.lab.lab import Lab
from natkeep.lab.relay import ByRelay
from natkeep.lab.translators import Natkeep, natkeep_command

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
PARAGRAPH = re.compile(r"# (source|gateway|destination)\b(.*)\n((?:.+\n?)+)")
Running = tuple[subprocess.Popen[bytes], Path]
DUMP = "criu dump -t $PID -D /images/web --tcp-established --network-lock nftables\n"


def paragraphs(page: str, heading: str) -> list[tuple[str, str, str]]:
    """Machine, rest of the comment and shell script of each paragraph of the first recipe there."""
    text = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2]
    return PARAGRAPH.findall(next(b for b in BLOCK.findall(text) if PARAGRAPH.search(b)))


class Recipe(Natkeep):
    """natkeep inside of each of a lab's hosts, with a state of its own there."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab.directory)
        self.lab, self.frozen, self.numbers = lab, lab.directory / "images", itertools.count()
        gateway, move = lab.topology["gateway"], lab.directory / "move"
        move.mkdir(mode=0o700)
        self.places = {"/images/web": str(self.frozen), "/run/move": str(move)}
        tools = lab.directory / "bin"
        tools.mkdir()
        state = self.state("gateway")
        enter = f"shift; NATKEEP_STATE_DIR={state} exec nsenter --net=/run/netns/{gateway.name}"
        write_script(tools / "ssh", f'{enter} "$@"')
        (tools / "criu").symlink_to(find_criu() or "criu")
        beside = Path(natkeep_command()[0]).parent
        self.path = f"{tools}:{beside}:/usr/sbin:/usr/bin:/sbin:/bin"

    def state(self, role: str) -> str:
        return str(self.lab.directory / f"state-{role}")

    def enter(self, role: str) -> list[str]:
        """What a command at that machine begins with."""
        return self.lab.topology[role].command()

    def start(self, role: str, script: str) -> Running:
        for place, here in self.places.items():
            script = script.replace(place, here)
        usual = {name: value for name, value in os.environ.items() if name[:8] != "NATKEEP_"}
        pid = str(self.lab.traffic.server.pid)
        own = {"PATH": self.path, "NATKEEP_STATE_DIR": self.state(role), "PID": pid}
        said = self.lab.directory / f"said-{next(self.numbers)}"
        with said.open("w") as file:  # no pipe: a container would have it, too
            process = subprocess.Popen(
                [*self.enter(role), "sh", "-ec", script],
                env={**usual, **own},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        return process, said

    def finish(self, role: str, running: Running) -> str:
        """What it has printed, when it has ended well."""
        process, said = running
        code = process.wait(timeout=60)
        assert code == 0, f"{role}: {said.read_text()[-2000:]}"
        return said.read_text()

    def teardown(self, order: object) -> None:
        """As the README says: on the gateway first, on the destination last."""
        for role in ("gateway", "destination"):
            ids = 'natkeep status --json | grep -o \'"id": "[^"]*\' | cut -d \'"\' -f 4'
            script = f"for id in $({ids}); do natkeep teardown $id --yes --drop 0; done"
            self.finish(role, self.start(role, script))


def container_of(lab: Lab) -> str:
    return container(lab.topology["source"], lab.traffic.server.application)


def freeze_by(recipe: Recipe, script: str, lab: Lab) -> None:
    """Freeze the server by the recipe's own dump."""

    def freeze(host: Host, moving: object, into: Path) -> Frozen:
        recipe.frozen.mkdir()
        recipe.finish("source", recipe.start("source", script))
        return Frozen(recipe.frozen, ("--image", str(recipe.frozen)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.engine, "freeze", freeze)
        lab.freeze()


def follow(recipe: Recipe, steps: list[tuple[str, str, str]]) -> None:
    """All that comes after the dump, each paragraph at its machine."""
    beside = []
    for role, more, script in steps:
        if role == "source":
            continue
        running = recipe.start(role, script)
        if "beside" in more:
            beside.append(running)
        else:
            recipe.finish(role, running)
    for running in beside:
        recipe.finish("beside", running)


def judge(lab: Lab) -> None:
    lab.at = lab.topology["destination"]
    lab.note_restored()
    lab.traffic.talk_on()
    lab.finish()
    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert lab.report.resets == 0
    assert len(lab.report.after) == 2


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

    def make_bundle(self) -> None:
        """What the page says of the destination's config.json, and of CRIU's file."""
        host, script = self.lab.topology["destination"], f'action-script "{self.hook()}"\n'
        end_silence(host)
        self.engine._bundle(host, container_of(self.lab), LOCK + script)

    def find_container(self) -> None:
        """Have the lab know what runc has restored."""
        host, name = self.lab.topology["destination"], container_of(self.lab)
        said = self.finish("destination", self.start("destination", "runc state web"))
        self.lab.traffic.server.pid = json.loads(said)["pid"]
        self.engine._running[name] = host


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.criu
@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("README.md", "Move a server"),
        ("docs/by-hand.md", "The order"),
        ("docs/hook.md", "Where NEW is known only at the restore"),
    ],
)
def test_a_recipe_keeps_the_connections(page: str, heading: str) -> None:
    steps = paragraphs(page, heading)
    dumps = [script for role, _, script in steps if role == "source"]
    with Lab("recipe", engine="criu") as lab:
        lab.translator = recipe = Recipe(lab)
        lab.begin(connections=2)
        freeze_by(recipe, *(dumps or [DUMP]), lab)
        lab.place_order()
        follow(recipe, steps)
        judge(lab)


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.criu
@pytest.mark.needs("runc")
def test_the_recipe_for_runc_keeps_the_connections() -> None:
    steps = paragraphs("docs/containers.md", "runc")
    [checkpoint] = [script for role, _, script in steps if role == "source"]
    with Lab("recipe", engine="runc") as lab:
        assert isinstance(lab.engine, Runc)
        lab.translator = recipe = RuncRecipe(lab, lab.engine)
        lab.begin(connections=2)
        freeze_by(recipe, checkpoint, lab)
        del lab.engine._running[container_of(lab)]
        recipe.make_bundle()
        lab.place_order()
        follow(recipe, steps)
        recipe.find_container()
        judge(lab)


class RelayRecipe(Recipe):
    """The same where the source goes on as a relay."""

    def teardown(self, order: object) -> None:
        for role in ("source", "destination"):
            script = "natkeep teardown web --yes --drop 0"
            self.finish(role, self.start(role, script))


PAGE = ("docs/topologies.md", "A as a relay")


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.criu
def test_the_recipe_for_a_relay_keeps_the_connections() -> None:
    (_, _, dump), *steps = paragraphs(*PAGE)
    with Lab("recipe", engine="criu") as lab:
        by = ByRelay(lab)
        lab.translator = recipe = RelayRecipe(lab)
        by.begin(connections=2)
        freeze_by(recipe, dump, lab)
        lab.place_order()
        for role, _, script in steps:
            recipe.finish(role, recipe.start(role, script))
        said = recipe.finish("source", recipe.start("source", "natkeep status web --json"))
        by.note_wires(said)
        judge(lab)
