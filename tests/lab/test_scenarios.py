"""every scenario with every engine, and the proof that a scenario can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import blocks_of

from natkeep.lab import engines, scenario
from natkeep.lab.engine import EngineError
from natkeep.lab.engines.criu import find_criu
from natkeep.lab.report import SCHEMA, Assertion, Report, render_report
from natkeep.lab.scenario import Scenario, find_scenario, scenarios

ROOT = Path(__file__).resolve().parents[2]
ENGINES = [pytest.param("criu", marks=pytest.mark.criu), "repair"]
marked = pytest.mark.parametrize("engine", ENGINES)


def named(names):
    return pytest.mark.parametrize("name", names)


def by_criu(name: str):
    """The parameters of a scenario by CRIU; one of them is the move of `make test-quick`."""
    quick = [pytest.mark.quick] if name == "server_moves_to_new_address" else []
    needs = {"sshd": name.startswith("migrate_"), "aioquic": name == "quic_goes_on"}
    marks = [pytest.mark.needs(tool) for tool, needed in needs.items() if needed]
    return pytest.param(name, "criu", marks=[pytest.mark.criu, *quick, *marks])


def is_for(each: Scenario, engine: str) -> bool:
    """Whether a scenario is for all engines, or for this one (test_runc.py has containers')."""
    return each.load()[1].get("engine", engine) == engine


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *(by_criu(each.name) for each in scenarios() if is_for(each, "criu")),
        *((each.name, "repair") for each in scenarios() if is_for(each, "repair")),
    ],
)  # fmt: skip
def test_scenario_passes(name, engine):
    report = scenario.run(find_scenario(name), engine=engine)

    assert [str(each) for each in report.assertions if not each.ok] == []
    assert report.passed
    assert report.before == report.after != []
    assert report.resets == 0
    assert report.segments > 0
    assert report.blackout_ms is not None
    assert report.stall_ms is not None


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.criu
def test_the_scenario_of_the_page_passes(tmp_path):
    [block] = blocks_of("test_the_scenario_of_the_page_passes")
    file = tmp_path / "of_the_page.py"
    file.write_text(block.text)
    report = scenario.run(Scenario(file.stem, file))

    assert [str(each) for each in report.assertions if not each.ok] == []
    assert report.passed


@pytest.mark.root
@pytest.mark.lab
@marked
def test_without_translation_the_verdict_is_fail(engine):
    """The lab can tell the difference: the socket is restored, and nobody translates."""
    report = scenario.run(
        find_scenario("server_moves_to_new_address"), engine=engine, translator="none"
    )
    failed = [each.name for each in report.assertions if not each.ok]

    assert not report.passed
    assert "the connections carry on after the move" in failed
    assert "no frame between gateway and destination carries OLD" in failed
    assert "the engine restores the server" not in failed


@pytest.mark.root
@pytest.mark.lab
@marked
@pytest.mark.parametrize("translator", ["naive", "naive+purge"])
def test_baselines_are_torn_down_too(engine, translator):
    """What they do for the connection is the matrix's business, and not certain."""
    report = scenario.run(
        find_scenario("server_moves_to_new_address"), engine=engine, translator=translator
    )
    restored = [each for each in report.assertions if each.name.startswith("the engine restores")]
    left = [each for each in report.assertions if each.name.startswith("teardown")]

    assert [each.ok for each in restored] == [True]
    assert [each.ok for each in left] == [True, True, True]


@pytest.mark.root
@pytest.mark.lab
@marked
def test_a_lost_probe_is_lost_and_the_connection_is_not(engine):
    report = scenario.run(find_scenario("server_moves_to_new_address"), engine=engine, probe=False)

    assert [str(each) for each in report.assertions if not each.ok] == []


