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
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from earlier_natkeep import remove_later
from golden_journals.cases import CASES, LATER, Case
from two_hosts import look, run_ip

from natkeep.checkpoint import Checkpoint
from natkeep.errors import RefusedError
from natkeep.kernel.linux import LinuxKernel
from natkeep.kernel.netns import open_namespace
from natkeep.lab.ipv6_addresses import await_addresses
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
    run_ip(NETWORK, names)
    for role, device in (("gateway", "gate0"), ("destination", "dest0")):
        path = f"/sys/class/net/{device}/operstate"
        while "up" not in subprocess.getoutput(f"ip netns exec {names[role]} cat {path}"):
            time.sleep(0.05)
        await_addresses(names[role])
    return names


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


def load_earlier_rules(case: str, names: dict[str, str]) -> None:
    """In the place of today's rules those that the journals' natkeeps had, as nft listed them.

    But for the raw ones, which nft lists and does not read. Of a live process a gateway had none.
    """
    for path in (GOLDEN / "rules" / case).iterdir():
        text = path.read_text()
        tables = re.findall(r"(?m)^table (\w+ natkeep) {", text)
        deletion = "".join(f"delete table {table}\n" for table in tables)
        load(deletion + text, names[path.stem])
    if case == "live":
        load("delete table inet natkeep\n", names["gateway"])


def load(text: str, netns: str) -> None:
    """By nft, in the network namespace of that name."""
    within = ["ip", "netns", "exec", netns, "nft", "-f", "-"]
    subprocess.run(within, check=True, input=text, text=True)


@pytest.fixture
def opened(tmp_path: Path) -> Executor:
    """On a state directory of its own."""
    state = StateDirectory(str(tmp_path / "state"), create=True)
    return Executor(LinuxKernel(state.path), state)


def put_earlier(executor: Executor, schema: str, case: str, names: dict[str, str]) -> None:
    """As if a natkeep that wrote this schema had done the move of this case."""
    make(executor, CASES[case], names)
    load_earlier_rules(case, names)
    exchange(GOLDEN / schema / case, Path(executor.state.path), names)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_it_is_shown_and_repaired(
    schema: str, case: str, names: dict[str, str], opened: Executor
) -> None:
    before = look(names)
    put_earlier(opened, schema, case, names)

    assert not any(site.drift for site in read_status(opened, ("web",))[0].sites)
    assert {one.drift for one in repair(opened, "web")} <= {ADDED}
    assert not any(site.drift for site in read_status(opened, ("web",))[0].sites)
    assert repair(opened, "web") == ()
    teardown(opened, "web")
    assert look(names) == before


@pytest.mark.parametrize("case", ["stateful", "held", "unkept"])
@pytest.mark.parametrize("schema", SCHEMAS)
def test_it_is_opened_by_the_hook(
    schema: str, case: str, names: dict[str, str], opened: Executor, tmp_path: Path
) -> None:
    before = look(names)
    put_earlier(opened, schema, case, names)
    within = ["ip", "netns", "exec", names["destination"]]
    with subprocess.Popen([*within, "cat"], stdin=subprocess.PIPE) as tree:
        called = subprocess.run(
            [Path(sys.executable).with_name("natkeep-hook")],
            env={
                "PATH": os.environ["PATH"], "CRTOOLS_SCRIPT_ACTION": "post-restore",
                "CRTOOLS_INIT_PID": str(tree.pid), "CRTOOLS_IMAGE_DIR": str(tmp_path),
                "NATKEEP_ID": "web", "NATKEEP_STATE_DIR": opened.state.path,
            },
            capture_output=True, text=True,
        )  # fmt: skip
        tree.communicate()
    assert (called.returncode, called.stderr) == (0, "natkeep-hook: web: gate open\n")
    [status] = read_status(opened, ("web",))
    assert (status.gate, [site.drift for site in status.sites if site.drift]) == (Gate.OPEN, [])
    teardown(opened, "web")
    assert look(names) == before


@pytest.mark.parametrize("schema", SCHEMAS)
def test_one_of_a_live_process_is_opened_where_its_image_has_nothing_new(
    schema: str, names: dict[str, str], opened: Executor
) -> None:
    """Else it is refused: the rules of two natkeeps are not mixed."""
    before = look(names)
    put_earlier(opened, schema, "live", names)
    with pytest.raises(RefusedError, match="by another version of natkeep"):
        open_move(opened, "web", lambda journal: Checkpoint(LATER))
    kept = opened.state.load("web").connections
    open_move(opened, "web", lambda journal: Checkpoint(kept))
    [status] = read_status(opened, ("web",))
    assert (status.gate, [site.drift for site in status.sites if site.drift]) == (Gate.OPEN, [])
    teardown(opened, "web")
    assert look(names) == before


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
    load_earlier_rules(case, names)
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
    repaired = {name: read_ruleset(name) for name in names.values()}
    if CASES[case].opened:  # every peer is taken for one that was heard
        for name, blocks in whole.items():
            whole[name] = [fill_as_kept(each, blocks) for each in blocks]
    assert repaired == whole
    assert repair(executor, "web") == ()
    teardown(executor, "web")
    assert look(names) == before


def fill_as_kept(block: str, blocks: list[str]) -> str:
    """The set of peers that were heard with all that are kept; any other *block* as it is."""
    if not block.startswith("\tset heard-"):
        return block
    kept = next(
        each for each in blocks if each.startswith(block.split(" {")[0].replace("heard", "kept"))
    )
    return block.rstrip("\n") + "\n" + kept[kept.index("\t\telements") :]


def read_ruleset(netns: str) -> list[str]:
    """Each chain and set, whatever their order; not what goes once all is open and heard."""
    text = subprocess.getoutput(f"ip netns exec {netns} nft list ruleset") + "\n"
    blocks = re.split(r"(?m)^\t}\n+", re.sub(r"(?m)^table .*\n|^}\n", "", text))
    goes = ("chain gate {", "chain early-resets {")
    return sorted(block for block in blocks if not any(name in block for name in goes))


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
