"""the namespace of a move has ended, and the kernel has given its inode to a stranger's.

The stranger has the name that the move knows, and OLD as an address of its own. Whatever is asked
of the move, nothing of the stranger changes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hook_caller import cable

from bench.faults.surfaces import read_all_surfaces
from natkeep.lab.ipv6_addresses import await_addresses

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

OLD, NEW = "10.2.0.10", "10.3.0.20"
CORPUS = Path(__file__).parents[1] / "checkpoint/corpus/plain"


class Stranger(NamedTuple):
    """A namespace with the inode and the name of the move's; the state directory of the move."""

    netns: str
    state: Path

    def run(self, *words: str, **environment: str) -> tuple[int, str]:
        """Exit code and all words of `python -m natkeep.*words*`."""
        done = subprocess.run(
            [sys.executable, "-m", *words],
            env={**os.environ, "NATKEEP_STATE_DIR": str(self.state), **environment},
            stdin=subprocess.DEVNULL, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def stranger(
    make_netns: Callable[[], str], give_inode_again: Callable[[str], bool], tmp_path: Path
) -> Stranger:
    move = ("prepare", "web", f"--map={OLD}={NEW}", f"--image={CORPUS}", "--no-hold")
    for number in range(5):
        netns = make_netns()
        made = Stranger(netns, tmp_path / f"state{number}")
        cable(netns)
        assert made.run("natkeep.cli", *move, f"--site=destination={netns}")[0] == 0
        if give_inode_again(netns):
            cable(netns, f"address add {OLD}/32 dev lo")
            await_addresses(netns)
            return made
    pytest.fail("the kernel gives no inode again: what is known by it is safe here")


GONE = "is gone"
VERBS = {
    "open": (("natkeep.cli", "open", "web"), 7, GONE),
    "status": (("natkeep.cli", "status", "web", "--strict"), 6, GONE),
    "repair": (("natkeep.cli", "repair", "web"), 4, GONE),
    "repair --all": (("natkeep.cli", "repair", "--all"), 4, GONE),
    "teardown": (("natkeep.cli", "-v", "teardown", "web", "--yes"), 0, GONE),
    "gc": (("natkeep.cli", "gc"), 0, "its namespaces are gone"),
    "hook": (("natkeep.criu.hook",), 4, "prepared for another namespace"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_it_is_left_alone(verb: str, stranger: Stranger) -> None:
    words, code, said = VERBS[verb]
    tree = subprocess.Popen(["nsenter", f"--net=/run/netns/{stranger.netns}", "sleep", "600"])
    try:
        before = read_all_surfaces(stranger.netns)
        found = stranger.run(
            *words,
            CRTOOLS_SCRIPT_ACTION="post-restore",
            CRTOOLS_INIT_PID=str(tree.pid),
            CRTOOLS_IMAGE_DIR=str(CORPUS),
            NATKEEP_ID="web",
        )
        assert read_all_surfaces(stranger.netns) == before
    finally:
        tree.kill()
        tree.wait()
    assert found[0] == code, found
    assert said in found[1]
    known = sorted(path.name for path in stranger.state.iterdir())
    assert (known == ["lock"]) == (verb in ("teardown", "gc"))


def test_a_new_move_of_the_same_connections_is_prepared_there(stranger: Stranger) -> None:
    """The earlier one is at another namespace, so they have no tuple in common."""
    code, said = stranger.run(
        "natkeep.cli", "prepare", "api", f"--map={OLD}={NEW}", f"--image={CORPUS}", "--no-hold",
        f"--site=destination={stranger.netns}",
    )  # fmt: skip
    assert code == 0, said
    assert stranger.run("natkeep.cli", "status", "api", "--strict")[0] == 0
    assert stranger.run("natkeep.cli", "teardown", "api", "--yes")[0] == 0
