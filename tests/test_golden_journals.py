"""journals of each schema, as they were written then, are torn down by today's natkeep.

tests/golden_journals/SCHEMA/CASE/ has the state directory of each move of cases.py. The sites are
made by today's natkeep, whose journal is then exchanged for the golden one; schema 1 was written by
natkeep 71f2c80 in the same network. NATKEEP_GOLDEN=write writes those of today's schema.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from earlier_natkeep import remove_later
from golden_journals.cases import CASES, Case

from bench.faults.surfaces import read_all_surfaces
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import open_namespace
from natkeep.lifecycle.executor import Executor
from natkeep.lifecycle.open import open_move
from natkeep.lifecycle.prepare import carry_out, prepare
from natkeep.lifecycle.repair import ADDED, repair
from natkeep.lifecycle.status import read_status
from natkeep.lifecycle.teardown import teardown
from natkeep.plan.identity import Identity
from natkeep.plan.move import Site
from natkeep.plan.observation import Gate
from natkeep.plan.step_order import make_plan
from natkeep.state.codec import SCHEMA, namespaces_to_json
from natkeep.state.directory import StateDirectory, read_boot_id
from natkeep.values import replace

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

GOLDEN = Path(__file__).with_name("golden_journals")
SCHEMAS = sorted(path.name for path in GOLDEN.iterdir() if path.name.isdigit())
NETWORK = """
link add gate0 netns {gateway} type veth peer name dest0 netns {destination}
-n {gateway} link set gate0 addrgenmode none up
-n {destination} link set dest0 addrgenmode none up
-n {gateway} address add 10.3.0.1/24 dev gate0
-n {gateway} address add fd00:3::1/64 dev gate0 nodad
-n {destination} address add 10.3.0.20/24 dev dest0
-n {destination} address add fd00:3::20/64 dev dest0 nodad
-n {destination} route add 10.1.0.0/24 via 10.3.0.1
-n {destination} route add fd00:1::/64 via fd00:3::1
"""


@pytest.fixture
def names(make_netns: Callable[[], str]) -> dict[str, str]:
    """The name of the namespace of each role."""
    names = {role: make_netns() for role in ("gateway", "destination", "source")}
    for line in NETWORK.strip().splitlines():
        subprocess.run(["ip", *line.format(**names).split()], check=True)
    for role, device in (("gateway", "gate0"), ("destination", "dest0")):
        path = f"/sys/class/net/{device}/operstate"
        while "up" not in subprocess.getoutput(f"ip netns exec {names[role]} cat {path}"):
            time.sleep(0.05)
    return names


def look(names: dict[str, str]) -> dict[str, str]:
    return {
        f"{role}: {surface}": text
        for role, name in names.items()
        for surface, text in read_all_surfaces(name).items()
    }


def make(executor: Executor, case: Case, names: dict[str, str]) -> None:
    """Prepare the move in these namespaces, and open it if it was."""
    sites = tuple(Site(site.role, names[site.netns]) for site in case.move.sites)
    move = replace(case.move, sites=sites)
    if move.quiesces:
        executor.open_sites(move)
        plan = make_plan(move, case.connections)
        carry_out(executor, plan, case.connections, Gate.CLOSED, None)
        return
    prepare(executor, move, case.connections)
    if case.opened:
        open_move(executor, "web", lambda journal: case.image)


def exchange(golden: Path, state: Path, names: dict[str, str]) -> None:
    """Put the golden files in the place of those that there are, for these namespaces."""
    lines = (golden / "web.journal").read_text().splitlines(keepends=True)
    header = json.loads(lines[0])
    for site in header["move"]["sites"]:
        site["netns"] = names[site["role"]]
    ours = [open_namespace(site["netns"]).identity for site in header["move"]["sites"]]
    header |= {"boot": read_boot_id()} | namespaces_to_json(ours)
    if "cookies" not in json.loads(lines[0]):  # which natkeep 0.1 did not write
        header.pop("cookies", None)
    for name in ("web.ready", "web.connections", "web.changed"):
        (state / name).unlink(missing_ok=True)
    for path in golden.iterdir():
        shutil.copy(path, state / path.name)
        (state / path.name).chmod(0o600)
    (state / "web.journal").write_text("".join([json.dumps(header) + "\n", *lines[1:]]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_it_is_torn_down_without_a_trace(
    schema: str, case: str, names: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "state"
    state = StateDirectory(str(path), create=True)
    executor = Executor(LinuxKernel(state.path), state)
    before = look(names)
    make(executor, CASES[case], names)
    if os.environ.get("NATKEEP_GOLDEN") == "write" and schema == str(SCHEMA):
        write(path, GOLDEN / schema / case)
    exchange(GOLDEN / schema / case, path, names)
    assert read_status(executor, ("web",))[0].plan.move.id == "web"
    teardown(executor, "web")

    assert look(names) == before
    assert os.listdir(path) == ["lock"]


@pytest.mark.parametrize("case", ["stateful", "stateful-opened", "live-changed-opened"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_what_an_earlier_natkeep_had_no_rules_for_is_no_drift_and_added_by_a_repair(
    schema: str, case: str, names: dict[str, str], tmp_path: Path
) -> None:
    path = tmp_path / "state"
    state = StateDirectory(str(path), create=True)
    executor = Executor(LinuxKernel(state.path), state)
    before = look(names)
    make(executor, CASES[case], names)
    exchange(GOLDEN / schema / case, path, names)
    whole = {name: read_ruleset(name) for name in names.values()}
    for name in names.values():
        remove_later(name)

    assert [site.drift for site in read_status(executor, ("web",))[0].sites] == [(), ()]
    assert {one.drift for one in repair(executor, "web")} == {ADDED}
    assert {name: read_ruleset(name) for name in names.values()} == whole
    assert repair(executor, "web") == ()
    teardown(executor, "web")
    assert look(names) == before


def read_ruleset(netns: str) -> list[str]:
    """Each chain and set, whatever their order; not what goes once all gates are open."""
    text = subprocess.getoutput(f"ip netns exec {netns} nft list ruleset") + "\n"
    blocks = re.split(r"(?m)^\t}\n+", re.sub(r"(?m)^table .*\n|^}\n", "", text))
    return sorted(block for block in blocks if "chain gate {" not in block)


def write(state: Path, golden: Path) -> None:
    shutil.rmtree(golden, ignore_errors=True)
    golden.mkdir(parents=True)
    for name in ("web.connections", "web.changed"):
        if (state / name).exists():
            shutil.copy(state / name, golden / name)
    first, *lines = (state / "web.journal").read_text().splitlines(keepends=True)
    header = json.loads(first)
    for site in header["move"]["sites"]:
        site["netns"] = site["role"]
    sites = [Identity(4, 1, 1)] * len(header["namespaces"])
    header |= {"boot": str(UUID(int=0))} | namespaces_to_json(sites)
    header = json.dumps(header, separators=(",", ":"))
    (golden / "web.journal").write_text("".join([header + "\n", *lines]))
