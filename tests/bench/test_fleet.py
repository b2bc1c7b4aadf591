"""tests of bench/fleet.py: it comes to its end, with all its figures, and leaves nothing."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fleet_nodes import Fleet
from running import is_running

# bench/ is a program beside the package and no part of it.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from bench import fleet as bench
from bench.__main__ import ROOT
from bench.fleet import compare, measure_ready, wait_told
from bench.namespaces import PREFIX
from natkeep.fleet.directory import DirectoryStore
from natkeep.fleet.want import Phase

COMMAND = [sys.executable, "-m", "bench.fleet"]
TINY = ("--moves=4", "--agents=2", "--rounds=1")
NAMES = [
    "4 moves at one gateway: prepared and told, s",
    "4 moves at one gateway: undone and told, s",
    "4 moves at one gateway: memory of the agent, MiB",
    "ordered to all ready, median, ms",
    "2 agents, 4 wants: all told, s",
]


def find_left(pid: int) -> list[Path]:
    """The namespaces and directories of a bench that has this pid, which it is to remove."""
    name = f"{PREFIX}{pid}"
    return [*Path("/run/netns").glob(f"{name}-*"), *Path("/dev/shm").glob(f"{name}*")]


@pytest.mark.root
@pytest.mark.needs("etcd")
def test_a_tiny_run_has_all_figures_and_says_whether_they_hold(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    with subprocess.Popen(
        [*COMMAND, *TINY, f"--json={path}"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        said = process.communicate(timeout=200)[0]
    document = json.loads(path.read_text())
    figures = document["figures"]
    assert [figure["what"] for figure in figures] == NAMES
    assert all(name in said for name in NAMES)
    assert all(figure["reached"] > 0 for figure in figures)
    assert process.returncode == (0 if all(figure["ok"] for figure in figures) else 1)
    assert (len(document["ready_ms"]), len(document["gateway"])) == (1, 3)
    assert find_left(process.pid) == []


@pytest.mark.root
@pytest.mark.needs("etcd")
def test_one_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, *TINY, "--only=ready", f"--json={tmp_path / 'fleet.json'}"], cwd=ROOT
    )
    children: set[int] = set()
    try:
        until = time.monotonic() + 60
        while not Path("/run/netns", f"{PREFIX}{process.pid}-s").exists():
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        children = {*map(int, text.split())}
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 143
    assert len(children) >= 3, "etcd's members"
    assert not any(map(is_running, children))
    assert find_left(process.pid) == []
    assert not (tmp_path / "fleet.json").exists()


def test_what_was_left_out_is_no_figure_and_what_misses_is_said() -> None:
    unknown = (math.nan,) * 3
    assert [each.what for each in compare(4, 2, unknown, [1.0], math.nan)] == NAMES[3:4]
    assert [each.ok for each in compare(4, 2, (1, 1, 1), [151.0], 1)] == [True] * 3 + [False, True]


@pytest.mark.parametrize(
    ("alive", "why"), [(2, "3 agents live"), (3, "all is ready")], ids=["not alive", "not ready"]
)
def test_what_does_not_come_ends_the_bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: int, why: str
) -> None:
    """Agents that only say that they live."""
    monkeypatch.setattr(bench, "PATIENCE", 0.0)
    store = DirectoryStore(str(tmp_path / "store"))
    fleet = Fleet(tmp_path, store)
    for node, groups in [("host-b", ()), ("gw", ("edge",)), ("host-a", ())][:alive]:
        fleet.add(node, groups=groups)
    with pytest.raises(SystemExit, match=why):
        measure_ready(store, 1)
    with pytest.raises(SystemExit, match="gw has not told 1 times open"):
        wait_told(store, {"gw": range(1)}, Phase.OPEN)
    store.close()