def natkeep(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from natkeep.cli import main; sys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", program, "lab", *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip


@pytest.mark.root
@pytest.mark.lab
def test_command_line_gives_a_verdict_a_report_and_captures(tmp_path):
    done = natkeep(
        "run", "server_moves_to_new_address", "--engine", "repair", "--json",
        "--pcap", str(tmp_path / "pcap"), "--report", str(tmp_path / "report"),
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["schema"] == SCHEMA
    assert (document["scenario"], document["engine"]) == ("server_moves_to_new_address", "repair")
    assert document["verdict"] == "pass"
    assert {"name", "ok", "detail"} == set(document["assertions"][0])
    assert min(document["blackout_ms"], document["stall_ms"], document["segments"]) > 0
    assert json.loads((tmp_path / "report/report.json").read_text()) == document
    assert "verdict: pass" in (tmp_path / "report/report.txt").read_text()
    page = tmp_path / "report/server_moves_to_new_address.html"
    assert f"as a page: {page}\n" in done.stderr
    assert "blackout" in page.read_text()
    assert {path.name for path in (tmp_path / "pcap").iterdir()} == {
        "client.pcap", "near.pcap", "far.pcap", "destination.pcap",
    }  # fmt: skip


@pytest.mark.root
@pytest.mark.lab
def test_command_line_exits_1_on_a_verdict_of_fail():
    done = natkeep(
        "run", "server_moves_to_new_address", "--engine", "repair", "--without-translation",
        "--json",
    )  # fmt: skip

    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["verdict"] == "fail"


def test_list_names_every_scenario_with_its_title():
    listed = json.loads(natkeep("list", "--json").stdout)

    assert listed["schema"] == SCHEMA
    assert [each["name"] for each in listed["scenarios"]] == [each.name for each in scenarios()]
    assert natkeep("list").stdout.count("\n") == len(scenarios())


def test_an_unknown_scenario_is_a_usage_error():
    done = natkeep("run", "nobody")

    assert done.returncode == 2
    assert done.stdout == ""
    assert "no scenario 'nobody'" in done.stderr


def test_a_scenario_for_one_engine_is_told_with_no_other():
    done = natkeep("run", "runc_container_moves", "--engine", "repair")

    assert done.returncode == 2
    assert "runc_container_moves is for --engine runc only, not repair" in done.stderr


@named([each.name for each in scenarios()])
def test_scenario_file_has_a_title_and_a_drawing(name):
    text = find_scenario(name).path.read_text(encoding="utf-8")

    assert find_scenario(name).title.endswith(".")
    assert "┌" in text.split('"""')[1]


def test_a_scenario_that_breaks_down_ends_in_a_verdict(tmp_path, monkeypatch):
    """An unforeseen error of the lab is a failed assertion, not a traceback."""

    class Broken:
        def __init__(self, name, **_):
            self.report = Report(name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def conclude(self):
            self.report.assertions.append(Assertion("concluded", True))

    monkeypatch.setattr(scenario, "Lab", Broken)
    story = tmp_path / "story.py"
    story.write_text(
        '"""A story."""\n'
        "from natkeep.lab.host import LabError\n"
        "def run(lab):\n    raise LabError('no bridge')\n"
    )
    report = scenario.run(Scenario("story", story))

    assert [str(each) for each in report.assertions] == [
        "FAIL the scenario comes to its end: no bridge",
        "ok   concluded",
    ]


def test_no_assertion_is_no_pass():
    assert not Report("empty").passed


def test_the_story_ends_with_the_tuple_and_the_verdict():
    report = Report(
        "name", engine="criu", translator="natkeep", old="10.2.0.10", new="10.3.0.20",
        assertions=[Assertion("something", True)], before=["a > b"], after=["a > b"],
    )  # fmt: skip
    lines = render_report(report).splitlines()

    assert lines[-1] == "engine criu: four-tuple a > b unchanged; verdict: pass"
    assert any("OLD⇄NEW" in line for line in lines[-7:])


def test_a_named_criu_that_does_not_work_is_not_used(monkeypatch):
    monkeypatch.setenv("NATKEEP_CRIU", "/bin/false")

    assert find_criu() is None
    assert engines.choose_engine("auto").name == "repair"
    with pytest.raises(EngineError) as raised:
        engines.choose_engine("criu")
    assert raised.value.hint
