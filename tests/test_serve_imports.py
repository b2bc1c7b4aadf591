"""What `natkeep serve` imports before it is asked: all that is needed while the process is frozen.

Each verb that a migration asks of a host from the freeze on is asked of a `serve` of its own, which
must import no more of natkeep's, nor a library: the list in cli/serve.py cannot go stale.
"""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from two_hosts import make_two_hosts, run_ip

from natkeep.cli.parser import VERBS
from natkeep.kernel.netns import entered

pytestmark = [pytest.mark.root, pytest.mark.whole, pytest.mark.needs("nftables")]
ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT / "tests/checkpoint/corpus"
BEFORE = {"check", "plan"}
"""Verbs that are asked only while the process runs still."""

NETWORK = """
netns exec {gateway} sysctl -qw net.ipv4.conf.all.forwarding=1 net.ipv6.conf.all.forwarding=1
-n {gateway} link set gate0 up
-n {destination} link set dest0 up
-n {gateway} link add peer0 type veth peer name peer1
-n {gateway} link set peer0 addrgenmode none up
-n {gateway} link set peer1 addrgenmode none up
-n {gateway} address add 10.1.0.1/24 dev peer0
-n {gateway} address add fd00:1::1/64 dev peer0 nodad
-n {gateway} address add fd00:3::1/64 dev gate0 nodad
-n {destination} address add fd00:3::20/64 dev dest0 nodad
-n {destination} route add fd00:1::/64 via fd00:3::1
"""

PROBE = """
import sys
from natkeep.cli import main, serve
do = serve._do
def noting(request, parser):
    before = {*sys.modules}
    answer = do(request, parser)
    late = {*sys.modules} - before
    others = [name for name in late if name.partition(".")[0] not in sys.stdlib_module_names]
    return {**answer, "late": sorted(others)}
serve._do = noting
sys.exit(main(["serve", "web", "--stdio"]))
"""


class Asked:
    """A host of which each verb is asked by a `serve` that has done nothing before."""

    def __init__(self, state: Path) -> None:
        self.environment = {**os.environ, "NATKEEP_STATE_DIR": str(state)}
        self.late: dict[str, list[str]] = {}
        self.verbs: set[str] = set()

    def __call__(self, *words: str, stdin: str = "") -> str:
        request = json.dumps({"natkeep": words, "stdin": stdin})
        done = subprocess.run(
            [sys.executable, "-c", PROBE], input=f"{request}\n", env=self.environment,
            capture_output=True, text=True,
        )  # fmt: skip
        answer = json.loads(done.stdout.splitlines()[1])
        assert answer["exit"] == 0, (words, answer["stderr"])
        if answer["late"]:
            self.late[" ".join(words)] = answer["late"]
        self.verbs.add(words[0])
        return str(answer["stdout"])


def find_verbs() -> set[str]:
    """Those of natkeep's verbs with which a call or a list in natkeep/migrate/ begins."""
    found = set()
    for path in ROOT.glob("natkeep/migrate/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            words = node.args if isinstance(node, ast.Call) else getattr(node, "elts", [])
            if words and isinstance(words[0], ast.Constant) and words[0].value in VERBS:
                found.add(str(words[0].value))
    return found


@pytest.mark.parametrize("kind", ["plain", "udp"])
def test_from_the_freeze_on_no_verb_imports_anything(
    kind: str, make_netns: Callable[[], str], tmp_path: Path
) -> None:
    names = make_two_hosts(make_netns)
    run_ip(NETWORK, names)
    image, maps = str(CORPUS / kind), ["--map", "10.2.0.10=10.3.0.20"]
    maps += ["--map", "fd00:2::10=fd00:3::20"]
    ask = Asked(tmp_path / "state")
    there, here = names["destination"], names["gateway"]

    listed = ask("inspect", image, *maps, "--json")
    ask("inspect", image, *maps, "--list")
    for role, at in (("destination", there), ("gateway", here)):
        ask("prepare", "web", *maps, "--site", f"{role}={at}", "--connections", "-", stdin=listed)
        if role == "destination":
            ask("open", "web", "--connections", "-", "--compare", stdin=listed)
            ask("open", "web")
        else:
            ask("open", "web", "--connections", "-", stdin=listed)
            ask("status", "--json")
            ask("rollback", "web", "--yes")
        ask("teardown", "web", "--yes", "--drop", "0")
    with entered(here):
        listener = socket.create_server(("", 5000))
    ask("quiesce", "web", *maps, "--port", "5000", "--site", f"source={here}")
    ask("prepare", "web", *maps, "--image", image, "--site", f"source={here}")
    ask("teardown", "web", "--yes")
    listener.close()
    relay = ["--map", "10.2.0.10=10.3.0.20", "--via", "10.3.0.1", "--site", f"relay={here}"]
    ask("prepare", "web", *relay, "--image", image)
    ask("open", "web")
    ask("rollback", "web", "--yes")
    ask("teardown", "web", "--yes")
    assert ask.late == {}
    assert ask.verbs == find_verbs() - BEFORE
