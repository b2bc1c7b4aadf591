"""the matrix: a representative part of it, what counts as passed, and that its cells can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from natkeep.errors import UsageError
from natkeep.lab import matrix, matrix_table
from natkeep.lab.matrix import Cell, Column, Outcome, Selection, find_situations, judge
from natkeep.lab.report import Assertion, Report
from natkeep.lab.situations import Situation

ROOT = Path(__file__).resolve().parents[2]
PROCESSORS = len(os.sched_getaffinity(0))
STATEFUL = Column("natkeep", "stateful", True)
STATELESS = Column("natkeep", "stateless", True)
NAIVE = Column("naive", "stateful", True)
NOTHING = Situation(1, "nothing", lambda lab: None)


def run(
    selection: Selection, *, probes: tuple[bool, ...] = (True, False), name: str = ""
) -> list[Outcome]:
    """All that is selected, or the row of exactly this *name* of it."""
    cells = [cell for cell in selection.cells() if cell.applies and cell.column.probe in probes]
    cells = [cell for cell in cells if name in ("", cell.situation.name)]
    return matrix.run(cells, jobs=PROCESSORS)


def failures(outcomes: list[Outcome]) -> list[str]:
    assert outcomes
    return [f"{each.cell}: {each.reason}" for each in outcomes if each.verdict != "pass"]


# A part of the table. The probe is lost where that makes it harder.


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.parametrize(
    ("number", "families"),
    [("4", (4, 6)), ("6", (4, 6)), ("7", (6,)), ("9", (4, 6)), ("10", (4,)), ("11", (6,))],
)
def test_natkeep_keeps_the_connection_in_both_modes(number, families):
    outcomes = run(Selection((number,), ("natkeep",), (), families), probes=(False,))

    assert failures(outcomes) == []


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.parametrize("words", ["path MTU drops beyond", "path MTU drops before"])
def test_the_path_may_become_narrow(words):
    """The hardest is IPv6 without state: only routers' errors tell, and they quote NEW."""
    outcomes = run(Selection((words,), ("natkeep",), ("stateless",), (6,)), probes=(True,))

    assert failures(outcomes) == []


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.parametrize(
    ("words", "modes", "families"),
    [
        ("rests, then the client ends it", (), (6,)),
        ("rests, then the process aborts", (), (4,)),
        ("rests, then either side speaks", ("stateful",), (4,)),
        ("entries deleted", ("stateful",), (4,)),
        ("not tracked any more", ("stateful",), (6,)),
    ],
)
def test_a_connection_outlives_its_entries(words, modes, families):
    """By time, deleted or never made; also where the gateway publishes or masquerades."""
    outcomes = run(Selection((words,), ("natkeep",), modes, families), probes=(True,))

    assert failures(outcomes) == []


@pytest.mark.root
@pytest.mark.lab
def test_what_was_never_kept_opens_nothing():
    selection = Selection(("default deny",), ("natkeep",), (), (4,))
    outcomes = run(selection, probes=(True,), name="default deny")

    assert failures(outcomes) == []


@pytest.mark.root
@pytest.mark.lab
@pytest.mark.parametrize(
    ("number", "reason"),
    [("3", "what the client says is answered"), ("6", "the server's FIN arrives")],
)
def test_rules_from_a_blog_lose_the_connection(number, reason):
    """The cells can fail: the gateway tracks OLD, and a FIN is the very first packet."""
    outcomes = run(Selection((number,), ("naive",), (), (4,)), probes=(False,))

    assert [each.verdict for each in outcomes] == ["fail"]
    assert reason in outcomes[0].reason


@pytest.mark.root
@pytest.mark.lab
def test_rules_from_a_blog_let_strangers_in():
    selection = Selection(("default deny",), ("naive",), (), (4,))
    outcomes = run(selection, probes=(True,), name="default deny")

    assert [each.verdict for each in outcomes] == ["fail"]
    assert "another client port" in outcomes[0].reason


