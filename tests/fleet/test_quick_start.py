"""The quick start of docs/fleet.md, as it stands, at a lab's machines."""

from __future__ import annotations

import time

import pytest
from pages import blocks_of
from recipe import Recipe, follow, freeze_by, judge, paragraphs, talk_on

from natkeep.lab.lab import Lab
from natkeep.lab.translators import Order

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.criu]


class FleetRecipe(Recipe):
    """The agents run in the machines; it is ended by an order."""

    def __init__(self, lab: Lab, order: str, end: str) -> None:
        super().__init__(lab)
        store, file = lab.directory / "fleet", lab.directory / "web.json"
        self.places |= {"/mnt/fleet": str(store), "web.json": str(file)}
        self.again = f"export NATKEEP_STORE=dir:{store}\n"  # the shell's, which goes on
        self.end = end
        file.write_text(order.replace("/images/web", str(self.frozen)))

    def wait_alive(self, *nodes: str) -> None:
        until = time.monotonic() + 60
        status = self.again + "natkeep fleet status"
        while not all(node in self.run("destination", status) for node in nodes):
            assert time.monotonic() < until

    def teardown(self, order: Order) -> None:
        self.run("destination", self.again + self.end.replace("end web", "end web --yes"))


def test_the_quick_start_moves_a_server() -> None:
    block, order = blocks_of("test_the_quick_start_moves_a_server")
    *agents, (_, _, dump), move, (_, _, end) = paragraphs(block)
    assert sum(line[:1] not in ("", "#") for line in block.text.splitlines()) <= 10
    with Lab("quick-start", engine="criu") as lab:
        lab.translator = recipe = FleetRecipe(lab, order.text, end)
        lab.begin(connections=2)
        follow(recipe, agents)
        recipe.wait_alive("gw", "host-b")
        freeze_by(recipe, dump, lab)
        lab.place_order(move_id="web")
        follow(recipe, [move])
        talk_on(lab)
        process, said = recipe.start("destination", recipe.again + end)
        assert process.wait(60) == 8, said.read_text()
        assert "2 connections live" in said.read_text()
        judge(lab)
