"""A recipe of the pages, run as it stands: each paragraph at the machine that it names.

A recipe is a code block whose paragraphs begin with `# source`, `# gateway` or `# destination`.
The machines are a lab's; what is replaced is the directories, and ssh by a way into the gateway.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
from pages import Block

from natkeep.lab.engine import Frozen
from natkeep.lab.engines.criu import find_criu
from natkeep.lab.host import Host, write_script
from natkeep.lab.lab import Lab
from natkeep.lab.translators import Natkeep, Order, natkeep_command

PARAGRAPH = re.compile(r"# (source|gateway|destination)\b(.*)\n((?:.+\n?)+)")
Running = tuple[subprocess.Popen[bytes], Path]
Paragraphs = list[tuple[str, str, str]]


def paragraphs(block: Block) -> Paragraphs:
    """Machine, rest of the comment and shell script of each paragraph."""
    found = PARAGRAPH.findall(block.text)
    assert "".join(PARAGRAPH.sub("", block.text).split()) == ""
    return found


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

    def run(self, role: str, script: str) -> str:
        """The same, from its start to its end."""
        return self.finish(role, self.start(role, script))

    def teardown(self, order: Order) -> None:
        """On the gateway first, on the destination last."""
        for role in ("gateway", "destination"):
            ids = 'natkeep status --json | grep -o \'"id": "[^"]*\' | cut -d \'"\' -f 4'
            script = f"for id in $({ids}); do natkeep teardown $id --yes --drop 0; done"
            self.run(role, script)


def freeze_by(recipe: Recipe, script: str, lab: Lab, role: str = "source") -> None:
    """Freeze the server, which is at *role*, by the recipe's own dump."""

    def freeze(host: Host, moving: object, into: Path) -> Frozen:
        recipe.frozen.mkdir()
        recipe.run(role, script)
        return Frozen(recipe.frozen, ("--image", str(recipe.frozen)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.engine, "freeze", freeze)
        lab.freeze()


def follow(recipe: Recipe, steps: Paragraphs) -> None:
    """Each paragraph at its machine."""
    beside = []
    for role, more, script in steps:
        running = recipe.start(role, script)
        if "beside" in more:
            beside.append(running)
        else:
            recipe.finish(role, running)
    for running in beside:
        recipe.finish("beside", running)


def talk_on(lab: Lab) -> None:
    """The server is at the lab's site now, and goes on."""
    lab.at = lab.topology[lab.site.role]
    lab.note_restored()
    lab.traffic.talk_on()


def judge(lab: Lab, *, moved: bool = True) -> None:
    lab.finish(moved=moved)
    assert [str(each) for each in lab.report.assertions if not each.ok] == []
    assert lab.report.resets == 0
    assert len(lab.report.after) == 2


def typed(console: str) -> list[str]:
    """What stands behind the prompts."""
    return re.findall(r"^\$ (.*)", console, re.MULTILINE)


def likeness(text: str) -> list[str]:
    """The lines but for numbers, column widths, and how this machine is called."""
    text = re.sub(r"\d+", "N", text.replace(os.uname().nodename, "host-b"))
    return [" ".join(line.split()) for line in text.strip().splitlines()]