@pytest.mark.root
@pytest.mark.lab
def test_command_line_prints_a_document_and_keeps_a_report(tmp_path):
    program = "import sys; from natkeep.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", program, "lab", "matrix", "--only", "2", "--only", "5", "--json",
         "--family", "4", "--mode", "stateful", "--translator", "natkeep",
         "--translator", "naive", "--report", str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    document = json.loads(done.stdout)
    shown = {(each["number"], each["translator"], each["probe"]): each["shown"]
             for each in document["cells"]}  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert (document["schema"], document["verdict"]) == (1, "pass")
    assert shown[5, "natkeep", "lost"] == "1/1"
    assert shown[5, "naive", "lost"] == "0/1"  # a baseline's failure is no failure of the run
    assert json.loads((tmp_path / "matrix.json").read_text()) == document
    assert "verdict: pass" in (tmp_path / "matrix.txt").read_text()
    (kept,) = tmp_path.glob("5-*-naive")
    assert {"client.pcap", "destination.pcap", "report.txt"} <= {p.name for p in kept.iterdir()}


# The selection


def test_every_number_of_the_issue_has_a_situation():
    assert {each.number for each in find_situations()} >= {*range(1, 23)}


def test_everything_is_selected_by_default():
    cells = Selection().cells()

    assert len(cells) == len(find_situations()) * 2 * 8


def test_a_situation_is_selected_by_number_or_by_words():
    by_number, by_words = Selection(("18",)), Selection(("TWO PROCESSES",))

    assert by_number.cells() == by_words.cells()
    assert len({each.situation.name for each in by_number.cells()}) == 2


def test_cells_are_selected_by_their_window_probe():
    sent = Selection(("1",), ("natkeep",), (), (), (True,)).cells()

    assert len(sent) == 4
    assert all(each.column.probe for each in sent)


def test_an_unknown_situation_is_a_usage_error():
    with pytest.raises(UsageError, match="'flood'") as raised:
        Selection(("1", "flood")).cells()
    assert "1 client speaks first" in (raised.value.hint or "")


def test_baselines_know_no_modes():
    columns = Selection((), ("natkeep", "naive"), ("stateless",)).columns()

    assert [each.group for each in columns] == ["natkeep stateless"] * 2 + ["naive"] * 2


# What a run comes to


def report(*assertions: Assertion, mode: str = "stateless") -> Report:
    return Report("name", mode=mode, assertions=list(assertions))


REFUSED = Assertion("the translator prepares", False, "cannot be kept")
CLEAN = Assertion("teardown leaves the gateway byte-identical", True)
DIRTY = Assertion("teardown leaves the gateway byte-identical", False, "gone")


@pytest.mark.parametrize(
    ("told", "refused", "may_refuse", "verdict"),
    [
        (report(CLEAN), "", (), "pass"),
        (report(), "", (), "fail"),
        (report(REFUSED, CLEAN), "", ("stateless",), "fail"),
        (report(REFUSED, CLEAN), "cannot", ("stateless",), "refused"),
        (report(REFUSED, CLEAN), "cannot", (), "fail"),
        (report(REFUSED, CLEAN, mode="stateful"), "cannot", ("stateless",), "fail"),
        (report(REFUSED, DIRTY), "cannot", ("stateless",), "fail"),
    ],
    ids=["passed", "empty", "failed", "refused", "must not", "not in this mode", "not clean"],
)
def test_a_refusal_counts_only_where_it_may_be(told, refused, may_refuse, verdict):
    assert judge(told, refused, may_refuse=may_refuse)[0] == verdict


INCOMPLETE = "the captures are complete: near: 3 packets never written"


@pytest.mark.parametrize(
    ("told", "verdict", "reason", "retaken"),
    [
        (["pass"], "pass", "", 0),
        ([INCOMPLETE, "pass"], "pass", "", 1),
        (["no reset on any wire: 1", "pass"], "fail", "no reset on any wire: 1", 0),
        ([INCOMPLETE, "no reset: 1", "pass"], "fail", "no reset: 1", 1),
        ([INCOMPLETE, INCOMPLETE, INCOMPLETE, "pass"], "fail", INCOMPLETE, 2),
    ],
    ids=["proved", "run again", "failed", "failed again", "never proved"],
)
def test_a_run_is_repeated_only_where_a_capture_missed_frames(
    told, verdict, reason, retaken, monkeypatch
):
    runs = iter(told)

    def play(cell, report):
        word = next(runs)
        return Outcome(cell, "pass") if word == "pass" else Outcome(cell, "fail", word)

    monkeypatch.setattr(matrix, "play", play)
    outcome = matrix.play_until_proved(Cell(NOTHING, 4, STATEFUL))

    assert (outcome.verdict, outcome.reason, outcome.retaken) == (verdict, reason, retaken)


