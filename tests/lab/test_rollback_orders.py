"""scenarios of rollbacks in both orders, modes and families, and what is refused."""

from __future__ import annotations

import json
import time

import pytest
from scenario_run import assert_passes

from natkeep.lab.criu_restore import Machine
from natkeep.lab.lab import Lab
from natkeep.plan.connection_state import ONE_WAY_S

pytestmark = [pytest.mark.root, pytest.mark.lab]


@pytest.mark.parametrize(
    ("family", "mode", "order"),
    [
        (4, "stateless", ("destination", "gateway")),
        (6, "stateful", ("destination", "gateway")),
        (6, "stateless", ("gateway", "destination")),
    ],
)
def test_no_peer_hears_of_a_rollback_whichever_machine_comes_first(
    family: int, mode: str, order: tuple[str, ...]
) -> None:
    assert_passes("rollback_in_any_order", family, mode, order=order)


@pytest.mark.parametrize(("family", "mode"), [(4, "stateless"), (6, "stateful")])
def test_what_was_to_move_on_goes_back_to_where_it_was(family: int, mode: str) -> None:
    assert_passes("rollback_to_second_host", family, mode)


@pytest.mark.parametrize("mode", ["stateful", "stateless"])
def test_a_gateway_refuses_once_the_process_has_spoken_and_a_move_that_carries_has_no_drift(
    mode: str,
) -> None:
    """In mode stateless nothing is tracked there: no entry counts, and none ends."""
    with Lab("lab", engine="repair", mode=mode) as lab:
        lab.begin(connections=2, pause=True)
        lab.freeze()
        machines = {role: Machine(lab, role) for role in ("gateway", "destination")}
        for machine in machines.values():
            machine.prepare("web", "--mode", mode, *lab.frozen.options)
        gateway, destination = machines.values()
        gateway.natkeep("open", "web")
        opened = time.monotonic()
        lab.at = destination.host
        lab.engine.restore(lab.at, lab.traffic.server, lab.frozen, destination.hook("web"))
        lab.note_restored()
        lab.traffic.client_says()
        gateway.refuses("live and will break", "teardown", "web")
        gateway.refuses("the process of web has spoken at NEW", "rollback", "web")
        destination.refuses("web was opened", "rollback", "web")
        time.sleep(max(opened + ONE_WAY_S + 0.5 - time.monotonic(), 0))
        lab.traffic.client_says()
        told = {}
        for role, machine in machines.items():
            done = machine.cli.run("status", "web", "--strict", "--json")
            assert done.returncode == 0, done.stderr
            [move] = json.loads(done.stdout)["moves"]
            states = {each["state"] for each in move["connections"]}
            told[role] = move["answered"], *states
        assert told["destination"] == (2, "live")
        assert told["gateway"] == ((None, None) if mode == "stateless" else (2, "live"))
        assert [str(each) for each in lab.report.assertions if not each.ok] == []
        for machine in machines.values():
            machine.natkeep("teardown", "web", "--yes")
