"""plan/findings.py and plan/diagnostics.py: what a finding says, and the verdict of several."""

from __future__ import annotations

from natkeep import report
from natkeep.plan.diagnostics import ABOUT_A_MOVE, Facts, find
from natkeep.plan.findings import CATALOGUE, Finding, Severity, ok
from natkeep.plan.move import Site
from natkeep.plan.roles import Role

HERE = Site(Role.GATEWAY)


def make_facts(**more: object) -> Facts:
    facts = dict.fromkeys(Facts.__slots__[:14])
    facts.update(
        privileged=True, libnftables=True, tables_readable=True, entries=5, limit=100,
        legacy_tables=(), flowtables=(), nat_chains=(), virtual_servers=False,
        bridge_netfilter=False,
    )  # fmt: skip
    return Facts(**{**facts, **more})  # type: ignore[arg-type]


def test_a_line_says_the_result_the_code_and_where() -> None:
    findings = [
        ok(HERE, "all well"),
        Finding("xdp", HERE, "attached to eth0"),
        Finding("forwarding-off", HERE, "it is 0", "switch it on"),
    ]

    assert [*report.finding_lines(findings, "this move")] == [
        "ok    gateway: all well",
        "warn  xdp gateway: attached to eth0",
        "stop  forwarding-off gateway: it is 0",
        "      (switch it on)",
        "1 stops this move; 1 warning",
    ]
    assert [*report.finding_lines(findings[:1], "a move")][-1] == "nothing stops a move"


def test_json_has_each_look_and_of_findings_only_those_with_a_code() -> None:
    document = report.findings_to_json([ok(HERE, "all well"), Finding("xdp", None, "eth0")])

    assert [one["result"] for one in document["looks"]] == ["ok", "warn"]
    assert [(one["code"], one["site"]) for one in document["findings"]] == [("xdp", None)]
    assert (document["stops"], document["warns"]) == (0, 1)


def test_what_a_move_looks_at_more_closely_is_no_finding_of_the_machine_then() -> None:
    facts = make_facts(rp_filter=1, virtual_servers=True, flowtables=("inet f t",))

    alone = {one.code for one in find(HERE, facts)} - {""}
    of_move = {one.code for one in find(HERE, facts, of_move=True)} - {""}

    assert alone == {"reverse-path-filter", "virtual-servers", "flowtable"}
    assert of_move == set()
    assert CATALOGUE.keys() >= ABOUT_A_MOVE


def test_a_full_table_stops_and_is_not_called_well() -> None:
    found = [*find(HERE, make_facts(entries=95))]

    assert [one.code for one in found if one.severity == Severity.STOP] == ["conntrack-full"]
    assert not [one for one in found if "95" in one.detail and one.severity == Severity.OK]
