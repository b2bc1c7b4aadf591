"""The recipes of README and docs, run as they stand: each paragraph at the machine it names.

A recipe is a code block whose paragraphs begin with `# source`, `# gateway` or `# destination`.
The machines are a lab's; what is replaced is the directories, and ssh by a way into the gateway.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from natkeep.lab.engine import Frozen
from natkeep.lab.engines.criu import Criu, find_criu
from natkeep.lab.host import Host, write_script
from natkeep.lab.lab import Lab
from natkeep.lab.translators import Natkeep, natkeep_command

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
PARAGRAPH = re.compile(r"# (source|gateway|destination)\b(.*)\n((?:.+\n?)+)")
DUMP = "criu dump -t $PID -D /images/web --tcp-established --network-lock nftables\n"


def paragraphs(page: str, heading: str) -> list[tuple[str, str, str]]:
    """Machine, rest of the comment and shell script of each paragraph of the first recipe there."""
    text = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2]
    return PARAGRAPH.findall(next(b for b in BLOCK.findall(text) if PARAGRAPH.search(b)))


class Recipe(Natkeep):
    """natkeep inside of each of a lab's hosts, with a state of its own there."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab.directory)
        self.lab, self.frozen = lab, lab.directory / "images"
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

    def start(self, role: str, script: str) -> subprocess.Popen[str]:
        for place, here in self.places.items():
            script = script.replace(place, here)
        usual = {name: value for name, value in os.environ.items() if name[:8] != "NATKEEP_"}
        pid = str(self.lab.traffic.server.pid)
        own = {"PATH": self.path, "NATKEEP_STATE_DIR": self.state(role), "PID": pid}
        return subprocess.Popen(
            self.lab.topology[role].command("sh", "-ec", script),
            env={**usual, **own},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, role: str, running: subprocess.Popen[str]) -> None:
        said, _ = running.communicate(timeout=60)
        assert running.returncode == 0, f"{role}: {said[-2000:]}"

    def teardown(self, order: object) -> None:
        """As the README says: on the gateway first, on the destination last."""
        for role in ("gateway", "destination"):
            ids = 'natkeep status --json | grep -o \'"id": "[^"]*\' | cut -d \'"\' -f 4'
            script = f"for id in $({ids}); do natkeep teardown $id --yes; done"
            self.finish(role, self.start(role, script))


def freeze_by(recipe: Recipe, script: str, lab: Lab) -> None:
    """Freeze the server by the recipe's own dump."""

    def freeze(self: Criu, host: Host, moving: object, into: Path) -> Frozen:
        recipe.frozen.mkdir()
        recipe.finish("source", recipe.start("source", script))
        return Frozen(recipe.frozen, ("--image", str(recipe.frozen)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Criu, "freeze", freeze)
        lab.freeze()


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
        lab.at = lab.topology["destination"]
        lab.note_restored()
        lab.traffic.talk_on()
        lab.finish()
    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert lab.report.resets == 0
    assert len(lab.report.after) == 2
