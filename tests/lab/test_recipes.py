"""The recipes of README and docs, run as they stand."""

from __future__ import annotations

import subprocess
import time

import pytest
from pages import Block, blocks_of
from recipe import (
    Paragraphs,
    Recipe,
    follow,
    freeze_by,
    judge,
    likeness,
    paragraphs,
    talk_on,
    typed,
)

from natkeep.errors import RefusedError
from natkeep.lab.host import await_true
from natkeep.lab.lab import Lab
from natkeep.lab.relay import ByRelay
from natkeep.lab.topology import THIRD, USUAL
from natkeep.lab.translators import Order

pytestmark = [pytest.mark.root, pytest.mark.lab, pytest.mark.criu]

DUMP = "criu dump -t $PID -D /images/web --tcp-established --network-lock nftables\n"


@pytest.mark.parametrize("block", blocks_of("test_a_recipe_keeps_the_connections"), ids=str)
def test_a_recipe_keeps_the_connections(block: Block) -> None:
    with Lab("recipe", engine="criu") as lab:
        lab.translator = recipe = Recipe(lab)
        lab.begin(connections=2)
        freeze_by(recipe, DUMP, lab)
        lab.place_order()
        follow(recipe, paragraphs(block))
        talk_on(lab)
        judge(lab)


class ReadmeRecipe(Recipe):
    """It is ended as the README says, but does not ask."""

    def __init__(self, lab: Lab, end: str) -> None:
        super().__init__(lab)
        self.end = end

    def teardown(self, order: Order) -> None:
        for role in ("gateway", "destination"):
            self.run(role, self.end.replace(" web ", " web --yes --drop 0 "))


def test_the_readme_moves_a_server_looks_at_it_and_ends_it() -> None:
    move, look, end = blocks_of("test_the_readme_moves_a_server_looks_at_it_and_ends_it")
    (_, _, dump), *steps = paragraphs(move)
    with Lab("recipe", engine="criu") as lab:
        lab.translator = recipe = ReadmeRecipe(lab, end.text)
        lab.begin(connections=2)
        freeze_by(recipe, dump, lab)
        lab.place_order()
        follow(recipe, steps)
        talk_on(lab)
        [status] = typed(look.text)
        shown = look.text.partition("\n")[2]
        assert likeness(recipe.run("destination", status)) == likeness(shown)
        process, said = recipe.start("gateway", end.text)
        assert process.wait(60) == RefusedError.exit_code
        assert "--drain waits for their end" in said.read_text()
        judge(lab)


class RelayRecipe(Recipe):
    """The same where the source goes on as a relay."""

    def teardown(self, order: Order) -> None:
        for role in ("source", self.lab.site.role):
            self.run(role, f"natkeep teardown {order.id} --yes --drop 0")


def begin_by_relay(lab: Lab, recipe: Recipe, by: ByRelay, steps: Paragraphs) -> None:
    """Move the server to the destination."""
    by.begin(connections=2)
    (_, _, dump), *others = steps
    freeze_by(recipe, dump, lab)
    lab.place_order(move_id="web")
    follow(recipe, others)
    by.note_wires(recipe.run("source", "natkeep status web --json"))
    talk_on(lab)


RELAY = blocks_of("test_the_recipe_for_a_relay_keeps_the_connections")


def test_the_recipe_for_a_relay_keeps_the_connections() -> None:
    with Lab("recipe", engine="criu") as lab:
        by = ByRelay(lab)
        lab.translator = recipe = RelayRecipe(lab)
        begin_by_relay(lab, recipe, by, paragraphs(*RELAY))
        judge(lab)


def test_the_recipe_for_a_relay_pointed_elsewhere_keeps_them() -> None:
    [block] = blocks_of("test_the_recipe_for_a_relay_pointed_elsewhere_keeps_them")
    (_, _, dump), *steps, (_, _, end) = paragraphs(block)
    with Lab("recipe", engine="criu", seats=(*USUAL, THIRD)) as lab:
        by = ByRelay(lab)
        lab.translator = recipe = RelayRecipe(lab)
        begin_by_relay(lab, recipe, by, paragraphs(*RELAY))
        lab.undone.append(lab.order)

        lab.site, lab.new = THIRD, THIRD.address(lab.family)
        recipe.frozen = lab.directory / "images2"  # what /images/web2 becomes
        freeze_by(recipe, dump, lab, "destination")
        lab.place_order(lab.order, move_id="web2")
        for role, _, script in steps:
            recipe.run(THIRD.role if role == "destination" else role, script)
        by.note_wires(recipe.run("source", "natkeep status web2 --json"))
        talk_on(lab)
        recipe.run("destination", end.replace(" web", " web --drop 0"))
        judge(lab)


def test_the_rollback_of_the_page_keeps_the_connections() -> None:
    [block] = blocks_of("test_the_rollback_of_the_page_keeps_the_connections")
    first, restore, *rest = paragraphs(block)
    with Lab("recipe", engine="criu") as lab:
        lab.translator = recipe = Recipe(lab)
        lab.begin(connections=2)
        freeze_by(recipe, DUMP, lab)
        lab.place_order()
        for role in ("gateway", "destination", "source"):
            recipe.run(role, PREPARE.format(role))
        recipe.run("gateway", "natkeep open web")
        follow(recipe, [first])
        lab.site = lab.home
        began = time.time_ns()
        follow(recipe, [restore])
        talk_on(lab)
        lab.restored_ns = began  # what was not sent yet may leave while CRIU still works
        follow(recipe, rest)
        for role in ("gateway", "destination", "source"):
            told = recipe.run(role, "natkeep status")
            assert told.startswith("nothing is prepared\n"), role
        judge(lab, moved=False)


PREPARE = "natkeep prepare web --map 10.2.0.10=10.3.0.20 --site {} --image /images/web"


@pytest.mark.needs("arping")
def test_the_link_is_told_that_a_third_host_has_old(make_netns) -> None:
    [block] = blocks_of("test_the_link_is_told_that_a_third_host_has_old")
    third, peer = make_netns(), make_netns()
    link = ["ip", "-n", third, "link", "add", "eth0", "type", "veth", "peer", "eth0", "netns", peer]
    subprocess.run(link, check=True)
    for netns in (third, peer):
        subprocess.run(["ip", "-n", netns, "link", "set", "eth0", "up"], check=True)
    for old in ("10.2.0.10", "fd00:2::10"):
        add = ["neighbour", "add", old, "lladdr", "02:00:00:00:00:01", "nud", "stale"]
        subprocess.run(["ip", "-n", peer, *add, "dev", "eth0"], check=True)

    enter = ["ip", "netns", "exec", third]
    subprocess.run([*enter, "sh", "-ec", block.text], check=True)
    shown = subprocess.check_output([*enter, "cat", "/sys/class/net/eth0/address"], text=True)

    def is_known() -> bool:
        look = ["ip", "-n", peer, "neighbour", "show", "dev", "eth0"]
        told = subprocess.check_output(look, text=True)
        return all(f"{old} lladdr {shown.strip()}" in told for old in ("10.2.0.10", "fd00:2::10"))

    await_true(is_known, "the peer to know the third host")