def test_what_the_wires_show_goes_before_an_incomplete_capture():
    lost = Assertion("the captures are complete", False, "near: 3 packets never written")
    reset = Assertion("no reset on any wire", False, "1 in 9 segments")

    assert (
        judge(report(lost, reset), "", may_refuse=())[1] == "no reset on any wire: 1 in 9 segments"
    )


# Cells run in processes of their own; what they do is replaced here.


def outcome_of(monkeypatch, play, *, deadline=5.0) -> Outcome:
    monkeypatch.setattr(matrix, "play", play)
    monkeypatch.setattr(matrix, "sweep", list)
    (outcome,) = matrix.run([Cell(NOTHING, 4, STATEFUL)], jobs=2, deadline=deadline)
    return outcome


@pytest.mark.needs("scapy")
def test_a_cell_tells_its_outcome(monkeypatch):
    outcome = outcome_of(monkeypatch, lambda cell, report: Outcome(cell, "refused", "why", 1.5))

    assert (outcome.verdict, outcome.reason, outcome.seconds) == ("refused", "why", 1.5)


@pytest.mark.needs("scapy")
def test_a_cell_that_crashes_has_failed(monkeypatch):
    outcome = outcome_of(monkeypatch, lambda cell, report: {}["missing"])

    assert (outcome.verdict, outcome.reason) == ("fail", "the lab: KeyError: 'missing'")


@pytest.mark.needs("scapy")
def test_a_cell_whose_process_dies_has_failed(monkeypatch):
    outcome = outcome_of(monkeypatch, lambda cell, report: os._exit(3))

    assert (outcome.verdict, outcome.reason) == ("fail", "the cell's process: it ended with 3")


@pytest.mark.needs("scapy")
def test_a_cell_that_hangs_has_failed_at_its_deadline(monkeypatch):
    began = time.monotonic()
    outcome = outcome_of(monkeypatch, lambda cell, report: time.sleep(60), deadline=0.2)

    assert outcome.reason == "the cell's process: not over at its deadline"
    assert time.monotonic() - began < 30


# The table


def tallied(*outcomes: Outcome) -> matrix_table.Table:
    cells = [
        Cell(situation, family, column)
        for situation in (NOTHING, Situation(20, "one family", NOTHING.moves, families=(4,)))
        for family in (4, 6)
        for column in (STATEFUL, STATELESS, NAIVE)
    ]
    return matrix_table.make_table(cells, outcomes, reps=2, jobs=2, seconds=90.0)


def test_the_table_counts_and_names_what_failed():
    cell = Cell(NOTHING, 4, STATEFUL)
    told = tallied(
        Outcome(cell, "pass"),
        Outcome(cell, "fail", "the reason:\n  first"),
        Outcome(Cell(NOTHING, 4, STATELESS), "refused", "cannot"),
        Outcome(Cell(NOTHING, 4, NAIVE), "fail", "of course"),
    )
    lines = told.as_text().splitlines()

    assert lines[:5] == [
        "                    natkeep stateful   natkeep stateless   naive",
        "situation     probe             sent                sent    sent",
        " 1 nothing    IPv4               1/2             refused     0/1",
        "              IPv6                 -                   -       -",
        "20 one family IPv4                 -                   -       -",
    ]
    assert "natkeep stateful   1 of 2 runs passed; 0 of 1 cells never failed" in lines
    assert "  1 nothing, IPv4, probe sent, natkeep stateful: the reason: first" in lines
    assert not any("of course" in line for line in lines)
    assert lines[-1] == "3 cells, 4 runs, 2 at once, in 1.5 min; verdict: fail"
    assert told.failed


def test_a_baseline_may_fail():
    assert not tallied(Outcome(Cell(NOTHING, 4, NAIVE), "fail")).failed


def test_the_document_has_every_cell():
    document = tallied(Outcome(Cell(NOTHING, 4, STATELESS), "refused", "cannot")).as_json()
    first = document["cells"][1]

    assert (document["schema"], document["verdict"], len(document["cells"])) == (1, "pass", 12)
    assert (first["shown"], first["refused"], first["mode"]) == ("refused", 1, "stateless")
    assert document["totals"]["natkeep stateless"] == {"tried": 1, "passed": 0, "refused": 1}
