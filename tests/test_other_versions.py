"""Another version of natkeep made the move: it calls things otherwise, or does its steps otherwise.

The other version is a copy of the package in which a few words are changed. Each of the two shows,
repairs, opens and tears down what the other one has made; of two moves the other one stays whole.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from two_hosts import look, make_two_hosts

import natkeep

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]

HERE = Path(natkeep.__file__).parent
CONNECTIONS = {
    "web": "10.2.0.10:5000 10.1.0.2:50001\n10.2.0.10:5001 10.1.0.2:50002\n",
    "other": "10.2.0.10:5000 10.1.0.2:60001\n",
}
ADD_ADDRESSES = "    return steps + [AddAddress(site, old, new_of.get(old)) for old in olds]"
OTHERWISE = {  # what: a file, its words, and the other version's
    "nothing": ("__init__.py", "", ""),
    "the sets": ("plan/base_chains.py", 'return f"kept-', 'return f"conn-'),
    "address chains": ("plan/base_chains.py", '{dispatch}-at-', '{dispatch}-of-'),
    "gates": ("plan/base_chains.py", 'return f"gate-{move_id}"', 'return f"door-{move_id}"'),
    "comments": (
        "plan/base_chains.py",
        "Rule(chain, statements, comment, insert=True)",
        'Rule(chain, statements, f"move-{comment}", insert=True)',
    ),
    "a rule less": (
        "plan/ruleset.py", "objects += _nat_peers(move_id, translation)", "pass",
    ),
    "the order of steps": (
        "plan/step_order.py", ADD_ADDRESSES, f"{ADD_ADDRESSES.replace('steps + ', '')} + steps",
    ),
    "a step more": (
        "plan/step_order.py", ADD_ADDRESSES, ADD_ADDRESSES + " + [RaiseLoopback(site)]",
    ),
}  # fmt: skip


class Version(NamedTuple):
    """A natkeep at a path, and the namespaces that it is to work in."""

    path: Path
    names: dict[str, str]
    state: Path

    def __call__(self, *words: str, text_in: str = "") -> subprocess.CompletedProcess[str]:
        start = f"import sys; sys.path.insert(0, {str(self.path)!r}); import natkeep.cli as c; "
        start += "assert c.__file__.startswith(sys.path[0]); sys.exit(c.program())"
        return subprocess.run(
            [sys.executable, "-c", start, *words, "--state-dir", str(self.state)],
            input=text_in, capture_output=True, text=True, cwd="/",
        )  # fmt: skip

    def do(self, *words: str, text_in: str = "") -> str:
        done = self(*words, text_in=text_in)
        assert done.returncode == 0, (words, done.stdout, done.stderr)
        return done.stdout + done.stderr

    def prepare(self, move_id: str) -> None:
        sites = [f"--site={role}={name}" for role, name in self.names.items()]
        options = ("--map", "10.2.0.10=10.3.0.20", *sites, "--no-hold", "--connections", "-")
        self.do("prepare", move_id, *options, text_in=CONNECTIONS[move_id])


@pytest.fixture
def names(make_netns: Callable[[], str]) -> dict[str, str]:
    return make_two_hosts(make_netns)


def make_versions(what: str, names: dict[str, str], tmp_path: Path) -> list[Version]:
    """Today's natkeep, and the one that does *what* otherwise."""
    file, words, others = OTHERWISE[what]
    copy = tmp_path / "other" / "natkeep"
    shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    text = (copy / file).read_text()
    assert words in text
    (copy / file).write_text(text.replace(words, others) if words else text)
    paths = (HERE.parent, copy.parent)
    return [Version(path, names, tmp_path / "state") for path in paths]


def rules_at(name: str) -> str:
    done = subprocess.run(
        ["ip", "netns", "exec", name, "nft", "-a", "-s", "list", "ruleset"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def lose_a_rule(name: str) -> None:
    """What another program might do: one rule that translates for the first move goes."""
    chain = ""
    for line in rules_at(name).splitlines():
        chain = line.split()[1] if line.strip().startswith("chain ") else chain
        if "web" in line and "dnat" in line and (found := re.search(r"# handle (\d+)", line)):
            command = ["nft", "delete", "rule", "inet", "natkeep", chain, "handle", found[1]]
            subprocess.run(["ip", "netns", "exec", name, *command], check=True)
            return
    raise AssertionError("no such rule")


def without_handles(text: str) -> str:
    return re.sub(r" # handle \d+", "", text)


@pytest.mark.parametrize("later", [True, False], ids=["read by the other", "made by the other"])
@pytest.mark.parametrize("what", OTHERWISE)
def test_a_move_of_another_version_is_shown_repaired_and_undone(
    what: str, later: bool, names: dict[str, str], tmp_path: Path
) -> None:
    ours, other = make_versions(what, names, tmp_path)
    maker, reader = (ours, other) if later else (other, ours)
    before = look(names)
    for move_id in CONNECTIONS:
        maker.prepare(move_id)
    maker.do("open", "other")
    reader.do("open", "web")
    maker.do(
        "repair", "other"
    )  # which takes the base chain of the gates away, as open has begun to
    whole = {name: without_handles(rules_at(name)) for name in names.values()}

    assert "DRIFT" not in reader.do("status", "--strict").upper()
    assert "nothing to repair" in reader.do("repair", "web")
    assert whole == {name: without_handles(rules_at(name)) for name in names.values()}

    lose_a_rule(names["gateway"])
    assert reader("status", "web", "--strict").returncode == 6
    reader.do("repair", "web")
    assert sorted(whole[names["gateway"]].splitlines()) == sorted(
        without_handles(rules_at(names["gateway"])).splitlines()
    )
    reader.do("status", "--strict")

    reader.do("teardown", "web", "--yes")
    assert not any(re.search(r"\bweb\b", rules_at(name)) for name in names.values())
    maker.do("status", "other", "--strict")
    reader.do("teardown", "other", "--yes")
    assert look(names) == before
