"""What an agent sees of its moves, and says: how many connections live, and what is missing."""

from __future__ import annotations

import json
import queue
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fleet_nodes import Fleet
from fleet_processes import Processes
from fleet_restores import fleet as fleet
from fleet_restores import hear_hooks, prepare_in_hook
from two_hosts import make_two_hosts

from natkeep.fleet import keys, observed
from natkeep.fleet.done import Done, parse_done
from natkeep.fleet.observed import Observed, Observer
from natkeep.fleet.want import Phase

PREPARED, OPEN = Phase.PREPARED, Phase.OPEN


def test_a_move_is_looked_at_when_it_is_calm_and_then_seldom() -> None:
    phases: dict[str, Phase] = {}
    observer = Observer("/nowhere", lambda: phases, lambda seen: None)
    at = observer._again - observed._EVERY
    assert observer.find_due(at) == set()
    phases |= {"web": PREPARED, "mail": OPEN}
    assert observer.find_due(at + 1) == set(), "it may be in its blackout"
    phases["web"] = OPEN
    assert observer.find_due(at + 5.9) == set()
    assert observer.find_due(at + 6) == {"mail"}
    observer.note({"mail"}, at + 6, 0.1)
    assert observer.find_due(at + 10.9) == {"web"}
    observer.note({"web"}, at + 10.9, 0.1)
    assert observer.find_due(at + 29) == set()
    assert observer.find_due(at + 30) == {"mail", "web"}
    observer.note({"mail", "web"}, at + 30, 20.0)
    assert observer.find_due(at + 229) == set(), "what takes long is done the less often"
    del phases["mail"]
    assert observer.find_due(at + 230) == {"web"}


def test_what_is_due_is_looked_at_and_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observed, "_CALM", 0.0)
    monkeypatch.setattr(observed, "_TICK", 0.01)
    looked: queue.Queue[tuple[str, set[str]]] = queue.Queue()

    def look(directory: str, ids: set[str]) -> dict[str, Observed]:
        looked.put((directory, ids))
        return {"web": Observed(3), "another": Observed(1)}

    monkeypatch.setattr(observed, "look", look)
    handed: queue.Queue[dict[str, Observed]] = queue.Queue()
    phases = {"web": OPEN}
    Observer("/run/natkeep", lambda: phases, handed.put).start()
    assert looked.get(timeout=30) == ("/run/natkeep", {"web"})
    assert handed.get(timeout=30) == {"web": Observed(3)}
    phases.clear()  # its thread stays, and looks no more
    assert looked.empty(), "once, until something changes"


def test_what_was_seen_is_said_and_wakes_no_other(fleet: Fleet) -> None:
    host_b, gateway = fleet.nodes["host-b"].agent, fleet.nodes["gw-1"].agent
    assert host_b is not None
    assert gateway is not None
    prepare_in_hook(fleet.nodes["host-b"])
    hear_hooks(fleet)
    assert host_b.known.phases() == {"criu-7-1a": PREPARED}
    before = fleet.store.range(keys.TOP).revision
    seen = Observed(2, ("address 10.2.0.10: not on this host",))
    host_b.note_observed({"criu-7-1a": seen, "another": Observed(0)})
    assert fleet.done("host-b").observed == seen
    again = fleet.store.range(keys.TOP).revision
    assert again != before
    host_b.note_observed({"criu-7-1a": seen})
    assert fleet.store.range(keys.TOP).revision == again

    fleet.turn()
    assert fleet.done("host-b").observed == seen, "the same phase, as it was seen"
    told = keys.dones("host-b")
    heard = fleet.nodes["gw-1"]._hear(gateway, told)
    assert heard == set()
    host_b.note_observed({"criu-7-1a": Observed(1)})
    assert fleet.nodes["gw-1"]._hear(gateway, told) == set()
    fleet.end(force=True)
    fleet.turn()
    assert fleet.done("host-b").observed is None


def test_one_that_is_killed_in_the_middle_says_what_it_saw(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = b'{"id": "web", "alive": 2, "drift": []}\n{"id": "mail", "ali'
    done = subprocess.CompletedProcess([], -9, said, b"")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert observed.look("/nowhere", {"web", "mail"}) == {"web": Observed(2)}
    done.stdout = b'{"id": []}\n\xff\n7\n'
    assert observed.look("/nowhere", {"web"}) == {}


def test_what_a_person_reads() -> None:
    seen = Observed(2, ("address 10.2.0.10: not on this host", "x"))
    drifted = "DRIFTED: address 10.2.0.10: not on this host (and 1 more)"
    assert seen.describe(OPEN) == ["2 live", drifted]
    assert seen.describe(PREPARED) == [drifted]
    assert Observed(0).describe(PREPARED) == []


def test_it_is_read_as_it_is_written() -> None:
    done = Done(OPEN, 3, observed=Observed(2, ("x",)))
    assert parse_done(done.write(0)) == done
    text = json.dumps({**json.loads(done.write(0)), "observed": {"alive": -1, "drift": []}})
    assert parse_done(text).generation == 0
    found = json.loads(done.write(0))
    del found["observed"]  # of an earlier natkeep
    assert parse_done(json.dumps(found)) == Done(OPEN, 3)


@pytest.mark.root
def test_a_process_of_its_own_looks(tmp_path: Path, make_netns: Callable[[], str]) -> None:
    names = make_two_hosts(make_netns)
    fleet = Processes(tmp_path, names, f"dir:{tmp_path}/store")
    try:
        state = fleet.state("gw-1")
        fleet.call(
            "prepare", "a", "--map", "10.2.0.10=10.3.0.20", "--site",
            f"gateway={names['gateway']}", "--gate", "open", "--connections",
            str(tmp_path / "list"), "--state-dir", state,
        )  # fmt: skip
        assert observed.look(state, {"a"}) == {"a": Observed(2)}
        nft = ["ip", "netns", "exec", names["gateway"], "nft", "delete", "table", "inet", "natkeep"]
        subprocess.run(nft, check=True)
        [drifted] = observed.look(state, {"a"}).values()
        assert "nothing of move a is there" in drifted.drift[0]
        assert observed.look(str(tmp_path / "none"), {"a"}) == {}
        assert observed.look(state, {"none"}) == {}
        fleet.call("teardown", "a", "--yes", "--state-dir", state)
    finally:
        fleet.close()
