"""kernel/rawrule.py: the rule that opens a gate is the one that nft would have made."""

from __future__ import annotations

import re
import subprocess

import pytest

from natkeep.kernel import nft, rawrule
from natkeep.kernel.netns import inside, open_namespace
from natkeep.plan.move import Role, Site
from natkeep.plan.reception import callers_chain
from natkeep.plan.resets import render_open, reset_chain
from natkeep.plan.ruleset import OPEN, TABLE, gate_chain
from natkeep.plan.steps import OpenGate

pytestmark = [pytest.mark.root, pytest.mark.needs("nftables")]


def listed(netns: str, *options: str) -> str:
    command = ["ip", "netns", "exec", netns, "nft", *options, "list", "ruleset"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.sub(r"\"handle\": \d+", "", text)  # each table that is made gets another


@pytest.mark.parametrize("role", [Role.DESTINATION, Role.GATEWAY])
def test_the_raw_rule_is_the_one_that_the_plan_describes(role: Role, netns: str) -> None:
    step = OpenGate(Site(role, netns), "web")
    chains = [f"add table inet {TABLE}"]
    for chain in (gate_chain("web"), callers_chain("web")):
        chains += [f"add chain inet {TABLE} {chain}", f"add rule inet {TABLE} {chain} drop"]
    shown = []
    for raw in (True, False):
        with inside(open_namespace(netns)):
            nft.run_transaction(chains)
            if raw:
                rawrule.insert_accepts(TABLE, step.accepts(), OPEN)
            else:
                nft.run_transaction(step.lines())
        shown.append((listed(netns), listed(netns, "--json")))
        with inside(open_namespace(netns)):
            nft.run_transaction([f"delete table inet {TABLE}"])
    assert shown[0] == shown[1]
    assert 'accept comment "open"' in shown[0][0]


def test_so_is_the_rule_that_resets(netns: str) -> None:
    chain = reset_chain("web")
    shown = []
    for raw in (True, False):
        with inside(open_namespace(netns)):
            nft.run_transaction([f"add table inet {TABLE}", f"add chain inet {TABLE} {chain}"])
            if raw:
                rawrule.insert_reset(TABLE, chain, OPEN)
            else:
                nft.run_transaction([render_open("web")])
        shown.append((listed(netns), listed(netns, "--json")))
        with inside(open_namespace(netns)):
            nft.run_transaction([f"delete table inet {TABLE}"])
    assert shown[0] == shown[1]
    assert 'reject with tcp reset comment "open"' in shown[0][0]


def test_all_rules_are_inserted_or_none(netns: str) -> None:
    with inside(open_namespace(netns)):
        nft.run_transaction([f"add table inet {TABLE}", f"add chain inet {TABLE} here"])
        with pytest.raises(FileNotFoundError):
            rawrule.insert_accepts(TABLE, [("here", False), ("not-here", True)], OPEN)
    assert "accept" not in listed(netns)
