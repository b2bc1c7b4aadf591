"""many natkeeps at once: different moves in the same namespaces, beside somebody who lists them.

Each worker prepares, opens, looks at and tears down one move after the other; all moves share OLD,
NEW, gateway, destination and state directory, and differ in the peer's port. The usual size is
8 workers of 4 moves; `make many` runs 16 of 50 (NATKEEP_MANY=WORKERSxMOVES). Each verb is a whole
process, as a shell would start it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

OLD, NEW = "10.2.0.10", "10.3.0.20"
WORKERS, MOVES = (int(part) for part in os.environ.get("NATKEEP_MANY", "8x4").split("x"))


class Sites(NamedTuple):
    gateway: str
    destination: str
    state: Path

    def natkeep(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "natkeep.cli", "--state-dir", str(self.state), *words],
            input=stdin,
            capture_output=True,
            text=True,
        )

    def prepare(
        self, move_id: str, *peers: str, old: str = OLD, new: str = NEW
    ) -> subprocess.CompletedProcess[str]:
        sites = ("--site", f"gateway={self.gateway}", "--site", f"destination={self.destination}")
        words = ("prepare", move_id, "--map", f"{old}={new}", *sites, "--connections", "-")
        return self.natkeep(*words, stdin="".join(f"{old}:5000 {peer}\n" for peer in peers))

    def observe(self) -> list[str]:
        """All that a move may change, of both sites."""
        looks = "nft -j list ruleset; ip -j addr; ip -j route show table all; conntrack -L 2>&1"
        return [run_in(netns, "sh", "-c", looks) for netns in (self.gateway, self.destination)]


def run_in(netns: str, *words: str) -> str:
    return subprocess.run(
        ["ip", "netns", "exec", netns, *words], capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture
def sites(make_netns: Callable[[], str], tmp_path: Path) -> Sites:
    found = Sites(make_netns(), make_netns(), tmp_path / "state")
    for line in (
        # An index of its own, or the carrier comes up to a second late (linkwatch.c).
        f"link add gate0 index 100 netns {found.gateway} type veth"
        f" peer name dest0 netns {found.destination}",
        f"-n {found.gateway} link set gate0 addrgenmode none up",
        f"-n {found.gateway} address add 10.3.0.1/24 dev gate0",
        f"-n {found.destination} link set dest0 addrgenmode none up",
        f"-n {found.destination} address add {NEW}/24 dev dest0",
        f"-n {found.destination} address add 10.3.0.21/24 dev dest0",
        f"-n {found.destination} route add 10.1.0.0/16 via 10.3.0.1",
    ):
        subprocess.run(["ip", *line.split()], check=True)
    deadline = time.monotonic() + 20
    for netns, device in ((found.gateway, "gate0"), (found.destination, "dest0")):
        while "state UP" not in run_in(netns, "ip", "link", "show", device):
            assert time.monotonic() < deadline, "a cable was plugged in and has no carrier"
    return found


class Tally(NamedTuple):
    """What went wrong, in words."""

    errors: list[str]
    lost: list[str]


def move_one(sites: Sites, move_id: str, peer: str, tally: Tally) -> None:
    """One move from prepare to teardown; while it is open, all of it has to be there."""
    for verb in ("prepare", "open", "status", "teardown"):
        if verb == "prepare":
            done = sites.prepare(move_id, peer)
        else:
            more = ("--strict", "--json") if verb == "status" else ()
            done = sites.natkeep(verb, move_id, *more)
        if done.returncode:
            kind = tally.lost if verb == "status" else tally.errors
            kind.append(f"{verb} {move_id}: {done.returncode}: {done.stderr.strip()}")
        elif verb == "status":
            (move,) = json.loads(done.stdout)["moves"]
            peers = [row["peer"] for row in move["connections"] if row["packets"]["in"] is not None]
            if (move["gate"], peers) != ("open", [peer]):
                tally.lost.append(f"{move_id}: gate {move['gate']}, {peers}")


def list_rulesets(sites: Sites, done: threading.Event, errors: list[str]) -> int:
    """List both rulesets again and again; how many times."""
    listed = 0
    while not done.is_set():
        for netns in (sites.gateway, sites.destination):
            answer = subprocess.run(
                ["ip", "netns", "exec", netns, "nft", "-j", "list", "ruleset"],
                capture_output=True,
                text=True,
            )
            listed += 1
            if answer.returncode or "nftables" not in json.loads(answer.stdout):
                errors.append(f"nft list ruleset: {answer.stderr.strip() or answer.returncode}")
    return listed


@pytest.mark.timeout(3600)
def test_many_moves_in_the_same_namespaces_leave_each_other_alone(
    sites: Sites, capsys: pytest.CaptureFixture[str]
) -> None:
    before, tally, done = sites.observe(), Tally([], []), threading.Event()

    def work(worker: int) -> None:
        for number in range(MOVES):
            peer = f"10.1.{worker}.2:{50000 + number}"
            move_one(sites, f"w{worker}-{number}", peer, tally)

    began = time.monotonic()
    with ThreadPoolExecutor(WORKERS + 1) as pool:
        lister = pool.submit(list_rulesets, sites, done, tally.errors)
        for future in [pool.submit(work, worker) for worker in range(WORKERS)]:
            future.result()
        done.set()
        listed = lister.result()

    left = [path.name for path in sites.state.iterdir() if path.name != "lock"]
    after = sites.observe()
    with capsys.disabled():
        print(
            f"\n{WORKERS} processes x {MOVES} prepare/open/status/teardown in "
            f"{time.monotonic() - began:.0f} s, ruleset listed {listed} times: "
            f"{len(tally.errors)} errors, {len(tally.lost)} lost, {len(left)} left"
        )
    assert (tally.errors, tally.lost, left) == ([], [], [])
    assert listed > 0
    assert before == after


# ---- two that want the same ------------------------------------------------------------------


def race(*calls: Callable[[], subprocess.CompletedProcess[str]]) -> Sequence[str]:
    """Start all at once; stderr of the one that was refused."""
    with ThreadPoolExecutor(len(calls)) as pool:
        found = [future.result() for future in [pool.submit(call) for call in calls]]
    assert sorted(done.returncode for done in found) == [0, 4]
    return next(done.stderr for done in found if done.returncode).splitlines()


def test_of_two_prepares_of_one_id_the_second_is_told_the_id(sites: Sites) -> None:
    peers = ("10.1.0.2:50000", "10.1.0.2:50001")
    refused = race(*(lambda peer=peer: sites.prepare("web", peer) for peer in peers))
    assert refused == [
        "natkeep: the id web is in use",
        "  (natkeep teardown web, or another id)",
    ]
    assert sites.natkeep("status", "--strict").returncode == 0


def test_of_two_prepares_of_one_tuple_the_second_is_told_the_first(sites: Sites) -> None:
    refused = race(
        lambda: sites.prepare("api", "10.1.0.2:50000", "10.1.0.2:50001"),
        lambda: sites.prepare("web", "10.1.0.2:50001", "10.1.0.2:50002"),
    )
    (first,) = json.loads(sites.natkeep("status", "--json").stdout)["moves"]
    tuple_ = "10.1.0.2:50001 > 10.2.0.10:5000"
    assert refused == [
        f"natkeep: {tuple_} and {tuple_} (of move {first['id']}) would be one tuple at OLD; "
        "1 in all"
    ]
    assert len(first["connections"]) == 2


def test_of_two_prepares_of_one_old_to_two_news_the_second_is_told_the_first(sites: Sites) -> None:
    refused = race(
        lambda: sites.prepare("api", "10.1.0.2:50000"),
        lambda: sites.prepare("web", "10.1.0.2:50001", new="10.3.0.21"),
    )
    (first,) = json.loads(sites.natkeep("status", "--json").stdout)["moves"]
    said = re.fullmatch(r"natkeep: (\S+) is moved to (\S+) by (\S+) already", refused[0])
    assert said is not None
    assert said.groups() == (OLD, first["maps"][0]["new"], first["id"])
    assert refused[1:] == [f"  (natkeep teardown {first['id']} first)"]
