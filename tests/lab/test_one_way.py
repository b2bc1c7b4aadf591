"""a move of which one direction is swallowed on the way: `status` says so, and when, and why.

    peer ── gateway: drops what goes the one way, in its chain `forward` ── destination: server

The server says something, which its peers do not hear, or whose acknowledgement it does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from typing import Any

import pytest

from natkeep.lab.lab import Lab
from natkeep.lab.time_scale import scaled
from natkeep.lab.traffic_words import PORT
from natkeep.lab.translators import natkeep_command

pytestmark = [pytest.mark.lab, pytest.mark.root]

SWALLOW = "add table inet hop; add chain inet hop f {{ type filter hook forward priority 0; }}; "
SWALLOW += "add rule inet hop f tcp {end} {port} drop"


def natkeep(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NATKEEP_STATE_DIR": str(lab.directory / "natkeep-state")}
    return subprocess.run(
        [*natkeep_command(), *arguments], capture_output=True, text=True, env=environment
    )


def status(lab: Lab, code: int) -> dict[str, Any]:
    """The move, once `status --strict` ends in *code*."""
    deadline = time.monotonic() + scaled(30)
    while (done := natkeep(lab, "status", "lab", "--strict", "--json")).returncode != code:
        assert time.monotonic() < deadline, done.stdout
        time.sleep(0.2)
    [move] = json.loads(done.stdout)["moves"]
    assert isinstance(move, dict)
    return move


@pytest.mark.parametrize(
    ("end", "later"), [("dport", False), ("sport", False), ("sport", True)], ids=str
)
def test_one_direction_that_is_swallowed_is_drift(end: str, later: bool) -> None:
    """later: packets of both directions passed before; then the socket tells."""
    with Lab("lab", engine="repair") as lab:
        lab.begin(connections=3, pause=True)
        lab.freeze()
        lab.prepare()
        if later:
            lab.restore()
            lab.traffic.client_says()
            move = status(lab, 0)
            assert move["answered"] == 3
            assert {each["state"] for each in move["connections"]} == {"live"}
        lab.topology["gateway"].run("nft", SWALLOW.format(end=end, port=PORT))
        if not later:
            lab.restore()
        began = time.monotonic()
        lab.traffic.process.do({"push": 64})
        assert natkeep(lab, "status", "lab", "--strict").returncode == 0  # it may take a moment

        move = status(lab, 6)

        assert time.monotonic() - began > 4
        assert {each["state"] for each in move["connections"]} == {"one-way"}
        assert move["answered"] == (3 if later else 0)
        drift = {site["role"]: site["drift"] for site in move["sites"]}
        said = "one-way: packets of the process pass on 3 connections, and none of a peer: "
        assert [line.startswith(said) for line in drift["destination"]] == [True]
        text = natkeep(lab, "status", "lab").stdout
        assert "0 live, 3 one-way, 0 ended" in text
        natkeep(lab, "teardown", "lab", "--yes")


def test_who_has_answered_is_known_though_the_entries_are_new() -> None:
    """`conntrack -F`, and repair makes them anew: they count from then on."""
    with Lab("lab", engine="repair") as lab:
        lab.begin(connections=3, pause=True)
        lab.move()
        lab.traffic.client_says()
        assert status(lab, 0)["answered"] == 3
        lab.topology["destination"].run("conntrack", "-F")
        assert natkeep(lab, "repair", "lab").returncode == 0

        move = status(lab, 0)

        assert move["answered"] == 3
        assert {each["packets"]["in"] for each in move["connections"]} == {0}
        natkeep(lab, "teardown", "lab", "--yes")


def test_a_direction_that_falls_silent_later_is_seen_by_a_watch() -> None:
    """What the peers say again and again passes the gateway, and nothing comes back."""
    with Lab("lab", engine="repair") as lab:
        lab.begin(connections=2, pause=True)
        lab.move()
        lab.traffic.client_says()
        lab.topology["gateway"].run("nft", SWALLOW.format(end="dport", port=PORT))
        lab.traffic.client.do({"push": 64})

        done = natkeep(lab, "status", "lab", "--strict", "--watch", "--json")

        assert done.returncode == 6, done.stderr
        said = (
            "natkeep: drift: one-way: packets of the peers pass, and none of the process any more: "
        )
        assert done.stderr.startswith(said)
        natkeep(lab, "teardown", "lab", "--yes")
