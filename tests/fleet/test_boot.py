"""A gateway that has booted is as it was before it forwards, by what the store orders."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from fleet_processes import Processes

from natkeep.fleet import keys
from natkeep.fleet.stores import open_store
from natkeep.policy import Agent

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

FORWARDING = "net.ipv4.ip_forward"


def at_gateway(fleet: Processes, *words: str) -> str:
    command = ["ip", "netns", "exec", fleet.names["gateway"], *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def boot(fleet: Processes, *, keeps_state: bool) -> None:
    """The gateway's kernel has forgotten all; /run goes, a state directory on a disk does not."""
    fleet.kill("gw-1")
    for command in ("nft flush ruleset", "conntrack -F", f"sysctl -qw {FORWARDING}=0"):
        at_gateway(fleet, *command.split())
    state = Path(fleet.state("gw-1"))
    if not keeps_state:
        shutil.rmtree(state)
    for journal in state.glob("*.journal"):
        boot = json.loads(journal.read_text().splitlines()[0])["boot"]
        journal.write_text(journal.read_text().replace(boot, "0" * len(boot)))


@pytest.mark.parametrize("keeps_state", [False, True])
def test_it_is_filled_before_it_forwards(fleet: Processes, keeps_state: bool) -> None:
    fleet.start_both()
    fleet.apply()
    fleet.call("fleet", "wait", "web")
    boot(fleet, keeps_state=keeps_state)
    words = ("--node", "gw-1", "--group", "edge", "--state-dir", fleet.state("gw-1"))
    fleet.call("agent", "--once", *words)
    assert at_gateway(fleet, "sysctl", "-n", FORWARDING) == "0\n"
    fleet.call("fleet", "wait", "web", "--timeout", "0")
    fleet.call("status", "web", "--strict", "--state-dir", fleet.state("gw-1"))
    assert "kept-web-0" in at_gateway(fleet, "nft", "list", "ruleset")
    assert "dst=10.2.0.10" in at_gateway(fleet, "conntrack", "-L")

    # One that was never there is refused, as ever where nothing is passed on.
    fleet.start("gw-1", "--group", "edge")
    fleet.wait_alive("gw-1")
    (fleet.path / "other").write_text("10.2.0.11:5000 10.1.0.2:50009\n")
    fleet.apply(id="other", maps=["10.2.0.11=10.3.0.20"], connections="other")
    done = fleet.run("fleet", "wait", "other")
    assert (done.returncode, "forwarding is 0" in done.stderr) == (4, True)


def test_what_was_ready_and_is_not_again_keeps_forwarding_off(fleet: Processes) -> None:
    """What peers say would be answered with resets; what the store has is not its list."""
    fleet.start_both()
    fleet.apply()
    fleet.call("fleet", "wait", "web")
    boot(fleet, keeps_state=False)
    store = open_store(fleet.store, Agent())
    [(piece, item)] = store.range(keys.lists("web")).items.items()
    store.txn({piece: "10.2.0.10:5000 10.1.0.2:50009\n"})
    words = ("--node", "gw-1", "--group", "edge", "--state-dir", fleet.state("gw-1"))
    done = fleet.run("agent", "--once", *words)
    assert (done.returncode, "do not match their checksum" in done.stderr) == (3, True)
    store.txn({piece: item.value})
    fleet.call("agent", "--once", *words)
    fleet.call("fleet", "wait", "web", "--timeout", "0")
    store.close()
